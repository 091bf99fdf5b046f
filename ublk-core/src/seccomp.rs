// SPDX-License-Identifier: MIT OR Apache-2.0

//! Filters with which system calls of a test's thread fail.

use libc::{BPF_ABS, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, sock_filter};

use crate::errno::Errno;

/// One of a filter's statements.
pub(crate) fn statement(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Loads the number of the system call.
pub(crate) fn load_number() -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)
}

/// Loads the low half of an argument.
pub(crate) fn load_argument(index: u32) -> sock_filter {
    let low = if cfg!(target_endian = "big") { 4 } else { 0 };
    statement(BPF_LD | BPF_W | BPF_ABS, 16 + 8 * index + low, 0, 0)
}

/// Skips `yes` statements if what is loaded is the same, else `no`.
pub(crate) fn equals(value: u32, yes: u8, no: u8) -> sock_filter {
    statement(BPF_JMP | libc::BPF_JEQ | BPF_K, value, yes, no)
}

/// Skips `yes` statements if what is loaded has one of the bits, else `no`.
pub(crate) fn has(bits: u32, yes: u8, no: u8) -> sock_filter {
    statement(BPF_JMP | libc::BPF_JSET | BPF_K, bits, yes, no)
}

/// Has the system call fail.
pub(crate) fn refuse(errno: Errno) -> sock_filter {
    statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | errno.get() as u32, 0, 0)
}

pub(crate) fn allow() -> sock_filter {
    statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0)
}

/// Filters the calling thread's system calls for good. False if the system does not allow that.
pub(crate) fn install(filter: &mut [sock_filter]) -> bool {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which is valid for the length that it has.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    }
}

/// Calls a function on a thread of its own, whose system calls are filtered. None, and a message, if the system does not
/// allow that.
pub(crate) fn filtered<R: Send + 'static>(
    mut filter: Vec<sock_filter>,
    call: impl FnOnce() -> R + Send + 'static,
) -> Option<R> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(install(&mut filter).then(call)));
    let result = receiver.recv_timeout(std::time::Duration::from_secs(20)).expect("the call ends");
    if result.is_none() {
        eprintln!("not tested: no seccomp filters here");
    }
    result
}
