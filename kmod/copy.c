// SPDX-License-Identifier: GPL-2.0
/*
 * Copying between the data of requests and the memory of a server: by the
 * driver when a request is dispatched or committed, or when the server reads
 * and writes the char device (UBLK_F_USER_COPY).
 */
#include <linux/blk-integrity.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/nospec.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/sizes.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

#include "internal.h"

/* How often a page may be evicted between being faulted in and being copied. */
#define UBLK_COPY_TRIES	100
/* How much is faulted in at a time, unless pages are evicted. */
#define UBLK_COPY_WINDOW	SZ_64K

/* A copy between the pages of a request and an iterator. */
struct ublk_copy {
	struct iov_iter	*iter;
	size_t		skip;	/* bytes before the first one to copy */
	size_t		done;
	bool		to_server;
};

/*
 * Copies the wanted part of a page. Returns false if the copy is complete, or
 * cannot go on.
 */
static bool ublk_copy_page(struct ublk_copy *copy, const struct bio_vec *bv)
{
	size_t offset = bv->bv_offset + copy->skip;
	size_t len, n;

	if (copy->skip >= bv->bv_len) {
		copy->skip -= bv->bv_len;
		return true;
	}
	len = bv->bv_len - copy->skip;
	if (copy->to_server) {
		n = copy_page_to_iter(bv->bv_page, offset, len, copy->iter);
	} else {
		n = copy_page_from_iter(bv->bv_page, offset, len, copy->iter);
		flush_dcache_page(bv->bv_page);
	}
	copy->skip = 0;
	copy->done += n;
	return n == len && iov_iter_count(copy->iter);
}

/**
 * ublk_copy_data() - Copy between the data of a request and an iterator.
 * @req: the request
 * @offset: offset in the data of the request
 * @iter: the memory of the server
 * @to_server: direction
 *
 * Copies as much as both have, or less if a page fault fails.
 *
 * Context: Task context; may sleep in page faults unless they are disabled.
 *
 * Return: number of bytes copied.
 */
size_t ublk_copy_data(struct request *req, size_t offset, struct iov_iter *iter,
		      bool to_server)
{
	struct ublk_copy copy = {
		.iter = iter,
		.skip = offset,
		.to_server = to_server,
	};
	struct req_iterator pos;
	struct bio_vec bv;

	rq_for_each_segment(bv, req, pos)
		if (!ublk_copy_page(&copy, &bv))
			return copy.done;
	return copy.done;
}

#ifdef UBLK_CAN_INTEGRITY
/**
 * ublk_integrity_bytes() - Size of the integrity metadata of a request.
 * @req: the request
 *
 * Context: Any context.
 *
 * Return: number of bytes, 0 if the request has no metadata.
 */
size_t ublk_integrity_bytes(const struct request *req)
{
	if (!(req->cmd_flags & REQ_INTEGRITY))
		return 0;
	return bio_integrity_bytes(&req->q->limits.integrity,
				   blk_rq_sectors(req));
}

/**
 * ublk_copy_integrity() - Copy between the integrity metadata of a request and
 *   an iterator.
 * @req: the request
 * @offset: offset in the metadata of the request
 * @iter: the memory of the server
 * @to_server: direction
 *
 * The counterpart of ublk_copy_data() for metadata.
 *
 * Context: Task context; may sleep in page faults unless they are disabled.
 *
 * Return: number of bytes copied.
 */
size_t ublk_copy_integrity(struct request *req, size_t offset,
			   struct iov_iter *iter, bool to_server)
{
	struct ublk_copy copy = {
		.iter = iter,
		.skip = offset,
		.to_server = to_server,
	};
	struct bio *bio;

	__rq_for_each_bio(bio, req) {
		struct bio_integrity_payload *bip = bio_integrity(bio);
		struct bvec_iter pos;
		struct bio_vec bv;

		if (!bip)
			continue;
		bip_for_each_vec(bv, bip, pos)
			if (!ublk_copy_page(&copy, &bv))
				return copy.done;
	}
	return copy.done;
}
#else
size_t ublk_integrity_bytes(const struct request *req)
{
	return 0;
}

size_t ublk_copy_integrity(struct request *req, size_t offset,
			   struct iov_iter *iter, bool to_server)
{
	return 0;
}
#endif

/*
 * Makes an iterator for a buffer in current->mm. import_ubuf() would truncate
 * it to MAX_RW_COUNT, which a request may exceed.
 */
static bool ublk_server_buffer(u64 addr, size_t bytes, unsigned int direction,
			       struct iov_iter *iter)
{
	void __user *buf = u64_to_user_ptr(addr);

	if (!access_ok(buf, bytes))
		return false;
	iov_iter_ubuf(iter, direction, buf, bytes);
	return true;
}

/* Copies as much as can be copied without a page fault. */
static size_t ublk_copy_resident(struct request *req, size_t done,
				 struct iov_iter *iter, bool to_server)
{
	size_t n;

	pagefault_disable();
	n = ublk_copy_data(req, done, iter, to_server);
	pagefault_enable();
	return n;
}

/* Progress of a copy that alternates with faulting pages in. */
struct ublk_copy_progress {
	unsigned int	tries;		/* left without progress */
	size_t		window;		/* bytes to fault in next */
};

#define UBLK_COPY_PROGRESS_INIT \
	{ .tries = UBLK_COPY_TRIES, .window = UBLK_COPY_WINDOW }

/*
 * Updates @progress after @n bytes were copied. Returns false if the copy
 * should be given up.
 */
static bool ublk_copy_continues(struct ublk_copy_progress *progress, size_t n)
{
	if (n) {
		*progress = (struct ublk_copy_progress)UBLK_COPY_PROGRESS_INIT;
		return true;
	}
	/* If memory is short, the end of a window may evict its beginning. */
	if (progress->tries < UBLK_COPY_TRIES)
		progress->window = PAGE_SIZE;
	return progress->tries--;
}

/* Faults some of the next @bytes in. Returns false if that fails. */
static bool ublk_fault_in(struct iov_iter *iter, size_t bytes, bool to_server)
{
	size_t missing;

	if (fatal_signal_pending(current))
		return false;
	if (to_server)
		missing = fault_in_iov_iter_writeable(iter, bytes);
	else
		missing = fault_in_iov_iter_readable(iter, bytes);
	return missing < bytes;
}

/*
 * Copies the first @bytes between the request of a slot, which is BUSY, and the
 * server, whose task this is. Returns the number of bytes that could be copied,
 * or UBLK_TAKEN_BACK.
 *
 * A page fault may take an unlimited time, for example in a file of a FUSE file
 * system whose daemon hangs. While it is handled, the slot is in state
 * @fault_state, so that a time-out can take the request back. Nothing else may
 * leave that state.
 */
static int ublk_copy_for_slot(struct ublk_io *io, u64 addr, unsigned int bytes,
			      bool to_server, enum ublk_io_state fault_state)
{
	struct ublk_copy_progress progress = UBLK_COPY_PROGRESS_INIT;
	struct request *req = io->req;
	unsigned int done = 0;

	for (;;) {
		struct iov_iter iter;
		bool resident;
		size_t n;

		if (!ublk_server_buffer(addr + done, bytes - done,
					to_server ? ITER_DEST : ITER_SOURCE,
					&iter))
			return done;
		n = ublk_copy_resident(req, done, &iter, to_server);
		done += n;
		if (likely(done == bytes) || !ublk_copy_continues(&progress, n))
			return done;

		atomic_set_release(&io->state, fault_state);
		resident = ublk_fault_in(&iter, min_t(size_t, bytes - done,
						      progress.window),
					 to_server);
		if (!ublk_io_transition(io, fault_state, UBLK_IO_BUSY))
			return UBLK_TAKEN_BACK;
		if (!resident)
			return done;
	}
}

/**
 * ublk_copy_to_server() - Copy all data of a request to the server.
 * @io: the slot, which is BUSY
 * @addr: the buffer of the server
 * @fault_state: state of the slot while a page fault is handled
 *
 * Context: Task context of the server; may sleep.
 *
 * Return: 0, -EFAULT, or UBLK_TAKEN_BACK.
 */
int ublk_copy_to_server(struct ublk_io *io, u64 addr, enum ublk_io_state fault_state)
{
	unsigned int bytes = blk_rq_bytes(io->req);
	int done = ublk_copy_for_slot(io, addr, bytes, true, fault_state);

	if (done == UBLK_TAKEN_BACK)
		return done;
	return done == bytes ? 0 : -EFAULT;
}

/**
 * ublk_copy_from_server() - Copy data of a request from the server.
 * @io: the slot, which is BUSY; in COMMIT while a page fault is handled
 * @addr: the buffer of the server
 * @bytes: number of bytes, limited to the length of the request
 *
 * Context: Task context of the server; may sleep.
 *
 * Return: number of bytes copied, or UBLK_TAKEN_BACK.
 */
int ublk_copy_from_server(struct ublk_io *io, u64 addr, unsigned int bytes)
{
	bytes = min(bytes, blk_rq_bytes(io->req));
	return ublk_copy_for_slot(io, addr, bytes, false, UBLK_IO_COMMIT);
}

/* The slot that a position in the char device refers to, or NULL. */
static struct ublk_io *ublk_pos_to_io(struct ublk_device *ub, u64 pos)
{
	struct ublk_queue *q;
	unsigned int q_id, tag;

	if (pos < UBLKSRV_IO_BUF_OFFSET)
		return NULL;
	pos -= UBLKSRV_IO_BUF_OFFSET;
	if (pos >= UBLKSRV_IO_BUF_TOTAL_SIZE)
		return NULL;
	q_id = (pos >> UBLK_QID_OFF) & UBLK_QID_BITS_MASK;
	tag = (pos >> UBLK_TAG_OFF) & UBLK_TAG_BITS_MASK;
	if (q_id >= ub->dev_info.nr_hw_queues)
		return NULL;
	q = ub->queues[array_index_nospec(q_id, ub->dev_info.nr_hw_queues)];
	if (tag >= q->depth)
		return NULL;
	return &q->ios[array_index_nospec(tag, q->depth)];
}

/*
 * Copies from or to a request that the caller has a reference to. @left is set
 * to the number of bytes of the request after those that were copied.
 */
static ssize_t ublk_user_copy_rq(struct request *req, size_t offset,
				 struct iov_iter *iter, bool integrity,
				 bool to_server, size_t *left)
{
	size_t bytes, done;

	if (!ublk_rq_has_data(req))
		return -EINVAL;
	bytes = integrity ? ublk_integrity_bytes(req) : blk_rq_bytes(req);
	if (!bytes || offset > bytes)
		return -EINVAL;
	if (to_server == ublk_rq_from_server(req))
		return -EACCES;
	if (integrity)
		done = ublk_copy_integrity(req, offset, iter, to_server);
	else
		done = ublk_copy_data(req, offset, iter, to_server);
	*left = bytes - offset - done;
	return done;
}

/*
 * The error if the server holds no such request. A device that is not LIVE yet
 * may have requests, for zone reports.
 */
static int ublk_no_request_errno(const struct ublk_device *ub)
{
	return READ_ONCE(ub->dev_info.state) == UBLK_S_DEV_DEAD ? -EACCES : -EINVAL;
}

/*
 * Like ublk_user_copy_rq(), without page faults, and only if there still is a
 * request.
 */
static ssize_t ublk_user_copy_resident(struct ublk_io *io, size_t offset,
				       struct iov_iter *iter, bool integrity,
				       bool to_server, size_t *left)
{
	ssize_t ret;

	if (!ublk_io_get(io))
		return ublk_no_request_errno(ublk_io_queue(io)->ub);
	pagefault_disable();
	ret = ublk_user_copy_rq(io->req, offset, iter, integrity, to_server,
				left);
	pagefault_enable();
	ublk_io_put(io);
	return ret;
}

/**
 * ublk_user_copy() - Read or write the data of a request through the char
 *   device.
 * @iocb: its position selects the request and an offset, see
 *	UBLKSRV_IO_BUF_OFFSET
 * @iter: the memory of the server
 * @to_server: true for read(), false for write()
 *
 * Context: Task context of any process with the char device open; may sleep.
 *
 * Return: number of bytes copied, or a negative errno.
 */
ssize_t ublk_user_copy(struct kiocb *iocb, struct iov_iter *iter,
		       bool to_server)
{
	struct ublk_device *ub = iocb->ki_filp->private_data;
	bool integrity = iocb->ki_pos & UBLKSRV_IO_INTEGRITY_FLAG;
	u64 pos = iocb->ki_pos & ~UBLKSRV_IO_INTEGRITY_FLAG;
	u64 flags = ub->dev_info.flags;
	struct ublk_copy_progress progress = UBLK_COPY_PROGRESS_INIT;
	struct ublk_io *io;
	size_t offset, left, done = 0;
	ssize_t ret;

	if (!user_backed_iter(iter))
		return -EACCES;
	if (!(flags & UBLK_F_USER_COPY))
		return -EACCES;
	if (integrity && !(flags & UBLK_F_INTEGRITY))
		return -EINVAL;

	io = ublk_pos_to_io(ub, pos);
	if (!io)
		return ublk_no_request_errno(ub);
	offset = (pos - UBLKSRV_IO_BUF_OFFSET) & UBLK_IO_BUF_BITS_MASK;
	/* The request must be able to end while a page fault is handled. */
	for (;;) {
		ret = ublk_user_copy_resident(io, offset + done, iter, integrity,
					      to_server, &left);
		if (ret < 0)
			break;
		done += ret;
		left = min(left, iov_iter_count(iter));
		if (!left || !ublk_copy_continues(&progress, ret) ||
		    !ublk_fault_in(iter, min(left, progress.window), to_server)) {
			ret = left ? -EFAULT : 0;
			break;
		}
	}
	iocb->ki_pos += done;
	return done ?: ret;
}
