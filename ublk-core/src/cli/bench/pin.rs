// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pinning the client to a CPU.

use crate::errno::Errno;
use crate::placement::CpuSet;

/// This thread runs on one CPU as long as this exists. Programs started meanwhile inherit that.
#[derive(Debug)]
pub(super) struct Pinned {
    before: CpuSet,
}

impl Pinned {
    /// Pins this thread.
    pub(super) fn to(cpu: usize) -> Result<Self, Errno> {
        let before = CpuSet::of_this_thread()?;
        CpuSet::from_iter([cpu]).pin_this_thread()?;
        Ok(Pinned { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(errno) = self.before.pin_this_thread() {
            log::error!("restoring the CPUs of the client: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_pinned_until_it_is_dropped() {
        let before = CpuSet::of_this_thread().unwrap();
        let cpu = before.iter().last().unwrap();
        let pinned = Pinned::to(cpu).unwrap();
        assert_eq!(CpuSet::of_this_thread().unwrap(), CpuSet::from_iter([cpu]));
        drop(pinned);
        assert_eq!(CpuSet::of_this_thread().unwrap(), before);
        Pinned::to(CpuSet::LIMIT - 1).unwrap_err();
    }
}
