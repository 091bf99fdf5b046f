// SPDX-License-Identifier: GPL-2.0
/*
 * I/O commands on single tags: FETCH_REQ, COMMIT_AND_FETCH_REQ, NEED_GET_DATA,
 * REGISTER_IO_BUF, UNREGISTER_IO_BUF.
 */
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/nospec.h>
#include <linux/sched/task.h>

#include "internal.h"

/*
 * Arguments of a command. They are read once, as the memory may be shared with
 * user space.
 */
struct ublk_io_args {
	u16 q_id;
	u16 tag;
	int result;
	u64 addr;
	u64 auto_reg;
};

static void ublk_read_args(struct io_uring_cmd *cmd, struct ublk_io_args *args)
{
	const struct ublksrv_io_cmd *src =
		ublk_sqe_cmd(cmd, struct ublksrv_io_cmd);

	args->q_id = READ_ONCE(src->q_id);
	args->tag = READ_ONCE(src->tag);
	args->result = READ_ONCE(src->result);
	args->addr = READ_ONCE(src->addr);
	args->auto_reg = ublk_sqe_addr(cmd);
}

/*
 * Checks the buffer that FETCH or COMMIT names, which depends on the mode of
 * the device. With @unneeded the command may omit it in copy mode.
 */
static int ublk_check_buf(const struct ublk_queue *q,
			  const struct ublk_io_args *args, bool unneeded)
{
	struct ublk_auto_buf_reg reg;

	if (q->flags & UBLK_F_AUTO_BUF_REG) {
		int ret = ublk_parse_auto_reg(args->auto_reg, &reg);

		if (ret)
			return ret;
	}
	if (ublk_no_copy(q))
		return args->addr ? -EINVAL : 0;
	return args->addr || unneeded ? 0 : -EINVAL;
}

/* Parks a command in its slot, which is BUSY. */
static void ublk_park(struct ublk_queue *q, struct ublk_io *io,
		      struct io_uring_cmd *cmd, const struct ublk_io_args *args,
		      unsigned int issue_flags)
{
	if (q->flags & UBLK_F_AUTO_BUF_REG)
		ublk_parse_auto_reg(args->auto_reg, &io->auto_reg);
	else
		io->buf_addr = ublk_no_copy(q) ? 0 : args->addr;
	io->cmd = cmd;
	io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->io = io;
	io_uring_cmd_mark_cancelable(cmd, issue_flags);
}

static int ublk_fetch(struct ublk_queue *q, struct ublk_io *io,
		      struct io_uring_cmd *cmd, const struct ublk_io_args *args,
		      unsigned int issue_flags)
{
	int ret;

	ret = ublk_check_buf(q, args, q->flags & UBLK_F_NEED_GET_DATA);
	if (ret)
		return ret;
	ret = ublk_slot_reserve(q, io);
	if (ret)
		return ret;
	WRITE_ONCE(io->daemon, get_task_struct(current));
	ublk_park(q, io, cmd, args, issue_flags);
	ublk_slot_fetched(q, io, issue_flags);
	return -EIOCBQUEUED;
}

/* Whether a command is pending on a slot, or is being carried out. */
static bool ublk_slot_has_cmd(const struct ublk_io *io)
{
	switch (atomic_read(&io->state)) {
	case UBLK_IO_BUSY:
	case UBLK_IO_ARMED:
	case UBLK_IO_DISPATCH:
	case UBLK_IO_COMMIT:
		return true;
	default:
		return false;
	}
}

/**
 * ublk_take_result() - Process the result of a commit.
 * @q: the queue
 * @io: the slot, which is BUSY
 * @addr: in copy mode, the buffer with the data of a read
 * @lba: the sector at which a zone append was written
 * @result: the result that the server has given; replaced by the result that
 *	the request is to end with
 *
 * In copy mode this copies the data of a read from the server.
 *
 * Context: Task context of the server. May sleep in page faults.
 *
 * Return: false if the request was taken back meanwhile.
 */
bool ublk_take_result(struct ublk_queue *q, struct ublk_io *io, u64 addr,
		      u64 lba, int *result)
{
	struct request *req = io->req;
	int copied;

	if (unlikely(*result < -MAX_ERRNO)) {
		*result = -EIO;
		return true;
	}
	if (req_op(req) == REQ_OP_ZONE_APPEND && *result >= 0)
		req->__sector = lba;
	if (*result <= 0 || ublk_no_copy(q) || !ublk_rq_from_server(req) ||
	    ublk_desc(q, io->tag)->op_flags & UBLK_IO_F_SHMEM_ZC)
		return true;

	copied = ublk_copy_from_server(io, addr, *result);
	if (unlikely(copied == UBLK_TAKEN_BACK))
		return false;
	/* Page faults of a server that is being killed may fail. */
	if (unlikely(copied < *result && copied < blk_rq_bytes(req)) &&
	    ublk_server_dying())
		*result = UBLK_RES_ABORTED;
	else
		*result = copied;
	return true;
}

static int ublk_commit(struct ublk_queue *q, struct ublk_io *io,
		       struct io_uring_cmd *cmd, struct ublk_io_args *args,
		       unsigned int issue_flags)
{
	int state = UBLK_IO_SERVED;
	struct request *req;
	bool unneeded;
	int result = args->result;
	u64 lba = 0;
	int ret;

	/* Until here a time-out may take the request back. */
	if (!atomic_try_cmpxchg(&io->state, &state, UBLK_IO_BUSY))
		return state >= UBLK_IO_REVOKED ? -ENODEV : -EINVAL;
	req = io->req;

	/*
	 * The sector takes the place of the buffer address, which zoned devices
	 * do not use.
	 */
	if (req_op(req) == REQ_OP_ZONE_APPEND)
		swap(lba, args->addr);
	unneeded = (q->flags & UBLK_F_NEED_GET_DATA) &&
		   req_op(req) != REQ_OP_READ;
	ret = ublk_check_buf(q, args, unneeded);
	if (ret) {
		atomic_set_release(&io->state, UBLK_IO_SERVED);
		return ret;
	}

	if (unlikely(!ublk_take_result(q, io, args->addr, lba, &result)))
		return -ENODEV;
	ublk_auto_unregister(io, cmd, issue_flags);
	ublk_park(q, io, cmd, args, issue_flags);
	/*
	 * The tag belongs to the request until that has ended: no other request
	 * can claim the slot.
	 */
	ublk_slot_arm(q, io, issue_flags);
	ublk_race(UBLK_RACE_COMMIT);
	ublk_finish(q, io, req, result);
	return -EIOCBQUEUED;
}

/* NEED_GET_DATA: the server names the buffer for the data of a write. */
static int ublk_get_data(struct ublk_queue *q, struct ublk_io *io,
			 struct io_uring_cmd *cmd,
			 const struct ublk_io_args *args,
			 unsigned int issue_flags)
{
	int ret;

	if (!args->addr ||
	    !ublk_io_transition(io, UBLK_IO_WAIT_BUF, UBLK_IO_BUSY))
		return -EINVAL;
	io->buf_addr = args->addr;
	ublk_desc(q, io->tag)->addr = args->addr;
	ret = ublk_copy_to_server(io, args->addr, UBLK_IO_WAIT_BUF);
	if (likely(!ret)) {
		atomic_set_release(&io->state, UBLK_IO_SERVED);
		return UBLK_IO_RES_OK;
	}
	if (ret == UBLK_TAKEN_BACK)
		return -ENODEV;
	/* The request ends, and the command waits for the next request. */
	ublk_park(q, io, cmd, args, issue_flags);
	ublk_fail_delivery(q, io, issue_flags);
	return -EIOCBQUEUED;
}

/**
 * ublk_io_uring_cmd() - Carry out an I/O command on a single tag.
 * @ub: the device
 * @cmd: the command
 * @issue_flags: io_uring issue flags of the caller
 *
 * Context: Task context of the submitter.
 *
 * Return: the result of the command, or -EIOCBQUEUED if it is completed later.
 */
int ublk_io_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
		      unsigned int issue_flags)
{
	unsigned int nr = _IOC_NR(cmd->cmd_op);
	unsigned int type = _IOC_TYPE(cmd->cmd_op);
	struct ublk_io_args args;
	struct ublk_queue *q;
	struct ublk_io *io;
	bool owner;

	/* Commands in the oldest form are bare numbers, with type 0. */
	if (type != 'u' && type != 0)
		return -EOPNOTSUPP;

	ublk_read_args(cmd, &args);
	/* This command names no tag: the buffer may be that of any request. */
	if (nr == _IOC_NR(UBLK_U_IO_UNREGISTER_IO_BUF))
		return ublk_unregister_buf(ub, cmd, args.addr, issue_flags);

	if (args.q_id >= ub->dev_info.nr_hw_queues)
		return -EINVAL;
	q = ub->queues[array_index_nospec(args.q_id, ub->dev_info.nr_hw_queues)];
	if (args.tag >= q->depth)
		return -EINVAL;
	io = &q->ios[array_index_nospec(args.tag, q->depth)];

	if (nr == _IOC_NR(UBLK_U_IO_FETCH_REQ))
		return ublk_fetch(q, io, cmd, &args, issue_flags);

	/* All other commands are for a request that the server holds. */
	owner = READ_ONCE(io->daemon) == current;
	if (owner && ublk_slot_has_cmd(io))
		return -EBUSY;
	if (nr == _IOC_NR(UBLK_U_IO_REGISTER_IO_BUF))
		return ublk_register_buf(q, io, cmd, args.addr, issue_flags);
	if (!owner)
		return -EINVAL;
	switch (nr) {
	case _IOC_NR(UBLK_U_IO_COMMIT_AND_FETCH_REQ):
		return ublk_commit(q, io, cmd, &args, issue_flags);
	case _IOC_NR(UBLK_U_IO_NEED_GET_DATA):
		return ublk_get_data(q, io, cmd, &args, issue_flags);
	default:
		return -EINVAL;
	}
}

static int ublk_dispatch_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_device *ub = cmd->file->private_data;

	if (ub->dev_info.flags & UBLK_F_BATCH_IO)
		return ublk_batch_uring_cmd(ub, cmd, issue_flags);
	return ublk_io_uring_cmd(ub, cmd, issue_flags);
}

static void ublk_reissue_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	unsigned int issue_flags = IO_URING_CMD_TASK_WORK_ISSUE_FLAGS;
	int ret = -ECANCELED;

	if (!tw.cancel)
		ret = ublk_dispatch_cmd(cmd, issue_flags);
	if (ret != -EIOCBQUEUED)
		io_uring_cmd_done(cmd, ret, issue_flags);
}

/*
 * The ring of the command is torn down, or its thread exits. The rest of the
 * server is of no use without it, so the device accepts no requests until the
 * char device has been closed.
 */
static void ublk_cancel_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_device *ub = cmd->file->private_data;
	struct ublk_cmd_pdu *pdu = io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu);

	ublk_mark_leaving(ub);
	if (ub->dev_info.flags & UBLK_F_BATCH_IO)
		ublk_batch_cancel_fetch(pdu->fetch, issue_flags);
	else
		ublk_slot_cancel(pdu->io, issue_flags);
}

/**
 * ublk_ch_uring_cmd() - Handle an io_uring command on the char device.
 * @cmd: the command
 * @issue_flags: io_uring issue flags
 *
 * Context: Task context of the submitter, or an io_uring worker.
 *
 * Return: the result of the command, or -EIOCBQUEUED if it is completed later.
 */
int ublk_ch_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	if (unlikely(issue_flags & IO_URING_F_CANCEL)) {
		ublk_cancel_cmd(cmd, issue_flags);
		return 0;
	}
	/*
	 * An io_uring worker cannot own a tag. Run the command in the submitter
	 * instead.
	 */
	if (unlikely(issue_flags & IO_URING_F_UNLOCKED)) {
		io_uring_cmd_complete_in_task(cmd, ublk_reissue_tw);
		return -EIOCBQUEUED;
	}
	return ublk_dispatch_cmd(cmd, issue_flags);
}
