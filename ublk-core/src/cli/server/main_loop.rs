// SPDX-License-Identifier: MIT OR Apache-2.0

//! The main loop of a server: waits for signals, the ends of devices, and clients of `ublk stat`.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::ending::Served;
use super::ending_pool::EndingPool;
use super::signals::{Action, Shutdown, Signals};
use crate::cli::failure::{Failure, Outcome};
use crate::cli::stats::StatsSocket;
use crate::device::Device;

/// Where signals come from: a signalfd, or a test.
struct SignalSource<'s> {
    fd: BorrowedFd<'s>,
    next: &'s dyn Fn() -> Option<Signal>,
}

/// Serves devices to their end. A signal stops and deletes them all, except recoverable devices in use, which are left to
/// their next servers. A second signal ends the server at once.
pub(super) fn run(signals: &Signals, devices: Vec<Device>) -> Outcome {
    let stats = StatsSocket::open().inspect_err(|error| log::warn!("`ublk stat` is not available: {error}")).ok();
    serve(&SignalSource { fd: signals.as_fd(), next: &|| signals.next() }, stats, devices)
}

fn serve(signals: &SignalSource<'_>, mut stats: Option<StatsSocket>, devices: Vec<Device>) -> Outcome {
    let mut serving: Vec<_> = devices.into_iter().map(|device| Arc::new(Served::new(device))).collect();
    let mut ending: Vec<Arc<Served>> = Vec::new();
    let pool = match EndingPool::new() {
        Ok(pool) => pool,
        Err(failure) => return give_up(serving, failure),
    };
    let mut shutdown = Shutdown::default();
    let mut outcome = Ok(());
    while !serving.is_empty() || !ending.is_empty() {
        let mut fds = vec![PollFd::new(signals.fd, PollFlags::POLLIN), PollFd::new(pool.as_fd(), PollFlags::POLLIN)];
        fds.extend(serving.iter().map(|served| PollFd::new(served.device.as_fd(), PollFlags::POLLIN)));
        fds.extend(stats.as_ref().map(|stats| PollFd::new(stats.as_fd(), PollFlags::POLLIN)));
        let timeout = stats.as_ref().map_or(PollTimeout::NONE, StatsSocket::timeout);
        match poll(&mut fds, sooner(timeout, shutdown.remaining())) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => {
                drop(fds);
                serving.extend(ending);
                return give_up(serving, Failure::Text(format!("waiting for the devices to end: {errno}")));
            }
        }
        let ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        let ended: Vec<usize> = (0..serving.len()).rev().filter(|i| ready(&fds[i + 2])).collect();
        drop(fds);
        for i in ended {
            let served = serving.swap_remove(i);
            ending.push(served.clone());
            pool.submit(served, false);
        }
        while let Some(signal) = (signals.next)() {
            match shutdown.signal(signal) {
                Action::Stop => {
                    log::info!("{signal} ends the server");
                    for served in serving.drain(..) {
                        ending.push(served.clone());
                        pool.submit(served, true);
                    }
                }
                Action::StopNow => {
                    log::warn!("{signal} again: ending the server at once");
                    ending.iter().for_each(|served| served.device.expedite());
                }
                Action::Ignore => {}
            }
        }
        for (id, ended) in pool.take_ended() {
            ending.retain(|served| served.device.id() != id);
            outcome = ended.and(outcome);
        }
        if !ending.is_empty() && shutdown.is_overdue() {
            return abandon(ending);
        }
        if let Some(stats) = &mut stats {
            stats.serve(serving.iter().chain(&ending).map(|served| &served.device));
        }
    }
    outcome
}

/// Ends a server that cannot continue. Dropping a device deletes it, so recoverable devices, which may be in use, are not
/// dropped: the end of this process leaves them to another server.
fn give_up(devices: Vec<Arc<Served>>, failure: Failure) -> Outcome {
    devices.into_iter().filter(|served| served.device.recovery().is_some()).for_each(std::mem::forget);
    Err(failure)
}

/// Ends a server without waiting for its devices, and logs what becomes of them.
fn abandon(devices: Vec<Arc<Served>>) -> Outcome {
    for served in devices {
        served.log_abandoned();
        // A thread is still ending it.
        std::mem::forget(served);
    }
    Err(Failure::Reported)
}

/// Returns the shorter of two time-outs.
fn sooner(one: PollTimeout, other: Option<Duration>) -> PollTimeout {
    let Some(other) = other else { return one };
    // Rounded up, so that the time is over afterwards.
    let other = PollTimeout::try_from(other + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    if one.is_some() && one < other { one } else { other }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::super::signals::{SECOND_SIGNAL_DELAY, STOP_NOW_TIMEOUT};
    use super::super::tests::recoverable;
    use super::*;
    use crate::driver::Driver;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{null_disk, server, until};
    use crate::uapi::DeviceState;
    use crate::{DetachedRequest, DeviceId, DeviceOptions};

    #[test]
    fn a_server_that_fails_deletes_no_recoverable_disk() {
        let driver = FakeDriver::new();
        let served = |device| Arc::new(Served::new(device));
        let plain = server(&driver).start(null_disk(), &DeviceOptions::default()).unwrap();
        let kept = recoverable(&driver);
        let id = kept.id();
        give_up(vec![served(plain), served(kept)], Failure::Reported).unwrap_err();
        assert_eq!(driver.device_ids().unwrap(), [id]);
    }

    /// Serves devices on a thread. The stream takes the numbers of signals, and the thread returns the server's outcome.
    fn serving(devices: Vec<Device>) -> (UnixStream, std::thread::JoinHandle<Outcome>) {
        let (sender, receiver) = UnixStream::pair().unwrap();
        receiver.set_nonblocking(true).unwrap();
        let serve = move || {
            let next = || {
                let mut number = [0];
                (&receiver).read_exact(&mut number).ok()?;
                Signal::try_from(i32::from(number[0])).ok()
            };
            serve(&SignalSource { fd: receiver.as_fd(), next: &next }, None, devices)
        };
        (sender, std::thread::spawn(serve))
    }

    fn send(mut sender: &UnixStream, signal: Signal) {
        sender.write_all(&[signal as u8]).unwrap();
    }

    /// A device with a request that its handler does not complete.
    fn stuck(driver: &FakeDriver) -> (Device, std::sync::mpsc::Receiver<DetachedRequest>) {
        let (keep, kept) = channel();
        let device = server(driver).start(Arc::new(Keeping(keep)), &DeviceOptions::default()).unwrap();
        let _ = driver.disk(device.id()).send(0, 0, 512, &[]).unwrap();
        (device, kept)
    }

    #[derive(Debug)]
    struct Keeping(std::sync::mpsc::Sender<DetachedRequest>);

    impl crate::Target for Keeping {
        fn kind(&self) -> &str {
            "keeping"
        }

        fn params(&self) -> crate::Params {
            crate::Params::new(1 << 20, 512)
        }

        fn open_queue(self: Arc<Self>, _: &crate::QueueInfo) -> crate::Result<Box<dyn crate::QueueHandler>> {
            Ok(Box::new(KeepingQueue(self.0.clone())))
        }
    }

    struct KeepingQueue(std::sync::mpsc::Sender<DetachedRequest>);

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
        let is_dead = |id: &DeviceId| control.info(*id).unwrap().state == DeviceState::Dead;
        until("the stop of all devices, of which none may delay another", || ids.iter().all(is_dead));
        kept.into_iter().for_each(DetachedRequest::complete);
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
        std::thread::sleep(SECOND_SIGNAL_DELAY + Duration::from_millis(100));
        assert!(!server.is_finished(), "a repeated signal counts once");
        send(&signals, Signal::SIGHUP);
        std::thread::sleep(STOP_NOW_TIMEOUT + Duration::from_millis(500));
        assert!(!server.is_finished(), "a SIGHUP does not count as a second signal");
        let started = Instant::now();
        send(&signals, Signal::SIGINT);
        assert!(matches!(server.join().unwrap(), Err(Failure::Reported)));
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        drop(kept);
    }

    #[test]
    fn a_device_that_another_process_stops_delays_no_signal() {
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
        until("the end of the other device", || !driver.device_ids().unwrap().contains(&id));
        kept.complete();
        let _ = server.join().unwrap();
    }
}
