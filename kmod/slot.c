// SPDX-License-Identifier: GPL-2.0
/*
 * The life of a slot: fetched by a server, armed, canceled, and reset for the
 * next server. The states are described in ublk.h.
 *
 * Two pieces of device state act on all slots. The gates decide what happens to
 * a request whose slot is not armed (see gate.c). They are closed before the
 * first slot is canceled, so that a request that finds its slot canceled also
 * finds the reason. "canceling" makes every slot that is armed afterwards be
 * canceled at once.
 */
#include <linux/capability.h>
#include <linux/sched/task.h>

#include "internal.h"

/**
 * ublk_all_fetched() - Check whether the server has fetched all tags.
 * @ub: the device
 *
 * Context: Any context.
 *
 * Return: true if every queue is ready.
 */
bool ublk_all_fetched(const struct ublk_device *ub)
{
	return READ_ONCE(ub->nr_ready) == ub->dev_info.nr_hw_queues;
}

/**
 * ublk_slot_reserve() - Claim an empty slot for the command that fetches it.
 * @q: the queue
 * @io: the slot
 *
 * On success the slot is BUSY. The caller arms it with ublk_slot_fetched(), or
 * gives it back with ublk_slot_unreserve().
 *
 * Context: Process context. Takes ub->lock.
 *
 * Return: 0; -ENODEV if the device was stopped and the char device must be
 *	closed first; -EBUSY if all tags are fetched; -EINVAL if this tag is fetched.
 */
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

/**
 * ublk_slot_unreserve() - Undo ublk_slot_reserve().
 * @io: the slot, which is BUSY
 *
 * Context: Any context.
 */
void ublk_slot_unreserve(struct ublk_io *io)
{
	atomic_set(&io->state, UBLK_IO_EMPTY);
}

/**
 * ublk_slot_arm() - Make a slot wait for the next request.
 * @q: the queue
 * @io: the slot, which is BUSY; its command has been marked cancelable
 * @issue_flags: io_uring issue flags of the caller
 *
 * If the server is leaving, the slot is canceled instead. The full barrier
 * orders this against ublk_mark_leaving(): either the code that cancels all
 * slots sees the armed slot, or it is canceled here.
 *
 * Context: Task context of the thread that issued the command, with the ring as
 *	@issue_flags says.
 */
void ublk_slot_arm(struct ublk_queue *q, struct ublk_io *io,
		   unsigned int issue_flags)
{
	int old = atomic_xchg(&io->state, UBLK_IO_ARMED);

	ublk_assert(old == UBLK_IO_BUSY);
	if (unlikely(READ_ONCE(q->ub->canceling)))
		ublk_slot_cancel(io, issue_flags);
}

/**
 * ublk_slot_fetched() - Count a reserved slot as fetched, and arm it.
 * @q: the queue
 * @io: the slot, which is BUSY; its command has been marked cancelable
 * @issue_flags: io_uring issue flags of the caller
 *
 * The last slot of a queue opens the gate of the queue. A gate that fails
 * requests (UBLK_GATE_FAIL_IO) stays closed until recovery has ended.
 *
 * Context: Task context of the thread that issued the command. Takes ub->lock.
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
	/* The slot must be armed before the gate opens. */
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
 * Changes an armed slot to CANCELED. Returns false if the slot is not armed, or
 * was claimed by a request first. The caller completes the command of the slot,
 * if it has one.
 */
static bool ublk_slot_disarm(struct ublk_io *io, struct io_uring_cmd **cmd)
{
	if (!ublk_io_transition(io, UBLK_IO_ARMED, UBLK_IO_CANCELED))
		return false;
	*cmd = io->cmd;
	io->cmd = NULL;
	return true;
}

/**
 * ublk_slot_cancel() - Cancel an armed slot and complete its command.
 * @io: the slot
 * @issue_flags: issue flags that describe the ring of the command
 *
 * Context: Task context; may take the lock of the ring, see
 *	ublk_slot_cancel_in_task().
 *
 * Return: true if the slot was armed.
 */
bool ublk_slot_cancel(struct ublk_io *io, unsigned int issue_flags)
{
	struct io_uring_cmd *cmd;

	if (!ublk_slot_disarm(io, &cmd))
		return false;
	/* QUIESCE_DEV waits for the state of the slot. */
	wake_up_all(&ublk_io_queue(io)->ub->wait);
	/* The command may hold the last reference to the device. */
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
 * Like ublk_slot_cancel(), for callers outside the ring. Here
 * io_uring_cmd_done() would wait for the lock of the ring, which the server may
 * hold for an unlimited time while it handles a page fault. The command is
 * therefore completed by task work of the server's thread.
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

/**
 * ublk_mark_leaving_locked() - Mark the server as leaving, and close the gates.
 * @ub: the device
 *
 * Has no effect if the server is leaving already.
 *
 * Context: Caller holds ub->lock.
 */
void ublk_mark_leaving_locked(struct ublk_device *ub)
{
	lockdep_assert_held(&ub->lock);
	if (ub->canceling)
		return;
	WRITE_ONCE(ub->canceling, true);
	ublk_gates_close(ub);
	ublk_watch(ub);
}

/**
 * ublk_mark_leaving() - Mark the server as leaving, and close the gates.
 * @ub: the device
 *
 * The server has exited, is exiting, or was asked to leave. Requests that have
 * already claimed a slot still reach it. Slots that are armed from now on are
 * canceled; those that are armed already are left to the caller.
 *
 * Context: Any context that may take ub->lock.
 */
void ublk_mark_leaving(struct ublk_device *ub)
{
	spin_lock(&ub->lock);
	ublk_mark_leaving_locked(ub);
	spin_unlock(&ub->lock);
	/* Pairs with the atomic_xchg() in ublk_slot_arm(). */
	smp_mb();
}

/**
 * ublk_cancel_slots() - Cancel all armed slots and pending fetch commands.
 * @ub: the device, whose server was marked as leaving
 *
 * The commands are completed by task work of their threads, so this never waits
 * for the server.
 *
 * Context: Process context, outside any ring.
 */
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

/**
 * ublk_server_notified() - Check whether the server knows that it is to leave.
 * @ub: the device, whose server was marked as leaving
 *
 * That is the case once a command of each queue was completed with
 * UBLK_IO_RES_ABORT. It is always the case with UBLK_F_BATCH_IO: the fetch
 * commands have been canceled, and new ones are refused.
 *
 * Context: Any context.
 *
 * Return: true if the server has been notified on every queue.
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

/**
 * ublk_refs_gone() - Check whether all references to request data have been
 *   dropped.
 * @ub: the device
 *
 * Context: Any context.
 *
 * Return: true if no request of the device has a reference.
 */
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

/*
 * Whether a command or a request still uses a slot, with the char device
 * closed.
 */
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

/**
 * ublk_reset_slots() - Prepare all slots for the next server.
 * @ub: the device, whose char device is closed
 *
 * No command is pending, and no request has a slot.
 *
 * Context: Process context. Caller holds ub->mutex. Takes ub->lock.
 */
void ublk_reset_slots(struct ublk_device *ub)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct task_struct *daemon = io->daemon;

			/* ublk_timeout() reads it under this lock. */
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
	WRITE_ONCE(ub->canceling, false);
	ublk_gates_close(ub);
	/* While requests are held, the close of the disk may wait for them. */
	if (ub->queues[0]->gate != UBLK_GATE_HOLD)
		ublk_unwatch(ub);
	spin_unlock(&ub->lock);
}
