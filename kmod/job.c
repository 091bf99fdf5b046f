// SPDX-License-Identifier: GPL-2.0
/*
 * Control commands that wait for requests: START_DEV, STOP_DEV, DEL_DEV and
 * others.
 *
 * Their sender may be the server that has to complete these requests. If it is
 * killed, it waits for its commands to end before it closes the char device,
 * and only that close fails the requests. So a kernel thread carries these
 * commands out, and their senders wait for it killably.
 */
#include <linux/completion.h>
#include <linux/list.h>
#include <linux/pid.h>
#include <linux/slab.h>

#include "internal.h"

/* A command that is carried out by a kernel thread. */
struct ublk_job {
	struct list_head	node;		/* in ublk_device.jobs until it starts */
	struct completion	done;
	refcount_t		users;		/* sender and worker */
	struct ublk_device	*ub;
	ublk_job_fn		*fn;
	struct pid		*pid;
	int			ret;
};

static void ublk_job_put(struct ublk_job *job)
{
	if (!refcount_dec_and_test(&job->users))
		return;
	put_pid(job->pid);
	put_device(&job->ub->dev);
	kfree(job);
}

/**
 * ublk_job_work() - Carry out the jobs of a device.
 * @work: ublk_device.job_work
 *
 * Jobs of one device would wait for each other anyway. So a device occupies one
 * worker, however many commands its users send.
 *
 * Context: Work item.
 */
void ublk_job_work(struct work_struct *work)
{
	struct ublk_device *ub =
		container_of(work, struct ublk_device, job_work);
	struct ublk_job *job;

	for (;;) {
		spin_lock(&ub->lock);
		job = list_first_entry_or_null(&ub->jobs, struct ublk_job, node);
		if (job)
			list_del_init(&job->node);
		spin_unlock(&ub->lock);
		if (!job)
			break;
		job->ret = job->fn(ub, job->pid);
		complete(&job->done);
		ublk_job_put(job);
	}
	/*
	 * The reference of the work item, which it needs because all of its
	 * jobs may have been withdrawn.
	 */
	put_device(&ub->dev);
}

/*
 * Allocates a job for the sender and the worker. @pid is the argument for @fn,
 * or NULL; on success the job has its reference.
 */
static struct ublk_job *ublk_job_alloc(struct ublk_device *ub, ublk_job_fn *fn,
				       struct pid *pid, gfp_t gfp)
{
	struct ublk_job *job = kzalloc(sizeof(*job), gfp);

	if (!job)
		return NULL;
	init_completion(&job->done);
	refcount_set(&job->users, 2);
	get_device(&ub->dev);
	job->ub = ub;
	job->fn = fn;
	job->pid = pid;
	return job;
}

/* Queues a job, after those that are queued already. */
static void ublk_job_queue(struct ublk_job *job)
{
	struct ublk_device *ub = job->ub;

	spin_lock(&ub->lock);
	list_add_tail(&job->node, &ub->jobs);
	spin_unlock(&ub->lock);
	get_device(&ub->dev);
	if (!queue_work(ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV ?
			ublk_user_job_wq : ublk_job_wq, &ub->job_work))
		put_device(&ub->dev);
}

/* Withdraws a job that has not started. Returns false if it has. */
static bool ublk_job_withdraw(struct ublk_job *job)
{
	struct ublk_device *ub = job->ub;
	bool waiting;

	spin_lock(&ub->lock);
	waiting = !list_empty(&job->node);
	list_del_init(&job->node);
	spin_unlock(&ub->lock);
	if (waiting)
		ublk_job_put(job);
	return waiting;
}

/**
 * ublk_run_job() - Run a function in a kernel thread and wait for it.
 * @ub: the device
 * @fn: the function
 * @pid: argument for @fn, or NULL; consumes a reference
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: the return value of @fn. If the sender was killed: -EINTR if @fn is
 *	still running, -ECANCELED if it will not run.
 */
int ublk_run_job(struct ublk_device *ub, ublk_job_fn *fn, struct pid *pid)
{
	struct ublk_job *job;
	int ret;

	job = ublk_job_alloc(ub, fn, pid, GFP_KERNEL_ACCOUNT);
	if (!job) {
		put_pid(pid);
		return -ENOMEM;
	}
	ublk_job_queue(job);
	if (!wait_for_completion_killable(&job->done))
		ret = job->ret;
	else
		ret = ublk_job_withdraw(job) ? -ECANCELED : -EINTR;
	ublk_job_put(job);
	return ret;
}

/**
 * ublk_run_job_always() - Run a function in a kernel thread, even if the sender
 *   is killed.
 * @ub: the device
 * @fn: the function
 *
 * Like ublk_run_job(), but if the sender is killed, the job stays queued and
 * runs later. The job is allocated without fail, as there is no other way to
 * run @fn: a caller that waited for requests itself could not be killed.
 *
 * Context: Process context of the sender; waits killably.
 */
void ublk_run_job_always(struct ublk_device *ub, ublk_job_fn *fn)
{
	struct ublk_job *job;

	job = ublk_job_alloc(ub, fn, NULL, GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);
	ublk_job_queue(job);
	/* If the sender is killed, the worker has the last reference. */
	wait_for_completion_killable(&job->done);
	ublk_job_put(job);
}
