/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Operations of a disk. Where the kernel calls them with other parameters,
 * macros by the names of the driver's functions change the definitions. They
 * do not meddle with a name that no parameters follow.
 */
#ifndef UBLK_COMPAT_DISK_OPS_H
#define UBLK_COMPAT_DISK_OPS_H

/* Until 6.4: open() is given the block device. */
#ifndef UBLK_HAVE_OPEN_DISK
#include <linux/blkdev.h>

typedef fmode_t blk_mode_t;

#define ublk_open(disk, mode)						\
	ublk_open_disk(disk, mode);					\
static int ublk_open(struct block_device *bdev, blk_mode_t mode_of_bdev) \
{									\
	return ublk_open_disk(bdev->bd_disk, mode_of_bdev);		\
}									\
static int ublk_open_disk(disk, mode)
#endif

/* Until 6.18: report_zones() is given a callback and its data. */
#if defined(CONFIG_BLK_DEV_ZONED) && !defined(UBLK_HAVE_REPORT_ZONES_ARGS)
#include <linux/blkdev.h>

#define ublk_report_zones(disk, sector, nr_zones, args)			\
	ublk_report_zones(disk, sector, nr_zones,			\
			  report_zones_cb report_zone, void *report_data)
#define disk_report_zone(disk, zone, idx, args)				\
	report_zone(zone, idx, report_data)
#endif

/* Until 6.9: for drivers that keep a copy of what was found. */
#if defined(CONFIG_BLK_DEV_ZONED) && !defined(UBLK_HAVE_REVALIDATE_ZONES_DISK)
#include <linux/blkdev.h>

static inline int ublk_compat_revalidate_disk_zones(struct gendisk *disk)
{
	return blk_revalidate_disk_zones(disk, NULL);
}

#define blk_revalidate_disk_zones ublk_compat_revalidate_disk_zones
#endif

#endif /* UBLK_COMPAT_DISK_OPS_H */
