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
 *	ASKED      NEED_GET_DATA: the server was told, it has not named a buffer
 *	SERVED     the server holds the request
 *	COMMIT     a commit has the request, and waits for a page fault
 *	REVOKED    the request was taken back before its task work ran, which will
 *		   complete the command
 *	CANCELED   the command was completed with UBLK_IO_RES_ABORT
 *
 * The ways out of ARMED, DISPATCH, ASKED, SERVED and COMMIT are races, and
 * compare-and-exchange decides them: a request against a cancellation for an
 * armed slot; task work, or a command of the server, against a time-out that
 * takes the request back from a server that is gone. The winner owns the
 * request. A slot in another state has one owner: in BUSY the command or the
 * task work, else the release of the char device. BUSY is left again within a
 * short time: as long as a page fault of the server takes the slot is in
 * DISPATCH, ASKED or COMMIT, which only its owner and a take-back leave. SERVED
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
	UBLK_IO_ASKED,
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
	bool			rest;
	/* When it was first given to a server, in jiffies. */
	unsigned long		since;
};

/* Private data of a parked command: io_uring_cmd.pdu. */
struct ublk_cmd_pdu {
	union {
		struct ublk_io		*io;
		struct ublk_fetch	*fetch;	/* FETCH_IO_CMDS */
	};
};

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

static inline bool ublk_io_moves(struct ublk_io *io, enum ublk_io_state from,
				 enum ublk_io_state to)
{
	int old = from;

	return atomic_try_cmpxchg(&io->state, &old, to);
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

/* main.c */
extern struct class ublk_chr_class;
extern dev_t ublk_chr_devt;
extern struct miscdevice ublk_misc;
extern unsigned int ublks_max;
extern unsigned int ublks_max_per_user;
extern struct workqueue_struct *ublk_wq;	/* cleans up after servers */
extern struct workqueue_struct *ublk_job_wq;	/* waits for servers */
extern struct workqueue_struct *ublk_user_job_wq; /* ... of unprivileged devices */
extern struct workqueue_struct *ublk_scan_wq;	/* reads what servers serve */

/* features.c */
u64 ublk_features(void);
int ublk_check_flags(const struct ublksrv_ctrl_dev_info *info);
int ublk_check_zoned(const struct ublksrv_ctrl_dev_info *info);
void ublk_settle_flags(struct ublksrv_ctrl_dev_info *info);

/* control.c */
int ublk_ctrl_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags);

/* access.c: may the caller control this device? */
int ublk_check_access(struct ublk_device *ub, u32 cmd_op,
		      struct ublksrv_ctrl_cmd *header);

/* device.c: from ADD_DEV to DEL_DEV */
struct ublk_device *ublk_add_dev(struct ublksrv_ctrl_dev_info *info);
struct ublk_device *ublk_find_dev(u32 dev_id);
void ublk_put_dev(struct ublk_device *ub);
int ublk_remove_dev(struct ublk_device *ub);
void ublk_drop_dev(struct ublk_device *ub);
int ublk_wait_freed(u32 dev_id, u64 serial);
void ublk_remove_all(void);
unsigned long ublk_desc_area(const struct ublk_device *ub, u32 depth);

/* lifecycle.c: start, stop, recovery, the end of a server */
int ublk_start_dev(struct ublk_device *ub, u64 pid);
int ublk_stop_dev(struct ublk_device *ub);
int ublk_do_stop(struct ublk_device *ub, struct pid *unused);
int ublk_try_stop_dev(struct ublk_device *ub);
int ublk_start_recovery(struct ublk_device *ub);
int ublk_end_recovery(struct ublk_device *ub, u64 pid);
int ublk_quiesce_dev(struct ublk_device *ub, u64 timeout_ms);
void ublk_release_work(struct work_struct *work);

/* job.c: commands that wait for requests */
typedef int (ublk_job_fn)(struct ublk_device *ub, struct pid *pid);
int ublk_run_job(struct ublk_device *ub, ublk_job_fn *fn, struct pid *pid);
void ublk_job_work(struct work_struct *work);

/* reap.c: char devices whose last holder is a kernel thread */
int ublk_reap_init(void);
void ublk_reap_exit(void);
void ublk_reap_begin(void);
void ublk_reap_end(void);

/* disk.c: /dev/ublkbN */
struct gendisk *ublk_alloc_disk(struct ublk_device *ub);
void ublk_discard_disk(struct ublk_device *ub, struct gendisk *disk);
struct gendisk *ublk_get_disk(struct ublk_device *ub);
void ublk_allow_scan(struct gendisk *disk);
int ublk_update_size(struct ublk_device *ub, u64 sectors);
void ublk_scan_work(struct work_struct *work);

/* params.c */
int ublk_set_params(struct ublk_device *ub, const struct ublk_params __user *arg,
		    u16 len);
int ublk_get_params(struct ublk_device *ub, struct ublk_params __user *arg,
		    u16 len);
void ublk_params_to_limits(const struct ublk_device *ub,
			   struct queue_limits *lim);

/* char.c: /dev/ublkcN */
extern const struct file_operations ublk_ch_fops;

/* io_cmd.c: commands on single tags */
int ublk_ch_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags);
int ublk_io_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
		      unsigned int issue_flags);

/* slot.c: life of a slot */
int ublk_slot_reserve(struct ublk_queue *q, struct ublk_io *io);
void ublk_slot_unreserve(struct ublk_io *io);
void ublk_slot_fetched(struct ublk_queue *q, struct ublk_io *io,
		       unsigned int issue_flags);
void ublk_slot_arm(struct ublk_queue *q, struct ublk_io *io,
		   unsigned int issue_flags);
bool ublk_slot_cancel(struct ublk_io *io, unsigned int issue_flags);
bool ublk_all_fetched(const struct ublk_device *ub);
void ublk_gates_close(struct ublk_device *ub);
void ublk_gates_open(struct ublk_device *ub);
void ublk_server_leaves(struct ublk_device *ub);
void ublk_cancel_slots(struct ublk_device *ub);
bool ublk_server_told(const struct ublk_device *ub);
bool ublk_take_back(struct ublk_queue *q, struct ublk_io *io,
		    struct request *req, bool always);
void ublk_take_back_gone(struct ublk_device *ub);
void ublk_abort_slots(struct ublk_device *ub);
bool ublk_task_gone(const struct task_struct *task);
bool ublk_process_gone(const struct task_struct *task);
void ublk_reset_slots(struct ublk_device *ub);
bool ublk_refs_gone(const struct ublk_device *ub);

/* queue.c: requests from the block layer to the server */
extern const struct blk_mq_ops ublk_mq_ops;
int ublk_prepare_delivery(struct ublk_queue *q, struct ublk_io *io,
			  struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_no_server(struct ublk_queue *q, struct request *req);
void ublk_undeliverable(struct ublk_queue *q, struct ublk_io *io,
			unsigned int issue_flags);
bool ublk_server_dying(void);

/* What a function returns that finds its request taken back; no errno. */
#define UBLK_TAKEN_BACK		INT_MIN

/* request.c: what a request looks like to the server, and how it ends */
/* Results that no server gives. */
#define UBLK_RES_ABORTED	INT_MIN		/* the server is gone */
#define UBLK_RES_UNSEEN		(INT_MIN + 1)	/* and has never had the request */

blk_status_t ublk_fill_desc(struct ublk_queue *q, struct request *req);
bool ublk_take_result(struct ublk_queue *q, struct ublk_io *io, u64 addr,
		      u64 lba, int *result);
void ublk_end_request(struct request *req, blk_status_t status);
void ublk_finish(struct ublk_queue *q, struct ublk_io *io, struct request *req,
		 int result);
bool ublk_io_get(struct ublk_io *io);
void ublk_io_put(struct ublk_io *io);

/* copy.c: the driver moves the data */
size_t ublk_copy_data(struct request *req, size_t offset, struct iov_iter *iter,
		      bool to_server);
size_t ublk_copy_integrity(struct request *req, size_t offset,
			   struct iov_iter *iter, bool to_server);
size_t ublk_integrity_bytes(const struct request *req);
int ublk_copy_to_server(struct ublk_io *io, u64 addr, enum ublk_io_state rest);
int ublk_copy_from_server(struct ublk_io *io, u64 addr, unsigned int bytes);
ssize_t ublk_user_copy(struct kiocb *iocb, struct iov_iter *iter, bool to_server);

/* buffer.c: the server's ring holds the pages of the request */
int ublk_register_buf(struct ublk_queue *q, struct ublk_io *io,
		      struct io_uring_cmd *cmd, u64 index,
		      unsigned int issue_flags);
int ublk_unregister_buf(struct ublk_device *ub, struct io_uring_cmd *cmd,
			u64 index, unsigned int issue_flags);
int ublk_parse_auto_reg(u64 word, struct ublk_auto_buf_reg *reg);
int ublk_auto_register(struct ublk_queue *q, struct ublk_io *io,
		       struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd,
			  unsigned int issue_flags);

/* charge.c: memory that users pay for */
int ublk_charge_pages(unsigned long nr_pages, struct user_struct **payer);
void ublk_uncharge_pages(struct user_struct *payer, unsigned long nr_pages);

/* shmem.c: memory that client and server share */
int ublk_shmem_init(struct ublk_device *ub);
void ublk_shmem_exit(struct ublk_device *ub);
int ublk_reg_buf(struct ublk_device *ub, const void __user *arg, u16 len);
int ublk_unreg_buf(struct ublk_device *ub, u64 index);
bool ublk_shmem_match(struct ublk_device *ub, struct request *req, u64 *addr);

/* zoned.c */
#ifdef CONFIG_BLK_DEV_ZONED
int ublk_report_zones(struct gendisk *disk, sector_t sector,
		      unsigned int nr_zones, struct blk_report_zones_args *args);
int ublk_revalidate_zones(struct gendisk *disk);
#else
#define ublk_report_zones	NULL
static inline int ublk_revalidate_zones(struct gendisk *disk)
{
	return -EOPNOTSUPP;
}
#endif

/* batch.c: many tags per command */
#ifdef UBLK_CAN_BATCH
int ublk_batch_init(struct ublk_queue *q);
void ublk_batch_exit(struct ublk_queue *q);
int ublk_batch_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
			 unsigned int issue_flags);
void ublk_batch_send(struct ublk_queue *q, u16 tag);
void ublk_batch_cancel_fetch(struct ublk_fetch *fetch, unsigned int issue_flags);
void ublk_batch_cancel_fetches(struct ublk_queue *q);
void ublk_batch_reset(struct ublk_queue *q);
bool ublk_batch_revoke(struct ublk_queue *q, struct ublk_io *io);
bool ublk_batch_holder_gone(struct ublk_queue *q, struct ublk_io *io);
void ublk_batch_kill_holder(struct ublk_queue *q, struct ublk_io *io);
struct task_struct *ublk_batch_fetcher(struct ublk_queue *q);
#else
static inline int ublk_batch_init(struct ublk_queue *q)
{
	return -EOPNOTSUPP;
}

static inline void ublk_batch_exit(struct ublk_queue *q)
{
}

static inline int ublk_batch_uring_cmd(struct ublk_device *ub,
				       struct io_uring_cmd *cmd,
				       unsigned int issue_flags)
{
	return -EOPNOTSUPP;
}

static inline void ublk_batch_send(struct ublk_queue *q, u16 tag)
{
}

static inline void ublk_batch_cancel_fetch(struct ublk_fetch *fetch,
					   unsigned int issue_flags)
{
}

static inline void ublk_batch_cancel_fetches(struct ublk_queue *q)
{
}

static inline void ublk_batch_reset(struct ublk_queue *q)
{
}

static inline bool ublk_batch_revoke(struct ublk_queue *q, struct ublk_io *io)
{
	return false;
}

static inline bool ublk_batch_holder_gone(struct ublk_queue *q,
					  struct ublk_io *io)
{
	return false;
}

static inline void ublk_batch_kill_holder(struct ublk_queue *q,
					  struct ublk_io *io)
{
}

static inline struct task_struct *ublk_batch_fetcher(struct ublk_queue *q)
{
	return NULL;
}
#endif

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
