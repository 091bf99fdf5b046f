// SPDX-License-Identifier: GPL-2.0
/*
 * Release of files that are queued after the close of a disk.
 *
 * fput() leaves a file to a single work item of the system where the task cannot
 * release it: in a kernel thread, for example when the ring of a killed server
 * is torn down with the char device in it, and with bottom halves disabled, when
 * a completion drops the last reference of a client, see ublk_end_bytes(). If
 * the file is a disk, its release may wait for a server: for an unprivileged one
 * that takes its time, or for one that can start only after the char device has
 * been released, which may be queued next.
 *
 * So the driver has work items of its own that release files which were queued
 * after such a wait began. They run while a char device may be among these
 * files, or while an unprivileged device may cause the wait. Each of them waits
 * for the item of the system at its end (flush_delayed_fput() does), so the
 * distance between them grows with the number of those that wait.
 *
 * A file stays blocked if a work item has taken it from the list together with
 * one whose release waits, and before that one: the list holds the files of at
 * most a second or so.
 */
#include <linux/file.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "internal.h"

#define UBLK_REAP_DELAY		HZ
/* The distance grows by a second per this many work items that wait. */
#define UBLK_REAP_SLOPE		8
/* Fewer than the work queue allows, because it also runs the timer. */
#define UBLK_REAP_MAX		480

static struct workqueue_struct *ublk_reap_wq;
static struct delayed_work ublk_reap_timer;
static atomic_t ublk_nr_watched;
static atomic_t ublk_nr_reaping;

static void ublk_reap(struct work_struct *work)
{
	flush_delayed_fput();
	kfree(work);
	atomic_dec(&ublk_nr_reaping);
}

static void ublk_reap_start(void)
{
	struct work_struct *work;

	if (atomic_read(&ublk_nr_reaping) >= UBLK_REAP_MAX)
		return;
	work = kmalloc(sizeof(*work), GFP_KERNEL | __GFP_NOWARN);
	/* The next tick tries again. */
	if (!work)
		return;
	INIT_WORK(work, ublk_reap);
	atomic_inc(&ublk_nr_reaping);
	queue_work(ublk_reap_wq, work);
}

/* Has no effect if a run is scheduled already. */
static void ublk_reap_schedule(void)
{
	unsigned int waiting = atomic_read(&ublk_nr_reaping);

	queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
			   UBLK_REAP_DELAY + waiting * HZ / UBLK_REAP_SLOPE);
}

static void ublk_reap_tick(struct work_struct *work)
{
	if (!atomic_read(&ublk_nr_watched))
		return;
	ublk_reap_start();
	ublk_reap_schedule();
}

/**
 * ublk_watch() - Note that the release of a char device may wait or cause waits.
 * @ub: the device
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
 * ublk_unwatch() - Note that the char device has been released.
 * @ub: the device
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
 * ublk_unwatch_serving() - Note that the server is live.
 * @ub: the device
 *
 * It is watched again when its commands are canceled. Unprivileged devices are
 * watched all the time.
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
