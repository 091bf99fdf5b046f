/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Cancellation of parked commands whose task or ring goes away. Kernels before
 * 6.7 leave that to the driver. See cancel.c.
 */
#ifndef UBLK_COMPAT_CANCEL_H
#define UBLK_COMPAT_CANCEL_H

#ifdef UBLK_HAVE_CMD_CANCELABLE

static inline int ublk_compat_init(void)
{
	return 0;
}

static inline void ublk_compat_exit(void)
{
}

#else

#include "io_uring.h"

/* Issue flags and command flags, with bits that these kernels do not use. */
enum {
	IO_URING_F_CANCEL		= 1 << 11,
	IORING_URING_CMD_CANCELABLE	= 1 << 30,
};

int ublk_compat_init(void);
void ublk_compat_exit(void);
void io_uring_cmd_mark_cancelable(struct io_uring_cmd *cmd,
				  unsigned int issue_flags);
void ublk_compat_cancelable_done(struct io_uring_cmd *cmd, s32 ret,
				 unsigned int issue_flags);

#undef io_uring_cmd_done
#define io_uring_cmd_done ublk_compat_cancelable_done

#endif /* UBLK_HAVE_CMD_CANCELABLE */

#endif /* UBLK_COMPAT_CANCEL_H */
