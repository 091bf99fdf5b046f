// SPDX-License-Identifier: GPL-2.0
/*
 * The life of a slot: fetched by a server, armed, canceled, cleaned up after
 * the server. See ublk.h for the states.
 *
 * Two flags of the device act on all its slots. A gate says what becomes of
 * requests for which nothing is armed; it is closed before the first slot is
 * canceled, so that a request which finds its slot gone also finds the reason.
 * "canceling" makes every slot that is armed from then on be canceled at once.
 */
#include <linux/capability.h>
#include <linux/sched/task.h>

#include "internal.h"

bool ublk_all_fetched(const struct ublk_device *ub)
{
	return READ_ONCE(ub->nr_ready) == ub->dev_info.nr_hw_queues;
}

/* Claims an empty slot for the command that fetches it. */
int ublk_slot_reserve(struct ublk_queue *q, struct ublk_io *io)
{
	struct ublk_device *ub = q->ub;
	int ret = 0;

	spin_lock(&ub->lock);
	if (ub->closing)
		ret = -ENODEV;
	else if (ublk_all_fetched(ub))
		ret = -EBUSY;
	else if (!ublk_io_transition(io, UBLK_IO_EMPTY, UBLK_IO_BUSY))
		ret = -EINVAL;
	spin_unlock(&ub->lock);
	return ret;
}

void ublk_slot_unreserve(struct ublk_io *io)
{
	atomic_set(&io->state, UBLK_IO_EMPTY);
}

/*
 * Makes a slot wait for a request, its command being marked cancelable. The
 * full barrier orders this against ublk_mark_leaving(): either that sees the
 * armed slot, or the slot is canceled here.
 */
void ublk_slot_arm(struct ublk_queue *q, struct ublk_io *io,
		   unsigned int issue_flags)
{
	int old = atomic_xchg(&io->state, UBLK_IO_ARMED);

	ublk_assert(old == UBLK_IO_BUSY);
	if (unlikely(READ_ONCE(q->ub->canceling)))
		ublk_slot_cancel(io, issue_flags);
}

/*
 * A reserved slot is complete: counts and arms it. The last one of a queue
 * lets requests in. With FAIL_IO they go on failing until the recovery ends.
 */
void ublk_slot_fetched(struct ublk_queue *q, struct ublk_io *io,
		       unsigned int issue_flags)
{
	struct ublk_device *ub = q->ub;
	bool trusted = capable(CAP_SYS_ADMIN);
	bool cancel;

	spin_lock(&ub->lock);
	if (!trusted)
		ub->untrusted = true;
	/* Armed before the gate opens. */
	atomic_set_release(&io->state, UBLK_IO_ARMED);
	cancel = ub->canceling;
	if (++q->nr_fetched == q->depth) {
		WRITE_ONCE(ub->nr_ready, ub->nr_ready + 1);
		ublk_gate_queue_ready(q);
	}
	spin_unlock(&ub->lock);
	if (cancel)
		ublk_slot_cancel(io, issue_flags);
	wake_up_all(&ub->wait);
}

/*
 * Makes an armed slot CANCELED. False if there is nothing to take back, or a
 * request was quicker. The caller completes the slot's command, if there is one.
 */
static bool ublk_slot_disarm(struct ublk_io *io, struct io_uring_cmd **cmd)
{
	if (!ublk_io_transition(io, UBLK_IO_ARMED, UBLK_IO_CANCELED))
		return false;
	*cmd = io->cmd;
	io->cmd = NULL;
	return true;
}

/* Takes back an armed slot and completes its command, in its ring's context. */
bool ublk_slot_cancel(struct ublk_io *io, unsigned int issue_flags)
{
	struct io_uring_cmd *cmd;

	if (!ublk_slot_disarm(io, &cmd))
		return false;
	/* QUIESCE_DEV waits for the slot's state. */
	wake_up_all(&ublk_io_queue(io)->ub->wait);
	/* May be the last thing that keeps the device. */
	if (cmd)
		io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
	return true;
}

static void ublk_abort_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	io_uring_cmd_done(io_uring_cmd_from_tw(tw_req), UBLK_IO_RES_ABORT,
			  IO_URING_CMD_TASK_WORK_ISSUE_FLAGS);
}

/*
 * The same from outside of the ring. io_uring_cmd_done() would wait for the
 * ring's lock here, which the server holds while it serves a page fault, perhaps
 * for ever. So the command completes when the server's thread gets to it.
 */
static void ublk_slot_cancel_in_task(struct ublk_io *io)
{
	struct io_uring_cmd *cmd;

	if (!ublk_slot_disarm(io, &cmd))
		return;
	wake_up_all(&ublk_io_queue(io)->ub->wait);
	if (cmd)
		io_uring_cmd_complete_in_task(cmd, ublk_abort_tw);
}

void ublk_mark_leaving_locked(struct ublk_device *ub)
{
	lockdep_assert_held(&ub->lock);
	if (ub->canceling)
		return;
	WRITE_ONCE(ub->canceling, true);
	ublk_gates_close(ub);
	ublk_reap_begin();
}

/* The server goes, or is asked to: no request reaches it unless it is on the way. */
void ublk_mark_leaving(struct ublk_device *ub)
{
	spin_lock(&ub->lock);
	ublk_mark_leaving_locked(ub);
	spin_unlock(&ub->lock);
	/* Pairs with the exchange in ublk_slot_arm(). */
	smp_mb();
}

/* Cancels all that waits, from outside of the rings, and waits for no server. */
void ublk_cancel_slots(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++)
			ublk_slot_cancel_in_task(&q->ios[tag]);
		ublk_batch_cancel_fetches(q);
	}
}

/*
 * Whether the server knows of every queue that it is to leave. A queue of a
 * BATCH_IO device always knows: its fetch commands have been canceled, and no
 * new one is accepted.
 */
bool ublk_server_notified(const struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		const struct ublk_queue *q = ub->queues[i];

		if (ublk_is_batch(q))
			continue;
		for (tag = 0; tag < q->depth; tag++)
			if (atomic_read(&q->ios[tag].state) == UBLK_IO_CANCELED)
				break;
		if (tag == q->depth)
			return false;
	}
	return true;
}

/* Whether nothing refers to the data of a request any more. */
bool ublk_refs_gone(const struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		const struct ublk_queue *q = ub->queues[i];

		if (!ublk_no_copy(q))
			continue;
		for (tag = 0; tag < q->depth; tag++)
			if (refcount_read(&q->ios[tag].ref))
				return false;
	}
	return true;
}

/* Whether a command or a request still has a slot of a device that is closed. */
static bool __maybe_unused ublk_slot_in_use(const struct ublk_io *io)
{
	switch (atomic_read(&io->state)) {
	case UBLK_IO_BUSY:
	case UBLK_IO_DISPATCH:
	case UBLK_IO_WAIT_BUF:
	case UBLK_IO_SERVED:
	case UBLK_IO_COMMIT:
	case UBLK_IO_REVOKED:
		return true;
	default:
		return io->cmd || refcount_read(&io->ref);
	}
}

/* Makes the slots ready for the next server; ub->mutex is held. */
void ublk_reset_slots(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct task_struct *daemon = io->daemon;

			/* ublk_timeout() may be looking at it. */
			spin_lock(&ub->lock);
			WRITE_ONCE(io->daemon, NULL);
			spin_unlock(&ub->lock);
			if (daemon)
				put_task_struct(daemon);
			ublk_assert(!ublk_slot_in_use(io));
			io->cmd = NULL;
			WRITE_ONCE(io->req, NULL);
			io->reg_ring = NULL;
			io->buf_addr = 0;
			atomic_set(&io->state, UBLK_IO_EMPTY);
		}
		ublk_batch_reset(q);
	}
	spin_lock(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++)
		ub->queues[i]->nr_fetched = 0;
	WRITE_ONCE(ub->nr_ready, 0);
	WRITE_ONCE(ub->nr_servers, ub->nr_servers + 1);
	ub->untrusted = false;
	WRITE_ONCE(ub->closing, false);
	if (ub->canceling)
		ublk_reap_end();
	WRITE_ONCE(ub->canceling, false);
	ublk_gates_close(ub);
	spin_unlock(&ub->lock);
}
