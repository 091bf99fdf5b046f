// SPDX-License-Identifier: GPL-2.0
/*
 * UBLK_F_BATCH_IO: commands on many tags, from any thread.
 *
 * No command waits in a slot. Tags that requests have won go into a ring, and
 * FETCH_IO_CMDS, which stays pending, carries them to the server in buffers
 * that it has provided. Of several pending ones a single one is active: it has
 * task work on its way, which runs until the ring is empty.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>

#include "batch.h"

int ublk_batch_init(struct ublk_queue *q)
{
	unsigned int size = roundup_pow_of_two(q->depth);
	struct ublk_batch *b;

	b = kvzalloc(struct_size(b, tags, size), GFP_KERNEL_ACCOUNT);
	if (!b)
		return -ENOMEM;
	spin_lock_init(&b->lock);
	INIT_LIST_HEAD(&b->fetches);
	b->mask = size - 1;
	q->batch = b;
	return 0;
}

void ublk_batch_exit(struct ublk_queue *q)
{
	if (q->batch && q->batch->fetcher)
		put_task_struct(q->batch->fetcher);
	kvfree(q->batch);
	q->batch = NULL;
}

/* For the next server: what was on its way has been aborted. */
void ublk_batch_reset(struct ublk_queue *q)
{
	struct ublk_batch *b = q->batch;
	struct task_struct *fetcher;

	if (!b)
		return;
	spin_lock(&b->lock);
	fetcher = b->fetcher;
	b->fetcher = NULL;
	b->nr = 0;
	spin_unlock(&b->lock);
	if (fetcher)
		put_task_struct(fetcher);
}

/* A request has won the slot of @tag. It may have been taken back since. */
void ublk_batch_add_tag(struct ublk_queue *q, u16 tag)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch = NULL;

	ublk_race(UBLK_RACE_BATCH);
	spin_lock(&b->lock);
	if (likely(!ublk_io_transition(&q->ios[tag], UBLK_IO_REVOKED,
				       UBLK_IO_CANCELED))) {
		b->tags[(b->head + b->nr++) & b->mask] = tag;
		fetch = ublk_batch_activate(b);
	}
	spin_unlock(&b->lock);
	ublk_batch_schedule(fetch);
}

/*
 * Notes to which thread a tag goes. A queue is mostly served by one thread, so
 * there is seldom anything to do. b->lock is held.
 */
static void ublk_batch_set_daemon(struct ublk_io *io, struct task_struct *task)
{
	if (likely(io->daemon == task))
		return;
	if (io->daemon)
		put_task_struct(io->daemon);
	io->daemon = get_task_struct(task);
}

/*
 * Takes up to @max tags out of the ring for the current thread. If there is
 * none, the command is idle again; 0 then, or UBLK_IO_RES_ABORT if it is to end.
 */
int ublk_batch_take(struct ublk_queue *q, u16 *tags, unsigned int max)
{
	struct ublk_batch *b = q->batch;
	unsigned int i, n;
	int ret;

	spin_lock(&b->lock);
	n = min(b->nr, max);
	for (i = 0; i < n; i++) {
		tags[i] = b->tags[b->head++ & b->mask];
		ublk_batch_set_daemon(&q->ios[tags[i]], current);
	}
	b->nr -= n;
	ret = n;
	if (!n) {
		if (READ_ONCE(q->ub->canceling))
			ret = UBLK_IO_RES_ABORT;
		else
			b->active = NULL;
	}
	spin_unlock(&b->lock);
	return ret;
}

/* Drops the @i-th tag of the ring; b->lock is held. */
static void ublk_batch_remove_tag(struct ublk_batch *b, unsigned int i)
{
	for (; i + 1 < b->nr; i++)
		b->tags[(b->head + i) & b->mask] =
			b->tags[(b->head + i + 1) & b->mask];
	b->nr--;
}

/*
 * Makes the caller the owner of a request that is on its way. What is not in the
 * ring is in the hands of its sender, or of a delivery, which will find that.
 * False if it has arrived, or was taken back before.
 */
bool ublk_batch_revoke(struct ublk_queue *q, struct ublk_io *io)
{
	struct ublk_batch *b = q->batch;
	unsigned int i;
	bool won;

	spin_lock(&b->lock);
	for (i = 0; i < b->nr; i++)
		if (b->tags[(b->head + i) & b->mask] == io->tag)
			break;
	if (i < b->nr) {
		won = ublk_io_transition(io, UBLK_IO_DISPATCH, UBLK_IO_CANCELED);
		ublk_assert(won);
		ublk_batch_remove_tag(b, i);
	} else {
		won = ublk_io_transition(io, UBLK_IO_DISPATCH, UBLK_IO_REVOKED);
	}
	spin_unlock(&b->lock);
	return won;
}

/*
 * The thread that a request depends on: the one it was delivered to, or the one
 * that is to deliver it. b->lock is held.
 */
static struct task_struct *ublk_batch_holder(struct ublk_batch *b,
					     const struct ublk_io *io)
{
	if (atomic_read(&io->state) != UBLK_IO_DISPATCH)
		return io->daemon;
	return b->active ? b->active->task : b->fetcher;
}

/*
 * Whether a request will get no answer. Any thread may commit, so that the end
 * of one means nothing; a process that is gone has nothing more to commit. What
 * is in the ring while all fetch commands are being canceled stays there.
 */
bool ublk_batch_holder_gone(struct ublk_queue *q, struct ublk_io *io)
{
	struct ublk_batch *b = q->batch;
	struct task_struct *holder;
	bool gone;

	spin_lock(&b->lock);
	holder = ublk_batch_holder(b, io);
	gone = holder && ublk_process_gone(holder);
	if (!b->active && atomic_read(&io->state) == UBLK_IO_DISPATCH)
		gone |= READ_ONCE(q->ub->canceling);
	spin_unlock(&b->lock);
	return gone;
}

void ublk_batch_kill_holder(struct ublk_queue *q, struct ublk_io *io)
{
	struct ublk_batch *b = q->batch;
	struct task_struct *holder;

	spin_lock(&b->lock);
	holder = ublk_batch_holder(b, io);
	if (holder)
		send_sig(SIGKILL, holder, 0);
	spin_unlock(&b->lock);
}

/* A thread that fetches from this queue, with a reference, or NULL. */
struct task_struct *ublk_batch_get_fetcher(struct ublk_queue *q)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch;
	struct task_struct *task = NULL;

	spin_lock(&b->lock);
	fetch = list_first_entry_or_null(&b->fetches, struct ublk_fetch, node);
	if (fetch)
		task = get_task_struct(fetch->task);
	spin_unlock(&b->lock);
	return task;
}

/* Puts tags in DISPATCH back to where they came from, in order. */
void ublk_batch_put_back(struct ublk_queue *q, const u16 *tags, unsigned int n)
{
	struct ublk_batch *b = q->batch;

	spin_lock(&b->lock);
	while (n--) {
		struct ublk_io *io = &q->ios[tags[n]];

		if (unlikely(ublk_io_transition(io, UBLK_IO_REVOKED,
						UBLK_IO_CANCELED)))
			continue;
		b->tags[--b->head & b->mask] = tags[n];
		b->nr++;
	}
	spin_unlock(&b->lock);
}
