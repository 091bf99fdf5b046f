// SPDX-License-Identifier: GPL-2.0
/*
 * The gates: what becomes of requests for which nothing is armed.
 */
#include "internal.h"

#define UBLK_RETRY_MS	3

static enum ublk_gate ublk_closed_gate(const struct ublk_device *ub)
{
	if (!ub->recoverable || ub->stopping)
		return UBLK_GATE_FAIL;
	if (ub->dev_info.flags & UBLK_F_USER_RECOVERY_FAIL_IO)
		return UBLK_GATE_FAIL_IO;
	return UBLK_GATE_HOLD;
}

/* Sends requests where the state of the device wants them; ub->lock is held. */
void ublk_gates_close(struct ublk_device *ub)
{
	enum ublk_gate gate = ublk_closed_gate(ub);
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++)
		WRITE_ONCE(ub->queues[i]->gate, gate);
}

/* Opens what is fetched and not being canceled; ub->lock is held. */
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

/* All tags of a queue are fetched; ub->lock is held. */
void ublk_gate_queue_ready(struct ublk_queue *q)
{
	struct ublk_device *ub = q->ub;

	lockdep_assert_held(&ub->lock);
	if (!ub->canceling && !ub->stopping && q->gate != UBLK_GATE_FAIL_IO)
		WRITE_ONCE(q->gate, UBLK_GATE_OPEN);
}

/* The disk is being removed: closed gates fail requests; ub->lock is held. */
void ublk_gates_stop_holding(struct ublk_device *ub)
{
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->dev_info.nr_hw_queues; i++)
		if (ub->queues[i]->gate != UBLK_GATE_OPEN)
			WRITE_ONCE(ub->queues[i]->gate, UBLK_GATE_FAIL);
}

/*
 * A request that no server has seen, or that is to be seen again, meets a
 * closed gate. The lock orders this against whoever changes the gate and then
 * kicks the requeue list: no request is held that should not be.
 */
void ublk_hold_or_fail(struct ublk_queue *q, struct request *req)
{
	enum ublk_gate gate;

	spin_lock(&q->ub->lock);
	gate = q->gate;
	if (gate >= UBLK_GATE_HOLD) {
		struct request_queue *rq_queue = req->q;

		blk_mq_requeue_request(req, false);
		/* The gate was opened or is about to close: soon again. */
		if (gate == UBLK_GATE_OPEN)
			blk_mq_delay_kick_requeue_list(rq_queue, UBLK_RETRY_MS);
	}
	spin_unlock(&q->ub->lock);
	if (gate < UBLK_GATE_HOLD)
		ublk_end_request(req, ublk_gate_status(gate));
}
