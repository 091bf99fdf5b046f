// SPDX-License-Identifier: GPL-2.0
/*
 * Zoned disks. The server reports the zones, as the data of a request that has
 * no position on the disk.
 */
#include <linux/blkzoned.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "internal.h"

/* Maximum size of the report of one request. */
#define UBLK_REPORT_BYTES	SZ_64K

/*
 * Allocates memory for @nr_zones or, if memory is short, for fewer. It is
 * contiguous and within all limits of the queue, so that one request can
 * transfer it.
 */
static struct blk_zone *ublk_alloc_report(struct request_queue *q,
					  unsigned int nr_zones, size_t *bytes)
{
	size_t size = min_t(size_t, nr_zones,
			    UBLK_REPORT_BYTES / sizeof(struct blk_zone));

	size = ALIGN(size * sizeof(struct blk_zone), SECTOR_SIZE);
	size = min_t(u64, size, (u64)queue_max_hw_sectors(q) << SECTOR_SHIFT);
	/* This many segments are allowed, however the memory is split. */
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

/* Asks the server to report zones, starting with the one at @sector. */
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

	/* Zones that the server omits read as the end of the report. */
	memset(zones, 0, bytes);
	ret = blk_rq_map_kern(req, zones, bytes, GFP_KERNEL);
	if (!ret)
		ret = blk_status_to_errno(blk_execute_rq(req, false));
	blk_mq_free_request(req);
	return ret;
}

/**
 * ublk_report_zones() - Report zones (BLKREPORTZONE and the block layer).
 * @disk: the disk
 * @sector: a sector of the first zone
 * @nr_zones: maximum number of zones
 * @args: callback
 *
 * Context: Process context; waits for the server.
 *
 * Return: number of zones reported, or a negative errno.
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
			/* The callers rely on the order of zones. */
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

/**
 * ublk_revalidate_zones() - Make the block layer read and check all zones.
 * @disk: the disk
 *
 * The server must be able to answer. The queue must not be frozen, as this
 * freezes it for a while.
 *
 * Context: Process context. Caller holds ub->mutex.
 *
 * Return: 0, or a negative errno.
 */
int ublk_revalidate_zones(struct gendisk *disk)
{
	return blk_revalidate_disk_zones(disk);
}
