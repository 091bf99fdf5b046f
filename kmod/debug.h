/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Assertions, race widening and shorter times for builds with UBLK_DEBUG=1, such
 * as those for the debug kernel of the testbed. Other builds contain none of
 * this.
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

#include <linux/jiffies.h>

#ifdef UBLK_DEBUG
#include <linux/bug.h>
#include <linux/delay.h>
#include <linux/minmax.h>

/* Module parameters: bit mask of enum ublk_race, and the delay in each place. */
extern unsigned long ublk_widen;
extern unsigned int ublk_widen_us;
/* Module parameter: the interval of ublk_reap_tick() in milliseconds. */
extern unsigned int ublk_reap_ms;

#define ublk_assert(condition)	WARN_ON_ONCE(!(condition))

static inline void ublk_race(enum ublk_race race)
{
	if (READ_ONCE(ublk_widen) & BIT(race))
		udelay(min(READ_ONCE(ublk_widen_us), 2000U));
}

/* A wait that takes hours at the ordinary interval can be tested in a minute. */
static inline unsigned long ublk_reap_interval(void)
{
	return max(1UL, msecs_to_jiffies(READ_ONCE(ublk_reap_ms)));
}
#else
#define ublk_assert(condition)	((void)sizeof(!!(condition)))

static inline void ublk_race(enum ublk_race race)
{
}

static inline unsigned long ublk_reap_interval(void)
{
	return HZ;
}
#endif

#endif /* UBLK_DEBUG_H */
