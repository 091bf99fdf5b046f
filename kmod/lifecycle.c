// SPDX-License-Identifier: GPL-2.0
/*
 * From START_DEV to STOP_DEV, recovery, and the end of a server.
 *
 * ub->mutex is held while a disk is added or removed. Both wait for requests,
 * which are served, or failed after the server has exited, by code that does
 * not need the mutex. These requests must not be held for a later server. Hence
 * "recoverable" is set only when the disk has been added, and "stopping" before
 * it is removed.
 */
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>

#include "internal.h"

static bool ublk_is_deleted(const struct ublk_device *ub)
{
	return test_bit(UBLK_DEV_DELETED, &ub->bits);
}

/*
 * Waits until the server has fetched all tags, or it is certain that it cannot:
 * the device is deleted, or it was stopped and the process that has the char
 * device open gets no more tags.
 */
static int ublk_wait_fetched(struct ublk_device *ub)
{
	if (wait_event_interruptible(ub->wait, ublk_all_fetched(ub) ||
				     READ_ONCE(ub->closing) ||
				     ublk_is_deleted(ub)))
		return -EINTR;
	return 0;
}

/*
 * To be called with ub->mutex held, after ublk_wait_fetched(): the server may
 * have closed the char device since then.
 */
static bool ublk_has_server(struct ublk_device *ub)
{
	return ublk_all_fetched(ub) || ub->closing;
}

/*
 * Whether @pid is the process that has opened the char device. ub->mutex is
 * held.
 */
static bool ublk_is_opener(struct ublk_device *ub, struct pid *pid)
{
	return pid && test_bit(UBLK_DEV_OPEN, &ub->bits) && pid == ub->opener;
}

/*
 * Changes the state of the device. @server is the process that GET_DEV_INFO
 * reports, or NULL; a reference is consumed. ub->mutex is held.
 */
static void ublk_set_state(struct ublk_device *ub, u16 state, struct pid *server)
{
	struct pid *old;

	spin_lock(&ub->lock);
	old = ub->server;
	ub->server = server;
	WRITE_ONCE(ub->dev_info.state, state);
	spin_unlock(&ub->lock);
	put_pid(old);
}

/*
 * Whether the process @pid can make the device LIVE: it must have the char
 * device open, with all tags fetched.
 */
static int ublk_check_server(struct ublk_device *ub, struct pid *pid)
{
	if (ublk_is_deleted(ub) || !ublk_has_server(ub))
		return -ENODEV;
	return ublk_is_opener(ub, pid) ? 0 : -EINVAL;
}

static int ublk_do_start(struct ublk_device *ub, struct pid *pid)
{
	struct gendisk *disk;
	int ret;

	mutex_lock(&ub->mutex);
	ret = ublk_check_server(ub, pid);
	if (ret)
		goto out;
	ret = -EEXIST;
	if (ub->disk || test_bit(UBLK_DEV_USED, &ub->bits))
		goto out;
	ret = -EBUSY;
	if (ub->closing)
		goto out;
	ret = -ENODEV;
	if (READ_ONCE(ub->canceling))
		goto out;
	ret = -EINVAL;
	if (!(ub->params.types & UBLK_PARAM_TYPE_BASIC))
		goto out;

	disk = ublk_alloc_disk(ub);
	if (IS_ERR(disk)) {
		ret = PTR_ERR(disk);
		goto out;
	}
	spin_lock(&ub->lock);
	ub->disk = disk;
	ublk_gates_open(ub);
	spin_unlock(&ub->lock);
	/* The server reports zones, and so moves data, before the disk is added. */
	ublk_set_state(ub, UBLK_S_DEV_LIVE, get_pid(ub->opener));

	ret = 0;
	if (ub->dev_info.flags & UBLK_F_ZONED)
		ret = ublk_revalidate_zones(disk);
	if (!ret)
		ret = add_disk(disk);
	if (ret) {
		spin_lock(&ub->lock);
		ub->disk = NULL;
		spin_unlock(&ub->lock);
		ublk_set_state(ub, UBLK_S_DEV_DEAD, NULL);
		ublk_discard_disk(ub, disk);
		goto out;
	}
	spin_lock(&ub->lock);
	ub->recoverable = ub->dev_info.flags & UBLK_F_USER_RECOVERY;
	/*
	 * If the server has exited meanwhile, requests are held from here on.
	 */
	if (ub->canceling)
		ublk_gates_close(ub);
	else
		ublk_unwatch_serving(ub);
	spin_unlock(&ub->lock);
	/*
	 * Partition tables from servers of unprivileged users are not trusted.
	 */
	if (READ_ONCE(ub->untrusted))
		goto out;
	if (ub->dev_info.flags & UBLK_F_NO_AUTO_PART_SCAN)
		ublk_allow_scan(disk);
	else
		queue_work(ublk_scan_wq, &ub->scan_work);
out:
	mutex_unlock(&ub->mutex);
	return ret;
}

/**
 * ublk_start_dev() - Start a device (START_DEV).
 * @ub: the device
 * @data: process id of the server, in the pid namespace of the caller
 *
 * Waits until the server has fetched all tags.
 *
 * Context: Process context of the sender; waits interruptibly.
 *
 * Return: 0, or a negative errno.
 */
int ublk_start_dev(struct ublk_device *ub, u64 data)
{
	pid_t nr = (int)data;
	int ret;

	if (nr <= 0)
		return -EINVAL;
	if (!(READ_ONCE(ub->params.types) & UBLK_PARAM_TYPE_BASIC))
		return -EINVAL;
	ret = ublk_wait_fetched(ub);
	if (ret)
		return ret;
	/* Looked up here, in the pid namespace of the caller. */
	return ublk_run_job(ub, ublk_do_start, find_get_pid(nr));
}

/*
 * Removes the disk. A live server serves requests until the disk is gone.
 * Without a server, held and new requests fail.
 */
static void ublk_remove_disk(struct ublk_device *ub)
{
	struct gendisk *disk = ub->disk;

	lockdep_assert_held(&ub->mutex);
	if (!disk)
		return;
	spin_lock(&ub->lock);
	ub->stopping = true;
	ublk_gates_stop_holding(ub);
	spin_unlock(&ub->lock);
	blk_mq_kick_requeue_list(disk->queue);
	/* A server that was killed may be unable to die before this. */
	ublk_take_back_gone(ub);

	cancel_work_sync(&ub->scan_work);
	del_gendisk(disk);

	spin_lock(&ub->lock);
	ub->disk = NULL;
	ub->recoverable = false;
	ub->stopping = false;
	/*
	 * No request is held any more. If the char device is open,
	 * ublk_reset_slots() does this once it has been released.
	 */
	if (!test_bit(UBLK_DEV_OPEN, &ub->bits))
		ublk_unwatch(ub);
	spin_unlock(&ub->lock);
	ublk_set_state(ub, UBLK_S_DEV_DEAD, NULL);
	put_disk(disk);
}

/**
 * ublk_do_stop() - Stop a device.
 * @ub: the device
 * @unused: not used
 *
 * Removes the disk, and cancels the commands of the server.
 *
 * Context: Job, or process context of a caller that no server waits for.
 *
 * Return: 0.
 */
int ublk_do_stop(struct ublk_device *ub, struct pid *unused)
{
	mutex_lock(&ub->mutex);
	ublk_remove_disk(ub);
	/*
	 * The process that has the char device open now cannot serve a new
	 * disk. The mutex keeps ublk_release_work() from admitting the next
	 * server before the last slot is canceled.
	 */
	if (test_bit(UBLK_DEV_OPEN, &ub->bits)) {
		spin_lock(&ub->lock);
		WRITE_ONCE(ub->closing, true);
		spin_unlock(&ub->lock);
		ublk_mark_leaving(ub);
		ublk_cancel_slots(ub);
		wake_up_all(&ub->wait);
	}
	mutex_unlock(&ub->mutex);
	return 0;
}

/**
 * ublk_stop_dev() - Stop a device (STOP_DEV).
 * @ub: the device
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, or a negative errno, see ublk_run_job().
 */
int ublk_stop_dev(struct ublk_device *ub)
{
	return ublk_run_job(ub, ublk_do_stop, NULL);
}

/* The job of TRY_STOP_DEV. Afterwards there is no disk that could be opened. */
static int ublk_do_try_stop(struct ublk_device *ub, struct pid *unused)
{
	ublk_do_stop(ub, NULL);
	atomic_dec(&ub->nr_try_stops);
	return 0;
}

/**
 * ublk_try_stop_dev() - Stop a device unless its disk is open (TRY_STOP_DEV).
 * @ub: the device
 *
 * The disk cannot be opened until it has been removed, or until each such
 * command whose sender was killed before its job has started is withdrawn.
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, -ENODEV without a disk, -EBUSY if it is open, or another negative
 *	errno.
 */
int ublk_try_stop_dev(struct ublk_device *ub)
{
	struct gendisk *disk = ublk_get_disk(ub);
	int ret = 0;

	if (!disk)
		return -ENODEV;
	/*
	 * A partition scan may hold it for as long as there is no server.
	 */
	if (mutex_lock_killable(&disk->open_mutex)) {
		put_disk(disk);
		return -EINTR;
	}
	if (disk_openers(disk) > 0)
		ret = -EBUSY;
	else
		atomic_inc(&ub->nr_try_stops);
	mutex_unlock(&disk->open_mutex);
	/* With this reference to the disk there cannot be another one. */
	if (!ret) {
		ret = ublk_run_job(ub, ublk_do_try_stop, NULL);
		/* The job will not run. */
		if (ret == -ECANCELED || ret == -ENOMEM)
			atomic_dec(&ub->nr_try_stops);
	}
	put_disk(disk);
	return ret;
}

static bool ublk_waits_for_server(const struct ublk_device *ub)
{
	return ub->dev_info.state == UBLK_S_DEV_QUIESCED ||
	       ub->dev_info.state == UBLK_S_DEV_FAIL_IO;
}

/**
 * ublk_start_recovery() - Start the recovery of a device (START_USER_RECOVERY).
 * @ub: the device
 *
 * Only checks the state: ublk_release_work() has cleaned up after the last
 * server.
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, -EINVAL, -EBUSY or -EINTR.
 */
int ublk_start_recovery(struct ublk_device *ub)
{
	int ret = 0;

	if (!(ub->dev_info.flags & UBLK_F_USER_RECOVERY))
		return -EINVAL;
	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	if (test_bit(UBLK_DEV_OPEN, &ub->bits) || !ublk_waits_for_server(ub))
		ret = -EBUSY;
	mutex_unlock(&ub->mutex);
	return ret;
}

/**
 * ublk_end_recovery() - End the recovery of a device (END_USER_RECOVERY).
 * @ub: the device
 * @data: process id of the new server, in the pid namespace of the caller
 *
 * Waits until the server has fetched all tags, and lets requests through that
 * were held.
 *
 * Context: Process context of the sender; waits interruptibly.
 *
 * Return: 0, or a negative errno.
 */
int ublk_end_recovery(struct ublk_device *ub, u64 data)
{
	pid_t nr = (int)data;
	struct pid *pid;
	int ret;

	if (!(ub->dev_info.flags & UBLK_F_USER_RECOVERY))
		return -EINVAL;
	if (nr <= 0)
		return -EINVAL;
	ret = ublk_wait_fetched(ub);
	if (ret)
		return ret;

	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	pid = find_get_pid(nr);
	ret = ublk_check_server(ub, pid);
	if (ret)
		goto out;
	ret = -EBUSY;
	if (!ublk_waits_for_server(ub))
		goto out;
	ret = -ENODEV;
	if (READ_ONCE(ub->canceling))
		goto out;
	ublk_set_state(ub, UBLK_S_DEV_LIVE, get_pid(ub->opener));
	spin_lock(&ub->lock);
	ublk_gates_open(ub);
	if (!ub->canceling)
		ublk_unwatch_serving(ub);
	spin_unlock(&ub->lock);
	blk_mq_kick_requeue_list(ub->disk->queue);
	ret = 0;
out:
	mutex_unlock(&ub->mutex);
	put_pid(pid);
	return ret;
}

/*
 * Whether the server that had @nr_servers predecessors is leaving, or has left.
 */
static bool ublk_leaving(const struct ublk_device *ub, unsigned int nr_servers)
{
	return ublk_server_notified(ub) ||
	       READ_ONCE(ub->nr_servers) != nr_servers ||
	       READ_ONCE(ub->dev_info.state) != UBLK_S_DEV_LIVE;
}

/**
 * ublk_quiesce_dev() - Ask the server to leave (QUIESCE_DEV).
 * @ub: the device
 * @timeout_ms: time-out in milliseconds; 0 or UINT_MAX and above: none
 *
 * New requests are held, and every tag that is idle or becomes idle is returned
 * with UBLK_IO_RES_ABORT. Waits until a tag of each queue was returned, so that
 * the server knows. After a time-out the server will still be notified.
 *
 * Context: Process context of the sender; waits interruptibly.
 *
 * Return: 0, -EBUSY after the time-out, or another negative errno.
 */
int ublk_quiesce_dev(struct ublk_device *ub, u64 timeout_ms)
{
	unsigned long timeout = MAX_SCHEDULE_TIMEOUT;
	unsigned int nr_servers;
	long left;
	int ret = 0;

	if (!(ub->dev_info.flags & UBLK_F_QUIESCE))
		return -EOPNOTSUPP;
	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	if (!ub->disk || ub->dev_info.state == UBLK_S_DEV_DEAD)
		ret = -ENODEV;
	else if (ub->dev_info.state != UBLK_S_DEV_LIVE)
		ret = 1;
	if (!ret) {
		/* Under the mutex for the reason that ublk_do_stop() gives. */
		ublk_mark_leaving(ub);
		ublk_cancel_slots(ub);
	}
	nr_servers = ub->nr_servers;
	mutex_unlock(&ub->mutex);
	if (ret)
		return min(ret, 0);

	if (timeout_ms && timeout_ms < UINT_MAX)
		timeout = msecs_to_jiffies(timeout_ms);
	left = wait_event_interruptible_timeout(ub->wait,
						ublk_leaving(ub, nr_servers),
						timeout);
	if (left < 0)
		return -EINTR;
	return left ? 0 : -EBUSY;
}

/**
 * ublk_release_work() - Clean up after a server.
 * @work: ublk_device.release_work
 *
 * The last holder of the char device has closed it. The device is then
 * recoverable, or its disk is removed.
 *
 * Context: Work item.
 */
void ublk_release_work(struct work_struct *work)
{
	struct ublk_device *ub =
		container_of(work, struct ublk_device, release_work);
	struct mm_struct *mm;
	struct pid *opener;
	u16 state;

	ublk_mark_leaving(ub);
	/*
	 * After this, each queue_rq() that has seen an open gate has finished:
	 * the tag set is not blocking, so it runs under RCU. So has each
	 * ublk_io_put() that did not see "canceling" and therefore wakes no
	 * waiter.
	 */
	synchronize_rcu();
	ublk_abort_slots(ub);
	/* For buffers in the tables of rings. User space decides how long this takes. */
	wait_event_idle(ub->wait, ublk_refs_gone(ub));
	/* See ublk_io_put(). */
	synchronize_rcu();

	mutex_lock(&ub->mutex);
	if (ub->recoverable) {
		state = ub->dev_info.flags & UBLK_F_USER_RECOVERY_FAIL_IO ?
			UBLK_S_DEV_FAIL_IO : UBLK_S_DEV_QUIESCED;
		ublk_set_state(ub, state, NULL);
	} else {
		ublk_remove_disk(ub);
	}
	ublk_reset_slots(ub);
	spin_lock(&ub->lock);
	mm = ub->mm;
	ub->mm = NULL;
	opener = ub->opener;
	ub->opener = NULL;
	spin_unlock(&ub->lock);
	clear_bit_unlock(UBLK_DEV_OPEN, &ub->bits);
	mutex_unlock(&ub->mutex);

	if (mm)
		mmdrop(mm);
	put_pid(opener);
	wake_up_all(&ub->wait);
	put_device(&ub->dev);
	/* Unloading the module waits until this function has finished. */
	module_put(THIS_MODULE);
}
