// SPDX-License-Identifier: MIT OR Apache-2.0

//! On which CPUs queues are served.
//!
//! A pinned thread allocates and first touches its queues' buffers itself, after it was pinned, so they are on
//! its own NUMA node.

use std::fmt;
use std::str::FromStr;

use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::errno::Errno;
use crate::error::{Error, Parameter, Result};

const WORDS: usize = CpuSet::LIMIT / 64;

/// A set of CPUs, written as the kernel does: `0-3,8`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CpuSet([u64; WORDS]);

impl CpuSet {
    /// CPUs from this number on are not supported.
    pub const LIMIT: usize = 1024;

    /// The CPUs that the calling thread may use.
    pub(crate) fn of_this_thread() -> Result<Self, Errno> {
        let raw = sched_getaffinity(Pid::from_raw(0))?;
        Ok((0..Self::LIMIT).filter(|cpu| raw.is_set(*cpu) == Ok(true)).collect())
    }

    pub(crate) fn pin_this_thread(&self) -> Result<(), Errno> {
        let mut raw = nix::sched::CpuSet::new();
        self.iter().try_for_each(|cpu| raw.set(cpu))?;
        Ok(sched_setaffinity(Pid::from_raw(0), &raw)?)
    }

    /// Returns whether there is no CPU in it.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Returns whether a CPU is in it.
    pub fn contains(&self, cpu: usize) -> bool {
        cpu < Self::LIMIT && self.0[cpu / 64] & (1 << (cpu % 64)) != 0
    }

    /// The CPUs, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..Self::LIMIT).filter(|cpu| self.contains(*cpu))
    }

    fn union(self, other: Self) -> Self {
        CpuSet(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }
}

/// Numbers from [`CpuSet::LIMIT`] on are left out.
impl FromIterator<usize> for CpuSet {
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> Self {
        let mut set = CpuSet::default();
        for cpu in cpus.into_iter().filter(|cpu| *cpu < Self::LIMIT) {
            set.0[cpu / 64] |= 1 << (cpu % 64);
        }
        set
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while cpus.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

impl FromStr for CpuSet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: String| Error::invalid(Parameter::Cpus, text, why);
        let number = |word: &str| match word.trim().parse::<usize>() {
            Ok(cpu) if cpu < Self::LIMIT => Ok(cpu),
            Ok(cpu) => Err(wrong(format!("{cpu} is beyond {}", Self::LIMIT - 1))),
            Err(_) => Err(wrong("must be a list like 0-3,8".into())),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(wrong(format!("{part:?} ends before it begins")));
            }
            cpus.extend(first..=last);
        }
        Ok(cpus.into_iter().collect())
    }
}

/// On which CPUs the threads of a server run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cpus {
    /// Wherever the scheduler puts them.
    #[default]
    Any,
    /// Each on the CPUs whose requests use its queues, according to the driver (`GET_QUEUE_AFFINITY`).
    OfQueues,
    /// All on these.
    Only(CpuSet),
}

impl Cpus {
    /// Refuses CPUs that this thread, and those that it makes, may not use.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] with those that it may use.
    pub(crate) fn check(&self) -> Result<()> {
        let Cpus::Only(wish) = self else { return Ok(()) };
        let allowed = CpuSet::of_this_thread().map_err(|errno| Error::Process {
            operation: "finding the CPUs of this process",
            errno,
            hint: String::new(),
        })?;
        if wish.is_empty() || !wish.iter().all(|cpu| allowed.contains(cpu)) {
            return Err(Error::invalid(Parameter::Cpus, wish, format!("this process may use {allowed}")));
        }
        Ok(())
    }

    /// Removes CPUs that this thread may not use, for example because they are offline. Returns what remains:
    /// any CPU if that is none. With a sentence for the log if that is less than the wish.
    ///
    /// For servers of disks that exist and are in use: that they run elsewhere costs time, that they do not run holds
    /// up all clients.
    pub fn available(self) -> (Self, Option<String>) {
        let (Cpus::Only(wish), Ok(allowed)) = (self, CpuSet::of_this_thread()) else { return (self, None) };
        let left: CpuSet = wish.iter().filter(|cpu| allowed.contains(*cpu)).collect();
        if left == wish && !wish.is_empty() {
            return (self, None);
        }
        let missing: CpuSet = wish.iter().filter(|cpu| !allowed.contains(*cpu)).collect();
        let (cpus, now) = if left.is_empty() {
            (Cpus::Any, "any CPU".to_owned())
        } else {
            (Cpus::Only(left), format!("CPUs {left}"))
        };
        (cpus, Some(format!("CPUs {missing} are offline or not allowed here: the queues are served on {now}")))
    }

    /// The CPUs for a queue; `None` for any.
    pub(crate) fn of(&self, affinity: impl FnOnce() -> Result<Vec<usize>>) -> Result<Option<CpuSet>> {
        match self {
            Cpus::Any => Ok(None),
            Cpus::OfQueues => affinity().map(|cpus| Some(cpus.into_iter().collect())),
            Cpus::Only(cpus) => Ok(Some(*cpus)),
        }
    }
}

/// The CPUs of a ring thread: those of all its queues.
#[derive(Debug, Default)]
pub(crate) struct ThreadAffinity {
    /// The CPUs that it could use before it was pinned.
    home: Option<CpuSet>,
    /// The CPUs that it is pinned to.
    pinned: Option<CpuSet>,
}

impl ThreadAffinity {
    /// Returns whether the thread is pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// Moves the calling thread to the CPUs of its queues. A queue without a choice allows any CPU.
    ///
    /// If the thread cannot be moved, because those CPUs are offline or forbidden, it is only slower.
    pub(crate) fn move_to(&mut self, wishes: impl Iterator<Item = Option<CpuSet>>) {
        let wish = wishes.reduce(|all, one| Some(all?.union(one?))).flatten();
        if wish == self.pinned {
            return;
        }
        if let Err(errno) = self.try_move_to(wish) {
            let cpus = wish.map_or_else(|| "any CPU".to_owned(), |cpus| format!("CPUs {cpus}"));
            log::warn!("cannot pin a queue thread to {cpus}: {}", errno.desc());
        }
    }

    fn try_move_to(&mut self, wish: Option<CpuSet>) -> Result<(), Errno> {
        let home = match self.home {
            Some(home) => home,
            None => *self.home.insert(CpuSet::of_this_thread()?),
        };
        // Not asked for again, whether it works or not.
        self.pinned = wish;
        wish.unwrap_or(home).pin_this_thread()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_the_kernels() {
        for (text, cpus, again) in [
            ("0", vec![0], "0"),
            ("0-3,8", vec![0, 1, 2, 3, 8], "0-3,8"),
            ("8, 1-2,2-3", vec![1, 2, 3, 8], "1-3,8"),
            ("1023,63-64", vec![63, 64, 1023], "63-64,1023"),
        ] {
            assert_eq!(set(text).iter().collect::<Vec<_>>(), cpus);
            assert_eq!(set(text).to_string(), again);
        }
        assert_eq!(CpuSet::default().to_string(), "");
        for wrong in ["", "x", "1-", "3-1", "1024", "-1", "1,,2"] {
            assert!(wrong.parse::<CpuSet>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_thread_goes_where_all_its_queues_are_at_home_and_back() {
        std::thread::spawn(|| {
            let home = CpuSet::of_this_thread().unwrap();
            let Some(first) = home.iter().next() else { panic!("it runs") };
            let only: CpuSet = [first].into_iter().collect();
            let mut affinity = ThreadAffinity::default();
            affinity.move_to([Some(only)].into_iter());
            assert_eq!(CpuSet::of_this_thread().unwrap(), only);
            affinity.move_to([Some(only), Some(home)].into_iter());
            assert_eq!(CpuSet::of_this_thread().unwrap(), home);
            affinity.move_to([Some(only)].into_iter());
            affinity.move_to([Some(only), None].into_iter());
            assert_eq!(CpuSet::of_this_thread().unwrap(), home);
            affinity.move_to([Some(only)].into_iter());
            affinity.move_to(std::iter::empty());
            assert_eq!(CpuSet::of_this_thread().unwrap(), home);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn cpus_that_cannot_be_had_are_no_reason_to_fail() {
        std::thread::spawn(|| {
            let home = CpuSet::of_this_thread().unwrap();
            assert!(!home.contains(CpuSet::LIMIT - 1), "no machine of this size was thought of");
            let missing: CpuSet = [CpuSet::LIMIT - 1].into_iter().collect();
            ThreadAffinity::default().move_to([Some(missing)].into_iter());
            assert_eq!(CpuSet::of_this_thread().unwrap(), home);
            let message = Cpus::Only(missing).check().unwrap_err().to_string();
            assert!(message.contains("CPUs = 1023") && message.contains(&home.to_string()), "{message}");
            Cpus::Only(home).check().unwrap();
            assert_eq!(Cpus::Only(home).available(), (Cpus::Only(home), None));
            assert_eq!(Cpus::OfQueues.available(), (Cpus::OfQueues, None));
            let (cpus, why) = Cpus::Only(missing).available();
            assert_eq!(cpus, Cpus::Any);
            assert!(why.unwrap().contains("CPUs 1023"));
            let first: CpuSet = home.iter().take(1).collect();
            let (cpus, why) = Cpus::Only(first.union(missing)).available();
            assert_eq!((cpus, why.is_some()), (Cpus::Only(first), true));
        })
        .join()
        .unwrap();
    }
}
