// SPDX-License-Identifier: GPL-2.0
/*
 * Delayed release of char devices.
 *
 * When a ring is torn down, a kernel thread drops its files, and so closes the
 * char device of a server that was killed. In a kernel thread, fput() leaves
 * the release of a file to a single work item of the system. The same work item
 * closes disks whose last reference was dropped by a completion (see
 * ublk_end_bytes()), and may then wait for a server: possibly for one that can
 * only start after this char device has been released.
 *
 * Therefore, while servers are leaving, work items of the driver release the
 * files that are queued after such a file. Each of them waits for the system's
 * work item in turn, so they start at growing intervals. Usually there is
 * nothing to do: a server has left before the first of them starts.
 */
#include <linux/file.h>
#include <linux/workqueue.h>

#include "internal.h"

#define UBLK_REAP_MIN_DELAY	HZ
#define UBLK_REAP_MAX_DELAY	(60UL * HZ)
#define UBLK_REAP_WORKS		64

static struct workqueue_struct *ublk_reap_wq;
static struct work_struct ublk_reap_works[UBLK_REAP_WORKS];
static struct delayed_work ublk_reap_timer;
static unsigned long ublk_reap_delay;
static atomic_t ublk_nr_leaving;

static void ublk_reap(struct work_struct *work)
{
	flush_delayed_fput();
}

/* Starts one work item that is not waiting already. */
static void ublk_reap_tick(struct work_struct *work)
{
	unsigned int i;

	if (!atomic_read(&ublk_nr_leaving))
		return;
	for (i = 0; i < UBLK_REAP_WORKS; i++)
		if (!work_busy(&ublk_reap_works[i])) {
			queue_work(ublk_reap_wq, &ublk_reap_works[i]);
			break;
		}
	WRITE_ONCE(ublk_reap_delay, min(2 * READ_ONCE(ublk_reap_delay),
					UBLK_REAP_MAX_DELAY));
	queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
			   READ_ONCE(ublk_reap_delay));
}

/**
 * ublk_reap_begin() - Note that a server has started to leave.
 *
 * Context: Any context.
 */
void ublk_reap_begin(void)
{
	atomic_inc(&ublk_nr_leaving);
	/*
	 * Do not postpone a run that is due soon, as servers may leave all the
	 * time.
	 */
	if (xchg(&ublk_reap_delay, UBLK_REAP_MIN_DELAY) > UBLK_REAP_MIN_DELAY)
		mod_delayed_work(ublk_reap_wq, &ublk_reap_timer,
				 UBLK_REAP_MIN_DELAY);
	else
		queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
				   UBLK_REAP_MIN_DELAY);
}

/**
 * ublk_reap_end() - Note that the char device of a leaving server has been
 *   released.
 *
 * Context: Any context.
 */
void ublk_reap_end(void)
{
	atomic_dec(&ublk_nr_leaving);
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
	unsigned int i;

	ublk_reap_wq = alloc_workqueue("ublk-reap", WQ_UNBOUND, WQ_MAX_ACTIVE);
	if (!ublk_reap_wq)
		return -ENOMEM;
	for (i = 0; i < UBLK_REAP_WORKS; i++)
		INIT_WORK(&ublk_reap_works[i], ublk_reap);
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
