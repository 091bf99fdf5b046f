// SPDX-License-Identifier: GPL-2.0
/*
 * ublk_drv: the module, /dev/ublk-control, and the class and device numbers of
 * the char devices.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>

#include "internal.h"

#define UBLK_MAX_UNPRIVILEGED	UBLK_MINORS

unsigned int ublks_max = 64;
unsigned int ublks_max_per_user = 16;
dev_t ublk_chr_devt;
struct workqueue_struct *ublk_wq;
struct workqueue_struct *ublk_job_wq;
struct workqueue_struct *ublk_user_job_wq;
struct workqueue_struct *ublk_scan_wq;

struct class ublk_chr_class = {
	.name = "ublk-char",
};

static const struct file_operations ublk_ctrl_fops = {
	.owner		= THIS_MODULE,
	.open		= nonseekable_open,
	.uring_cmd	= ublk_ctrl_uring_cmd,
};

struct miscdevice ublk_misc = {
	.minor		= MISC_DYNAMIC_MINOR,
	.name		= "ublk-control",
	.fops		= &ublk_ctrl_fops,
};

static int ublks_max_set(const char *val, const struct kernel_param *kp)
{
	return param_set_uint_minmax(val, kp, 0, UBLK_MAX_UNPRIVILEGED);
}

static const struct kernel_param_ops ublks_max_ops = {
	.set = ublks_max_set,
	.get = param_get_uint,
};

module_param_cb(ublks_max, &ublks_max_ops, &ublks_max, 0644);
MODULE_PARM_DESC(ublks_max,
		 "maximum number of unprivileged devices (default 64)");
module_param_cb(ublks_max_per_user, &ublks_max_ops, &ublks_max_per_user, 0644);
MODULE_PARM_DESC(ublks_max_per_user,
		 "maximum number of unprivileged devices per user (default 16)");

#ifdef UBLK_DEBUG
unsigned long ublk_widen;
unsigned int ublk_widen_us = 500;
unsigned int ublk_reap_ms = 1000;

module_param_named(widen, ublk_widen, ulong, 0644);
MODULE_PARM_DESC(widen, "races to widen (bit mask of enum ublk_race)");
module_param_named(widen_us, ublk_widen_us, uint, 0644);
MODULE_PARM_DESC(widen_us, "delay in widened races, in microseconds (maximum 2000)");
module_param_named(reap_ms, ublk_reap_ms, uint, 0644);
MODULE_PARM_DESC(reap_ms, "interval of reap.c, in milliseconds (default 1000)");
#endif

static void ublk_destroy_workqueues(void)
{
	if (ublk_scan_wq)
		destroy_workqueue(ublk_scan_wq);
	if (ublk_user_job_wq)
		destroy_workqueue(ublk_user_job_wq);
	if (ublk_job_wq)
		destroy_workqueue(ublk_job_wq);
	if (ublk_wq)
		destroy_workqueue(ublk_wq);
}

/*
 * Each of these may be full of work that waits for work in an earlier one. Jobs
 * on unprivileged devices may wait for as long as their users like, and have a
 * work queue of their own.
 */
static int ublk_alloc_workqueues(void)
{
	ublk_wq = alloc_workqueue("ublk", WQ_UNBOUND | WQ_MEM_RECLAIM,
				  WQ_MAX_ACTIVE);
	ublk_job_wq = alloc_workqueue("ublk-job", WQ_UNBOUND, WQ_MAX_ACTIVE);
	ublk_user_job_wq = alloc_workqueue("ublk-user-job", WQ_UNBOUND,
					   WQ_MAX_ACTIVE);
	ublk_scan_wq = alloc_workqueue("ublk-scan", WQ_UNBOUND, WQ_MAX_ACTIVE);
	if (ublk_wq && ublk_job_wq && ublk_user_job_wq && ublk_scan_wq)
		return 0;
	ublk_destroy_workqueues();
	return -ENOMEM;
}

static int __init ublk_init(void)
{
	int ret;

	BUILD_BUG_ON(sizeof(struct ublksrv_ctrl_cmd) != 32);
	BUILD_BUG_ON(sizeof(struct ublksrv_ctrl_dev_info) != 64);
	BUILD_BUG_ON(sizeof(struct ublksrv_io_desc) != 24);
	BUILD_BUG_ON(sizeof(struct ublksrv_io_cmd) != 16);
	BUILD_BUG_ON(sizeof(struct ublk_params) != 152);
	BUILD_BUG_ON((u64)UBLKSRV_IO_BUF_OFFSET + UBLKSRV_IO_BUF_TOTAL_SIZE <=
		     UBLKSRV_IO_BUF_OFFSET);

	ret = ublk_compat_init();
	if (ret)
		return ret;
	ret = ublk_reap_init();
	if (ret)
		goto out_compat;
	ret = ublk_alloc_workqueues();
	if (ret)
		goto out_reap;
	ret = alloc_chrdev_region(&ublk_chr_devt, 0, UBLK_MINORS, "ublk-char");
	if (ret)
		goto out_wq;
	ret = class_register(&ublk_chr_class);
	if (ret)
		goto out_region;
	ret = misc_register(&ublk_misc);
	if (ret)
		goto out_class;
	return 0;

out_class:
	class_unregister(&ublk_chr_class);
out_region:
	unregister_chrdev_region(ublk_chr_devt, UBLK_MINORS);
out_wq:
	ublk_destroy_workqueues();
out_reap:
	ublk_reap_exit();
out_compat:
	ublk_compat_exit();
	return ret;
}

static void __exit ublk_exit(void)
{
	/* The devices are children of the control device, so they go first. */
	ublk_remove_all();
	misc_deregister(&ublk_misc);
	ublk_destroy_workqueues();
	ublk_reap_exit();
	class_unregister(&ublk_chr_class);
	unregister_chrdev_region(ublk_chr_devt, UBLK_MINORS);
	ublk_compat_exit();
}

module_init(ublk_init);
module_exit(ublk_exit);

MODULE_DESCRIPTION("Userspace block device driver");
MODULE_LICENSE("GPL");
