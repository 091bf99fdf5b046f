// SPDX-License-Identifier: MIT OR Apache-2.0

//! The disk's side: who has it open, what it is asked for, and what it looks like.

use std::time::Instant;

use anyhow::Result;

use super::params::ZONE;
use super::{CLIENTS, Job, PATIENCE, Sequence, State, number};
use crate::agent::{Answer, BlockOrder, Order};
use ublk_test_common::uapi::*;

/// Attributes in `/sys/block/ublkbN`.
const ATTRIBUTES: &[&str] = &[
    "size",
    "ro",
    "removable",
    "hidden",
    "range",
    "ext_range",
    "capability",
    "discard_alignment",
    "alignment_offset",
    "queue/logical_block_size",
    "queue/physical_block_size",
    "queue/minimum_io_size",
    "queue/optimal_io_size",
    "queue/max_sectors_kb",
    "queue/max_hw_sectors_kb",
    "queue/max_segments",
    "queue/max_segment_size",
    "queue/max_discard_segments",
    "queue/max_integrity_segments",
    "queue/dma_alignment",
    "queue/virt_boundary_mask",
    "queue/discard_granularity",
    "queue/discard_max_hw_bytes",
    "queue/discard_max_bytes",
    "queue/write_zeroes_max_bytes",
    "queue/write_zeroes_unmap_max_hw_bytes",
    "queue/rotational",
    "queue/write_cache",
    "queue/fua",
    "queue/zoned",
    "queue/chunk_sectors",
    "queue/nr_zones",
    "queue/max_open_zones",
    "queue/max_active_zones",
    "queue/zone_append_max_bytes",
    "queue/nr_requests",
    "queue/scheduler",
    "queue/stable_writes",
    "queue/iostats",
    "queue/add_random",
    "queue/nomerges",
    "queue/rq_affinity",
    "queue/io_poll",
    "queue/dax",
    "queue/io_timeout",
    "queue/atomic_write_max_bytes",
    "mq/0/cpu_list",
    "mq/0/nr_tags",
    "mq/1/cpu_list",
    "integrity/format",
    "integrity/tag_size",
    "integrity/protection_interval_bytes",
    "integrity/device_is_integrity_capable",
    "integrity/read_verify",
    "integrity/write_generate",
    "partscan",
];

impl Sequence<'_> {
    /// What the disk looks like from outside.
    pub(super) fn look(&mut self) -> Result<()> {
        let id = self.device()?.id;
        let context = self.context();
        let paths: Vec<String> = ATTRIBUTES.iter().map(|name| format!("/sys/block/ublkb{id}/{name}")).collect();
        let Answer::Texts(texts) = self.crew.root.order(0, &Order::Read(paths))? else {
            anyhow::bail!("a strange answer");
        };
        let outputs: Vec<String> = ATTRIBUTES
            .iter()
            .zip(texts)
            .map(|(name, text)| match text {
                Ok(text) => format!("{name}={}", text.replace(['\n', '\t'], " ")),
                Err(errno) => format!("{name}={}", number(errno)),
            })
            .collect();
        self.record("sysfs", "ok", &context, "", "0", outputs.join(" "))
    }

    /// Which nodes there are.
    pub(super) fn look_for_nodes(&mut self) -> Result<()> {
        let id = self.device()?.id;
        let context = self.context();
        let paths = vec![
            format!("/dev/ublkc{id}"),
            format!("/dev/ublkb{id}"),
            format!("/sys/class/ublk-char/ublkc{id}"),
            format!("/sys/block/ublkb{id}"),
        ];
        let Answer::Texts(texts) = self.crew.root.order(0, &Order::Exist(paths))? else {
            anyhow::bail!("a strange answer");
        };
        let found: Vec<String> = texts.into_iter().map(|text| text.unwrap_or_default()).collect();
        self.record("nodes", "ok", &context, "char,disk,class,block", found.join(","), String::new())
    }

    /// Opens the disk in a client's thread.
    pub(super) fn open_disk(&mut self, thread: usize, write: bool, exclusive: bool) -> Result<()> {
        let id = self.device()?.id;
        let text = format!("open write={write} excl={exclusive}");
        let outputs = self.job(thread, &Order::OpenDisk { id, write, exclusive }, &text, (0, u64::MAX), true)?;
        self.opened[thread] = outputs.contains("-> 0");
        self.writable[thread] = write && self.opened[thread];
        Ok(())
    }

    /// Closes it.
    pub(super) fn close_disk(&mut self, thread: usize) -> Result<()> {
        if self.opened[thread] && self.jobs[thread].is_none() {
            self.opened[thread] = false;
            self.job(thread, &Order::CloseDisk, "close", (0, u64::MAX), true)?;
        }
        Ok(())
    }

    /// Gives a client's thread something to do, and waits until it is done or cannot go on.
    fn job(&mut self, thread: usize, order: &Order, text: &str, range: (u64, u64), flushes: bool) -> Result<String> {
        let context = self.context();
        self.begin_job(thread, order, text, range, flushes)?;
        let instant = self.never_reaches_driver(thread, order);
        if let Some(job) = &mut self.jobs[thread] {
            job.instant = instant;
        }
        self.settle()?;
        if self.events.is_empty() {
            // Whether its request has got anywhere does not show.
            self.await_client(thread)?;
            self.settle()?;
        }
        let events = self.take_events();
        let result = if self.jobs[thread].is_some() { "waits" } else { "done" };
        let name = text.split(' ').next().unwrap_or_default();
        self.record(
            &format!("disk-{name}"),
            "ok",
            &context,
            &format!("client{thread} {text}"),
            result,
            events.clone(),
        )?;
        Ok(events)
    }

    /// Whether the block layer answers by itself.
    fn never_reaches_driver(&self, thread: usize, order: &Order) -> bool {
        let Some(device) = &self.device else { return true };
        let Order::Block(order) = order else { return false };
        let params = &device.params;
        // Memory of such a length is not aligned where it ends.
        if params.types & UBLK_PARAM_TYPE_DMA_ALIGN != 0
            && let BlockOrder::Read(_, len) | BlockOrder::Write(_, len, _) | BlockOrder::WriteSync(_, len, _) = order
            && len & params.dma.alignment != 0
        {
            return true;
        }
        let read_only = !self.writable[thread] || params.basic.attrs & UBLK_ATTR_READ_ONLY != 0;
        match order {
            BlockOrder::Size | BlockOrder::Metadata => true,
            BlockOrder::Read(offset, _) => offset % 512 != 0 || offset >> 9 >= params.basic.dev_sectors,
            BlockOrder::Write(offset, len, _) => read_only || len % 512 != 0 || offset >> 9 >= params.basic.dev_sectors,
            BlockOrder::WriteSync(..) | BlockOrder::ZeroOut(..) => read_only,
            BlockOrder::Flush => params.basic.attrs & UBLK_ATTR_VOLATILE_CACHE == 0,
            BlockOrder::Discard(offset, _) => {
                read_only
                    || offset % 512 != 0
                    || params.types & UBLK_PARAM_TYPE_DISCARD == 0
                    || params.discard.max_discard_sectors == 0
            }
            BlockOrder::ReportZones(..) | BlockOrder::Zone(..) => !device.has(UBLK_F_ZONED),
            BlockOrder::Rescan => false,
        }
    }

    fn begin_job(&mut self, thread: usize, order: &Order, text: &str, range: (u64, u64), flushes: bool) -> Result<()> {
        let queue = self.device.as_ref().map_or(0, |device| device.queue_of[CLIENTS[thread]]);
        self.crew.client.send(thread, order)?;
        self.jobs[thread] = Some(Job {
            text: text.to_owned(),
            first: range.0,
            last: range.1,
            flushes,
            queue,
            exclusive: matches!(order, Order::Block(BlockOrder::Discard(..) | BlockOrder::ZeroOut(..))),
            instant: false,
            ended: false,
            given_up: false,
        });
        Ok(())
    }

    /// The sectors that belong to a client's thread.
    fn region(&self, thread: usize) -> Result<(u64, u64)> {
        let sectors = self.device()?.params.basic.dev_sectors;
        let size = sectors / CLIENTS.len() as u64 / 256 * 256;
        Ok((size * thread as u64, size))
    }

    /// A thread that has the disk open and nothing to do.
    pub(super) fn idle_client(&mut self) -> Option<usize> {
        let idle: Vec<usize> =
            (0..CLIENTS.len()).filter(|thread| self.opened[*thread] && self.jobs[*thread].is_none()).collect();
        if idle.is_empty() { None } else { Some(self.random.pick(&idle)) }
    }

    /// A request of a client, such that the block layer makes one request of it, or none.
    pub(super) fn request(&mut self, thread: usize) -> Result<()> {
        let device = self.device()?.clone();
        let (first, size) = self.region(thread)?;
        if size == 0 {
            return Ok(());
        }
        // What a zone allows is the block layer's business: whether a request gets to the driver shows
        // only where nothing holds it up. It has a thread for writes that wait for others.
        let queue = device.queue_of[CLIENTS[thread]];
        let free = device.state == State::Live && !device.quiesced && self.armed(queue) > 0;
        if device.has(UBLK_F_ZONED) && (!free || self.jobs.iter().any(Option::is_some)) {
            return Ok(());
        }
        let basic = device.params.basic;
        let block = 1u64 << (basic.logical_bs_shift.clamp(9, 12) - 9);
        let mut most = u64::from(basic.max_sectors).min(256);
        if device.params.types & UBLK_PARAM_TYPE_INTEGRITY != 0 {
            // The metadata of a request is limited, too.
            most = most.min(8);
        }
        if basic.chunk_sectors.is_power_of_two() {
            most = most.min(u64::from(basic.chunk_sectors));
        }
        // Powers of two at multiples of themselves are never split: limits are rounded to physical blocks.
        let sizes: Vec<u64> =
            [block, 8, 16, 32, 64, 128].into_iter().filter(|n| *n <= most && n % block == 0).collect();
        let count = if sizes.is_empty() { block } else { self.random.pick(&sizes) };
        let step = count.next_power_of_two();
        let sector = first + self.random.below((size / step).max(1)) * step;
        let flushing = self.jobs.iter().flatten().any(|job| job.flushes);
        let salt = self.random.below(1 << 20);
        let range = (first, first + size);
        let zoned = device.has(UBLK_F_ZONED);
        let (offset, len) = (sector << 9, (count << 9) as u32);
        let discard = u64::from(device.params.discard.max_discard_sectors);
        let zeroes = u64::from(device.params.discard.max_write_zeroes_sectors);
        let with_discard = device.params.types & UBLK_PARAM_TYPE_DISCARD != 0;
        let kind = self.random.weighted(&[
            (30, "read"),
            (30, "write"),
            (10, "sync"),
            (8, "flush"),
            (8, "discard"),
            (6, "zeroout"),
            (3, "misaligned"),
            (2, "beyond"),
            (2, "size"),
            (1, "metadata"),
            (if zoned { 12 } else { 1 }, "report"),
            (if zoned { 12 } else { 1 }, "zone"),
        ]);
        let single_flush = |kind: &str| matches!(kind, "sync" | "flush" | "zone" | "report");
        // What passes a flush, and what does not, is chance.
        if flushing || (single_flush(kind) && self.jobs.iter().any(Option::is_some)) {
            return Ok(());
        }
        // These two hold a lock on the disk's inode until they are done.
        if matches!(kind, "discard" | "zeroout") && self.jobs.iter().flatten().any(|job| job.exclusive) {
            return Ok(());
        }
        let (order, text) = match kind {
            "read" => (BlockOrder::Read(offset, len), format!("read {sector}+{count}")),
            "write" if zoned => {
                // Sequential zones take writes at their write pointer only; the zones say they are empty.
                let zone = sector / u64::from(ZONE) * u64::from(ZONE);
                (BlockOrder::Write(zone << 9, len, salt), format!("write {zone}+{count} salt={salt}"))
            }
            "write" => (BlockOrder::Write(offset, len, salt), format!("write {sector}+{count} salt={salt}")),
            "sync" if !zoned => {
                (BlockOrder::WriteSync(offset, len, salt), format!("sync {sector}+{count} salt={salt}"))
            }
            "sync" | "flush" => (BlockOrder::Flush, "flush".to_owned()),
            "discard" => {
                let unit = u64::from(device.params.discard.discard_granularity >> 9).max(8).next_power_of_two();
                let count = unit.min(if with_discard && discard > 0 { discard } else { unit });
                let sector = first + self.random.below((size / unit).max(1)) * unit;
                (BlockOrder::Discard(sector << 9, count << 9), format!("discard {sector}+{count}"))
            }
            "zeroout" => {
                let count = if with_discard && zeroes > 0 { 8.min(zeroes) } else { 8 };
                let sector = sector / 8 * 8;
                (BlockOrder::ZeroOut(sector << 9, count << 9), format!("zeroout {sector}+{count}"))
            }
            "misaligned" => match self.random.index(3) {
                0 => (BlockOrder::Read(offset + 256, 512), format!("misaligned read {sector}")),
                1 => (BlockOrder::Write(offset, 100, salt), format!("misaligned write {sector}")),
                _ => (BlockOrder::Discard(offset + 17, 512), format!("misaligned discard {sector}")),
            },
            "beyond" => {
                let end = device.params.basic.dev_sectors << 9;
                if self.random.chance(50) {
                    (BlockOrder::Read(end, 4096), "beyond read".to_owned())
                } else {
                    (BlockOrder::Write(end, 4096, salt), "beyond write".to_owned())
                }
            }
            "size" => (BlockOrder::Size, "size".to_owned()),
            "metadata" => (BlockOrder::Metadata, "metadata".to_owned()),
            "report" => {
                let zone = sector / u64::from(ZONE) * u64::from(ZONE);
                let count = self.random.pick(&[1, 2, 4]);
                (BlockOrder::ReportZones(zone, count), format!("report {zone} {count}"))
            }
            _ => {
                let what = self.random.below(4) as u8;
                let zone = sector / u64::from(ZONE) * u64::from(ZONE);
                (BlockOrder::Zone(what, zone, ZONE.into()), format!("zone {what} {zone}"))
            }
        };
        let flushes = single_flush(kind);
        let range = if zoned { (first / u64::from(ZONE) * u64::from(ZONE), first + size) } else { range };
        self.job(thread, &Order::Block(order), &text, range, flushes).map(drop)
    }

    /// A large request, all parts of which are answered as they come.
    pub(super) fn large_request(&mut self, thread: usize) -> Result<()> {
        let (first, size) = self.region(thread)?;
        let device = self.device()?.clone();
        if size < 256 || device.has(UBLK_F_ZONED) || self.jobs.iter().any(Option::is_some) {
            return Ok(());
        }
        // Each part costs the whole way there and back.
        let most = 6 * u64::from(device.params.basic.max_sectors.max(8));
        let count = self.random.pick(&[64, 200, 256, 512]).min(size).min(most);
        let sector = first + self.random.pick(&[0, 8, 32]).min(size - count);
        let salt = self.random.below(1 << 20);
        let (order, text) = match self.random.index(5) {
            0 | 1 => (BlockOrder::Read(sector << 9, (count << 9) as u32), format!("read {sector}+{count}")),
            2 | 3 => (
                BlockOrder::Write(sector << 9, (count << 9) as u32, salt),
                format!("write {sector}+{count} salt={salt}"),
            ),
            _ => (BlockOrder::ZeroOut(sector << 9, count << 9), format!("zeroout {sector}+{count}")),
        };
        let context = self.context();
        self.begin_job(thread, &Order::Block(order), &text, (first, first + size), true)?;
        self.quiet = true;
        let served = self.serve();
        self.quiet = false;
        served?;
        let events = self.take_events();
        let result = if self.jobs[thread].is_some() { "waits" } else { "done" };
        self.record("disk-large", "ok", &context, &format!("client{thread} {text}"), result, events)
    }

    /// Answers requests until no client waits.
    fn serve(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.pump()?;
            while let Some(request) = self.requests.first().cloned() {
                self.answer_alone(&request)?;
                self.pump()?;
            }
            if self.jobs.iter().all(Option::is_none) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.events.push("TIMEOUT serve".into());
                self.give_up();
                return Ok(());
            }
            self.sleep(left)?;
        }
    }
}
