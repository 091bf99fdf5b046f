// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/ublk-control: decodes the control commands and calls their
 * implementations.
 */
#include <linux/capability.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/uaccess.h>

#include "internal.h"

static void __user *ublk_arg(const struct ublksrv_ctrl_cmd *header)
{
	return u64_to_user_ptr(header->addr);
}

static int ublk_ctrl_get_features(const struct ublksrv_ctrl_cmd *header)
{
	u64 features = ublk_features();

	if (header->len != UBLK_FEATURES_LEN || !header->addr)
		return -EINVAL;
	if (copy_to_user(ublk_arg(header), &features, sizeof(features)))
		return -EFAULT;
	return 0;
}

static int ublk_ctrl_add_dev(const struct ublksrv_ctrl_cmd *header)
{
	struct ublksrv_ctrl_dev_info info;
	struct ublk_device *ub;
	int ret;

	if (header->len < sizeof(info) || !header->addr)
		return -EINVAL;
	if (header->queue_id != U16_MAX)
		return -EINVAL;
	if (copy_from_user(&info, ublk_arg(header), sizeof(info)))
		return -EFAULT;
	if (!info.queue_depth || info.queue_depth > UBLK_MAX_QUEUE_DEPTH ||
	    !info.nr_hw_queues || info.nr_hw_queues > UBLK_MAX_NR_QUEUES)
		return -EINVAL;
	if (capable(CAP_SYS_ADMIN))
		info.flags &= ~UBLK_F_UNPRIVILEGED_DEV;
	else if (!(info.flags & UBLK_F_UNPRIVILEGED_DEV))
		return -EPERM;
	ret = ublk_check_flags(&info);
	if (ret)
		return ret;
	if (header->dev_id != info.dev_id)
		return -EINVAL;
	if (info.dev_id != U32_MAX && info.dev_id >= UBLK_MINORS)
		return -EINVAL;

	ub = ublk_add_dev(&info);
	if (IS_ERR(ub))
		return PTR_ERR(ub);
	if (copy_to_user(ublk_arg(header), &info, sizeof(info))) {
		/* The caller does not learn the id of the device. */
		ublk_revoke_dev(ub);
		ret = -EFAULT;
	}
	ublk_put_dev(ub);
	return ret;
}

/*
 * A thread that fetches requests of a queue, with a reference, or NULL. Caller
 * holds ub->lock.
 */
static struct task_struct *ublk_get_fetcher(struct ublk_queue *q)
{
	unsigned int tag;

	if (ublk_is_batch(q))
		return ublk_batch_get_fetcher(q);
	for (tag = 0; tag < q->depth; tag++) {
		struct task_struct *daemon = q->ios[tag].daemon;

		if (daemon && !ublk_task_gone(daemon))
			return get_task_struct(daemon);
	}
	return NULL;
}

/*
 * The process id of the server in the pid namespace of the caller, or -1. If
 * the process that opened the char device has exited, this is a process that
 * fetches requests, to which it has left the device.
 */
static s32 ublk_server_pid(struct ublk_device *ub)
{
	struct task_struct *opener, *task = NULL;
	s32 nr = -1;
	unsigned int i;

	spin_lock(&ub->lock);
	if (!ub->server)
		goto out;
	rcu_read_lock();
	opener = pid_task(ub->server, PIDTYPE_TGID);
	/* A server that was killed and cannot die is still reported. */
	if (opener && atomic_read(&opener->signal->live))
		nr = pid_vnr(ub->server) ?: -1;
	rcu_read_unlock();
	for (i = 0; nr < 0 && !task && i < ub->dev_info.nr_hw_queues; i++)
		task = ublk_get_fetcher(ub->queues[i]);
	if (task)
		nr = task_tgid_vnr(task) ?: -1;
out:
	spin_unlock(&ub->lock);
	if (task)
		put_task_struct(task);
	return nr;
}

static int ublk_ctrl_get_info(struct ublk_device *ub,
			      const struct ublksrv_ctrl_cmd *header)
{
	struct ublksrv_ctrl_dev_info info;

	if (header->len < sizeof(info) || !header->addr)
		return -EINVAL;
	spin_lock(&ub->lock);
	info = ub->dev_info;
	spin_unlock(&ub->lock);
	info.ublksrv_pid = ublk_server_pid(ub);
	if (copy_to_user(ublk_arg(header), &info, sizeof(info)))
		return -EFAULT;
	return 0;
}

static int ublk_ctrl_get_affinity(struct ublk_device *ub,
				  const struct ublksrv_ctrl_cmd *header)
{
	const struct blk_mq_queue_map *map =
		&ub->tag_set.map[HCTX_TYPE_DEFAULT];
	u64 queue = header->data[0];
	cpumask_var_t mask;
	unsigned int cpu;
	size_t bytes;
	int ret = 0;

	if (header->len * BITS_PER_BYTE < nr_cpu_ids ||
	    header->len % sizeof(u64) || !header->addr)
		return -EINVAL;
	if (queue >= ub->dev_info.nr_hw_queues)
		return -EINVAL;
	if (!zalloc_cpumask_var(&mask, GFP_KERNEL))
		return -ENOMEM;
	for_each_possible_cpu(cpu)
		if (map->mq_map[cpu] == queue)
			cpumask_set_cpu(cpu, mask);
	bytes = min_t(size_t, cpumask_size(), header->len);
	if (copy_to_user(ublk_arg(header), mask, bytes) ||
	    clear_user(ublk_arg(header) + bytes, header->len - bytes))
		ret = -EFAULT;
	free_cpumask_var(mask);
	return ret;
}

static int ublk_ctrl_del_dev(struct ublk_device **ubp, bool wait)
{
	u32 dev_id = (*ubp)->dev_info.dev_id;
	u64 serial = (*ubp)->serial;
	int ret = ublk_remove_dev(*ubp);

	if (ret)
		return ret;
	/* This may be the last reference, which the wait would be for. */
	ublk_put_dev(*ubp);
	*ubp = NULL;
	return wait ? ublk_wait_freed(dev_id, serial) : 0;
}

static int ublk_ctrl_dev_cmd(struct ublk_device **ubp, unsigned int nr,
			     const struct ublksrv_ctrl_cmd *header)
{
	struct ublk_device *ub = *ubp;
	u64 data = header->data[0];

	switch (nr) {
	case _IOC_NR(UBLK_U_CMD_GET_QUEUE_AFFINITY):
		return ublk_ctrl_get_affinity(ub, header);
	case _IOC_NR(UBLK_U_CMD_GET_DEV_INFO):
	case _IOC_NR(UBLK_U_CMD_GET_DEV_INFO2):
		return ublk_ctrl_get_info(ub, header);
	case _IOC_NR(UBLK_U_CMD_SET_PARAMS):
		return ublk_set_params(ub, ublk_arg(header), header->len);
	case _IOC_NR(UBLK_U_CMD_GET_PARAMS):
		return ublk_get_params(ub, ublk_arg(header), header->len);
	case _IOC_NR(UBLK_U_CMD_START_DEV):
		return ublk_start_dev(ub, data);
	case _IOC_NR(UBLK_U_CMD_STOP_DEV):
		return ublk_stop_dev(ub);
	case _IOC_NR(UBLK_U_CMD_TRY_STOP_DEV):
		return ublk_try_stop_dev(ub);
	case _IOC_NR(UBLK_U_CMD_DEL_DEV):
		return ublk_ctrl_del_dev(ubp, true);
	case _IOC_NR(UBLK_U_CMD_DEL_DEV_ASYNC):
		return ublk_ctrl_del_dev(ubp, false);
	case _IOC_NR(UBLK_U_CMD_START_USER_RECOVERY):
		return ublk_start_recovery(ub);
	case _IOC_NR(UBLK_U_CMD_END_USER_RECOVERY):
		return ublk_end_recovery(ub, data);
	case _IOC_NR(UBLK_U_CMD_QUIESCE_DEV):
		return ublk_quiesce_dev(ub, data);
	case _IOC_NR(UBLK_U_CMD_UPDATE_SIZE):
		return ublk_update_size(ub, data);
	case _IOC_NR(UBLK_U_CMD_REG_BUF):
		return ublk_reg_buf(ub, ublk_arg(header), header->len);
	case _IOC_NR(UBLK_U_CMD_UNREG_BUF):
		return ublk_unreg_buf(ub, data);
	default:
		return -EOPNOTSUPP;
	}
}

/* Whether a command may sleep. The others are carried out in the submitter. */
static bool ublk_ctrl_may_sleep(u32 op)
{
	switch (_IOC_NR(op)) {
	case _IOC_NR(UBLK_U_CMD_GET_QUEUE_AFFINITY):
	case _IOC_NR(UBLK_U_CMD_GET_DEV_INFO):
	case _IOC_NR(UBLK_U_CMD_GET_DEV_INFO2):
	case _IOC_NR(UBLK_U_CMD_GET_FEATURES):
		return false;
	default:
		return true;
	}
}

/**
 * ublk_ctrl_uring_cmd() - Handle an io_uring command on /dev/ublk-control.
 * @cmd: the command
 * @issue_flags: io_uring issue flags
 *
 * Context: Task context of the submitter, or an io_uring worker.
 *
 * Return: the result of the command, or -EAGAIN if it needs an io_uring worker.
 */
int ublk_ctrl_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	u32 op = cmd->cmd_op;
	struct ublksrv_ctrl_cmd header;
	struct ublk_device *ub;
	int ret;

	if (ublk_ctrl_may_sleep(op) && (issue_flags & IO_URING_F_NONBLOCK))
		return -EAGAIN;
	if (!(issue_flags & IO_URING_F_SQE128))
		return -EINVAL;
	/*
	 * The arguments are checked and then used. Copy them, as user space may
	 * change them meanwhile.
	 */
	memcpy(&header, ublk_sqe128_cmd(cmd, struct ublksrv_ctrl_cmd),
	       sizeof(header));
	/* Looking up a path may sleep. */
	if (header.dev_path_len && (issue_flags & IO_URING_F_NONBLOCK))
		return -EAGAIN;

	/* Commands in the oldest form are bare numbers, with type 0. */
	if (_IOC_TYPE(op) != 'u' && _IOC_TYPE(op) != 0)
		return -EOPNOTSUPP;
	if (op == UBLK_U_CMD_GET_FEATURES)
		return ublk_ctrl_get_features(&header);
	if (_IOC_NR(op) == _IOC_NR(UBLK_U_CMD_ADD_DEV))
		return ublk_ctrl_add_dev(&header);

	ub = ublk_find_dev(header.dev_id);
	if (!ub)
		return -ENODEV;
	ret = ublk_check_access(ub, op, &header);
	if (!ret)
		ret = ublk_ctrl_dev_cmd(&ub, _IOC_NR(op), &header);
	if (ub)
		ublk_put_dev(ub);
	return ret;
}
