/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Assertions and race widening for builds with UBLK_DEBUG=1, such as those for
 * the debug kernel of the testbed. Other builds contain none of this.
 */
#ifndef UBLK_DEBUG_H
#define UBLK_DEBUG_H

/* Places where two contexts race for a request or a device. */
enum ublk_race {
	UBLK_RACE_QUEUE,	/* gate checked, slot not claimed */
	UBLK_RACE_DELIVER,	/* request claimed by task work, not delivered */
	UBLK_RACE_COMMIT,	/* slot armed again, request not ended */
	UBLK_RACE_TAKE,		/* take-back decided, request not claimed */
	UBLK_RACE_TAKE_BACK,	/* request taken back, not ended */
	UBLK_RACE_ADD,		/* device published, uevent not sent */
	UBLK_RACE_ADDED,	/* device can be removed, ADD_DEV still running */
	UBLK_RACE_BATCH,	/* slot claimed, tag not in the ring */
};

#ifdef UBLK_DEBUG
#include <linux/bug.h>
#include <linux/delay.h>

/* Module parameters: bit mask of enum ublk_race, and the delay in each place. */
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
