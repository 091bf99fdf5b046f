// SPDX-License-Identifier: MIT OR Apache-2.0

//! Marks for the plugin that counts a virtual machine's instructions (`vm/counter`).

/// Number of marks that this process has made. Each window is between two.
#[derive(Debug, Default)]
pub(super) struct Marks {
    made: u64,
}

impl Marks {
    /// Whether marks can be made on this architecture.
    pub(super) const AVAILABLE: bool = cfg!(target_arch = "x86_64");

    /// Makes a mark: executes an instruction without effect that the plugin recognizes.
    pub(super) fn make(&mut self) {
        self.made += 1;
        // SAFETY: the instruction, `nop dword ptr [rax + 0x75626c00]`, accesses neither memory nor registers. It is not
        // declared so, because the compiler must not move other code across it.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::asm!(".byte 0x0f, 0x1f, 0x80, 0x00, 0x6c, 0x62, 0x75", options(nostack, preserves_flags));
        }
    }

    /// Number of marks so far.
    pub(super) fn made(&self) -> u64 {
        self.made
    }
}
