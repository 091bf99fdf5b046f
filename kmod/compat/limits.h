/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Queue limits. Until 6.16, and in part until later, struct queue_limits lacks
 * fields that the driver sets, or has them under other names. The driver then
 * fills a structure of compat/, which is translated when a disk is allocated:
 * by limits.c into the structure of the kernel or, before 6.11, by
 * limits_setters.c into calls that set the limits of the new disk.
 *
 * The driver must therefore not use "struct queue_limits" for the limits of an
 * existing queue.
 */
#ifndef UBLK_COMPAT_LIMITS_H
#define UBLK_COMPAT_LIMITS_H

#include <linux/version.h>

/*
 * A bio of which not one logical block fits into a request has to be refused.
 * Linux 6.1 splits it into nothing, and crashes; later kernels send it as one
 * request, whatever its length. Since 7.0 at the latest it fails.
 */
#define UBLK_SPLITS_TO_NOTHING	(KERNEL_VERSION(7, 0, 0) > LINUX_VERSION_CODE)

#if !defined(UBLK_HAVE_LIMITS_FEATURES) || !defined(UBLK_HAVE_HW_ZONE_APPEND) || \
	!defined(UBLK_HAVE_PI_TUPLE_SIZE)

#include <linux/blk-integrity.h>
#include <linux/blk-mq.h>
#include <linux/blkdev.h>

#ifndef UBLK_HAVE_LIMITS_FEATURES
typedef unsigned int __bitwise blk_features_t;

#define BLK_FEAT_WRITE_CACHE	((__force blk_features_t)(1u << 0))
#define BLK_FEAT_FUA		((__force blk_features_t)(1u << 1))
#define BLK_FEAT_ROTATIONAL	((__force blk_features_t)(1u << 2))
#define BLK_FEAT_ZONED		((__force blk_features_t)(1u << 10))
#endif

struct ublk_blk_integrity {
	unsigned char		flags;
	unsigned char		csum_type;	/* enum blk_integrity_checksum */
	unsigned char		metadata_size;
	unsigned char		pi_offset;
	unsigned char		interval_exp;
	unsigned char		tag_size;
	unsigned char		pi_tuple_size;
};

struct ublk_queue_limits {
	blk_features_t		features;
	unsigned long		seg_boundary_mask;
	unsigned long		virt_boundary_mask;

	unsigned int		max_hw_sectors;
	unsigned int		chunk_sectors;
	unsigned int		max_segment_size;
	unsigned int		physical_block_size;
	unsigned int		logical_block_size;
	unsigned int		io_min;
	unsigned int		io_opt;
	unsigned int		max_hw_discard_sectors;
	unsigned int		max_write_zeroes_sectors;
	unsigned int		max_hw_zone_append_sectors;
	unsigned int		discard_granularity;
	unsigned int		discard_alignment;

	unsigned short		max_segments;
	unsigned short		max_integrity_segments;
	unsigned short		max_discard_segments;

	unsigned int		max_open_zones;
	unsigned int		max_active_zones;
	unsigned int		dma_alignment;

	struct ublk_blk_integrity integrity;
};

struct gendisk *ublk_compat_alloc_disk(struct blk_mq_tag_set *set,
				       const struct ublk_queue_limits *lim,
				       void *queuedata,
				       struct lock_class_key *key);

#define queue_limits	ublk_queue_limits
#define blk_integrity	ublk_blk_integrity

#undef blk_mq_alloc_disk
#define blk_mq_alloc_disk(set, lim, queuedata) ({			\
	static struct lock_class_key __key;				\
									\
	ublk_compat_alloc_disk(set, lim, queuedata, &__key);		\
})

#endif

#endif /* UBLK_COMPAT_LIMITS_H */
