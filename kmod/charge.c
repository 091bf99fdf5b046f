// SPDX-License-Identifier: GPL-2.0
/*
 * Kernel memory that users pay for. It outlives the process, so it is charged
 * to the user, together with the buffers of io_uring and for the same callers:
 * a user may own many unprivileged devices.
 */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>

#include "internal.h"

/**
 * ublk_charge_pages() - count pages against the caller's RLIMIT_MEMLOCK
 * @nr_pages:	how many
 * @payer:	set to the user that is charged, or to NULL if the caller has
 *		CAP_IPC_LOCK, and may take what it likes
 *
 * Return: 0, or -ENOMEM if the limit would be exceeded.
 */
int ublk_charge_pages(unsigned long nr_pages, struct user_struct **payer)
{
	unsigned long limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
	struct user_struct *user = current_user();
	long old, new;

	*payer = NULL;
	if (capable(CAP_IPC_LOCK))
		return 0;
	old = atomic_long_read(&user->locked_vm);
	do {
		new = old + nr_pages;
		if (new > limit)
			return -ENOMEM;
	} while (!atomic_long_try_cmpxchg(&user->locked_vm, &old, new));
	*payer = get_uid(user);
	return 0;
}

/* Undoes ublk_charge_pages(), from any task. */
void ublk_uncharge_pages(struct user_struct *payer, unsigned long nr_pages)
{
	if (!payer)
		return;
	atomic_long_sub(nr_pages, &payer->locked_vm);
	free_uid(payer);
}
