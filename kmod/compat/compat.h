/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Makes older kernels look like Linux 7.3, for which the driver is written. It
 * is included before everything else in each file of the driver. The
 * UBLK_HAVE_* macros come from Kbuild.
 */
#ifndef UBLK_COMPAT_H
#define UBLK_COMPAT_H

#include <linux/version.h>

/* Linux 6.2 to 6.11, with their many changes of interfaces, are untested. */
#if KERNEL_VERSION(6, 1, 0) > LINUX_VERSION_CODE || \
	(KERNEL_VERSION(6, 2, 0) <= LINUX_VERSION_CODE && \
	 KERNEL_VERSION(6, 12, 0) > LINUX_VERSION_CODE) || \
	KERNEL_VERSION(7, 4, 0) <= LINUX_VERSION_CODE
#error "ublk_drv supports Linux 6.1 and 6.12 to 7.3; unsupported kernel version"
#endif

/* Set before the headers below, which use pr_*(). */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include "io_uring.h"
#include "cancel.h"
#include "limits.h"
#include "integrity.h"
#include "blk_mq.h"
#include "zoned.h"
#include "mm.h"

#endif /* UBLK_COMPAT_H */
