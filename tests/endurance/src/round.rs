// SPDX-License-Identifier: MIT OR Apache-2.0

//! Rounds: a server comes, works, and is killed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::control::Control;
use crate::load::{Errors, Load};
use crate::mode::{DEPTH, MAX_IO, Recovery, Setup};
use crate::process::Talker;
use crate::report::Tally;
use crate::server::{Begin, End};
use crate::store::{DISK_BYTES, Store};
use crate::waiting::{PATIENCE, until};
use crate::witness::Witnesses;
use ublk_test_common::random::Random;
use ublk_test_common::uapi::*;

/// When a server's end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It has the char device open.
    Open,
    /// It has fetched some tags.
    Fetch,
    /// `START_DEV` or `END_USER_RECOVERY` is on its way.
    Command,
    /// That command has just come back.
    Live,
    /// It serves.
    Serve,
    /// It serves and has been asked to leave.
    Quiesce,
    /// It has been asked to leave, and leaves.
    Leave,
    /// It serves while the disk is taken away.
    Stop,
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Moment::Open => "open",
            Moment::Fetch => "fetch",
            Moment::Command => "command",
            Moment::Live => "live",
            Moment::Serve => "serve",
            Moment::Quiesce => "quiesce",
            Moment::Leave => "leave",
            Moment::Stop => "stop",
        }
    }
}

/// Longest time that a server serves, or is given while a command is on its way.
const SERVES: Duration = Duration::from_millis(300);
const MEANWHILE: Duration = Duration::from_millis(8);
/// `QUIESCE_DEV` is repeated: drivers differ in when they notify which server.
const QUIESCE_MS: u64 = 1000;

/// A device on which rounds are run.
#[derive(Debug)]
pub(crate) struct Rounds<'a> {
    pub(crate) control: &'a mut Control,
    pub(crate) features: u64,
    pub(crate) setup: Setup,
    pub(crate) random: Random,
    pub(crate) directory: &'a Path,
    pub(crate) tally: &'a mut Tally,
    /// Servers are to lose writes.
    pub(crate) lose_writes: bool,
    store: Store,
    store_path: PathBuf,
    witnesses: Witnesses,
    load: Option<Load>,
    device: Option<u32>,
    server: Option<Talker>,
    sender: Option<Talker>,
}

impl<'a> Rounds<'a> {
    pub(crate) fn new(
        control: &'a mut Control,
        features: u64,
        setup: Setup,
        random: Random,
        directory: &'a Path,
        tally: &'a mut Tally,
    ) -> Result<Self> {
        let store_path = directory.join("store");
        match std::fs::remove_file(&store_path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context("the store"),
            _ => {}
        }
        Ok(Rounds {
            control,
            features,
            setup,
            random,
            directory,
            tally,
            lose_writes: false,
            store: Store::open(&store_path)?,
            store_path,
            witnesses: Witnesses::new(),
            load: None,
            device: None,
            server: None,
            sender: None,
        })
    }

    /// So many rounds, and a last one in which the server lives until all is verified.
    pub(crate) fn run(&mut self, count: u32) -> Result<()> {
        for round in 0..count {
            let moment = self.moment();
            self.round(moment).with_context(|| format!("round {round}, end: {}", moment.name()))?;
            self.tally.rounds += 1;
            self.tally.end(moment.name());
        }
        self.finale().context("after the last round")?;
        self.witnesses.tally(self.tally);
        Ok(())
    }

    /// After a failure: ends what can be ended.
    pub(crate) fn clean_up(&mut self) -> Result<()> {
        self.sender = None;
        self.server = None;
        let Some(device) = self.device.take() else { return Ok(()) };
        self.control.simple(UBLK_U_CMD_STOP_DEV, device, 0).context("STOP_DEV")?;
        self.load = None;
        // What they complain of has been said.
        self.witnesses.abandon()?;
        self.control.simple(UBLK_U_CMD_DEL_DEV, device, 0).context("DEL_DEV")
    }

    fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// From 7.3 on a server may take over a device on which another one died before it was started.
    fn can_take_over(&self) -> bool {
        self.has(UBLK_F_IO_DESC_SIZE)
    }

    fn moment(&mut self) -> Moment {
        let quiesce = self.setup.recovery != Recovery::None && self.has(UBLK_F_QUIESCE);
        self.random.weighted(&[
            (4, Moment::Open),
            (12, Moment::Fetch),
            (12, Moment::Command),
            (10, Moment::Live),
            (46, Moment::Serve),
            (if quiesce { 6 } else { 0 }, Moment::Quiesce),
            (if quiesce { 6 } else { 0 }, Moment::Leave),
            (4, Moment::Stop),
        ])
    }

    fn errors(&self) -> Errors {
        match self.setup.recovery {
            Recovery::None => Errors::Fatal,
            Recovery::Reissue => Errors::Never,
            Recovery::Queue | Recovery::FailIo => Errors::Endured,
        }
    }

    fn round(&mut self, moment: Moment) -> Result<()> {
        let device = self.device()?;
        let before = self.state(device)?;
        self.start_server(device, before, moment)?;
        if matches!(moment, Moment::Serve | Moment::Quiesce | Moment::Leave | Moment::Stop) {
            self.wait_live(device)?;
            self.work(device)?;
            std::thread::sleep(self.random.time(SERVES));
            self.judge_load()?;
        }
        match moment {
            Moment::Fetch => self.server()?.dead()?,
            Moment::Quiesce => {
                self.quiesce(device)?;
                std::thread::sleep(self.random.time(MEANWHILE));
                self.kill(moment)?;
            }
            Moment::Leave => self.leave(device)?,
            Moment::Stop => self.stop_meanwhile(device)?,
            _ => self.kill(moment)?,
        }
        let dead = Instant::now();
        self.server = None;
        let stopped = moment == Moment::Stop;
        let state = self.settle(device, before, moment, dead)?;
        self.witnesses.compare(&self.store)?;
        if state == UBLK_S_DEV_DEAD {
            self.disk_gone(device)?;
            if stopped || !self.can_take_over() || self.random.chance(60) {
                self.delete(device)?;
            }
        } else if self.random.chance(10) {
            self.drop_device(device)?;
        }
        Ok(())
    }

    /// The device, made if there is none.
    fn device(&mut self) -> Result<u32> {
        if let Some(device) = self.device {
            return Ok(device);
        }
        let quiesce = if self.setup.recovery == Recovery::None { 0 } else { self.features & UBLK_F_QUIESCE };
        let flags = self.setup.flags() | quiesce;
        let info = ublksrv_ctrl_dev_info {
            nr_hw_queues: self.setup.queues,
            queue_depth: DEPTH,
            max_io_buf_bytes: MAX_IO,
            flags,
            ..Default::default()
        };
        let info = self.control.add(info).context("ADD_DEV")?;
        self.device = Some(info.dev_id);
        if info.flags & flags != flags || info.nr_hw_queues != self.setup.queues {
            bail!("the driver has made something else of the device: {info:?}");
        }
        let basic = ublk_param_basic {
            logical_bs_shift: 9,
            physical_bs_shift: 12,
            io_opt_shift: 12,
            io_min_shift: 12,
            max_sectors: MAX_IO / SECTOR as u32,
            dev_sectors: DISK_BYTES / SECTOR,
            ..Default::default()
        };
        let params = ublk_params {
            len: size_of::<ublk_params>() as u32,
            types: UBLK_PARAM_TYPE_BASIC,
            basic,
            ..Default::default()
        };
        self.control.set_params(info.dev_id, params).context("SET_PARAMS")?;
        Ok(info.dev_id)
    }

    fn state(&mut self, device: u32) -> Result<u16> {
        Ok(self.control.info(device).context("GET_DEV_INFO")?.state)
    }

    fn server(&mut self) -> Result<&mut Talker> {
        self.server.as_mut().context("there is no server")
    }

    /// Starts a server and follows it up to its moment, or until it serves.
    fn start_server(&mut self, device: u32, state: u16, moment: Moment) -> Result<()> {
        let begin = if state == UBLK_S_DEV_DEAD { Begin::Start } else { Begin::Recover };
        if begin == Begin::Recover {
            let recovery = until("START_USER_RECOVERY", || {
                match self.control.simple(UBLK_U_CMD_START_USER_RECOVERY, device, 0) {
                    Ok(()) => Ok(Some(())),
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
                    Err(error) => Err(error).context("START_USER_RECOVERY"),
                }
            })?;
            self.tally.took("START_USER_RECOVERY", recovery.1);
        }
        let own = !self.random.chance(25);
        let program = std::env::current_exe()?;
        let mut command = Command::new(&program);
        command
            .arg("serve")
            .arg(format!("--device={device}"))
            .arg(format!("--store={}", self.store_path.display()))
            .arg(format!("--data={}", self.setup.data.name()))
            .arg(format!("--threads={}", self.setup.threads));
        let tags = u64::from(self.setup.queues) * u64::from(DEPTH);
        if moment == Moment::Fetch {
            command.arg(format!("--die-after={}", self.random.below(tags)));
        } else if own {
            command.arg(format!("--begin={}", begin.name()));
        }
        if self.lose_writes {
            command.arg("--lose-writes");
        }
        self.server = Some(Talker::start("server", &mut command)?);
        match moment {
            Moment::Open => return self.server()?.expect("open"),
            Moment::Fetch => return Ok(()),
            _ => {}
        }
        if !own {
            let server = self.server()?;
            server.expect("fetched")?;
            let pid = server.process.id();
            let mut command = Command::new(&program);
            command.arg("begin").arg(begin.name()).arg(format!("--device={device}")).arg(format!("--server={pid}"));
            self.sender = Some(Talker::start("sender", &mut command)?);
        }
        let started = Instant::now();
        let speaker = self.sender.as_mut().or(self.server.as_mut()).context("no server starts the device")?;
        speaker.expect("command")?;
        if moment == Moment::Command {
            std::thread::sleep(self.random.time(MEANWHILE));
            return Ok(());
        }
        speaker.expect("live")?;
        self.tally.took("to LIVE", started.elapsed());
        Ok(())
    }

    fn wait_live(&mut self, device: u32) -> Result<()> {
        let state = self.state(device)?;
        if state != UBLK_S_DEV_LIVE {
            bail!("the device was started and is in state {state}");
        }
        let disk = disk(device);
        let node = until("the disk's node", || Ok(Path::new(&disk).exists().then_some(())))?;
        self.tally.took("node", node.1);
        Ok(())
    }

    /// Sees to it that there is work to do.
    fn work(&mut self, device: u32) -> Result<()> {
        self.witnesses.attach(&disk(device), &mut self.random)?;
        if self.random.chance(40) {
            let time = self.witnesses.progress()?;
            self.tally.took("first requests", time);
        }
        self.judge_load()?;
        if self.load.is_none() {
            let written = self.store.written();
            self.load = Some(Load::start(&disk(device), self.errors(), self.directory, &mut self.random)?);
            until("fio's first write", || Ok((self.store.written() > written).then_some(())))?;
        }
        Ok(())
    }

    /// Judges a session that has come to its end. That has to be done before the disk goes.
    fn judge_load(&mut self) -> Result<()> {
        if let Some(load) = &mut self.load
            && load.ended(self.tally)?
        {
            self.load = None;
        }
        Ok(())
    }

    /// SIGKILL for the server and for who starts it.
    fn kill(&mut self, moment: Moment) -> Result<()> {
        let time = self.server()?.kill()?;
        self.tally.took("end of the server", time);
        if let Some(mut sender) = self.sender.take() {
            // It may have been refused, its server being dead.
            sender.process.signal(libc::SIGKILL);
            sender.process.wait().with_context(|| format!("end: {}", moment.name()))?;
        }
        Ok(())
    }

    fn quiesce(&mut self, device: u32) -> Result<()> {
        match self.control.simple(UBLK_U_CMD_QUIESCE_DEV, device, QUIESCE_MS) {
            Ok(()) => Ok(()),
            // A slow server is notified later.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) => Err(error).context("QUIESCE_DEV"),
        }
    }

    /// The server is asked to go, and goes.
    fn leave(&mut self, device: u32) -> Result<()> {
        let begin = Instant::now();
        loop {
            self.quiesce(device)?;
            let server = self.server.as_mut().context("there is no server")?;
            if let Some(status) = server.process.ended()? {
                if !status.success() {
                    bail!("the server leaves with {status}");
                }
                break;
            }
            if begin.elapsed() > PATIENCE {
                bail!("the server does not leave");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.tally.took("leaving", begin.elapsed());
        self.forget_sender()
    }

    /// Has a process of its own send a command that may take a while.
    fn begin_end(&self, command: End, device: u32) -> Result<Talker> {
        let mut process = Command::new(std::env::current_exe()?);
        process.arg("end").arg(command.name()).arg(format!("--device={device}"));
        let mut talker = Talker::start(command.name(), &mut process)?;
        talker.expect("command")?;
        Ok(talker)
    }

    /// STOP_DEV, and the server's end while it works.
    fn stop_meanwhile(&mut self, device: u32) -> Result<()> {
        let begin = Instant::now();
        let mut stop = self.begin_end(End::Stop, device)?;
        std::thread::sleep(self.random.time(MEANWHILE));
        self.kill(Moment::Stop)?;
        stop.succeed()?;
        self.tally.took("STOP_DEV, server killed", begin.elapsed());
        self.tally.dropped += 1;
        Ok(())
    }

    fn forget_sender(&mut self) -> Result<()> {
        match self.sender.take() {
            Some(mut sender) => sender.process.wait().map(drop),
            None => Ok(()),
        }
    }

    /// Waits for the state that the device must have without a server.
    fn settle(&mut self, device: u32, before: u16, moment: Moment, dead: Instant) -> Result<u16> {
        let after = self.setup.recovery.state_without_server();
        let expected: &[u16] = match moment {
            Moment::Stop => &[UBLK_S_DEV_DEAD],
            Moment::Open | Moment::Fetch => &[before],
            // The device may have been started or not.
            Moment::Command if before == UBLK_S_DEV_DEAD => &[UBLK_S_DEV_DEAD, after],
            _ => &[after],
        };
        let mut state = before;
        until("the state of a device without a server", || {
            state = self.state(device)?;
            Ok(expected.contains(&state).then_some(()))
        })
        .with_context(|| format!("state {state} instead of {expected:?}"))?;
        self.tally.took("to the state without server", dead.elapsed());
        Ok(state)
    }

    /// The disk is no more: so it must look, and who used it must hear of it.
    fn disk_gone(&mut self, device: u32) -> Result<()> {
        let (node, directory) = (disk(device), format!("/sys/block/ublkb{device}"));
        let gone = until("the end of the disk", || {
            Ok((!Path::new(&node).exists() && !Path::new(&directory).exists()).then_some(()))
        })?;
        self.tally.took("end of the disk", gone.1);
        let begin = Instant::now();
        if let Some(load) = self.load.take() {
            load.disk_gone(self.tally)?;
        }
        self.witnesses.detach()?;
        self.tally.took("end of the disk's users", begin.elapsed());
        self.witnesses.compare(&self.store)
    }

    fn delete(&mut self, device: u32) -> Result<()> {
        let begin = Instant::now();
        self.control.simple(UBLK_U_CMD_DEL_DEV, device, 0).context("DEL_DEV")?;
        self.tally.took("DEL_DEV", begin.elapsed());
        self.deleted(device)
    }

    fn deleted(&mut self, device: u32) -> Result<()> {
        self.device = None;
        match self.control.info(device) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => bail!("a deleted device is there: {other:?}"),
        }
    }

    /// Instead of a new server the end: what is held must fail.
    fn drop_device(&mut self, device: u32) -> Result<()> {
        self.judge_load()?;
        self.tally.dropped += 1;
        if self.random.chance(60) {
            let begin = Instant::now();
            self.control.simple(UBLK_U_CMD_STOP_DEV, device, 0).context("STOP_DEV")?;
            self.tally.took("STOP_DEV without server", begin.elapsed());
            let state = self.state(device)?;
            if state != UBLK_S_DEV_DEAD {
                bail!("a stopped device is in state {state}");
            }
            self.disk_gone(device)?;
            self.delete(device)
        } else {
            // It ends when the disk is closed by all who have it open.
            let begin = Instant::now();
            let mut delete = self.begin_end(End::Delete, device)?;
            self.disk_gone(device)?;
            delete.succeed()?;
            self.tally.took("DEL_DEV without server", begin.elapsed());
            self.deleted(device)
        }
    }

    /// A server that may live: all that is verified at the end is verified.
    fn finale(&mut self) -> Result<()> {
        let device = self.device()?;
        let before = self.state(device)?;
        self.start_server(device, before, Moment::Serve)?;
        self.forget_sender()?;
        self.wait_live(device)?;
        self.work(device)?;
        self.witnesses.progress()?;
        if let Some(load) = self.load.take() {
            load.finish(self.tally)?;
        }
        self.witnesses.detach()?;
        let begin = Instant::now();
        self.control.simple(UBLK_U_CMD_STOP_DEV, device, 0).context("STOP_DEV")?;
        self.tally.took("STOP_DEV", begin.elapsed());
        let status = self.server()?.process.wait()?;
        self.server = None;
        if !status.success() {
            bail!("the server of a stopped device ends with {status}");
        }
        self.witnesses.compare(&self.store)?;
        self.disk_gone(device)?;
        self.delete(device)
    }
}

fn disk(device: u32) -> String {
    format!("/dev/ublkb{device}")
}
