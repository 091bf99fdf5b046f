// SPDX-License-Identifier: MIT OR Apache-2.0

//! What sequences are made of: plots with dice in them.

use std::time::Instant;

use anyhow::Result;

use super::control::{Command, DevicePath, Want};
use super::{PATIENCE, Sequence, State, Waiting, number};
use crate::agent::{Agent, Answer, Identity, Order};
use ublk_test_common::random::Random;
use ublk_test_common::uapi::*;

/// Ends of a device's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Stop,
    TryStop,
    Delete,
    DeleteAsync,
    Kill,
    Close,
    Recover,
    Quiesce,
}

impl Sequence<'_> {
    /// The whole sequence but its clean-up.
    pub(super) fn scenario(&mut self) -> Result<()> {
        match self.random.below(100) {
            0..30 => self.control_only(),
            _ => self.life(),
        }
    }

    /// Devices that never get a disk.
    fn control_only(&mut self) -> Result<()> {
        let user = self.random.chance(15);
        for _ in 0..self.random.below(4) {
            self.stray_control()?;
        }
        for _ in 0..2 + self.random.below(5) {
            let faults = self.random.pick(&[1, 1, 1, 2, 2, 3]);
            let mut want = self.want(user, faults);
            // Without a server many tags cost nothing.
            if self.random.chance(20) {
                want.info.queue_depth = self.random.pick(&[128, 1000, 4095, 4096]);
            }
            if self.device.is_none() {
                self.add(&want)?;
            }
        }
        if self.device.is_none() {
            let want = self.want(user, 0);
            self.add(&want)?;
        }
        if self.device.is_none() {
            return Ok(());
        }
        self.look_for_nodes()?;
        if self.random.chance(30) {
            // The same once more: the number is taken.
            let mut want = self.want(user, 0);
            want.info.dev_id = self.device()?.id;
            self.add(&want)?;
        }
        for _ in 0..8 + self.random.below(16) {
            match self.random.below(10) {
                0..5 => {
                    let faults = self.random.pick(&[0, 1, 1, 1, 2]);
                    self.set_params(faults)?;
                    self.show_params()?;
                }
                5 => {
                    self.begin_early()?;
                }
                6 => {
                    let name = self.random.pick(&["STOP_DEV", "TRY_STOP_DEV"]);
                    self.stop(name)?;
                }
                7 => {
                    self.misplaced()?;
                    self.share()?;
                }
                _ => self.stray_control()?,
            }
        }
        let name = self.random.pick(&["DEL_DEV", "DEL_DEV", "DEL_DEV_ASYNC"]);
        if self.delete(name)? == Some(0) {
            self.over = true;
            if self.random.chance(50) {
                self.after_deletion()?;
            }
        }
        Ok(())
    }

    /// Commands for a device that has just been deleted.
    fn after_deletion(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        if self.async_deletion {
            self.await_number(device.id)?;
        }
        for name in ["GET_DEV_INFO", "DEL_DEV", "STOP_DEV"] {
            if self.random.chance(50) {
                let mut command = Command::new(name, device.id).case("deleted").payload(vec![0; 64]);
                command.path = DevicePath::Missing;
                self.control(&command)?;
            }
        }
        Ok(())
    }

    /// GET_PARAMS of everything.
    fn show_params(&mut self) -> Result<()> {
        let device = self.device()?;
        let mut payload = vec![0; 152];
        payload[..4].copy_from_slice(&152u32.to_ne_bytes());
        let command = Command::new("GET_PARAMS", device.id).user(device.owned).payload(payload);
        self.control(&command).map(drop)
    }

    fn show_info(&mut self) -> Result<()> {
        let device = self.device()?;
        let command = Command::new("GET_DEV_INFO", device.id).user(device.owned).payload(vec![0; 64]);
        self.control(&command).map(drop)
    }

    /// START_DEV before there is a server, which is then cancelled.
    fn begin_early(&mut self) -> Result<()> {
        let right = self.random.chance(50);
        let name = self.random.pick(&["START_DEV", "END_USER_RECOVERY"]);
        let id = self.device()?.id;
        let owned = self.device()?.owned;
        // The driver makes limits of the parameters before it waits, and the block layer then warns.
        if self.waiting.is_empty() && !(self.device()?.unchecked && name == "START_DEV") {
            let root = self.crew.root.pid();
            let (case, pid) = if right { ("pid-root", i64::from(root)) } else { ("pid-0", 0) };
            let mut command = Command::new(name, id).case(case).user(owned).data(pid as u64, case);
            command.waits = right || name != "START_DEV";
            command.cancels = true;
            self.control(&command)?;
        }
        Ok(())
    }

    /// Commands that belong to another state.
    fn misplaced(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        let name = self.random.pick(&["START_USER_RECOVERY", "QUIESCE_DEV", "UPDATE_SIZE", "END_USER_RECOVERY"]);
        let wrong = match name {
            "QUIESCE_DEV" => device.state != State::Live,
            "END_USER_RECOVERY" => device.state == State::Live && !self.unfetched(),
            "UPDATE_SIZE" => device.state == State::Dead,
            _ => true,
        };
        if !wrong || !self.waiting.is_empty() {
            return Ok(());
        }
        let server = self.server.as_ref().map_or(1, |server| server.agent.pid());
        let data = if name == "END_USER_RECOVERY" { server as u64 } else { 100 };
        let command = Command::new(name, device.id).case("misplaced").user(device.owned).data(data, "");
        self.control(&command).map(drop)
    }

    /// What a device shall be.
    fn want(&mut self, user: bool, faults: u32) -> Want {
        let random = &mut self.random;
        let mut flags = random.weighted(&[
            (24, 0),
            (8, UBLK_F_NEED_GET_DATA),
            (14, UBLK_F_USER_COPY),
            (8, UBLK_F_SUPPORT_ZERO_COPY),
            (8, UBLK_F_AUTO_BUF_REG),
            (4, UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY),
            (3, UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY),
            (2, UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY),
            (3, UBLK_F_USER_COPY | UBLK_F_ZONED),
            (2, UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_ZONED),
            (4, UBLK_F_USER_COPY | UBLK_F_INTEGRITY),
        ]);
        if user {
            flags = random.pick(&[0, 0, UBLK_F_NEED_GET_DATA]) | UBLK_F_UNPRIVILEGED_DEV;
        }
        if random.chance(25) {
            flags |= UBLK_F_BATCH_IO;
        }
        if random.chance(45) {
            flags |= random.pick(&[
                UBLK_F_USER_RECOVERY,
                UBLK_F_USER_RECOVERY,
                UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
                UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
            ]);
            if random.chance(40) {
                flags |= UBLK_F_QUIESCE;
            }
        }
        let mut desc = 0;
        if random.chance(15) {
            flags |= UBLK_F_IO_DESC_SIZE;
            desc = random.pick(&[24, 32, 64, 248, 256]);
        }
        // Who scans partitions is served by an autopilot, which can do the plain modes only.
        let plain = flags & !(UBLK_F_NEED_GET_DATA | UBLK_F_USER_RECOVERY | UBLK_F_IO_DESC_SIZE) == 0;
        if !plain || random.chance(85) {
            flags |= UBLK_F_NO_AUTO_PART_SCAN;
        }
        for (percent, flag) in [
            (10, UBLK_F_SHMEM_ZC),
            (5, UBLK_F_UPDATE_SIZE),
            (5, UBLK_F_PER_IO_DAEMON),
            (5, UBLK_F_BUF_REG_OFF_DAEMON),
            (5, UBLK_F_SAFE_STOP_DEV),
            (5, UBLK_F_CMD_IOCTL_ENCODE),
            (4, 1 << 40),
            (2, 1 << 63),
        ] {
            if random.chance(percent) {
                flags |= flag;
            }
        }
        if !user && random.chance(4) {
            flags |= UBLK_F_UNPRIVILEGED_DEV;
        }
        // The block layer sends the writes of zones from whatever processor its worker runs on.
        let queues = if flags & UBLK_F_ZONED != 0 { 1 } else { random.pick(&[1, 1, 2, 2, 5]) };
        // Linux's driver refuses batches with one tag.
        let single = if flags & UBLK_F_BATCH_IO != 0 && random.chance(90) { 0 } else { 4 };
        let info = ublksrv_ctrl_dev_info {
            nr_hw_queues: queues,
            queue_depth: random.weighted(&[(single, 1), (6, 2), (6, 4), (2, 7)]),
            io_desc_size: desc,
            max_io_buf_bytes: random.pick(&[4096, 16384, 65536, 70000, 262_144]),
            dev_id: random.pick(&[u32::MAX, u32::MAX, 0, 1, 3, 63, 64, 500, 1000, (1 << 20) - 1]),
            flags,
            ublksrv_flags: random.next(),
            ..Default::default()
        };
        Want { info, user, faults }
    }

    /// A device that gets a disk.
    fn life(&mut self) -> Result<()> {
        let user = self.random.chance(12);
        if self.random.chance(25) {
            let want = self.want(user, 1);
            self.add(&want)?;
        }
        if self.device.is_none() {
            let want = self.want(user, 0);
            self.add(&want)?;
        }
        if self.device.is_none() {
            return Ok(());
        }
        if !self.prelude()? {
            return Ok(());
        }
        if self.over {
            return Ok(());
        }
        self.middle(6, 24)?;
        loop {
            match self.some_end()? {
                End::Recover => {
                    let how = self.random.pick(&["kill", "kill", "close"]);
                    self.end_server(how)?;
                    if !self.recover()? {
                        break;
                    }
                    self.middle(2, 10)?;
                }
                End::Quiesce => {
                    self.quiesce()?;
                    if !self.recover()? {
                        break;
                    }
                    self.middle(2, 8)?;
                }
                end => {
                    self.finale(end)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// From a device to a disk; whether it is there.
    fn prelude(&mut self) -> Result<bool> {
        let params_first = self.random.chance(60);
        if params_first {
            self.right_params()?;
        }
        if self.random.chance(8) {
            self.begin_early()?;
        }
        let threads = self.random.pick(&[1, 1, 2]);
        if self.start_server(threads)? != 0 {
            return Ok(false);
        }
        if self.random.chance(15) {
            self.open_twice()?;
        }
        self.map_all()?;
        self.noise(10)?;
        let scans = !self.device()?.has(UBLK_F_NO_AUTO_PART_SCAN);
        if scans {
            self.engage_autopilot()?;
        }
        let early = self.random.chance(15) && !self.device()?.has(UBLK_F_ZONED);
        if early && params_first {
            self.begin("START_DEV", true)?;
        }
        if !scans {
            for _ in 0..self.random.below(3) {
                self.stray_fetch()?;
            }
        }
        if self.random.chance(4) && self.waiting.is_empty() {
            // A server that ends before it was ready; another one takes its place.
            let how = self.random.pick(&["kill", "close"]);
            self.end_server(how)?;
            if self.start_server(threads)? != 0 {
                return Ok(false);
            }
            self.map_all()?;
            if scans {
                self.engage_autopilot()?;
            }
        }
        if self.random.chance(4) && self.waiting.is_empty() && !scans {
            self.stop("STOP_DEV")?;
            self.stray_fetch_when_stopping()?;
            return Ok(false);
        }
        self.fetch_all()?;
        self.settle_and_note()?;
        if !params_first {
            if self.random.chance(20) {
                self.begin("START_DEV", true)?;
            }
            self.right_params()?;
        }
        self.noise(15)?;
        if self.device()?.state != State::Live {
            if self.device()?.unsure {
                self.right_params()?;
            }
            if self.random.chance(12) {
                self.begin("START_DEV", false)?;
            }
            self.start_disk()?;
        }
        if self.device()?.state != State::Live {
            return Ok(false);
        }
        if self.device()?.unsure {
            self.learn_params()?;
        }
        self.started()?;
        Ok(true)
    }

    /// START_DEV, and what the disk looks like then.
    fn start_disk(&mut self) -> Result<()> {
        for _ in 0..3 {
            if !self.waiting.is_empty() {
                return Ok(());
            }
            let zoned = self.device()?.has(UBLK_F_ZONED);
            if zoned {
                self.start_zoned()?;
            } else {
                self.begin("START_DEV", true)?;
            }
            if self.device()?.state == State::Live {
                return Ok(());
            }
            self.right_params()?;
        }
        Ok(())
    }

    /// The driver asks the server for the zones before START_DEV ends.
    fn start_zoned(&mut self) -> Result<()> {
        let context = self.context();
        let device = self.device()?.clone();
        let pid = self.server.as_ref().map_or(-1, |server| server.agent.pid());
        let mut command = Command::new("START_DEV", device.id).user(device.owned).data(pid as u64, "");
        command.waits = true;
        // Refused at once, it waits for nothing.
        if let Some(token) = self.hand_over(&command)? {
            self.waiting.push(Waiting { name: "START_DEV", user: device.owned, token, given_up: false });
        }
        let deadline = Instant::now() + PATIENCE;
        self.quiet = true;
        let outcome = self.serve_start(deadline);
        self.quiet = false;
        outcome?;
        let result = if self.waiting.is_empty() { "done" } else { "pending" };
        let events = self.take_events();
        self.record("START_DEV", "zoned", &context, "", result, events)
    }

    fn serve_start(&mut self, deadline: Instant) -> Result<()> {
        while !self.waiting.is_empty() {
            self.pump()?;
            while let Some(request) = self.requests.first().cloned() {
                self.answer_alone(&request)?;
                self.pump()?;
            }
            if self.waiting.is_empty() {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.give_up();
                break;
            }
            self.sleep(left)?;
        }
        Ok(())
    }

    /// Looks at a disk that has just come, and opens it.
    fn started(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        if self.random.chance(50) {
            self.look()?;
        }
        if self.random.chance(30) {
            self.look_for_nodes()?;
        }
        if self.random.chance(30) {
            self.show_info()?;
        }
        if self.random.chance(30) {
            self.show_params()?;
        }
        if device.owned && self.random.chance(40) {
            let context = self.context();
            let order = Order::OpenDisk { id: device.id, write: false, exclusive: false };
            let before = self.crew.user.status(0, &order)?;
            self.crew.root.status(0, &Order::Own(format!("/dev/ublkb{}", device.id)))?;
            let after = self.crew.user.status(0, &order)?;
            self.crew.user.status(0, &Order::CloseDisk)?;
            self.record("user-open", "ok", &context, "", number(before), number(after))?;
        }
        for thread in 0..3 {
            if self.random.chance(if thread == 0 { 95 } else { 60 }) {
                let read_only = device.params.basic.attrs & UBLK_ATTR_READ_ONLY != 0;
                let write = if read_only { self.random.chance(20) } else { self.random.chance(90) };
                self.open_disk(thread, write, self.number % 17 == 3)?;
            }
        }
        Ok(())
    }

    /// A second open of the char device.
    fn open_twice(&mut self) -> Result<()> {
        let context = self.context();
        let id = self.device()?.id;
        let result = self.crew.root.status(0, &Order::OpenChar { id, patience: 0 })?;
        self.crew.root.status(0, &Order::CloseChar)?;
        self.record("open", "second", &context, "", number(result), String::new())
    }

    fn stray_fetch_when_stopping(&mut self) -> Result<()> {
        if self.device()?.has(UBLK_F_BATCH_IO) {
            return Ok(());
        }
        let command = self.tag_command("FETCH_REQ", 0, 0, 0)?;
        self.fetch(&command)?;
        self.begin("START_DEV", true)?;
        self.cancel("START_DEV")
    }

    /// Right parameters, sometimes after wrong ones.
    fn right_params(&mut self) -> Result<()> {
        // Linux's driver does not check all parameters of zoned devices, and the block layer then warns.
        if self.random.chance(15) && !self.device()?.has(UBLK_F_ZONED) {
            self.set_params(1)?;
        }
        self.set_params(0).map(drop)
    }

    /// What happened without being asked for is written down.
    fn settle_and_note(&mut self) -> Result<()> {
        let context = self.context();
        self.settle()?;
        let events = self.take_events();
        if !events.is_empty() {
            self.record("quiet", "ok", &context, "", "0", events)?;
        }
        Ok(())
    }

    /// Now and then something of no consequence.
    fn noise(&mut self, percent: u64) -> Result<()> {
        while self.random.chance(percent) {
            if self.random.chance(70) { self.stray_control()? } else { self.misplaced()? }
        }
        Ok(())
    }

    /// Answers one request such that the dice of the sequence do not depend on its turn.
    pub(super) fn answer_alone(&mut self, request: &super::Request) -> Result<()> {
        let own = Random::new(self.salt, request.sector << 8 | u64::from(request.op));
        let dice = std::mem::replace(&mut self.random, own);
        let outcome = self.answer(request, super::data::Ending::Full);
        self.random = dice;
        outcome
    }

    /// Requests and their answers.
    fn middle(&mut self, least: u64, most: u64) -> Result<()> {
        let rounds = least + self.random.below(most - least + 1);
        let autopilot = self.server.as_ref().is_some_and(|server| server.autopilot);
        for _ in 0..rounds {
            if self.over || self.server.is_none() {
                return Ok(());
            }
            self.noise(12)?;
            if autopilot {
                if let Some(thread) = self.idle_client() {
                    self.request(thread)?;
                }
                continue;
            }
            match self.random.below(100) {
                0..50 => {
                    if let Some(thread) = self.idle_client() {
                        self.request(thread)?;
                    }
                }
                50..58 => {
                    if let Some(thread) = self.idle_client()
                        && self.requests.is_empty()
                    {
                        self.large_request(thread)?;
                    }
                }
                58..68 => {
                    if let Some(request) = self.some_request() {
                        self.stray_commit(&request)?;
                    } else if !self.device()?.has(UBLK_F_BATCH_IO) {
                        self.stray_fetch()?;
                    }
                }
                68..71 => self.resize()?,
                // The queue is frozen for it, so nothing may be under way.
                71..78 if self.requests.is_empty() && self.jobs.iter().all(Option::is_none) => self.share()?,
                _ => {}
            }
            while self.random.chance(65) {
                let Some(request) = self.some_request() else { break };
                let ending = self.some_ending();
                self.answer(&request, ending)?;
            }
        }
        Ok(())
    }

    fn some_request(&mut self) -> Option<super::Request> {
        if self.requests.is_empty() {
            return None;
        }
        let at = self.random.index(self.requests.len());
        self.requests.get(at).cloned()
    }

    /// UPDATE_SIZE to more than before.
    fn resize(&mut self) -> Result<()> {
        let device = self.device()?;
        if device.has(UBLK_F_ZONED) {
            return Ok(());
        }
        let (id, owned) = (device.id, device.owned);
        let size = device.params.basic.dev_sectors + self.random.pick(&[8, 512, 1024]);
        let command = Command::new("UPDATE_SIZE", id).user(owned).data(size, format!("sectors={size}"));
        if self.control(&command)? == Some(0) {
            self.device_mut()?.params.basic.dev_sectors = size;
        }
        Ok(())
    }

    /// Answers all that the server holds.
    fn drain(&mut self) -> Result<()> {
        for _ in 0..64 {
            let Some(request) = self.requests.first().cloned() else { return Ok(()) };
            let ending = self.some_ending();
            self.answer(&request, ending)?;
        }
        Ok(())
    }

    fn some_end(&mut self) -> Result<End> {
        if self.over || self.server.is_none() {
            return Ok(End::Delete);
        }
        let device = self.device()?.clone();
        let recovery = device.has(UBLK_F_USER_RECOVERY);
        let autopilot = self.server.as_ref().is_some_and(|server| server.autopilot);
        Ok(self.random.weighted(&[
            (20, End::Stop),
            (10, End::TryStop),
            (15, End::Delete),
            (8, End::DeleteAsync),
            (12, End::Kill),
            (8, End::Close),
            (if recovery { 70 } else { 0 }, End::Recover),
            (if device.has(UBLK_F_QUIESCE) && !autopilot { 30 } else { 0 }, End::Quiesce),
        ]))
    }

    fn finale(&mut self, end: End) -> Result<()> {
        match end {
            End::Stop | End::TryStop => {
                let name = if end == End::Stop { "STOP_DEV" } else { "TRY_STOP_DEV" };
                if self.random.chance(50) {
                    self.drain()?;
                }
                if end == End::TryStop && self.random.chance(60) {
                    self.drain()?;
                    for thread in 0..3 {
                        self.close_disk(thread)?;
                    }
                }
                // The opener is counted while it waits, too.
                let refused = self.stop(name)? == Some(-libc::EBUSY);
                self.drain()?;
                self.settle_and_note()?;
                if refused {
                    return Ok(());
                }
                if self.random.chance(40) {
                    self.show_info()?;
                    self.look_for_nodes()?;
                }
                if self.random.chance(30) && self.waiting.is_empty() {
                    self.stop("STOP_DEV")?;
                }
                if self.random.chance(50) && self.waiting.is_empty() && !self.device()?.has(UBLK_F_BATCH_IO) {
                    self.begin("START_DEV", true)?;
                    self.cancel("START_DEV")?;
                }
                if self.random.chance(30) && self.waiting.is_empty() {
                    self.second_life()?;
                }
            }
            End::Delete | End::DeleteAsync => {
                if self.server.is_some() {
                    self.drain()?;
                }
                let name = if end == End::Delete { "DEL_DEV" } else { "DEL_DEV_ASYNC" };
                if !self.over && self.requests.is_empty() {
                    self.delete(name)?;
                }
            }
            End::Kill => {
                self.end_server("kill")?;
                if self.random.chance(50) {
                    self.show_info()?;
                    self.look_for_nodes()?;
                }
            }
            End::Close => self.end_server("close")?,
            End::Recover | End::Quiesce => {}
        }
        Ok(())
    }

    /// Another server, and another disk, for a device that was stopped.
    fn second_life(&mut self) -> Result<()> {
        for thread in 0..3 {
            self.close_disk(thread)?;
        }
        self.end_server("kill")?;
        if self.device()?.state != State::Dead || self.start_server(1)? != 0 {
            return Ok(());
        }
        self.map_all()?;
        if !self.device()?.has(UBLK_F_NO_AUTO_PART_SCAN) {
            self.engage_autopilot()?;
        }
        self.fetch_all()?;
        if self.random.chance(50) {
            self.right_params()?;
        }
        self.start_disk()?;
        if self.device()?.state == State::Live {
            self.learn_params()?;
            self.started()?;
            self.middle(1, 4)?;
        }
        Ok(())
    }

    /// QUIESCE_DEV, and the end of the server that it asks for.
    fn quiesce(&mut self) -> Result<()> {
        self.drain()?;
        let device = self.device()?.clone();
        let timeout = self.random.pick(&[0, 100, 1000]);
        let command = Command::new("QUIESCE_DEV", device.id).user(device.owned).data(timeout, format!("ms={timeout}"));
        self.control(&command)?;
        // Where I/O fails without a server, it is chance which error a request that waits meets first.
        if self.random.chance(40)
            && !device.has(UBLK_F_USER_RECOVERY_FAIL_IO)
            && let Some(thread) = self.idle_client()
        {
            self.request(thread)?;
        }
        let how = self.random.pick(&["kill", "close"]);
        self.end_server(how)
    }

    /// Another server for a device that waits for one; whether it lives again.
    fn recover(&mut self) -> Result<bool> {
        let device = self.device()?.clone();
        if !matches!(device.state, State::Quiesced | State::FailIo) {
            return Ok(false);
        }
        if self.random.chance(30) {
            self.show_info()?;
        }
        if self.random.chance(40)
            && let Some(thread) = self.idle_client()
        {
            self.request(thread)?;
        }
        self.noise(20)?;
        if self.random.chance(12) {
            self.stop("STOP_DEV")?;
            return Ok(false);
        }
        if self.random.chance(12) {
            return Ok(false);
        }
        let threads = self.random.pick(&[1, 2]);
        if self.start_server(threads)? != 0 {
            return Ok(false);
        }
        if self.random.chance(70) {
            // Busy while the server has the char device open.
            let command = Command::new("START_USER_RECOVERY", device.id).case("open").user(device.owned);
            self.control(&command)?;
        }
        self.map_all()?;
        self.fetch_all()?;
        if self.random.chance(10) {
            self.begin("END_USER_RECOVERY", false)?;
        }
        self.begin("END_USER_RECOVERY", true)?;
        Ok(self.device()?.state == State::Live)
    }

    /// Hands a control command over without waiting for it; `None` if it has ended already.
    fn hand_over(&mut self, command: &Command) -> Result<Option<u64>> {
        match self.hand(command, 0)? {
            Answer::Control { token, result: None, .. } => Ok(Some(token)),
            Answer::Control { result: Some(result), .. } => {
                self.events.push(format!("{} -> {}", command.name, number(result)));
                self.control_done(command.name, result)?;
                Ok(None)
            }
            other => anyhow::bail!("a strange answer: {other:?}"),
        }
    }

    /// Removes all that the sequence has made, whatever state it is in.
    pub(super) fn clean_up(&mut self) -> Result<()> {
        self.quiet = false;
        let context = self.context();
        self.events.clear();
        if let Some(mut server) = self.server.take() {
            server.agent.shoot();
            server.agent.reap(PATIENCE);
        }
        self.requests.clear();
        self.lingering.clear();
        for name in ["START_DEV", "END_USER_RECOVERY"] {
            if let Some(waiting) = self.waiting.iter().find(|waiting| waiting.name == name).cloned() {
                let order = Order::Cancel { token: waiting.token, patience: PATIENCE.as_millis() as u64 };
                self.controller(waiting.user).order(0, &order)?;
                self.waiting.retain(|other| other.name != name);
            }
        }
        let mut text = Vec::new();
        if let Some(device) = self.device.clone() {
            // Without a disk nothing can hang any more; the clients end, whatever they waited for.
            self.quietly(&Command::new("STOP_DEV", device.id))?;
            self.release_clients()?;
        }
        for waiting in std::mem::take(&mut self.waiting) {
            let order = Order::Await { token: waiting.token, patience: PATIENCE.as_millis() as u64 };
            if let Answer::Control { result, .. } = self.controller(waiting.user).order(0, &order)? {
                text.push(format!("{} -> {}", waiting.name, result.map_or_else(|| "stuck".into(), number)));
            }
        }
        if let Some(device) = self.device.clone() {
            // Until then DEL_DEV may find the device, or not.
            if self.async_deletion && !self.await_number(device.id)? {
                text.push("the number is not free".into());
            }
            let (result, _) = self.quietly(&Command::new("DEL_DEV", device.id))?;
            text.push(format!("DEL_DEV -> {}", result.map_or_else(|| "stuck".into(), number)));
            if result.is_none() {
                self.crew.stuck.push(device.id);
                self.crew.root = Agent::start(Identity::Root, 1, &[])?;
                self.crew.user = Agent::start(Identity::User, 1, &[])?;
            }
        }
        self.release_clients()?;
        self.step += 1;
        let result = text.join(" ");
        self.record("clean-up", "ok", &context, "", result, String::new())
    }

    /// All clients have carried out their orders and have closed the disk.
    fn release_clients(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for thread in 0..self.crew.client.threads() {
            while self.crew.client.busy(thread) {
                let left = deadline.saturating_duration_since(Instant::now());
                if self.crew.client.receive(thread, left)?.is_none() {
                    self.crew.replace_clients()?;
                    break;
                }
            }
            self.crew.client.status(thread, &Order::CloseDisk)?;
            self.jobs[thread] = None;
            self.opened[thread] = false;
        }
        Ok(())
    }
}
