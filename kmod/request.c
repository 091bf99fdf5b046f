// SPDX-License-Identifier: GPL-2.0
/*
 * What a request looks like to the server, and how it ends.
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

/* Describes a request whose slot is not the server's yet. */
blk_status_t ublk_fill_desc(struct ublk_queue *q, struct request *req)
{
	struct ublksrv_io_desc *desc = ublk_desc(q, req->tag);
	int op = ublk_desc_op(req);
	u64 addr;

	if (op < 0)
		return BLK_STS_NOTSUPP;
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
 * Ends the first @bytes of a request. True if there are more.
 *
 * The completion of a client's I/O may drop the last reference to its file. In
 * a task, fput() puts the file's release off until that task returns to user
 * space. That task would be the server, and closing a disk may wait for the
 * server: for dirty pages, or for a holder of the disk's open_mutex that does
 * I/O. With bottom halves off, as in an interrupt, fput() leaves the release to
 * a kernel worker.
 *
 * That is one worker for the whole system, which a user's server must not hold
 * up. One that waits for itself is killed when its requests time out.
 */
static bool ublk_end_bytes(struct request *req, blk_status_t status,
			   unsigned int bytes)
{
	const struct ublk_queue *q = req->mq_hctx->driver_data;
	bool in_worker = !(q->flags & UBLK_F_UNPRIVILEGED_DEV);
	struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);
	bool more;

	if (in_worker)
		local_bh_disable();
	more = blk_update_request(req, status, bytes);
	pdu->partial = more;
	if (!more)
		__blk_mq_end_request(req, status);
	if (in_worker)
		local_bh_enable();
	return more;
}

/* Ends all of a request. No other function of the driver may do so. */
void ublk_end_request(struct request *req, blk_status_t status)
{
	WARN_ON_ONCE(ublk_end_bytes(req, status, blk_rq_bytes(req)));
}

/*
 * Whether a user's server answers a request in parts, each of them in time, for
 * longer than ublk_timeout() gives it for the whole.
 */
static bool ublk_request_expired(const struct ublk_queue *q,
				 struct request *req)
{
	const struct ublk_rq *pdu = blk_mq_rq_to_pdu(req);

	return q->flags & UBLK_F_UNPRIVILEGED_DEV &&
	       time_after(jiffies, pdu->first_dispatch + req->q->rq_timeout);
}

/*
 * Part of a read or write was done: ends that, and gives the rest to the
 * server as a new request. Only whole logical blocks count.
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
		/* The rest cannot be appended elsewhere. */
		ublk_end_request(req, result < blk_rq_bytes(req) ?
				 BLK_STS_IOERR : BLK_STS_OK);
		break;
	default:
		ublk_end_request(req, BLK_STS_OK);
		break;
	}
}

/*
 * The server is done with a request, or gone. It ends when nothing refers to
 * its data any more; until then its tag stays taken, so that @io's members that
 * belong to the request stay as they are even if the slot is armed again.
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

/*
 * Keeps the request of a slot from ending. False if the server does not hold
 * one. Anybody who holds the char device may call this.
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

/*
 * Buffers in a ring's table may outlive the server: the device is kept by
 * ublk_release_work(), which waits for a grace period after the last reference
 * is gone.
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
