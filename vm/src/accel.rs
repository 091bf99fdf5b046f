// SPDX-License-Identifier: MIT OR Apache-2.0

//! The choice between KVM and emulation. That /dev/kvm exists says little: there are machines
//! where it does and where an ordinary kernel never gets through its first instructions.

use std::fs;
use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::initramfs;
use crate::kernel::Kernel;
use crate::process::kill_group;
use crate::qemu::{Accelerator, Clock, Machine};
use crate::report::note;

/// A kernel under a working KVM needs one or two seconds to its first user space.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// KVM if this very kernel is seen to boot with it, emulation otherwise.
pub(crate) fn choose(cache: &Cache, kernel: &Kernel) -> Result<Accelerator> {
    let device = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !device || !has_virtualisation(&cpuinfo) {
        return Ok(Accelerator::Tcg);
    }
    // The answer holds until the host starts anew.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let answer = cache.dir("probes")?.join(format!("{}-{}", boot.trim(), kernel.release));
    let works = match fs::read_to_string(&answer) {
        Ok(text) => text == "works",
        Err(_) => {
            let works = boots(cache, kernel, Accelerator::Kvm, PROBE_LIMIT)?;
            let text = if works { "works" } else { "hangs" };
            fs::write(&answer, text).with_context(|| format!("cannot write {}", answer.display()))?;
            works
        }
    };
    if works {
        return Ok(Accelerator::Kvm);
    }
    note("/dev/kvm exists, but this kernel does not boot with it: using emulation");
    Ok(Accelerator::Tcg)
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Whether the kernel reaches its first user space in time.
pub(crate) fn boots(cache: &Cache, kernel: &Kernel, accelerator: Accelerator, limit: Duration) -> Result<bool> {
    const TOKEN: &str = "first user space reached";
    let scratch = cache.temporary("probe")?;
    let initrd = scratch.path().join("initrd");
    initramfs::write(&initrd, kernel, &[("probe", TOKEN.into())])?;
    let mut machine = Machine::new(accelerator, Clock::Host, 1, 512, scratch.path());
    machine.hush();
    machine.boot(&kernel.vmlinuz(), &initrd);
    let mut console = machine.console()?;
    let qemu = machine.start()?;
    let pid = qemu.pid();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            seen.extend_from_slice(&buffer[..count]);
            if String::from_utf8_lossy(&seen).contains(TOKEN) {
                let _ = sender.send(());
                break;
            }
        }
    });
    let works = receiver.recv_timeout(limit).is_ok();
    kill_group(pid);
    qemu.wait()?;
    Ok(works)
}

#[cfg(test)]
mod tests {
    use super::has_virtualisation;

    #[test]
    fn flags_are_whole_words() {
        assert!(has_virtualisation("model : x\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock vmxnet\n"));
        assert!(!has_virtualisation("bugs : vmx\n"));
        assert!(!has_virtualisation(""));
    }
}
