// SPDX-License-Identifier: GPL-2.0
/*
 * Char devices whose last holder is a kernel thread.
 *
 * The files of a ring are put by a kernel thread when the ring is torn down, so
 * that is where a killed server lets go of its char device. fput() leaves that
 * to the one work item which the system has for it. The same item closes disks
 * whose last reference went with a completion, see ublk_end_bytes(), and may
 * wait there for a server: perhaps for the one that can come only when this
 * char device has been released.
 *
 * So, as long as servers are leaving, work items of our own release what is
 * queued behind such a wait. Each waits for the system's item in its turn,
 * therefore they begin at growing distances. Mostly there is nothing to do: a
 * server has left before the first one begins.
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

/* Starts a work item that does not wait already. */
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

/* A server begins to leave. In any context. */
void ublk_reap_begin(void)
{
	atomic_inc(&ublk_nr_leaving);
	/* What is to run soon is not put off: servers may leave all the time. */
	if (xchg(&ublk_reap_delay, UBLK_REAP_MIN_DELAY) > UBLK_REAP_MIN_DELAY)
		mod_delayed_work(ublk_reap_wq, &ublk_reap_timer,
				 UBLK_REAP_MIN_DELAY);
	else
		queue_delayed_work(ublk_reap_wq, &ublk_reap_timer,
				   UBLK_REAP_MIN_DELAY);
}

/* Its char device has been released. */
void ublk_reap_end(void)
{
	atomic_dec(&ublk_nr_leaving);
}

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

/* There are no devices any more. */
void ublk_reap_exit(void)
{
	cancel_delayed_work_sync(&ublk_reap_timer);
	destroy_workqueue(ublk_reap_wq);
}
