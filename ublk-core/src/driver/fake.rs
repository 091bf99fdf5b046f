// SPDX-License-Identifier: MIT OR Apache-2.0

//! A stand-in for the driver, in this process and without privileges.
//!
//! It keeps the rules that a server can break (who may fetch and commit which tag, and when), answers
//! control commands from the same states, and plays the block layer's part: [`FakeDisk`] sends
//! requests and waits for their end. What it does not have is everything around that: no nodes, no
//! page cache, no partition scan.
//!
//! Invariant of the `unsafe` blocks: the address that a server passes with FETCH_REQ or
//! COMMIT_AND_FETCH_REQ points to a buffer of the device's `max_io_buf_bytes`, which the server leaves
//! alone until the command completes. That is the driver's own contract.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{
    CharDevice, Completion, ControlCommand, ControlFailure, Driver, Elements, FileSlot, MappedDescriptors, Memory,
    Operation, RequestPlace, Ring, Submission, Waker,
};
use crate::control::{MAX_DEPTH, wire};
use crate::memory::{Descriptor, DescriptorMap, IoBuffer, Region};
use crate::uapi::{self, Features, ublk_params, ublksrv_ctrl_dev_info};
use crate::units::{DeviceId, QueueId, Sectors, Tag};

/// How long a disk's client waits for a request to end.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);

/// The driver.
#[derive(Clone, Debug, Default)]
pub struct FakeDriver {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    devices: BTreeMap<u32, FakeDevice>,
    /// Rules that a server broke.
    violations: Vec<String>,
    /// Answers that clients have not looked at, by their request's ticket.
    answers: HashMap<u64, Result<Vec<u8>, Errno>>,
    tickets: u64,
    /// Rings may call themselves quiet: no client is at work.
    quiet: bool,
    /// How long files take for an operation.
    file_delay: Duration,
    /// What the driver says it can do; everything unless a test wants less.
    offered: Option<Features>,
    /// Whether callers lack CAP_SYS_ADMIN.
    unprivileged: bool,
    /// Errnos to answer the next commands of a name with.
    refusals: HashMap<&'static str, VecDeque<Errno>>,
}

#[derive(Debug)]
struct FakeDevice {
    info: ublksrv_ctrl_dev_info,
    params: Option<ublk_params>,
    queues: Vec<FakeQueue>,
    char_open: bool,
    /// QUIESCE_DEV was sent: tags go back to the server, until the next one comes.
    canceling: bool,
    /// Requests that the dead server held and the next one gets.
    held: Vec<(Descriptor, FakeRequest)>,
}

#[derive(Debug)]
struct FakeQueue {
    descriptors: Arc<Region>,
    tags: Vec<FakeTag>,
    /// Where FETCH_IO_CMDS delivers tags: the ring, and the command's `user_data`.
    delivery: Option<(Arc<Completions>, u64)>,
}

/// Who fetched a tag, and where the answer goes.
#[derive(Clone, Debug)]
struct Command {
    ring: Arc<Completions>,
    user_data: u64,
    address: u64,
    /// Where pages are to be registered.
    register: Option<u16>,
    /// Who may commit; anybody for a batch.
    daemon: Option<ThreadId>,
}

/// A request on its way through the server.
#[derive(Clone, Debug)]
struct FakeRequest {
    daemon: Option<ThreadId>,
    /// A read's length, 0 for others.
    len: usize,
    /// Its pages.
    pages: Vec<u8>,
    ticket: u64,
}

#[derive(Clone, Debug)]
enum FakeTag {
    Idle,
    Armed(Command),
    /// The server was asked where a write's data shall go.
    Asked(FakeRequest),
    /// The server has the request.
    Served(FakeRequest),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `check` gives something.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
        mut check: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ControlFailure> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            if let Some(value) = check(&mut state) {
                return Ok(value);
            }
            if give_up() {
                return Err(ControlFailure::GaveUp);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ControlFailure::Timeout);
            }
            let slice = left.min(Duration::from_millis(10));
            state = self.changed.wait_timeout(state, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl FakeDriver {
    /// A driver without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk of a device, as a client of the block layer sees it.
    pub fn disk(&self, id: DeviceId) -> FakeDisk {
        FakeDisk { shared: self.shared.clone(), id: id.0 }
    }

    /// Answers the next command of this name with an errno: a control command's name in the UAPI, or
    /// `FETCH_REQ` or `PREP_IO_CMDS`, or `COMMIT_AND_FETCH_REQ` for any commit.
    pub fn refuse_next(&self, command: &'static str, errno: Errno) {
        self.shared.state().refusals.entry(command).or_default().push_back(errno);
    }

    /// Makes the driver an older one, which has only these features.
    pub fn offer(&self, features: Features) {
        self.shared.state().offered = Some(features | ALWAYS_ON);
    }

    /// Takes whoever calls for a user without CAP_SYS_ADMIN, from now on.
    pub fn drop_privileges(&self) {
        self.shared.state().unprivileged = true;
    }

    /// Makes files slow.
    pub fn delay_files(&self, delay: Duration) {
        self.shared.state().file_delay = delay;
    }

    /// Lets servers give memory back while rings are idle. Until then no client may send anything: it would
    /// not be the thread of the ring, as the driver is.
    pub fn let_memory_go(&self, quiet: bool) {
        self.shared.state().quiet = quiet;
    }

    /// The rules that servers have broken so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.state().violations.clone()
    }

    fn execute(
        &self,
        command: &mut ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<i32, ControlFailure> {
        let refuse = |errno| Err(ControlFailure::Refused(errno));
        if let Some(errno) = self.shared.state().refusals.get_mut(command.name).and_then(VecDeque::pop_front) {
            return refuse(errno);
        }
        if command.op == uapi::UBLK_U_CMD_GET_FEATURES {
            let features = self.shared.state().features();
            command.payload.copy_from_slice(&features.bits().to_ne_bytes());
            return Ok(0);
        }
        if command.op == uapi::UBLK_U_CMD_ADD_DEV {
            return self.shared.state().add(&mut command.payload).or_else(refuse);
        }
        let id = command.dev_id;
        if !self.shared.state().devices.contains_key(&id) {
            return refuse(Errno::ENODEV);
        }
        if command.op != uapi::UBLK_U_CMD_GET_DEV_INFO2 {
            let (device, caller) = {
                let state = self.shared.state();
                let flags = state.devices.get(&id).map(|device| device.info.flags).unwrap_or_default();
                (flags & Features::UNPRIVILEGED_DEV.bits() != 0, state.unprivileged)
            };
            if device {
                // By its path, whoever it is.
                let path = format!("/dev/ublkc{id}\0").into_bytes();
                if command.path_len as usize != path.len() || !command.payload.starts_with(&path) {
                    return refuse(Errno::EINVAL);
                }
                command.payload.drain(..path.len());
                command.path_len = 0;
                let result = self.execute_permitted(command, timeout, give_up);
                command.payload.splice(..0, path);
                return result;
            }
            if caller {
                return refuse(Errno::EPERM);
            }
        }
        self.execute_permitted(command, timeout, give_up)
    }

    /// A command on a device that the caller may send.
    fn execute_permitted(
        &self,
        command: &mut ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<i32, ControlFailure> {
        let refuse = |errno| Err(ControlFailure::Refused(errno));
        let gone = ControlFailure::Refused(Errno::ENODEV);
        let id = command.dev_id;
        match command.op {
            uapi::UBLK_U_CMD_SET_PARAMS => {
                let mut state = self.shared.state();
                let device = state.devices.get_mut(&id).ok_or(gone)?;
                if device.info.state != uapi::UBLK_S_DEV_DEAD {
                    return refuse(Errno::EACCES);
                }
                device.params = Some(wire::decode_params(&command.payload));
                Ok(0)
            }
            uapi::UBLK_U_CMD_GET_PARAMS => {
                let state = self.shared.state();
                let params = state.devices.get(&id).ok_or(gone)?.params.unwrap_or_default();
                command.payload = wire::encode_params(&params);
                Ok(0)
            }
            uapi::UBLK_U_CMD_GET_DEV_INFO2 => {
                let state = self.shared.state();
                let info = state.devices.get(&id).ok_or(gone)?.info;
                command.payload.truncate(usize::from(command.path_len));
                command.payload.extend(wire::encode_info(&info));
                Ok(0)
            }
            uapi::UBLK_U_CMD_GET_QUEUE_AFFINITY => {
                command.payload.fill(0);
                command.payload[0] = 1;
                Ok(0)
            }
            uapi::UBLK_U_CMD_START_DEV => {
                let pid = command.data as i32;
                self.shared.wait_for(timeout, give_up, |state| match state.devices.get_mut(&id) {
                    None => Some(Err(ControlFailure::Refused(Errno::ENODEV))),
                    Some(device) => device.start(pid).map(|r| r.map_err(ControlFailure::Refused)),
                })?
            }
            uapi::UBLK_U_CMD_STOP_DEV | uapi::UBLK_U_CMD_TRY_STOP_DEV => self.stop(id, timeout, give_up),
            uapi::UBLK_U_CMD_QUIESCE_DEV => {
                let mut state = self.shared.state();
                let device = state.devices.get_mut(&id).ok_or(gone)?;
                if device.info.flags & Features::QUIESCE.bits() == 0 {
                    return refuse(Errno::EOPNOTSUPP);
                }
                if device.info.state == uapi::UBLK_S_DEV_LIVE {
                    device.canceling = true;
                    device.cancel();
                }
                drop(state);
                self.shared.changed.notify_all();
                Ok(0)
            }
            uapi::UBLK_U_CMD_UPDATE_SIZE => {
                let mut state = self.shared.state();
                let device = state.devices.get_mut(&id).ok_or(gone)?;
                match &mut device.params {
                    Some(params) if device.info.state == uapi::UBLK_S_DEV_LIVE => {
                        params.basic.dev_sectors = command.data;
                        Ok(0)
                    }
                    _ => refuse(Errno::ENODEV),
                }
            }
            uapi::UBLK_U_CMD_START_USER_RECOVERY => {
                let state = self.shared.state();
                let device = state.devices.get(&id).ok_or(gone)?;
                if device.info.flags & Features::USER_RECOVERY.bits() == 0 {
                    refuse(Errno::EINVAL)
                } else if device.char_open || !device.waits_for_server() {
                    refuse(Errno::EBUSY)
                } else {
                    Ok(0)
                }
            }
            uapi::UBLK_U_CMD_END_USER_RECOVERY => {
                let pid = command.data as i32;
                self.shared.wait_for(timeout, give_up, |state| match state.devices.get_mut(&id) {
                    None => Some(Err(ControlFailure::Refused(Errno::ENODEV))),
                    Some(device) if !device.waits_for_server() => Some(Err(ControlFailure::Refused(Errno::EBUSY))),
                    Some(device) => device.is_fetched().then(|| {
                        device.info.state = uapi::UBLK_S_DEV_LIVE;
                        device.info.ublksrv_pid = pid;
                        Ok(0)
                    }),
                })?
            }
            uapi::UBLK_U_CMD_DEL_DEV | uapi::UBLK_U_CMD_DEL_DEV_ASYNC => {
                self.stop(id, timeout, give_up)?;
                self.shared.wait_for(timeout, give_up, |state| {
                    let open = state.devices.get(&id).is_some_and(|d| d.char_open);
                    (!open).then(|| state.devices.remove(&id)).map(|_| 0)
                })
            }
            _ => refuse(Errno::EOPNOTSUPP),
        }
    }

    /// Waits for requests in flight, then takes the tags back.
    fn stop(&self, id: u32, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<i32, ControlFailure> {
        self.shared.wait_for(timeout, give_up, |state| {
            let Some(device) = state.devices.get_mut(&id) else { return Some(0) };
            device.info.state = uapi::UBLK_S_DEV_DEAD;
            if device.queues.iter().flat_map(|q| &q.tags).any(|t| matches!(t, FakeTag::Served(_) | FakeTag::Asked(_))) {
                return None;
            }
            device.cancel();
            Some(0)
        })?;
        self.shared.changed.notify_all();
        Ok(0)
    }
}

impl Driver for FakeDriver {
    fn control(
        &self,
        mut command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>), ControlFailure> {
        let result = self.execute(&mut command, timeout, give_up)?;
        Ok((result, command.payload))
    }

    fn open_char(&self, id: DeviceId) -> io::Result<Arc<dyn CharDevice>> {
        let mut state = self.shared.state();
        let device = state.devices.get_mut(&id.0).ok_or(Errno::ENXIO)?;
        if std::mem::replace(&mut device.char_open, true) {
            return Err(Errno::EBUSY.into());
        }
        Ok(Arc::new(FakeChar { shared: self.shared.clone(), id: id.0 }))
    }

    fn new_ring(&self) -> io::Result<Box<dyn Ring>> {
        Ok(Box::new(FakeRing {
            shared: self.shared.clone(),
            completions: Arc::default(),
            files: Vec::new(),
            queued: Vec::new(),
            buffers: 0,
        }))
    }

    fn block_path(&self, id: DeviceId) -> PathBuf {
        format!("/nonexistent/ublkb{id}").into()
    }

    fn block_node_exists(&self, id: DeviceId) -> bool {
        self.shared.state().devices.get(&id.0).is_some_and(|d| d.info.state == uapi::UBLK_S_DEV_LIVE)
    }

    fn device_ids(&self) -> io::Result<Vec<DeviceId>> {
        Ok(self.shared.state().devices.keys().copied().map(DeviceId).collect())
    }
}

/// What every device has.
const ALWAYS_ON: Features = Features::CMD_IOCTL_ENCODE.union(Features::URING_CMD_COMP_IN_TASK);
/// What keeps the driver from copying.
const NOT_COPIED: Features = Features::USER_COPY.union(Features::SUPPORT_ZERO_COPY).union(Features::AUTO_BUF_REG);

impl State {
    /// What the driver offers.
    fn features(&self) -> Features {
        self.offered.unwrap_or(Features::all())
    }

    /// The pages of a request that the server owns.
    fn pages(&mut self, id: u32, queue: QueueId, tag: Tag) -> Result<&mut Vec<u8>, Errno> {
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        match queue.tags.get_mut(tag.index()) {
            Some(FakeTag::Served(request)) => Ok(&mut request.pages),
            _ => Err(Errno::EINVAL),
        }
    }

    /// NEED_GET_DATA: the data goes to the address.
    fn get_data(&mut self, id: u32, queue: QueueId, tag: Tag, address: u64) -> Result<(), Errno> {
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        let slot = queue.tags.get_mut(tag.index()).ok_or(Errno::EINVAL)?;
        let FakeTag::Asked(request) = slot else {
            self.violations.push(format!("NEED_GET_DATA of tag {tag}, which was not asked for"));
            return Err(Errno::EINVAL);
        };
        let request = request.clone();
        // SAFETY: the contract on top of this file.
        unsafe { std::ptr::copy_nonoverlapping(request.pages.as_ptr(), address as *mut u8, request.pages.len()) };
        *slot = FakeTag::Served(request);
        Ok(())
    }

    fn add(&mut self, payload: &mut Vec<u8>) -> Result<i32, Errno> {
        let mut info = wire::decode_info(payload);
        let depth = info.queue_depth;
        if depth == 0 || depth > MAX_DEPTH || info.nr_hw_queues == 0 {
            return Err(Errno::EINVAL);
        }
        let flags = Features::from_bits_retain(info.flags);
        if !self.unprivileged {
            info.flags &= !Features::UNPRIVILEGED_DEV.bits();
        } else if !flags.contains(Features::UNPRIVILEGED_DEV) {
            return Err(Errno::EPERM);
        } else if flags.intersects(NOT_COPIED) {
            return Err(Errno::EINVAL);
        } else {
            info.flags &= !(Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE).bits();
        }
        if info.dev_id == u32::MAX {
            info.dev_id = (0..).find(|id| !self.devices.contains_key(id)).ok_or(Errno::ENOSPC)?;
        } else if self.devices.contains_key(&info.dev_id) {
            return Err(Errno::EEXIST);
        }
        info.nr_hw_queues = info.nr_hw_queues.min(64);
        info.state = uapi::UBLK_S_DEV_DEAD;
        info.ublksrv_pid = -1;
        info.flags |= (ALWAYS_ON | Features::SAFE_STOP_DEV).bits();
        info.flags &= self.features().bits();
        let queue = || {
            let descriptors = Arc::new(Region::anonymous(DescriptorMap::len_for(depth)).map_err(|_| Errno::ENOMEM)?);
            Ok(FakeQueue { descriptors, tags: vec![FakeTag::Idle; usize::from(depth)], delivery: None })
        };
        let queues = (0..info.nr_hw_queues).map(|_| queue()).collect::<Result<_, Errno>>()?;
        self.devices.insert(
            info.dev_id,
            FakeDevice { info, params: None, queues, char_open: false, canceling: false, held: vec![] },
        );
        *payload = wire::encode_info(&info);
        Ok(0)
    }

    /// FETCH_REQ and COMMIT_AND_FETCH_REQ; an error completes the command at once.
    fn io_command(
        &mut self,
        id: u32,
        queue: QueueId,
        tag: Tag,
        command: Command,
        commit: Option<i32>,
    ) -> Result<(), Errno> {
        let name = if commit.is_some() { "COMMIT_AND_FETCH_REQ" } else { "FETCH_REQ" };
        if let Some(errno) = self.refusals.get_mut(name).and_then(VecDeque::pop_front) {
            return Err(errno);
        }
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let slot = device
            .queues
            .get_mut(usize::from(queue.0))
            .and_then(|q| q.tags.get_mut(tag.index()))
            .ok_or(Errno::EINVAL)?;
        let flags = Features::from_bits_retain(device.info.flags);
        let broken = match (&*slot, commit) {
            (FakeTag::Idle, None) => {
                *slot = FakeTag::Armed(command);
                return Ok(());
            }
            (FakeTag::Served(request), Some(_)) if request.daemon.is_some() && request.daemon != command.daemon => {
                (Errno::EINVAL, "from a thread that did not fetch the tag")
            }
            (FakeTag::Served(request), Some(result)) => {
                let canceling = device.canceling;
                let answer = usize::try_from(result).map_err(|_| Errno::from_raw(-result)).map(|read| {
                    let read = read.min(request.len);
                    if read == 0 || flags.intersects(NOT_COPIED) {
                        return request.pages[..read].to_vec();
                    }
                    // SAFETY: the contract on top of this file: the command's address holds the data.
                    unsafe { std::slice::from_raw_parts(command.address as *const u8, read) }.to_vec()
                });
                self.answers.insert(request.ticket, answer);
                if canceling {
                    *slot = FakeTag::Idle;
                    return if command.daemon.is_some() { Err(Errno::ENODEV) } else { Ok(()) };
                }
                *slot = FakeTag::Armed(command);
                return Ok(());
            }
            (FakeTag::Armed(_) | FakeTag::Asked(_), Some(_)) => (Errno::EBUSY, "of a tag that is not at the server"),
            (FakeTag::Idle, Some(_)) => (Errno::EINVAL, "of a tag that was never fetched"),
            (_, None) => (Errno::EINVAL, "of a tag that is fetched already"),
        };
        self.violations.push(format!("{name} {} (queue {queue}, tag {tag})", broken.1));
        Err(broken.0)
    }
}

impl FakeDevice {
    /// START_DEV, once every tag is fetched.
    fn start(&mut self, pid: i32) -> Option<Result<i32, Errno>> {
        if pid <= 0 || self.params.is_none_or(|p| p.types & uapi::UBLK_PARAM_TYPE_BASIC == 0) {
            return Some(Err(Errno::EINVAL));
        }
        if self.info.state == uapi::UBLK_S_DEV_LIVE {
            return Some(Err(Errno::EEXIST));
        }
        self.is_fetched().then(|| {
            self.info.state = uapi::UBLK_S_DEV_LIVE;
            self.info.ublksrv_pid = pid;
            Ok(0)
        })
    }

    /// Gives a request to the server by a tag that waits for one, if there is one.
    fn deliver(&mut self, id: u32, queue: usize, mut descriptor: Descriptor, request: FakeRequest) -> Option<()> {
        let flags = Features::from_bits_retain(self.info.flags);
        let FakeQueue { descriptors, tags, delivery } = &mut self.queues[queue];
        if flags.contains(Features::BATCH_IO) && delivery.is_none() {
            return None;
        }
        let tag = Tag(tags.iter().position(|t| matches!(t, FakeTag::Armed(_)))? as u16);
        let FakeTag::Armed(command) = tags[tag.index()].clone() else { unreachable!("found above") };
        let request = FakeRequest { daemon: command.daemon, ..request };
        let carries = !request.pages.is_empty() && request.len == 0;
        let asks = flags.contains(Features::NEED_GET_DATA) && carries;
        if carries && !asks && !flags.intersects(NOT_COPIED) {
            let pages = &request.pages;
            // SAFETY: the contract on top of this file: the buffer is ours while the command waits.
            unsafe { std::ptr::copy_nonoverlapping(pages.as_ptr(), command.address as *mut u8, pages.len()) };
        }
        if flags.contains(Features::AUTO_BUF_REG)
            && !request.pages.is_empty()
            && let Some(index) = command.register
        {
            command.ring.state().registered.insert(index, (id, QueueId(queue as u16), tag));
        }
        descriptor.address = command.address;
        descriptors.write_descriptor(tag, descriptor);
        tags[tag.index()] = if asks { FakeTag::Asked(request) } else { FakeTag::Served(request) };
        match delivery {
            Some((ring, user_data)) if flags.contains(Features::BATCH_IO) => ring.deliver(*user_data, tag),
            _ if asks => command.ring.push(command.user_data, uapi::UBLK_IO_RES_NEED_GET_DATA),
            _ => command.ring.push(command.user_data, uapi::UBLK_IO_RES_OK),
        }
        Some(())
    }

    /// Whether no tag is missing.
    fn is_fetched(&self) -> bool {
        self.queues.iter().flat_map(|q| &q.tags).all(|t| !matches!(t, FakeTag::Idle))
    }

    fn waits_for_server(&self) -> bool {
        [uapi::UBLK_S_DEV_QUIESCED, uapi::UBLK_S_DEV_FAIL_IO].contains(&self.info.state)
    }

    /// Ends all commands that wait for a request.
    fn cancel(&mut self) {
        let batch = self.info.flags & Features::BATCH_IO.bits() != 0;
        for queue in &mut self.queues {
            for tag in &mut queue.tags {
                if let FakeTag::Armed(command) = tag {
                    if !batch {
                        command.ring.push(command.user_data, uapi::UBLK_IO_RES_ABORT);
                    }
                    *tag = FakeTag::Idle;
                }
            }
            if let Some((ring, user_data)) = queue.delivery.take() {
                ring.push(user_data, uapi::UBLK_IO_RES_ABORT);
            }
        }
    }
}

#[derive(Debug)]
struct FakeChar {
    shared: Arc<Shared>,
    id: u32,
}

impl CharDevice for FakeChar {
    fn map_descriptors(&self, queue: QueueId, depth: u16) -> io::Result<MappedDescriptors> {
        let state = self.shared.state();
        let device = state.devices.get(&self.id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        Ok(MappedDescriptors(DescriptorMap::shared(queue.descriptors.clone(), depth)))
    }

    fn raw_fd(&self) -> RawFd {
        self.id as RawFd
    }

    fn copy_from_request(&self, place: RequestPlace, into: &mut [u8]) -> io::Result<()> {
        let mut state = self.shared.state();
        let pages = state.pages(self.id, place.queue, place.tag)?;
        let from = pages.get(place.offset as usize..).and_then(|p| p.get(..into.len())).ok_or(Errno::EINVAL)?;
        into.copy_from_slice(from);
        Ok(())
    }

    fn copy_to_request(&self, place: RequestPlace, from: &[u8]) -> io::Result<()> {
        let mut state = self.shared.state();
        let pages = state.pages(self.id, place.queue, place.tag)?;
        let into = pages.get_mut(place.offset as usize..).and_then(|p| p.get_mut(..from.len())).ok_or(Errno::EINVAL)?;
        into.copy_from_slice(from);
        Ok(())
    }
}

/// The server is gone: without recovery, the disk goes too, and what it had fails.
impl Drop for FakeChar {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(device) = state.devices.get_mut(&self.id) {
            let flags = Features::from_bits_retain(device.info.flags);
            device.char_open = false;
            device.canceling = false;
            device.info.ublksrv_pid = -1;
            device.info.state = match device.info.state {
                uapi::UBLK_S_DEV_LIVE if flags.contains(Features::USER_RECOVERY_FAIL_IO) => uapi::UBLK_S_DEV_FAIL_IO,
                uapi::UBLK_S_DEV_LIVE if flags.contains(Features::USER_RECOVERY) => uapi::UBLK_S_DEV_QUIESCED,
                waiting if device.waits_for_server() => waiting,
                _ => uapi::UBLK_S_DEV_DEAD,
            };
            let mut ended = Vec::new();
            for queue in &mut device.queues {
                queue.delivery = None;
                for (number, tag) in queue.tags.iter_mut().enumerate() {
                    match std::mem::replace(tag, FakeTag::Idle) {
                        FakeTag::Served(request) | FakeTag::Asked(request)
                            if flags.contains(Features::USER_RECOVERY_REISSUE) =>
                        {
                            let descriptor = DescriptorMap::shared(queue.descriptors.clone(), device.info.queue_depth)
                                .read(Tag(number as u16));
                            device.held.push((descriptor, request));
                        }
                        FakeTag::Served(request) | FakeTag::Asked(request) => ended.push(request.ticket),
                        FakeTag::Idle | FakeTag::Armed(_) => {}
                    }
                }
            }
            state.answers.extend(ended.into_iter().map(|ticket| (ticket, Err(Errno::EIO))));
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

/// What a ring's thread waits for.
#[derive(Debug, Default)]
struct Completions {
    state: Mutex<CompletionState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct CompletionState {
    list: Vec<Completion>,
    woken: bool,
    /// When the timer ends.
    timer: Option<Instant>,
    /// Tags that completions of FETCH_IO_CMDS brought, by the number of their buffer.
    tags: HashMap<u16, Tag>,
    buffers: u16,
    /// Whose pages are registered where: device, queue, tag.
    registered: HashMap<u16, (u32, QueueId, Tag)>,
}

impl Completions {
    fn state(&self) -> MutexGuard<'_, CompletionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, user_data: u64, result: i32) {
        self.state().list.push(Completion::last(user_data, result));
        self.changed.notify_all();
    }

    /// Delivers a tag of a batch.
    fn deliver(&self, user_data: u64, tag: Tag) {
        let mut state = self.state();
        state.buffers = state.buffers.wrapping_add(1);
        let buffer = state.buffers;
        state.tags.insert(buffer, tag);
        let bytes = size_of::<u16>() as i32;
        state.list.push(Completion { user_data, result: bytes, tags: Some(buffer), more: true });
        drop(state);
        self.changed.notify_all();
    }
}

impl Waker for Completions {
    fn wake(&self) {
        self.state().woken = true;
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct FakeRing {
    shared: Arc<Shared>,
    completions: Arc<Completions>,
    files: Vec<Option<Arc<dyn CharDevice>>>,
    queued: Vec<Submission>,
    /// Places given out in the table of buffers.
    buffers: u16,
}

impl FakeRing {
    /// The device behind a place in the ring's table of files.
    fn device(&self, file: FileSlot) -> u32 {
        self.files[file.0 as usize].as_ref().map_or(-1, |f| f.raw_fd()) as u32
    }

    /// A command of one tag, made here and now.
    fn command(&self, user_data: u64, address: u64, register: Option<u16>) -> Command {
        let daemon = Some(std::thread::current().id());
        Command { ring: self.completions.clone(), user_data, address, register, daemon }
    }

    /// Carries an operation out. What it gives is a completion's result; commands that stay pending give none.
    fn carry_out(&self, user_data: u64, operation: Operation) -> Result<Option<i32>, Errno> {
        let mut state = self.shared.state();
        match operation {
            Operation::Fetch { file, queue, tag, address, register } => {
                let command = self.command(user_data, address, register);
                state.io_command(self.device(file), queue, tag, command, None)?;
                Ok(None)
            }
            Operation::Commit { file, queue, tag, result, address, register } => {
                let command = self.command(user_data, address, register);
                state.io_command(self.device(file), queue, tag, command, Some(result))?;
                Ok(None)
            }
            Operation::GetData { file, queue, tag, address } => {
                state.get_data(self.device(file), queue, tag, address)?;
                Ok(Some(0))
            }
            Operation::Register { file, queue, tag, index } => {
                let id = self.device(file);
                state.pages(id, queue, tag)?;
                self.completions.state().registered.insert(index, (id, queue, tag));
                Ok(Some(0))
            }
            Operation::Unregister { index, .. } => {
                let gone = self.completions.state().registered.remove(&index);
                gone.map(|_| Some(0)).ok_or(Errno::EINVAL)
            }
            Operation::Prepare { file, queue, elements } => {
                if let Some(errno) = state.refusals.get_mut("PREP_IO_CMDS").and_then(VecDeque::pop_front) {
                    return Err(errno);
                }
                for element in self.elements(elements) {
                    let command = Command { daemon: None, ..self.command(user_data, element.tail, element.register) };
                    state.io_command(self.device(file), queue, element.tag, command, None)?;
                }
                Ok(Some(0))
            }
            Operation::CommitBatch { file, queue, elements } => {
                let mut done = 0;
                for element in self.elements(elements) {
                    let command = Command { daemon: None, ..self.command(user_data, element.tail, element.register) };
                    match state.io_command(self.device(file), queue, element.tag, command, Some(element.result)) {
                        Ok(()) => done += i32::from(elements.stride),
                        Err(errno) if done == 0 => return Err(errno),
                        Err(_) => break,
                    }
                }
                Ok(Some(done))
            }
            Operation::FetchBatch { file, queue } => {
                let device = state.devices.get_mut(&self.device(file)).ok_or(Errno::ENODEV)?;
                let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
                // A stop that came before the command has taken the tags back.
                if queue.tags.iter().all(|tag| matches!(tag, FakeTag::Idle)) {
                    return Err(Errno::ENODEV);
                }
                queue.delivery = Some((self.completions.clone(), user_data));
                Ok(None)
            }
            Operation::Read { fd, memory: Memory::Registered { index, offset }, len, offset: at } => {
                // Aligned, for direct I/O.
                let memory = IoBuffer::new(len as usize).map_err(|_| Errno::ENOMEM)?;
                let read =
                    file_operation(Operation::Read { fd, memory: Memory::At(memory.user_address()), len, offset: at });
                let (id, queue, tag) = self.registered(index)?;
                let count = usize::try_from(read).unwrap_or(0);
                // SAFETY: the buffer is this function's own.
                let bytes = unsafe { memory.bytes(count) };
                state.pages(id, queue, tag)?[offset as usize..][..count].copy_from_slice(bytes);
                Ok(Some(read))
            }
            Operation::Write { fd, memory: Memory::Registered { index, offset }, len, offset: at, durable } => {
                let (id, queue, tag) = self.registered(index)?;
                let buffer = IoBuffer::new(len as usize).map_err(|_| Errno::ENOMEM)?;
                let bytes = &state.pages(id, queue, tag)?[offset as usize..][..len as usize];
                // SAFETY: as above.
                unsafe { buffer.bytes_mut(len as usize) }.copy_from_slice(bytes);
                let memory = Memory::At(buffer.user_address());
                Ok(Some(file_operation(Operation::Write { fd, memory, len, offset: at, durable })))
            }
            other => {
                let delay = state.file_delay;
                drop(state);
                std::thread::sleep(delay);
                Ok(Some(file_operation(other)))
            }
        }
    }

    fn registered(&self, index: u16) -> Result<(u32, QueueId, Tag), Errno> {
        self.completions.state().registered.get(&index).copied().ok_or(Errno::EFAULT)
    }

    fn elements(&self, elements: Elements) -> Vec<FakeElement> {
        let stride = usize::from(elements.stride);
        // SAFETY: an array of elements is its sender's until the command has completed (see `Submission`).
        let bytes =
            unsafe { std::slice::from_raw_parts(elements.address as *const u8, stride * usize::from(elements.count)) };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let element = |bytes: &[u8]| FakeElement {
            tag: Tag(number(&bytes[..2]) as u16),
            register: Some(number(&bytes[2..4]) as u16),
            result: number(&bytes[4..8]) as i32,
            tail: number(&bytes[8..]),
        };
        bytes.chunks(stride).map(element).collect()
    }
}

/// One element of a batch.
struct FakeElement {
    tag: Tag,
    register: Option<u16>,
    result: i32,
    tail: u64,
}

impl Ring for FakeRing {
    fn add_file(&mut self, file: &Arc<dyn CharDevice>) -> io::Result<FileSlot> {
        let slot = self.files.iter().position(Option::is_none).unwrap_or_else(|| {
            self.files.push(None);
            self.files.len() - 1
        });
        self.files[slot] = Some(file.clone());
        Ok(FileSlot(slot as u32))
    }

    fn remove_file(&mut self, slot: FileSlot) -> io::Result<()> {
        self.files[slot.0 as usize] = None;
        Ok(())
    }

    fn push(&mut self, submission: Submission) -> io::Result<()> {
        self.queued.push(submission);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        for Submission { user_data, operation } in std::mem::take(&mut self.queued) {
            match self.carry_out(user_data, operation) {
                Ok(None) => {}
                Ok(Some(result)) => self.completions.push(user_data, result),
                Err(errno) => self.completions.push(user_data, -(errno as i32)),
            }
        }
        self.shared.changed.notify_all();
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        let mut state = self.completions.state();
        while state.list.is_empty() && !state.woken {
            let left = state.timer.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let left = left.unwrap_or(CLIENT_TIMEOUT);
            state = self.completions.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.woken = false;
        Ok(())
    }

    fn take_completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        into.append(&mut self.completions.state().list);
        Ok(())
    }

    fn start_timer(&mut self, after: Duration) -> io::Result<()> {
        self.completions.state().timer = Some(Instant::now() + after);
        Ok(())
    }

    fn timer_ended(&mut self) -> bool {
        self.completions.state().timer.take_if(|end| *end <= Instant::now()).is_some()
    }

    /// The clients' threads play the driver, but they copy at once what they find.
    fn is_quiet(&mut self) -> bool {
        self.queued.is_empty() && self.completions.state().list.is_empty() && self.shared.state().quiet
    }

    fn reserve_buffers(&mut self, count: u16) -> io::Result<u16> {
        let first = self.buffers;
        self.buffers = first.checked_add(count).ok_or(Errno::ENOSPC)?;
        Ok(first)
    }

    fn release_buffers(&mut self, _: u16, _: u16) {}

    fn take_tags(&mut self, buffer: u16, _: usize, into: &mut Vec<Tag>) {
        into.extend(self.completions.state().tags.remove(&buffer));
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.completions.clone()
    }
}

/// Carries a file operation out at once.
fn file_operation(operation: Operation) -> i32 {
    // SAFETY: plain system calls; memory is that of the submission, which its sender keeps valid until
    // the completion (see `Submission`).
    let result = unsafe {
        match operation {
            Operation::Read { fd, memory: Memory::At(address), len, offset } => {
                libc::pread(fd, address as *mut libc::c_void, len as usize, offset as i64)
            }
            Operation::Write { fd, memory: Memory::At(address), len, offset, .. } => {
                libc::pwrite(fd, address as *const libc::c_void, len as usize, offset as i64)
            }
            Operation::SyncData { fd } => libc::fdatasync(fd) as isize,
            Operation::Allocate { fd, mode, offset, len } => {
                libc::fallocate(fd, mode, offset as i64, len as i64) as isize
            }
            _ => unreachable!("handled by the ring"),
        }
    };
    if result < 0 { -(Errno::last_raw()) } else { result as i32 }
}

/// A client of a device's disk. Each call is one request and waits for its end.
#[derive(Clone, Debug)]
pub struct FakeDisk {
    shared: Arc<Shared>,
    id: u32,
}

/// A request that was sent and not yet waited for.
#[derive(Debug)]
#[must_use]
pub struct Sent(u64);

impl FakeDisk {
    /// Reads `len` bytes.
    ///
    /// # Errors
    ///
    /// The errno that the server failed the request with; `ENODEV` without a live device, `ETIMEDOUT`
    /// if it does not answer. The same holds for all calls here.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_READ.into(), offset, len, &[])?;
        self.wait(sent)
    }

    /// Writes.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_WRITE.into(), offset, data.len(), data)?;
        self.wait(sent).map(drop)
    }

    /// Writes with forced unit access.
    pub fn write_durably(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let op = u32::from(uapi::UBLK_IO_OP_WRITE) | uapi::UBLK_IO_F_FUA;
        let sent = self.send(op, offset, data.len(), data)?;
        self.wait(sent).map(drop)
    }

    /// Flushes.
    pub fn flush(&self) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_FLUSH.into(), 0, 0, &[])?;
        self.wait(sent).map(drop)
    }

    /// Discards.
    pub fn discard(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_DISCARD.into(), offset, len, &[])?;
        self.wait(sent).map(drop)
    }

    /// Zeroes.
    pub fn write_zeroes(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_WRITE_ZEROES.into(), offset, len, &[])?;
        self.wait(sent).map(drop)
    }

    /// The most bytes that one read or write takes.
    pub fn max_io_bytes(&self) -> Result<usize, Errno> {
        self.shared.state().devices.get(&self.id).map(|d| d.info.max_io_buf_bytes as usize).ok_or(Errno::ENODEV)
    }

    /// Sends a request with a raw operation word and does not wait. `data` is what a write carries.
    pub fn send(&self, op_flags: u32, offset: u64, len: usize, data: &[u8]) -> Result<Sent, Errno> {
        let mut turn = offset as usize >> 12;
        self.wait_for(|state| {
            let device = match state.devices.get_mut(&self.id) {
                Some(device) if device.canceling || device.info.state == uapi::UBLK_S_DEV_QUIESCED => return None,
                Some(device) if device.info.state == uapi::UBLK_S_DEV_LIVE => device,
                Some(device) if device.info.state == uapi::UBLK_S_DEV_FAIL_IO => return Some(Err(Errno::EIO)),
                _ => return Some(Err(Errno::ENODEV)),
            };
            turn += 1;
            let queue = turn % device.queues.len();
            assert!(data.len() <= device.info.max_io_buf_bytes as usize, "longer than the device takes");
            let is_read = op_flags as u8 == uapi::UBLK_IO_OP_READ;
            let pages = if is_read { vec![0xee; len] } else { data.to_vec() };
            let descriptor = Descriptor {
                op_flags,
                nr_sectors: (len as u64 / Sectors::SIZE) as u32,
                // A flush has no position; the block layer leaves all ones there.
                start_sector: if op_flags as u8 == uapi::UBLK_IO_OP_FLUSH {
                    u64::MAX
                } else {
                    Sectors::from_bytes(offset).0
                },
                address: 0,
            };
            let ticket = state.tickets + 1;
            let request = FakeRequest { daemon: None, len: if is_read { len } else { 0 }, pages, ticket };
            device.deliver(self.id, queue, descriptor, request)?;
            state.tickets = ticket;
            Some(Ok(Sent(ticket)))
        })
    }

    /// Waits for a request's end and gives a read's data.
    pub fn wait(&self, sent: Sent) -> Result<Vec<u8>, Errno> {
        self.wait_for(|state| {
            // The block layer's requeue list.
            if let Some(device) = state.devices.get_mut(&self.id)
                && device.info.state == uapi::UBLK_S_DEV_LIVE
                && let Some((descriptor, request)) = device.held.pop()
                && device.deliver(self.id, 0, descriptor, request.clone()).is_none()
            {
                device.held.push((descriptor, request));
            }
            state.answers.remove(&sent.0)
        })
    }

    fn wait_for<T>(&self, check: impl FnMut(&mut State) -> Option<Result<T, Errno>>) -> Result<T, Errno> {
        let result = self.shared.wait_for(CLIENT_TIMEOUT, &|| false, check);
        self.shared.changed.notify_all();
        result.unwrap_or(Err(Errno::ETIMEDOUT))
    }
}
