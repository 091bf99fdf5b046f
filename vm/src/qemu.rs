// SPDX-License-Identifier: MIT OR Apache-2.0

//! The virtual machine: QEMU's command line and its process.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::counter::Counter;
use crate::kernel::Kernel;
use crate::ports::Channel;
use crate::process::{End, Supervised, spawn};

/// How the guest's instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Accelerator {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the guest's time depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The host's time.
    Host,
    /// The number of instructions executed so far, on all CPUs in turns: a busy host changes nothing in the guest. Only
    /// with emulation.
    Instructions,
}

/// A machine before it is started.
#[derive(Debug)]
pub(crate) struct Machine {
    command: Command,
    kernel_arguments: Vec<String>,
    channels: Vec<Channel>,
    disks: usize,
}

impl Machine {
    /// A machine without any device.
    pub(crate) fn new(accelerator: Accelerator, clock: Clock, cpus: u32, memory_mib: u64, scratch: &Path) -> Self {
        // setpriv: QEMU dies with this program, even if that is killed without a chance to act.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-name", "ublk-vm", "-machine", "q35"]);
        match (accelerator, clock) {
            (Accelerator::Kvm, _) => command.args(["-accel", "kvm"]),
            (Accelerator::Tcg, Clock::Host) => command.args(["-accel", "tcg,thread=multi"]),
            // 8 ns per instruction; a machine that is idle skips to its next timer.
            (Accelerator::Tcg, Clock::Instructions) => {
                command.args(["-accel", "tcg,thread=single", "-icount", "shift=3,sleep=off"])
            }
        };
        command.arg("-cpu").arg(match accelerator {
            Accelerator::Kvm => "host",
            // Without ERMS: the kernel would copy with an instruction that the translator
            // executes byte by byte. Without five-level page tables: fewer levels to walk, and KASAN
            // has been seen to take all memory for wild while the kernel patches itself.
            Accelerator::Tcg => "max,-erms,-la57",
        });
        command
            .args(["-smp", &cpus.to_string()])
            .args(["-m", &format!("{memory_mib}M")])
            .args(["-device", "virtio-serial-pci,max_ports=16"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // The disks' throw-away layers.
            .env("TMPDIR", scratch);
        let arguments = [
            "console=ttyS0",
            "panic=-1",
            "oops=panic",
            // Warnings must reach the console, where they are looked for; less would be slow.
            "loglevel=5",
            "mitigations=off",
            "sysrq_always_enabled",
            // Statistics that wake up a thread every few milliseconds.
            "damon_stat.enabled=N",
            "sysctl.kernel.hung_task_panic=1",
        ];
        let mut kernel_arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        if accelerator == Accelerator::Tcg {
            kernel_arguments.push("tsc=reliable".into());
        }
        Self { command, kernel_arguments, channels: Vec::new(), disks: 0 }
    }

    /// Divides processors and memory among NUMA nodes: a socket and its memory each.
    pub(crate) fn nodes(&mut self, nodes: u32, cpus: u32, memory_mib: u64) {
        // The last `-smp` counts.
        self.command.args(["-smp", &format!("{cpus},sockets={nodes},cores={}", cpus / nodes)]);
        // What is left over goes to the last one.
        let share = memory_mib / u64::from(nodes);
        for node in 0..nodes {
            let memory = if node + 1 == nodes { memory_mib - share * u64::from(node) } else { share };
            self.command.args(["-object", &format!("memory-backend-ram,id=memory{node},size={memory}M")]);
            self.command.args(["-numa", &format!("node,nodeid={node},memdev=memory{node}")]);
            self.command.args(["-numa", &format!("cpu,node-id={node},socket-id={node}")]);
        }
    }

    /// Has instructions counted by a plugin, which writes to `out`.
    pub(crate) fn count(&mut self, counter: &Counter) {
        let mut plugin = format!("file={},out={}", counter.plugin.display(), counter.out.display());
        if let Some(profile) = &counter.profile {
            plugin += &format!(",profile={}", profile.display());
        }
        self.command.arg("-plugin").arg(plugin);
    }

    /// For trials that are expected to fail: what QEMU says is not shown.
    pub(crate) fn hush(&mut self) {
        self.command.stderr(Stdio::null());
    }

    /// Sets the limits of the kernel's own watchdogs: far beyond any wait that is meant, also where
    /// the host is busy with other things.
    pub(crate) fn expect(&mut self, kernel: &Kernel) {
        let arguments: &[&str] = if kernel.debug {
            &[
                // Half of the time after which a CPU that does not schedule is a lockup.
                "watchdog_thresh=30",
                "rcupdate.rcu_cpu_stall_timeout=240",
                "sysctl.kernel.hung_task_timeout_secs=900",
                // Each test is to hear of its own mistakes, not only the first one.
                "kasan_multi_shot",
            ]
        } else {
            &["nowatchdog", "rcupdate.rcu_cpu_stall_timeout=120", "sysctl.kernel.hung_task_timeout_secs=400"]
        };
        self.kernel_arguments.extend(arguments.iter().map(|&text| text.to_owned()));
    }

    /// The kernel and its first user space.
    pub(crate) fn boot(&mut self, kernel: &Path, initramfs: &Path) {
        self.command.arg("-kernel").arg(kernel);
        self.command.arg("-initrd").arg(initramfs);
    }

    /// A disk that the guest knows by `serial`; what it writes is thrown away.
    pub(crate) fn disk(&mut self, image: &Path, serial: &str) {
        let number = self.disks;
        self.disks += 1;
        self.command.arg("-drive").arg(format!(
            "file={},format=raw,if=none,id=disk{number},snapshot=on,cache=unsafe,discard=unmap",
            image.display()
        ));
        self.command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number},serial={serial}"));
    }

    fn channel(&mut self, id: &'static str) -> Result<UnixStream> {
        let channel = Channel::new(id)?;
        let ours = channel.handle()?;
        self.command.arg("-chardev").arg(channel.chardev());
        self.channels.push(channel);
        Ok(ours)
    }

    /// The kernel's console.
    pub(crate) fn console(&mut self) -> Result<UnixStream> {
        let ours = self.channel("console")?;
        self.command.args(["-serial", "chardev:console"]);
        Ok(ours)
    }

    /// QEMU's monitor, in its machine-readable form.
    pub(crate) fn monitor(&mut self) -> Result<UnixStream> {
        let ours = self.channel("monitor")?;
        self.command.args(["-mon", "chardev=monitor,mode=control"]);
        Ok(ours)
    }

    /// A virtio-serial port that the guest knows as `org.ublk.<id>`.
    pub(crate) fn port(&mut self, id: &'static str) -> Result<UnixStream> {
        let ours = self.channel(id)?;
        self.command.arg("-device").arg(format!("virtserialport,chardev={id},name=org.ublk.{id}"));
        Ok(ours)
    }

    /// A terminal, the guest's /dev/hvc0.
    pub(crate) fn terminal(&mut self) -> Result<UnixStream> {
        let ours = self.channel("terminal")?;
        self.command.args(["-device", "virtconsole,chardev=terminal"]);
        Ok(ours)
    }

    /// Starts the machine.
    pub(crate) fn start(mut self) -> Result<Supervised> {
        self.command.args(["-append", &self.kernel_arguments.join(" ")]);
        // QEMU's ends of the channels close here when `self` goes; QEMU has inherited them.
        spawn(&mut self.command, End::Kill)
    }
}
