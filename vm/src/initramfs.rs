// SPDX-License-Identifier: MIT OR Apache-2.0

//! The first user space, written anew for each run: busybox, the modules that reach the disks, and
//! what this run is to do.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::process::which;

/// An archive in the "newc" format of cpio, which the kernel unpacks.
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0 }
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).context("a file is too big for an initramfs")?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long")?;
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name, check
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn dir(&mut self, name: &str) -> Result<()> {
        self.add(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, executable: bool, content: &[u8]) -> Result<()> {
        let mode = if executable { 0o100_755 } else { 0o100_644 };
        self.add(name, mode, content)
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

/// Writes the archive for `kernel`; `job` are files for the guest's /run/ublk-vm.
pub(crate) fn write(path: &Path, kernel: &Kernel, job: &[(&str, String)]) -> Result<()> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules", "job"] {
        archive.dir(dir)?;
    }
    let busybox = which("busybox").context("there is no busybox on this host")?;
    archive.file("bin/busybox", true, &read(&busybox)?)?;
    archive.file("init", true, include_bytes!("../guest/initramfs-init"))?;
    for module in kernel.boot_modules()? {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{name}"), false, &read(&module)?)?;
    }
    for (name, text) in job {
        archive.file(&format!("job/{name}"), false, text.as_bytes())?;
    }
    fs::write(path, archive.finish()?).with_context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_sized() -> Result<()> {
        let mut archive = Archive::new();
        archive.dir("d")?;
        archive.file("d/f", true, b"hello")?;
        let bytes = archive.finish()?;
        // 110 bytes of header, "d" and its end: 112.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ed");
        assert_eq!(&bytes[110..112], b"d\0");
        // The second: 110 + 4 to 116, and 5 bytes of content to 124.
        let second = &bytes[112..];
        assert_eq!(&second[54..62], b"00000005");
        assert_eq!(&second[116..121], b"hello");
        assert_eq!(&second[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
        Ok(())
    }
}
