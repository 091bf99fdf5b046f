// SPDX-License-Identifier: GPL-2.0
/*
 * Memory that clients share with the server (UBLK_F_SHMEM_ZC).
 *
 * REG_BUF pins a buffer of the server. Direct I/O of a client on the same pages
 * is recognised by its page frames. The server then gets the offset in the
 * buffer instead of the data.
 *
 * A tree maps page frames to ranges of buffers. It is read for every request
 * under RCU, and changed under ublk_shmem.mutex, an innermost lock. Requests
 * are not stopped for a change: a buffer is used only while it is marked live,
 * and UNREG_BUF, having cleared that mark, waits until the server holds no
 * request that the buffer describes. So neither command depends on a server, or
 * on its successor, which may get no requests for a long time.
 */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

#define UBLK_SHMEM_MAX_BYTES	SZ_4G
#define UBLK_SHMEM_MAX_INDEX	((u32)UBLK_SHMEM_ZC_IDX_MASK)

/* Pages to pin before checking for signals. */
#define UBLK_SHMEM_PIN_BATCH	1024UL

/* Interval at which UNREG_BUF checks, in addition to wake-ups. */
#define UBLK_SHMEM_RECHECK	(HZ / 50 + 1)

/* The buffers of a device. */
struct ublk_shmem {
	struct maple_tree	ranges;	/* ublk_shmem_range by page frame */
	struct mutex		mutex;
	struct xarray		bufs;		/* by index */
};

/* Page frames that are contiguous, also in the buffer. */
struct ublk_shmem_range {
	struct ublk_shmem_buf	*buf;
	unsigned long		pfn;
	u32			nr_pages;
	u32			first_page;	/* within the buffer */
};

/* A registered buffer. */
struct ublk_shmem_buf {
	struct rcu_head		rcu;
	bool			live;	/* requests may match it */
	bool			leaving; /* an UNREG_BUF is waiting */
	bool			read_only;
	u32			index;
	unsigned long		nr_pages;
	struct user_struct	*user;	/* charged for the pages, or NULL */
	u32			nr_ranges;
	struct ublk_shmem_range	ranges[] __counted_by(nr_ranges);
};

/**
 * ublk_shmem_init() - Set up shared memory for a device.
 * @ub: the device
 *
 * Context: Process context.
 *
 * Return: 0, or -ENOMEM.
 */
int ublk_shmem_init(struct ublk_device *ub)
{
	struct ublk_shmem *shmem;

	shmem = kzalloc_obj(*shmem);
	if (!shmem)
		return -ENOMEM;
	mt_init_flags(&shmem->ranges, MT_FLAGS_USE_RCU);
	mutex_init(&shmem->mutex);
	xa_init_flags(&shmem->bufs, XA_FLAGS_ALLOC);
	ub->shmem = shmem;
	return 0;
}

static int ublk_shmem_pin(unsigned long addr, unsigned long nr_pages,
			  bool read_only, struct page **pages)
{
	unsigned int gup_flags = FOLL_LONGTERM | (read_only ? 0 : FOLL_WRITE);
	unsigned long done = 0;
	int ret;

	while (done < nr_pages) {
		ret = -EINTR;
		if (fatal_signal_pending(current))
			goto unpin;
		ret = pin_user_pages_fast(addr + (done << PAGE_SHIFT),
					  min(nr_pages - done,
					      UBLK_SHMEM_PIN_BATCH),
					  gup_flags, pages + done);
		if (ret < 0)
			goto unpin;
		if (!ret) {
			ret = -EFAULT;
			goto unpin;
		}
		done += ret;
		cond_resched();
	}
	return 0;

unpin:
	unpin_user_pages(pages, done);
	return ret;
}

static bool ublk_shmem_adjacent(struct page **pages, unsigned long i)
{
	return page_to_pfn(pages[i]) == page_to_pfn(pages[i - 1]) + 1;
}

/* Allocates a buffer for pinned pages. On success it owns the pins. */
static struct ublk_shmem_buf *ublk_shmem_describe(struct page **pages,
						  unsigned long nr_pages)
{
	struct ublk_shmem_range *range;
	struct ublk_shmem_buf *buf;
	unsigned long nr_ranges = 1, i;

	for (i = 1; i < nr_pages; i++)
		nr_ranges += !ublk_shmem_adjacent(pages, i);
	buf = kvzalloc(struct_size(buf, ranges, nr_ranges), GFP_KERNEL_ACCOUNT);
	if (!buf)
		return NULL;
	buf->nr_pages = nr_pages;
	buf->nr_ranges = nr_ranges;

	range = buf->ranges;
	for (i = 0; i < nr_pages; i++) {
		if (i && ublk_shmem_adjacent(pages, i)) {
			range->nr_pages++;
			continue;
		}
		if (i)
			range++;
		range->buf = buf;
		range->pfn = page_to_pfn(pages[i]);
		range->nr_pages = 1;
		range->first_page = i;
	}
	return buf;
}

/* Unpins the pages of a buffer that is in neither tree, and frees it. */
static void ublk_shmem_free(struct ublk_shmem_buf *buf)
{
	u32 i;

	/*
	 * Pages were written to through mappings, which have marked them dirty.
	 */
	for (i = 0; i < buf->nr_ranges; i++) {
		struct ublk_shmem_range *range = &buf->ranges[i];

		unpin_user_page_range_dirty_lock(pfn_to_page(range->pfn),
						 range->nr_pages, false);
		cond_resched();
	}
	ublk_uncharge_pages(buf->user, buf->nr_pages);
	kvfree_rcu(buf, rcu);
}

static struct ublk_shmem_buf *
ublk_shmem_pin_buf(const struct ublk_shmem_buf_reg *reg)
{
	bool read_only = reg->flags & UBLK_SHMEM_BUF_READ_ONLY;
	unsigned long nr_pages = reg->len >> PAGE_SHIFT;
	struct ublk_shmem_buf *buf;
	struct user_struct *payer;
	struct page **pages;
	int ret;

	ret = ublk_charge_pages(nr_pages, &payer);
	if (ret)
		return ERR_PTR(ret);
	ret = -ENOMEM;
	pages = kvmalloc_array(nr_pages, sizeof(*pages), GFP_KERNEL_ACCOUNT);
	if (!pages)
		goto uncharge;
	ret = ublk_shmem_pin(reg->addr, nr_pages, read_only, pages);
	if (ret)
		goto free_pages;
	buf = ublk_shmem_describe(pages, nr_pages);
	if (!buf) {
		ret = -ENOMEM;
		goto unpin;
	}
	buf->read_only = read_only;
	buf->user = payer;
	kvfree(pages);
	return buf;

unpin:
	unpin_user_pages(pages, nr_pages);
free_pages:
	kvfree(pages);
uncharge:
	ublk_uncharge_pages(payer, nr_pages);
	return ERR_PTR(ret);
}

/*
 * Removes the first @nr ranges of a buffer from the tree, which may allocate
 * memory. mtree_erase() would not do: before Linux 7.3 it does not report if
 * that fails, and requests would match the range after its buffer was freed.
 */
static void ublk_shmem_erase(struct ublk_shmem *shmem,
			     struct ublk_shmem_buf *buf, u32 nr)
{
	u32 i;

	for (i = 0; i < nr; i++) {
		const struct ublk_shmem_range *range = &buf->ranges[i];

		mtree_store_range(&shmem->ranges, range->pfn,
				  range->pfn + range->nr_pages - 1, NULL,
				  GFP_KERNEL | __GFP_NOFAIL);
		cond_resched();
	}
}

static int ublk_shmem_insert(struct ublk_shmem *shmem,
			     struct ublk_shmem_buf *buf)
{
	u32 i;
	int ret;

	for (i = 0; i < buf->nr_ranges; i++) {
		struct ublk_shmem_range *range = &buf->ranges[i];

		ret = mtree_insert_range(&shmem->ranges, range->pfn,
					 range->pfn + range->nr_pages - 1,
					 range, GFP_KERNEL);
		if (ret) {
			ublk_shmem_erase(shmem, buf, i);
			return ret;
		}
		cond_resched();
	}
	return 0;
}

/*
 * Makes a buffer known. Returns its index, or -EEXIST if one of its pages is
 * registered already.
 */
static int ublk_shmem_add(struct ublk_shmem *shmem, struct ublk_shmem_buf *buf)
{
	int ret;

	ret = mutex_lock_killable(&shmem->mutex);
	if (ret)
		return ret;
	ret = ublk_shmem_insert(shmem, buf);
	if (ret)
		goto out;
	ret = xa_alloc(&shmem->bufs, &buf->index, buf,
		       XA_LIMIT(0, UBLK_SHMEM_MAX_INDEX), GFP_KERNEL);
	if (ret) {
		ublk_shmem_erase(shmem, buf, buf->nr_ranges);
		if (ret == -EBUSY)
			ret = -ENOSPC;
		goto out;
	}
	/*
	 * Pairs with the acquire in ublk_shmem_usable(), and makes the index
	 * visible.
	 */
	smp_store_release(&buf->live, true);
	ret = buf->index;
out:
	mutex_unlock(&shmem->mutex);
	return ret;
}

/**
 * ublk_reg_buf() - Register memory of the caller (REG_BUF).
 * @ub: the device
 * @arg: struct ublk_shmem_buf_reg
 * @len: size of the buffer at @arg
 *
 * Pages are pinned without holding a lock, as page faults may need I/O, even on
 * this disk.
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: the index of the buffer, or a negative errno.
 */
int ublk_reg_buf(struct ublk_device *ub, const void __user *arg, u16 len)
{
	struct ublk_shmem_buf_reg reg = { };
	struct ublk_shmem_buf *buf;
	int ret;

	if (!ub->shmem)
		return -EOPNOTSUPP;
	if (copy_from_user(&reg, arg, min_t(size_t, len, sizeof(reg))))
		return -EFAULT;
	if (reg.flags & ~UBLK_SHMEM_BUF_READ_ONLY || reg.reserved)
		return -EINVAL;
	if (!reg.len || reg.len > UBLK_SHMEM_MAX_BYTES)
		return -EINVAL;
	if (!PAGE_ALIGNED(reg.len) || !PAGE_ALIGNED(reg.addr) ||
	    reg.addr != (unsigned long)reg.addr)
		return -EINVAL;

	buf = ublk_shmem_pin_buf(&reg);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	ret = ublk_shmem_add(ub->shmem, buf);
	if (ret < 0)
		ublk_shmem_free(buf);
	return ret;
}

static bool ublk_shmem_describes(struct ublk_queue *q, u16 tag, u32 index)
{
	const struct ublksrv_io_desc *desc = ublk_desc(q, tag);

	switch (atomic_read_acquire(&q->ios[tag].state)) {
	case UBLK_IO_EMPTY:
	case UBLK_IO_ARMED:
	case UBLK_IO_CANCELED:
		return false;
	}
	return READ_ONCE(desc->op_flags) & UBLK_IO_F_SHMEM_ZC &&
	       ublk_shmem_zc_index(READ_ONCE(desc->addr)) == index;
}

/*
 * Whether no request that the server holds, or that is on its way to it, is
 * described by a buffer. The rest of an earlier request in a descriptor may be
 * counted too, for the short time in which a command or the next request owns
 * the slot.
 */
static bool ublk_buf_idle(struct ublk_device *ub, u32 index)
{
	unsigned int i, tag;

	for (i = 0; i < ub->dev_info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++)
			if (ublk_shmem_describes(q, tag, index))
				return false;
	}
	return true;
}

static int ublk_shmem_wait_unused(struct ublk_device *ub, u32 index)
{
	long ret;

	do {
		ret = wait_event_interruptible_timeout(ub->wait,
						       ublk_buf_idle(ub, index),
						       UBLK_SHMEM_RECHECK);
	} while (!ret);
	return ret < 0 ? -EINTR : 0;
}

/**
 * ublk_unreg_buf() - Unregister a buffer (UNREG_BUF).
 * @ub: the device
 * @index: index from REG_BUF
 *
 * Waits until the server holds no request that uses the buffer. An interrupted
 * call can be repeated; requests do not match the buffer meanwhile.
 *
 * Context: Process context of the sender; waits interruptibly.
 *
 * Return: 0; -EBUSY if another call waits for this buffer; or another negative
 *	errno.
 */
int ublk_unreg_buf(struct ublk_device *ub, u64 index)
{
	struct ublk_shmem *shmem = ub->shmem;
	struct ublk_shmem_buf *buf;
	int ret;

	if (!shmem)
		return -EOPNOTSUPP;
	if (index > UBLK_SHMEM_MAX_INDEX)
		return -EINVAL;

	ret = mutex_lock_killable(&shmem->mutex);
	if (ret)
		return ret;
	buf = xa_load(&shmem->bufs, index);
	if (!buf || buf->leaving) {
		mutex_unlock(&shmem->mutex);
		return buf ? -EBUSY : -ENOENT;
	}
	buf->leaving = true;
	WRITE_ONCE(buf->live, false);
	mutex_unlock(&shmem->mutex);

	/*
	 * ublk_queue_rq() runs under RCU: after this, a request that has seen
	 * the buffer live has claimed its slot, or will not.
	 */
	synchronize_rcu();
	ret = ublk_shmem_wait_unused(ub, index);

	mutex_lock(&shmem->mutex);
	if (ret) {
		buf->leaving = false;
	} else {
		ublk_shmem_erase(shmem, buf, buf->nr_ranges);
		xa_erase(&shmem->bufs, index);
	}
	mutex_unlock(&shmem->mutex);
	if (!ret)
		ublk_shmem_free(buf);
	return ret;
}

/**
 * ublk_shmem_exit() - Free all buffers of a device.
 * @ub: the device
 *
 * There is no disk any more, and hence no reader.
 *
 * Context: Process context.
 */
void ublk_shmem_exit(struct ublk_device *ub)
{
	struct ublk_shmem *shmem = ub->shmem;
	struct ublk_shmem_buf *buf;
	unsigned long index;

	if (!shmem)
		return;
	mtree_destroy(&shmem->ranges);
	xa_for_each(&shmem->bufs, index, buf)
		ublk_shmem_free(buf);
	xa_destroy(&shmem->bufs);
	mutex_destroy(&shmem->mutex);
	kfree(shmem);
	ub->shmem = NULL;
}

static bool ublk_shmem_usable(const struct ublk_shmem_buf *buf,
			      const struct request *req)
{
	/* Pairs with the release in ublk_shmem_add(). */
	if (!smp_load_acquire(&buf->live))
		return false;
	return !buf->read_only || !ublk_rq_from_server(req);
}

/**
 * ublk_shmem_match() - Find the buffer that holds the data of a request.
 * @ub: the device
 * @req: the request, which has data
 * @addr: set to the index and offset of the data, in the form for the
 *	descriptor
 *
 * Context: queue_rq(), under RCU.
 *
 * Return: true if all of the data is stored in one buffer, in order and without
 *	gaps.
 */
bool ublk_shmem_match(struct ublk_device *ub, struct request *req, u64 *addr)
{
	struct maple_tree *ranges = &ub->shmem->ranges;
	const struct ublk_shmem_buf *buf = NULL;
	struct ublk_shmem_range *range = NULL;
	struct req_iterator pos;
	struct bio_vec bv;
	u64 offset, next = 0;
	bool match = false;

	if (mtree_empty(ranges))
		return false;

	rcu_read_lock();
	rq_for_each_bvec(bv, req, pos) {
		phys_addr_t start = page_to_phys(bv.bv_page) + bv.bv_offset;
		unsigned long first = PHYS_PFN(start);
		unsigned long last = PHYS_PFN(start + bv.bv_len - 1);

		/* Usually this is the range of the previous page. */
		if (!range || first - range->pfn >= range->nr_pages)
			range = mtree_load(ranges, first);
		if (!range || last - range->pfn >= range->nr_pages)
			goto out;

		offset = ((u64)(first - range->pfn + range->first_page)
			  << PAGE_SHIFT) + offset_in_page(start);
		if (!buf) {
			buf = range->buf;
			if (!ublk_shmem_usable(buf, req))
				goto out;
			*addr = ublk_shmem_zc_addr(buf->index, offset);
		} else if (range->buf != buf || offset != next) {
			goto out;
		}
		next = offset + bv.bv_len;
	}
	match = buf;
out:
	rcu_read_unlock();
	return match;
}
