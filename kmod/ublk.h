/* SPDX-License-Identifier: GPL-2.0 */
/*
 * ublk_drv: types, states and locks.
 *
 * A device (struct ublk_device) has queues, and a queue has one slot (struct
 * ublk_io) per tag. A slot is in one of these states:
 *
 *	EMPTY      the server has issued no command for this tag
 *	BUSY       a command on this tag is being carried out
 *	ARMED      a parked command waits for a request; with UBLK_F_BATCH_IO no
 *		   command is parked, and a fetch command will deliver the tag
 *	DISPATCH   a request has claimed the slot and is on its way to the server
 *	WAIT_BUF   UBLK_F_NEED_GET_DATA: the server knows about the request, and
 *		   has not named a buffer yet
 *	SERVED     the server holds the request
 *	COMMIT     a commit owns the request and waits for a page fault
 *	REVOKED    the request was taken back before its task work ran; the task
 *		   work will complete the command
 *	CANCELED   the command was completed with UBLK_IO_RES_ABORT
 *
 * The ways out of ARMED, DISPATCH, WAIT_BUF, SERVED and COMMIT are races, which
 * compare-and-exchange decides: a request races with a cancellation for an
 * armed slot; task work, or a command of the server, races with a time-out that
 * takes the request back from a server that has exited. The winner owns the
 * request. A slot in any other state has one owner: in BUSY the command or the
 * task work, otherwise the release of the char device.
 *
 * A slot leaves BUSY within a short time. While a page fault of the server is
 * handled, the slot is therefore in DISPATCH, WAIT_BUF or COMMIT, which only its
 * owner and a take-back leave. SERVED would not do: with UBLK_F_BATCH_IO any
 * thread may commit in that state, and by the time the page is resident the tag
 * may belong to another request.
 *
 * Locks, outer to inner:
 *
 *	ublk_device.mutex	life cycle: disk, state, parameters. Held while
 *				the disk is added or removed, and so also while
 *				requests are served. Nothing that a server needs
 *				for serving, or that its exit needs for failing
 *				requests, may take this lock. Commands must wait
 *				for it killably: see job.c.
 *	ublk_device.lock	readiness of slots, gates, flags. Held only for
 *				short sections that do not sleep.
 */
#ifndef UBLK_DRV_H
#define UBLK_DRV_H

#include <linux/bits.h>
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/io_uring/cmd.h>
#include <linux/list.h>
#include <linux/maple_tree.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include <uapi/linux/ublk_cmd.h>

#include "caps.h"
#include "debug.h"

#define UBLK_MINORS		BIT(MINORBITS)

/* The largest disk that a file offset can address. */
#define UBLK_MAX_SECTORS	(LLONG_MAX >> SECTOR_SHIFT)

/* With any of these flags the driver does not copy at dispatch and commit. */
#define UBLK_F_NO_COPY		(UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | \
				 UBLK_F_AUTO_BUF_REG)

#define UBLK_F_ANY_RECOVERY	(UBLK_F_USER_RECOVERY | \
				 UBLK_F_USER_RECOVERY_REISSUE | \
				 UBLK_F_USER_RECOVERY_FAIL_IO)

/* The state of a slot; see the head of this file. */
enum ublk_io_state {
	UBLK_IO_EMPTY,
	UBLK_IO_BUSY,
	UBLK_IO_ARMED,
	UBLK_IO_DISPATCH,
	UBLK_IO_WAIT_BUF,
	UBLK_IO_SERVED,
	UBLK_IO_COMMIT,
	UBLK_IO_REVOKED,
	UBLK_IO_CANCELED,
};

/* What happens to a request whose tag has no armed slot; see gate.c. */
enum ublk_gate {
	UBLK_GATE_FAIL,		/* it ends with BLK_STS_IOERR */
	UBLK_GATE_FAIL_IO,	/* it ends with BLK_STS_TARGET until recovery */
	UBLK_GATE_HOLD,		/* it waits on the requeue list */
	UBLK_GATE_OPEN,		/* the server accepts requests */
};

/* A slot: the driver's side of one tag. */
struct ublk_io {
	atomic_t		state;		/* enum ublk_io_state */
	u16			tag;

	/* Automatic registration: the buffer that COMMIT unregisters. */
	u16			reg_index;
	void			*reg_ring;

	/* The parked command, and its arguments. */
	struct io_uring_cmd	*cmd;
	union {
		u64			buf_addr;
		struct ublk_auto_buf_reg auto_reg;
	};

	/* The request, from DISPATCH until its last reference is gone. */
	struct request		*req;
	refcount_t		ref;		/* only with UBLK_F_NO_COPY */
	int			result;

	/* The next slot that the same task work delivers. */
	struct ublk_io		*next;
	/*
	 * The thread that fetched this tag; with UBLK_F_BATCH_IO, the thread
	 * that the tag was last delivered to. Written under ub->lock, or with
	 * UBLK_F_BATCH_IO under ublk_batch.lock.
	 */
	struct task_struct	*daemon;
} ____cacheline_aligned_in_smp;

/* A hardware queue of a device, with its slots. */
struct ublk_queue {
	struct ublk_device	*ub;
	u16			q_id;
	u16			depth;
	enum ublk_gate		gate;		/* written under ub->lock */
	unsigned int		nr_fetched;	/* slots; under ub->lock */
	u64			flags;		/* copy of dev_info.flags */
	u16			desc_size;
	void			*descs;		/* the array that the server maps */
	struct ublk_batch	*batch;		/* with UBLK_F_BATCH_IO */
	struct ublk_io		ios[] __counted_by(depth);
};

/* Bits of ublk_device.bits. */
enum {
	UBLK_DEV_OPEN,		/* char device open, or cleanup not finished */
	UBLK_DEV_USED,		/* a disk exists, even if only referenced */
	UBLK_DEV_DELETED,	/* removed; the id is still in use */
};

/* A device: its char device, its queues and, once started, its disk. */
struct ublk_device {
	struct ublksrv_ctrl_dev_info dev_info;
	struct ublk_params	params;

	struct device		dev;		/* char device; owns this structure */
	u64			serial;		/* unique for the life of the module */
	struct list_head	user_node;	/* in the unprivileged devices */
	kuid_t			quota_user;	/* counted for the limit per user */
	struct user_struct	*payer;		/* charged for nr_pages, or NULL */
	unsigned long		nr_pages;
	struct cdev		cdev;
	struct blk_mq_tag_set	tag_set;
	struct ublk_queue	**queues;
	unsigned long		bits;
	/* TRY_STOP_DEVs under way; the disk cannot be opened meanwhile. */
	atomic_t		nr_try_stops;

	struct mutex		mutex;		/* life cycle; see above */
	bool			added;		/* char device exists; under mutex */
	struct gendisk		*disk;		/* changed under mutex and lock */
	struct work_struct	scan_work;	/* reads the partition table */

	spinlock_t		lock;		/* see above */
	bool			canceling;	/* server leaving: no slot stays armed */
	bool			stopping;	/* disk removal: no request is held */
	bool			closing;	/* stopped; waiting for the last close */
	bool			recoverable;	/* was LIVE; outlives its server */
	bool			untrusted;	/* an unprivileged thread fetched */
	bool			watched;	/* counted in ublk_nr_watched, see reap.c */
	unsigned int		nr_ready;	/* queues with all tags fetched */
	unsigned int		nr_servers;	/* servers that have left */

	wait_queue_head_t	wait;		/* readiness, request references */
	struct work_struct	release_work;	/* cleans up after a server */
	struct work_struct	job_work;	/* carries out jobs in order */
	struct list_head	jobs;		/* under lock */

	/* From open() until release_work has finished. */
	struct pid		*opener;
	struct mm_struct	*mm;		/* set by the first mmap */
	/* From START_DEV until the disk or the server is gone. */
	struct pid		*server;

	struct ublk_shmem	*shmem;		/* with UBLK_F_SHMEM_ZC */
};

/* Driver data of a block request (blk_mq_rq_to_pdu()). */
struct ublk_rq {
	/* Arguments of REPORT_ZONES, which has no bio to carry them. */
	sector_t		sector;
	u32			nr_zones;
	/* The server has completed a part; the rest was requeued. */
	bool			partial;
	/* When the request was first dispatched, in jiffies. */
	unsigned long		first_dispatch;
};

/* Driver data of a parked command (io_uring_cmd_to_pdu()). */
struct ublk_cmd_pdu {
	union {
		struct ublk_io		*io;
		struct ublk_fetch	*fetch;	/* FETCH_IO_CMDS */
	};
};

/* Not an errno: the request was taken back while the function ran. */
#define UBLK_TAKEN_BACK		INT_MIN

/* Results that the driver itself uses; a server cannot commit them. */
#define UBLK_RES_ABORTED	INT_MIN		/* the server has exited */
#define UBLK_RES_UNSEEN		(INT_MIN + 1)	/* ... and never saw the request */

static inline struct ublk_queue *ublk_io_queue(struct ublk_io *io)
{
	return container_of(io - io->tag, struct ublk_queue, ios[0]);
}

static inline struct ublk_io *ublk_rq_io(const struct request *req)
{
	struct ublk_queue *q = req->mq_hctx->driver_data;

	return &q->ios[req->tag];
}

static inline struct ublksrv_io_desc *ublk_desc(struct ublk_queue *q, u16 tag)
{
	return q->descs + (size_t)tag * q->desc_size;
}

static inline bool ublk_no_copy(const struct ublk_queue *q)
{
	return q->flags & UBLK_F_NO_COPY;
}

static inline bool ublk_is_batch(const struct ublk_queue *q)
{
	return q->flags & UBLK_F_BATCH_IO;
}

/* Changes the state of a slot. Returns false if it was not @from. */
static inline bool ublk_io_transition(struct ublk_io *io,
				      enum ublk_io_state from,
				      enum ublk_io_state to)
{
	int old = from;

	return atomic_try_cmpxchg(&io->state, &old, to);
}

/* The status of a request that a closed gate fails. */
static inline blk_status_t ublk_gate_status(enum ublk_gate gate)
{
	return gate == UBLK_GATE_FAIL_IO ? BLK_STS_TARGET : BLK_STS_IOERR;
}

/* Whether requests of this kind transfer data to or from the server. */
static inline bool ublk_op_has_data(enum req_op op)
{
	return op == REQ_OP_READ || op == REQ_OP_WRITE ||
	       op == REQ_OP_ZONE_APPEND || op == REQ_OP_DRV_IN;
}

static inline bool ublk_rq_has_data(const struct request *req)
{
	return ublk_op_has_data(req_op(req)) && blk_rq_bytes(req);
}

/* Whether the server supplies the data, rather than receiving it. */
static inline bool ublk_rq_from_server(const struct request *req)
{
	return req_op(req) == REQ_OP_READ || req_op(req) == REQ_OP_DRV_IN;
}

/* The address field of the SQE; only automatic registration and batches use it. */
static inline u64 ublk_sqe_addr(const struct io_uring_cmd *cmd)
{
#ifdef UBLK_CAN_SEE_SQE
	return READ_ONCE(cmd->sqe->addr);
#else
	return 0;
#endif
}

#endif /* UBLK_DRV_H */
