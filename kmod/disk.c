// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/ublkbN: the disk of a started device.
 */
#include <linux/blk-integrity.h>
#include <linux/cred.h>
#include <linux/uidgid.h>

#include "internal.h"

/*
 * The disk of an unprivileged device is accessible to its owner and the
 * administrator only.
 */
static bool ublk_may_open(const struct ublk_device *ub)
{
	kuid_t uid;
	kgid_t gid;

	if (!(ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV))
		return true;
	if (capable(CAP_SYS_ADMIN))
		return true;
	current_uid_gid(&uid, &gid);
	return from_kuid(&init_user_ns, uid) == ub->dev_info.owner_uid &&
	       from_kgid(&init_user_ns, gid) == ub->dev_info.owner_gid;
}

static int ublk_open(struct gendisk *disk, blk_mode_t mode)
{
	struct ublk_device *ub = disk->private_data;

	if (!ublk_may_open(ub))
		return -EPERM;
	/* TRY_STOP_DEV has found that the disk is not open. Keep it so. */
	if (atomic_read(&ub->nr_try_stops))
		return -ENXIO;
	return 0;
}

static void ublk_free_disk(struct gendisk *disk)
{
	struct ublk_device *ub = disk->private_data;

	clear_bit(UBLK_DEV_USED, &ub->bits);
	put_device(&ub->dev);
}

static const struct block_device_operations ublk_fops = {
	.owner		= THIS_MODULE,
	.open		= ublk_open,
	.free_disk	= ublk_free_disk,
	.report_zones	= ublk_report_zones,
};

/**
 * ublk_alloc_disk() - Allocate a disk as the parameters describe it.
 * @ub: the device
 *
 * The disk is not added yet.
 *
 * Context: Process context. Caller holds ub->mutex.
 *
 * Return: the disk, or an ERR_PTR().
 */
struct gendisk *ublk_alloc_disk(struct ublk_device *ub)
{
	struct queue_limits lim = { };
	struct gendisk *disk;

	lockdep_assert_held(&ub->mutex);
	ublk_params_to_limits(ub, &lim);
	disk = blk_mq_alloc_disk(&ub->tag_set, &lim, NULL);
	if (IS_ERR(disk))
		return disk;
	snprintf(disk->disk_name, sizeof(disk->disk_name), "ublkb%u",
		 ub->dev_info.dev_id);
	disk->fops = &ublk_fops;
	disk->private_data = ub;
	/* Both are undone by ublk_free_disk() or ublk_discard_disk(). */
	get_device(&ub->dev);
	set_bit(UBLK_DEV_USED, &ub->bits);

	set_capacity(disk, ub->params.basic.dev_sectors);
	if (ub->params.basic.attrs & UBLK_ATTR_READ_ONLY)
		set_disk_ro(disk, true);
	/* START_DEV would wait for the server while partitions are read. */
	set_bit(GD_SUPPRESS_PART_SCAN, &disk->state);
	return disk;
}

/**
 * ublk_discard_disk() - Undo ublk_alloc_disk() after add_disk() has failed.
 * @ub: the device
 * @disk: the disk
 *
 * In that case the block layer does not call free_disk().
 *
 * Context: Process context. Caller holds ub->mutex.
 */
void ublk_discard_disk(struct ublk_device *ub, struct gendisk *disk)
{
	put_disk(disk);
	clear_bit(UBLK_DEV_USED, &ub->bits);
	put_device(&ub->dev);
}

/**
 * ublk_get_disk() - Get a reference to the disk of a device.
 * @ub: the device
 *
 * Context: Any context that may take ub->lock. Does not need ub->mutex.
 *
 * Return: the disk, or NULL if there is none. The caller drops it with
 *	put_disk().
 */
struct gendisk *ublk_get_disk(struct ublk_device *ub)
{
	struct gendisk *disk;

	spin_lock(&ub->lock);
	disk = ub->disk;
	if (disk)
		get_device(disk_to_dev(disk));
	spin_unlock(&ub->lock);
	return disk;
}

/**
 * ublk_allow_scan() - Allow partition scans of a disk.
 * @disk: the disk
 *
 * This does not start a scan.
 *
 * Context: Any context.
 */
void ublk_allow_scan(struct gendisk *disk)
{
	clear_bit(GD_SUPPRESS_PART_SCAN, &disk->state);
}

/**
 * ublk_scan_work() - Scan the partitions of a new disk.
 * @work: ublk_device.scan_work
 *
 * The server may take a long time, or exit. Then this waits for the next
 * server, while the rest of the life cycle goes on.
 *
 * Context: Work item.
 */
void ublk_scan_work(struct work_struct *work)
{
	struct ublk_device *ub =
		container_of(work, struct ublk_device, scan_work);
	struct gendisk *disk = ublk_get_disk(ub);

	if (!disk)
		return;
	ublk_allow_scan(disk);
	mutex_lock(&disk->open_mutex);
	bdev_disk_changed(disk, false);
	/*
	 * Only an open sets the block size of the page cache. What was read in
	 * blocks of another size must not be found after it.
	 */
	if (!disk_openers(disk))
		invalidate_bdev(disk->part0);
	mutex_unlock(&disk->open_mutex);
	put_disk(disk);
}

/**
 * ublk_update_size() - Change the size of the disk (UPDATE_SIZE).
 * @ub: the device
 * @sectors: the new size
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, or a negative errno.
 */
int ublk_update_size(struct ublk_device *ub, u64 sectors)
{
	struct ublk_param_basic *basic = &ub->params.basic;
	int ret = 0;

	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	if (!ub->disk)
		ret = -ENODEV;
	else if (!ublk_size_valid(ub, sectors) ||
		 sectors & ((1U << (basic->logical_bs_shift - SECTOR_SHIFT)) - 1))
		ret = -EINVAL;
	else if (ub->dev_info.flags & UBLK_F_ZONED)
		/* The block layer has cached the layout of the zones. */
		ret = -EOPNOTSUPP;
	if (!ret) {
		basic->dev_sectors = sectors;
		set_capacity_and_notify(ub->disk, sectors);
	}
	mutex_unlock(&ub->mutex);
	return ret;
}
