// SPDX-License-Identifier: GPL-2.0
/*
 * Requests whose server has exited. They are taken back, and then end or wait
 * for the next server, as the recovery mode says. This happens when the char
 * device is closed, when a request times out, and when the disk is removed.
 *
 * A server has exited, for this purpose, if the thread that holds the request
 * is dead, or has been killed. A killed server may be unable to die before the
 * request has ended, for example because it waits for its own disk.
 */
#include <linux/sched/signal.h>

#include "internal.h"

/**
 * ublk_task_gone() - Check whether a thread is dead or was killed.
 * @task: the thread
 *
 * Such a thread does not return to user space any more.
 *
 * Context: Any context.
 *
 * Return: true if it is dead or was killed.
 */
bool ublk_task_gone(const struct task_struct *task)
{
	return READ_ONCE(task->exit_state) ||
	       READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT;
}

/**
 * ublk_process_gone() - Check whether a process is dead or was killed.
 * @task: any thread of the process
 *
 * Context: Any context.
 *
 * Return: true if all of its threads are dead, or it was killed.
 */
bool ublk_process_gone(const struct task_struct *task)
{
	return !atomic_read(&task->signal->live) ||
	       READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT;
}

/*
 * Whether the thread that would complete the request of a slot, or deliver it,
 * is gone. Another process may still have the char device open.
 */
static bool ublk_holder_gone(struct ublk_queue *q, struct ublk_io *io)
{
	lockdep_assert_held(&q->ub->lock);
	if (ublk_is_batch(q))
		return ublk_batch_holder_gone(q, io);
	return io->daemon && ublk_task_gone(io->daemon);
}

/*
 * Makes the caller the owner of the request of a slot. Returns the result that
 * the request is to end with, UBLK_RES_ABORTED or UBLK_RES_UNSEEN, or 0 if the
 * request has another owner.
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

/* Ends a request that ublk_claim_request() has claimed. */
static void ublk_end_claimed(struct ublk_queue *q, struct ublk_io *io,
			     struct request *req, int res)
{
	/* There is no reference if no delivery was tried yet. */
	if (res == UBLK_RES_UNSEEN &&
	    !(ublk_no_copy(q) && refcount_read(&io->ref)))
		ublk_hold_or_fail(q, req);
	else
		ublk_finish(q, io, req, res);
}

/**
 * ublk_take_back() - Take a request back from a server that has exited.
 * @q: the queue
 * @io: the slot of the tag of @req
 * @req: the request
 * @always: take it back from a live server too
 *
 * The request ends or is held, as the recovery mode says. It is left alone
 * while it is being delivered or committed, and after it has ended.
 *
 * All of this is decided in one critical section of ub->lock.
 * ublk_reset_slots() takes that lock too, so that a request that the next
 * server holds is never mistaken for one of the server that has exited.
 *
 * The server may commit @req concurrently, and the slot go to the next request
 * of the tag. Then that request is claimed instead. It has the same server, and
 * having been claimed it must be ended.
 *
 * Context: Any context that may take ub->lock; the request may be ended.
 *
 * Return: true if @req was taken back.
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
	/*
	 * A request that finds its slot canceled looks for the reason under
	 * this lock.
	 */
	if (res)
		ublk_mark_leaving_locked(ub);
	/*
	 * Read under the lock, as ublk_reset_slots() may clear it afterwards.
	 */
	claimed = io->req;
	spin_unlock(&ub->lock);
	if (!res)
		return false;
	/* QUIESCE_DEV waits for the state of the slot. */
	wake_up_all(&ub->wait);
	ublk_race(UBLK_RACE_TAKE_BACK);
	ublk_end_claimed(q, io, claimed, res);
	return claimed == req;
}

/**
 * ublk_take_back_gone() - Take back all requests whose server has exited.
 * @ub: the device, whose char device may still be open
 *
 * Context: Process context. Takes ub->lock.
 */
void ublk_take_back_gone(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct request *req = READ_ONCE(io->req);

			/*
			 * The request is not referenced. It is only
			 * dereferenced after it was claimed.
			 */
			if (req)
				ublk_take_back(q, io, req, false);
		}
	}
}

/**
 * ublk_abort_slots() - Take back all requests that a server holds.
 * @ub: the device, whose char device is closed
 *
 * No command is pending any more, as each of them would hold a reference to the
 * char device.
 *
 * Context: Process context.
 */
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
