// SPDX-License-Identifier: GPL-2.0
/*
 * Parameters of a disk (SET_PARAMS, GET_PARAMS), and the queue limits that
 * follow from them.
 */
#include <linux/blk-integrity.h>
#include <linux/fs.h>
#include <linux/kdev_t.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/t10-pi.h>
#include <linux/uaccess.h>

#include "internal.h"

#define UBLK_PARAM_TYPES	(UBLK_PARAM_TYPE_BASIC | \
				 UBLK_PARAM_TYPE_DISCARD | \
				 UBLK_PARAM_TYPE_DEVT | \
				 UBLK_PARAM_TYPE_ZONED | \
				 UBLK_PARAM_TYPE_DMA_ALIGN | \
				 UBLK_PARAM_TYPE_SEGMENT | \
				 UBLK_PARAM_TYPE_INTEGRITY)

/*
 * Largest granularity of discards. Block layers before 6.12 compute the length
 * of a bio from it, and loop if that is zero.
 */
#define UBLK_MAX_DISCARD_GRANULARITY	((u32)SZ_2G)

/*
 * Largest disk of an ordinary user, in sectors and in its longest requests, and
 * the shortest limits of its discards and write zeroes, in sectors.
 */
#define UBLK_MAX_USER_SECTORS	(16ULL * SZ_1K * SZ_1G >> SECTOR_SHIFT)
#define UBLK_MAX_USER_REQUESTS	(32ULL * SZ_1M)
#define UBLK_MIN_USER_RANGE	(SZ_1M >> SECTOR_SHIFT)

/* Largest block size and I/O hint, safely within the range of the limits. */
#define UBLK_MAX_SHIFT		28

/* The first members of struct ublk_params, which are present in any length. */
struct ublk_params_head {
	__u32	len;
	__u32	types;
};

static bool ublk_has_param(const struct ublk_params *p, u32 type)
{
	return p->types & type;
}

/* Whether a mask has the form 2^n - 1, with 2^n at least @min. */
static bool ublk_mask_valid(u64 mask, u64 min)
{
	return mask + 1 >= min && !(mask & (mask + 1));
}

/*
 * Whether loops that use ranges of this length are short enough for a disk of
 * an ordinary user.
 */
static bool ublk_user_range_valid(u32 range, u64 disk)
{
	return !range || range >= min_t(u64, UBLK_MIN_USER_RANGE, disk);
}

static bool ublk_user_size_valid(const struct ublk_params *p, u64 sectors)
{
	u64 request = p->basic.max_sectors;

	if (ublk_has_param(p, UBLK_PARAM_TYPE_SEGMENT))
		request = min(request, (u64)p->seg.max_segments * PAGE_SECTORS);
	if (sectors > min(UBLK_MAX_USER_SECTORS,
			  request * UBLK_MAX_USER_REQUESTS))
		return false;
	return !ublk_has_param(p, UBLK_PARAM_TYPE_DISCARD) ||
	       (ublk_user_range_valid(p->discard.max_discard_sectors,
				      sectors) &&
		ublk_user_range_valid(p->discard.max_write_zeroes_sectors,
				      sectors));
}

/**
 * ublk_size_valid() - Whether a device may have a disk of a size.
 * @ub: the device, with its other parameters
 * @sectors: the size
 *
 * Loops of the block layer over a whole disk, such as fallocate() with
 * FALLOC_FL_ZERO_RANGE, do not look for signals. They must be over within
 * seconds when an ordinary user's disk is gone and each request fails at once.
 *
 * Context: Any context.
 */
bool ublk_size_valid(const struct ublk_device *ub, u64 sectors)
{
	if (ub->dev_info.flags & UBLK_F_UNPRIVILEGED_DEV)
		return ublk_user_size_valid(&ub->params, sectors);
	return sectors <= UBLK_MAX_SECTORS;
}

static int ublk_check_basic(const struct ublk_device *ub,
			    const struct ublk_param_basic *p)
{
	u32 max_sectors = ub->dev_info.max_io_buf_bytes >> SECTOR_SHIFT;

	if (p->logical_bs_shift < SECTOR_SHIFT ||
	    p->logical_bs_shift > PAGE_SHIFT)
		return -EINVAL;
	if (p->physical_bs_shift < p->logical_bs_shift ||
	    p->physical_bs_shift > UBLK_MAX_SHIFT)
		return -EINVAL;
	if (p->io_min_shift > UBLK_MAX_SHIFT ||
	    p->io_opt_shift > UBLK_MAX_SHIFT)
		return -EINVAL;
	if (p->max_sectors > max_sectors || p->max_sectors < PAGE_SECTORS)
		return -EINVAL;
	if (!ublk_size_valid(ub, p->dev_sectors))
		return -EINVAL;
	/* A chunk must consist of whole logical blocks. */
	if (p->chunk_sectors &
	    ((1U << (p->logical_bs_shift - SECTOR_SHIFT)) - 1))
		return -EINVAL;
	if ((ub->dev_info.flags & UBLK_F_ZONED) &&
	    !is_power_of_2(p->chunk_sectors))
		return -EINVAL;
	return 0;
}

static int ublk_check_discard(const struct ublk_param_discard *p)
{
	/* The longest bio must be able to hold one unit. */
	if (!p->discard_granularity ||
	    p->discard_granularity > UBLK_MAX_DISCARD_GRANULARITY)
		return -EINVAL;
	/* A descriptor can hold one range only. */
	if (p->max_discard_sectors && p->max_discard_segments != 1)
		return -EINVAL;
	return 0;
}

static int ublk_check_zones(const struct ublk_device *ub,
			    const struct ublk_params *p)
{
	u64 nr_zones;

	if (!IS_ENABLED(CONFIG_BLK_DEV_ZONED))
		return -EOPNOTSUPP;
	if (!(ub->dev_info.flags & UBLK_F_ZONED))
		return -EINVAL;
	if (!p->zoned.max_zone_append_sectors)
		return -EINVAL;
	nr_zones = p->basic.dev_sectors >> ilog2(p->basic.chunk_sectors);
	if (p->zoned.max_open_zones > nr_zones ||
	    p->zoned.max_active_zones > nr_zones)
		return -EINVAL;
	return 0;
}

static int ublk_check_segment(const struct ublk_param_segment *p)
{
	if (!ublk_mask_valid(p->seg_boundary_mask, UBLK_MIN_SEGMENT_SIZE))
		return -EINVAL;
	if (p->max_segment_size < UBLK_MIN_SEGMENT_SIZE)
		return -EINVAL;
	return 0;
}

#ifdef UBLK_CAN_INTEGRITY
/* Size of the protection information that a checksum type uses. */
static int ublk_pi_tuple_size(u8 csum_type)
{
	switch (csum_type) {
	case LBMD_PI_CSUM_NONE:
		return 0;
	case LBMD_PI_CSUM_IP:
	case LBMD_PI_CSUM_CRC16_T10DIF:
		return sizeof(struct t10_pi_tuple);
	case LBMD_PI_CSUM_CRC64_NVME:
		return sizeof(struct crc64_pi_tuple);
	default:
		return -EINVAL;
	}
}

static int ublk_check_integrity(const struct ublk_device *ub,
				const struct ublk_params *p)
{
	const struct ublk_param_integrity *pi = &p->integrity;
	int tuple_size = ublk_pi_tuple_size(pi->csum_type);

	if (!(ub->dev_info.flags & UBLK_F_INTEGRITY))
		return -EINVAL;
	if (pi->flags & ~(LBMD_PI_CAP_INTEGRITY | LBMD_PI_CAP_REFTAG))
		return -EINVAL;
	if (tuple_size < 0)
		return tuple_size;
	if (!pi->metadata_size)
		return -EINVAL;
	if ((pi->flags & LBMD_PI_CAP_REFTAG) &&
	    pi->csum_type == LBMD_PI_CSUM_NONE)
		return -EINVAL;
	if (pi->pi_offset + tuple_size > pi->metadata_size)
		return -EINVAL;
	if (pi->interval_exp < SECTOR_SHIFT ||
	    pi->interval_exp > p->basic.logical_bs_shift)
		return -EINVAL;
	return 0;
}

static void ublk_integrity_limits(const struct ublk_param_integrity *pi,
				  struct queue_limits *lim)
{
	struct blk_integrity *bi = &lim->integrity;

	/*
	 * The server sees contiguous data, so intervals may be split over
	 * segments.
	 */
	bi->flags = BLK_SPLIT_INTERVAL_CAPABLE;
	if (pi->flags & LBMD_PI_CAP_INTEGRITY)
		bi->flags |= BLK_INTEGRITY_DEVICE_CAPABLE;
	if (pi->flags & LBMD_PI_CAP_REFTAG)
		bi->flags |= BLK_INTEGRITY_REF_TAG;
	switch (pi->csum_type) {
	case LBMD_PI_CSUM_IP:
		bi->csum_type = BLK_INTEGRITY_CSUM_IP;
		break;
	case LBMD_PI_CSUM_CRC16_T10DIF:
		bi->csum_type = BLK_INTEGRITY_CSUM_CRC;
		break;
	case LBMD_PI_CSUM_CRC64_NVME:
		bi->csum_type = BLK_INTEGRITY_CSUM_CRC64;
		break;
	default:
		bi->csum_type = BLK_INTEGRITY_CSUM_NONE;
		break;
	}
	bi->metadata_size = pi->metadata_size;
	bi->pi_offset = pi->pi_offset;
	bi->pi_tuple_size = ublk_pi_tuple_size(pi->csum_type);
	bi->interval_exp = pi->interval_exp;
	bi->tag_size = pi->tag_size;
	lim->max_integrity_segments = pi->max_integrity_segments ?: USHRT_MAX;
}
#else
static int ublk_check_integrity(const struct ublk_device *ub,
				const struct ublk_params *p)
{
	return -EINVAL;
}

static void ublk_integrity_limits(const struct ublk_param_integrity *pi,
				  struct queue_limits *lim)
{
}
#endif

static int ublk_check_params(const struct ublk_device *ub,
			     const struct ublk_params *p)
{
	int ret;

	if (!ublk_has_param(p, UBLK_PARAM_TYPE_BASIC))
		return -EINVAL;
	ret = ublk_check_basic(ub, &p->basic);
	if (ret)
		return ret;
	if (ublk_has_param(p, UBLK_PARAM_TYPE_DISCARD)) {
		ret = ublk_check_discard(&p->discard);
		if (ret)
			return ret;
	}
	/* Only GET_PARAMS returns device numbers. */
	if (ublk_has_param(p, UBLK_PARAM_TYPE_DEVT))
		return -EINVAL;
	if (ublk_has_param(p, UBLK_PARAM_TYPE_ZONED)) {
		ret = ublk_check_zones(ub, p);
		if (ret)
			return ret;
	} else if (ub->dev_info.flags & UBLK_F_ZONED) {
		return -EINVAL;
	}
	if (ublk_has_param(p, UBLK_PARAM_TYPE_DMA_ALIGN) &&
	    (p->dma.alignment >= PAGE_SIZE ||
	     !ublk_mask_valid(p->dma.alignment, 1)))
		return -EINVAL;
	if (ublk_has_param(p, UBLK_PARAM_TYPE_SEGMENT)) {
		ret = ublk_check_segment(&p->seg);
		if (ret)
			return ret;
	}
	if (ublk_has_param(p, UBLK_PARAM_TYPE_INTEGRITY))
		return ublk_check_integrity(ub, p);
	return 0;
}

static int ublk_read_head(const struct ublk_params __user *arg, u16 len,
			  struct ublk_params_head *head)
{
	if (!arg || len <= sizeof(*head))
		return -EINVAL;
	if (copy_from_user(head, arg, sizeof(*head)))
		return -EFAULT;
	if (!head->len || head->len > len)
		return -EINVAL;
	return 0;
}

/**
 * ublk_set_params() - Set the parameters of a device (SET_PARAMS).
 * @ub: the device
 * @arg: the parameters
 * @len: size of the buffer at @arg
 *
 * Parameters that are shorter than the previous ones replace the front of
 * these. Invalid ones clear all parameters.
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, or a negative errno.
 */
int ublk_set_params(struct ublk_device *ub,
		    const struct ublk_params __user *arg, u16 len)
{
	struct ublk_params_head head;
	struct ublk_params params;
	size_t size;
	int ret;

	ret = ublk_read_head(arg, len, &head);
	if (ret)
		return ret;
	if (!head.types)
		return -EINVAL;

	/*
	 * A page fault may need the server of this disk, so do this without the
	 * mutex.
	 */
	size = min_t(size_t, head.len, sizeof(params));
	if (copy_from_user(&params, arg, size))
		return -EFAULT;
	/*
	 * Use the head that was checked; user space may have changed it since.
	 */
	memcpy(&params, &head, min(size, sizeof(head)));

	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	if (test_bit(UBLK_DEV_USED, &ub->bits)) {
		ret = -EACCES;
		goto out;
	}
	memcpy(&ub->params, &params, size);
	ub->params.types &= UBLK_PARAM_TYPES;
	ret = ublk_check_params(ub, &ub->params);
	if (ret)
		memset(&ub->params, 0, sizeof(ub->params));
out:
	mutex_unlock(&ub->mutex);
	return ret;
}

/**
 * ublk_get_params() - Get the parameters of a device (GET_PARAMS).
 * @ub: the device
 * @arg: receives the parameters; its len says how much of them
 * @len: size of the buffer at @arg
 *
 * Context: Process context of the sender; waits killably.
 *
 * Return: 0, or a negative errno.
 */
int ublk_get_params(struct ublk_device *ub, struct ublk_params __user *arg,
		    u16 len)
{
	struct ublk_params_head head;
	struct ublk_params params;
	dev_t disk = 0;
	int ret;

	ret = ublk_read_head(arg, len, &head);
	if (ret)
		return ret;

	if (mutex_lock_killable(&ub->mutex))
		return -EINTR;
	params = ub->params;
	if (ub->disk)
		disk = disk_devt(ub->disk);
	mutex_unlock(&ub->mutex);

	params.types |= UBLK_PARAM_TYPE_DEVT;
	params.devt.char_major = MAJOR(ub->dev.devt);
	params.devt.char_minor = MINOR(ub->dev.devt);
	params.devt.disk_major = MAJOR(disk);
	params.devt.disk_minor = MINOR(disk);
	if (copy_to_user(arg, &params, min_t(size_t, head.len, sizeof(params))))
		return -EFAULT;
	return 0;
}

/**
 * ublk_params_to_limits() - Get the queue limits that the parameters describe.
 * @ub: the device, with valid parameters
 * @lim: set to the limits
 *
 * Context: Caller holds ub->mutex.
 */
void ublk_params_to_limits(const struct ublk_device *ub,
			   struct queue_limits *lim)
{
	const struct ublk_params *p = &ub->params;
	const struct ublk_param_basic *basic = &p->basic;

	*lim = (struct queue_limits) {
		.logical_block_size	= 1U << basic->logical_bs_shift,
		.physical_block_size	= 1U << basic->physical_bs_shift,
		.io_min			= 1U << basic->io_min_shift,
		.io_opt			= 1U << basic->io_opt_shift,
		/*
		 * Lengths in bytes are also results of commits, which are
		 * signed.
		 */
		.max_hw_sectors		= min(basic->max_sectors,
					      (u32)INT_MAX >> SECTOR_SHIFT),
		.chunk_sectors		= basic->chunk_sectors,
		.virt_boundary_mask	= basic->virt_boundary_mask,
		.max_segments		= USHRT_MAX,
		.max_segment_size	= UINT_MAX,
		.dma_alignment		= 3,
	};

	if (basic->attrs & UBLK_ATTR_VOLATILE_CACHE) {
		lim->features |= BLK_FEAT_WRITE_CACHE;
		if (basic->attrs & UBLK_ATTR_FUA)
			lim->features |= BLK_FEAT_FUA;
	}
	if (basic->attrs & UBLK_ATTR_ROTATIONAL)
		lim->features |= BLK_FEAT_ROTATIONAL;

	if (ublk_has_param(p, UBLK_PARAM_TYPE_DISCARD)) {
		const struct ublk_param_discard *discard = &p->discard;

		lim->discard_alignment = discard->discard_alignment;
		lim->discard_granularity = discard->discard_granularity;
		lim->max_hw_discard_sectors = discard->max_discard_sectors;
		/* The block layer does not round it. */
		lim->max_write_zeroes_sectors =
			round_down(discard->max_write_zeroes_sectors,
				   lim->logical_block_size >> SECTOR_SHIFT);
		lim->max_discard_segments = discard->max_discard_segments;
	}
	if (ublk_has_param(p, UBLK_PARAM_TYPE_ZONED)) {
		lim->features |= BLK_FEAT_ZONED;
		lim->max_open_zones = p->zoned.max_open_zones;
		lim->max_active_zones = p->zoned.max_active_zones;
		lim->max_hw_zone_append_sectors =
			p->zoned.max_zone_append_sectors;
	}
	if (ublk_has_param(p, UBLK_PARAM_TYPE_DMA_ALIGN))
		lim->dma_alignment = p->dma.alignment;
	if (ublk_has_param(p, UBLK_PARAM_TYPE_SEGMENT)) {
		lim->seg_boundary_mask = p->seg.seg_boundary_mask;
		lim->max_segment_size = p->seg.max_segment_size;
		lim->max_segments = p->seg.max_segments;
	}
	if (ublk_has_param(p, UBLK_PARAM_TYPE_INTEGRITY))
		ublk_integrity_limits(&p->integrity, lim);
	/*
	 * A block that crosses a page would need two segments, or have a gap. So
	 * it must not cross one.
	 */
	if (UBLK_SPLITS_TO_NOTHING &&
	    (lim->max_segments == 1 ||
	     lim->virt_boundary_mask & ~(PAGE_SIZE - 1)))
		lim->dma_alignment = max(lim->dma_alignment,
					 lim->logical_block_size - 1);
}
