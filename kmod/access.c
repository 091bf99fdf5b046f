// SPDX-License-Identifier: GPL-2.0
/*
 * Permission to control a device. A privileged device requires CAP_SYS_ADMIN.
 * An unprivileged device requires permission to use its char device, which the
 * caller proves with a path: the owner and mode of the device node decide, for
 * root as well.
 */
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/mount.h>
#include <linux/namei.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "internal.h"

/* The permission on the char device that a command requires. */
static int ublk_command_mask(u32 cmd_op)
{
	switch (_IOC_NR(cmd_op)) {
	case UBLK_CMD_GET_QUEUE_AFFINITY:
	case UBLK_CMD_GET_DEV_INFO:
	case UBLK_CMD_GET_DEV_INFO2:
	case UBLK_CMD_GET_PARAMS:
	case _IOC_NR(UBLK_U_CMD_GET_FEATURES):
		return MAY_READ;
	case UBLK_CMD_DEL_DEV:
	case UBLK_CMD_START_DEV:
	case UBLK_CMD_STOP_DEV:
	case UBLK_CMD_SET_PARAMS:
	case UBLK_CMD_START_USER_RECOVERY:
	case UBLK_CMD_END_USER_RECOVERY:
	case _IOC_NR(UBLK_U_CMD_DEL_DEV_ASYNC):
	case _IOC_NR(UBLK_U_CMD_UPDATE_SIZE):
	case _IOC_NR(UBLK_U_CMD_QUIESCE_DEV):
	case _IOC_NR(UBLK_U_CMD_TRY_STOP_DEV):
	case _IOC_NR(UBLK_U_CMD_REG_BUF):
	case _IOC_NR(UBLK_U_CMD_UNREG_BUF):
		return MAY_READ | MAY_WRITE;
	default:
		return -EINVAL;
	}
}

/*
 * Whether device nodes on this mount can be opened. Nodes on other mounts prove
 * nothing, as any user may create them, for example in a file system that the
 * user serves.
 */
static bool ublk_path_allows_dev(const struct path *path)
{
	return !(path->mnt->mnt_flags & MNT_NODEV) &&
	       !(path->mnt->mnt_sb->s_iflags & SB_I_NODEV);
}

static int ublk_check_path(const struct ublk_device *ub, const char *name,
			   int mask)
{
	const struct inode *inode;
	struct path path;
	int ret;

	ret = kern_path(name, LOOKUP_FOLLOW, &path);
	if (ret)
		return ret;
	inode = d_backing_inode(path.dentry);
	if (!S_ISCHR(inode->i_mode) || inode->i_rdev != ub->dev.devt ||
	    !ublk_path_allows_dev(&path))
		ret = -EPERM;
	else
		ret = path_permission(&path, mask);
	path_put(&path);
	return ret;
}

/*
 * Checks the path in front of the payload of @header, and advances @header to
 * the payload.
 */
static int ublk_consume_path(const struct ublk_device *ub, u32 cmd_op,
			     struct ublksrv_ctrl_cmd *header)
{
	int mask = ublk_command_mask(cmd_op);
	u16 path_len = header->dev_path_len;
	char *name;
	int ret;

	if (!path_len || path_len > PATH_MAX || path_len > header->len)
		return -EINVAL;
	name = memdup_user_nul(u64_to_user_ptr(header->addr), path_len);
	if (IS_ERR(name))
		return PTR_ERR(name);
	ret = mask < 0 ? mask : ublk_check_path(ub, name, mask);
	kfree(name);
	if (ret)
		return ret;
	header->addr += path_len;
	header->len -= path_len;
	return 0;
}

/**
 * ublk_check_access() - Check permission to control a device.
 * @ub: the device
 * @cmd_op: the command
 * @header: its arguments; a path in front of the payload is skipped
 *
 * Context: Process context of the sender.
 *
 * Return: 0, -EPERM, or another negative errno, for example from the path
 *	lookup.
 */
int ublk_check_access(struct ublk_device *ub, u32 cmd_op,
		      struct ublksrv_ctrl_cmd *header)
{
	if (!(ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV)) {
		if (!capable(CAP_SYS_ADMIN))
			return -EPERM;
		if (_IOC_NR(cmd_op) != UBLK_CMD_GET_DEV_INFO2)
			return 0;
	}
	return ublk_consume_path(ub, cmd_op, header);
}
