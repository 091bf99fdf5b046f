// SPDX-License-Identifier: GPL-2.0
/*
 * Zero copy: the pages of a request stand in the table of fixed buffers of a
 * server's ring. Each registration holds a reference to the request.
 */
#include "internal.h"

#ifdef UBLK_CAN_REGISTER_BUFFERS

static void ublk_buf_released(void *priv)
{
	ublk_io_put(ublk_rq_io(priv));
}

/* REGISTER_IO_BUF, from any thread and with any ring. */
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
	/* Otherwise the reference is the buffer's. */
	if (ret)
		ublk_io_put(io);
	return ret;
}

int ublk_unregister_buf(struct ublk_device *ub, struct io_uring_cmd *cmd,
			u64 index, unsigned int issue_flags)
{
	if (!(ub->dev_info.flags & UBLK_F_SUPPORT_ZERO_COPY))
		return -EINVAL;
	if (index > U32_MAX)
		return -EINVAL;
	return io_buffer_unregister(cmd, index, issue_flags);
}

int ublk_parse_auto_reg(u64 word, struct ublk_auto_buf_reg *reg)
{
	*reg = ublk_sqe_addr_to_auto_buf_reg(word);
	if (reg->reserved0 || reg->reserved1)
		return -EINVAL;
	if (reg->flags & ~UBLK_AUTO_BUF_REG_F_MASK)
		return -EINVAL;
	return 0;
}

/* Registers a request on its way to the server, in the ring of @cmd. */
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
		/* A delivery that failed may have left it. */
		ublk_desc(q, io->tag)->op_flags &= ~UBLK_IO_F_NEED_REG_BUF;
		return UBLK_IO_RES_OK;
	}
	/* Not the last one: the delivery holds the first. */
	ublk_io_put(io);
	if (!(io->auto_reg.flags & UBLK_AUTO_BUF_REG_FALLBACK))
		return ret;
	ublk_desc(q, io->tag)->op_flags |= UBLK_IO_F_NEED_REG_BUF;
	return UBLK_IO_RES_OK;
}

/*
 * A commit takes back what was registered automatically, if it comes through
 * the ring that has it. Otherwise that is left to the server.
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

#else /* !UBLK_CAN_REGISTER_BUFFERS: no device has the flags that lead here */

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
