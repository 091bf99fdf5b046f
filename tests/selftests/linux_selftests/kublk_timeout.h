/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Included ahead of each of kublk's files.
 *
 * Its fault_inject target prepares a timeout with the address of a local variable and submits it after that has gone
 * out of scope; the kernel reads it only then. What it finds depends on the compiler: mostly no delay at all, at times
 * one that never ends. Here the kernel gets the address of a copy that outlives the submission.
 */
#ifndef KUBLK_TIMEOUT_H
#define KUBLK_TIMEOUT_H

/* The kernel's own goes first: liburing brings one that may be older. */
#include <linux/io_uring.h>
#include <liburing.h>

/* More than a ring of kublk's holds before it is submitted. */
#define KUBLK_TIMEOUTS 8192

static inline void kublk_prep_timeout(struct io_uring_sqe *sqe, const struct __kernel_timespec *time, unsigned count,
				      unsigned flags)
{
	static __thread struct __kernel_timespec copies[KUBLK_TIMEOUTS];
	static __thread unsigned next;
	struct __kernel_timespec *copy = &copies[next++ % KUBLK_TIMEOUTS];

	*copy = *time;
	io_uring_prep_timeout(sqe, copy, count, flags);
}

#define io_uring_prep_timeout kublk_prep_timeout

#endif
