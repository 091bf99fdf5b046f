/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Lists of requests. Only for queue.c.
 *
 * Until 6.12, except for some stable releases, a list is a pointer to its first
 * element, and queue_rqs() gets the latest request first.
 */
#ifndef UBLK_COMPAT_QUEUE_RQS_H
#define UBLK_COMPAT_QUEUE_RQS_H

#include <linux/blk-mq.h>

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

static void ublk_queue_rq_list(struct rq_list *list);

/*
 * Reverses the list of the kernel, and what the driver leaves of it back again.
 * In these kernels a driver with queue_rqs() has to record the request of each
 * tag, which time-outs need to find it.
 */
static void ublk_queue_rqs(struct request **rqlist)
{
	struct rq_list list = { .tail = *rqlist };
	struct request *rq;

	while ((rq = *rqlist)) {
		*rqlist = rq->rq_next;
		rq->rq_next = list.head;
		list.head = rq;
		rq->mq_hctx->tags->rqs[rq->tag] = rq;
	}
	ublk_queue_rq_list(&list);
	while ((rq = rq_list_pop(&list))) {
		rq->rq_next = *rqlist;
		*rqlist = rq;
	}
}

/* Renames the function of the driver, but not the name in blk_mq_ops. */
#define ublk_queue_rqs(...)	ublk_queue_rq_list(__VA_ARGS__)

#endif /* UBLK_COMPAT_QUEUE_RQS_H */
