// SPDX-License-Identifier: GPL-2.0
/*
 * UBLK_F_BATCH_IO: the ring of tags on their way to the server.
 *
 * With this flag, commands operate on many tags and may come from any thread.
 * No command is parked in a slot. Instead, tags whose slot a request has
 * claimed are added to a ring, and pending FETCH_IO_CMDS deliver them to the
 * server in provided buffers (see batch_fetch.c). Of several pending commands
 * only one is active: its task work is scheduled, and runs until the ring is
 * empty.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>

#include "batch.h"

/**
 * ublk_batch_init() - Allocate the batch state of a queue.
 * @q: the queue
 *
 * Context: Process context.
 *
 * Return: 0, or -ENOMEM.
 */
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

/**
 * ublk_batch_exit() - Free the batch state of a queue.
 * @q: the queue; it may have no batch state
 *
 * Context: Process context.
 */
void ublk_batch_exit(struct ublk_queue *q)
{
	if (q->batch && q->batch->fetcher)
		put_task_struct(q->batch->fetcher);
	kvfree(q->batch);
	q->batch = NULL;
}

/**
 * ublk_batch_reset() - Prepare the batch state for the next server.
 * @q: the queue; it may have no batch state
 *
 * All requests on their way have been aborted.
 *
 * Context: Process context.
 */
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

/**
 * ublk_batch_add_tag() - Queue a tag whose slot a request has claimed.
 * @q: the queue
 * @tag: the tag
 *
 * The request may have been taken back since it claimed the slot.
 *
 * Context: queue_rq().
 */
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
 * Records the thread that a tag is delivered to. A queue is usually served by
 * one thread, so this seldom changes. b->lock is held.
 */
static void ublk_batch_set_daemon(struct ublk_io *io, struct task_struct *task)
{
	if (likely(io->daemon == task))
		return;
	if (io->daemon)
		put_task_struct(io->daemon);
	io->daemon = get_task_struct(task);
}

/**
 * ublk_batch_take() - Take tags from the ring, for delivery to the current
 *   thread.
 * @q: the queue
 * @tags: receives the tags
 * @max: size of @tags
 *
 * If the ring is empty, the active command becomes idle, unless the server is
 * leaving.
 *
 * Context: Task work of the active command.
 *
 * Return: number of tags; 0 if the ring is empty; UBLK_IO_RES_ABORT if the
 *	command is to end.
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

/* Removes the @i-th tag from the ring. b->lock is held. */
static void ublk_batch_remove_tag(struct ublk_batch *b, unsigned int i)
{
	for (; i + 1 < b->nr; i++)
		b->tags[(b->head + i) & b->mask] =
			b->tags[(b->head + i + 1) & b->mask];
	b->nr--;
}

/**
 * ublk_batch_revoke() - Take back a request that is on its way to the server.
 * @q: the queue
 * @io: the slot
 *
 * A tag that is not in the ring is about to be added, or is being delivered.
 * The code that does so will find the slot REVOKED.
 *
 * Context: Any context that may take the lock of the batch state.
 *
 * Return: true if the caller owns the request now; false if it was delivered or
 *	taken back before.
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

/**
 * ublk_batch_holder_gone() - Check whether a request cannot be completed any
 *   more.
 * @q: the queue
 * @io: the slot
 *
 * Any thread may commit, so the exit of one thread does not matter, unlike that
 * of the process. A tag that is in the ring when all fetch commands have been
 * canceled stays there.
 *
 * Context: Caller holds ub->lock.
 *
 * Return: true if the process that holds the request has exited, or no command
 *	will deliver it.
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

/**
 * ublk_batch_kill_holder() - Kill the process that holds a request.
 * @q: the queue
 * @io: the slot
 *
 * Context: Caller holds ub->lock.
 */
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

/**
 * ublk_batch_set_fetcher() - Record the current thread as the last one to fetch
 *   or prepare.
 * @q: the queue
 *
 * Requests that are on their way to the server depend on the process of that
 * thread.
 *
 * Context: Task context of the submitter.
 */
void ublk_batch_set_fetcher(struct ublk_queue *q)
{
	struct ublk_batch *b = q->batch;
	struct task_struct *before;

	spin_lock(&b->lock);
	before = b->fetcher;
	b->fetcher = get_task_struct(current);
	spin_unlock(&b->lock);
	if (before)
		put_task_struct(before);
}

/**
 * ublk_batch_get_fetcher() - Get a thread that fetches from a queue.
 * @q: the queue
 *
 * Context: Any context.
 *
 * Return: the thread, with a reference, or NULL.
 */
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

/**
 * ublk_batch_put_back() - Return tags to the front of the ring.
 * @q: the queue
 * @tags: tags in state DISPATCH
 * @n: number of tags
 *
 * Keeps their order. Drops tags whose request was taken back.
 *
 * Context: Task work of the active command.
 */
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
