// SPDX-License-Identifier: GPL-2.0
/*
 * Requests on their way from the block layer to the server.
 *
 * queue_rq() claims the slot of the request's tag, and leaves the rest to task
 * work of the thread that fetched the tag. There the memory of the server is
 * accessible, and completions are posted in batches.
 */
#include <linux/pid.h>
#include <linux/sched/signal.h>

#include "internal.h"

/*
 * The time-out for the rest of a request of an unprivileged device: what is
 * left of the time-out of the whole request.
 */
static unsigned int ublk_time_left(struct request *req)
{
	const struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);
	long left = pdu->first_dispatch + req->q->rq_timeout - jiffies;

	return max(left, 1L);
}

/*
 * Claims the slot of a request's tag. Returns BLK_STS_AGAIN if the slot is not
 * armed.
 */
static blk_status_t ublk_claim_slot(struct ublk_queue *q, struct request *req)
{
	struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);
	struct ublk_io *io = &q->ios[req->tag];
	blk_status_t status;

	status = ublk_fill_desc(q, req);
	if (unlikely(status))
		return status;
	if (!pdu->partial)
		pdu->first_dispatch = jiffies;
	else if (q->flags & UBLK_F_UNPRIVILEGED_DEV)
		req->timeout = ublk_time_left(req);
	blk_mq_start_request(req);
	/*
	 * Set before the slot is claimed, because a time-out that finds the
	 * slot in DISPATCH needs them. Until then no other code uses them: the
	 * tag belongs to this request.
	 */
	WRITE_ONCE(io->req, req);
	io->next = NULL;
	ublk_race(UBLK_RACE_QUEUE);
	if (unlikely(!ublk_io_transition(io, UBLK_IO_ARMED, UBLK_IO_DISPATCH)))
		return BLK_STS_AGAIN;
	return BLK_STS_OK;
}

/**
 * ublk_prepare_delivery() - Make the data of a request available to the server.
 * @q: the queue
 * @io: the slot, which is BUSY and was in DISPATCH before
 * @cmd: the command that delivers the request
 * @issue_flags: io_uring issue flags of the caller
 *
 * Copies the data or registers the pages, as the mode of the device says.
 *
 * Context: Task work of the thread that owns the slot. May sleep in page
 *	faults.
 *
 * Return: the result to complete the command with (UBLK_IO_RES_*),
 *	UBLK_TAKEN_BACK, or a negative errno if the request cannot be delivered.
 */
int ublk_prepare_delivery(struct ublk_queue *q, struct ublk_io *io,
			  struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct request *req = io->req;

	/* A batch may have tried to deliver it before. */
	if (ublk_no_copy(q) && !refcount_read(&io->ref))
		refcount_set(&io->ref, 1);
	if (!ublk_rq_has_data(req) ||
	    ublk_desc(q, io->tag)->op_flags & UBLK_IO_F_SHMEM_ZC)
		return UBLK_IO_RES_OK;
	if (q->flags & UBLK_F_AUTO_BUF_REG)
		return ublk_auto_register(q, io, cmd, issue_flags);
	if (ublk_no_copy(q) || ublk_rq_from_server(req))
		return UBLK_IO_RES_OK;
	if (q->flags & UBLK_F_NEED_GET_DATA)
		return UBLK_IO_RES_NEED_GET_DATA;
	return ublk_copy_to_server(io, io->buf_addr, UBLK_IO_DISPATCH) ?:
	       UBLK_IO_RES_OK;
}

/**
 * ublk_server_dying() - Check whether the current thread is being killed.
 *
 * Its page faults may fail, and it does not return to user space.
 *
 * Context: Task work or a command of the server.
 *
 * Return: true if it is being killed or exits.
 */
bool ublk_server_dying(void)
{
	return fatal_signal_pending(current) || current->flags & PF_EXITING;
}

/**
 * ublk_fail_delivery() - Fail a request that cannot be delivered.
 * @q: the queue
 * @io: the slot, which is BUSY
 * @issue_flags: io_uring issue flags of the caller
 *
 * Arms the slot again. If the server is being killed, its page faults may fail:
 * that is no fault of the request, which is then treated like one that no
 * server has seen.
 *
 * Context: Task work or a command of the server.
 */
void ublk_fail_delivery(struct ublk_queue *q, struct ublk_io *io,
			unsigned int issue_flags)
{
	struct request *req = io->req;
	bool dying = ublk_server_dying();

	if (dying)
		ublk_mark_leaving(q->ub);
	else
		pr_err_ratelimited("ublkb%u: queue %u tag %u: cannot transfer data to the server, request failed\n",
				   q->ub->dev_info.dev_id, q->q_id, io->tag);
	ublk_slot_arm(q, io, issue_flags);
	ublk_finish(q, io, req, dying ? UBLK_RES_UNSEEN : -EIO);
}

/* Delivers the request of one slot, in the thread that owns it. */
static void ublk_deliver(struct ublk_io *io, bool dying,
			 unsigned int issue_flags)
{
	struct ublk_queue *q = ublk_io_queue(io);
	struct io_uring_cmd *cmd = io->cmd;
	bool ours = ublk_io_transition(io, UBLK_IO_DISPATCH, UBLK_IO_BUSY);
	int res = 0;

	if (likely(ours && !dying)) {
		ublk_race(UBLK_RACE_DELIVER);
		res = ublk_prepare_delivery(q, io, cmd, issue_flags);
		ours = res != UBLK_TAKEN_BACK;
	}
	if (unlikely(dying || !ours)) {
		struct request *req = io->req;

		ublk_mark_leaving(q->ub);
		io->cmd = NULL;
		atomic_set(&io->state, UBLK_IO_CANCELED);
		if (ours)
			ublk_hold_or_fail(q, req);
		wake_up_all(&q->ub->wait);
		/* The command may hold the last reference to the device. */
		io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
		return;
	}
	if (unlikely(res < 0)) {
		ublk_fail_delivery(q, io, issue_flags);
		return;
	}
	io->cmd = NULL;
	atomic_set_release(&io->state, res == UBLK_IO_RES_OK ?
			   UBLK_IO_SERVED : UBLK_IO_WAIT_BUF);
	io_uring_cmd_done(cmd, res, issue_flags);
}

static void ublk_deliver_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	struct ublk_io *io, *next;

	for (io = io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->io; io; io = next) {
		next = io->next;
		ublk_deliver(io, tw.cancel, IO_URING_CMD_TASK_WORK_ISSUE_FLAGS);
	}
}

static void ublk_schedule_delivery(struct ublk_io *first)
{
	io_uring_cmd_complete_in_task(first->cmd, ublk_deliver_tw);
}

static blk_status_t ublk_queue_rq(struct blk_mq_hw_ctx *hctx,
				  const struct blk_mq_queue_data *bd)
{
	struct ublk_queue *q = hctx->driver_data;
	enum ublk_gate gate = READ_ONCE(q->gate);
	struct request *req = bd->rq;
	/*
	 * Once the slot is claimed, the request may be taken back and lose its
	 * tag.
	 */
	u16 tag = req->tag;
	blk_status_t status;

	if (unlikely(gate < UBLK_GATE_HOLD))
		status = ublk_gate_status(gate);
	else if (unlikely(gate == UBLK_GATE_HOLD))
		status = BLK_STS_AGAIN;
	else
		status = ublk_claim_slot(q, req);
	if (unlikely(status == BLK_STS_AGAIN))
		ublk_hold_or_fail(q, req);
	else if (unlikely(status))
		/*
		 * A returned status would make the block layer end the request;
		 * see ublk_end_request().
		 */
		ublk_end_request(req, status);
	else if (ublk_is_batch(q))
		ublk_batch_add_tag(q, tag);
	else
		ublk_schedule_delivery(&q->ios[tag]);
	return BLK_STS_OK;
}

/* Whether one task work can deliver the requests of both slots. */
static bool ublk_same_ring(const struct ublk_io *a, const struct ublk_io *b)
{
	return a->daemon == b->daemon &&
	       io_uring_cmd_ctx_handle(a->cmd) == io_uring_cmd_ctx_handle(b->cmd);
}

/*
 * Queues the requests of a plug. Requests that are left on the list, in order,
 * are queued one by one by ublk_queue_rq().
 */
static void ublk_queue_rqs(struct rq_list *rqlist)
{
	struct ublk_io *first = NULL, *last = NULL;
	struct rq_list left = { };
	struct request *req;

	while ((req = rq_list_pop(rqlist))) {
		struct ublk_queue *q = req->mq_hctx->driver_data;
		struct ublk_io *io = &q->ios[req->tag];
		blk_status_t status;

		if (READ_ONCE(q->gate) != UBLK_GATE_OPEN) {
			rq_list_add_tail(&left, req);
			continue;
		}
		status = ublk_claim_slot(q, req);
		if (unlikely(status == BLK_STS_AGAIN)) {
			ublk_hold_or_fail(q, req);
			continue;
		}
		if (unlikely(status)) {
			ublk_end_request(req, status);
			continue;
		}
		if (ublk_is_batch(q)) {
			ublk_batch_add_tag(q, io->tag);
			continue;
		}
		if (last && ublk_same_ring(first, io)) {
			last->next = io;
		} else {
			if (first)
				ublk_schedule_delivery(first);
			first = io;
		}
		last = io;
	}
	if (first)
		ublk_schedule_delivery(first);
	*rqlist = left;
}

static int ublk_init_hctx(struct blk_mq_hw_ctx *hctx, void *data,
			  unsigned int index)
{
	struct ublk_device *ub = data;

	hctx->driver_data = ub->queues[hctx->queue_num];
	return 0;
}

/*
 * Kills the process that opened the char device, and the one that holds the
 * request, which may be a child.
 */
static void ublk_kill_server(struct ublk_queue *q, struct ublk_io *io)
{
	struct ublk_device *ub = q->ub;
	struct task_struct *task;

	spin_lock(&ub->lock);
	rcu_read_lock();
	task = pid_task(ub->server, PIDTYPE_TGID);
	if (task)
		send_sig(SIGKILL, task, 0);
	rcu_read_unlock();
	if (ublk_is_batch(q))
		ublk_batch_kill_holder(q, io);
	else if (io->daemon)
		send_sig(SIGKILL, io->daemon, 0);
	spin_unlock(&ub->lock);
}

/*
 * A request has timed out. A server may take as long as it likes, with two
 * exceptions. Servers of unprivileged devices are killed and the request taken
 * back, so that a user cannot block other users of the disk. Servers that have
 * exited, or were killed and cannot die because they wait for this disk, will
 * not complete the request, which is taken back too.
 */
static enum blk_eh_timer_return ublk_timeout(struct request *req)
{
	struct ublk_queue *q = req->mq_hctx->driver_data;
	bool unprivileged = q->flags & UBLK_F_UNPRIVILEGED_DEV;
	int tag = READ_ONCE(req->tag);
	struct ublk_io *io;

	/*
	 * With an I/O scheduler, a request that is being requeued has no tag.
	 */
	if (tag < 0 || tag >= q->depth)
		return BLK_EH_RESET_TIMER;
	io = &q->ios[tag];
	if (unprivileged)
		ublk_kill_server(q, io);
	return ublk_take_back(q, io, req, unprivileged) ? BLK_EH_DONE :
						     BLK_EH_RESET_TIMER;
}

const struct blk_mq_ops ublk_mq_ops = {
	.queue_rq	= ublk_queue_rq,
	.queue_rqs	= ublk_queue_rqs,
	.init_hctx	= ublk_init_hctx,
	.timeout	= ublk_timeout,
};
