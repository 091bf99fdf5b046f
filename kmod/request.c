// SPDX-License-Identifier: GPL-2.0
/*
 * Descriptors of requests, and how requests end.
 */
#include <linux/blk-integrity.h>
#include <linux/bottom_half.h>
#include <linux/rcupdate.h>

#include "internal.h"

static int ublk_desc_op(const struct request *req)
{
	switch (req_op(req)) {
	case REQ_OP_READ:
		return UBLK_IO_OP_READ;
	case REQ_OP_WRITE:
		return UBLK_IO_OP_WRITE;
	case REQ_OP_FLUSH:
		return UBLK_IO_OP_FLUSH;
	case REQ_OP_DISCARD:
		return UBLK_IO_OP_DISCARD;
	case REQ_OP_WRITE_ZEROES:
		return UBLK_IO_OP_WRITE_ZEROES;
	case REQ_OP_ZONE_OPEN:
		return UBLK_IO_OP_ZONE_OPEN;
	case REQ_OP_ZONE_CLOSE:
		return UBLK_IO_OP_ZONE_CLOSE;
	case REQ_OP_ZONE_FINISH:
		return UBLK_IO_OP_ZONE_FINISH;
	case REQ_OP_ZONE_APPEND:
		return UBLK_IO_OP_ZONE_APPEND;
	case REQ_OP_ZONE_RESET_ALL:
		return UBLK_IO_OP_ZONE_RESET_ALL;
	case REQ_OP_ZONE_RESET:
		return UBLK_IO_OP_ZONE_RESET;
	case REQ_OP_DRV_IN:
		return UBLK_IO_OP_REPORT_ZONES;
	default:
		return -EOPNOTSUPP;
	}
}

static u32 ublk_desc_flags(const struct request *req)
{
	static const struct {
		blk_opf_t block;
		u32 ublk;
	} map[] = {
		{ REQ_FAILFAST_DEV,		UBLK_IO_F_FAILFAST_DEV },
		{ REQ_FAILFAST_TRANSPORT,	UBLK_IO_F_FAILFAST_TRANSPORT },
		{ REQ_FAILFAST_DRIVER,		UBLK_IO_F_FAILFAST_DRIVER },
		{ REQ_META,			UBLK_IO_F_META },
		{ REQ_FUA,			UBLK_IO_F_FUA },
		{ REQ_NOUNMAP,			UBLK_IO_F_NOUNMAP },
		{ REQ_SWAP,			UBLK_IO_F_SWAP },
#ifdef UBLK_CAN_INTEGRITY
		{ REQ_INTEGRITY,		UBLK_IO_F_INTEGRITY },
#endif
	};
	u32 flags = 0;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(map); i++)
		if (req->cmd_flags & map[i].block)
			flags |= map[i].ublk;
	return flags;
}

/**
 * ublk_fill_desc() - Describe a request for the server.
 * @q: the queue
 * @req: the request, whose slot does not belong to the server yet
 *
 * Context: queue_rq(), under RCU.
 *
 * Return: BLK_STS_OK, BLK_STS_NOTSUPP if ublk has no such operation, or
 *	BLK_STS_IOERR for more data than the server's buffers hold, should the
 *	block layer fail to split a request.
 */
blk_status_t ublk_fill_desc(struct ublk_queue *q, struct request *req)
{
	struct ublksrv_io_desc *desc = ublk_desc(q, req->tag);
	int op = ublk_desc_op(req);
	u64 addr;

	if (op < 0)
		return BLK_STS_NOTSUPP;
	if (ublk_rq_has_data(req) &&
	    blk_rq_bytes(req) > q->ub->dev_info.max_io_buf_bytes) {
		pr_warn_ratelimited("ublkb%u: a request of %u bytes is longer than the limit\n",
				    q->ub->dev_info.dev_id, blk_rq_bytes(req));
		return BLK_STS_IOERR;
	}
	desc->op_flags = op | ublk_desc_flags(req);
	if (op == UBLK_IO_OP_REPORT_ZONES) {
		const struct ublk_rq *rq = blk_mq_rq_to_pdu(req);

		desc->nr_zones = rq->nr_zones;
		desc->start_sector = rq->sector;
	} else {
		desc->nr_sectors = blk_rq_sectors(req);
		desc->start_sector = blk_rq_pos(req);
	}
	desc->addr = q->ios[req->tag].buf_addr;
	if (q->ub->shmem && ublk_rq_has_data(req) &&
	    ublk_shmem_match(q->ub, req, &addr)) {
		desc->op_flags |= UBLK_IO_F_SHMEM_ZC;
		desc->addr = addr;
	}
	return BLK_STS_OK;
}

/*
 * Ends the first @bytes of a request. Returns true if a part is left.
 *
 * The completion of a client's I/O may drop the last reference to its file. In
 * a task, fput() defers the release of the file until that task returns to user
 * space. Here that task would be the server, and closing a disk may wait for
 * the server: for dirty pages to be written, or for a holder of the disk's
 * open_mutex that does I/O. With bottom halves disabled, as in an interrupt,
 * fput() leaves the release to a kernel worker. There is only one such worker in
 * the system; reap.c has others for the time in which it waits for a server.
 */
static bool ublk_end_bytes(struct request *req, blk_status_t status,
			   unsigned int bytes)
{
	struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);
	bool more;

	local_bh_disable();
	more = blk_update_request(req, status, bytes);
	pdu->partial = more;
	if (!more)
		__blk_mq_end_request(req, status);
	local_bh_enable();
	return more;
}

/**
 * ublk_end_request() - End a request as a whole.
 * @req: the request
 * @status: its status
 *
 * All requests of the driver end here or in ublk_end_part(); see
 * ublk_end_bytes() for the reason.
 *
 * Context: Any context.
 */
void ublk_end_request(struct request *req, blk_status_t status)
{
	WARN_ON_ONCE(ublk_end_bytes(req, status, blk_rq_bytes(req)));
}

/*
 * Whether the server of an unprivileged device has completed a request in
 * parts, each of them in time, for longer than the time-out allows for the
 * whole request.
 */
static bool ublk_request_expired(const struct ublk_queue *q,
				 struct request *req)
{
	const struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);

	return q->flags & UBLK_F_UNPRIVILEGED_DEV &&
	       time_after(jiffies, pdu->first_dispatch + req->q->rq_timeout);
}

/*
 * The server has completed the first @done bytes of a read or write. Ends
 * these, in whole logical blocks, and requeues the rest as a new request.
 */
static void ublk_end_part(struct ublk_queue *q, struct request *req,
			  unsigned int done)
{
	unsigned int bytes = blk_rq_bytes(req);

	if (done < bytes)
		done = round_down(done, queue_logical_block_size(req->q));
	else
		done = bytes;
	if (!done || (done < bytes && ublk_request_expired(q, req)))
		ublk_end_request(req, BLK_STS_IOERR);
	else if (ublk_end_bytes(req, BLK_STS_OK, done))
		blk_mq_requeue_request(req, true);
}

/* Ends a request with the result of the server, or UBLK_RES_*. */
static void ublk_end_rq(struct ublk_queue *q, struct request *req, int result)
{
	if (unlikely(result == UBLK_RES_UNSEEN)) {
		ublk_hold_or_fail(q, req);
		return;
	}
	if (unlikely(result == UBLK_RES_ABORTED)) {
		if (q->flags & UBLK_F_USER_RECOVERY_REISSUE)
			ublk_hold_or_fail(q, req);
		else
			ublk_end_request(req, BLK_STS_IOERR);
		return;
	}
	if (unlikely(result < 0)) {
		ublk_end_request(req, errno_to_blk_status(result));
		return;
	}
	switch (req_op(req)) {
	case REQ_OP_READ:
	case REQ_OP_WRITE:
		ublk_end_part(q, req, result);
		break;
	case REQ_OP_ZONE_APPEND:
		/*
		 * The rest could not be appended at the position that follows.
		 */
		ublk_end_request(req, result < blk_rq_bytes(req) ?
				 BLK_STS_IOERR : BLK_STS_OK);
		break;
	default:
		ublk_end_request(req, BLK_STS_OK);
		break;
	}
}

/**
 * ublk_finish() - Finish a request that the server has completed or lost.
 * @q: the queue
 * @io: the slot
 * @req: the request of the slot
 * @result: bytes done, a negative errno, or UBLK_RES_*
 *
 * The request ends when the last reference to its data is dropped. Until then
 * its tag stays in use, so that the members of @io that belong to the request
 * stay valid even if the slot is armed again.
 *
 * Context: Any context.
 */
void ublk_finish(struct ublk_queue *q, struct ublk_io *io, struct request *req,
		 int result)
{
	if (!ublk_no_copy(q)) {
		ublk_end_rq(q, req, result);
		return;
	}
	io->result = result;
	ublk_io_put(io);
}

/**
 * ublk_io_get() - Get a reference to the request of a slot.
 * @io: the slot
 *
 * A reference keeps the request from ending. Only devices with UBLK_F_NO_COPY
 * have references. Any holder of the char device may call this.
 *
 * Context: Any context.
 *
 * Return: true if the server holds a request under this tag.
 */
bool ublk_io_get(struct ublk_io *io)
{
	if (!refcount_inc_not_zero(&io->ref))
		return false;
	if (atomic_read_acquire(&io->state) == UBLK_IO_SERVED)
		return true;
	ublk_io_put(io);
	return false;
}

/**
 * ublk_io_put() - Drop a reference to the request of a slot.
 * @io: the slot
 *
 * The last reference ends the request. Registered buffers may outlive the
 * server. The device is kept by ublk_release_work(), which waits for a grace
 * period after the last reference has been dropped.
 *
 * Context: Any context.
 */
void ublk_io_put(struct ublk_io *io)
{
	struct ublk_queue *q = ublk_io_queue(io);

	rcu_read_lock();
	if (refcount_dec_and_test(&io->ref)) {
		ublk_end_rq(q, io->req, io->result);
		if (unlikely(READ_ONCE(q->ub->canceling)))
			wake_up_all(&q->ub->wait);
	}
	rcu_read_unlock();
}
