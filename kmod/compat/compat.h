/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Makes older kernels look like Linux 7.3, for which the driver is written.
 * Included ahead of every file of the driver. UBLK_HAVE_* comes from Kbuild.
 */
#ifndef UBLK_COMPAT_H
#define UBLK_COMPAT_H

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0) || \
	LINUX_VERSION_CODE >= KERNEL_VERSION(7, 4, 0)
#error "this driver is for Linux 6.1 to 7.3, the headers are of another release"
#endif

/* The headers below print; they have to know the driver's prefix. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include "io_uring.h"
#include "cancel.h"
#include "limits.h"
#include "integrity.h"
#include "blk_mq.h"
#include "disk_ops.h"
#include "mm.h"

#endif /* UBLK_COMPAT_H */
