// SPDX-License-Identifier: GPL-2.0
/*
 * Accounting of kernel memory that users occupy. It outlives the process, and
 * one user may own many unprivileged devices, so it is charged to the user,
 * together with the buffers of io_uring and under the same rules.
 */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>

#include "internal.h"

/**
 * ublk_charge_pages() - Charge pages against RLIMIT_MEMLOCK of the caller.
 * @nr_pages: number of pages
 * @payer: set to the user that is charged, or to NULL if the caller has
 *	CAP_IPC_LOCK and is not limited
 *
 * Context: Process context.
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

/**
 * ublk_uncharge_pages() - Undo ublk_charge_pages().
 * @payer: the user that was charged, or NULL
 * @nr_pages: number of pages
 *
 * Context: Any task.
 */
void ublk_uncharge_pages(struct user_struct *payer, unsigned long nr_pages)
{
	if (!payer)
		return;
	atomic_long_sub(nr_pages, &payer->locked_vm);
	free_uid(payer);
}
