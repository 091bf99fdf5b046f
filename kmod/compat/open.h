/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Until 6.4 open() of a disk takes the block device. Only for disk.c.
 */
#ifndef UBLK_COMPAT_OPEN_H
#define UBLK_COMPAT_OPEN_H

#include <linux/blkdev.h>

#define blk_mode_t	fmode_t

static int ublk_open_disk(struct gendisk *disk, blk_mode_t mode);

static int ublk_open(struct block_device *bdev, fmode_t mode)
{
	return ublk_open_disk(bdev->bd_disk, mode);
}

/* Renames the function of the driver, but not the name in the operations. */
#define ublk_open(...)	ublk_open_disk(__VA_ARGS__)

#endif /* UBLK_COMPAT_OPEN_H */
