// SPDX-License-Identifier: GPL-2.0
/*
 * From ADD_DEV to DEL_DEV: ids, the char device, the queues.
 *
 * The structure belongs to its struct device. It is freed, and the id released,
 * once the last holder of the char device and of the disk is gone.
 */
#include <linux/cred.h>
#include <linux/miscdevice.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/uidgid.h>
#include <linux/user_namespace.h>
#include <linux/xarray.h>

#include "internal.h"

/* Devices by id. An id without a device is reserved. */
static DEFINE_XARRAY_ALLOC(ublk_devs);
static DECLARE_WAIT_QUEUE_HEAD(ublk_devs_wait);
/* All of these are protected by the lock of the array. */
static LIST_HEAD(ublk_user_devs);
static unsigned int ublk_nr_unprivileged;
static u64 ublk_last_serial;

/**
 * ublk_desc_area() - Size of the descriptors of a queue.
 * @ub: the device
 * @depth: number of tags
 *
 * Context: Any context.
 *
 * Return: number of bytes, rounded up to whole pages as for mmap().
 */
unsigned long ublk_desc_area(const struct ublk_device *ub, u32 depth)
{
	return PAGE_ALIGN((unsigned long)depth * ub->dev_info.io_desc_size);
}

static void ublk_free_queue(struct ublk_queue *q)
{
	ublk_batch_exit(q);
	if (q->descs)
		free_pages((unsigned long)q->descs,
			   get_order(ublk_desc_area(q->ub, q->depth)));
	kvfree(q);
}

static struct ublk_queue *ublk_alloc_queue(struct ublk_device *ub, u16 q_id)
{
	u16 depth = ub->dev_info.queue_depth;
	struct ublk_queue *q;
	struct page *pages;
	unsigned int tag;

	q = kvzalloc(struct_size(q, ios, depth), GFP_KERNEL_ACCOUNT);
	if (!q)
		return ERR_PTR(-ENOMEM);
	q->ub = ub;
	q->q_id = q_id;
	q->depth = depth;
	q->gate = UBLK_GATE_FAIL;
	q->flags = ub->dev_info.flags;
	q->desc_size = ub->dev_info.io_desc_size;
	for (tag = 0; tag < depth; tag++)
		q->ios[tag].tag = tag;

	pages = alloc_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO,
			    get_order(ublk_desc_area(ub, depth)));
	if (!pages) {
		kvfree(q);
		return ERR_PTR(-ENOMEM);
	}
	q->descs = page_address(pages);
	if (ublk_is_batch(q)) {
		int ret = ublk_batch_init(q);

		if (ret) {
			ublk_free_queue(q);
			return ERR_PTR(ret);
		}
	}
	return q;
}

static void ublk_free_queues(struct ublk_device *ub)
{
	unsigned int i;

	for (i = 0; ub->queues && i < ub->dev_info.nr_hw_queues; i++)
		if (ub->queues[i])
			ublk_free_queue(ub->queues[i]);
	kfree(ub->queues);
}

static int ublk_alloc_queues(struct ublk_device *ub)
{
	unsigned int i;

	ub->queues = kcalloc(ub->dev_info.nr_hw_queues, sizeof(*ub->queues),
			     GFP_KERNEL);
	if (!ub->queues)
		return -ENOMEM;
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ublk_alloc_queue(ub, i);

		if (IS_ERR(q))
			return PTR_ERR(q);
		ub->queues[i] = q;
	}
	return 0;
}

static int ublk_alloc_tag_set(struct ublk_device *ub)
{
	ub->tag_set.ops = &ublk_mq_ops;
	ub->tag_set.nr_hw_queues = ub->dev_info.nr_hw_queues;
	ub->tag_set.queue_depth = ub->dev_info.queue_depth;
	ub->tag_set.numa_node = NUMA_NO_NODE;
	ub->tag_set.cmd_size = sizeof(struct ublk_rq);
	ub->tag_set.driver_data = ub;
	return blk_mq_alloc_tag_set(&ub->tag_set);
}

/*
 * The approximate memory that the tags of a device occupy, in pages. Most of it
 * is allocated by the block layer, without accounting.
 */
static unsigned long ublk_nr_pages(const struct ublk_device *ub)
{
	size_t tag = sizeof(struct ublk_io) + sizeof(struct request) +
		     sizeof(struct ublk_rq) + ub->dev_info.io_desc_size;
	size_t queue = tag * ub->dev_info.queue_depth;

	return DIV_ROUND_UP(queue * ub->dev_info.nr_hw_queues, PAGE_SIZE);
}

/*
 * The user that a device of the current task counts for. All users in a user
 * namespace, and in those below it, count as one, as a process may become any of
 * them. The outermost namespace decides: this is the user who created it or, if
 * that is root, the user who is root in it.
 *
 * The latter stands for the namespace itself, whose devices may outlive it. A
 * container that is started again has another namespace but the same users, and
 * so gets no further devices. Root's namespaces whose root is the same user
 * share a quota. So do those without a root, which count for root.
 */
static kuid_t ublk_quota_user(void)
{
	struct user_namespace *ns = current_user_ns();
	kuid_t root;

	if (ns == &init_user_ns)
		return current_uid();
	while (ns->parent != &init_user_ns)
		ns = ns->parent;
	if (!uid_eq(ns->owner, GLOBAL_ROOT_UID))
		return ns->owner;
	root = make_kuid(ns, 0);
	return uid_valid(root) ? root : ns->owner;
}

/*
 * Whether another unprivileged device may be added: there is a limit for all of
 * them, and one per user. The lock of the array is held.
 */
static bool ublk_user_may_add(const struct ublk_device *ub)
{
	const struct ublk_device *other;
	unsigned int nr = 0;

	if (ublk_nr_unprivileged >= READ_ONCE(ublks_max))
		return false;
	list_for_each_entry(other, &ublk_user_devs, user_node)
		nr += uid_eq(other->quota_user, ub->quota_user);
	return nr < READ_ONCE(ublks_max_per_user);
}

/*
 * Reserves the requested id, or the lowest free one. ublk_find_dev() does not
 * find the device before ublk_publish().
 */
static int ublk_reserve_id(struct ublk_device *ub)
{
	bool unprivileged = ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV;
	u32 dev_id = ub->dev_info.dev_id;
	int ret;

	xa_lock(&ublk_devs);
	if (unprivileged) {
		if (!ublk_user_may_add(ub)) {
			xa_unlock(&ublk_devs);
			return -EACCES;
		}
		/*
		 * Count the device now, as allocating memory may drop the lock.
		 */
		ublk_nr_unprivileged++;
		list_add(&ub->user_node, &ublk_user_devs);
	}
	if (dev_id == U32_MAX) {
		ret = __xa_alloc(&ublk_devs, &dev_id, NULL,
				 XA_LIMIT(0, UBLK_MINORS - 1), GFP_KERNEL);
		if (ret == -EBUSY)
			ret = -ENOSPC;
	} else {
		ret = __xa_insert(&ublk_devs, dev_id, NULL, GFP_KERNEL);
		if (ret == -EBUSY)
			ret = -EEXIST;
	}
	if (ret && unprivileged) {
		ublk_nr_unprivileged--;
		list_del(&ub->user_node);
	} else if (!ret) {
		ub->dev_info.dev_id = dev_id;
		ub->serial = ++ublk_last_serial;
	}
	xa_unlock(&ublk_devs);
	return ret;
}

/*
 * Makes the device visible. The entry of the array exists, so this does not
 * allocate memory.
 */
static void ublk_publish(struct ublk_device *ub)
{
	xa_store(&ublk_devs, ub->dev_info.dev_id, ub, GFP_KERNEL);
}

/* Hides the device. Its id stays reserved. */
static void ublk_unpublish(struct ublk_device *ub)
{
	xa_cmpxchg(&ublk_devs, ub->dev_info.dev_id, ub, XA_ZERO_ENTRY,
		   GFP_KERNEL);
}

static void ublk_release_id(struct ublk_device *ub)
{
	xa_lock(&ublk_devs);
	__xa_erase(&ublk_devs, ub->dev_info.dev_id);
	if (ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV) {
		ublk_nr_unprivileged--;
		list_del(&ub->user_node);
	}
	wake_up_all(&ublk_devs_wait);
	xa_unlock(&ublk_devs);
}

/*
 * Frees the device, also one that is only partly set up, and then releases its
 * id.
 */
static void ublk_free_dev(struct ublk_device *ub)
{
	ublk_assert(!ub->watched);
	ublk_assert(!atomic_read(&ub->nr_try_stops));
	if (ub->tag_set.tags)
		blk_mq_free_tag_set(&ub->tag_set);
	ublk_free_queues(ub);
	ublk_shmem_exit(ub);
	mutex_destroy(&ub->mutex);
	ublk_uncharge_pages(ub->payer, ub->nr_pages);
	/*
	 * Waiters for the id find everything else freed. See ublk_remove_all().
	 */
	rcu_read_lock();
	ublk_release_id(ub);
	kfree(ub);
	rcu_read_unlock();
}

static void ublk_dev_release(struct device *dev)
{
	struct ublk_device *ub = container_of(dev, struct ublk_device, dev);

	ublk_free_dev(ub);
}

/**
 * ublk_add_dev() - Add a device (ADD_DEV).
 * @info: what was requested; on success replaced by what was granted
 *
 * Context: Process context of the sender.
 *
 * Return: the device, with a reference for the caller, or an ERR_PTR().
 */
struct ublk_device *ublk_add_dev(struct ublksrv_ctrl_dev_info *info)
{
	struct ublk_device *ub;
	kuid_t uid;
	kgid_t gid;
	int ret;

	ub = kzalloc_obj(*ub);
	if (!ub)
		return ERR_PTR(-ENOMEM);
	ub->dev_info = *info;
	/*
	 * Set before the id is reserved, as unprivileged devices are counted
	 * per owner.
	 */
	current_uid_gid(&uid, &gid);
	ub->dev_info.owner_uid = from_kuid(&init_user_ns, uid);
	ub->dev_info.owner_gid = from_kgid(&init_user_ns, gid);
	ub->quota_user = ublk_quota_user();
	mutex_init(&ub->mutex);
	spin_lock_init(&ub->lock);
	init_waitqueue_head(&ub->wait);
	INIT_WORK(&ub->release_work, ublk_release_work);
	INIT_WORK(&ub->scan_work, ublk_scan_work);
	INIT_WORK(&ub->job_work, ublk_job_work);
	INIT_LIST_HEAD(&ub->jobs);

	ret = ublk_reserve_id(ub);
	if (ret) {
		kfree(ub);
		return ERR_PTR(ret);
	}
	ublk_fixup_dev_info(&ub->dev_info);
	ret = ublk_check_zoned(&ub->dev_info);
	if (ret)
		goto out_free;
	if (ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV) {
		ub->nr_pages = ublk_nr_pages(ub);
		ret = ublk_charge_pages(ub->nr_pages, &ub->payer);
		if (ret)
			goto out_free;
	}

	ret = ublk_alloc_queues(ub);
	if (ret)
		goto out_free;
	ret = ublk_alloc_tag_set(ub);
	if (ret)
		goto out_free;
	if (ub->dev_info.flags & UBLK_F_SHMEM_ZC) {
		ret = ublk_shmem_init(ub);
		if (ret)
			goto out_free;
	}

	/* From here on ublk_dev_release() frees the device. */
	device_initialize(&ub->dev);
	ub->dev.parent = ublk_misc.this_device;
	ub->dev.devt = MKDEV(MAJOR(ublk_chr_devt), ub->dev_info.dev_id);
	ub->dev.class = &ublk_chr_class;
	ub->dev.release = ublk_dev_release;
	ret = dev_set_name(&ub->dev, "ublkc%u", ub->dev_info.dev_id);
	if (ret)
		goto out_put;
	cdev_init(&ub->cdev, &ublk_ch_fops);
	*info = ub->dev_info;

	/*
	 * User space may send commands as soon as it sees the uevent of the
	 * char device, so the device must be visible before. Commands that
	 * remove it wait for the mutex but not for this caller, which therefore
	 * needs its own reference.
	 */
	get_device(&ub->dev);
	mutex_lock(&ub->mutex);
	ublk_publish(ub);
	ublk_race(UBLK_RACE_ADD);
	ret = cdev_device_add(&ub->cdev, &ub->dev);
	ub->added = !ret;
	mutex_unlock(&ub->mutex);
	ublk_race(UBLK_RACE_ADDED);
	if (ret) {
		ublk_unpublish(ub);
		/*
		 * Commands that have found the device must not wait for a
		 * server.
		 */
		set_bit(UBLK_DEV_DELETED, &ub->bits);
		wake_up_all(&ub->wait);
		put_device(&ub->dev);
		goto out_put;
	}
	return ub;

out_put:
	put_device(&ub->dev);
	return ERR_PTR(ret);
out_free:
	ublk_free_dev(ub);
	return ERR_PTR(ret);
}

/**
 * ublk_find_dev() - Look a device up by id.
 * @dev_id: the id
 *
 * Context: Any context that may take the lock of the array.
 *
 * Return: the device, with a reference for the caller, or NULL.
 */
struct ublk_device *ublk_find_dev(u32 dev_id)
{
	struct ublk_device *ub;

	xa_lock(&ublk_devs);
	ub = xa_load(&ublk_devs, dev_id);
	if (ub && !kobject_get_unless_zero(&ub->dev.kobj))
		ub = NULL;
	xa_unlock(&ublk_devs);
	return ub;
}

/**
 * ublk_put_dev() - Drop a reference to a device.
 * @ub: the device
 *
 * Context: Process context.
 */
void ublk_put_dev(struct ublk_device *ub)
{
	put_device(&ub->dev);
}

/*
 * Removes a device. Calling it again has no effect. The structure and the id
 * are released when the last holder drops its reference.
 */
static int ublk_do_remove(struct ublk_device *ub, struct pid *unused)
{
	bool added;

	/*
	 * START_DEV fails from here on. It and END_USER_RECOVERY may be
	 * waiting.
	 */
	set_bit(UBLK_DEV_DELETED, &ub->bits);
	wake_up_all(&ub->wait);
	ublk_do_stop(ub, NULL);

	mutex_lock(&ub->mutex);
	added = ub->added;
	ub->added = false;
	mutex_unlock(&ub->mutex);
	if (added) {
		cdev_device_del(&ub->cdev, &ub->dev);
		put_device(&ub->dev);
	}
	return 0;
}

/**
 * ublk_remove_dev() - Remove a device (DEL_DEV).
 * @ub: the device
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, or a negative errno, see ublk_run_job().
 */
int ublk_remove_dev(struct ublk_device *ub)
{
	return ublk_run_job(ub, ublk_do_remove, NULL);
}

/**
 * ublk_revoke_dev() - Remove a device whose ADD_DEV fails after it was
 *   published.
 * @ub: the device
 *
 * The device was visible, so it may already have a server and a disk, and the
 * sender may be that server. If the sender is killed, the device is removed
 * without it.
 *
 * Context: Process context of the sender; waits killably.
 */
void ublk_revoke_dev(struct ublk_device *ub)
{
	ublk_run_job_always(ub, ublk_do_remove);
}

static bool ublk_is_freed(u32 dev_id, u64 serial)
{
	struct ublk_device *ub;
	bool ret;

	xa_lock(&ublk_devs);
	ub = xa_load(&ublk_devs, dev_id);
	ret = !ub || ub->serial != serial;
	xa_unlock(&ublk_devs);
	return ret;
}

/**
 * ublk_wait_freed() - Wait until the id of a removed device is free.
 * @dev_id: the id
 * @serial: serial number of the removed device
 *
 * That is the case once all holders of the device have dropped it.
 *
 * Context: Process context; waits interruptibly.
 *
 * Return: 0, or -EINTR.
 */
int ublk_wait_freed(u32 dev_id, u64 serial)
{
	if (wait_event_interruptible(ublk_devs_wait,
				     ublk_is_freed(dev_id, serial)))
		return -EINTR;
	return 0;
}

/**
 * ublk_remove_all() - Remove all devices.
 *
 * The module is being unloaded: no char device and no disk is open.
 *
 * Context: Process context.
 */
void ublk_remove_all(void)
{
	struct ublk_device *ub;
	unsigned long dev_id;

	xa_for_each(&ublk_devs, dev_id, ub) {
		/* Some may be in the process of being removed. */
		ub = ublk_find_dev(dev_id);
		if (!ub)
			continue;
		ublk_do_remove(ub, NULL);
		ublk_put_dev(ub);
	}
	wait_event(ublk_devs_wait, xa_empty(&ublk_devs));
	/* ublk_free_dev() of the last device may still be running. */
	synchronize_rcu();
}
