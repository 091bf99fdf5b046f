// SPDX-License-Identifier: GPL-2.0
/*
 * UBLK_F_BATCH_IO: PREP_IO_CMDS and COMMIT_IO_CMDS, which operate on arrays of
 * tags.
 */
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "batch.h"

/* Size of the part of an array that a commit reads at a time. */
#define UBLK_BATCH_CHUNK_BYTES	512

#define UBLK_BATCH_F_ALL	(UBLK_BATCH_F_HAS_ZONE_LBA | \
				 UBLK_BATCH_F_HAS_BUF_ADDR | \
				 UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK)

/* A decoded element of an array. */
struct ublk_elem {
	u16			tag;
	u16			buf_index;
	int			result;
	u64			buf_addr;
	u64			zone_lba;
};

static unsigned int ublk_elem_bytes(const struct ublk_batch_io *args)
{
	unsigned int bytes = sizeof(struct ublk_elem_header);

	if (args->flags & UBLK_BATCH_F_HAS_BUF_ADDR)
		bytes += sizeof(u64);
	if (args->flags & UBLK_BATCH_F_HAS_ZONE_LBA)
		bytes += sizeof(u64);
	return bytes;
}

/* Checks the arguments that PREP_IO_CMDS and COMMIT_IO_CMDS have in common. */
static int ublk_batch_check(const struct ublk_queue *q,
			    const struct ublk_batch_io *args)
{
	if (args->flags & ~UBLK_BATCH_F_ALL)
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_BUF_ADDR) && ublk_no_copy(q))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_ZONE_LBA) &&
	    !(q->flags & UBLK_F_ZONED))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK) &&
	    !(q->flags & UBLK_F_AUTO_BUF_REG))
		return -EINVAL;
	if (args->elem_bytes != ublk_elem_bytes(args))
		return -EINVAL;
	if (args->nr_elem > q->depth)
		return -E2BIG;
	return 0;
}

static int ublk_parse_elem(const struct ublk_queue *q,
			   const struct ublk_batch_io *args, const void *p,
			   struct ublk_elem *elem)
{
	const struct ublk_elem_header *header = p;
	const u64 *extra = p + sizeof(*header);

	if (header->tag >= q->depth)
		return -EINVAL;
	elem->tag = array_index_nospec(header->tag, q->depth);
	elem->buf_index = header->buf_index;
	elem->result = header->result;
	elem->buf_addr = 0;
	elem->zone_lba = U64_MAX;
	if (args->flags & UBLK_BATCH_F_HAS_BUF_ADDR)
		elem->buf_addr = *extra++;
	if (args->flags & UBLK_BATCH_F_HAS_ZONE_LBA)
		elem->zone_lba = *extra;
	if (!ublk_no_copy(q) && !elem->buf_addr)
		return -EINVAL;
	return 0;
}

/* Sets the buffer for the next request of a tag. */
static void ublk_elem_set_buf(const struct ublk_queue *q,
			      const struct ublk_batch_io *args,
			      const struct ublk_elem *elem, struct ublk_io *io)
{
	io->buf_addr = elem->buf_addr;
	if (!(q->flags & UBLK_F_AUTO_BUF_REG))
		return;
	io->auto_reg.index = elem->buf_index;
	if (args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK)
		io->auto_reg.flags = UBLK_AUTO_BUF_REG_FALLBACK;
}

/*
 * PREP_IO_CMDS. Every slot is reserved before the first is armed, so that the
 * command applies to all tags or none.
 */
static int ublk_batch_prep(struct ublk_queue *q, const void __user *uelems,
			   const struct ublk_batch_io *args,
			   unsigned int issue_flags)
{
	struct ublk_elem elem;
	unsigned int i;
	void *elems;
	int ret;

	ret = ublk_batch_check(q, args);
	if (ret)
		return ret;
	if (!args->nr_elem)
		return 0;
	elems = vmemdup_user(uelems, args->nr_elem * args->elem_bytes);
	if (IS_ERR(elems))
		return PTR_ERR(elems);

	for (i = 0; i < args->nr_elem; i++) {
		ret = ublk_parse_elem(q, args, elems + i * args->elem_bytes,
				      &elem);
		if (!ret)
			ret = ublk_slot_reserve(q, &q->ios[elem.tag]);
		if (ret)
			break;
		ublk_elem_set_buf(q, args, &elem, &q->ios[elem.tag]);
	}
	if (ret) {
		while (i--) {
			ublk_parse_elem(q, args, elems + i * args->elem_bytes,
					&elem);
			ublk_slot_unreserve(&q->ios[elem.tag]);
		}
		goto out;
	}
	/*
	 * Requests may arrive from here on, even before the first fetch
	 * command.
	 */
	ublk_batch_set_fetcher(q);
	for (i = 0; i < args->nr_elem; i++) {
		ublk_parse_elem(q, args, elems + i * args->elem_bytes, &elem);
		ublk_slot_fetched(q, &q->ios[elem.tag], issue_flags);
	}
out:
	kvfree(elems);
	return ret;
}

static int ublk_commit_elem(struct ublk_queue *q, struct io_uring_cmd *cmd,
			    const struct ublk_batch_io *args, const void *p,
			    unsigned int issue_flags)
{
	struct ublk_elem elem;
	struct request *req;
	struct ublk_io *io;
	int ret;

	ret = ublk_parse_elem(q, args, p, &elem);
	if (ret)
		return ret;
	io = &q->ios[elem.tag];
	if (!ublk_io_transition(io, UBLK_IO_SERVED, UBLK_IO_BUSY))
		return -EBUSY;
	if (unlikely(!ublk_take_result(q, io, elem.buf_addr, elem.zone_lba,
				       &elem.result)))
		return -ENODEV;
	ublk_auto_unregister(io, cmd, issue_flags);
	ublk_elem_set_buf(q, args, &elem, io);
	req = io->req;
	ublk_slot_arm(q, io, issue_flags);
	ublk_race(UBLK_RACE_COMMIT);
	ublk_finish(q, io, req, elem.result);
	return 0;
}

/*
 * COMMIT_IO_CMDS. Returns the number of bytes of the array that were processed.
 */
static int ublk_batch_commit(struct ublk_queue *q, struct io_uring_cmd *cmd,
			     const void __user *uelems,
			     const struct ublk_batch_io *args,
			     unsigned int issue_flags)
{
	u64 chunk[UBLK_BATCH_CHUNK_BYTES / sizeof(u64)];
	unsigned int per_chunk, done = 0, n, i;
	int ret;

	ret = ublk_batch_check(q, args);
	if (ret)
		return ret;
	per_chunk = sizeof(chunk) / args->elem_bytes;
	while (done < args->nr_elem) {
		n = min(per_chunk, args->nr_elem - done);
		if (copy_from_user(chunk, uelems + done * args->elem_bytes,
				   n * args->elem_bytes)) {
			ret = -EFAULT;
			break;
		}
		for (i = 0; i < n && !ret; i++)
			ret = ublk_commit_elem(q, cmd, args,
					       (void *)chunk + i * args->elem_bytes,
					       issue_flags);
		if (ret) {
			done += i - 1;
			break;
		}
		done += n;
	}
	return done ? done * args->elem_bytes : ret;
}

/*
 * The result of a command on a single tag: -EINVAL if there is no such tag,
 * otherwise -EOPNOTSUPP.
 */
static int ublk_batch_reject(const struct ublk_device *ub,
			     struct io_uring_cmd *cmd)
{
	const struct ublksrv_io_cmd *src =
		ublk_sqe_cmd(cmd, struct ublksrv_io_cmd);

	if (READ_ONCE(src->q_id) >= ub->dev_info.nr_hw_queues ||
	    READ_ONCE(src->tag) >= ub->dev_info.queue_depth)
		return -EINVAL;
	return -EOPNOTSUPP;
}

/**
 * ublk_batch_uring_cmd() - Carry out an I/O command on a BATCH_IO device.
 * @ub: the device
 * @cmd: the command
 * @issue_flags: io_uring issue flags of the caller
 *
 * Context: Task context of the submitter.
 *
 * Return: the result of the command, or -EIOCBQUEUED if it is completed later.
 */
int ublk_batch_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
			 unsigned int issue_flags)
{
	const struct ublk_batch_io *src = ublk_sqe_cmd(cmd, struct ublk_batch_io);
	const struct ublk_batch_io args = {
		.q_id		= READ_ONCE(src->q_id),
		.flags		= READ_ONCE(src->flags),
		.nr_elem	= READ_ONCE(src->nr_elem),
		.elem_bytes	= READ_ONCE(src->elem_bytes),
	};
	const void __user *elems = u64_to_user_ptr(ublk_sqe_addr(cmd));
	struct ublk_queue *q;

	switch (cmd->cmd_op) {
	case UBLK_U_IO_REGISTER_IO_BUF:
	case UBLK_U_IO_UNREGISTER_IO_BUF:
		return ublk_io_uring_cmd(ub, cmd, issue_flags);
	case UBLK_U_IO_PREP_IO_CMDS:
	case UBLK_U_IO_COMMIT_IO_CMDS:
	case UBLK_U_IO_FETCH_IO_CMDS:
		break;
	default:
		return ublk_batch_reject(ub, cmd);
	}
	if (args.q_id >= ub->dev_info.nr_hw_queues)
		return -EINVAL;
	q = ub->queues[array_index_nospec(args.q_id, ub->dev_info.nr_hw_queues)];

	switch (cmd->cmd_op) {
	case UBLK_U_IO_PREP_IO_CMDS:
		return ublk_batch_prep(q, elems, &args, issue_flags);
	case UBLK_U_IO_COMMIT_IO_CMDS:
		return ublk_batch_commit(q, cmd, elems, &args, issue_flags);
	default:
		return ublk_batch_fetch(q, cmd, &args, issue_flags);
	}
}
