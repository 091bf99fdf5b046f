// SPDX-License-Identifier: GPL-2.0
/*
 * Requests that are taken back from a server which is gone.
 */
#include <linux/sched/signal.h>

#include "internal.h"

/* Whether a thread runs no code of its program any more: it is dead, or killed. */
bool ublk_task_gone(const struct task_struct *task)
{
	return READ_ONCE(task->exit_state) ||
	       READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT;
}

/* The same of all threads of its process. */
bool ublk_process_gone(const struct task_struct *task)
{
	return !atomic_read(&task->signal->live) ||
	       READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT;
}

/*
 * Whether the one that would answer the request of a slot, or take it to the
 * server, is gone, whichever process still holds the char device.
 */
static bool ublk_holder_gone(struct ublk_queue *q, struct ublk_io *io)
{
	lockdep_assert_held(&q->ub->lock);
	if (ublk_is_batch(q))
		return ublk_batch_holder_gone(q, io);
	return io->daemon && ublk_task_gone(io->daemon);
}

/*
 * Makes the caller the owner of the request of a slot. Returns how it is to
 * end, UBLK_RES_ABORTED or UBLK_RES_UNSEEN, or 0 if others own it.
 */
static int ublk_claim_request(struct ublk_queue *q, struct ublk_io *io)
{
	if (ublk_io_transition(io, UBLK_IO_SERVED, UBLK_IO_CANCELED) ||
	    ublk_io_transition(io, UBLK_IO_COMMIT, UBLK_IO_CANCELED) ||
	    ublk_io_transition(io, UBLK_IO_WAIT_BUF, UBLK_IO_CANCELED))
		return UBLK_RES_ABORTED;
	if (ublk_is_batch(q) ? ublk_batch_revoke(q, io) :
	    ublk_io_transition(io, UBLK_IO_DISPATCH, UBLK_IO_REVOKED))
		return UBLK_RES_UNSEEN;
	return 0;
}

/* Ends what ublk_claim_request() has claimed. */
static void ublk_end_claimed(struct ublk_queue *q, struct ublk_io *io,
			     struct request *req, int res)
{
	/* Without references if no delivery was tried yet. */
	if (res == UBLK_RES_UNSEEN &&
	    !(ublk_no_copy(q) && refcount_read(&io->ref)))
		ublk_hold_or_fail(q, req);
	else
		ublk_finish(q, io, req, res);
}

/*
 * Ends the request of a slot whose server is gone, or @always, as the recovery
 * mode wants it. False if it is in other hands: being delivered, or committed,
 * or ended.
 *
 * All of this is decided in one critical section, which ublk_reset_slots() needs
 * to enter: a request that a later server holds is never taken for one of the
 * server that is gone.
 *
 * The server may still commit @req meanwhile, and the slot go to the next request
 * of its tag, so that this one is claimed. It has the same server, and what is claimed
 * has to be ended.
 */
bool ublk_take_back(struct ublk_queue *q, struct ublk_io *io,
		    struct request *req, bool always)
{
	struct ublk_device *ub = q->ub;
	struct request *claimed;
	int res = 0;

	spin_lock(&ub->lock);
	if (READ_ONCE(io->req) == req && (always || ublk_holder_gone(q, io))) {
		ublk_race(UBLK_RACE_TAKE);
		res = ublk_claim_request(q, io);
	}
	/* What finds the slot gone looks for the reason under this lock. */
	if (res)
		ublk_mark_leaving_locked(ub);
	spin_unlock(&ub->lock);
	if (!res)
		return false;
	claimed = io->req;
	ublk_race(UBLK_RACE_TAKE_BACK);
	ublk_end_claimed(q, io, claimed, res);
	return claimed == req;
}

/* Takes all requests back whose server is gone, but has not closed the device. */
void ublk_take_back_gone(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct request *req = READ_ONCE(io->req);

			/* No reference: only what was claimed back is looked at. */
			if (req)
				ublk_take_back(q, io, req, false);
		}
	}
}

/* The char device has no holder any more, hence no command is pending. */
void ublk_abort_slots(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			int res = ublk_claim_request(q, io);

			if (res)
				ublk_end_claimed(q, io, io->req, res);
		}
	}
}
