/* SPDX-License-Identifier: GPL-2.0 */
/*
 * UBLK_F_BATCH_IO: types and functions that are shared between batch.c,
 * batch_fetch.c and batch_cmd.c.
 */
#ifndef UBLK_BATCH_H
#define UBLK_BATCH_H

#include "internal.h"

/* A pending FETCH_IO_CMDS. */
struct ublk_fetch {
	struct list_head	node;		/* ublk_batch.fetches */
	struct ublk_queue	*q;
	struct io_uring_cmd	*cmd;
	struct task_struct	*task;		/* submitter; runs its task work */
	u16			buf_group;
	bool			retired;	/* is being completed */
};

/* The batch state of a queue. */
struct ublk_batch {
	spinlock_t		lock;		/* protects all of this */
	struct list_head	fetches;	/* pending, also the active one */
	struct ublk_fetch	*active;
	struct task_struct	*fetcher;	/* last thread to fetch or prepare */
	/* A ring of tags on their way to the server, without duplicates. */
	unsigned int		head;
	unsigned int		nr;
	unsigned int		mask;
	u16			tags[];
};

/* batch.c */
void ublk_batch_set_fetcher(struct ublk_queue *q);
int ublk_batch_take(struct ublk_queue *q, u16 *tags, unsigned int max);
void ublk_batch_put_back(struct ublk_queue *q, const u16 *tags, unsigned int n);

/* batch_fetch.c */
int ublk_batch_fetch(struct ublk_queue *q, struct io_uring_cmd *cmd,
		     const struct ublk_batch_io *args, unsigned int issue_flags);
void ublk_batch_tw(struct io_tw_req tw_req, io_tw_token_t tw);

/*
 * Selects the command that delivers the tags in the ring, if none does and there
 * are any. b->lock is held.
 */
static inline struct ublk_fetch *ublk_batch_activate(struct ublk_batch *b)
{
	if (b->active || !b->nr)
		return NULL;
	b->active = list_first_entry_or_null(&b->fetches, struct ublk_fetch,
					     node);
	return b->active;
}

/*
 * Schedules the task work of an active command, which stays valid until that has
 * run. So no lock is needed.
 */
static inline void ublk_batch_schedule(struct ublk_fetch *fetch)
{
	if (fetch)
		io_uring_cmd_complete_in_task(fetch->cmd, ublk_batch_tw);
}

#endif /* UBLK_BATCH_H */
