// SPDX-License-Identifier: GPL-2.0
/*
 * Queue limits of Linux 6.11 to 6.16.
 *
 * In these kernels the metadata of an interval is called a tuple, with the
 * protection information at an offset in it. The size of the latter follows
 * from the checksum type.
 */
#include "limits.h"

/* In this file both are the structures of the kernel. */
#undef queue_limits
#undef blk_integrity

static void ublk_compat_integrity(const struct ublk_blk_integrity *from,
				  struct blk_integrity *to)
{
	to->flags = from->flags;
	to->csum_type = from->csum_type;
	to->tuple_size = from->metadata_size;
	to->pi_offset = from->pi_offset;
	to->interval_exp = from->interval_exp;
	to->tag_size = from->tag_size;
}

struct gendisk *ublk_compat_alloc_disk(struct blk_mq_tag_set *set,
				       const struct ublk_queue_limits *lim,
				       void *queuedata,
				       struct lock_class_key *key)
{
	struct queue_limits real = {
		.features		= lim->features,
		.seg_boundary_mask	= lim->seg_boundary_mask,
		.virt_boundary_mask	= lim->virt_boundary_mask,
		.max_hw_sectors		= lim->max_hw_sectors,
		.chunk_sectors		= lim->chunk_sectors,
		.max_segment_size	= lim->max_segment_size,
		.physical_block_size	= lim->physical_block_size,
		.logical_block_size	= lim->logical_block_size,
		.io_min			= lim->io_min,
		.io_opt			= lim->io_opt,
		.max_hw_discard_sectors	= lim->max_hw_discard_sectors,
		.max_write_zeroes_sectors = lim->max_write_zeroes_sectors,
#ifdef UBLK_HAVE_HW_ZONE_APPEND
		.max_hw_zone_append_sectors = lim->max_hw_zone_append_sectors,
#else
		.max_zone_append_sectors = lim->max_hw_zone_append_sectors,
#endif
		.discard_granularity	= lim->discard_granularity,
		.discard_alignment	= lim->discard_alignment,
		.max_segments		= lim->max_segments,
		.max_integrity_segments	= lim->max_integrity_segments,
		.max_discard_segments	= lim->max_discard_segments,
		.max_open_zones		= lim->max_open_zones,
		.max_active_zones	= lim->max_active_zones,
		.dma_alignment		= lim->dma_alignment,
	};

	ublk_compat_integrity(&lim->integrity, &real.integrity);
	return __blk_mq_alloc_disk(set, &real, queuedata, key);
}
