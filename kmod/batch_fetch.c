// SPDX-License-Identifier: GPL-2.0
/*
 * UBLK_F_BATCH_IO: FETCH_IO_CMDS, multishot commands that deliver tags to the
 * server in provided buffers.
 */
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "batch.h"

/* Maximum number of tags per completion. */
#define UBLK_BATCH_TAGS		128

static void ublk_fetch_free(struct ublk_fetch *fetch)
{
	put_task_struct(fetch->task);
	kfree(fetch);
}

/*
 * Undoes ublk_batch_prepare() for tags that could not be delivered, and returns
 * them to the ring.
 */
static void ublk_batch_undo(struct ublk_queue *q, struct io_uring_cmd *cmd,
			    u16 *tags, unsigned int n, unsigned int issue_flags)
{
	unsigned int i, left = 0;

	for (i = 0; i < n; i++) {
		struct ublk_io *io = &q->ios[tags[i]];

		/* A thread may have guessed the tag and committed it. */
		if (!ublk_io_transition(io, UBLK_IO_SERVED, UBLK_IO_DISPATCH))
			continue;
		ublk_auto_unregister(io, cmd, issue_flags);
		tags[left++] = tags[i];
	}
	ublk_batch_put_back(q, tags, left);
}

/*
 * Makes requests ready for delivery. Removes those from @tags that cannot be
 * delivered, and returns how many are left.
 */
static unsigned int ublk_batch_prepare(struct ublk_queue *q,
				       struct io_uring_cmd *cmd, u16 *tags,
				       unsigned int n, unsigned int issue_flags)
{
	unsigned int i, ready = 0;

	for (i = 0; i < n; i++) {
		struct ublk_io *io = &q->ios[tags[i]];
		int ret = UBLK_TAKEN_BACK;

		if (likely(ublk_io_transition(io, UBLK_IO_DISPATCH, UBLK_IO_BUSY)))
			ret = ublk_prepare_delivery(q, io, cmd, issue_flags);
		if (unlikely(ret == UBLK_TAKEN_BACK)) {
			atomic_set(&io->state, UBLK_IO_CANCELED);
			continue;
		}
		if (unlikely(ret < 0)) {
			ublk_fail_delivery(q, io, issue_flags);
			continue;
		}
		atomic_set_release(&io->state, UBLK_IO_SERVED);
		tags[ready++] = tags[i];
	}
	return ready;
}

/*
 * Delivers some tags to the server. Returns a positive number if there may be
 * more, 0 if there are none, or the result that the command is to end with.
 */
static int ublk_batch_deliver(struct ublk_fetch *fetch, unsigned int issue_flags)
{
	struct ublk_queue *q = fetch->q;
	struct io_uring_cmd *cmd = fetch->cmd;
	u16 tags[UBLK_BATCH_TAGS];
	struct io_br_sel sel;
	unsigned int n, fit;
	size_t len;
	int ret;

	ret = ublk_batch_take(q, tags, ARRAY_SIZE(tags));
	if (ret <= 0)
		return ret;
	n = ret;

	len = n * sizeof(*tags);
	sel = io_uring_cmd_buffer_select(cmd, fetch->buf_group, &len,
					 issue_flags);
	if (sel.val <= 0) {
		ublk_batch_put_back(q, tags, n);
		return -ENOBUFS;
	}
	fit = min_t(size_t, n, len / sizeof(*tags));
	if (fit < n)
		ublk_batch_put_back(q, tags + fit, n - fit);
	n = ublk_batch_prepare(q, cmd, tags, fit, issue_flags);
	if (n && !copy_to_user(sel.addr, tags, n * sizeof(*tags))) {
		sel.val = n * sizeof(*tags);
		if (!io_uring_mshot_cmd_post_cqe(cmd, &sel, issue_flags))
			return 1;
		ublk_batch_undo(q, cmd, tags, n, issue_flags);
		return -ENOBUFS;
	}
	/* Nothing is posted, so return the buffer. */
	sel.val = 0;
	io_uring_mshot_cmd_post_cqe(cmd, &sel, issue_flags);
	if (fit && !n)
		return 1;
	ublk_batch_undo(q, cmd, tags, n, issue_flags);
	return -ENOBUFS;
}

/*
 * Ends the active command. Another pending one takes over the tags that are
 * left.
 */
static void ublk_batch_end_active(struct ublk_fetch *fetch, int ret,
				  unsigned int issue_flags)
{
	struct ublk_batch *b = fetch->q->batch;
	struct ublk_fetch *next;

	spin_lock(&b->lock);
	fetch->retired = true;
	list_del(&fetch->node);
	b->active = NULL;
	next = ublk_batch_activate(b);
	spin_unlock(&b->lock);
	ublk_batch_schedule(next);
	io_uring_cmd_done(fetch->cmd, ret, issue_flags);
	ublk_fetch_free(fetch);
}

/**
 * ublk_batch_tw() - Task work of the active command: deliver all tags in the
 *   ring.
 * @tw_req: the task work
 * @tw: its state
 *
 * Context: Task work of the thread that submitted the command.
 */
void ublk_batch_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	struct ublk_fetch *fetch =
		io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch;
	unsigned int issue_flags = IO_URING_CMD_TASK_WORK_ISSUE_FLAGS;
	int ret;

	if (unlikely(tw.cancel)) {
		ublk_mark_leaving(fetch->q->ub);
		ret = UBLK_IO_RES_ABORT;
	} else {
		do
			ret = ublk_batch_deliver(fetch, issue_flags);
		while (ret > 0);
	}
	/* If 0, the command may have been completed and freed by now. */
	if (ret < 0)
		ublk_batch_end_active(fetch, ret, issue_flags);
}

/*
 * Removes an idle command from the queue. Returns false if it is active or
 * being completed. b->lock is held.
 */
static bool ublk_batch_retire(struct ublk_batch *b, struct ublk_fetch *fetch)
{
	if (b->active == fetch || fetch->retired)
		return false;
	fetch->retired = true;
	list_del(&fetch->node);
	return true;
}

/**
 * ublk_batch_cancel_fetch() - Cancel a pending FETCH_IO_CMDS for io_uring.
 * @fetch: the command
 * @issue_flags: io_uring issue flags of the caller
 *
 * An active command ends with its task work instead. @fetch is valid as long as
 * the command is on io_uring's list of cancelable commands, from which
 * io_uring_cmd_done() removes it.
 *
 * Context: io_uring cancellation, with the ring as @issue_flags says.
 */
void ublk_batch_cancel_fetch(struct ublk_fetch *fetch, unsigned int issue_flags)
{
	struct ublk_batch *b = fetch->q->batch;
	bool retired;

	spin_lock(&b->lock);
	retired = ublk_batch_retire(b, fetch);
	spin_unlock(&b->lock);
	if (!retired)
		return;
	io_uring_cmd_done(fetch->cmd, UBLK_IO_RES_ABORT, issue_flags);
	ublk_fetch_free(fetch);
}

static void ublk_fetch_abort_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	struct ublk_fetch *fetch =
		io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch;

	io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT,
			  IO_URING_CMD_TASK_WORK_ISSUE_FLAGS);
	ublk_fetch_free(fetch);
}

/**
 * ublk_batch_cancel_fetches() - Cancel all pending FETCH_IO_CMDS of a queue.
 * @q: the queue, whose server is leaving; it may have no batch state
 *
 * The commands are completed in their threads, see ublk_slot_cancel_in_task().
 *
 * Context: Process context, outside any ring.
 */
void ublk_batch_cancel_fetches(struct ublk_queue *q)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch, *next;
	LIST_HEAD(idle);

	if (!b)
		return;
	spin_lock(&b->lock);
	list_for_each_entry_safe(fetch, next, &b->fetches, node)
		if (ublk_batch_retire(b, fetch))
			list_add_tail(&fetch->node, &idle);
	spin_unlock(&b->lock);
	/*
	 * A command that has been completed may be freed, together with its
	 * structure.
	 */
	list_for_each_entry_safe(fetch, next, &idle, node)
		io_uring_cmd_complete_in_task(fetch->cmd, ublk_fetch_abort_tw);
}

/**
 * ublk_batch_fetch() - Carry out FETCH_IO_CMDS.
 * @q: the queue
 * @cmd: the command
 * @args: its arguments
 * @issue_flags: io_uring issue flags of the caller
 *
 * Context: Task context of the submitter.
 *
 * Return: -EIOCBQUEUED, or a negative errno.
 */
int ublk_batch_fetch(struct ublk_queue *q, struct io_uring_cmd *cmd,
		     const struct ublk_batch_io *args, unsigned int issue_flags)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch, *active;
	bool cancel;

	if (args->elem_bytes != sizeof(u16) || args->flags)
		return -EINVAL;
	if (!(cmd->flags & IORING_URING_CMD_MULTISHOT))
		return -EINVAL;
	/* Reclaiming memory must not depend on writing to this disk. */
	fetch = kzalloc(sizeof(*fetch), GFP_NOIO);
	if (!fetch)
		return -ENOMEM;
	fetch->q = q;
	fetch->cmd = cmd;
	fetch->task = get_task_struct(current);
	fetch->buf_group = READ_ONCE(cmd->sqe->buf_index);
	io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch = fetch;
	io_uring_cmd_mark_cancelable(cmd, issue_flags);

	ublk_batch_set_fetcher(q);
	spin_lock(&b->lock);
	cancel = READ_ONCE(q->ub->canceling);
	if (!cancel)
		list_add_tail(&fetch->node, &b->fetches);
	fetch->retired = cancel;
	active = ublk_batch_activate(b);
	spin_unlock(&b->lock);
	ublk_batch_schedule(active);
	if (cancel) {
		io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
		ublk_fetch_free(fetch);
	}
	return -EIOCBQUEUED;
}
