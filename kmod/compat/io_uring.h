/* SPDX-License-Identifier: GPL-2.0 */
/*
 * io_uring commands, as drivers see them.
 */
#ifndef UBLK_COMPAT_IO_URING_H
#define UBLK_COMPAT_IO_URING_H

#ifndef UBLK_HAVE_REGISTER_REQUEST
#include <linux/io_uring/cmd.h>
#endif

/* Until about 6.7 a driver gets the payload of a command, but not its SQE. */
#ifndef UBLK_HAVE_SQE
#define UBLK_COMPAT_NO_SQE
#endif

/*
 * The payload of a command. These are the only names of compat/ that the driver
 * uses, as a macro cannot emulate an access to cmd->sqe.
 */
#ifdef UBLK_HAVE_SQE_CMD_TYPE
#define ublk_sqe_cmd(cmd, type)		io_uring_sqe_cmd((cmd)->sqe, type)
#define ublk_sqe128_cmd(cmd, type)	io_uring_sqe128_cmd((cmd)->sqe, type)
#else
static inline const void *ublk_compat_payload(const struct io_uring_cmd *cmd)
{
#ifdef UBLK_HAVE_SQE
	/* For the compiler, the array in an SQE is the whole payload. */
	return (const void *)cmd->sqe + offsetof(struct io_uring_sqe, cmd);
#else
	return cmd->cmd;
#endif
}

#define ublk_sqe_cmd(cmd, type)		((const type *)ublk_compat_payload(cmd))
#define ublk_sqe128_cmd(cmd, type)	((const type *)ublk_compat_payload(cmd))
#endif

#ifndef UBLK_HAVE_CMD_GET_TASK
static inline struct task_struct *
io_uring_cmd_get_task(struct io_uring_cmd *cmd)
{
	return cmd_to_io_kiocb(cmd)->task;
}
#endif

#ifndef UBLK_HAVE_CMD_CTX_HANDLE
static inline void *io_uring_cmd_ctx_handle(struct io_uring_cmd *cmd)
{
	return cmd_to_io_kiocb(cmd)->ctx;
}
#endif

#ifndef UBLK_HAVE_CMD_TO_PDU
#define io_uring_cmd_to_pdu(cmd, pdu_type) ({				\
	BUILD_BUG_ON(sizeof(pdu_type) > sizeof((cmd)->pdu));		\
	(typeof(pdu_type) *)&(cmd)->pdu;				\
})
#endif

/*
 * Data that compat/ adds to a command. The first 8 bytes of the pdu are used by
 * the driver.
 */
#ifndef UBLK_HAVE_CMD_FROM_TW
struct io_tw_req {
	struct io_uring_cmd *cmd;
};

struct ublk_tw_token {
	bool		cancel;
	unsigned int	issue_flags;
};

/* Replaces the io_tw_token_t of 6.15, which has no "cancel". */
#define io_tw_token_t	struct ublk_tw_token

struct ublk_compat_pdu {
	u64		driver_data;
	struct hlist_node node;		/* cancel.c */
	void		(*tw_func)(struct io_tw_req req, io_tw_token_t tw);
};

static inline struct io_uring_cmd *io_uring_cmd_from_tw(struct io_tw_req req)
{
	return req.cmd;
}

/* These kernels pass issue flags to the callback. Its second parameter is "tw". */
#define IO_URING_CMD_TASK_WORK_ISSUE_FLAGS	(tw.issue_flags)

/* Whether the task of the command has exited, or another task runs this for it. */
static inline bool ublk_compat_tw_cancel(struct io_uring_cmd *cmd,
					 unsigned int issue_flags)
{
#ifdef UBLK_HAVE_F_TASK_DEAD
	return issue_flags & IO_URING_F_TASK_DEAD;
#else
	return current != io_uring_cmd_get_task(cmd) ||
	       (current->flags & PF_EXITING);
#endif
}

static inline void ublk_compat_tw(struct io_uring_cmd *cmd,
				  unsigned int issue_flags)
{
	struct ublk_compat_pdu *pdu =
		io_uring_cmd_to_pdu(cmd, struct ublk_compat_pdu);
	struct io_tw_req req = { .cmd = cmd };
	struct ublk_tw_token tw = {
		.cancel = ublk_compat_tw_cancel(cmd, issue_flags),
		.issue_flags = issue_flags,
	};

#ifdef UBLK_HAVE_F_TASK_DEAD
	tw.issue_flags &= ~IO_URING_F_TASK_DEAD;
#endif
	pdu->tw_func(req, tw);
}

static inline void
ublk_compat_complete_in_task(struct io_uring_cmd *cmd,
			     void (*func)(struct io_tw_req, io_tw_token_t))
{
	io_uring_cmd_to_pdu(cmd, struct ublk_compat_pdu)->tw_func = func;
	io_uring_cmd_complete_in_task(cmd, ublk_compat_tw);
}

#define io_uring_cmd_complete_in_task ublk_compat_complete_in_task
#endif /* !UBLK_HAVE_CMD_FROM_TW */

/* Until 6.17 there is a second result, also for rings without CQE32. */
#ifndef UBLK_HAVE_CMD_DONE32
static inline void ublk_compat_cmd_done(struct io_uring_cmd *cmd, s32 ret,
					unsigned int issue_flags)
{
	io_uring_cmd_done(cmd, ret, 0, issue_flags);
}

#define io_uring_cmd_done ublk_compat_cmd_done
#endif

/* Registration of request buffers: since 6.15, with other names until 7.2. */
#ifndef UBLK_HAVE_REGISTER_REQUEST
#ifdef UBLK_HAVE_REGISTER_BVEC
#define io_buffer_register_request	io_buffer_register_bvec
#define io_buffer_unregister		io_buffer_unregister_bvec
#else
#define UBLK_COMPAT_NO_BUFFER_REGISTRATION
#endif
#endif

#ifndef UBLK_HAVE_MSHOT_POST_CQE
#define UBLK_COMPAT_NO_MULTISHOT
#endif

#endif /* UBLK_COMPAT_IO_URING_H */
