// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control plane: one method per command of `/dev/ublk-control`.
//!
//! Every command has a deadline. One that does not answer in time is asked to end and reported as
//! [`Error::Timeout`] with what it waits for; the caller goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::data::shared::SharedMemory;
use crate::device::Recovery;
use crate::driver::{ControlCommand, ControlFailure, Driver};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::process;
use crate::uapi::{self, DeviceState, Features, ublk_params, ublksrv_ctrl_dev_info};
use crate::units::{DeviceId, QueueId, Sectors};

/// How long a command may take that has no reason to wait.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a command may take that waits for requests or for a server to go.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a server may take for its requests before it is asked to leave again.
const QUIESCE_SLICE: Duration = Duration::from_millis(500);
/// How often a device's state is looked at while it is about to change.
pub(crate) const STATE_POLL: Duration = Duration::from_millis(10);

/// How long a deleted device's id may take to become free before [`Control::remove`] leaves it at that.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the device may stay whose node is gone.
const NODE_TIMEOUT: Duration = Duration::from_millis(200);

/// Most queues and deepest queues that the driver admits.
pub(crate) const MAX_QUEUES: u16 = uapi::UBLK_MAX_NR_QUEUES;
pub(crate) const MAX_DEPTH: u16 = uapi::UBLK_MAX_QUEUE_DEPTH;

/// What ADD_DEV is asked for.
#[derive(Clone, Copy, Debug)]
pub struct AddRequest {
    /// The id, or `None` for the lowest free one.
    pub id: Option<DeviceId>,
    /// Hardware queues; the driver takes no more than there are CPUs.
    pub queues: u16,
    /// Requests per queue.
    pub depth: u16,
    /// Longest read or write in bytes.
    pub max_io_bytes: u32,
    /// What the device should use.
    pub features: Features,
}

/// What the driver says about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its id.
    pub id: DeviceId,
    /// Hardware queues.
    pub queues: u16,
    /// Requests per queue.
    pub depth: u16,
    /// Its state.
    pub state: DeviceState,
    /// Longest read or write in bytes.
    pub max_io_bytes: u32,
    /// The server's process, or -1 if there is none.
    pub pid: i32,
    /// Features in force, unknown bits included.
    pub features: Features,
    /// User that made it.
    pub owner_uid: u32,
    /// Group of that user.
    pub owner_gid: u32,
}

/// How far a removal came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The device is gone and its id free.
    Complete,
    /// The disk is gone, but somebody still holds one of its nodes open; the id is free after that.
    HeldOpen,
}

/// Parameters as the driver holds them.
#[derive(Clone, Copy, Debug)]
pub struct StoredParams {
    /// The disk's shape.
    pub params: Params,
    /// Major and minor number of the disk, once it exists; (0, 0) before.
    pub disk_number: (u32, u32),
}

/// Typed access to the driver's control commands. Cheap to clone; usable from any thread.
#[derive(Clone, Debug)]
pub struct Control {
    driver: Arc<dyn Driver>,
}

impl Control {
    /// Control through the given driver.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Control { driver }
    }

    /// The driver behind this.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// GET_FEATURES: what the driver offers. Linux 6.5; older ones refuse it.
    ///
    /// # Errors
    ///
    /// As for every command here: [`Error::Control`] if the driver refuses, [`Error::Timeout`] if it
    /// does not answer.
    pub fn features(&self) -> Result<Features> {
        let command = command("GET_FEATURES", uapi::UBLK_U_CMD_GET_FEATURES, None);
        let payload = vec![0; usize::from(uapi::UBLK_FEATURES_LEN)];
        let reply = self.run(ControlCommand { payload, ..command }, COMMAND_TIMEOUT)?;
        let mask = u64::from_ne_bytes(reply[..8].try_into().expect("8 bytes were sent"));
        Ok(Features::from_bits_retain(mask))
    }

    /// ADD_DEV: makes `/dev/ublkcN`. The driver may change what it was asked for: look at the result.
    pub fn add(&self, request: &AddRequest) -> Result<DeviceInfo> {
        let id = request.id.map_or(u32::MAX, |id| id.0);
        let info = ublksrv_ctrl_dev_info {
            nr_hw_queues: request.queues,
            queue_depth: request.depth,
            max_io_buf_bytes: request.max_io_bytes,
            dev_id: id,
            flags: request.features.bits(),
            ..Default::default()
        };
        let payload = wire::encode_info(&info);
        let command = ControlCommand { payload, ..command("ADD_DEV", uapi::UBLK_U_CMD_ADD_DEV, request.id) };
        let reply = self.run(command, COMMAND_TIMEOUT)?;
        Ok(decode_info(&wire::decode_info(&reply)))
    }

    /// SET_PARAMS: the disk's shape; possible while there is no disk.
    pub fn set_params(&self, id: DeviceId, params: &Params) -> Result<()> {
        let payload = wire::encode_params(&params.encode());
        let command = ControlCommand { payload, ..command("SET_PARAMS", uapi::UBLK_U_CMD_SET_PARAMS, Some(id)) };
        self.run(command, COMMAND_TIMEOUT).map(drop)
    }

    /// Sets the disk's shape and sees to it that the driver knows all of it.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a kind of parameters that the driver is too old for.
    pub(crate) fn set_params_checked(&self, id: DeviceId, params: &Params) -> Result<()> {
        self.set_params(id, params)?;
        params.check_stored(&self.raw_params(id)?)
    }

    /// GET_PARAMS: the disk's shape and numbers.
    pub fn params(&self, id: DeviceId) -> Result<StoredParams> {
        let raw = self.raw_params(id)?;
        Ok(StoredParams { params: Params::decode(&raw), disk_number: (raw.devt.disk_major, raw.devt.disk_minor) })
    }

    fn raw_params(&self, id: DeviceId) -> Result<ublk_params> {
        let empty = ublk_params { len: size_of::<ublk_params>() as u32, ..Default::default() };
        let payload = wire::encode_params(&empty);
        let command = ControlCommand { payload, ..command("GET_PARAMS", uapi::UBLK_U_CMD_GET_PARAMS, Some(id)) };
        Ok(wire::decode_params(&self.run(command, COMMAND_TIMEOUT)?))
    }

    /// START_DEV: makes `/dev/ublkbN`. Waits until every tag of every queue has been fetched; while it
    /// waits, `give_up` is asked now and then.
    pub fn start(&self, id: DeviceId, pid: u32, give_up: &dyn Fn() -> bool) -> Result<()> {
        let command =
            ControlCommand { data: u64::from(pid), ..command("START_DEV", uapi::UBLK_U_CMD_START_DEV, Some(id)) };
        self.run_unless(command, DRAIN_TIMEOUT, give_up).map(drop)
    }

    /// STOP_DEV: removes `/dev/ublkbN`. Waits for requests in flight, so their server must go on.
    pub fn stop(&self, id: DeviceId) -> Result<()> {
        self.stop_within(id, DRAIN_TIMEOUT)
    }

    /// As [`stop`](Control::stop), with a time-out. After one the device goes on to stop: its disk is removed once the
    /// requests have ended.
    pub fn stop_within(&self, id: DeviceId, timeout: Duration) -> Result<()> {
        self.stop_unless(id, timeout, &|| false)
    }

    /// As [`stop_within`](Control::stop_within); while it waits, `give_up` is asked now and then.
    pub(crate) fn stop_unless(&self, id: DeviceId, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<()> {
        let command = command("STOP_DEV", uapi::UBLK_U_CMD_STOP_DEV, Some(id));
        self.run_unless(command, timeout, give_up).map(drop)
    }

    /// DEL_DEV: stops the device if need be, removes `/dev/ublkcN` and waits, at most `timeout`, until
    /// its id is free: until its server has closed `/dev/ublkcN` and everybody `/dev/ublkbN`. A time-out
    /// ends only the wait; the device is deleted all the same.
    pub fn delete(&self, id: DeviceId, timeout: Duration) -> Result<()> {
        self.run(command("DEL_DEV", uapi::UBLK_U_CMD_DEL_DEV, Some(id)), timeout).map(drop)
    }

    /// Stops and deletes a device, by whomever it is served.
    ///
    /// # Errors
    ///
    /// `ENODEV` if there is no such device, [`Error::Timeout`] if requests in flight are not finished.
    pub fn remove(&self, id: DeviceId) -> Result<Removal> {
        self.stop(id)?;
        match self.delete(id, RELEASE_TIMEOUT) {
            // Its server may well have been quicker, as it sees the stop.
            Err(Error::Control { errno: Errno::ENODEV, .. }) | Ok(()) => Ok(Removal::Complete),
            Err(Error::Timeout { .. }) => Ok(Removal::HeldOpen),
            Err(error) => Err(error),
        }
    }

    /// DEL_DEV_ASYNC: as [`delete`](Control::delete) without the wait; the id is free later. Linux 6.9.
    pub fn delete_async(&self, id: DeviceId) -> Result<()> {
        let command = command("DEL_DEV_ASYNC", uapi::UBLK_U_CMD_DEL_DEV_ASYNC, Some(id));
        self.run(command, DRAIN_TIMEOUT).map(drop)
    }

    /// TRY_STOP_DEV: as [`stop`](Control::stop), but `EBUSY` if anybody has the disk or a partition of it open.
    /// Linux 7.0.
    pub fn try_stop(&self, id: DeviceId) -> Result<()> {
        let command = command("TRY_STOP_DEV", uapi::UBLK_U_CMD_TRY_STOP_DEV, Some(id));
        self.run(command, DRAIN_TIMEOUT).map(drop)
    }

    /// QUIESCE_DEV: asks the server of a device with [`Features::QUIESCE`] to leave; the device stays, and its
    /// requests wait for the next server. Linux 6.16.
    ///
    /// The driver of Linux up to 7.3 (as far as tried) does not wait for requests that the server holds, and forgets tags that are lent
    /// again later: repeat the command until the device's state changes, as
    /// [`quiesce_until`](Control::quiesce_until) does.
    pub fn quiesce(&self, id: DeviceId, patience: Duration) -> Result<()> {
        self.quiesce_unless(id, patience, &|| false)
    }

    /// As [`quiesce`](Control::quiesce); while it waits, `give_up` is asked now and then.
    pub(crate) fn quiesce_unless(&self, id: DeviceId, patience: Duration, give_up: &dyn Fn() -> bool) -> Result<()> {
        let millis = patience.as_millis().clamp(1, u32::MAX.into()) as u64;
        let command = command("QUIESCE_DEV", uapi::UBLK_U_CMD_QUIESCE_DEV, Some(id));
        self.run_unless(ControlCommand { data: millis, ..command }, patience + COMMAND_TIMEOUT, give_up).map(drop)
    }

    /// Asks the server to leave until it has left, at most for `timeout`. Gives the state that the device is
    /// in then.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the device was not made for it, [`Error::Timeout`] if the server does not
    /// finish its requests.
    pub fn quiesce_until(&self, id: DeviceId, timeout: Duration) -> Result<DeviceState> {
        let info = self.info(id)?;
        self.require_quiesce(&info)?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.quiesce(id, QUIESCE_SLICE) {
                // Requests are still with the server.
                Ok(()) | Err(Error::Control { errno: Errno::EBUSY, .. }) => {}
                Err(error) => return Err(error),
            }
            let again = Instant::now() + QUIESCE_SLICE;
            while Instant::now() < again {
                let state = self.info(id)?.state;
                if state != DeviceState::Live {
                    return Ok(state);
                }
                std::thread::sleep(STATE_POLL);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    waiting_for: format!("the server of device {id} (process {}) leaving", info.pid),
                    waited: timeout,
                    hint: pending_hint(id, info.pid),
                });
            }
        }
    }

    /// Checks that a device's server can be asked to leave, and says why not.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device was not made for it, [`Error::Unsupported`] if the driver is too old.
    pub(crate) fn require_quiesce(&self, info: &DeviceInfo) -> Result<()> {
        if info.features.contains(Features::QUIESCE) {
            return Ok(());
        }
        let refused = |hint: &str| {
            Err(Error::Control {
                command: "QUIESCE_DEV",
                device: Some(info.id),
                errno: Errno::EINVAL,
                hint: hint.to_owned(),
            })
        };
        if Recovery::of(info.features).is_none() {
            return refused("the device was created without recovery (`ublk add --recovery`, `recoverable=True`)");
        }
        crate::plan::require(self.features()?, Features::QUIESCE)?;
        refused(
            "the device was made by a program that does not hand devices over; if its server is killed, \
                 `ublk recover` serves it",
        )
    }

    /// START_USER_RECOVERY: prepares a device whose server is gone for the next one. `EBUSY` while the old
    /// server still has it open. Linux 6.1; from 7.3 on it only checks the state.
    pub fn start_recovery(&self, id: DeviceId) -> Result<()> {
        let command = command("START_USER_RECOVERY", uapi::UBLK_U_CMD_START_USER_RECOVERY, Some(id));
        self.run(command, COMMAND_TIMEOUT).map(drop)
    }

    /// END_USER_RECOVERY: hands a device over to the server that has fetched all its tags. Waits for that; while
    /// it waits, `give_up` is asked now and then.
    pub fn end_recovery(&self, id: DeviceId, pid: u32, give_up: &dyn Fn() -> bool) -> Result<()> {
        let command = command("END_USER_RECOVERY", uapi::UBLK_U_CMD_END_USER_RECOVERY, Some(id));
        self.run_unless(ControlCommand { data: u64::from(pid), ..command }, DRAIN_TIMEOUT, give_up).map(drop)
    }

    /// REG_BUF: lets the driver look for clients' memory in this; the number that requests will name it by. The
    /// device needs [`Features::SHMEM_ZC`]. The pages stay pinned until [`unregister_memory`] or the device's end,
    /// whatever becomes of this process. Linux 7.1.
    ///
    /// [`unregister_memory`]: Control::unregister_memory
    pub fn register_memory(&self, id: DeviceId, memory: &SharedMemory) -> Result<u16> {
        let buffer = uapi::ublk_shmem_buf_reg {
            addr: memory.address(),
            len: memory.len(),
            flags: memory.flags(),
            ..Default::default()
        };
        let command = command("REG_BUF", uapi::UBLK_U_CMD_REG_BUF, Some(id));
        let (index, _) =
            self.run_for(ControlCommand { payload: wire::encode_shared(&buffer), ..command }, DRAIN_TIMEOUT, &|| {
                false
            })?;
        u16::try_from(index)
            .map_err(|_| Error::invalid("shared memory index", index, "the driver returned an invalid index"))
    }

    /// UNREG_BUF: the counterpart. Waits for requests that are in the memory. Linux 7.1.
    pub fn unregister_memory(&self, id: DeviceId, index: u16) -> Result<()> {
        let command = command("UNREG_BUF", uapi::UBLK_U_CMD_UNREG_BUF, Some(id));
        self.run(ControlCommand { data: index.into(), ..command }, DRAIN_TIMEOUT).map(drop)
    }

    /// UPDATE_SIZE: changes a started disk's capacity, in bytes. Linux 6.16.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] unless it is whole logical blocks: Linux's driver takes anything.
    pub fn update_size(&self, id: DeviceId, bytes: u64) -> Result<()> {
        let block = self.params(id)?.params.logical_block_size;
        if bytes == 0 || !bytes.is_multiple_of(u64::from(block)) {
            let rule = format!("must be a multiple of the logical block size ({block})");
            return Err(Error::invalid("size", bytes, rule));
        }
        let command = command("UPDATE_SIZE", uapi::UBLK_U_CMD_UPDATE_SIZE, Some(id));
        let sectors = Sectors::from_bytes(bytes).0;
        self.run(ControlCommand { data: sectors, ..command }, COMMAND_TIMEOUT).map(drop)
    }

    /// GET_DEV_INFO2: what the driver knows about a device. Linux 6.3.
    pub fn info(&self, id: DeviceId) -> Result<DeviceInfo> {
        let path = char_path(id);
        let mut payload = path.clone().into_bytes();
        payload.resize(path.len() + size_of::<ublksrv_ctrl_dev_info>(), 0);
        let command = ControlCommand {
            payload,
            path_len: path.len() as u16,
            ..command("GET_DEV_INFO2", uapi::UBLK_U_CMD_GET_DEV_INFO2, Some(id))
        };
        let reply = self.run(command, COMMAND_TIMEOUT)?;
        Ok(decode_info(&wire::decode_info(&reply[path.len()..])))
    }

    /// GET_QUEUE_AFFINITY: the CPUs whose requests come through a queue.
    pub fn queue_affinity(&self, id: DeviceId, queue: QueueId) -> Result<Vec<usize>> {
        // Room for 8192 CPUs, the most that Linux is built for.
        let command = ControlCommand {
            data: u64::from(queue.0),
            payload: vec![0; 1024],
            ..command("GET_QUEUE_AFFINITY", uapi::UBLK_U_CMD_GET_QUEUE_AFFINITY, Some(id))
        };
        let mask = self.run(command, COMMAND_TIMEOUT)?;
        let set = |cpu: &usize| mask[cpu / 8] & (1 << (cpu % 8)) != 0;
        Ok((0..mask.len() * 8).filter(set).collect())
    }

    fn run(&self, command: ControlCommand, timeout: Duration) -> Result<Vec<u8>> {
        self.run_unless(command, timeout, &|| false)
    }

    fn run_unless(&self, command: ControlCommand, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<Vec<u8>> {
        self.run_for(command, timeout, give_up).map(|(_, payload)| payload)
    }

    /// Sends a command; once more with the char device's path, if the device demands that.
    ///
    /// An unprivileged device admits whoever may open its char device, and only to a command that names it by
    /// path: root's too. A privileged one takes the path for the command's argument. Which it is may have
    /// changed since this process last asked; that a command without a path is refused before anything else
    /// is looked at does not change.
    fn run_for(
        &self,
        command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>)> {
        if command.dev_id == u32::MAX || command.path_len != 0 || command.op == uapi::UBLK_U_CMD_ADD_DEV {
            return self.send(command, timeout, give_up);
        }
        let path = char_path(DeviceId(command.dev_id));
        let payload = [path.as_bytes(), &command.payload].concat();
        let with_path = ControlCommand { payload, path_len: path.len() as u16, ..command };
        match self.send(command, timeout, give_up) {
            Err(Error::Control { errno: Errno::EINVAL, .. })
                if self.info(DeviceId(with_path.dev_id))?.features.contains(Features::UNPRIVILEGED_DEV) =>
            {
                let (result, mut reply) = self.send(with_path, timeout, give_up)?;
                reply.drain(..path.len());
                Ok((result, reply))
            }
            other => other,
        }
    }

    /// Whether a device that a command could not find by its path is deleted: its node goes a moment before the
    /// device, and may be missing for another reason.
    fn is_gone(&self, id: DeviceId) -> bool {
        let deadline = Instant::now() + NODE_TIMEOUT;
        loop {
            match self.driver.device_ids() {
                Ok(ids) if !ids.contains(&id) => return true,
                Ok(_) if Instant::now() < deadline => std::thread::sleep(STATE_POLL),
                _ => return false,
            }
        }
    }

    fn send(&self, command: ControlCommand, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<(i32, Vec<u8>)> {
        let name = command.name;
        let device = (command.dev_id != u32::MAX).then_some(DeviceId(command.dev_id));
        log::debug!("{name} {device:?} data {}", command.data);
        let by_path = command.path_len != 0;
        let refused = |errno: Errno, hint: &str| Error::Control { command: name, device, errno, hint: hint.to_owned() };
        // SAFETY: the only command with an address in its payload is REG_BUF, of a `SharedMemory`, whose bytes are nothing
        // but clients'.
        match unsafe { self.driver.control(command, timeout, give_up) } {
            Ok(answer) => Ok(answer),
            Err(ControlFailure::Refused(Errno::ENOENT)) if by_path && device.is_some_and(|id| self.is_gone(id)) => {
                Err(refused(Errno::ENODEV, hint(name, Errno::ENODEV)))
            }
            Err(ControlFailure::Refused(errno)) => Err(refused(errno, hint(name, errno))),
            Err(ControlFailure::GaveUp) => {
                Err(refused(Errno::ECANCELED, "a queue of the device failed, or somebody else stopped it"))
            }
            Err(ControlFailure::Io(e)) => Err(refused(crate::error::errno_of(&e), "the command could not be sent")),
            Err(ControlFailure::Timeout) => Err(Error::Timeout {
                waiting_for: device.map_or(name.to_owned(), |id| format!("{name} on device {id}")),
                waited: timeout,
                hint: timeout_hint(name).to_owned(),
            }),
        }
    }
}

/// Commands that wait for requests, or take a lock of the driver's that is held meanwhile.
const MAY_BLOCK: [u32; 14] = [
    uapi::UBLK_U_CMD_ADD_DEV,
    uapi::UBLK_U_CMD_SET_PARAMS,
    uapi::UBLK_U_CMD_GET_PARAMS,
    uapi::UBLK_U_CMD_START_DEV,
    uapi::UBLK_U_CMD_STOP_DEV,
    uapi::UBLK_U_CMD_DEL_DEV,
    uapi::UBLK_U_CMD_DEL_DEV_ASYNC,
    uapi::UBLK_U_CMD_TRY_STOP_DEV,
    uapi::UBLK_U_CMD_QUIESCE_DEV,
    uapi::UBLK_U_CMD_START_USER_RECOVERY,
    uapi::UBLK_U_CMD_END_USER_RECOVERY,
    uapi::UBLK_U_CMD_UPDATE_SIZE,
    uapi::UBLK_U_CMD_REG_BUF,
    uapi::UBLK_U_CMD_UNREG_BUF,
];

/// The path by which a command names a device, with the zero that ends it.
fn char_path(id: DeviceId) -> String {
    format!("/dev/ublkc{id}\0")
}

fn command(name: &'static str, op: u32, id: Option<DeviceId>) -> ControlCommand {
    ControlCommand {
        name,
        op,
        dev_id: id.map_or(u32::MAX, |id| id.0),
        data: 0,
        payload: Vec::new(),
        path_len: 0,
        may_block: MAY_BLOCK.contains(&op),
    }
}

/// The likely cause of a refusal.
fn hint(command: &str, errno: Errno) -> &'static str {
    match (command, errno) {
        ("ADD_DEV", Errno::EEXIST) => "the id is in use (`ublk list` shows the devices)",
        ("ADD_DEV", Errno::EINVAL) => {
            "the driver refuses this combination; Linux's driver (7.3) does not support batches with a queue depth of 1"
        }
        ("ADD_DEV", Errno::EPERM) => "needs root (CAP_SYS_ADMIN)",
        ("DEL_DEV_ASYNC", Errno::EINVAL) => {
            "Linux's driver does not support this for an unprivileged device: omit --async"
        }
        ("ADD_DEV", Errno::EACCES) => {
            "the limit of unprivileged devices is reached (module parameters ublks_max and, per user, ublks_max_per_user)"
        }
        ("ADD_DEV", Errno::ENOMEM) => {
            "not enough memory for that many queues and tags (`ulimit -l`, for a user's device?)"
        }
        ("START_DEV", Errno::EEXIST) => "the device is already started, or a process still has its previous disk open",
        ("START_DEV", Errno::EBUSY) => "the device was stopped while its server still had it open",
        ("TRY_STOP_DEV", Errno::EBUSY) => "the disk is open or mounted",
        ("TRY_STOP_DEV", Errno::EOPNOTSUPP) => "needs Linux 7.0 or newer",
        ("QUIESCE_DEV" | "UPDATE_SIZE", Errno::EOPNOTSUPP) => "needs Linux 6.16 or newer",
        ("UPDATE_SIZE", Errno::ENODEV) => "there is no such device, or it has no disk",
        ("REG_BUF" | "UNREG_BUF", Errno::EOPNOTSUPP) => "the device was created without shared memory (Linux 7.1)",
        ("REG_BUF", Errno::EEXIST) => "some of these pages are already registered",
        ("REG_BUF", Errno::EFAULT | Errno::ENOMEM) => "the pages cannot be pinned (`ulimit -l`?)",
        ("GET_DEV_INFO2", Errno::ENOENT) => "its node in /dev, which identifies an unprivileged device, is missing",
        ("UNREG_BUF", Errno::ENOENT) => "no shared memory is registered with this index",
        ("START_USER_RECOVERY", Errno::EINVAL) => "the device was created without recovery",
        ("START_USER_RECOVERY", Errno::EBUSY) => "the device still has a server, or a process still has it open",
        ("END_USER_RECOVERY", Errno::EBUSY) => "the device is not waiting for a server",
        ("GET_FEATURES", Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EINVAL | Errno::EPERM) => {
            "the driver is older than Linux 6.5"
        }
        (_, Errno::EPERM | Errno::EACCES) => "needs root (CAP_SYS_ADMIN)",
        (_, Errno::ENODEV) => "there is no such device",
        (_, Errno::EOPNOTSUPP) => "the driver does not know this command",
        (_, Errno::EINTR) => "interrupted",
        _ => "",
    }
}

/// What becomes of a request to leave that was not carried out in time. The driver has taken the server's tags away by
/// then, and cannot give them back: the request stays in force.
fn pending_hint(id: DeviceId, pid: i32) -> String {
    let why = if process::is_stopped(pid) {
        format!("process {pid} is stopped (SIGSTOP?)")
    } else {
        "it does not complete its requests".to_owned()
    };
    format!(
        "{why}. The request to leave is pending and cannot be taken back: new I/O waits, and the server leaves as soon \
         as it can. After that, or after killing it, `ublk recover -n {id}` serves the device"
    )
}

/// What a command that takes too long is waiting for.
fn timeout_hint(command: &str) -> &'static str {
    match command {
        "START_DEV" | "END_USER_RECOVERY" => {
            "the server has not fetched all tags, or does not answer the partition scan"
        }
        "STOP_DEV" | "TRY_STOP_DEV" => "requests are in flight that the server does not finish",
        "DEL_DEV" => "requests are not finished, or somebody still has the ublkc node open or mapped",
        _ => "the driver does not answer",
    }
}

fn decode_info(raw: &ublksrv_ctrl_dev_info) -> DeviceInfo {
    DeviceInfo {
        id: DeviceId(raw.dev_id),
        queues: raw.nr_hw_queues,
        depth: raw.queue_depth,
        state: DeviceState::decode(raw.state),
        max_io_bytes: raw.max_io_buf_bytes,
        pid: raw.ublksrv_pid,
        features: Features::from_bits_retain(raw.flags),
        owner_uid: raw.owner_uid,
        owner_gid: raw.owner_gid,
    }
}

/// Structures to bytes and back.
///
/// Invariant of the `unsafe` blocks: all structures are plain numbers (`repr(C)`, every bit pattern
/// valid), and their padding is spelled out or zeroed, because they are made from `Default`.
pub(crate) mod wire {
    use super::{ublk_params, ublksrv_ctrl_dev_info};
    use crate::uapi::ublk_shmem_buf_reg;

    fn encode<T: Copy>(value: &T) -> Vec<u8> {
        let mut bytes = vec![0; size_of::<T>()];
        // SAFETY: the vector has room for a `T`, and an unaligned write is asked for.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(*value) };
        bytes
    }

    fn decode<T: Copy + Default>(bytes: &[u8]) -> T {
        assert!(bytes.len() >= size_of::<T>(), "{} bytes for a structure of {}", bytes.len(), size_of::<T>());
        // SAFETY: the slice is long enough (assertion), every bit pattern is a valid `T` (above), and
        // an unaligned read is asked for.
        unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
    }

    pub(crate) fn encode_info(info: &ublksrv_ctrl_dev_info) -> Vec<u8> {
        encode(info)
    }

    pub(crate) fn decode_info(bytes: &[u8]) -> ublksrv_ctrl_dev_info {
        decode(bytes)
    }

    pub(crate) fn encode_shared(buffer: &ublk_shmem_buf_reg) -> Vec<u8> {
        encode(buffer)
    }

    pub(crate) fn encode_params(params: &ublk_params) -> Vec<u8> {
        encode(params)
    }

    pub(crate) fn decode_params(bytes: &[u8]) -> ublk_params {
        decode(bytes)
    }
}
