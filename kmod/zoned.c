// SPDX-License-Identifier: GPL-2.0
/*
 * Zoned disks: the server reports the zones, as the data of a request that has
 * no place on the disk.
 */
#include <linux/blkzoned.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "internal.h"

/* Most memory for the zones of one request. */
#define UBLK_REPORT_BYTES	SZ_64K

/*
 * Memory for @nr_zones or, in want of it, fewer. It is one piece and small
 * enough for any limits of the queue, so that a request can be made of it.
 */
static struct blk_zone *ublk_alloc_report(struct request_queue *q,
					  unsigned int nr_zones, size_t *bytes)
{
	size_t size = min_t(size_t, nr_zones,
			    UBLK_REPORT_BYTES / sizeof(struct blk_zone));

	size = ALIGN(size * sizeof(struct blk_zone), SECTOR_SIZE);
	size = min_t(u64, size, (u64)queue_max_hw_sectors(q) << SECTOR_SHIFT);
	/* However the memory is cut up, this many segments are allowed. */
	size = min_t(size_t, size,
		     (size_t)queue_max_segments(q) * UBLK_MIN_SEGMENT_SIZE);
	for (;;) {
		struct blk_zone *zones;

		zones = kmalloc(size,
				GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN);
		if (zones || size <= SECTOR_SIZE) {
			*bytes = size;
			return zones;
		}
		size = ALIGN(size / 2, SECTOR_SIZE);
	}
}

/* Lets the server fill @zones with the zones from @sector on. */
static int ublk_request_zones(struct gendisk *disk, sector_t sector,
			      struct blk_zone *zones, unsigned int nr_zones)
{
	size_t bytes = nr_zones * sizeof(*zones);
	struct request *req;
	struct ublk_rq *rq;
	int ret;

	req = blk_mq_alloc_request(disk->queue, REQ_OP_DRV_IN, 0);
	if (IS_ERR(req))
		return PTR_ERR(req);
	rq = blk_mq_rq_to_pdu(req);
	rq->sector = sector;
	rq->nr_zones = nr_zones;

	/* What the server leaves out reads as the end of the report. */
	memset(zones, 0, bytes);
	ret = blk_rq_map_kern(req, zones, bytes, GFP_KERNEL);
	if (!ret)
		ret = blk_status_to_errno(blk_execute_rq(req, false));
	blk_mq_free_request(req);
	return ret;
}

/*
 * Reports @nr_zones from the one with @sector in it, or all to the end of the
 * disk. Returns how many there were.
 */
int ublk_report_zones(struct gendisk *disk, sector_t sector,
		      unsigned int nr_zones, struct blk_report_zones_args *args)
{
	struct request_queue *q = disk->queue;
	sector_t zone_sectors = q->limits.chunk_sectors;
	sector_t capacity = get_capacity(disk);
	unsigned int reported = 0, asked, i;
	struct blk_zone *zones;
	size_t bytes;
	int ret = 0;

	if (!is_power_of_2(zone_sectors) || sector >= capacity)
		return 0;
	sector = round_down(sector, zone_sectors);
	nr_zones = min_t(u64, nr_zones,
			 (capacity - sector + zone_sectors - 1) >>
			 ilog2(zone_sectors));

	zones = ublk_alloc_report(q, nr_zones, &bytes);
	if (!zones)
		return -ENOMEM;
	while (reported < nr_zones) {
		asked = min_t(size_t, nr_zones - reported,
			      bytes / sizeof(*zones));
		ret = ublk_request_zones(disk, sector, zones, asked);
		if (ret)
			goto out;
		for (i = 0; i < asked; i++) {
			if (!zones[i].len)
				goto out;
			/* Nobody above expects another zone than the next. */
			if (zones[i].start != sector) {
				ret = -EIO;
				goto out;
			}
			ret = disk_report_zone(disk, &zones[i], reported, args);
			if (ret)
				goto out;
			sector += zone_sectors;
			reported++;
		}
	}
out:
	kfree(zones);
	return ret ?: reported;
}

/*
 * Has the block layer read and check all the zones. The server must be
 * answering; the queue must not be frozen, for a while it will be.
 */
int ublk_revalidate_zones(struct gendisk *disk)
{
	return blk_revalidate_disk_zones(disk);
}
