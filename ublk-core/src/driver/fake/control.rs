// SPDX-License-Identifier: MIT OR Apache-2.0

//! Control commands: what they check, and what they do to a device.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{ALWAYS_ON, FakeDevice, FakeDriver, FakeQueue, FakeState, FakeTag, INSTANCES, NOT_COPIED};
use crate::driver::{ControlCommand, ControlFailure};
use crate::errno::Errno;
use crate::memory::{DescriptorMap, Region};
use crate::uapi::{self, Features, wire};

impl FakeDriver {
    pub(super) fn execute(
        &self,
        command: &mut ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<i32, ControlFailure> {
        let refuse = |errno| Err(ControlFailure::Refused(errno));
        if let Some(errno) = self.shared.state().refusals.get_mut(command.name).and_then(VecDeque::pop_front) {
            return refuse(errno);
        }
        if self.shared.state().ignored.remove(command.name) {
            return self.shared.wait_for(timeout.max(Duration::from_secs(60)), give_up, |_| None);
        }
        if self.shared.state().expired.remove(command.name) {
            return Err(ControlFailure::Timeout);
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
                // By its path, for any caller.
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
                let device = state.devices.get(&id).ok_or(gone)?;
                if device.deleted {
                    // Its node is gone, which the path names.
                    return refuse(Errno::ENOENT);
                }
                let info = device.info;
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
                let instance = self.shared.state().devices.get(&id).ok_or(gone)?.instance;
                self.stop(id, timeout, give_up)?;
                let is_it = move |device: &FakeDevice| device.instance == instance;
                let mut state = self.shared.state();
                if let Some(device) = state.devices.get_mut(&id).filter(|device| is_it(device)) {
                    device.deleted = true;
                    if !device.char_open {
                        state.devices.remove(&id);
                    }
                }
                drop(state);
                self.shared.changed.notify_all();
                if command.op == uapi::UBLK_U_CMD_DEL_DEV_ASYNC {
                    return Ok(0);
                }
                self.shared
                    .wait_for(timeout, give_up, |state| (!state.devices.get(&id).is_some_and(is_it)).then_some(0))
            }
            uapi::UBLK_U_CMD_REG_BUF => {
                let mut state = self.shared.state();
                let device = state.devices.get_mut(&id).ok_or(gone)?;
                device.shared_memory += 1;
                Ok(device.shared_memory - 1)
            }
            uapi::UBLK_U_CMD_UNREG_BUF => Ok(0),
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

impl FakeState {
    fn add(&mut self, payload: &mut Vec<u8>) -> Result<i32, Errno> {
        let mut info = wire::decode_info(payload);
        let depth = info.queue_depth;
        if depth == 0 || depth > uapi::UBLK_MAX_QUEUE_DEPTH || info.nr_hw_queues == 0 {
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
            FakeDevice {
                info,
                instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
                deleted: false,
                params: None,
                queues,
                char_open: false,
                canceling: false,
                held: vec![],
                shared_memory: 0,
            },
        );
        *payload = wire::encode_info(&info);
        Ok(0)
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

    /// Returns whether all tags have been fetched.
    fn is_fetched(&self) -> bool {
        self.queues.iter().flat_map(|q| &q.tags).all(|t| !matches!(t, FakeTag::Idle))
    }

    pub(super) fn waits_for_server(&self) -> bool {
        [uapi::UBLK_S_DEV_QUIESCED, uapi::UBLK_S_DEV_FAIL_IO].contains(&self.info.state)
    }
}
