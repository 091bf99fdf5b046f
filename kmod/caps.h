/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Capabilities of the kernel that the driver is built for. All of them are
 * defined unless compat/ disables them.
 */
#ifndef UBLK_CAPS_H
#define UBLK_CAPS_H

/* io_uring can register the pages of a request as a fixed buffer of a ring. */
#ifndef UBLK_COMPAT_NO_BUFFER_REGISTRATION
#define UBLK_CAN_REGISTER_BUFFERS
#endif

/* io_uring has multishot commands that use provided buffers. */
#ifndef UBLK_COMPAT_NO_MULTISHOT
#define UBLK_CAN_BATCH
#endif

/* The block layer supports integrity metadata, described by queue limits. */
#if defined(CONFIG_BLK_DEV_INTEGRITY) && !defined(UBLK_COMPAT_NO_INTEGRITY)
#define UBLK_CAN_INTEGRITY
#endif

/* Drivers can access the whole SQE, not only its command area. */
#ifndef UBLK_COMPAT_NO_SQE
#define UBLK_CAN_SEE_SQE
#endif

#endif /* UBLK_CAPS_H */
