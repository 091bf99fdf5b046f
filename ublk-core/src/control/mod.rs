// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control plane: one method per command of `/dev/ublk-control`.
//!
//! Every command has a time limit. One that does not finish in time is cancelled and reported as [`Error::Timeout`] with
//! what it waits for.
//!
//! The commands, with their numbers, time limits and the meaning of their failures, are in `commands.rs`.
//! `call.rs` sends them. `removal.rs` combines them to remove a device for certain.

mod call;
mod commands;
mod removal;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::call::Call;
use self::commands::Command;
pub use self::removal::Removal;
use crate::data::shared::SharedMemory;
use crate::driver::kernel::KernelDriver;
use crate::driver::{Driver, deadline};
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result};
use crate::identity::BackingIdentity;
use crate::options::Recovery;
use crate::params::Params;
use crate::process;
use crate::uapi::{self, DeviceState, Features, ublk_params, ublksrv_ctrl_dev_info, wire};
use crate::units::{DeviceId, QueueId, Sectors};

/// Time limit of a command that has no reason to wait.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of a command that waits for requests or for a server.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Time that a server gets to finish its requests before it is asked to leave again.
const QUIESCE_SLICE: Duration = Duration::from_millis(500);
/// Interval in which a device's state is polled while it is about to change.
pub(crate) const STATE_POLL: Duration = Duration::from_millis(10);

/// Length of a mask of CPUs: room for 8192, the most that Linux is built for.
const AFFINITY_BYTES: usize = 1024;

/// Arguments of [`Control::add`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AddRequest {
    /// The id, or `None` for the lowest free one.
    pub id: Option<DeviceId>,
    /// Hardware queues; the driver takes no more than there are CPUs.
    pub queues: u16,
    /// Requests per queue.
    pub depth: u16,
    /// Longest read or write in bytes.
    pub max_io_bytes: u32,
    /// Features to request.
    pub features: Features,
    /// Identity of what the disk is stored in, which the driver keeps for the device's next server.
    pub backing: Option<BackingIdentity>,
}

impl AddRequest {
    /// A device with one queue and no special features.
    pub fn new(depth: u16, max_io_bytes: u32) -> Self {
        AddRequest { id: None, queues: 1, depth, max_io_bytes, features: Features::empty(), backing: None }
    }
}

/// Information about a device, from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
    /// User that created it.
    pub owner_uid: u32,
    /// Group of that user.
    pub owner_gid: u32,
    /// Identity of what the disk is stored in, if the server that created the device stored it.
    pub backing: Option<BackingIdentity>,
}

/// Parameters as the driver holds them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
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
    /// Opens `/dev/ublk-control`.
    ///
    /// # Errors
    ///
    /// [`Error::DriverMissing`] if the node does not exist, [`Error::File`] if it may not be opened, [`Error::Ring`] if
    /// io_uring is not available.
    pub fn open() -> Result<Self> {
        Ok(Self::new(Arc::new(KernelDriver::open()?)))
    }

    /// Creates the control plane of a driver.
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        Control { driver }
    }

    /// Returns the driver.
    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Returns the ids of the devices of all users, in ascending order.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if `/sys/class/ublk-char` cannot be read.
    pub fn device_ids(&self) -> Result<Vec<DeviceId>> {
        self.driver.device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))
    }

    /// Returns the path of a device's disk, whether it exists or not.
    pub fn block_path(&self, id: DeviceId) -> PathBuf {
        self.driver.block_path(id)
    }

    /// GET_FEATURES: returns the features that the driver offers. Since Linux 6.5.
    ///
    /// # Errors
    ///
    /// As for every command here: [`Error::Control`] if the driver refuses it, [`Error::Timeout`] if it does not finish in
    /// time.
    pub fn features(&self) -> Result<Features> {
        let payload = vec![0; usize::from(uapi::UBLK_FEATURES_LEN)];
        let reply = self.call(&commands::GET_FEATURES, None).payload(payload).reply()?;
        let mask = u64::from_ne_bytes(reply[..8].try_into().expect("8 bytes were sent"));
        Ok(Features::from_bits_retain(mask))
    }

    /// ADD_DEV: creates `/dev/ublkcN`. The result may differ from the arguments.
    pub fn add(&self, request: &AddRequest) -> Result<DeviceInfo> {
        let id = request.id.map_or(u32::MAX, |id| id.0);
        let info = ublksrv_ctrl_dev_info {
            nr_hw_queues: request.queues,
            queue_depth: request.depth,
            max_io_buf_bytes: request.max_io_bytes,
            dev_id: id,
            flags: request.features.bits(),
            ublksrv_flags: request.backing.map_or(0, BackingIdentity::encode),
            ..Default::default()
        };
        let reply = self.call(&commands::ADD_DEV, request.id).payload(wire::encode_info(&info)).reply()?;
        Ok(decode_info(&wire::decode_info(&reply)))
    }

    /// SET_PARAMS: sets the disk's parameters; possible while there is no disk.
    pub fn set_params(&self, id: DeviceId, params: &Params) -> Result<()> {
        self.call(&commands::SET_PARAMS, Some(id)).payload(wire::encode_params(&params.encode())).run()
    }

    /// Sets the disk's parameters and checks that the driver has stored all of them.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a kind of parameters that the driver is too old for.
    pub(crate) fn set_params_checked(&self, id: DeviceId, params: &Params) -> Result<()> {
        self.set_params(id, params)?;
        params.check_stored(&self.raw_params(id, &|| false)?)
    }

    /// GET_PARAMS: returns the disk's parameters and device number.
    pub fn params(&self, id: DeviceId) -> Result<StoredParams> {
        let raw = self.raw_params(id, &|| false)?;
        Ok(StoredParams { params: Params::decode(&raw), disk_number: (raw.devt.disk_major, raw.devt.disk_minor) })
    }

    fn raw_params(&self, id: DeviceId, give_up: &dyn Fn() -> bool) -> Result<ublk_params> {
        let empty = ublk_params { len: size_of::<ublk_params>() as u32, ..Default::default() };
        let call = self.call(&commands::GET_PARAMS, Some(id)).payload(wire::encode_params(&empty));
        let reply = call.unless(give_up).reply()?;
        Ok(wire::decode_params(&reply))
    }

    /// START_DEV: creates `/dev/ublkbN`. Waits until every tag of every queue has been fetched, or `give_up`, which is polled
    /// meanwhile, returns true.
    pub fn start(&self, id: DeviceId, pid: u32, give_up: &dyn Fn() -> bool) -> Result<()> {
        self.call(&commands::START_DEV, Some(id)).data(pid.into()).unless(give_up).run()
    }

    /// STOP_DEV: removes `/dev/ublkbN`. Waits for requests in flight, so their server must keep running.
    pub fn stop(&self, id: DeviceId) -> Result<()> {
        self.stop_within(id, DRAIN_TIMEOUT)
    }

    /// Like [`stop`](Control::stop), with a time limit. After a time-out the device continues to stop: its disk is removed once
    /// the requests have ended. If another command had locked the device all the time, nothing was done.
    pub fn stop_within(&self, id: DeviceId, timeout: Duration) -> Result<()> {
        self.stop_unless(id, timeout, &|| false)
    }

    /// Like [`stop_within`](Control::stop_within), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn stop_unless(&self, id: DeviceId, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<()> {
        self.call(&commands::STOP_DEV, Some(id)).within(timeout).unless(give_up).run()
    }

    /// DEL_DEV: stops the device if necessary, removes `/dev/ublkcN` and waits, at most `timeout`, until its id is free: until
    /// its server has closed `/dev/ublkcN` and all processes have closed `/dev/ublkbN`. After a time-out, the device is
    /// deleted and its id still taken, or the command was not carried out: it waits for other DEL_DEVs of Linux's driver, for
    /// example.
    pub fn delete(&self, id: DeviceId, timeout: Duration) -> Result<()> {
        self.call(&commands::DEL_DEV, Some(id)).within(timeout).run()
    }

    /// Returns a number that a later device with the same id does not have; `None` if there is no such device, or if it cannot
    /// be determined.
    pub fn instance(&self, id: DeviceId) -> Option<u64> {
        self.driver.instance(id).ok().flatten()
    }

    /// Returns whether the device with this id is still the one that [`instance`](Control::instance) was asked about. Where
    /// that is not known, it counts as the same.
    ///
    /// The answer may be wrong a moment later: commands name a device by its id, and only a process that has the char
    /// device open keeps the id from being another device's. Any other process has to ask just before it sends a command,
    /// and what remains is the time between the two, in which the device would have to be deleted *and* another one made.
    pub fn is_instance(&self, id: DeviceId, instance: Option<u64>) -> bool {
        instance.is_none() || self.driver.instance(id).map_or(true, |now| now == instance)
    }

    /// Checks that an id is still that of a device; see [`is_instance`](Control::is_instance).
    pub(crate) fn require_instance(&self, command: &'static str, id: DeviceId, instance: Option<u64>) -> Result<()> {
        if self.is_instance(id, instance) {
            return Ok(());
        }
        Err(Error::Control {
            command,
            device: Some(id),
            errno: Errno::ENODEV,
            hint: "another process has deleted the device meanwhile".into(),
        })
    }

    /// DEL_DEV_ASYNC: as [`delete`](Control::delete) without the wait; the id becomes free later. Since Linux 6.9.
    pub fn delete_async(&self, id: DeviceId) -> Result<()> {
        self.call(&commands::DEL_DEV_ASYNC, Some(id)).run()
    }

    /// TRY_STOP_DEV: as [`stop`](Control::stop), but fails with `EBUSY` if the disk or a partition of it is open. Since
    /// Linux 7.0.
    pub fn try_stop(&self, id: DeviceId) -> Result<()> {
        self.try_stop_unless(id, &|| false)
    }

    /// Like [`try_stop`](Control::try_stop), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn try_stop_unless(&self, id: DeviceId, give_up: &dyn Fn() -> bool) -> Result<()> {
        self.call(&commands::TRY_STOP_DEV, Some(id)).unless(give_up).run()
    }

    /// QUIESCE_DEV: asks the server of a device with [`Features::QUIESCE`] to leave; the device stays, and its requests wait
    /// for the next server. Since Linux 6.16.
    ///
    /// Linux's driver (as of 7.3) does not wait for requests that the server holds, and forgets tags that are fetched again
    /// later: repeat the command until the device's state changes, as [`quiesce_until`](Control::quiesce_until) does.
    pub fn quiesce(&self, id: DeviceId, patience: Duration) -> Result<()> {
        self.quiesce_unless(id, patience, &|| false)
    }

    /// Like [`quiesce`](Control::quiesce), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn quiesce_unless(&self, id: DeviceId, patience: Duration, give_up: &dyn Fn() -> bool) -> Result<()> {
        let millis = patience.as_millis().clamp(1, u32::MAX.into()) as u64;
        let call = self.call(&commands::QUIESCE_DEV, Some(id)).data(millis);
        call.within(patience.saturating_add(COMMAND_TIMEOUT)).unless(give_up).run()
    }

    /// Asks the server to leave until it has left, at most for `timeout`. Returns the device's state after that.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the driver is too old, `EINVAL` if the device was not created for it, [`Error::Timeout`] if
    /// the server does not finish its requests.
    pub fn quiesce_until(&self, id: DeviceId, timeout: Duration) -> Result<DeviceState> {
        self.quiesce_instance(id, self.instance(id), timeout)
    }

    /// Like [`quiesce_until`](Control::quiesce_until), for the device of which [`instance`](Control::instance) has returned
    /// `instance`: a later one with its id is left alone.
    pub(crate) fn quiesce_instance(
        &self,
        id: DeviceId,
        instance: Option<u64>,
        timeout: Duration,
    ) -> Result<DeviceState> {
        let info = self.info(id)?;
        self.require_quiesce(&info)?;
        let deadline = deadline(timeout);
        loop {
            self.require_instance("QUIESCE_DEV", id, instance)?;
            match self.quiesce(id, QUIESCE_SLICE) {
                // The server still has requests.
                Ok(()) | Err(Error::Control { errno: Errno::EBUSY, .. }) => {}
                Err(error) => return Err(error),
            }
            let again = Instant::now() + QUIESCE_SLICE;
            while Instant::now() < again {
                let DeviceInfo { state, pid, .. } = self.info(id)?;
                // The next server is not to be asked.
                if state != DeviceState::Live || pid != info.pid {
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

    /// Checks that a device's server can be asked to leave.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device was not created for it, [`Error::Unsupported`] if the driver is too old.
    pub(crate) fn require_quiesce(&self, info: &DeviceInfo) -> Result<()> {
        if info.features.contains(Features::QUIESCE) {
            return Ok(());
        }
        let refused = |hint: &str| {
            Err(Error::Control {
                command: commands::QUIESCE_DEV.name,
                device: Some(info.id),
                errno: Errno::EINVAL,
                hint: hint.to_owned(),
            })
        };
        if Recovery::from_features(info.features).is_none() {
            return refused("the device was created without recovery (`ublk add --recovery`, `recoverable=True`)");
        }
        self.features()?.require(Features::QUIESCE)?;
        refused(
            "the device was created by a program that does not hand devices over; if its server is killed, \
                 `ublk recover` serves it",
        )
    }

    /// START_USER_RECOVERY: prepares a device whose server has exited for the next one. `EBUSY` while the old server still has
    /// it open. Since Linux 6.1; from 7.3 on it only checks the state.
    pub fn start_recovery(&self, id: DeviceId) -> Result<()> {
        self.call(&commands::START_USER_RECOVERY, Some(id)).run()
    }

    /// END_USER_RECOVERY: hands a device over to the process `pid`. Waits until that has fetched all tags, or `give_up`, which
    /// is polled meanwhile, returns true.
    pub fn end_recovery(&self, id: DeviceId, pid: u32, give_up: &dyn Fn() -> bool) -> Result<()> {
        self.call(&commands::END_USER_RECOVERY, Some(id)).data(pid.into()).unless(give_up).run()
    }

    /// REG_BUF: registers memory that clients share, and returns the index by which requests refer to it. The device needs
    /// [`Features::SHMEM_ZC`]. The pages stay pinned until [`unregister_memory`] or the device's end, even if this process
    /// exits. Since Linux 7.1.
    ///
    /// [`unregister_memory`]: Control::unregister_memory
    pub fn register_memory(&self, id: DeviceId, memory: &SharedMemory) -> Result<u16> {
        self.register_memory_unless(id, memory, &|| false)
    }

    /// Like [`register_memory`](Control::register_memory), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn register_memory_unless(
        &self,
        id: DeviceId,
        memory: &SharedMemory,
        give_up: &dyn Fn() -> bool,
    ) -> Result<u16> {
        let buffer = uapi::ublk_shmem_buf_reg {
            addr: memory.address(),
            len: memory.len(),
            flags: memory.flags(),
            ..Default::default()
        };
        let call = self.call(&commands::REG_BUF, Some(id)).payload(wire::encode_shared(&buffer));
        let (index, _) = call.unless(give_up).result()?;
        u16::try_from(index)
            .map_err(|_| Error::invalid(Parameter::SharedMemory, index, "the driver returned an invalid index"))
    }

    /// UNREG_BUF: ends a registration. Waits for requests whose data is in the memory. Since Linux 7.1.
    pub fn unregister_memory(&self, id: DeviceId, index: u16) -> Result<()> {
        self.unregister_memory_unless(id, index, &|| false)
    }

    /// Like [`unregister_memory`](Control::unregister_memory), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn unregister_memory_unless(&self, id: DeviceId, index: u16, give_up: &dyn Fn() -> bool) -> Result<()> {
        self.call(&commands::UNREG_BUF, Some(id)).data(index.into()).unless(give_up).run()
    }

    /// UPDATE_SIZE: changes a started disk's capacity, in bytes. Since Linux 6.16.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] unless it is a multiple of the logical block size, which Linux's driver does not check.
    pub fn update_size(&self, id: DeviceId, bytes: u64) -> Result<()> {
        self.update_size_unless(id, bytes, &|| false)
    }

    /// Like [`update_size`](Control::update_size), until `give_up`, which is polled meanwhile, returns true.
    pub(crate) fn update_size_unless(&self, id: DeviceId, bytes: u64, give_up: &dyn Fn() -> bool) -> Result<()> {
        let block = Params::decode(&self.raw_params(id, give_up)?).logical_block_size;
        if bytes == 0 || !bytes.is_multiple_of(u64::from(block)) {
            let rule = format!("must be a multiple of the logical block size ({block})");
            return Err(Error::invalid(Parameter::Size, bytes, rule));
        }
        self.call(&commands::UPDATE_SIZE, Some(id)).data(Sectors::from_bytes(bytes).0).unless(give_up).run()
    }

    /// GET_DEV_INFO2: returns what the driver knows about a device. Since Linux 6.3.
    pub fn info(&self, id: DeviceId) -> Result<DeviceInfo> {
        let empty = vec![0; size_of::<ublksrv_ctrl_dev_info>()];
        let reply = self.call(&commands::GET_DEV_INFO2, Some(id)).payload(empty).path().reply()?;
        Ok(decode_info(&wire::decode_info(&reply)))
    }

    /// GET_QUEUE_AFFINITY: returns the CPUs whose requests use a queue.
    pub fn queue_affinity(&self, id: DeviceId, queue: QueueId) -> Result<Vec<usize>> {
        let call = self.call(&commands::GET_QUEUE_AFFINITY, Some(id)).data(queue.0.into());
        let mask = call.payload(vec![0; AFFINITY_BYTES]).reply()?;
        let set = |cpu: &usize| mask[cpu / 8] & (1 << (cpu % 8)) != 0;
        Ok((0..mask.len() * 8).filter(set).collect())
    }

    /// Prepares a command.
    fn call(&self, command: &'static Command, id: Option<DeviceId>) -> Call<'_> {
        Call::new(self, command, id)
    }
}

/// Describes what happens after a server has not left in time. The driver has taken the server's tags away by then and cannot
/// return them: the request to leave stays in force.
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
        backing: BackingIdentity::decode(raw.ublksrv_flags),
    }
}
