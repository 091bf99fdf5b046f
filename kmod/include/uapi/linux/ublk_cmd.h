/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */
/*
 * ublk: user API of the userspace block device driver, as of Linux 7.3.
 *
 * /dev/ublk-control	to add, start, stop and delete devices
 * /dev/ublkcN		for the server of device N, to fetch and complete requests
 * /dev/ublkbN		the disk, while the device is started
 *
 * Both character devices use IORING_OP_URING_CMD. The command number is in
 * sqe->cmd_op, the payload in sqe->cmd: struct ublksrv_ctrl_cmd (32 bytes, so the
 * ring needs IORING_SETUP_SQE128) on the control device, struct ublksrv_io_cmd or
 * struct ublk_batch_io (16 bytes, any ring) on the char device. cqe->res is the
 * result or a negative errno.
 *
 * "Since x.y" is the first mainline kernel with an item. A sector always has
 * 512 bytes, whatever the logical block size is. All numbers are in the byte
 * order of the machine.
 */
#ifndef USER_BLK_DRV_CMD_INC_H
#define USER_BLK_DRV_CMD_INC_H

#include <linux/types.h>
#include <linux/errno.h>
#include <linux/ioctl.h>

/*
 * Control commands
 * ================
 *
 * Every command has a number that is encoded like an ioctl (UBLK_U_CMD_*, since
 * 6.4). The oldest ones also have a plain number (UBLK_CMD_*), which is the only
 * form before 6.4. Later kernels that are built without
 * CONFIG_BLKDEV_UBLK_LEGACY_OPCODES reject plain numbers with -EOPNOTSUPP. New
 * programs should use UBLK_U_CMD_*.
 *
 * All commands but ADD_DEV and GET_FEATURES operate on an existing device, and
 * fail with -ENODEV if there is none. Commands that may sleep run in an io_uring
 * worker; submitting them never blocks.
 */
#define	UBLK_CMD_GET_QUEUE_AFFINITY	0x01
#define	UBLK_CMD_GET_DEV_INFO		0x02
#define	UBLK_CMD_ADD_DEV		0x04
#define	UBLK_CMD_DEL_DEV		0x05
#define	UBLK_CMD_START_DEV		0x06
#define	UBLK_CMD_STOP_DEV		0x07
#define	UBLK_CMD_SET_PARAMS		0x08
#define	UBLK_CMD_GET_PARAMS		0x09
#define	UBLK_CMD_START_USER_RECOVERY	0x10	/* since 6.1 */
#define	UBLK_CMD_END_USER_RECOVERY	0x11	/* since 6.1 */
#define	UBLK_CMD_GET_DEV_INFO2		0x12	/* since 6.3 */

/*
 * data[0]: queue; addr, len: buffer for a CPU mask, len a multiple of 8 and
 * large enough for every possible CPU. Returns the CPUs that use this queue; the
 * rest of the buffer is zeroed.
 */
#define UBLK_U_CMD_GET_QUEUE_AFFINITY	\
	_IOR('u', UBLK_CMD_GET_QUEUE_AFFINITY, struct ublksrv_ctrl_cmd)

/*
 * addr, len: struct ublksrv_ctrl_dev_info, which the driver fills in. For
 * devices with UBLK_F_UNPRIVILEGED_DEV see GET_DEV_INFO2.
 */
#define UBLK_U_CMD_GET_DEV_INFO		\
	_IOR('u', UBLK_CMD_GET_DEV_INFO, struct ublksrv_ctrl_cmd)

/*
 * addr, len: struct ublksrv_ctrl_dev_info with the requested properties, which
 * is overwritten with the granted ones. Flags that the driver does not know are
 * cleared without an error, so check them. Creates /dev/ublkcN. The dev_id of
 * the header and that of the structure must be equal, and queue_id must be
 * 0xffff. A dev_id of 0xffffffff requests the lowest free one (below 2^20).
 * -EEXIST if the id is in use.
 */
#define UBLK_U_CMD_ADD_DEV		\
	_IOWR('u', UBLK_CMD_ADD_DEV, struct ublksrv_ctrl_cmd)

/*
 * Stops the device if it is started, removes /dev/ublkcN, and waits until its
 * last holder has closed it. A server must close it before it waits for this
 * command, or use DEL_DEV_ASYNC: otherwise it waits for itself.
 */
#define UBLK_U_CMD_DEL_DEV		\
	_IOWR('u', UBLK_CMD_DEL_DEV, struct ublksrv_ctrl_cmd)

/*
 * data[0]: process id (tgid) of the server, greater than 0. Completes when every
 * tag of every queue has been fetched and /dev/ublkbN exists. Parameters must
 * have been set. The server must be able to serve reads by then: the partition
 * table is read during this command (6.x) or right after it (7.x). Recent
 * kernels, 7.3 among them, accept only the process that opened /dev/ublkcN
 * (otherwise -EINVAL).
 */
#define UBLK_U_CMD_START_DEV		\
	_IOWR('u', UBLK_CMD_START_DEV, struct ublksrv_ctrl_cmd)

/*
 * Removes the disk. Meanwhile the server must still serve requests in flight.
 * Then every idle fetch command completes with UBLK_IO_RES_ABORT. From 7.3 on
 * the device can be started again only after /dev/ublkcN was closed (otherwise
 * -EBUSY).
 */
#define UBLK_U_CMD_STOP_DEV		\
	_IOWR('u', UBLK_CMD_STOP_DEV, struct ublksrv_ctrl_cmd)

/*
 * addr, len: struct ublk_params. Only before START_DEV (-EACCES while there is
 * a disk). Parts that params.len does not cover keep their values. -EINVAL if
 * any parameter is invalid.
 */
#define UBLK_U_CMD_SET_PARAMS		\
	_IOWR('u', UBLK_CMD_SET_PARAMS, struct ublksrv_ctrl_cmd)

/*
 * addr, len: struct ublk_params, whose len member is the size to return.
 * UBLK_PARAM_TYPE_DEVT is always filled in (since 6.3).
 */
#define UBLK_U_CMD_GET_PARAMS		\
	_IOR('u', UBLK_CMD_GET_PARAMS, struct ublksrv_ctrl_cmd)

/*
 * The old server has exited, and a new one is about to fetch. Requires
 * UBLK_F_USER_RECOVERY (otherwise -EINVAL). -EBUSY unless the state is QUIESCED
 * or FAIL_IO and /dev/ublkcN is closed.
 */
#define UBLK_U_CMD_START_USER_RECOVERY	\
	_IOWR('u', UBLK_CMD_START_USER_RECOVERY, struct ublksrv_ctrl_cmd)

/*
 * data[0]: process id (tgid) of the new server. Waits until it has fetched
 * every tag; then the device is LIVE again, and requests that were held are sent
 * to it. A queue can get requests earlier, once all of its own tags are fetched.
 */
#define UBLK_U_CMD_END_USER_RECOVERY	\
	_IOWR('u', UBLK_CMD_END_USER_RECOVERY, struct ublksrv_ctrl_cmd)

/*
 * GET_DEV_INFO for unprivileged devices: the path of the char device precedes
 * the structure in the buffer and dev_path_len is set; see struct
 * ublksrv_ctrl_cmd. Requires the path for privileged devices too.
 */
#define UBLK_U_CMD_GET_DEV_INFO2	\
	_IOR('u', UBLK_CMD_GET_DEV_INFO2, struct ublksrv_ctrl_cmd)

/*
 * Since 6.5. addr, len: a __u64, len exactly UBLK_FEATURES_LEN. Returns the
 * UBLK_F_* bits that the driver supports. Requires neither a device nor a
 * privilege. There is no plain number.
 */
#define UBLK_U_CMD_GET_FEATURES		\
	_IOR('u', 0x13, struct ublksrv_ctrl_cmd)

/*
 * Since 6.9. DEL_DEV without the wait: the id becomes free when the last
 * holder closes /dev/ublkcN. Linux rejects it (-EINVAL) on unprivileged
 * devices.
 */
#define UBLK_U_CMD_DEL_DEV_ASYNC	\
	_IOR('u', 0x14, struct ublksrv_ctrl_cmd)

/*
 * Since 6.16. data[0]: new size in sectors. Changes the capacity of the disk at
 * once and sends a uevent. The server must be able to serve the new range
 * before. -ENODEV if the device is not started.
 */
#define UBLK_U_CMD_UPDATE_SIZE		\
	_IOWR('u', 0x15, struct ublksrv_ctrl_cmd)

/*
 * Since 6.16. data[0]: time-out in milliseconds, 0: none. Asks the server to
 * leave so that another one can take over: new requests are held and idle fetch
 * commands complete with UBLK_IO_RES_ABORT. The state changes when the server
 * closes /dev/ublkcN. Requires UBLK_F_QUIESCE (otherwise -EOPNOTSUPP). Linux
 * returns at once even if every tag is busy, without aborting a command: repeat
 * it until the state has changed.
 */
#define UBLK_U_CMD_QUIESCE_DEV		\
	_IOWR('u', 0x16, struct ublksrv_ctrl_cmd)

/*
 * Since 7.0. STOP_DEV if neither the disk nor a partition is open, otherwise
 * -EBUSY. -ENODEV without a disk. Works with and without UBLK_F_SAFE_STOP_DEV.
 */
#define UBLK_U_CMD_TRY_STOP_DEV		\
	_IOWR('u', 0x17, struct ublksrv_ctrl_cmd)

/*
 * Since 7.1, requires UBLK_F_SHMEM_ZC (otherwise -EOPNOTSUPP). addr, len: struct
 * ublk_shmem_buf_reg. Pins that memory of the calling process and returns its
 * index, 0..65535. Before or after START_DEV. -EEXIST if one of its pages is
 * already registered with this device.
 */
#define UBLK_U_CMD_REG_BUF		\
	_IOWR('u', 0x18, struct ublksrv_ctrl_cmd)

/*
 * Since 7.1. data[0]: index from REG_BUF. -ENOENT if there is no such buffer.
 * Buffers outlive the server: they stay registered until this command, or until
 * the device is deleted.
 */
#define UBLK_U_CMD_UNREG_BUF		\
	_IOWR('u', 0x19, struct ublksrv_ctrl_cmd)

/* Bytes that UBLK_U_CMD_GET_FEATURES returns: one __u64. */
#define UBLK_FEATURES_LEN		8

/*
 * Payload of control commands, in sqe->cmd.
 *
 * For a device with UBLK_F_UNPRIVILEGED_DEV the caller, even root, must prove
 * that it may use the char device: the buffer at addr starts with the path of
 * /dev/ublkcN, dev_path_len is the length of that string with its NUL, and len
 * is the length of path and payload together. The path is looked up with the
 * permissions of the caller. ADD_DEV and GET_FEATURES take no path.
 */
struct ublksrv_ctrl_cmd {
	__u32	dev_id;
	__u16	queue_id;	/* 0xffff: none */
	__u16	len;		/* bytes at addr, path included */
	__u64	addr;		/* user memory, read or written as the command says */
	__u64	data[1];	/* immediate value, if the command has one */
	__u16	dev_path_len;	/* since 6.3, 0: no path */
	__u16	pad;		/* 0 */
	__u32	reserved;	/* 0 */
};

/* Argument of ADD_DEV and result of the GET_DEV_INFO commands. */
struct ublksrv_ctrl_dev_info {
	__u16	nr_hw_queues;	/* 1..UBLK_MAX_NR_QUEUES, lowered to the CPU count */
	__u16	queue_depth;	/* tags per queue, 1..UBLK_MAX_QUEUE_DEPTH */
	__u16	state;		/* UBLK_S_DEV_*, output */
	/*
	 * Since 7.3: stride of the descriptor array in bytes, 24..256 and a
	 * multiple of 8; an input only with UBLK_F_IO_DESC_SIZE, otherwise
	 * 24. Before 7.3: padding (0).
	 */
	__u16	io_desc_size;
	__u32	max_io_buf_bytes; /* largest request; rounded down to pages */
	__u32	dev_id;		/* 0xffffffff: any */
	__s32	ublksrv_pid;	/* server's tgid, output; -1: none or not visible */
	__u32	pad1;		/* 0 */
	__u64	flags;		/* UBLK_F_* */
	__u64	ublksrv_flags;	/* private to the server, stored and returned */
	__u32	owner_uid;	/* since 6.3, output: creator of the device */
	__u32	owner_gid;	/* since 6.3, output */
	__u64	reserved1;	/* 0 */
	__u64	reserved2;	/* 0 */
};

/*
 * Device states
 */
#define UBLK_S_DEV_DEAD		0	/* no disk: not started, or stopped */
#define UBLK_S_DEV_LIVE		1	/* the disk exists and is served */
#define UBLK_S_DEV_QUIESCED	2	/* since 6.1: no server, requests are held */
#define UBLK_S_DEV_FAIL_IO	3	/* since 6.13: no server, requests fail */

/*
 * Feature flags
 * =============
 *
 * Requested in ublksrv_ctrl_dev_info.flags of ADD_DEV, which returns the flags
 * that are in force: unknown bits are cleared, and some are always set.
 */

/*
 * The server registers the pages of a request as a fixed buffer of a ring
 * (UBLK_U_IO_REGISTER_IO_BUF), and no data is copied. Works since 6.15; before,
 * the bit was always cleared. Not for unprivileged devices.
 */
#define UBLK_F_SUPPORT_ZERO_COPY	(1ULL << 0)

/* Requests are delivered by task work in the server's thread. Always set. */
#define UBLK_F_URING_CMD_COMP_IN_TASK	(1ULL << 1)

/*
 * The server is first notified of a write (UBLK_IO_RES_NEED_GET_DATA), and the
 * data is copied once the server has named a buffer. Cleared if any of
 * SUPPORT_ZERO_COPY, USER_COPY, AUTO_BUF_REG and BATCH_IO is requested too.
 */
#define UBLK_F_NEED_GET_DATA		(1ULL << 2)

/*
 * Since 6.1. The disk outlives its server. Requests that the server held fail;
 * later ones are held (QUIESCED) until a new server has taken over. Cleared for
 * unprivileged devices.
 */
#define UBLK_F_USER_RECOVERY		(1ULL << 3)

/*
 * Since 6.1, with USER_RECOVERY. Requests that the server held are sent to the
 * next one instead of failing: they may be carried out twice.
 */
#define UBLK_F_USER_RECOVERY_REISSUE	(1ULL << 4)

/*
 * Since 6.3. Allows a caller without CAP_SYS_ADMIN to add and use a device of
 * its own; cleared for a caller that has it. Excludes USER_COPY,
 * SUPPORT_ZERO_COPY and AUTO_BUF_REG (-EINVAL). The server is killed if it does
 * not complete a request within 30 seconds.
 */
#define UBLK_F_UNPRIVILEGED_DEV		(1ULL << 5)

/* Since 6.4. The UBLK_U_* numbers are supported. Always set. */
#define UBLK_F_CMD_IOCTL_ENCODE		(1ULL << 6)

/*
 * Since 6.5. The server copies data with pread() and pwrite() on /dev/ublkcN, see
 * UBLKSRV_IO_BUF_OFFSET; commands have no buffer. Not for unprivileged devices.
 */
#define UBLK_F_USER_COPY		(1ULL << 7)

/*
 * Since 6.6. A zoned disk. Requires a kernel with CONFIG_BLK_DEV_ZONED, and
 * USER_COPY or (since 6.15) SUPPORT_ZERO_COPY; otherwise -EINVAL.
 */
#define UBLK_F_ZONED			(1ULL << 8)

/*
 * Since 6.13, with USER_RECOVERY and without USER_RECOVERY_REISSUE. While there
 * is no server, requests fail (FAIL_IO) instead of being held.
 */
#define UBLK_F_USER_RECOVERY_FAIL_IO	(1ULL << 9)

/* Since 6.16. UPDATE_SIZE exists; the command works without the flag too. */
#define UBLK_F_UPDATE_SIZE		(1ULL << 10)

/*
 * Since 6.16. The driver registers the pages of a request in the ring before it
 * delivers the request, at the index in struct ublk_auto_buf_reg, and
 * unregisters them at the commit. Not for unprivileged devices.
 */
#define UBLK_F_AUTO_BUF_REG		(1ULL << 11)

/* Since 6.16, with USER_RECOVERY. Allows QUIESCE_DEV. */
#define UBLK_F_QUIESCE			(1ULL << 12)

/*
 * Since 6.16. A tag is owned by the thread that fetched it; one thread may own
 * any tags of any queues. Before, one thread owned all tags of a queue. Always
 * set, except with BATCH_IO, where tags have no owner.
 */
#define UBLK_F_PER_IO_DAEMON		(1ULL << 13)

/*
 * Since 6.17. Buffers may be registered and unregistered by any thread with
 * any ring, not only by the owner of the tag. Always set.
 */
#define UBLK_F_BUF_REG_OFF_DAEMON	(1ULL << 14)

/*
 * Since 7.0. Requests are fetched and committed in batches, by any thread,
 * with the UBLK_U_IO_*_IO_CMDS commands; the commands on single tags are
 * rejected (-EOPNOTSUPP).
 */
#define UBLK_F_BATCH_IO			(1ULL << 15)

/*
 * Since 7.0. Requests may have integrity metadata. Requires USER_COPY and a
 * kernel with CONFIG_BLK_DEV_INTEGRITY.
 */
#define UBLK_F_INTEGRITY		(1ULL << 16)

/* Since 7.0. TRY_STOP_DEV exists. Always set. */
#define UBLK_F_SAFE_STOP_DEV		(1ULL << 17)

/*
 * Since 7.0. The partition table is not read when the disk is added. It can be
 * read with BLKRRPART.
 */
#define UBLK_F_NO_AUTO_PART_SCAN	(1ULL << 18)

/*
 * Since 7.1. Memory that client and server share is registered once (REG_BUF).
 * Requests of direct I/O on it contain the offset in that memory, and their data
 * is not copied. Other requests are handled in the normal mode of the device.
 */
#define UBLK_F_SHMEM_ZC			(1ULL << 19)

/* Since 7.3. ublksrv_ctrl_dev_info.io_desc_size is an input. */
#define UBLK_F_IO_DESC_SIZE		(1ULL << 20)

/*
 * I/O commands
 * ============
 *
 * Issued on /dev/ublkcN with struct ublksrv_io_cmd, or struct ublk_batch_io for
 * batch commands. Plain numbers as above. Only the user_data of a completion
 * identifies its tag.
 */
#define	UBLK_IO_FETCH_REQ		0x20
#define	UBLK_IO_COMMIT_AND_FETCH_REQ	0x21
#define	UBLK_IO_NEED_GET_DATA		0x22

/*
 * A server issues it once for each tag. It stays pending, and completes when
 * there is a request for the tag (see UBLK_IO_RES_*). addr: a data buffer of
 * max_io_buf_bytes; may be 0 with NEED_GET_DATA, must be 0 with USER_COPY,
 * SUPPORT_ZERO_COPY and AUTO_BUF_REG.
 */
#define	UBLK_U_IO_FETCH_REQ		\
	_IOWR('u', UBLK_IO_FETCH_REQ, struct ublksrv_io_cmd)

/*
 * Completes the request that the server holds under this tag, and waits for the
 * next one. result: bytes done (0 for operations without data) or a negative
 * errno. Return the full length or an error: the effect of a short count depends
 * on the kernel. addr, in copy mode: the buffer with the data of a read, which is
 * also the buffer for the next request. If the command itself fails, the server
 * still holds the request.
 */
#define	UBLK_U_IO_COMMIT_AND_FETCH_REQ	\
	_IOWR('u', UBLK_IO_COMMIT_AND_FETCH_REQ, struct ublksrv_io_cmd)

/*
 * Must follow UBLK_IO_RES_NEED_GET_DATA. addr: the buffer for the data of the
 * write. Completes with UBLK_IO_RES_OK when the data has been copied.
 */
#define	UBLK_U_IO_NEED_GET_DATA		\
	_IOWR('u', UBLK_IO_NEED_GET_DATA, struct ublksrv_io_cmd)

/*
 * Since 6.15, requires UBLK_F_SUPPORT_ZERO_COPY. addr: free index in the fixed
 * buffer table of the issuing ring. The buffer is the data of the request that
 * the server holds under this tag: it starts at 0, has the length of the request,
 * and can be used in the direction of the request only.
 */
#define	UBLK_U_IO_REGISTER_IO_BUF	\
	_IOWR('u', 0x23, struct ublksrv_io_cmd)

/*
 * Since 6.15. addr: the index. A request ends when it has been committed and all
 * of its buffers have been unregistered.
 */
#define	UBLK_U_IO_UNREGISTER_IO_BUF	\
	_IOWR('u', 0x24, struct ublksrv_io_cmd)

/*
 * Since 7.0, requires UBLK_F_BATCH_IO, as do the next two. sqe->addr: array of
 * nr_elem elements (struct ublk_elem_header and optional fields). Arms all of
 * these tags or none, as FETCH_REQ does for one tag.
 */
#define	UBLK_U_IO_PREP_IO_CMDS		\
	_IOWR('u', 0x25, struct ublk_batch_io)

/*
 * Completes the requests of an array of tags, and arms the tags again. Returns
 * the number of bytes of the array that were processed. If it is short, issue the
 * command again for the rest. After an error no element has been processed.
 */
#define	UBLK_U_IO_COMMIT_IO_CMDS	\
	_IOWR('u', 0x26, struct ublk_batch_io)

/*
 * Multishot, with a provided-buffer group. For each completion with
 * IORING_CQE_F_MORE, the selected buffer contains res bytes: __u16 tags that have
 * a new request, at most 128 of them. The result of the last completion is an
 * errno: -ENOBUFS (add a buffer and issue the command again; no tag is lost),
 * -ENODEV (leave) or -ENOMEM.
 */
#define	UBLK_U_IO_FETCH_IO_CMDS		\
	_IOWR('u', 0x27, struct ublk_batch_io)

/*
 * cqe->res of FETCH_REQ, COMMIT_AND_FETCH_REQ and NEED_GET_DATA
 */
#define UBLK_IO_RES_OK			0	/* the descriptor holds a request */
#define UBLK_IO_RES_NEED_GET_DATA	1	/* a write that needs a buffer */
#define UBLK_IO_RES_ABORT		(-ENODEV)	/* no more requests: drain and exit */

/*
 * Descriptors are mapped read only from /dev/ublkcN: for queue q at the
 * offset UBLKSRV_CMD_BUF_OFFSET + q * (io_desc_size * UBLK_MAX_QUEUE_DEPTH
 * rounded up to pages), io_desc_size * queue_depth bytes rounded up to pages.
 */
#define UBLKSRV_CMD_BUF_OFFSET	0

/* tags per queue */
#define UBLK_MAX_QUEUE_DEPTH	4096

/*
 * Position for pread() and pwrite() on /dev/ublkcN with UBLK_F_USER_COPY
 * (since 6.5): UBLKSRV_IO_BUF_OFFSET plus
 *
 *	bits  0..24	byte within the request, so below 32 MiB
 *	bits 25..40	tag
 *	bits 41..52	queue
 *	bit  62		the request's integrity data instead (since 7.0)
 *
 * Get the data of a write with pread(), and supply the data of a read with
 * pwrite(); otherwise -EACCES. Works while the server holds the request
 * (otherwise -EINVAL), from any thread.
 */
#define UBLKSRV_IO_BUF_OFFSET	0x80000000

#define UBLK_IO_BUF_OFF		0
#define UBLK_IO_BUF_BITS	25
#define UBLK_IO_BUF_BITS_MASK	((1ULL << UBLK_IO_BUF_BITS) - 1)

#define UBLK_TAG_OFF		UBLK_IO_BUF_BITS
#define UBLK_TAG_BITS		16
#define UBLK_TAG_BITS_MASK	((1ULL << UBLK_TAG_BITS) - 1)

#define UBLK_QID_OFF		(UBLK_TAG_OFF + UBLK_TAG_BITS)
#define UBLK_QID_BITS		12
#define UBLK_QID_BITS_MASK	((1ULL << UBLK_QID_BITS) - 1)

/* queues per device */
#define UBLK_MAX_NR_QUEUES	(1U << UBLK_QID_BITS)

#define UBLKSRV_IO_BUF_TOTAL_BITS	(UBLK_QID_OFF + UBLK_QID_BITS)
#define UBLKSRV_IO_BUF_TOTAL_SIZE	(1ULL << UBLKSRV_IO_BUF_TOTAL_BITS)

#define UBLK_INTEGRITY_FLAG_OFF		62
#define UBLKSRV_IO_INTEGRITY_FLAG	(1ULL << UBLK_INTEGRITY_FLAG_OFF)

/*
 * Operations: bits 0..7 of ublksrv_io_desc.op_flags. The parameters determine
 * which ones are sent; READ always may be.
 */
#define UBLK_IO_OP_READ			0
#define UBLK_IO_OP_WRITE		1
#define UBLK_IO_OP_FLUSH		2	/* requires UBLK_ATTR_VOLATILE_CACHE */
#define UBLK_IO_OP_DISCARD		3	/* requires max_discard_sectors */
#define UBLK_IO_OP_WRITE_SAME		4	/* never sent */
#define UBLK_IO_OP_WRITE_ZEROES		5	/* requires max_write_zeroes_sectors */

/* zoned devices only, since 6.6 */
#define UBLK_IO_OP_ZONE_OPEN		10
#define UBLK_IO_OP_ZONE_CLOSE		11
#define UBLK_IO_OP_ZONE_FINISH		12
#define UBLK_IO_OP_ZONE_APPEND		13	/* result in zone_append_lba */
#define UBLK_IO_OP_ZONE_RESET_ALL	14
#define UBLK_IO_OP_ZONE_RESET		15

/*
 * Requests up to nr_zones struct blk_zone from start_sector on, as the data of a
 * read. START_DEV sends the first ones.
 */
#define UBLK_IO_OP_REPORT_ZONES		18

/*
 * Flags of a request: bits 8..31 of ublksrv_io_desc.op_flags. Test them against
 * op_flags itself, not against the result of ublksrv_get_flags(), which is
 * shifted.
 */
#define UBLK_IO_F_FAILFAST_DEV		(1U << 8)
#define UBLK_IO_F_FAILFAST_TRANSPORT	(1U << 9)
#define UBLK_IO_F_FAILFAST_DRIVER	(1U << 10)
#define UBLK_IO_F_META			(1U << 11)	/* file system metadata */
#define UBLK_IO_F_FUA			(1U << 13)	/* on stable storage before the commit */
#define UBLK_IO_F_NOUNMAP		(1U << 15)	/* WRITE_ZEROES: keep the space allocated */
#define UBLK_IO_F_SWAP			(1U << 16)

/*
 * Since 6.16. Automatic registration failed, and UBLK_AUTO_BUF_REG_FALLBACK was
 * set: the server has to register the buffer or copy the data.
 */
#define UBLK_IO_F_NEED_REG_BUF		(1U << 17)

/* Since 7.0. The request has integrity data, see UBLKSRV_IO_INTEGRITY_FLAG. */
#define UBLK_IO_F_INTEGRITY		(1U << 18)

/* Since 7.1. addr is in a shared buffer, see ublk_shmem_zc_addr(). */
#define UBLK_IO_F_SHMEM_ZC		(1U << 19)

/*
 * A request; an element of the mapped array of its queue, indexed by tag. Valid
 * from the completion of the fetch until the commit.
 */
struct ublksrv_io_desc {
	__u32	op_flags;	/* operation: bits 0..7, UBLK_IO_F_*: bits 8..31 */
	union {
		__u32	nr_sectors;
		__u32	nr_zones;	/* REPORT_ZONES: maximum number of zones */
	};
	__u64	start_sector;
	/*
	 * Copy mode: the buffer of this tag. With UBLK_IO_F_SHMEM_ZC: index
	 * and offset in a shared buffer. Otherwise undefined.
	 */
	__u64	addr;
};

/* The operation of a request: UBLK_IO_OP_*. */
static __inline__ __u8 ublksrv_get_op(const struct ublksrv_io_desc *iod)
{
	return (__u8)(iod->op_flags & 0xff);
}

/*
 * The flags of a request, shifted to bit 0. Compare UBLK_IO_F_* with
 * iod->op_flags, or with this value shifted left by 8.
 */
static __inline__ __u32 ublksrv_get_flags(const struct ublksrv_io_desc *iod)
{
	return iod->op_flags >> 8;
}

/* Payload of the I/O commands on single tags, in sqe->cmd. */
struct ublksrv_io_cmd {
	__u16	q_id;
	__u16	tag;
	__s32	result;		/* COMMIT_AND_FETCH_REQ only */
	union {
		/* buffer address; REGISTER/UNREGISTER_IO_BUF: buffer index */
		__u64	addr;
		/* COMMIT of a ZONE_APPEND: sector where the data landed */
		__u64	zone_append_lba;
	};
};

/*
 * UBLK_F_AUTO_BUF_REG: the buffer for the next request of a tag, packed into
 * sqe->addr of FETCH_REQ and COMMIT_AND_FETCH_REQ. A commit through the same ring
 * unregisters the buffer. After a commit through another ring the server has to
 * issue UNREGISTER_IO_BUF.
 */
struct ublk_auto_buf_reg {
	__u16	index;		/* in the ring's fixed buffer table */
	__u8	flags;		/* UBLK_AUTO_BUF_REG_* */
	__u8	reserved0;	/* 0 */
	__u32	reserved1;	/* 0 */
};

/*
 * If the registration fails, deliver the request with UBLK_IO_F_NEED_REG_BUF.
 * Without this flag, the request fails before the server sees it.
 */
#define UBLK_AUTO_BUF_REG_FALLBACK	(1U << 0)
#define UBLK_AUTO_BUF_REG_F_MASK	UBLK_AUTO_BUF_REG_FALLBACK

/* sqe->addr: index in bits 0..15, flags 16..23, reserved above */
static __inline__ struct ublk_auto_buf_reg
ublk_sqe_addr_to_auto_buf_reg(__u64 sqe_addr)
{
	struct ublk_auto_buf_reg reg;

	reg.index = (__u16)(sqe_addr & 0xffff);
	reg.flags = (__u8)((sqe_addr >> 16) & 0xff);
	reg.reserved0 = (__u8)((sqe_addr >> 24) & 0xff);
	reg.reserved1 = (__u32)(sqe_addr >> 32);
	return reg;
}

static __inline__ __u64
ublk_auto_buf_reg_to_sqe_addr(const struct ublk_auto_buf_reg *buf)
{
	__u64 sqe_addr = buf->reserved1;

	sqe_addr = (sqe_addr << 8) | buf->reserved0;
	sqe_addr = (sqe_addr << 8) | buf->flags;
	return (sqe_addr << 16) | buf->index;
}

/*
 * One element of the arrays of PREP_IO_CMDS and COMMIT_IO_CMDS. A __u64 buffer
 * address follows with UBLK_BATCH_F_HAS_BUF_ADDR, then a __u64 sector with
 * UBLK_BATCH_F_HAS_ZONE_LBA.
 */
struct ublk_elem_header {
	__u16	tag;
	__u16	buf_index;	/* UBLK_F_AUTO_BUF_REG: index for the next request */
	__s32	result;		/* COMMIT_IO_CMDS only, as in struct ublksrv_io_cmd */
};

/*
 * Flags of a batch. HAS_BUF_ADDR is valid in copy mode only, HAS_ZONE_LBA with
 * zoned devices, AUTO_BUF_REG_FALLBACK with UBLK_F_AUTO_BUF_REG.
 */
#define UBLK_BATCH_F_HAS_ZONE_LBA		(1U << 0)
#define UBLK_BATCH_F_HAS_BUF_ADDR		(1U << 1)
#define UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK	(1U << 2)

/* Payload of the batch commands, in sqe->cmd. */
struct ublk_batch_io {
	__u16	q_id;
	__u16	flags;		/* UBLK_BATCH_F_*; FETCH_IO_CMDS: 0 */
	__u16	nr_elem;	/* at most queue_depth (-E2BIG); FETCH_IO_CMDS: unused */
	__u8	elem_bytes;	/* 8, 16 or 24, according to flags; FETCH_IO_CMDS: 2 */
	__u8	reserved;	/* 0 */
	__u64	reserved2;	/* 0 */
};

/*
 * Parameters
 * ==========
 *
 * Properties of the disk. A part is used only if its bit is set in
 * ublk_params.types. BASIC is required. Unused members are 0.
 */

/* Parts of struct ublk_params */
#define UBLK_PARAM_TYPE_BASIC		(1U << 0)
#define UBLK_PARAM_TYPE_DISCARD		(1U << 1)
#define UBLK_PARAM_TYPE_DEVT		(1U << 2)	/* since 6.3, output only */
#define UBLK_PARAM_TYPE_ZONED		(1U << 3)	/* since 6.6 */
#define UBLK_PARAM_TYPE_DMA_ALIGN	(1U << 4)	/* since 6.15 */
#define UBLK_PARAM_TYPE_SEGMENT		(1U << 5)	/* since 6.15 */
#define UBLK_PARAM_TYPE_INTEGRITY	(1U << 6)	/* since 7.0 */

/* ublk_param_basic.attrs */
#define UBLK_ATTR_READ_ONLY		(1U << 0)
#define UBLK_ATTR_ROTATIONAL		(1U << 1)
#define UBLK_ATTR_VOLATILE_CACHE	(1U << 2)	/* FLUSH is sent */
#define UBLK_ATTR_FUA			(1U << 3)	/* only with VOLATILE_CACHE */

struct ublk_param_basic {
	__u32	attrs;			/* UBLK_ATTR_* */
	/* block sizes and I/O hints as powers of two */
	__u8	logical_bs_shift;	/* 9..log2 of the page size */
	__u8	physical_bs_shift;	/* at least logical_bs_shift, at most 28 */
	__u8	io_opt_shift;		/* at most 28 */
	__u8	io_min_shift;		/* at most 28 */
	/* largest request: a page .. max_io_buf_bytes, in sectors */
	__u32	max_sectors;
	/* requests do not cross multiples of it; zoned: the zone size; sectors */
	__u32	chunk_sectors;
	__u64	dev_sectors;		/* size of the disk in sectors */
	__u64	virt_boundary_mask;	/* memory gaps only at multiples of mask + 1 */
};

/* DISCARD and WRITE_ZEROES. Without this part neither is sent. */
struct ublk_param_discard {
	__u32	discard_alignment;	/* bytes */
	__u32	discard_granularity;	/* bytes, not 0 */
	__u32	max_discard_sectors;	/* 0: no DISCARD */
	__u32	max_write_zeroes_sectors; /* 0: no WRITE_ZEROES */
	__u16	max_discard_segments;	/* 1 with DISCARD */
	__u16	reserved0;		/* 0 */
};

/*
 * Device numbers, returned by GET_PARAMS; -EINVAL in SET_PARAMS. Those of the
 * disk are 0 until it exists.
 */
struct ublk_param_devt {
	__u32	char_major;
	__u32	char_minor;
	__u32	disk_major;
	__u32	disk_minor;
};

/* Required with UBLK_F_ZONED, otherwise invalid. */
struct ublk_param_zoned {
	__u32	max_open_zones;		/* 0: no limit */
	__u32	max_active_zones;	/* 0: no limit */
	__u32	max_zone_append_sectors; /* not 0 */
	__u8	reserved[20];		/* 0 */
};

/* Memory alignment of requests; 4 bytes without this part. */
struct ublk_param_dma_align {
	__u32	alignment;		/* a mask below the page size, e.g. 511 */
	__u8	pad[4];			/* 0 */
};

/* Smallest max_segment_size and smallest seg_boundary_mask + 1. */
#define UBLK_MIN_SEGMENT_SIZE		4096

/* Limits of the memory segments of a request. Without this part there are none. */
struct ublk_param_segment {
	__u64	seg_boundary_mask;	/* mask + 1 is a power of two */
	__u32	max_segment_size;	/* bytes */
	__u16	max_segments;		/* not 0 */
	__u8	pad[2];			/* 0 */
};

/*
 * Integrity metadata, with UBLK_F_INTEGRITY. Each interval of data has
 * metadata_size bytes, with the protection tuple at pi_offset.
 */
struct ublk_param_integrity {
	__u32	flags;			/* LBMD_PI_CAP_* of <linux/fs.h> */
	__u16	max_integrity_segments;	/* 0: no limit */
	__u8	interval_exp;		/* log2 bytes, 9..logical_bs_shift */
	__u8	metadata_size;		/* bytes, not 0 */
	__u8	pi_offset;		/* bytes; the tuple must fit after it */
	__u8	csum_type;		/* LBMD_PI_CSUM_* of <linux/fs.h> */
	__u8	tag_size;		/* bytes of application tag */
	__u8	pad[5];			/* 0 */
};

struct ublk_params {
	/* Size in bytes; may be less than the size of the whole structure. */
	__u32	len;
	__u32	types;			/* UBLK_PARAM_TYPE_* */

	struct ublk_param_basic		basic;
	struct ublk_param_discard	discard;
	struct ublk_param_devt		devt;
	struct ublk_param_zoned		zoned;
	struct ublk_param_dma_align	dma;
	struct ublk_param_segment	seg;
	struct ublk_param_integrity	integrity;
};

/*
 * Shared memory
 * =============
 *
 * Since 7.1, UBLK_F_SHMEM_ZC. A request whose pages are all in one registered
 * buffer, in order, has UBLK_IO_F_SHMEM_ZC set, and the offset in the buffer in
 * ublksrv_io_desc.addr. Its data is not copied.
 */

/* Argument of UBLK_U_CMD_REG_BUF */
struct ublk_shmem_buf_reg {
	__u64	addr;		/* in the calling process, page aligned */
	__u64	len;		/* bytes, whole pages, at most 4 GiB */
	__u32	flags;		/* UBLK_SHMEM_BUF_* */
	__u32	reserved;	/* 0 */
};

/* The server only reads the buffer: only writes to the disk use it. */
#define UBLK_SHMEM_BUF_READ_ONLY	(1U << 0)

/* ublksrv_io_desc.addr: offset in bits 0..31, index in bits 32..47 */
#define UBLK_SHMEM_ZC_OFF_MASK		0xffffffffULL
#define UBLK_SHMEM_ZC_IDX_OFF		32
#define UBLK_SHMEM_ZC_IDX_MASK		0xffffULL

static __inline__ __u64 ublk_shmem_zc_addr(__u16 index, __u32 offset)
{
	return ((__u64)index << UBLK_SHMEM_ZC_IDX_OFF) | offset;
}

static __inline__ __u16 ublk_shmem_zc_index(__u64 addr)
{
	return (__u16)((addr >> UBLK_SHMEM_ZC_IDX_OFF) & UBLK_SHMEM_ZC_IDX_MASK);
}

static __inline__ __u32 ublk_shmem_zc_offset(__u64 addr)
{
	return (__u32)(addr & UBLK_SHMEM_ZC_OFF_MASK);
}

#endif /* USER_BLK_DRV_CMD_INC_H */
