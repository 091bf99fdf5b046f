// SPDX-License-Identifier: MIT OR Apache-2.0

//! Targets of command lines: for a new disk, and for one that exists already.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::{Args, DEFAULT_MEM_SIZE, IoMode, Kind, LOCK_PATIENCE, LOCK_RETRY};
use crate::Errno;
use crate::control::{Control, DeviceInfo};
use crate::data::Access;
use crate::device::check_fit;
use crate::error::{Error, Result};
use crate::params::{Operations, Params};
use crate::target::Target;
use crate::targets::{File, FileOptions, Io, Mem, Null, Zoned, ZonedOptions};

/// Makes the target of a new disk.
pub(super) fn new(args: &Args) -> Result<Arc<dyn Target>> {
    target(args, None)
}

/// Makes the target of a disk which exists already. What the last server had may be free only a moment after
/// the driver has noticed its end.
pub(super) fn of_another(args: &Args, disk: &Params) -> Result<Arc<dyn Target>> {
    if args.kind == Kind::Null {
        // It stores nothing, and so suits any disk.
        return Ok(Arc::new(Null::with_params(*disk)?));
    }
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match target(args, Some(disk.size)) {
            Err(Error::File { operation: "lock" | "open", errno: Errno::EWOULDBLOCK | Errno::EBUSY, .. })
                if Instant::now() < deadline =>
            {
                std::thread::sleep(LOCK_RETRY);
            }
            made => return made,
        }
    }
}

/// Makes the target; `size` is that of a disk which exists already.
fn target(args: &Args, size: Option<u64>) -> Result<Arc<dyn Target>> {
    if let Some(file) = &args.file
        && !matches!(args.kind, Kind::File | Kind::Zoned)
    {
        return Err(Error::invalid("file", file.display(), "only for -t file and -t zoned"));
    }
    if args.count > 1 && (args.file.is_some() || args.id.is_some()) {
        return Err(Error::invalid("count", args.count, "cannot be combined with --file or --number"));
    }
    if args.count > 1 && args.recovery.is_some() {
        return Err(Error::invalid("count", args.count, "cannot be combined with --recovery"));
    }
    if args.shared_memory.is_some() && (args.recovery.is_some() || args.count > 1) {
        let rule = "cannot be combined with --recovery or --count";
        return Err(Error::invalid("shared memory", true, rule));
    }
    let block = args.block_size.unwrap_or(512);
    Ok(match args.kind {
        Kind::Null => {
            let mut params = Params::new(size.or(args.size).unwrap_or(250 << 30), block);
            params.operations = Operations::all();
            Arc::new(Null::with_params(shape(args, params)?)?)
        }
        Kind::Mem => {
            let mem = Mem::new(args.size.unwrap_or(DEFAULT_MEM_SIZE), block)?;
            Arc::new(Mem::with_params(shape(args, mem.params())?)?)
        }
        Kind::File => Arc::new(file(args, size, |path, options| File::open(path, options))?),
        Kind::Zoned => {
            let (options, params) = zones(args, size)?;
            Arc::new(Zoned::with_params(&options, params)?)
        }
    })
}

/// Makes the target of a disk in a file, which `open` opens.
fn file(args: &Args, size: Option<u64>, open: fn(&Path, &FileOptions) -> Result<File>) -> Result<File> {
    let options = FileOptions {
        io: match args.io {
            IoMode::Auto => Io::Auto,
            IoMode::Direct => Io::Direct,
            IoMode::Buffered => Io::Buffered,
        },
        read_only: args.read_only,
        logical_block_size: args.block_size,
    };
    let file = open(args.file.as_deref().unwrap_or("".as_ref()), &options)?;
    let mut params = shape(args, file.params())?;
    params.size = size.or(args.size).unwrap_or(params.size);
    let integrity = params.integrity.take();
    let file = file.with_params(params)?;
    let Some(integrity) = integrity else { return Ok(file) };
    let path = args.integrity_file.clone().unwrap_or_else(|| {
        let mut path = file.path().as_os_str().to_owned();
        path.push(".integrity");
        path.into()
    });
    file.with_integrity(integrity, path)
}

/// What a zoned disk is made of, and its shape.
fn zones(args: &Args, size: Option<u64>) -> Result<(ZonedOptions, Params)> {
    let options = ZonedOptions {
        size: size.or(args.size).unwrap_or(DEFAULT_MEM_SIZE),
        zone_size: args.zone_size,
        conventional: args.conventional_zones,
        max_open: args.max_open_zones,
        max_active: args.max_active_zones,
        logical_block_size: args.block_size.unwrap_or(4096),
        directory: args.file.clone(),
    };
    let mut params = shape(args, Zoned::shape(&options))?;
    params.chunk_size = args.zone_size;
    if let Some(zoned) = &mut params.zoned {
        zoned.max_append_bytes = zoned.max_append_bytes.min(params.max_io_bytes);
    }
    Ok((options, params))
}

impl Args {
    /// Checks what can be checked of a device's next server while the last one is still there: whether its files can be
    /// opened, and whether the target fits the disk.
    pub(in crate::cli) fn check_successor(&self, control: &Control, info: &DeviceInfo) -> Result<()> {
        self.check_recovery()?;
        let disk = control.params(info.id)?.params;
        if let Some(log) = &self.log {
            let opened = std::fs::OpenOptions::new().create(true).append(true).open(log);
            opened.map_err(|e| Error::file("open the log", log, &e))?;
        }
        let (target, access) = match self.kind {
            // It stores nothing, and so suits any disk.
            Kind::Null => return Ok(()),
            Kind::Mem => return Err(Error::invalid("type", "mem", "a disk in memory cannot be recovered")),
            Kind::File => {
                let file = file(self, Some(disk.size), |path, options| File::examine(path, options))?;
                (file.params(), file.access())
            }
            Kind::Zoned => {
                if let Some(directory) = &self.file {
                    std::fs::read_dir(directory).map_err(|e| Error::file("read", directory, &e))?;
                }
                (zones(self, Some(disk.size))?.1, Access::Bytes)
            }
        };
        check_fit(&target, access, &disk, info.features)
    }
}

/// Applies what the command line says about the disk.
fn shape(args: &Args, params: Params) -> Result<Params> {
    let mut params = args.shape.apply(params)?;
    if params.integrity.is_some() && !matches!(args.kind, Kind::Mem | Kind::File) {
        return Err(Error::invalid("integrity", "metadata", "only supported by -t mem and -t file"));
    }
    params.read_only |= args.read_only;
    Ok(params)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::cli::state::Origin;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::{Device, DeviceOptions, Recovery, Server};

    fn args(file: &Path, more: &[&str]) -> Args {
        let words = ["add", "-t", "file", "--recovery", "-f"].map(OsString::from);
        let words: Vec<OsString> =
            words.into_iter().chain([file.into()]).chain(more.iter().map(OsString::from)).collect();
        Origin::here(&words).unwrap().add_args().unwrap()
    }

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        (directory, path)
    }

    fn start(driver: &FakeDriver, args: &Args) -> Device {
        let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let options = DeviceOptions { recovery: Some(Recovery::Queue), ..DeviceOptions::default() };
        server.start(new(args).unwrap(), &options).unwrap()
    }

    #[test]
    fn the_same_command_line_fits_while_its_server_lives() {
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
            // The file is locked by its server.
            args.check_successor(device.control(), device.info()).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            device.stop().unwrap();
        }
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused_while_the_server_lives() {
        let (_directory, image) = image();
        let (driver, made) = (FakeDriver::new(), args(&image, &["--write-cache", "off", "--max-io", "256K"]));
        let device = start(&driver, &made);
        let refused = |args: Args| args.check_successor(device.control(), device.info()).unwrap_err().to_string();
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
