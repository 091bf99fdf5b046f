// SPDX-License-Identifier: GPL-2.0
/*
 * Feature flags (UBLK_F_*): which ones this build supports, which combinations
 * are valid, and which are in force.
 */
#include <linux/cpumask.h>
#include <linux/kernel.h>

#include "internal.h"

#define UBLK_MAX_IO_DESC_SIZE	256

/* Always in force, even if not requested. */
#define UBLK_F_ALWAYS		(UBLK_F_URING_CMD_COMP_IN_TASK | \
				 UBLK_F_CMD_IOCTL_ENCODE | \
				 UBLK_F_PER_IO_DAEMON | \
				 UBLK_F_SAFE_STOP_DEV)

/* Modes that servers of unprivileged devices may not use. */
#define UBLK_F_PRIVILEGED_DATA	(UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | \
				 UBLK_F_AUTO_BUF_REG)

/**
 * ublk_features() - Get the features of this build of the driver.
 *
 * Context: Any context.
 *
 * Return: a mask of UBLK_F_*.
 */
u64 ublk_features(void)
{
	u64 features = UBLK_F_ALWAYS |
		       UBLK_F_NEED_GET_DATA |
		       UBLK_F_ANY_RECOVERY |
		       UBLK_F_UNPRIVILEGED_DEV |
		       UBLK_F_USER_COPY |
		       UBLK_F_UPDATE_SIZE |
		       UBLK_F_QUIESCE |
		       UBLK_F_NO_AUTO_PART_SCAN |
		       UBLK_F_SHMEM_ZC |
		       UBLK_F_IO_DESC_SIZE;

#ifdef UBLK_CAN_REGISTER_BUFFERS
	features |= UBLK_F_SUPPORT_ZERO_COPY |
		    UBLK_F_AUTO_BUF_REG |
		    UBLK_F_BUF_REG_OFF_DAEMON;
#endif
#ifdef UBLK_CAN_BATCH
	features |= UBLK_F_BATCH_IO;
#endif
#ifdef UBLK_CAN_INTEGRITY
	features |= UBLK_F_INTEGRITY;
#endif
	if (IS_ENABLED(CONFIG_BLK_DEV_ZONED))
		features |= UBLK_F_ZONED;
	return features;
}

static bool ublk_recovery_flags_valid(u64 flags)
{
	switch (flags & UBLK_F_ANY_RECOVERY) {
	case 0:
	case UBLK_F_USER_RECOVERY:
	case UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE:
	case UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO:
		return true;
	default:
		return false;
	}
}

/**
 * ublk_check_flags() - Check the flags of ADD_DEV for invalid combinations.
 * @info: what was requested, without UBLK_F_UNPRIVILEGED_DEV if the caller is
 *	privileged
 *
 * Context: Any context.
 *
 * Return: 0, or -EINVAL.
 */
int ublk_check_flags(const struct ublksrv_ctrl_dev_info *info)
{
	u64 flags = info->flags;

	if (!ublk_recovery_flags_valid(flags))
		return -EINVAL;
	if ((flags & UBLK_F_QUIESCE) && !(flags & UBLK_F_USER_RECOVERY))
		return -EINVAL;
	if ((flags & UBLK_F_UNPRIVILEGED_DEV) &&
	    (flags & UBLK_F_PRIVILEGED_DATA))
		return -EINVAL;
	if ((flags & UBLK_F_INTEGRITY) && !(flags & UBLK_F_USER_COPY))
		return -EINVAL;
	if ((flags & UBLK_F_IO_DESC_SIZE) &&
	    (info->io_desc_size < sizeof(struct ublksrv_io_desc) ||
	     info->io_desc_size > UBLK_MAX_IO_DESC_SIZE ||
	     info->io_desc_size % sizeof(u64)))
		return -EINVAL;
	return 0;
}

/**
 * ublk_check_zoned() - Check whether a device can be zoned, if it is to be.
 * @info: the device information after ublk_fixup_dev_info()
 *
 * Zoned devices need support by the kernel, and a mode without a buffer address
 * in the commands: the sector of a zone append takes its place.
 *
 * Context: Any context.
 *
 * Return: 0, or -EINVAL.
 */
int ublk_check_zoned(const struct ublksrv_ctrl_dev_info *info)
{
	if (!(info->flags & UBLK_F_ZONED))
		return 0;
	if (!IS_ENABLED(CONFIG_BLK_DEV_ZONED))
		return -EINVAL;
	if (!(info->flags & (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY)))
		return -EINVAL;
	return 0;
}

static u64 ublk_effective_flags(u64 flags)
{
	/* ublk_check_zoned() rejects ZONED on kernels without support. */
	flags &= ublk_features() | UBLK_F_ZONED;

	flags |= UBLK_F_ALWAYS;
#ifdef UBLK_CAN_REGISTER_BUFFERS
	flags |= UBLK_F_BUF_REG_OFF_DAEMON;
#endif
	if (flags & UBLK_F_BATCH_IO)
		flags &= ~UBLK_F_PER_IO_DAEMON;
	if (flags & (UBLK_F_NO_COPY | UBLK_F_BATCH_IO))
		flags &= ~UBLK_F_NEED_GET_DATA;
	if (flags & UBLK_F_UNPRIVILEGED_DEV)
		flags &= ~(UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE);
	return flags;
}

/**
 * ublk_fixup_dev_info() - Adjust the arguments of ADD_DEV to what is granted.
 * @info: what was requested; replaced by what is granted
 *
 * Context: Any context.
 */
void ublk_fixup_dev_info(struct ublksrv_ctrl_dev_info *info)
{
	info->flags = ublk_effective_flags(info->flags);
	info->nr_hw_queues = min_t(unsigned int, info->nr_hw_queues,
				   nr_cpu_ids);
	info->max_io_buf_bytes = round_down(info->max_io_buf_bytes, PAGE_SIZE);
	if (!(info->flags & UBLK_F_IO_DESC_SIZE))
		info->io_desc_size = sizeof(struct ublksrv_io_desc);
	info->state = UBLK_S_DEV_DEAD;
	info->ublksrv_pid = -1;
}
