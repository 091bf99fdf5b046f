/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Checks for builds with UBLK_DEBUG=1 ("make UBLK_DEBUG=1"; the testbed's debug
 * kernel has them on). Without it they cost nothing.
 */
#ifndef UBLK_DEBUG_H
#define UBLK_DEBUG_H

/* Places where two sides race for a request, or for a device. */
enum ublk_race {
	UBLK_RACE_QUEUE,	/* a request has a gate's word, and no slot yet */
	UBLK_RACE_DELIVER,	/* task work has won a request */
	UBLK_RACE_COMMIT,	/* a slot is armed again, its request not ended */
	UBLK_RACE_TAKE,		/* a request is to be taken back, and not won */
	UBLK_RACE_TAKE_BACK,	/* a request is taken back, and not ended */
	UBLK_RACE_ADD,		/* a device is known, its uevent not sent */
	UBLK_RACE_ADDED,	/* a device can be removed, its ADD_DEV not over */
	UBLK_RACE_BATCH,	/* a request has won its slot, and is not in the ring */
};

#ifdef UBLK_DEBUG
#include <linux/bug.h>
#include <linux/delay.h>

/* Module parameters: a bit for each place, and for how long it is kept open. */
extern unsigned long ublk_widen;
extern unsigned int ublk_widen_us;

#define ublk_assert(condition)	WARN_ON_ONCE(!(condition))

static inline void ublk_race(enum ublk_race race)
{
	if (READ_ONCE(ublk_widen) & BIT(race))
		udelay(min(READ_ONCE(ublk_widen_us), 2000U));
}
#else
#define ublk_assert(condition)	((void)sizeof(!!(condition)))

static inline void ublk_race(enum ublk_race race)
{
}
#endif

#endif /* UBLK_DEBUG_H */
