// SPDX-License-Identifier: GPL-2.0
/*
 * Registered buffers (UBLK_F_SUPPORT_ZERO_COPY, UBLK_F_AUTO_BUF_REG): the pages
 * of a request are in the table of fixed buffers of a server's ring. Each
 * registration holds a reference to the request.
 */
#include "internal.h"

#ifdef UBLK_CAN_REGISTER_BUFFERS

static void ublk_buf_released(void *priv)
{
	ublk_io_put(ublk_rq_io(priv));
}

/**
 * ublk_register_buf() - Register the pages of a request (REGISTER_IO_BUF).
 * @q: the queue
 * @io: the slot
 * @cmd: the command, from any thread and any ring
 * @index: index in the buffer table of the ring
 * @issue_flags: io_uring issue flags of the caller
 *
 * Context: Task context of the submitter.
 *
 * Return: 0, or a negative errno.
 */
int ublk_register_buf(struct ublk_queue *q, struct ublk_io *io,
		      struct io_uring_cmd *cmd, u64 index,
		      unsigned int issue_flags)
{
	int ret;

	if (!(q->flags & UBLK_F_SUPPORT_ZERO_COPY))
		return -EINVAL;
	if (index > U32_MAX)
		return -EINVAL;
	if (!ublk_io_get(io))
		return READ_ONCE(io->daemon) == current ? -EBUSY : -EINVAL;
	if (ublk_rq_has_data(io->req))
		ret = io_buffer_register_request(cmd, io->req, ublk_buf_released,
						 index, issue_flags);
	else
		ret = -EINVAL;
	/* On success the registered buffer owns the reference. */
	if (ret)
		ublk_io_put(io);
	return ret;
}

/**
 * ublk_unregister_buf() - Unregister a buffer (UNREGISTER_IO_BUF).
 * @ub: the device
 * @cmd: the command
 * @index: index in the buffer table of the ring
 * @issue_flags: io_uring issue flags of the caller
 *
 * Context: Task context of the submitter.
 *
 * Return: 0, or a negative errno.
 */
int ublk_unregister_buf(struct ublk_device *ub, struct io_uring_cmd *cmd,
			u64 index, unsigned int issue_flags)
{
	if (!(ub->dev_info.flags & UBLK_F_SUPPORT_ZERO_COPY))
		return -EINVAL;
	if (index > U32_MAX)
		return -EINVAL;
	return io_buffer_unregister(cmd, index, issue_flags);
}

/**
 * ublk_parse_auto_reg() - Decode and check the arguments of automatic
 *   registration.
 * @word: sqe->addr of a command
 * @reg: set to the arguments
 *
 * Context: Any context.
 *
 * Return: 0, or -EINVAL.
 */
int ublk_parse_auto_reg(u64 word, struct ublk_auto_buf_reg *reg)
{
	*reg = ublk_sqe_addr_to_auto_buf_reg(word);
	if (reg->reserved0 || reg->reserved1)
		return -EINVAL;
	if (reg->flags & ~UBLK_AUTO_BUF_REG_F_MASK)
		return -EINVAL;
	return 0;
}

/**
 * ublk_auto_register() - Register the pages of a request before its delivery.
 * @q: the queue
 * @io: the slot, which is BUSY
 * @cmd: the command that delivers the request; its ring receives the buffer
 * @issue_flags: io_uring issue flags of the caller
 *
 * With UBLK_AUTO_BUF_REG_FALLBACK, a failure is reported in the descriptor
 * instead.
 *
 * Context: Task work of the thread that owns the slot.
 *
 * Return: UBLK_IO_RES_OK, or a negative errno.
 */
int ublk_auto_register(struct ublk_queue *q, struct ublk_io *io,
		       struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	int ret;

	refcount_inc(&io->ref);
	ret = io_buffer_register_request(cmd, io->req, ublk_buf_released,
					 io->auto_reg.index, issue_flags);
	if (likely(!ret)) {
		io->reg_ring = io_uring_cmd_ctx_handle(cmd);
		io->reg_index = io->auto_reg.index;
		/* May be left over from a delivery that failed. */
		ublk_desc(q, io->tag)->op_flags &= ~UBLK_IO_F_NEED_REG_BUF;
		return UBLK_IO_RES_OK;
	}
	/* Not the last reference, as the delivery holds one. */
	ublk_io_put(io);
	if (!(io->auto_reg.flags & UBLK_AUTO_BUF_REG_FALLBACK))
		return ret;
	ublk_desc(q, io->tag)->op_flags |= UBLK_IO_F_NEED_REG_BUF;
	return UBLK_IO_RES_OK;
}

/**
 * ublk_auto_unregister() - Unregister the buffer that was registered
 *   automatically.
 * @io: the slot of the request that is committed
 * @cmd: the commit
 * @issue_flags: io_uring issue flags of the caller
 *
 * Only a commit through the ring that has the buffer unregisters it. Otherwise
 * the server has to do so.
 *
 * Context: Task context of the submitter.
 */
void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd,
			  unsigned int issue_flags)
{
	if (!io->reg_ring)
		return;
	if (io->reg_ring == io_uring_cmd_ctx_handle(cmd))
		io_buffer_unregister(cmd, io->reg_index, issue_flags);
	io->reg_ring = NULL;
}

#else /* !UBLK_CAN_REGISTER_BUFFERS: no device has flags that need these */

int ublk_register_buf(struct ublk_queue *q, struct ublk_io *io,
		      struct io_uring_cmd *cmd, u64 index,
		      unsigned int issue_flags)
{
	return -EINVAL;
}

int ublk_unregister_buf(struct ublk_device *ub, struct io_uring_cmd *cmd,
			u64 index, unsigned int issue_flags)
{
	return -EINVAL;
}

int ublk_parse_auto_reg(u64 word, struct ublk_auto_buf_reg *reg)
{
	return -EINVAL;
}

int ublk_auto_register(struct ublk_queue *q, struct ublk_io *io,
		       struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	return -EOPNOTSUPP;
}

void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd,
			  unsigned int issue_flags)
{
}

#endif
