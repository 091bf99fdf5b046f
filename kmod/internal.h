/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions and variables that are shared between the files of the driver. Each
 * function is documented at its definition.
 */
#ifndef UBLK_INTERNAL_H
#define UBLK_INTERNAL_H

#include "ublk.h"

/* main.c: the module and the control device */
extern struct class ublk_chr_class;
extern dev_t ublk_chr_devt;
extern struct miscdevice ublk_misc;
extern unsigned int ublks_max;
extern unsigned int ublks_max_per_user;
extern struct workqueue_struct *ublk_wq;	/* ublk_device.release_work */
extern struct workqueue_struct *ublk_job_wq;	/* ublk_device.job_work ... */
extern struct workqueue_struct *ublk_user_job_wq; /* ... if unprivileged */
extern struct workqueue_struct *ublk_scan_wq;	/* ublk_device.scan_work */

/* features.c: feature flags */
u64 ublk_features(void);
int ublk_check_flags(const struct ublksrv_ctrl_dev_info *info);
int ublk_check_zoned(const struct ublksrv_ctrl_dev_info *info);
void ublk_fixup_dev_info(struct ublksrv_ctrl_dev_info *info);

/* control.c: /dev/ublk-control */
int ublk_ctrl_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags);

/* access.c: permission to control a device */
int ublk_check_access(struct ublk_device *ub, u32 cmd_op,
		      struct ublksrv_ctrl_cmd *header);

/* device.c: from ADD_DEV to DEL_DEV */
struct ublk_device *ublk_add_dev(struct ublksrv_ctrl_dev_info *info);
struct ublk_device *ublk_find_dev(u32 dev_id);
void ublk_put_dev(struct ublk_device *ub);
int ublk_remove_dev(struct ublk_device *ub);
void ublk_revoke_dev(struct ublk_device *ub);
int ublk_wait_freed(u32 dev_id, u64 serial);
void ublk_remove_all(void);
unsigned long ublk_desc_area(const struct ublk_device *ub, u32 depth);

/* lifecycle.c: start, stop, recovery, release of the char device */
int ublk_start_dev(struct ublk_device *ub, u64 data);
int ublk_stop_dev(struct ublk_device *ub);
int ublk_do_stop(struct ublk_device *ub, struct pid *unused);
int ublk_try_stop_dev(struct ublk_device *ub);
int ublk_start_recovery(struct ublk_device *ub);
int ublk_end_recovery(struct ublk_device *ub, u64 data);
int ublk_quiesce_dev(struct ublk_device *ub, u64 timeout_ms);
void ublk_release_work(struct work_struct *work);

/* job.c: control commands that wait for requests */
typedef int (ublk_job_fn)(struct ublk_device *ub, struct pid *pid);
int ublk_run_job(struct ublk_device *ub, ublk_job_fn *fn, struct pid *pid);
void ublk_run_job_always(struct ublk_device *ub, ublk_job_fn *fn);
void ublk_job_work(struct work_struct *work);

/* reap.c: delayed release of files */
int ublk_reap_init(void);
void ublk_reap_exit(void);
void ublk_watch(struct ublk_device *ub);
void ublk_unwatch(struct ublk_device *ub);
void ublk_unwatch_serving(struct ublk_device *ub);

/* disk.c: /dev/ublkbN */
struct gendisk *ublk_alloc_disk(struct ublk_device *ub);
void ublk_discard_disk(struct ublk_device *ub, struct gendisk *disk);
struct gendisk *ublk_get_disk(struct ublk_device *ub);
void ublk_allow_scan(struct gendisk *disk);
int ublk_update_size(struct ublk_device *ub, u64 sectors);
void ublk_scan_work(struct work_struct *work);

/* params.c: parameters and queue limits */
int ublk_set_params(struct ublk_device *ub, const struct ublk_params __user *arg,
		    u16 len);
int ublk_get_params(struct ublk_device *ub, struct ublk_params __user *arg,
		    u16 len);
bool ublk_size_valid(const struct ublk_device *ub, u64 sectors);
void ublk_params_to_limits(const struct ublk_device *ub,
			   struct queue_limits *lim);

/* char.c: /dev/ublkcN */
extern const struct file_operations ublk_ch_fops;

/* io_cmd.c: I/O commands on single tags */
int ublk_ch_uring_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags);
int ublk_io_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
		      unsigned int issue_flags);
bool ublk_take_result(struct ublk_queue *q, struct ublk_io *io, u64 addr,
		      u64 lba, int *result);

/* gate.c: requests without an armed slot */
void ublk_gates_close(struct ublk_device *ub);
void ublk_gates_open(struct ublk_device *ub);
void ublk_gate_queue_ready(struct ublk_queue *q);
void ublk_gates_stop_holding(struct ublk_device *ub);
void ublk_hold_or_fail(struct ublk_queue *q, struct request *req);

/* slot.c: fetching, arming, canceling and resetting slots */
int ublk_slot_reserve(struct ublk_queue *q, struct ublk_io *io);
void ublk_slot_unreserve(struct ublk_io *io);
void ublk_slot_fetched(struct ublk_queue *q, struct ublk_io *io,
		       unsigned int issue_flags);
void ublk_slot_arm(struct ublk_queue *q, struct ublk_io *io,
		   unsigned int issue_flags);
bool ublk_slot_cancel(struct ublk_io *io, unsigned int issue_flags);
bool ublk_all_fetched(const struct ublk_device *ub);
void ublk_mark_leaving_locked(struct ublk_device *ub);
void ublk_mark_leaving(struct ublk_device *ub);
void ublk_cancel_slots(struct ublk_device *ub);
bool ublk_server_notified(const struct ublk_device *ub);
void ublk_reset_slots(struct ublk_device *ub);
bool ublk_refs_gone(const struct ublk_device *ub);

/* take_back.c: requests whose server has exited */
bool ublk_take_back(struct ublk_queue *q, struct ublk_io *io,
		    struct request *req, bool always);
void ublk_take_back_gone(struct ublk_device *ub);
void ublk_abort_slots(struct ublk_device *ub);
bool ublk_task_gone(const struct task_struct *task);
bool ublk_process_gone(const struct task_struct *task);

/* queue.c: from the block layer to the server */
extern const struct blk_mq_ops ublk_mq_ops;
int ublk_prepare_delivery(struct ublk_queue *q, struct ublk_io *io,
			  struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_fail_delivery(struct ublk_queue *q, struct ublk_io *io,
			unsigned int issue_flags);
bool ublk_server_dying(void);

/* request.c: descriptors, references and completion of requests */
blk_status_t ublk_fill_desc(struct ublk_queue *q, struct request *req);
void ublk_end_request(struct request *req, blk_status_t status);
void ublk_finish(struct ublk_queue *q, struct ublk_io *io, struct request *req,
		 int result);
bool ublk_io_get(struct ublk_io *io);
void ublk_io_put(struct ublk_io *io);

/* copy.c: copying data */
size_t ublk_copy_data(struct request *req, size_t offset, struct iov_iter *iter,
		      bool to_server);
size_t ublk_copy_integrity(struct request *req, size_t offset,
			   struct iov_iter *iter, bool to_server);
size_t ublk_integrity_bytes(const struct request *req);
int ublk_copy_to_server(struct ublk_io *io, u64 addr,
			enum ublk_io_state fault_state);
int ublk_copy_from_server(struct ublk_io *io, u64 addr, unsigned int bytes);
ssize_t ublk_user_copy(struct kiocb *iocb, struct iov_iter *iter,
		       bool to_server);

/* buffer.c: registered buffers */
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

/* charge.c: memory accounting */
int ublk_charge_pages(unsigned long nr_pages, struct user_struct **payer);
void ublk_uncharge_pages(struct user_struct *payer, unsigned long nr_pages);

/* shmem.c: memory shared by client and server */
int ublk_shmem_init(struct ublk_device *ub);
void ublk_shmem_exit(struct ublk_device *ub);
int ublk_reg_buf(struct ublk_device *ub, const void __user *arg, u16 len);
int ublk_unreg_buf(struct ublk_device *ub, u64 index);
bool ublk_shmem_match(struct ublk_device *ub, struct request *req, u64 *addr);

/* zoned.c: zone reports */
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

/* batch.c, batch_fetch.c, batch_cmd.c: I/O commands on many tags */
#ifdef UBLK_CAN_BATCH
int ublk_batch_init(struct ublk_queue *q);
void ublk_batch_exit(struct ublk_queue *q);
int ublk_batch_uring_cmd(struct ublk_device *ub, struct io_uring_cmd *cmd,
			 unsigned int issue_flags);
void ublk_batch_add_tag(struct ublk_queue *q, u16 tag);
void ublk_batch_cancel_fetch(struct ublk_fetch *fetch, unsigned int issue_flags);
void ublk_batch_cancel_fetches(struct ublk_queue *q);
void ublk_batch_reset(struct ublk_queue *q);
bool ublk_batch_revoke(struct ublk_queue *q, struct ublk_io *io);
bool ublk_batch_holder_gone(struct ublk_queue *q, struct ublk_io *io);
void ublk_batch_kill_holder(struct ublk_queue *q, struct ublk_io *io);
struct task_struct *ublk_batch_get_fetcher(struct ublk_queue *q);
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

static inline void ublk_batch_add_tag(struct ublk_queue *q, u16 tag)
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

static inline struct task_struct *ublk_batch_get_fetcher(struct ublk_queue *q)
{
	return NULL;
}
#endif

#endif /* UBLK_INTERNAL_H */
