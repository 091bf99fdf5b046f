/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Until 6.4 open() of a disk is given the block device. For disk.c only.
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

/* Gives the driver's function its name, and leaves the name in the operations. */
#define ublk_open(...)	ublk_open_disk(__VA_ARGS__)

#endif /* UBLK_COMPAT_OPEN_H */
