// SPDX-License-Identifier: MIT OR Apache-2.0

//! Serving devices until a signal comes, or they end.

mod ends;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::ends::Ends;
use super::holders::{self, Asker, Stop};
use super::station::Station;
use super::{Failure, Outcome, state};
use crate::device::{Device, Ending};
use crate::error::Error;
use crate::uapi::{DeviceState, Features};

/// Signals that end a server in an orderly way.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// How long after the first signal another one is a second wish.
const AGAIN: Duration = Duration::from_millis(500);
/// How long devices may take to end after that.
const HASTE: Duration = Duration::from_secs(1);

/// The ending signals, taken out of their usual delivery.
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and in those made from now on.
    pub(super) fn block() -> Result<Self, Failure> {
        let set: SigSet = ENDING.into_iter().collect();
        set.thread_block()
            .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
            .map(Signals)
            .map_err(|errno| Failure::Text(format!("blocking signals: {errno}")))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lets this process have as many descriptors as it may: each device takes two, and the usual limit is 1,024.
pub(super) fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(now, most)| if now < most { setrlimit(Resource::RLIMIT_NOFILE, most, most) } else { Ok(()) });
    if let Err(errno) = raised {
        log::debug!("raising the limit of open files: {errno}");
    }
}

/// Signals as they come.
struct Source<'s> {
    fd: BorrowedFd<'s>,
    next: &'s dyn Fn() -> Option<Signal>,
}

/// A device, and what distinguishes it from a later one with its number.
#[derive(Debug)]
struct Served {
    instance: Option<u64>,
    device: Device,
}

/// Serves devices to their end. A signal stops and deletes them all, but for those that can be recovered and are in use:
/// they are left to their next servers. Another one ends the server at once.
pub(super) fn run(signals: &Signals, devices: Vec<Device>) -> Outcome {
    let station = Station::open().inspect_err(|error| log::warn!("`ublk stat` is not available: {error}")).ok();
    let next = || {
        let info = signals.0.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo as i32).ok()
    };
    serve(&Source { fd: signals.0.as_fd(), next: &next }, station, devices)
}

fn serve(signals: &Source<'_>, mut station: Option<Station>, devices: Vec<Device>) -> Outcome {
    // By now, because a device's number may be another one's as soon as it begins to end.
    let served = |device: Device| Arc::new(Served { instance: state::instance(device.id()), device });
    let mut serving: Vec<_> = devices.into_iter().map(served).collect();
    let mut ending: Vec<Arc<Served>> = Vec::new();
    let ends = match Ends::new() {
        Ok(ends) => ends,
        Err(failure) => return give_up(serving, failure),
    };
    let mut haste = Haste::default();
    let mut outcome = Ok(());
    while !serving.is_empty() || !ending.is_empty() {
        let mut fds = vec![PollFd::new(signals.fd, PollFlags::POLLIN), PollFd::new(ends.as_fd(), PollFlags::POLLIN)];
        fds.extend(serving.iter().map(|served| PollFd::new(served.device.as_fd(), PollFlags::POLLIN)));
        fds.extend(station.as_ref().map(|station| PollFd::new(station.as_fd(), PollFlags::POLLIN)));
        let patience = station.as_ref().map_or(PollTimeout::NONE, Station::patience);
        match poll(&mut fds, sooner(patience, haste.left())) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                drop(fds);
                serving.extend(ending);
                return give_up(serving, Failure::Text(format!("waiting for the devices to end: {errno}")));
            }
        }
        let ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        let begun: Vec<usize> = (0..serving.len()).rev().filter(|i| ready(&fds[i + 2])).collect();
        drop(fds);
        for i in begun {
            let served = serving.swap_remove(i);
            ending.push(served.clone());
            ends.begin(served, false);
        }
        while let Some(signal) = (signals.next)() {
            match haste.signal(signal) {
                Wish::End => {
                    log::info!("{signal} ends the server");
                    for served in serving.drain(..) {
                        ending.push(served.clone());
                        ends.begin(served, true);
                    }
                }
                Wish::EndAtOnce => {
                    log::warn!("{signal} again: ending the server at once");
                    ending.iter().for_each(|served| served.device.expedite());
                }
                Wish::Nothing => {}
            }
        }
        for (id, ended) in ends.take() {
            ending.retain(|served| served.device.id() != id);
            outcome = ended.and(outcome);
        }
        if !ending.is_empty() && haste.is_over() {
            return leave_behind(ending);
        }
        if let Some(station) = &mut station {
            station.answer(serving.iter().chain(&ending).map(|served| &served.device));
        }
    }
    outcome
}

/// The end of a process that cannot go on. To drop a device is to delete it, which one that can be recovered is spared: its
/// users may have it open, and the end of this process leaves it to another server.
fn give_up(devices: Vec<Arc<Served>>, failure: Failure) -> Outcome {
    devices.into_iter().filter(|served| served.device.recovery().is_some()).for_each(std::mem::forget);
    Err(failure)
}

/// The end of a process that does not wait for its devices' ends: what the driver makes of them is said.
fn leave_behind(devices: Vec<Arc<Served>>) -> Outcome {
    for served in devices {
        let id = served.device.id();
        if served.device.recovery().is_some() {
            log::error!(
                "device {id} has no server any more: use `ublk recover -n {id}` to serve it, or `ublk del -n {id}` to remove it"
            );
        } else {
            log::error!("device {id} is dead: remove it with `ublk del -n {id}`");
        }
        // A thread is at it.
        std::mem::forget(served);
    }
    Err(Failure::Reported)
}

/// The shorter of two waits.
fn sooner(one: PollTimeout, other: Option<Duration>) -> PollTimeout {
    let Some(other) = other else { return one };
    // Rounded up, so that the time is over then.
    let other = PollTimeout::try_from(other + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    if one.is_some() && one < other { one } else { other }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    End,
    EndAtOnce,
    Nothing,
}

/// How much of a hurry the signals that have come are.
#[derive(Debug, Default)]
struct Haste {
    first: Option<Instant>,
    second: Option<Instant>,
}

impl Haste {
    /// Takes a signal. One that follows at once is the first one again: a process may get it for itself and as one of its
    /// group. So is a SIGHUP, which comes with the SIGTERM of service managers, and from terminals that are closed.
    fn signal(&mut self, signal: Signal) -> Wish {
        match (self.first, self.second) {
            (None, _) => {
                self.first = Some(Instant::now());
                Wish::End
            }
            (Some(first), None) if signal != Signal::SIGHUP && first.elapsed() >= AGAIN => {
                self.second = Some(Instant::now());
                Wish::EndAtOnce
            }
            _ => Wish::Nothing,
        }
    }

    /// How long devices may still take to end.
    fn left(&self) -> Option<Duration> {
        self.second.map(|second| HASTE.saturating_sub(second.elapsed()))
    }

    fn is_over(&self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }
}

/// Ends a device: as a signal wants it to, or as another process has begun to. If this fails, the device is not to be
/// dropped, which would stop it again: one that can be recovered is left by the end of this process.
fn end(served: &Served, wanted: bool) -> Outcome {
    let Served { instance, device } = served;
    let id = device.id();
    let mut ending = if wanted { stop_or_leave(device) } else { device.conclude() };
    if matches!(ending, Err(Error::Timeout { .. })) && device.recovery().is_none() {
        // Its requests may have ended by now.
        ending = device.stop().map(|()| Ending::Deleted).or(ending);
    }
    if instance.is_some() && state::instance(id) == *instance {
        // Its next server needs its state. One that was to be stopped is without a server.
        match &ending {
            Ok(_) => log::info!("another server has taken over device {id}"),
            Err(_) => log::error!("device {id} has no server any more: remove it with `ublk del -n {id}`"),
        }
    } else {
        state::remove(id, *instance);
    }
    ending.map(drop).map_err(|error| {
        log::error!("{error}");
        Failure::Error(error)
    })
}

/// Stops and deletes a device, unless it can be recovered and is in use: that one is left, as if this process had been
/// killed, because its users asked for a disk that outlives its server. Where that is not known for certain, it counts as
/// in use. A shut-down that ends servers before it unmounts their disks loses nothing, but `umount` waits for the next
/// server then. This takes as long as the requests that the server has, and 110 s at most.
fn stop_or_leave(device: &Device) -> crate::Result<Ending> {
    let id = device.id();
    if device.recovery().is_none() {
        return device.stop().map(|()| Ending::Deleted);
    }
    let who = match holders::stop_unused(device.control(), id, Asker::Server) {
        Ok(Stop::Done | Stop::NotUsed) => return device.stop().map(|()| Ending::Deleted),
        // Another process may be deleting it, and a stop that takes too long is for this to end.
        Err(_) if has_no_disk(device) => return device.stop().map(|()| Ending::Deleted),
        Ok(Stop::Open(who) | Stop::Claimed(who)) => format!("in use ({who})"),
        Err(error) => format!("perhaps in use ({error})"),
    };
    log::warn!(
        "device {id} is {who} and now waits for a new server: use `ublk recover -n {id}` to serve it, or \
         `ublk del --force -n {id}` to remove it"
    );
    // Before Linux 6.16 it is the end of this process that leaves it.
    if device.info().features.contains(Features::QUIESCE) {
        // Else it would be deleted when it is dropped.
        device.leave().inspect_err(|_| device.abandon())?
    } else {
        device.abandon()
    }
    Ok(Ending::Left)
}

/// Whether a device was stopped, or is gone.
fn has_no_disk(device: &Device) -> bool {
    match device.control().info(device.id()) {
        Ok(info) => info.state == DeviceState::Dead,
        Err(error) => error.errno() == crate::Errno::ENODEV,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::driver::Driver;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::targets::Null;
    use crate::{DeviceOptions, Recovery, Server};

    fn recoverable(driver: &FakeDriver) -> Device {
        let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let options = DeviceOptions { recovery: Some(Recovery::Queue), ..DeviceOptions::default() };
        server.start(Arc::new(Null::new(1 << 20, 512).unwrap()), &options).unwrap()
    }

    #[test]
    fn an_unused_recoverable_disk_is_deleted() {
        let driver = FakeDriver::new();
        assert_eq!(stop_or_leave(&recoverable(&driver)).unwrap(), Ending::Deleted);
        assert_eq!(driver.device_ids().unwrap(), []);
    }

    #[test]
    fn a_recoverable_disk_is_left_if_its_use_is_unknown() {
        let failures = [("TRY_STOP_DEV", Errno::EIO), ("TRY_STOP_DEV", Errno::EINTR), ("GET_DEV_INFO2", Errno::ENOMEM)];
        for (command, errno) in failures {
            let driver = FakeDriver::new();
            let device = recoverable(&driver);
            driver.refuse_next(command, errno);
            assert_eq!(stop_or_leave(&device).unwrap(), Ending::Left, "{command}: {errno}");
            let control = device.control().clone();
            assert_eq!(control.info(device.id()).unwrap().state, DeviceState::Quiesced);
            drop(device);
            assert_ne!(driver.device_ids().unwrap(), [], "{command}: {errno}");
        }
    }

    #[test]
    fn a_recoverable_disk_that_is_being_stopped_is_deleted() {
        let driver = FakeDriver::new();
        let device = recoverable(&driver);
        device.control().stop(device.id()).unwrap();
        assert_eq!(stop_or_leave(&device).unwrap(), Ending::Deleted);
    }

    #[test]
    fn a_server_that_fails_deletes_no_recoverable_disk() {
        let driver = FakeDriver::new();
        let served = |device| Arc::new(Served { instance: None, device });
        let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let plain = server.start(Arc::new(Null::new(1 << 20, 512).unwrap()), &DeviceOptions::default()).unwrap();
        let kept = recoverable(&driver);
        let id = kept.id();
        give_up(vec![served(plain), served(kept)], Failure::Reported).unwrap_err();
        assert_eq!(driver.device_ids().unwrap(), [id]);
    }

    /// At shutdown, servers may get SIGTERM before their disks are unmounted.
    #[test]
    fn a_disk_that_stays_in_use_is_left_soon() {
        let driver = FakeDriver::new();
        let device = recoverable(&driver);
        (0..10_000).for_each(|_| driver.refuse_next("TRY_STOP_DEV", Errno::EBUSY));
        let began = std::time::Instant::now();
        assert_eq!(stop_or_leave(&device).unwrap(), Ending::Left);
        assert!(began.elapsed() < std::time::Duration::from_secs(40), "{:?}", began.elapsed());
    }

    /// Serves devices on a thread; the stream takes signals' numbers, and the thread's outcome says how it has ended.
    fn serving(devices: Vec<Device>) -> (UnixStream, std::thread::JoinHandle<Outcome>) {
        let (sender, receiver) = UnixStream::pair().unwrap();
        receiver.set_nonblocking(true).unwrap();
        let serve = move || {
            let next = || {
                let mut number = [0];
                (&receiver).read_exact(&mut number).ok()?;
                Signal::try_from(i32::from(number[0])).ok()
            };
            serve(&Source { fd: receiver.as_fd(), next: &next }, None, devices)
        };
        (sender, std::thread::spawn(serve))
    }

    fn send(mut sender: &UnixStream, signal: Signal) {
        sender.write_all(&[signal as u8]).unwrap();
    }

    /// A device with a request that its handler keeps.
    fn stuck(driver: &FakeDriver) -> (Device, std::sync::mpsc::Receiver<crate::DetachedRequest>) {
        let (keep, kept) = channel();
        let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let device = server.start(Arc::new(Keeping(keep)), &DeviceOptions::default()).unwrap();
        let _ = driver.disk(device.id()).send(0, 0, 512, &[]).unwrap();
        (device, kept)
    }

    #[derive(Debug)]
    struct Keeping(std::sync::mpsc::Sender<crate::DetachedRequest>);

    impl crate::Target for Keeping {
        fn kind(&self) -> &str {
            "keeping"
        }

        fn params(&self) -> crate::Params {
            crate::Params::new(1 << 20, 512)
        }

        fn open_queue(&self, _: &crate::QueueInfo) -> crate::Result<Box<dyn crate::QueueHandler>> {
            Ok(Box::new(KeepingQueue(self.0.clone())))
        }
    }

    struct KeepingQueue(std::sync::mpsc::Sender<crate::DetachedRequest>);

    impl crate::QueueHandler for KeepingQueue {
        fn handle(&mut self, requests: crate::Requests<'_>) {
            requests.for_each(|request| drop(self.0.send(request.detach())));
        }
    }

    #[test]
    fn devices_are_stopped_at_the_same_time() {
        let driver = FakeDriver::new();
        let devices = [stuck(&driver), stuck(&driver), stuck(&driver)];
        let control = devices[0].0.control().clone();
        let ids: Vec<_> = devices.iter().map(|(device, _)| device.id()).collect();
        let (devices, kept): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
        let kept: Vec<_> = kept.iter().map(|kept| kept.recv().unwrap()).collect();
        let (signals, server) = serving(devices);
        send(&signals, Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while ids.iter().any(|id| control.info(*id).unwrap().state != DeviceState::Dead) {
            assert!(Instant::now() < deadline, "one waits for another");
            std::thread::yield_now();
        }
        kept.into_iter().for_each(crate::DetachedRequest::complete);
        server.join().unwrap().unwrap();
        assert_eq!(driver.device_ids().unwrap(), []);
    }

    #[test]
    fn a_second_signal_ends_the_server_at_once() {
        let driver = FakeDriver::new();
        let (device, kept) = stuck(&driver);
        let kept = kept.recv().unwrap();
        let (signals, server) = serving(vec![device]);
        send(&signals, Signal::SIGTERM);
        send(&signals, Signal::SIGTERM);
        std::thread::sleep(AGAIN + Duration::from_millis(100));
        assert!(!server.is_finished(), "the same signal twice in a moment is one");
        send(&signals, Signal::SIGHUP);
        std::thread::sleep(HASTE + Duration::from_millis(500));
        assert!(!server.is_finished(), "a SIGHUP is no second wish");
        let began = Instant::now();
        send(&signals, Signal::SIGINT);
        assert!(matches!(server.join().unwrap(), Err(Failure::Reported)));
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        drop(kept);
    }

    #[test]
    fn a_device_that_another_process_stops_keeps_no_signal_waiting() {
        let driver = FakeDriver::new();
        let (device, kept) = stuck(&driver);
        let kept = kept.recv().unwrap();
        let control = device.control().clone();
        control.stop_within(device.id(), Duration::from_millis(10)).unwrap_err();
        let other = recoverable(&driver);
        let id = other.id();
        let (signals, server) = serving(vec![device, other]);
        std::thread::sleep(Duration::from_millis(100));
        send(&signals, Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while driver.device_ids().unwrap().contains(&id) {
            assert!(Instant::now() < deadline, "one waits for another");
            std::thread::yield_now();
        }
        kept.complete();
        let _ = server.join().unwrap();
    }
}
