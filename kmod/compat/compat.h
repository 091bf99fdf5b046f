/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Makes older kernels look like Linux 7.3, for which the driver is written.
 * Included ahead of every file of the driver. UBLK_HAVE_* comes from Kbuild.
 */
#ifndef UBLK_COMPAT_H
#define UBLK_COMPAT_H

#include <linux/version.h>

/* Nothing is known of 6.2 to 6.11: the interfaces were changing a lot. */
#if KERNEL_VERSION(6, 1, 0) > LINUX_VERSION_CODE || \
	(KERNEL_VERSION(6, 2, 0) <= LINUX_VERSION_CODE && \
	 KERNEL_VERSION(6, 12, 0) > LINUX_VERSION_CODE) || \
	KERNEL_VERSION(7, 4, 0) <= LINUX_VERSION_CODE
#error "ublk_drv is for Linux 6.1 and 6.12 to 7.3; these headers are of another"
#endif

/* The headers below print; they have to know the driver's prefix. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include "io_uring.h"
#include "cancel.h"
#include "limits.h"
#include "integrity.h"
#include "blk_mq.h"
#include "zoned.h"
#include "mm.h"

#endif /* UBLK_COMPAT_H */
