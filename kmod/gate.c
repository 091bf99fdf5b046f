// SPDX-License-Identifier: GPL-2.0
/*
 * Gates. Each queue has a gate, which decides what happens to a request whose
 * slot is not armed: it is held on the requeue list, or it fails. An open gate
 * lets requests through to the server.
 *
 * Gates change under ub->lock, and only here. They are read without the lock
 * when a request is queued.
 */
#include "internal.h"

/* Delay before a request is queued again whose gate is open. */
#define UBLK_RETRY_MS	3

/* How the gates of a device are closed, in its current state. */
static enum ublk_gate ublk_closed_gate(const struct ublk_device *ub)
{
	if (!ub->recoverable || ub->stopping)
		return UBLK_GATE_FAIL;
	if (ub->dev_info.flags & UBLK_F_USER_RECOVERY_FAIL_IO)
		return UBLK_GATE_FAIL_IO;
	return UBLK_GATE_HOLD;
}

/**
 * ublk_gates_close() - Close the gates of all queues.
 * @ub: the device
 *
 * The state of the device and its recovery mode decide whether requests are
 * held or fail.
 *
 * Context: Caller holds ub->lock.
 */
void ublk_gates_close(struct ublk_device *ub)
{
	enum ublk_gate gate = ublk_closed_gate(ub);
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++)
		WRITE_ONCE(ub->queues[i]->gate, gate);
}

/**
 * ublk_gates_open() - Open the gates of all queues that are ready.
 * @ub: the device
 *
 * A queue is ready if its server has fetched all of its tags and is not
 * leaving.
 *
 * Context: Caller holds ub->lock.
 */
void ublk_gates_open(struct ublk_device *ub)
{
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		if (!ub->canceling && q->nr_fetched == q->depth)
			WRITE_ONCE(q->gate, UBLK_GATE_OPEN);
	}
}

/**
 * ublk_gate_queue_ready() - Open the gate of a queue whose last tag was
 *   fetched.
 * @q: the queue
 *
 * The gate stays closed while the server is leaving, while the disk is being
 * removed, and, with UBLK_F_USER_RECOVERY_FAIL_IO, until recovery has ended.
 *
 * Context: Caller holds ub->lock.
 */
void ublk_gate_queue_ready(struct ublk_queue *q)
{
	struct ublk_device *ub = q->ub;

	lockdep_assert_held(&ub->lock);
	if (!ub->canceling && !ub->stopping && q->gate != UBLK_GATE_FAIL_IO)
		WRITE_ONCE(q->gate, UBLK_GATE_OPEN);
}

/**
 * ublk_gates_stop_holding() - Make closed gates fail requests.
 * @ub: the device, whose disk is being removed
 *
 * Open gates stay open: the server goes on serving until the disk is gone. The
 * caller then kicks the requeue list, so that requests that were held fail as
 * well.
 *
 * Context: Caller holds ub->lock.
 */
void ublk_gates_stop_holding(struct ublk_device *ub)
{
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++)
		if (ub->queues[i]->gate != UBLK_GATE_OPEN)
			WRITE_ONCE(ub->queues[i]->gate, UBLK_GATE_FAIL);
}

/**
 * ublk_hold_or_fail() - Hold or fail a request, as the gate says.
 * @q: the queue
 * @req: a started request that no server has seen, or that is to be sent to the
 *	next server
 *
 * The lock orders this against code that changes the gate and then kicks the
 * requeue list, so that no request is held for longer than it should be.
 *
 * Context: Any context that may take ub->lock; the request may be ended.
 */
void ublk_hold_or_fail(struct ublk_queue *q, struct request *req)
{
	enum ublk_gate gate;

	spin_lock(&q->ub->lock);
	gate = q->gate;
	if (gate >= UBLK_GATE_HOLD) {
		struct request_queue *rq_queue = req->q;

		blk_mq_requeue_request(req, false);
		/* The gate was opened meanwhile, or is about to be closed. */
		if (gate == UBLK_GATE_OPEN)
			blk_mq_delay_kick_requeue_list(rq_queue, UBLK_RETRY_MS);
	}
	spin_unlock(&q->ub->lock);
	if (gate < UBLK_GATE_HOLD)
		ublk_end_request(req, ublk_gate_status(gate));
}
