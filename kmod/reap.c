// SPDX-License-Identifier: GPL-2.0
/*
 * Release of files that are queued after the close of a disk.
 *
 * If a task cannot release a file, fput() leaves the release to a single work
 * item of the system. This is the case in a kernel thread, for example when the
 * ring of a killed server is torn down with the char device in it, and with
 * bottom halves disabled, when a completion drops the last reference to a
 * client's file (see ublk_end_bytes()). If that file is a disk, its release may
 * wait for a server: for the server of an unprivileged device, which may take a
 * long time, or for one that can only start after the char device has been
 * released, and that release may be next in the queue.
 *
 * Therefore the driver has work items that release the files that were queued
 * after such a wait began. They run while the release of a char device may be
 * queued, or while an unprivileged device may cause the wait. Each of them
 * waits for the work item of the system in turn, because flush_delayed_fput()
 * does so, and so the interval between them grows with the number of those that
 * are waiting.
 *
 * They do not help a file that a work item has taken from the list together
 * with one whose release waits, if it handles that one first. The list holds
 * the files of about one second at most.
 */
#include <linux/file.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "internal.h"

/* Interval between two work items while none is waiting. */
#define UBLK_REAP_DELAY		HZ
/* The interval grows by one second for this many work items that are waiting. */
#define UBLK_REAP_SLOPE		8
/* Fewer than the work queue allows, as it also runs the timer. */
#define UBLK_REAP_MAX		480

static struct workqueue_struct *ublk_reap_wq;
static struct delayed_work ublk_reap_timer;
static atomic_t ublk_nr_watched;
static atomic_t ublk_nr_reaping;

/* Releases files, and waits for the work item of the system. */
static void ublk_reap(struct work_struct *work)
{
	flush_delayed_fput();
	kfree(work);
	atomic_dec(&ublk_nr_reaping);
}

/* Starts a work item. */
static void ublk_reap_start(void)
{
	struct work_struct *work;

	if (atomic_read(&ublk_nr_reaping) >= UBLK_REAP_MAX)
		return;
	work = kmalloc(sizeof(*work), GFP_KERNEL | __GFP_NOWARN);
	/* If memory is short, the next tick tries again. */
	if (!work)
		return;
	INIT_WORK(work, ublk_reap);
	atomic_inc(&ublk_nr_reaping);
	queue_work(ublk_reap_wq, work);
}

/* Schedules the next work item. Has no effect if one is scheduled already. */
static void ublk_reap_schedule(void)
{
	unsigned int waiting = atomic_read(&ublk_nr_reaping);

	queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
			   UBLK_REAP_DELAY + waiting * HZ / UBLK_REAP_SLOPE);
}

/* Starts a work item, and schedules the next one, while a device is watched. */
static void ublk_reap_tick(struct work_struct *work)
{
	if (!atomic_read(&ublk_nr_watched))
		return;
	ublk_reap_start();
	ublk_reap_schedule();
}

/**
 * ublk_watch() - Run work items for a device that may delay the release of
 *   files.
 * @ub: the device
 *
 * Called when the char device is opened and when its server is leaving: its
 * release may be queued after the close of a disk. No effect if the device is
 * watched already.
 *
 * Context: Any context. Caller holds ub->lock.
 */
void ublk_watch(struct ublk_device *ub)
{
	lockdep_assert_held(&ub->lock);
	if (ub->watched)
		return;
	ub->watched = true;
	atomic_inc(&ublk_nr_watched);
	ublk_reap_schedule();
}

/**
 * ublk_unwatch() - Undo ublk_watch(), as the char device has been released.
 * @ub: the device
 *
 * Has no effect if the device is not watched.
 *
 * Context: Any context. Caller holds ub->lock.
 */
void ublk_unwatch(struct ublk_device *ub)
{
	lockdep_assert_held(&ub->lock);
	if (!ub->watched)
		return;
	ub->watched = false;
	atomic_dec(&ublk_nr_watched);
}

/**
 * ublk_unwatch_serving() - Undo ublk_watch(), as the server is live.
 * @ub: the device
 *
 * ublk_mark_leaving() watches the device again. Unprivileged devices stay
 * watched, as their servers may cause waits at any time.
 *
 * Context: Any context. Caller holds ub->lock.
 */
void ublk_unwatch_serving(struct ublk_device *ub)
{
	if (!(ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV))
		ublk_unwatch(ub);
}

/**
 * ublk_reap_init() - Set up the work items.
 *
 * Context: Module initialization.
 *
 * Return: 0, or -ENOMEM.
 */
int ublk_reap_init(void)
{
	ublk_reap_wq = alloc_workqueue("ublk-reap", WQ_UNBOUND, WQ_MAX_ACTIVE);
	if (!ublk_reap_wq)
		return -ENOMEM;
	INIT_DELAYED_WORK(&ublk_reap_timer, ublk_reap_tick);
	return 0;
}

/**
 * ublk_reap_exit() - Stop and free the work items.
 *
 * There are no devices any more.
 *
 * Context: Module exit.
 */
void ublk_reap_exit(void)
{
	cancel_delayed_work_sync(&ublk_reap_timer);
	destroy_workqueue(ublk_reap_wq);
}
