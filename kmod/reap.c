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
 * queued, while requests are held for the next server, or while an unprivileged
 * device may cause the wait.
 *
 * Each of them may wait for the work item of the system in turn, because
 * flush_delayed_fput() does so on recent kernels, and their number is limited. A user decides how
 * long that takes, and must not be able to use them all up. The interval between
 * two of them is therefore a second or, if that is longer, a fraction of the
 * time that the oldest one has been waiting. They last for more than two years,
 * and a file is released after this fraction of the wait at the latest.
 *
 * They do not help a file that a work item has taken from the list together
 * with one whose release waits, if it handles that one first. The list holds
 * the files of one such interval at most.
 */
#include <linux/file.h>
#include <linux/jiffies.h>
#include <linux/list.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "internal.h"

/*
 * The interval is 1/32 of the age of the oldest work item, in whole seconds. The
 * last of the UBLK_REAP_MAX work items starts after 811 days.
 */
#define UBLK_REAP_FRACTION	32
/* Fewer than the work queue allows, as it also runs the timer. */
#define UBLK_REAP_MAX		480

/* A work item. */
struct ublk_reap_item {
	struct work_struct	work;
	struct list_head	node;		/* in ublk_reap_items */
	u64			start;		/* in jiffies, as all times here */
};

static struct workqueue_struct *ublk_reap_wq;
static struct delayed_work ublk_reap_timer;
static atomic_t ublk_nr_watched;

/* Protects the work items that have not finished, and their number. */
static DEFINE_SPINLOCK(ublk_reap_lock);
static LIST_HEAD(ublk_reap_items);		/* oldest first */
static unsigned int ublk_nr_reaping;
/* When the last one was started; only used by ublk_reap_tick(). */
static u64 ublk_reap_last;

/* Releases files, and waits for the work item of the system. */
static void ublk_reap(struct work_struct *work)
{
	struct ublk_reap_item *item =
		container_of(work, struct ublk_reap_item, work);

	flush_delayed_fput();
	spin_lock(&ublk_reap_lock);
	list_del(&item->node);
	ublk_nr_reaping--;
	spin_unlock(&ublk_reap_lock);
	kfree(item);
}

/* Whether the interval since the last work item is over. */
static bool ublk_reap_due(u64 now)
{
	struct ublk_reap_item *oldest;
	bool due = true;

	spin_lock(&ublk_reap_lock);
	oldest = list_first_entry_or_null(&ublk_reap_items,
					  struct ublk_reap_item, node);
	if (oldest)
		due = ublk_nr_reaping < UBLK_REAP_MAX &&
		      (now - ublk_reap_last) * UBLK_REAP_FRACTION >=
		      now - oldest->start;
	spin_unlock(&ublk_reap_lock);
	return due;
}

/* Starts a work item. */
static void ublk_reap_start(u64 now)
{
	struct ublk_reap_item *item;

	item = kmalloc(sizeof(*item), GFP_NOIO | __GFP_NOWARN);
	/* If memory is short, the next tick tries again. */
	if (!item)
		return;
	INIT_WORK(&item->work, ublk_reap);
	item->start = now;
	ublk_reap_last = now;
	spin_lock(&ublk_reap_lock);
	list_add_tail(&item->node, &ublk_reap_items);
	ublk_nr_reaping++;
	spin_unlock(&ublk_reap_lock);
	queue_work(ublk_reap_wq, &item->work);
}

/* Schedules the next tick. Has no effect if one is scheduled already. */
static void ublk_reap_schedule(void)
{
	queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
			   ublk_reap_interval());
}

/*
 * While a device is watched, runs once per second and starts a work item if one
 * is due. The interval is checked here, rather than used as the delay of the
 * timer, so that it is short again as soon as a long wait has ended.
 */
static void ublk_reap_tick(struct work_struct *work)
{
	u64 now = get_jiffies_64();

	if (!atomic_read(&ublk_nr_watched))
		return;
	if (ublk_reap_due(now))
		ublk_reap_start(now);
	ublk_reap_schedule();
}

/**
 * ublk_watch() - Run work items for a device that may delay the release of
 *   files.
 * @ub: the device
 *
 * Called when the char device is opened and when its server is leaving: its
 * release may be queued after the close of a disk. The device stays watched
 * while its requests are held for the next server, as the close of its disk may
 * wait for these. No effect if the device is watched already.
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
 * ublk_unwatch() - Undo ublk_watch(), as the char device has been released and
 *   no request is held.
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
