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
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

/* Tags per completion, and elements that a commit reads at a time. */
#define UBLK_BATCH_TAGS		128
#define UBLK_BATCH_CHUNK_BYTES	512

#define UBLK_BATCH_F_ALL	(UBLK_BATCH_F_HAS_ZONE_LBA | \
				 UBLK_BATCH_F_HAS_BUF_ADDR | \
				 UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK)

/* A pending FETCH_IO_CMDS. */
struct ublk_fetch {
	struct list_head	node;		/* ublk_batch.fetches */
	struct ublk_queue	*q;
	struct io_uring_cmd	*cmd;
	struct task_struct	*task;		/* that sent it and runs its task work */
	u16			buf_group;
	bool			retired;	/* is being completed */
};

struct ublk_batch {
	spinlock_t		lock;		/* all of this */
	struct list_head	fetches;	/* the active one among them */
	struct ublk_fetch	*active;
	struct task_struct	*fetcher;	/* the thread that fetched last */
	/* Tags on their way; none is in it twice. */
	unsigned int		head;
	unsigned int		nr;
	unsigned int		mask;
	u16			tags[];
};

/* One element of an array, taken apart. */
struct ublk_elem {
	u16			tag;
	u16			buf_index;
	int			result;
	u64			buf_addr;
	u64			zone_lba;
};

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

static void ublk_fetch_free(struct ublk_fetch *fetch)
{
	put_task_struct(fetch->task);
	kfree(fetch);
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

/* Picks who is to carry the tags in the ring; b->lock is held. */
static struct ublk_fetch *ublk_batch_activate(struct ublk_batch *b)
{
	if (b->active || !b->nr)
		return NULL;
	b->active = list_first_entry_or_null(&b->fetches, struct ublk_fetch,
					     node);
	return b->active;
}

static void ublk_batch_tw(struct io_tw_req tw_req, io_tw_token_t tw);

/* An active command stays until its task work has run: no lock is needed. */
static void ublk_batch_kick(struct ublk_fetch *fetch)
{
	if (fetch)
		io_uring_cmd_complete_in_task(fetch->cmd, ublk_batch_tw);
}

/* A request has won the slot of @tag. It may have been taken back since. */
void ublk_batch_send(struct ublk_queue *q, u16 tag)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch = NULL;

	ublk_race(UBLK_RACE_BATCH);
	spin_lock(&b->lock);
	if (likely(!ublk_io_moves(&q->ios[tag], UBLK_IO_REVOKED,
				  UBLK_IO_CANCELED))) {
		b->tags[(b->head + b->nr++) & b->mask] = tag;
		fetch = ublk_batch_activate(b);
	}
	spin_unlock(&b->lock);
	ublk_batch_kick(fetch);
}

/*
 * Notes to which thread a tag goes. A queue is mostly served by one thread, so
 * there is seldom anything to do. b->lock is held.
 */
static void ublk_batch_hand_to(struct ublk_io *io, struct task_struct *task)
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
static int ublk_batch_take(struct ublk_queue *q, u16 *tags, unsigned int max)
{
	struct ublk_batch *b = q->batch;
	unsigned int i, n;
	int ret;

	spin_lock(&b->lock);
	n = min(b->nr, max);
	for (i = 0; i < n; i++) {
		tags[i] = b->tags[b->head++ & b->mask];
		ublk_batch_hand_to(&q->ios[tags[i]], current);
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
static void ublk_batch_drop(struct ublk_batch *b, unsigned int i)
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
		won = ublk_io_moves(io, UBLK_IO_DISPATCH, UBLK_IO_CANCELED);
		ublk_assert(won);
		ublk_batch_drop(b, i);
	} else {
		won = ublk_io_moves(io, UBLK_IO_DISPATCH, UBLK_IO_REVOKED);
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
struct task_struct *ublk_batch_fetcher(struct ublk_queue *q)
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
static void ublk_batch_untake(struct ublk_queue *q, const u16 *tags,
			      unsigned int n)
{
	struct ublk_batch *b = q->batch;

	spin_lock(&b->lock);
	while (n--) {
		struct ublk_io *io = &q->ios[tags[n]];

		if (unlikely(ublk_io_moves(io, UBLK_IO_REVOKED,
					   UBLK_IO_CANCELED)))
			continue;
		b->tags[--b->head & b->mask] = tags[n];
		b->nr++;
	}
	spin_unlock(&b->lock);
}

/* The server will not hear of these now: the slots are as before. */
static void ublk_batch_undo(struct ublk_queue *q, struct io_uring_cmd *cmd,
			    u16 *tags, unsigned int n, unsigned int issue_flags)
{
	unsigned int i, left = 0;

	for (i = 0; i < n; i++) {
		struct ublk_io *io = &q->ios[tags[i]];

		/* Somebody may have guessed the tag and committed it. */
		if (!ublk_io_moves(io, UBLK_IO_SERVED, UBLK_IO_DISPATCH))
			continue;
		ublk_auto_unregister(io, cmd, issue_flags);
		tags[left++] = tags[i];
	}
	ublk_batch_untake(q, tags, left);
}

/* Makes requests ready; drops from @tags those that cannot be delivered. */
static unsigned int ublk_batch_prepare(struct ublk_queue *q,
				       struct io_uring_cmd *cmd, u16 *tags,
				       unsigned int n, unsigned int issue_flags)
{
	unsigned int i, ready = 0;

	for (i = 0; i < n; i++) {
		struct ublk_io *io = &q->ios[tags[i]];
		int ret = UBLK_TAKEN_BACK;

		if (likely(ublk_io_moves(io, UBLK_IO_DISPATCH, UBLK_IO_BUSY)))
			ret = ublk_prepare_delivery(q, io, cmd, issue_flags);
		if (unlikely(ret == UBLK_TAKEN_BACK)) {
			atomic_set(&io->state, UBLK_IO_CANCELED);
			continue;
		}
		if (unlikely(ret < 0)) {
			ublk_undeliverable(q, io, issue_flags);
			continue;
		}
		atomic_set_release(&io->state, UBLK_IO_SERVED);
		tags[ready++] = tags[i];
	}
	return ready;
}

/*
 * Carries some tags to the server. Positive if there may be more, 0 if there
 * are none, or what the command is to end with.
 */
static int ublk_batch_deliver(struct ublk_fetch *fetch, unsigned int issue_flags)
{
	struct ublk_queue *q = fetch->q;
	struct io_uring_cmd *cmd = fetch->cmd;
	u16 tags[UBLK_BATCH_TAGS];
	struct io_br_sel sel;
	unsigned int n, fit;
	size_t len;
	int ret;

	ret = ublk_batch_take(q, tags, ARRAY_SIZE(tags));
	if (ret <= 0)
		return ret;
	n = ret;

	len = n * sizeof(*tags);
	sel = io_uring_cmd_buffer_select(cmd, fetch->buf_group, &len,
					 issue_flags);
	if (sel.val <= 0) {
		ublk_batch_untake(q, tags, n);
		return -ENOBUFS;
	}
	fit = min_t(size_t, n, len / sizeof(*tags));
	if (fit < n)
		ublk_batch_untake(q, tags + fit, n - fit);
	n = ublk_batch_prepare(q, cmd, tags, fit, issue_flags);
	if (n && !copy_to_user(sel.addr, tags, n * sizeof(*tags))) {
		sel.val = n * sizeof(*tags);
		if (!io_uring_mshot_cmd_post_cqe(cmd, &sel, issue_flags))
			return 1;
		ublk_batch_undo(q, cmd, tags, n, issue_flags);
		return -ENOBUFS;
	}
	/* Nothing is posted: gives the buffer back. */
	sel.val = 0;
	io_uring_mshot_cmd_post_cqe(cmd, &sel, issue_flags);
	if (fit && !n)
		return 1;
	ublk_batch_undo(q, cmd, tags, n, issue_flags);
	return -ENOBUFS;
}

/* The active command ends; another one takes over what it leaves. */
static void ublk_batch_end_active(struct ublk_fetch *fetch, int ret,
				  unsigned int issue_flags)
{
	struct ublk_batch *b = fetch->q->batch;
	struct ublk_fetch *next;

	spin_lock(&b->lock);
	fetch->retired = true;
	list_del(&fetch->node);
	b->active = NULL;
	next = ublk_batch_activate(b);
	spin_unlock(&b->lock);
	ublk_batch_kick(next);
	io_uring_cmd_done(fetch->cmd, ret, issue_flags);
	ublk_fetch_free(fetch);
}

static void ublk_batch_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	struct ublk_fetch *fetch =
		io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch;
	unsigned int issue_flags = IO_URING_CMD_TASK_WORK_ISSUE_FLAGS;
	int ret;

	if (unlikely(tw.cancel)) {
		ublk_server_leaves(fetch->q->ub);
		ret = UBLK_IO_RES_ABORT;
	} else {
		do
			ret = ublk_batch_deliver(fetch, issue_flags);
		while (ret > 0);
	}
	/* If 0, the command may be gone by now. */
	if (ret < 0)
		ublk_batch_end_active(fetch, ret, issue_flags);
}

/* Takes an idle command off the queue; b->lock is held. */
static bool ublk_batch_retire(struct ublk_batch *b, struct ublk_fetch *fetch)
{
	if (b->active == fetch || fetch->retired)
		return false;
	fetch->retired = true;
	list_del(&fetch->node);
	return true;
}

/*
 * io_uring cancels this command. An active one ends with its task work. The
 * structure is there as long as the command is on io_uring's list of what can
 * be canceled, which io_uring_cmd_done() takes it from.
 */
void ublk_batch_cancel_fetch(struct ublk_fetch *fetch, unsigned int issue_flags)
{
	struct ublk_batch *b = fetch->q->batch;
	bool retired;

	spin_lock(&b->lock);
	retired = ublk_batch_retire(b, fetch);
	spin_unlock(&b->lock);
	if (!retired)
		return;
	io_uring_cmd_done(fetch->cmd, UBLK_IO_RES_ABORT, issue_flags);
	ublk_fetch_free(fetch);
}

static void ublk_fetch_abort_tw(struct io_tw_req tw_req, io_tw_token_t tw)
{
	struct io_uring_cmd *cmd = io_uring_cmd_from_tw(tw_req);
	struct ublk_fetch *fetch =
		io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch;

	io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT,
			  IO_URING_CMD_TASK_WORK_ISSUE_FLAGS);
	ublk_fetch_free(fetch);
}

/*
 * Cancels what is pending on a queue whose device takes no more requests. See
 * ublk_slot_cancel_outside().
 */
void ublk_batch_cancel_fetches(struct ublk_queue *q)
{
	struct ublk_batch *b = q->batch;
	struct ublk_fetch *fetch, *next;
	LIST_HEAD(idle);

	if (!b)
		return;
	spin_lock(&b->lock);
	list_for_each_entry_safe(fetch, next, &b->fetches, node)
		if (ublk_batch_retire(b, fetch))
			list_add_tail(&fetch->node, &idle);
	spin_unlock(&b->lock);
	/* A command that is completed may be gone, and its structure with it. */
	list_for_each_entry_safe(fetch, next, &idle, node)
		io_uring_cmd_complete_in_task(fetch->cmd, ublk_fetch_abort_tw);
}

static int ublk_batch_fetch(struct ublk_queue *q, struct io_uring_cmd *cmd,
			    const struct ublk_batch_io *args,
			    unsigned int issue_flags)
{
	struct ublk_batch *b = q->batch;
	struct task_struct *before;
	struct ublk_fetch *fetch, *active;
	bool cancel;

	if (args->elem_bytes != sizeof(u16) || args->flags)
		return -EINVAL;
	if (!(cmd->flags & IORING_URING_CMD_MULTISHOT))
		return -EINVAL;
	/* The memory must not be had by writing to this disk. */
	fetch = kzalloc(sizeof(*fetch), GFP_NOIO);
	if (!fetch)
		return -ENOMEM;
	fetch->q = q;
	fetch->cmd = cmd;
	fetch->task = get_task_struct(current);
	fetch->buf_group = READ_ONCE(cmd->sqe->buf_index);
	io_uring_cmd_to_pdu(cmd, struct ublk_cmd_pdu)->fetch = fetch;
	io_uring_cmd_mark_cancelable(cmd, issue_flags);

	spin_lock(&b->lock);
	cancel = READ_ONCE(q->ub->canceling);
	if (!cancel)
		list_add_tail(&fetch->node, &b->fetches);
	fetch->retired = cancel;
	before = b->fetcher;
	b->fetcher = get_task_struct(current);
	active = ublk_batch_activate(b);
	spin_unlock(&b->lock);
	if (before)
		put_task_struct(before);
	ublk_batch_kick(active);
	if (cancel) {
		io_uring_cmd_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
		ublk_fetch_free(fetch);
	}
	return -EIOCBQUEUED;
}

static unsigned int ublk_elem_bytes(const struct ublk_batch_io *args)
{
	unsigned int bytes = sizeof(struct ublk_elem_header);

	if (args->flags & UBLK_BATCH_F_HAS_BUF_ADDR)
		bytes += sizeof(u64);
	if (args->flags & UBLK_BATCH_F_HAS_ZONE_LBA)
		bytes += sizeof(u64);
	return bytes;
}

/* What PREP_IO_CMDS and COMMIT_IO_CMDS have in common. */
static int ublk_batch_check(const struct ublk_queue *q,
			    const struct ublk_batch_io *args)
{
	if (args->flags & ~UBLK_BATCH_F_ALL)
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_BUF_ADDR) && ublk_no_copy(q))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_ZONE_LBA) &&
	    !(q->flags & UBLK_F_ZONED))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK) &&
	    !(q->flags & UBLK_F_AUTO_BUF_REG))
		return -EINVAL;
	if (args->elem_bytes != ublk_elem_bytes(args))
		return -EINVAL;
	if (args->nr_elem > q->depth)
		return -E2BIG;
	return 0;
}

static int ublk_parse_elem(const struct ublk_queue *q,
			   const struct ublk_batch_io *args, const void *p,
			   struct ublk_elem *elem)
{
	const struct ublk_elem_header *header = p;
	const u64 *extra = p + sizeof(*header);

	if (header->tag >= q->depth)
		return -EINVAL;
	elem->tag = array_index_nospec(header->tag, q->depth);
	elem->buf_index = header->buf_index;
	elem->result = header->result;
	elem->buf_addr = 0;
	elem->zone_lba = U64_MAX;
	if (args->flags & UBLK_BATCH_F_HAS_BUF_ADDR)
		elem->buf_addr = *extra++;
	if (args->flags & UBLK_BATCH_F_HAS_ZONE_LBA)
		elem->zone_lba = *extra;
	if (!ublk_no_copy(q) && !elem->buf_addr)
		return -EINVAL;
	return 0;
}

/* Where the data of the next request of this tag goes. */
static void ublk_elem_set_buf(const struct ublk_queue *q,
			      const struct ublk_batch_io *args,
			      const struct ublk_elem *elem, struct ublk_io *io)
{
	io->buf_addr = elem->buf_addr;
	if (!(q->flags & UBLK_F_AUTO_BUF_REG))
		return;
	io->auto_reg.index = elem->buf_index;
	if (args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK)
		io->auto_reg.flags = UBLK_AUTO_BUF_REG_FALLBACK;
}

/* All or none: every slot is reserved before the first is armed. */
static int ublk_batch_prep(struct ublk_queue *q, const void __user *uelems,
			   const struct ublk_batch_io *args,
			   unsigned int issue_flags)
{
	struct ublk_elem elem;
	unsigned int i;
	void *elems;
	int ret;

	ret = ublk_batch_check(q, args);
	if (ret)
		return ret;
	if (!args->nr_elem)
		return 0;
	elems = vmemdup_user(uelems, args->nr_elem * args->elem_bytes);
	if (IS_ERR(elems))
		return PTR_ERR(elems);

	for (i = 0; i < args->nr_elem; i++) {
		ret = ublk_parse_elem(q, args, elems + i * args->elem_bytes,
				      &elem);
		if (!ret)
			ret = ublk_slot_reserve(q, &q->ios[elem.tag]);
		if (ret)
			break;
		ublk_elem_set_buf(q, args, &elem, &q->ios[elem.tag]);
	}
	if (ret) {
		while (i--) {
			ublk_parse_elem(q, args, elems + i * args->elem_bytes,
					&elem);
			ublk_slot_unreserve(&q->ios[elem.tag]);
		}
		goto out;
	}
	for (i = 0; i < args->nr_elem; i++) {
		ublk_parse_elem(q, args, elems + i * args->elem_bytes, &elem);
		ublk_slot_fetched(q, &q->ios[elem.tag], issue_flags);
	}
out:
	kvfree(elems);
	return ret;
}

static int ublk_commit_elem(struct ublk_queue *q, struct io_uring_cmd *cmd,
			    const struct ublk_batch_io *args, const void *p,
			    unsigned int issue_flags)
{
	struct ublk_elem elem;
	struct request *req;
	struct ublk_io *io;
	int ret;

	ret = ublk_parse_elem(q, args, p, &elem);
	if (ret)
		return ret;
	io = &q->ios[elem.tag];
	if (!ublk_io_moves(io, UBLK_IO_SERVED, UBLK_IO_BUSY))
		return -EBUSY;
	if (unlikely(!ublk_take_result(q, io, elem.buf_addr, elem.zone_lba,
				       &elem.result)))
		return -ENODEV;
	ublk_auto_unregister(io, cmd, issue_flags);
	ublk_elem_set_buf(q, args, &elem, io);
	req = io->req;
	ublk_slot_arm(q, io, issue_flags);
	ublk_race(UBLK_RACE_COMMIT);
	ublk_finish(q, io, req, elem.result);
	return 0;
}

/* Returns how many bytes of the array were taken in. */
static int ublk_batch_commit(struct ublk_queue *q, struct io_uring_cmd *cmd,
			     const void __user *uelems,
			     const struct ublk_batch_io *args,
			     unsigned int issue_flags)
{
	u64 chunk[UBLK_BATCH_CHUNK_BYTES / sizeof(u64)];
	unsigned int per_chunk, done = 0, n, i;
	int ret;

	ret = ublk_batch_check(q, args);
	if (ret)
		return ret;
	per_chunk = sizeof(chunk) / args->elem_bytes;
	while (done < args->nr_elem) {
		n = min(per_chunk, args->nr_elem - done);
		if (copy_from_user(chunk, uelems + done * args->elem_bytes,
				   n * args->elem_bytes)) {
			ret = -EFAULT;
			break;
		}
		for (i = 0; i < n && !ret; i++)
			ret = ublk_commit_elem(q, cmd, args,
					       (void *)chunk + i * args->elem_bytes,
					       issue_flags);
		if (ret) {
			done += i - 1;
			break;
		}
		done += n;
	}
	return done ? done * args->elem_bytes : ret;
}

/* A command on a single tag: first of all that has to exist. */
static int ublk_batch_refuse(const struct ublk_device *ub,
			     struct io_uring_cmd *cmd)
{
	const struct ublksrv_io_cmd *src =
		ublk_sqe_cmd(cmd, struct ublksrv_io_cmd);

	if (READ_ONCE(src->q_id) >= ub->dev_info.nr_hw_queues ||
	    READ_ONCE(src->tag) >= ub->dev_info.queue_depth)
		return -EINVAL;
	return -EOPNOTSUPP;
}

int ublk_batch_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
			 unsigned int issue_flags)
{
	const struct ublk_batch_io *src = ublk_sqe_cmd(cmd, struct ublk_batch_io);
	const struct ublk_batch_io args = {
		.q_id		= READ_ONCE(src->q_id),
		.flags		= READ_ONCE(src->flags),
		.nr_elem	= READ_ONCE(src->nr_elem),
		.elem_bytes	= READ_ONCE(src->elem_bytes),
	};
	const void __user *elems = u64_to_user_ptr(ublk_sqe_addr(cmd));
	struct ublk_queue *q;

	switch (cmd->cmd_op) {
	case UBLK_U_IO_REGISTER_IO_BUF:
	case UBLK_U_IO_UNREGISTER_IO_BUF:
		return ublk_io_uring_cmd(ub, cmd, issue_flags);
	case UBLK_U_IO_PREP_IO_CMDS:
	case UBLK_U_IO_COMMIT_IO_CMDS:
	case UBLK_U_IO_FETCH_IO_CMDS:
		break;
	default:
		return ublk_batch_refuse(ub, cmd);
	}
	if (args.q_id >= ub->dev_info.nr_hw_queues)
		return -EINVAL;
	q = ub->queues[array_index_nospec(args.q_id, ub->dev_info.nr_hw_queues)];

	switch (cmd->cmd_op) {
	case UBLK_U_IO_PREP_IO_CMDS:
		return ublk_batch_prep(q, elems, &args, issue_flags);
	case UBLK_U_IO_COMMIT_IO_CMDS:
		return ublk_batch_commit(q, cmd, elems, &args, issue_flags);
	default:
		return ublk_batch_fetch(q, cmd, &args, issue_flags);
	}
}
