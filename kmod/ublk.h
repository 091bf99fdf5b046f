/* SPDX-License-Identifier: GPL-2.0 */
/*
 * ublk_drv: what the driver's files share.
 *
 * A device (struct ublk_device) has queues, a queue has one slot (struct
 * ublk_io) per tag. The life of a slot is the heart of the driver:
 *
 *	EMPTY      no command of the server
 *	BUSY       a command on this tag is being carried out
 *	ARMED      a command (batch: the promise of one) waits for a request
 *	DISPATCH   a request has won the slot and is on its way to the server
 *	WAIT_BUF   NEED_GET_DATA: the server was told, it has not named a buffer
 *	SERVED     the server holds the request
 *	COMMIT     a commit has the request, and waits for a page fault
 *	REVOKED    the request was taken back before its task work ran, which will
 *		   complete the command
 *	CANCELED   the command was completed with UBLK_IO_RES_ABORT
 *
 * The ways out of ARMED, DISPATCH, WAIT_BUF, SERVED and COMMIT are races, and
 * compare-and-exchange decides them: a request against a cancellation for an
 * armed slot; task work, or a command of the server, against a time-out that
 * takes the request back from a server that is gone. The winner owns the
 * request. A slot in another state has one owner: in BUSY the command or the
 * task work, else the release of the char device. BUSY is left again within a
 * short time: as long as a page fault of the server takes the slot is in
 * DISPATCH, WAIT_BUF or COMMIT, which only its owner and a take-back leave. SERVED
 * would not do: with UBLK_F_BATCH_IO any thread may commit then, and the tag may
 * be another request's when the page is there.
 *
 * Locks, outer to inner:
 *
 *	ublk_device.mutex	life cycle: disk, state, parameters. Held while
 *				the disk is added or removed, so also while
 *				requests are served. Nothing that a server needs
 *				for serving, or its death for failing requests,
 *				may take it, and commands must wait for it in a
 *				way that can be killed: see job.c.
 *	ublk_device.lock	readiness of slots, gates, flags. Held shortly.
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

/* What a file offset can reach. */
#define UBLK_MAX_SECTORS	(LLONG_MAX >> SECTOR_SHIFT)

/* Any one of these: the driver does not copy at dispatch and commit. */
#define UBLK_F_NO_COPY		(UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | \
				 UBLK_F_AUTO_BUF_REG)

#define UBLK_F_ANY_RECOVERY	(UBLK_F_USER_RECOVERY | \
				 UBLK_F_USER_RECOVERY_REISSUE | \
				 UBLK_F_USER_RECOVERY_FAIL_IO)

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

/* What becomes of a request whose tag has no armed slot. */
enum ublk_gate {
	UBLK_GATE_FAIL,		/* ends with EIO */
	UBLK_GATE_FAIL_IO,	/* ends with BLK_STS_TARGET: recovery will come */
	UBLK_GATE_HOLD,		/* waits on the requeue list */
	UBLK_GATE_OPEN,		/* the server takes requests */
};

struct ublk_io {
	atomic_t		state;		/* enum ublk_io_state */
	u16			tag;

	/* Automatic registration: what COMMIT has to take back. */
	u16			reg_index;
	void			*reg_ring;

	/* The command that waits, with what the server said in it. */
	struct io_uring_cmd	*cmd;
	union {
		u64			buf_addr;
		struct ublk_auto_buf_reg auto_reg;
	};

	/* The request, from DISPATCH until its last reference is gone. */
	struct request		*req;
	refcount_t		ref;		/* with UBLK_F_NO_COPY only */
	int			result;

	/* Slots delivered by one task work. */
	struct ublk_io		*next;
	/*
	 * The thread that fetched this tag; with UBLK_F_BATCH_IO, the one that
	 * the tag was last delivered to. Written under ub->lock, or with
	 * UBLK_F_BATCH_IO under ublk_batch.lock.
	 */
	struct task_struct	*daemon;
} ____cacheline_aligned_in_smp;

struct ublk_queue {
	struct ublk_device	*ub;
	u16			q_id;
	u16			depth;
	enum ublk_gate		gate;		/* written under ub->lock */
	unsigned int		nr_fetched;	/* ub->lock */
	u64			flags;		/* copy of dev_info.flags */
	u16			desc_size;
	void			*descs;		/* the array that servers map */
	struct ublk_batch	*batch;		/* with UBLK_F_BATCH_IO */
	struct ublk_io		ios[] __counted_by(depth);
};

/* Bits of ublk_device.bits */
enum {
	UBLK_DEV_OPEN,		/* the char device has a holder, or cleans up after it */
	UBLK_DEV_USED,		/* a disk exists, perhaps only as a reference */
	UBLK_DEV_DELETED,	/* removed, the number is still taken */
	UBLK_DEV_NO_OPEN,	/* TRY_STOP_DEV: the disk takes no more openers */
};

struct ublk_device {
	struct ublksrv_ctrl_dev_info dev_info;
	struct ublk_params	params;

	struct device		dev;		/* char device, owns this structure */
	u64			serial;		/* no other device had or will have it */
	struct list_head	user_node;	/* unprivileged devices */
	struct user_struct	*payer;		/* of nr_pages, or NULL */
	unsigned long		nr_pages;
	struct cdev		cdev;
	struct blk_mq_tag_set	tag_set;
	struct ublk_queue	**queues;
	unsigned long		bits;

	struct mutex		mutex;		/* life cycle, see above */
	bool			added;		/* char device exists; mutex */
	struct gendisk		*disk;		/* changed under mutex and lock */
	struct work_struct	scan_work;	/* reads the partition table */

	spinlock_t		lock;		/* see above */
	bool			canceling;	/* server leaves: nothing stays armed */
	bool			stopping;	/* disk leaves: nothing is held */
	bool			closing;	/* stopped: holder of char device must go */
	bool			recoverable;	/* has been LIVE, will survive its server */
	bool			untrusted;	/* fetched by a thread without privilege */
	unsigned int		nr_ready;	/* queues whose tags are all fetched */
	unsigned int		nr_servers;	/* that have left */

	wait_queue_head_t	wait;		/* readiness, references of requests */
	struct work_struct	release_work;	/* cleans up after a server */
	struct work_struct	job_work;	/* carries out jobs, one by one */
	struct list_head	jobs;		/* under lock */

	/* From open to the end of release_work. */
	struct pid		*opener;
	struct mm_struct	*mm;		/* set by the first mmap */
	/* From START_DEV to the end of the disk or of the server. */
	struct pid		*server;

	struct ublk_shmem	*shmem;		/* with UBLK_F_SHMEM_ZC */
};

/* Payload of a block request (blk_mq_rq_to_pdu). */
struct ublk_rq {
	/* REPORT_ZONES has no bio to carry these. */
	sector_t		sector;
	u32			nr_zones;
	/* Part of it has been done, and the rest was queued again. */
	bool			partial;
	/* When it was first given to a server, in jiffies. */
	unsigned long		first_dispatch;
};

/* Private data of a parked command: io_uring_cmd.pdu. */
struct ublk_cmd_pdu {
	union {
		struct ublk_io		*io;
		struct ublk_fetch	*fetch;	/* FETCH_IO_CMDS */
	};
};

/* What a function returns that finds its request taken back; no errno. */
#define UBLK_TAKEN_BACK		INT_MIN

/* Results that no server gives. */
#define UBLK_RES_ABORTED	INT_MIN		/* the server is gone */
#define UBLK_RES_UNSEEN		(INT_MIN + 1)	/* and has never had the request */

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

static inline bool ublk_io_transition(struct ublk_io *io,
				      enum ublk_io_state from,
				      enum ublk_io_state to)
{
	int old = from;

	return atomic_try_cmpxchg(&io->state, &old, to);
}

/* How a request ends at a gate that fails it. */
static inline blk_status_t ublk_gate_status(enum ublk_gate gate)
{
	return gate == UBLK_GATE_FAIL_IO ? BLK_STS_TARGET : BLK_STS_IOERR;
}

/* Operations whose data goes between the request and the server. */
static inline bool ublk_op_has_data(enum req_op op)
{
	return op == REQ_OP_READ || op == REQ_OP_WRITE ||
	       op == REQ_OP_ZONE_APPEND || op == REQ_OP_DRV_IN;
}

static inline bool ublk_rq_has_data(const struct request *req)
{
	return ublk_op_has_data(req_op(req)) && blk_rq_bytes(req);
}

/* Data that the server gives, as against data that it gets. */
static inline bool ublk_rq_from_server(const struct request *req)
{
	return req_op(req) == REQ_OP_READ || req_op(req) == REQ_OP_DRV_IN;
}

/* The rest of the SQE is needed for automatic registration only. */
static inline u64 ublk_sqe_addr(const struct io_uring_cmd *cmd)
{
#ifdef UBLK_CAN_SEE_SQE
	return READ_ONCE(cmd->sqe->addr);
#else
	return 0;
#endif
}

#endif /* UBLK_DRV_H */
