/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Zoned disks.
 */
#ifndef UBLK_COMPAT_ZONED_H
#define UBLK_COMPAT_ZONED_H

#ifdef CONFIG_BLK_DEV_ZONED

/* Until 6.18 report_zones() takes a callback and its data. */
#ifndef UBLK_HAVE_REPORT_ZONES_ARGS
#include <linux/blkdev.h>

struct blk_report_zones_args {
	report_zones_cb	cb;
	void		*data;
};

int ublk_report_zones_args(struct gendisk *disk, sector_t sector,
			   unsigned int nr_zones,
			   struct blk_report_zones_args *args);

static inline int disk_report_zone(struct gendisk *disk, struct blk_zone *zone,
				   unsigned int idx,
				   struct blk_report_zones_args *args)
{
	return args->cb(zone, idx, args->data);
}

static inline int ublk_report_zones(struct gendisk *disk, sector_t sector,
				    unsigned int nr_zones, report_zones_cb cb,
				    void *data)
{
	struct blk_report_zones_args args = { .cb = cb, .data = data };

	return ublk_report_zones_args(disk, sector, nr_zones, &args);
}

/* Renames the function of the driver, but not the name in the operations. */
#define ublk_report_zones(...)	ublk_report_zones_args(__VA_ARGS__)
#endif

/* Until 6.9 there is a second parameter, for drivers that cache zones. */
#ifndef UBLK_HAVE_REVALIDATE_ZONES_DISK
#include <linux/blkdev.h>

static inline int ublk_compat_revalidate_disk_zones(struct gendisk *disk)
{
	return blk_revalidate_disk_zones(disk, NULL);
}

#define blk_revalidate_disk_zones ublk_compat_revalidate_disk_zones
#endif

#endif /* CONFIG_BLK_DEV_ZONED */

#endif /* UBLK_COMPAT_ZONED_H */
