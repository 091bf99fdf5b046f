/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Memory management.
 */
#ifndef UBLK_COMPAT_MM_H
#define UBLK_COMPAT_MM_H

/* Until 6.2, except for some stable releases. */
#ifndef UBLK_HAVE_VM_FLAGS_CLEAR
#include <linux/mm.h>

static inline void vm_flags_clear(struct vm_area_struct *vma,
				  unsigned long flags)
{
	vma->vm_flags &= ~flags;
}
#endif

/* Until 6.19. */
#ifndef UBLK_HAVE_KZALLOC_OBJ
#include <linux/slab.h>

#define kzalloc_obj(var_or_type) ({					\
	typeof(var_or_type) *__obj = kzalloc(sizeof(*__obj), GFP_KERNEL); \
									\
	__obj;								\
})
#endif

/* Until 6.5. */
#ifndef __counted_by
#define __counted_by(member)
#endif

#endif /* UBLK_COMPAT_MM_H */
