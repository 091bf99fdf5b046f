// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/ublkcN: the char device, which the server uses.
 */
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>

#include "internal.h"

static int ublk_ch_open(struct inode *inode, struct file *filp)
{
	struct ublk_device *ub =
		container_of(inode->i_cdev, struct ublk_device, cdev);

	if (test_and_set_bit(UBLK_DEV_OPEN, &ub->bits))
		return -EBUSY;
	/* Both references are dropped by ublk_release_work(). */
	__module_get(THIS_MODULE);
	get_device(&ub->dev);
	ub->opener = get_pid(task_tgid(current));
	filp->private_data = ub;
	/* Until the server is live, nothing else notices that it exits. */
	spin_lock(&ub->lock);
	ublk_watch(ub);
	spin_unlock(&ub->lock);
	return 0;
}

/*
 * The server has closed the device, or exited. Cleaning up may sleep for a long
 * time, and this may run in a thread that must not sleep or that the cleanup
 * depends on. It is therefore left to a work item.
 */
static int ublk_ch_release(struct inode *inode, struct file *filp)
{
	struct ublk_device *ub = filp->private_data;

	queue_work(ublk_wq, &ub->release_work);
	return 0;
}

/* Maps the descriptors of one queue, read only and into one process. */
static int ublk_ch_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct ublk_device *ub = filp->private_data;
	unsigned long area = ublk_desc_area(ub, UBLK_MAX_QUEUE_DEPTH);
	unsigned long size = vma->vm_end - vma->vm_start;
	unsigned long offset = vma->vm_pgoff << PAGE_SHIFT;
	unsigned long q_id;
	int ret = 0;

	if (vma->vm_flags & VM_WRITE)
		return -EPERM;
	if (vma->vm_pgoff > ULONG_MAX >> PAGE_SHIFT)
		return -EINVAL;
	spin_lock(&ub->lock);
	if (!ub->mm) {
		mmgrab(current->mm);
		ub->mm = current->mm;
	} else if (ub->mm != current->mm) {
		ret = -EINVAL;
	}
	spin_unlock(&ub->lock);
	if (ret)
		return ret;

	q_id = (offset - UBLKSRV_CMD_BUF_OFFSET) / area;
	if ((offset - UBLKSRV_CMD_BUF_OFFSET) % area ||
	    q_id >= ub->dev_info.nr_hw_queues)
		return -EINVAL;
	if (size != ublk_desc_area(ub, ub->dev_info.queue_depth))
		return -EINVAL;
	vm_flags_clear(vma, VM_MAYWRITE);
	return remap_pfn_range(vma, vma->vm_start,
			       virt_to_phys(ub->queues[q_id]->descs) >> PAGE_SHIFT,
			       size, vma->vm_page_prot);
}

static ssize_t ublk_ch_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	return ublk_user_copy(iocb, to, true);
}

static ssize_t ublk_ch_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	return ublk_user_copy(iocb, from, false);
}

const struct file_operations ublk_ch_fops = {
	.owner		= THIS_MODULE,
	.open		= ublk_ch_open,
	.release	= ublk_ch_release,
	.read_iter	= ublk_ch_read_iter,
	.write_iter	= ublk_ch_write_iter,
	.uring_cmd	= ublk_ch_uring_cmd,
	.mmap		= ublk_ch_mmap,
};
