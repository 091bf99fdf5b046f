/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Integrity metadata. Before 6.11 a driver has to provide functions for
 * checksums, and the block layer does not know where in the metadata they are
 * stored. The driver does not support integrity metadata there.
 */
#ifndef UBLK_COMPAT_INTEGRITY_H
#define UBLK_COMPAT_INTEGRITY_H

#ifndef UBLK_HAVE_LIMITS_FEATURES
#define UBLK_COMPAT_NO_INTEGRITY
#endif

/*
 * Until about 7.0 the block layer never splits a protection interval over
 * segments, whatever the device supports.
 */
#ifndef UBLK_HAVE_SPLIT_INTERVAL
#define BLK_SPLIT_INTERVAL_CAPABLE	0
#endif

/* Constants of <linux/fs.h> since 6.17, which the user API of ublk uses too. */
#ifndef UBLK_HAVE_LBMD
#define LBMD_PI_CAP_INTEGRITY		1
#define LBMD_PI_CAP_REFTAG		2

#define LBMD_PI_CSUM_NONE		0
#define LBMD_PI_CSUM_IP			1
#define LBMD_PI_CSUM_CRC16_T10DIF	2
#define LBMD_PI_CSUM_CRC64_NVME		4
#endif

#endif /* UBLK_COMPAT_INTEGRITY_H */
