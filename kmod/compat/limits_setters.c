// SPDX-License-Identifier: GPL-2.0
/*
 * Queue limits of kernels before 6.11, which have a function for each limit,
 * and silently correct invalid values. Here such values are rejected, as later
 * kernels do, and limits that are not set get the defaults of later kernels.
 */
#include <linux/log2.h>

#include "limits.h"

static bool ublk_limits_valid(const struct ublk_queue_limits *lim)
{
	unsigned int block_sectors = lim->logical_block_size >> SECTOR_SHIFT;

	if (lim->logical_block_size < SECTOR_SIZE ||
	    lim->logical_block_size > PAGE_SIZE ||
	    !is_power_of_2(lim->logical_block_size))
		return false;
	if (lim->physical_block_size > lim->logical_block_size &&
	    !is_power_of_2(lim->physical_block_size))
		return false;
	if (lim->max_hw_sectors < PAGE_SECTORS ||
	    lim->max_hw_sectors < block_sectors)
		return false;
	if (lim->seg_boundary_mask && lim->seg_boundary_mask < PAGE_SIZE - 1)
		return false;
	if (!lim->virt_boundary_mask && lim->max_segment_size &&
	    lim->max_segment_size < PAGE_SIZE)
		return false;
	if (lim->dma_alignment > PAGE_SIZE)
		return false;
	if (lim->features & BLK_FEAT_ZONED)
		return IS_ENABLED(CONFIG_BLK_DEV_ZONED) &&
		       (!lim->max_active_zones ||
			lim->max_open_zones <= lim->max_active_zones);
	return !lim->max_open_zones && !lim->max_active_zones &&
	       !lim->max_hw_zone_append_sectors;
}

static void ublk_set_segments(struct request_queue *q,
			      const struct ublk_queue_limits *lim)
{
	if (lim->max_segments)
		blk_queue_max_segments(q, lim->max_segments);
	if (lim->seg_boundary_mask)
		blk_queue_segment_boundary(q, lim->seg_boundary_mask);
	/* Each of the setters warns if the other limit is set. Splitting respects both. */
	if (lim->max_segment_size)
		blk_queue_max_segment_size(q, lim->max_segment_size);
	if (lim->virt_boundary_mask) {
		blk_queue_virt_boundary(q, lim->virt_boundary_mask);
		if (lim->max_segment_size)
			q->limits.max_segment_size = lim->max_segment_size;
	}
	blk_queue_dma_alignment(q, lim->dma_alignment ?: SECTOR_SIZE - 1);
}

/* The largest multiple of the logical block size that fits into a bio. */
static unsigned int ublk_max_bio_sectors(const struct ublk_queue_limits *lim)
{
	return round_down(UINT_MAX, lim->logical_block_size) >> SECTOR_SHIFT;
}

static void ublk_set_discard(struct request_queue *q,
			     const struct ublk_queue_limits *lim)
{
	unsigned int most;

	blk_queue_max_discard_sectors(q, lim->max_hw_discard_sectors);
	blk_queue_max_discard_segments(q, lim->max_discard_segments ?: 1);
	/* Its length in bytes must fit into a bio, which the block layer does not check. */
	most = min(lim->max_write_zeroes_sectors, ublk_max_bio_sectors(lim));
	blk_queue_max_write_zeroes_sectors(q, most);
	q->limits.discard_alignment = lim->discard_alignment;
	if (lim->max_hw_discard_sectors)
		q->limits.discard_granularity =
			max(lim->discard_granularity,
			    queue_physical_block_size(q));
}

static void ublk_set_zones(struct gendisk *disk,
			   const struct ublk_queue_limits *lim)
{
#ifdef CONFIG_BLK_DEV_ZONED
	struct request_queue *q = disk->queue;

	disk_set_zoned(disk, BLK_ZONED_HM);
	disk_set_max_open_zones(disk, lim->max_open_zones);
	disk_set_max_active_zones(disk, lim->max_active_zones);
	blk_queue_max_zone_append_sectors(q, lim->max_hw_zone_append_sectors);
	blk_queue_flag_set(QUEUE_FLAG_ZONE_RESETALL, q);
	/* Only an I/O scheduler keeps the writes to a zone in order. */
	blk_queue_required_elevator_features(q, ELEVATOR_F_ZBD_SEQ_WRITE);
#endif
}

struct gendisk *ublk_compat_alloc_disk(struct blk_mq_tag_set *set,
				       const struct ublk_queue_limits *lim,
				       void *queuedata,
				       struct lock_class_key *key)
{
	struct request_queue *q;
	struct gendisk *disk;

	if (!ublk_limits_valid(lim))
		return ERR_PTR(-EINVAL);
	disk = __blk_mq_alloc_disk(set, queuedata, key);
	if (IS_ERR(disk))
		return disk;
	q = disk->queue;

	blk_queue_logical_block_size(q, lim->logical_block_size);
	blk_queue_physical_block_size(q, lim->physical_block_size);
	blk_queue_io_min(q, lim->io_min);
	blk_queue_io_opt(q, round_down(lim->io_opt,
				       queue_physical_block_size(q)));
	blk_queue_max_hw_sectors(q, lim->max_hw_sectors);
	blk_queue_chunk_sectors(q, lim->chunk_sectors);
	ublk_set_segments(q, lim);
	ublk_set_discard(q, lim);
	if (lim->features & BLK_FEAT_WRITE_CACHE)
		blk_queue_write_cache(q, true, lim->features & BLK_FEAT_FUA);
	if (!(lim->features & BLK_FEAT_ROTATIONAL))
		blk_queue_flag_set(QUEUE_FLAG_NONROT, q);
	if (lim->features & BLK_FEAT_ZONED)
		ublk_set_zones(disk, lim);
	return disk;
}
