// SPDX-License-Identifier: MIT OR Apache-2.0

//! A plugin for QEMU's translator (its plugin interface version 1: QEMU 4.2 to 8.2): counts the instructions that a guest
//! executes, kernel and user apart, over all CPUs.
//!
//! A guest makes a mark by a no-operation that no other program executes: `nop DWORD PTR [rax + 0x75626c00 + N]`, the bytes `0f 1f
//! 80`, N, `6c 62 75`. For each one a line goes to the file that the option `out` names: N, and the instructions of kernel and
//! user so far.
//!
//! With the option `profile` each block is counted apart, between each mark with the number 0 and the next, and the file that it
//! names gets a line for each at the end: its address, the instructions of its runs, and how many runs they were.
//!
//! Instructions are counted by blocks when they begin; one that is left by an exception counts whole. Whether a block is the
//! kernel's is told by its address: x86-64 kernels have the upper half.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. The functions are QEMU's, declared here as `qemu/qemu-plugin.h` of version 1 has them. QEMU resolves them when it loads
//!    this, or does not load it.
//! 2. What QEMU passes to a callback is valid while the callback runs.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

type PluginId = u64;

#[repr(C)]
struct Block {
    _opaque: [u8; 0],
}

#[repr(C)]
struct Instruction {
    _opaque: [u8; 0],
}

type Translated = extern "C" fn(PluginId, *mut Block);
type Executed = extern "C" fn(c_uint, *mut c_void);

/// `QEMU_PLUGIN_CB_NO_REGS`.
const NO_REGISTERS: c_int = 0;

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: PluginId, callback: Translated);
    fn qemu_plugin_register_vcpu_tb_exec_cb(block: *mut Block, callback: Executed, flags: c_int, data: *mut c_void);
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        callback: Executed,
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_atexit_cb(id: PluginId, callback: extern "C" fn(PluginId, *mut c_void), data: *mut c_void);
    fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const Block, index: usize) -> *mut Instruction;
    fn qemu_plugin_insn_data(instruction: *const Instruction) -> *const c_void;
    fn qemu_plugin_insn_size(instruction: *const Instruction) -> usize;
}

/// The version of the interface that this was written for; QEMU looks at it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU's name")]
pub static qemu_plugin_version: c_int = 1;

/// CPUs that are counted apart, so that none waits for another.
const CPUS: usize = 256;

/// Instructions of one CPU, kernel's and user's; on cache lines of their own.
#[repr(align(128))]
struct Counters([AtomicU64; 2]);

static COUNTERS: [Counters; CPUS] = [const { Counters([const { AtomicU64::new(0) }; 2]) }; CPUS];
static OUT: Mutex<Option<File>> = Mutex::new(None);

/// A block of code.
struct Profiled {
    address: u64,
    length: u64,
    runs: AtomicU64,
}

/// Where the profile goes, if one is wanted, and every block so far; they are never freed.
static PROFILE: Mutex<Option<(File, Vec<&'static Profiled>)>> = Mutex::new(None);
static PROFILING: AtomicBool = AtomicBool::new(false);
/// The mark that begins and ends a window of the profile.
const WINDOW: usize = 0;

/// Where the upper half of the address space begins.
const KERNEL: u64 = 1 << 63;

/// Bytes of a mark before and behind its number.
const MARK: ([u8; 3], [u8; 3]) = ([0x0f, 0x1f, 0x80], [0x6c, 0x62, 0x75]);

/// Called when QEMU loads this.
///
/// # Safety
///
/// QEMU calls this, with as many arguments as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: PluginId,
    _info: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: there are `count` arguments (caller), each of them a C string.
        let argument = unsafe { CStr::from_ptr(*arguments.add(index)) }.to_string_lossy();
        let Some((name, path)) = argument.split_once('=') else {
            eprintln!("counter: {argument:?} is no option; there are out=FILE and profile=FILE");
            return 1;
        };
        match (name, File::create(path)) {
            ("out", Ok(file)) => *OUT.lock().unwrap_or_else(PoisonError::into_inner) = Some(file),
            ("profile", Ok(file)) => {
                *PROFILE.lock().unwrap_or_else(PoisonError::into_inner) = Some((file, Vec::new()));
                // SAFETY: (1).
                unsafe { qemu_plugin_register_atexit_cb(id, finished, std::ptr::null_mut()) };
            }
            (_, Ok(_)) => {
                eprintln!("counter: {name:?} is no option; there are out=FILE and profile=FILE");
                return 1;
            }
            (_, Err(error)) => {
                eprintln!("counter: {path}: {error}");
                return 1;
            }
        }
    }
    // SAFETY: (1).
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

extern "C" fn translated(_id: PluginId, block: *mut Block) {
    // SAFETY: (1), (2).
    let (length, address) = unsafe { (qemu_plugin_tb_n_insns(block), qemu_plugin_tb_vaddr(block)) };
    let what = length << 1 | usize::from(address < KERNEL);
    // SAFETY: (1), (2). The data is a number.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, began, NO_REGISTERS, std::ptr::without_provenance_mut(what)) };
    if let Some((_, blocks)) = &mut *PROFILE.lock().unwrap_or_else(PoisonError::into_inner) {
        let profiled: &'static Profiled =
            Box::leak(Box::new(Profiled { address, length: length as u64, runs: AtomicU64::new(0) }));
        blocks.push(profiled);
        // SAFETY: (1), (2). The data is a reference that stays valid.
        unsafe {
            qemu_plugin_register_vcpu_tb_exec_cb(
                block,
                ran,
                NO_REGISTERS,
                std::ptr::from_ref(profiled).cast_mut().cast(),
            );
        }
    }
    for index in 0..length {
        // SAFETY: (1), (2). There are as many.
        let (instruction, size, data) = unsafe {
            let instruction = qemu_plugin_tb_get_insn(block, index);
            (instruction, qemu_plugin_insn_size(instruction), qemu_plugin_insn_data(instruction).cast::<[u8; 7]>())
        };
        if size != 7 {
            continue;
        }
        // SAFETY: (2). It has seven bytes, which need no alignment.
        let [a, b, c, number, x, y, z] = unsafe { data.read_unaligned() };
        if ([a, b, c], [x, y, z]) == MARK {
            let number = std::ptr::without_provenance_mut(number.into());
            // SAFETY: (1), (2). The data is a number.
            unsafe { qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, number) };
        }
    }
}

extern "C" fn began(cpu: c_uint, what: *mut c_void) {
    let what = what.addr();
    let counter = &COUNTERS[cpu as usize % CPUS].0[what & 1];
    // Only this CPU's thread writes it.
    counter.store(counter.load(Ordering::Relaxed) + (what >> 1) as u64, Ordering::Relaxed);
}

extern "C" fn ran(_cpu: c_uint, block: *mut c_void) {
    if PROFILING.load(Ordering::Relaxed) {
        // SAFETY: it is what `translated` gave: a `Profiled` that is never freed, and only read but for its counter.
        let block = unsafe { &*block.cast::<Profiled>() };
        block.runs.fetch_add(1, Ordering::Relaxed);
    }
}

extern "C" fn finished(_id: PluginId, _data: *mut c_void) {
    let Some((file, blocks)) = &mut *PROFILE.lock().unwrap_or_else(PoisonError::into_inner) else { return };
    let mut text = String::new();
    for block in blocks {
        let runs = block.runs.load(Ordering::Relaxed);
        if runs != 0 {
            text += &format!("{:x} {} {runs}\n", block.address, runs * block.length);
        }
    }
    if let Err(error) = file.write_all(text.as_bytes()) {
        eprintln!("counter: the profile is lost: {error}");
    }
}

extern "C" fn marked(_cpu: c_uint, number: *mut c_void) {
    let sum = |which: usize| COUNTERS.iter().map(|counters| counters.0[which].load(Ordering::Relaxed)).sum::<u64>();
    if number.addr() == WINDOW {
        PROFILING.fetch_not(Ordering::Relaxed);
    }
    let line = format!("{} {} {}\n", number.addr(), sum(0), sum(1));
    if let Some(out) = &mut *OUT.lock().unwrap_or_else(PoisonError::into_inner)
        && let Err(error) = out.write_all(line.as_bytes())
    {
        eprintln!("counter: a mark is lost: {error}");
    }
}
