// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the inode numbers of a file system are good for.

use std::os::fd::AsFd;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, MSDOS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};

use crate::errno::Errno;

// From `linux/magic.h`.
const V9FS_MAGIC: FsType = FsType(0x0102_1997);
const EXFAT_SUPER_MAGIC: FsType = FsType(0x2011_bab0);
const CIFS_SUPER_MAGIC: FsType = FsType(0xff53_4d42_u32 as _);
const SMB2_SUPER_MAGIC: FsType = FsType(0xfe53_4d42_u32 as _);
/// From `fs/vboxsf/super.c`.
const VBOXSF_SUPER_MAGIC: FsType = FsType(0x786f_4256);

/// Returns whether different files have different inode numbers. The servers of FUSE and 9P choose the numbers, and may give
/// several files the same one.
pub(crate) fn has_unique_inodes(file: impl AsFd) -> Result<bool, Errno> {
    Ok(!matches!(fstatfs(&file)?.filesystem_type(), FUSE_SUPER_MAGIC | V9FS_MAGIC))
}

/// Returns whether files keep their inode numbers. Some file systems number an inode when it is read, and again after memory
/// pressure has evicted it; FUSE servers may do the same, and SMB servers without inode numbers.
pub(crate) fn has_lasting_inodes(kind: FsType) -> bool {
    !matches!(
        kind,
        MSDOS_SUPER_MAGIC
            | EXFAT_SUPER_MAGIC
            | SMB_SUPER_MAGIC
            | CIFS_SUPER_MAGIC
            | SMB2_SUPER_MAGIC
            | FUSE_SUPER_MAGIC
            | V9FS_MAGIC
            | VBOXSF_SUPER_MAGIC
    )
}
