/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Request queues.
 */
#ifndef UBLK_COMPAT_BLK_MQ_H
#define UBLK_COMPAT_BLK_MQ_H

#if defined(UBLK_HAVE_SHOULD_MERGE) || !defined(UBLK_HAVE_MAP_KERN_RQ) || \
	!defined(UBLK_HAVE_RQ_LIST)
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#endif

/* Until 6.13 merging had to be asked for. */
#ifdef UBLK_HAVE_SHOULD_MERGE
static inline int ublk_compat_alloc_tag_set(struct blk_mq_tag_set *set)
{
	set->flags |= BLK_MQ_F_SHOULD_MERGE;
	return blk_mq_alloc_tag_set(set);
}

#define blk_mq_alloc_tag_set ublk_compat_alloc_tag_set
#endif

/* Until 6.15 the queue had to be given, too. */
#ifndef UBLK_HAVE_MAP_KERN_RQ
static inline int ublk_compat_rq_map_kern(struct request *rq, void *buf,
					  unsigned int len, gfp_t gfp)
{
	return blk_rq_map_kern(rq->q, rq, buf, len, gfp);
}

#define blk_rq_map_kern ublk_compat_rq_map_kern
#endif

/*
 * Until 6.12 (some stable releases have it) a list of requests is just its
 * first element, and queue_rqs gets the latest request first.
 */
#ifndef UBLK_HAVE_RQ_LIST
#undef rq_list_pop
#undef rq_list_empty
#undef rq_list_add_tail

struct rq_list {
	struct request *head;
	struct request *tail;
};

static inline bool rq_list_empty(const struct rq_list *list)
{
	return !list->head;
}

static inline struct request *rq_list_pop(struct rq_list *list)
{
	struct request *rq = list->head;

	if (!rq)
		return NULL;
	list->head = rq->rq_next;
	if (!list->head)
		list->tail = NULL;
	rq->rq_next = NULL;
	return rq;
}

static inline void rq_list_add_tail(struct rq_list *list, struct request *rq)
{
	rq->rq_next = NULL;
	if (list->tail)
		list->tail->rq_next = rq;
	else
		list->head = rq;
	list->tail = rq;
}

/* Turns the kernel's list round, and what @queue_rqs leaves back again. */
static inline void ublk_compat_queue_rqs(struct request **rqlist,
					 void (*queue_rqs)(struct rq_list *))
{
	struct rq_list list = { .tail = *rqlist };
	struct request *rq;

	while ((rq = *rqlist)) {
		*rqlist = rq->rq_next;
		rq->rq_next = list.head;
		list.head = rq;
	}
	queue_rqs(&list);
	while ((rq = rq_list_pop(&list))) {
		rq->rq_next = *rqlist;
		*rqlist = rq;
	}
}

/*
 * Where the driver defines its callback, a second function with the kernel's
 * parameters is defined in front, and the name is that one's.
 */
#define ublk_queue_rqs(param)						\
	ublk_queue_rq_list(param);					\
static void ublk_queue_rqs(struct request **rqlist)			\
{									\
	ublk_compat_queue_rqs(rqlist, ublk_queue_rq_list);		\
}									\
static void ublk_queue_rq_list(param)
#endif /* !UBLK_HAVE_RQ_LIST */

#endif /* UBLK_COMPAT_BLK_MQ_H */
