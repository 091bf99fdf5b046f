/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Request queues and requests.
 */
#ifndef UBLK_COMPAT_BLK_MQ_H
#define UBLK_COMPAT_BLK_MQ_H

#if defined(UBLK_HAVE_SHOULD_MERGE) || !defined(UBLK_HAVE_MAP_KERN_RQ)
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#endif

/* Until 6.13 a driver has to enable merging. */
#ifdef UBLK_HAVE_SHOULD_MERGE
static inline int ublk_compat_alloc_tag_set(struct blk_mq_tag_set *set)
{
	set->flags |= BLK_MQ_F_SHOULD_MERGE;
	return blk_mq_alloc_tag_set(set);
}

#define blk_mq_alloc_tag_set ublk_compat_alloc_tag_set
#endif

/* Until 6.15 blk_rq_map_kern() also takes the queue. */
#ifndef UBLK_HAVE_MAP_KERN_RQ
static inline int ublk_compat_rq_map_kern(struct request *rq, void *buf,
					  unsigned int len, gfp_t gfp)
{
	return blk_rq_map_kern(rq->q, rq, buf, len, gfp);
}

#define blk_rq_map_kern ublk_compat_rq_map_kern
#endif

#endif /* UBLK_COMPAT_BLK_MQ_H */
