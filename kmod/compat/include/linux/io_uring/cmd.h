/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Linux before 6.7 has its interface for drivers in <linux/io_uring.h>. The
 * directory of this file is the last to be searched, so that later kernels
 * never see it.
 */
#ifndef UBLK_COMPAT_LINUX_IO_URING_CMD_H
#define UBLK_COMPAT_LINUX_IO_URING_CMD_H

#include <linux/io_uring.h>
#include <linux/io_uring_types.h>

#endif /* UBLK_COMPAT_LINUX_IO_URING_CMD_H */
