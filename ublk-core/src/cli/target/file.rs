// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add -t file`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;

use super::kind::{self, Backing, DiskArgs, Kind, Sizes};
use crate::data::Access;
use crate::error::Result;
use crate::params::Params;
use crate::target::Target;
use crate::targets::{self, File, FileOptions, Io};

const ABOUT: &str = "Disk stored in a file or on another block device";

pub(super) const KIND: Kind =
    Kind::new::<Options>("file", ABOUT).alias("loop").backing(Backing::Required).with_integrity();

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IoMode {
    /// O_DIRECT if the file system supports it, otherwise through the page cache
    Auto,
    /// O_DIRECT
    Direct,
    /// Through the page cache
    Buffered,
}

#[derive(Debug, clap::Args)]
#[group(skip)]
struct Options {
    /// How to access the backing file
    #[arg(long, value_enum, default_value = "auto")]
    io: IoMode,
    /// File for integrity metadata [default: the backing file's path with .integrity appended]
    #[arg(long, value_name = "PATH", requires = "integrity")]
    integrity_file: Option<PathBuf>,
}

impl Options {
    /// Creates the target with `open`, which opens the backing file.
    fn open(&self, disk: &DiskArgs, size: Option<u64>, open: fn(&Path, &FileOptions) -> Result<File>) -> Result<File> {
        let options = FileOptions {
            io: match self.io {
                IoMode::Auto => Io::Auto,
                IoMode::Direct => Io::Direct,
                IoMode::Buffered => Io::Buffered,
            },
            read_only: disk.read_only,
            logical_block_size: disk.block_size,
        };
        let file = open(disk.file.as_deref().unwrap_or("".as_ref()), &options)?;
        let mut params = disk.apply(file.params())?;
        params.size = size.or(disk.size).unwrap_or(params.size);
        let integrity = params.integrity.take();
        let file = file.with_params(params)?;
        let Some(integrity) = integrity else { return Ok(file) };
        let path = self.integrity_path(file.path());
        file.with_integrity(integrity, path)
    }

    fn integrity_path(&self, file: &Path) -> PathBuf {
        self.integrity_file.clone().unwrap_or_else(|| {
            let mut path = file.as_os_str().to_owned();
            path.push(".integrity");
            path.into()
        })
    }
}

impl kind::Options for Options {
    fn resolve(&mut self, directory: &Path) {
        self.integrity_file = self.integrity_file.take().map(|file| directory.join(file));
    }

    fn files(&self, disk: &DiskArgs) -> Vec<PathBuf> {
        let integrity = disk.file.iter().filter(|_| disk.shape.has_integrity()).map(|file| self.integrity_path(file));
        disk.file.iter().cloned().chain(integrity).collect()
    }

    fn create(&self, disk: &DiskArgs, size: Option<u64>) -> Result<Arc<dyn Target>> {
        Ok(Arc::new(self.open(disk, size, |path, options| File::open(path, options))?))
    }

    fn inspect(&self, disk: &DiskArgs, existing: &Params) -> Result<Option<(Params, Access)>> {
        let file = self.open(disk, Some(existing.size), |path, options| File::examine(path, options))?;
        Ok(Some((file.params(), file.access())))
    }

    fn is_volatile(&self, _: &DiskArgs) -> bool {
        false
    }

    fn sizes(&self, _: &DiskArgs, backing: Option<&Path>, _: u64) -> Result<Sizes> {
        let Some(file) = backing else { return Ok(Sizes { max: u64::MAX, default: Some(u64::MAX) }) };
        let size = targets::file_size(file)?;
        Ok(Sizes { max: size, default: Some(size) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Args;
    use super::super::tests::parse;
    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::server;
    use crate::{Device, DeviceOptions, Recovery};

    fn args(file: &Path, more: &[&str]) -> Args {
        parse(&[&["-t", "file", "-f", file.to_str().unwrap()], more].concat()).unwrap()
    }

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        (directory, path)
    }

    fn start(driver: &FakeDriver, args: &Args) -> Device {
        let options = DeviceOptions { recovery: Some(Recovery::Queue), ..DeviceOptions::default() };
        server(driver).start(args.create().unwrap(), &options).unwrap()
    }

    #[test]
    fn the_same_options_fit_while_the_server_runs() {
        let lines: [&[&str]; 8] = [
            &[],
            &["--max-write-zeroes", "0"],
            &["--max-discard", "0"],
            &["--max-discard", "0", "--max-write-zeroes", "0"],
            &["--max-write-zeroes", "0", "--discard-granularity", "64K", "--discard-alignment", "4K"],
            &["--write-cache", "off"],
            &["--integrity", "crc16-t10dif", "--io", "buffered"],
            &["--read-only"],
        ];
        for line in lines {
            let (_directory, image) = image();
            let (driver, args) = (FakeDriver::new(), args(&image, line));
            let device = start(&driver, &args);
            // The server has locked the file.
            args.check_reopen(device.control(), device.info()).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            device.stop().unwrap();
        }
    }

    #[test]
    fn the_disk_is_stored_in_its_integrity_file_as_well() {
        let files = |more: &[&str]| args(Path::new("/disks/a.img"), more).files();
        assert_eq!(files(&[]), [PathBuf::from("/disks/a.img")]);
        let named = ["/disks/a.img", "/disks/a.img.integrity"].map(PathBuf::from);
        assert_eq!(files(&["--integrity", "ip"]), named);
        assert_eq!(files(&["--integrity", "ip", "--integrity-file", "/b"]), ["/disks/a.img", "/b"].map(PathBuf::from));
    }

    #[test]
    fn options_that_do_not_fit_are_refused_while_the_server_runs() {
        let (_directory, image) = image();
        let (driver, made) = (FakeDriver::new(), args(&image, &["--write-cache", "off", "--max-io", "256K"]));
        let device = start(&driver, &made);
        let refused = |args: Args| args.check_reopen(device.control(), device.info()).unwrap_err().to_string();
        for (line, words) in [
            (&["--write-cache", "on", "--max-io", "256K"], "no write cache"),
            (&["--write-cache", "off", "--max-io", "64K"], "maximum request size"),
        ] {
            let message = refused(args(&image, line));
            assert!(message.contains(words), "{message}");
        }
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(1 << 19).unwrap();
        assert!(refused(args(&image, &["--write-cache", "off"])).contains("disk.img"));
        std::fs::remove_file(&image).unwrap();
        assert!(refused(args(&image, &["--write-cache", "off"])).contains("No such file"));
        device.stop().unwrap();
    }
}
