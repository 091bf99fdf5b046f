// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is tried: ways of recovery, ways of moving data, shapes of the server.

use clap::ValueEnum;
use serde::Serialize;

use ublk_test_common::random::Random;
use ublk_test_common::uapi::*;

/// Tags of a queue.
pub(crate) const DEPTH: u16 = 32;
/// The largest request.
pub(crate) const MAX_IO: u32 = 64 << 10;

/// What the driver does when the server is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Recovery {
    /// The disk goes.
    None,
    /// What the server held fails, the rest waits.
    Queue,
    /// Everything waits.
    Reissue,
    /// Everything fails until the next server comes.
    FailIo,
}

impl Recovery {
    pub(crate) fn flags(self) -> u64 {
        match self {
            Recovery::None => 0,
            Recovery::Queue => UBLK_F_USER_RECOVERY,
            Recovery::Reissue => UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
            Recovery::FailIo => UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
        }
    }

    /// State of a device whose server died while it was LIVE.
    pub(crate) fn state_without_server(self) -> u16 {
        match self {
            Recovery::None => UBLK_S_DEV_DEAD,
            Recovery::Queue | Recovery::Reissue => UBLK_S_DEV_QUIESCED,
            Recovery::FailIo => UBLK_S_DEV_FAIL_IO,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Recovery::None => "none",
            Recovery::Queue => "queue",
            Recovery::Reissue => "reissue",
            Recovery::FailIo => "fail-io",
        }
    }
}

/// How data gets from the request to the server and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::enum_variant_names, reason = "the flag is called NEED_GET_DATA")]
pub(crate) enum Data {
    /// The driver copies.
    Copy,
    /// The driver copies after it has asked for a buffer.
    GetData,
    /// pread and pwrite on the char device.
    UserCopy,
    /// Buffers that the server registers.
    ZeroCopy,
    /// Buffers that the driver registers.
    Auto,
    /// The same, and half of the tags name a place that does not exist.
    AutoFallback,
    /// Batches; the driver copies.
    BatchCopy,
    /// Batches; the driver registers buffers.
    BatchAuto,
}

impl Data {
    pub(crate) fn flags(self) -> u64 {
        match self {
            Data::Copy => 0,
            Data::GetData => UBLK_F_NEED_GET_DATA,
            Data::UserCopy => UBLK_F_USER_COPY,
            Data::ZeroCopy => UBLK_F_SUPPORT_ZERO_COPY,
            Data::Auto => UBLK_F_AUTO_BUF_REG,
            Data::AutoFallback => UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY,
            Data::BatchCopy => UBLK_F_BATCH_IO,
            Data::BatchAuto => UBLK_F_BATCH_IO | UBLK_F_AUTO_BUF_REG,
        }
    }

    pub(crate) fn is_batch(self) -> bool {
        matches!(self, Data::BatchCopy | Data::BatchAuto)
    }

    /// Whether the server has a buffer for each tag.
    pub(crate) fn has_buffers(self) -> bool {
        matches!(self, Data::Copy | Data::GetData | Data::BatchCopy)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Data::Copy => "copy",
            Data::GetData => "get-data",
            Data::UserCopy => "user-copy",
            Data::ZeroCopy => "zero-copy",
            Data::Auto => "auto",
            Data::AutoFallback => "auto-fallback",
            Data::BatchCopy => "batch-copy",
            Data::BatchAuto => "batch-auto",
        }
    }
}

/// One way to run a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) recovery: Recovery,
    pub(crate) data: Data,
    pub(crate) queues: u16,
    pub(crate) threads: u16,
}

impl Setup {
    pub(crate) fn flags(&self) -> u64 {
        self.recovery.flags() | self.data.flags()
    }
}

impl std::fmt::Display for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Setup { recovery, data, queues, threads } = self;
        write!(f, "{}/{} {queues}q{threads}t", recovery.name(), data.name())
    }
}

/// Queues and threads. More threads than queues need tags of their own for each thread, or batches.
const SHAPES: &[(u16, u16)] = &[(1, 1), (2, 1), (2, 2), (1, 3), (2, 4)];

/// Spreads the rounds of a way of recovery over all that the driver can do: setups and their numbers of rounds.
pub(crate) fn schedule(recovery: Recovery, features: u64, rounds: u32, random: &mut Random) -> Vec<(Setup, u32)> {
    let mut setups = Vec::new();
    // Every way of moving data comes before one comes again.
    for turn in 0..SHAPES.len() {
        let mut part: Vec<Setup> = Data::value_variants()
            .iter()
            .enumerate()
            .filter_map(|(at, &data)| {
                let (queues, threads) = SHAPES[(at + turn) % SHAPES.len()];
                let one_thread_per_queue = !data.is_batch() && features & UBLK_F_PER_IO_DAEMON == 0;
                let threads = if one_thread_per_queue { threads.min(queues) } else { threads };
                let setup = Setup { recovery, data, queues, threads };
                (setup.flags() & !features == 0).then_some(setup)
            })
            .collect();
        random.shuffle(&mut part);
        setups.extend(part);
    }
    let length = (rounds / 20).clamp(2, 12);
    let mut left = rounds;
    let mut schedule = Vec::new();
    for &setup in setups.iter().cycle() {
        if left == 0 {
            break;
        }
        let now = length.min(left);
        schedule.push((setup, now));
        left -= now;
    }
    schedule
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: u64 = UBLK_F_NEED_GET_DATA | UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_USER_COPY;

    #[test]
    fn all_rounds_are_planned() {
        for rounds in [1, 7, 20, 200] {
            let schedule = schedule(Recovery::Reissue, u64::MAX, rounds, &mut Random::new(1, 1));
            assert_eq!(schedule.iter().map(|(_, count)| count).sum::<u32>(), rounds);
        }
    }

    #[test]
    fn two_hundred_rounds_reach_all_data_modes_twice() {
        let schedule = schedule(Recovery::Queue, u64::MAX, 200, &mut Random::new(5, 0));
        for data in Data::value_variants() {
            assert!(schedule.iter().filter(|(setup, _)| setup.data == *data).count() >= 2, "{data:?}");
        }
    }

    #[test]
    fn what_the_driver_lacks_is_left_out() {
        assert!(schedule(Recovery::FailIo, OLD, 20, &mut Random::new(1, 1)).is_empty());
        for (setup, _) in schedule(Recovery::Queue, OLD, 200, &mut Random::new(1, 1)) {
            assert!(setup.flags() & !OLD == 0 && setup.threads <= setup.queues, "{setup}");
        }
    }
}
