// SPDX-License-Identifier: GPL-2.0
/*
 * Control commands that wait for requests: START_DEV, STOP_DEV and their kin.
 *
 * Who sends them may be the very server that has to answer the requests. If it
 * is killed, it waits for its commands before it lets go of the char device,
 * and only that fails the requests. So a kernel thread carries these commands
 * out, and their senders can be killed while they wait.
 */
#include <linux/completion.h>
#include <linux/pid.h>
#include <linux/slab.h>

#include "ublk.h"

struct ublk_job {
	struct work_struct	work;
	struct completion	done;
	refcount_t		users;		/* who waits, and who works */
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

static void ublk_job_work(struct work_struct *work)
{
	struct ublk_job *job = container_of(work, struct ublk_job, work);

	job->ret = job->fn(job->ub, job->pid);
	complete(&job->done);
	ublk_job_put(job);
}

/*
 * What @fn returns, or -EINTR: it goes on then. @pid, for which a reference is
 * handed over, is for @fn.
 */
int ublk_run_job(struct ublk_device *ub, ublk_job_fn *fn, struct pid *pid)
{
	struct ublk_job *job;
	int ret;

	job = kzalloc_obj(*job);
	if (!job) {
		put_pid(pid);
		return -ENOMEM;
	}
	INIT_WORK(&job->work, ublk_job_work);
	init_completion(&job->done);
	refcount_set(&job->users, 2);
	get_device(&ub->dev);
	job->ub = ub;
	job->fn = fn;
	job->pid = pid;
	queue_work(ublk_job_wq, &job->work);
	if (wait_for_completion_killable(&job->done))
		ret = -EINTR;
	else
		ret = job->ret;
	ublk_job_put(job);
	return ret;
}
