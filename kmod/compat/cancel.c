// SPDX-License-Identifier: GPL-2.0
/*
 * Cancellation of commands whose task or ring goes away.
 *
 * Linux 6.7 and later ask a driver to let go of its parked commands when the
 * task that sent them exits or executes another program, or their ring closes.
 * Earlier kernels wait for the driver to do so unasked. Here a monitor stands
 * in for the kernel: as long as commands are parked it looks, ten times a
 * second, at the tasks and rings that they belong to, and sends the driver
 * IO_URING_F_CANCEL for those which leave.
 *
 * A command may be completed at any time by anybody while the monitor works on
 * it, and its memory serves another command then. Hence the parked commands are
 * kept in lists: completing takes a command off its list, under the lock that
 * the monitor holds to look at it. The driver is called without the lock. What
 * is completed during the call is only noted, and really completed after it,
 * by the monitor.
 */
#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "cancel.h"

/* What cancel.h has put the function above in place of. */
#undef io_uring_cmd_done

#define UBLK_CANCEL_PERIOD	(HZ / 10)
#define UBLK_CANCEL_SHARD_BITS	6

/*
 * The parked commands of some rings; a ring has all of its in one shard, so
 * that threads which serve rings of their own seldom meet.
 */
struct ublk_cancel_shard {
	spinlock_t		lock;		/* all below, and the flag */
	struct hlist_head	parked;
	struct hlist_head	unseen;		/* by the monitor, in this round */

	/* The command the driver is asked to cancel, and what it made of it. */
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

	/* A monitor that stops has looked here before; see there. */
	if (!READ_ONCE(ublk_cancel_watching))
		queue_delayed_work(ublk_cancel_wq, &ublk_cancel_work,
				   UBLK_CANCEL_PERIOD);
}

/* In place of io_uring_cmd_done() */
void ublk_compat_cancelable_done(struct io_uring_cmd *cmd, s32 ret,
				 unsigned int issue_flags)
{
	struct ublk_cancel_shard *shard = ublk_cancel_shard(cmd);
	bool asked = false;

	/* Set by the one who parked it, who handed it on to us after that. */
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
 * Whether the kernel wants the command back. While it is parked it holds its
 * ring and, with that, its task; the task counts it in task->io_uring.
 */
static bool ublk_cancel_wanted(struct io_uring_cmd *cmd)
{
	struct task_struct *task = io_uring_cmd_get_task(cmd);
	struct io_ring_ctx *ring = io_uring_cmd_ctx_handle(cmd);

	/* in_idle: the task waits for its commands, as for execve() */
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

/* Looks at each command once. True if there is any. */
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
	 * Before the looking: who parks a command in a shard that is done with
	 * sees this, thanks to the shard's lock, and starts the monitor anew.
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

int ublk_compat_init(void)
{
	unsigned int i;

	BUILD_BUG_ON(sizeof(struct ublk_compat_pdu) >
		     sizeof_field(struct io_uring_cmd, pdu));

	for (i = 0; i < ARRAY_SIZE(ublk_cancel_shards); i++)
		spin_lock_init(&ublk_cancel_shards[i].lock);
	INIT_DELAYED_WORK(&ublk_cancel_work, ublk_cancel_monitor);
	/* Requests fail only after this has run: memory may wait for it. */
	ublk_cancel_wq = alloc_workqueue("ublk-cancel",
					 WQ_UNBOUND | WQ_MEM_RECLAIM, 1);
	return ublk_cancel_wq ? 0 : -ENOMEM;
}

/* No char device is open any more, so nothing is parked. */
void ublk_compat_exit(void)
{
	cancel_delayed_work_sync(&ublk_cancel_work);
	destroy_workqueue(ublk_cancel_wq);
}
