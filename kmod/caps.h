/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the kernel that the driver is built for lets a module do. Everything,
 * unless compat/ has said otherwise.
 */
#ifndef UBLK_CAPS_H
#define UBLK_CAPS_H

/* io_uring installs a request's pages in a ring's table of fixed buffers. */
#ifndef UBLK_COMPAT_NO_BUFFER_REGISTRATION
#define UBLK_CAN_REGISTER_BUFFERS
#endif

/* io_uring posts many completions for one command, into provided buffers. */
#ifndef UBLK_COMPAT_NO_MULTISHOT
#define UBLK_CAN_BATCH
#endif

/* The block layer carries integrity metadata, described by queue limits. */
#if defined(CONFIG_BLK_DEV_INTEGRITY) && !defined(UBLK_COMPAT_NO_INTEGRITY)
#define UBLK_CAN_INTEGRITY
#endif

/* Drivers see the rest of the SQE, not only its command area. */
#ifndef UBLK_COMPAT_NO_SQE
#define UBLK_CAN_SEE_SQE
#endif

#endif /* UBLK_CAPS_H */
