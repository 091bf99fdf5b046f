// SPDX-License-Identifier: GPL-2.0
/*
 * Cancellation of commands whose task or ring goes away.
 *
 * Linux 6.7 and later ask a driver to complete its parked commands when the
 * task that sent them exits or executes another program, or when their ring is
 * closed. Earlier kernels wait for the driver to do so on its own. Here a
 * monitor takes the place of the kernel: while commands are parked, it checks
 * their tasks and rings ten times per second, and calls the driver with
 * IO_URING_F_CANCEL for those that are going away.
 *
 * A command may be completed at any time while the monitor handles it, and its
 * memory may then be reused for another command. The parked commands are
 * therefore in lists: completing a command removes it from its list, under the
 * lock that the monitor holds while it looks at the command. The driver is
 * called without that lock. If the command is completed during the call, this
 * is only recorded, and the monitor completes it afterwards.
 */
#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "cancel.h"

/* In this file, the function of the kernel. */
#undef io_uring_cmd_done

#define UBLK_CANCEL_PERIOD	(HZ / 10)
#define UBLK_CANCEL_SHARD_BITS	6

/*
 * The parked commands of some rings. All commands of a ring are in one shard, so
 * that threads with a ring each rarely contend for a lock.
 */
struct ublk_cancel_shard {
	spinlock_t		lock;		/* protects all of this, and the flag */
	struct hlist_head	parked;
	struct hlist_head	unseen;		/* not checked yet in this scan */

	/* The command that is being canceled, and its result if completed. */
	struct io_uring_cmd	*asked;
	bool			completed;
	s32			result;
} ____cacheline_aligned_in_smp;

static struct ublk_cancel_shard ublk_cancel_shards[1 << UBLK_CANCEL_SHARD_BITS];
static struct workqueue_struct *ublk_cancel_wq;
static struct delayed_work ublk_cancel_work;
static bool ublk_cancel_watching;

static struct ublk_cancel_shard *ublk_cancel_shard(struct io_uring_cmd *cmd)
{
	return &ublk_cancel_shards[hash_ptr(io_uring_cmd_ctx_handle(cmd),
					    UBLK_CANCEL_SHARD_BITS)];
}

static struct hlist_node *ublk_cancel_node(struct io_uring_cmd *cmd)
{
	return &io_uring_cmd_to_pdu(cmd, struct ublk_compat_pdu)->node;
}

static struct io_uring_cmd *ublk_cancel_cmd(struct hlist_node *node)
{
	void *pdu = container_of(node, struct ublk_compat_pdu, node);

	return container_of(pdu, struct io_uring_cmd, pdu);
}

/**
 * io_uring_cmd_mark_cancelable() - Make a parked command cancelable.
 * @cmd: the command
 * @issue_flags: io_uring issue flags of the caller
 *
 * As in later kernels, io_uring_cmd_done() undoes this.
 *
 * Context: Task context of the submitter.
 */
void io_uring_cmd_mark_cancelable(struct io_uring_cmd *cmd,
				  unsigned int issue_flags)
{
	struct ublk_cancel_shard *shard = ublk_cancel_shard(cmd);

	spin_lock(&shard->lock);
	if (!(cmd->flags & IORING_URING_CMD_CANCELABLE)) {
		cmd->flags |= IORING_URING_CMD_CANCELABLE;
		hlist_add_head(ublk_cancel_node(cmd), &shard->parked);
	}
	spin_unlock(&shard->lock);

	/*
	 * See ublk_cancel_monitor() for why this does not miss a monitor that
	 * stops.
	 */
	if (!READ_ONCE(ublk_cancel_watching))
		queue_delayed_work(ublk_cancel_wq, &ublk_cancel_work,
				   UBLK_CANCEL_PERIOD);
}

/**
 * ublk_compat_cancelable_done() - Complete a command, which may be cancelable.
 * @cmd: the command
 * @ret: its result
 * @issue_flags: io_uring issue flags of the caller
 *
 * Replaces io_uring_cmd_done() in the driver.
 *
 * Context: As io_uring_cmd_done().
 */
void ublk_compat_cancelable_done(struct io_uring_cmd *cmd, s32 ret,
				 unsigned int issue_flags)
{
	struct ublk_cancel_shard *shard = ublk_cancel_shard(cmd);
	bool asked = false;

	/*
	 * The flag was set when the command was parked, before it was handed to
	 * this context.
	 */
	if (cmd->flags & IORING_URING_CMD_CANCELABLE) {
		spin_lock(&shard->lock);
		hlist_del_init(ublk_cancel_node(cmd));
		cmd->flags &= ~IORING_URING_CMD_CANCELABLE;
		asked = shard->asked == cmd;
		if (asked) {
			shard->completed = true;
			shard->result = ret;
		}
		spin_unlock(&shard->lock);
	}
	if (!asked)
		io_uring_cmd_done(cmd, ret, 0, issue_flags);
}

/*
 * Whether the kernel needs the command to be completed. While it is parked it
 * holds a reference to its ring, and thereby its task, which counts it in
 * task->io_uring.
 */
static bool ublk_cancel_wanted(struct io_uring_cmd *cmd)
{
	struct task_struct *task = io_uring_cmd_get_task(cmd);
	struct io_ring_ctx *ring = io_uring_cmd_ctx_handle(cmd);

	/* in_idle: the task waits for its commands, as in execve(). */
	return (READ_ONCE(task->flags) & PF_EXITING) ||
	       atomic_read(&task->io_uring->in_idle) ||
	       percpu_ref_is_dying(&ring->refs);
}

static void ublk_cancel_request(struct ublk_cancel_shard *shard,
				struct io_uring_cmd *cmd)
	__must_hold(&shard->lock)
{
	bool completed;
	s32 result;

	shard->asked = cmd;
	shard->completed = false;
	spin_unlock(&shard->lock);

	cmd->file->f_op->uring_cmd(cmd,
				   IO_URING_F_CANCEL | IO_URING_F_UNLOCKED);

	spin_lock(&shard->lock);
	shard->asked = NULL;
	completed = shard->completed;
	result = shard->result;
	if (!completed)
		return;
	spin_unlock(&shard->lock);
	io_uring_cmd_done(cmd, result, 0, IO_URING_F_UNLOCKED);
	spin_lock(&shard->lock);
}

/* Checks each command once. Returns true if there is any. */
static bool ublk_cancel_scan(struct ublk_cancel_shard *shard)
{
	bool found;

	spin_lock(&shard->lock);
	hlist_move_list(&shard->parked, &shard->unseen);
	found = !hlist_empty(&shard->unseen);
	while (!hlist_empty(&shard->unseen)) {
		struct hlist_node *node = shard->unseen.first;
		struct io_uring_cmd *cmd = ublk_cancel_cmd(node);

		hlist_del(node);
		hlist_add_head(node, &shard->parked);
		if (ublk_cancel_wanted(cmd))
			ublk_cancel_request(shard, cmd);
		cond_resched_lock(&shard->lock);
	}
	spin_unlock(&shard->lock);
	return found;
}

static void ublk_cancel_monitor(struct work_struct *work)
{
	bool found = false;
	unsigned int i;

	/*
	 * Cleared before the scan. A thread that parks a command in a shard
	 * after that was scanned sees it cleared, because of the lock of the
	 * shard, and starts the monitor again.
	 */
	WRITE_ONCE(ublk_cancel_watching, false);
	for (i = 0; i < ARRAY_SIZE(ublk_cancel_shards); i++)
		found |= ublk_cancel_scan(&ublk_cancel_shards[i]);
	if (found) {
		WRITE_ONCE(ublk_cancel_watching, true);
		queue_delayed_work(ublk_cancel_wq, &ublk_cancel_work,
				   UBLK_CANCEL_PERIOD);
	}
}

/**
 * ublk_compat_init() - Set up the monitor.
 *
 * Context: Module initialization.
 *
 * Return: 0, or -ENOMEM.
 */
int ublk_compat_init(void)
{
	unsigned int i;

	BUILD_BUG_ON(sizeof(struct ublk_compat_pdu) >
		     sizeof_field(struct io_uring_cmd, pdu));

	for (i = 0; i < ARRAY_SIZE(ublk_cancel_shards); i++)
		spin_lock_init(&ublk_cancel_shards[i].lock);
	INIT_DELAYED_WORK(&ublk_cancel_work, ublk_cancel_monitor);
	/*
	 * Requests fail only after this has run, and reclaiming memory may wait
	 * for them.
	 */
	ublk_cancel_wq = alloc_workqueue("ublk-cancel",
					 WQ_UNBOUND | WQ_MEM_RECLAIM, 1);
	return ublk_cancel_wq ? 0 : -ENOMEM;
}

/**
 * ublk_compat_exit() - Stop and free the monitor.
 *
 * No char device is open, so no command is parked.
 *
 * Context: Module exit.
 */
void ublk_compat_exit(void)
{
	cancel_delayed_work_sync(&ublk_cancel_work);
	destroy_workqueue(ublk_cancel_wq);
}
