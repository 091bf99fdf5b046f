// SPDX-License-Identifier: MIT OR Apache-2.0

//! Witnesses: threads that write numbered versions of blocks and know which ones the disk has acknowledged. Unlike
//! fio's, their knowledge outlives the disk.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::report::Tally;
use crate::store::{LOAD_BYTES, Store, WITNESS_BYTES};
use crate::waiting::{PATIENCE, until};
use ublk_test_common::random::Random;

const THREADS: usize = 3;
const BLOCK: usize = 4096;
const BLOCKS: usize = WITNESS_BYTES as usize / BLOCK / THREADS;
/// After an error. The disk may be without a server.
const PAUSE: Duration = Duration::from_millis(2);

/// Memory as direct I/O wants it.
#[repr(align(4096))]
struct Page([u8; BLOCK]);

/// What a block must hold: a version that was acknowledged, or bytes of that and of the next one, whose write
/// failed or is on its way.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// 0: never written by a witness.
    acknowledged: u64,
    attempted: bool,
}

#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    failed: AtomicU64,
}

/// What one thread knows and reports.
#[derive(Debug)]
struct Knowledge {
    number: usize,
    blocks: Mutex<Vec<Block>>,
    counters: Counters,
}

impl Knowledge {
    fn blocks(&self) -> MutexGuard<'_, Vec<Block>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offset(&self, block: usize) -> u64 {
        LOAD_BYTES + ((self.number * BLOCKS + block) * BLOCK) as u64
    }

    /// The content of a version of a block.
    fn content(&self, block: usize, version: u64, page: &mut [u8; BLOCK]) {
        let mut random = Random::new(version, self.offset(block));
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_ne_bytes());
        }
    }

    fn check(&self, block: usize, expected: Block, found: &[u8; BLOCK]) -> Result<()> {
        if expected.acknowledged == 0 {
            return Ok(());
        }
        let mut old = [0; BLOCK];
        let mut new = [0; BLOCK];
        self.content(block, expected.acknowledged, &mut old);
        self.content(block, expected.acknowledged + u64::from(expected.attempted), &mut new);
        let wrong = (0..BLOCK).find(|&at| found[at] != old[at] && found[at] != new[at]);
        let Some(at) = wrong else { return Ok(()) };
        let offset = self.offset(block);
        let back = (1..=expected.acknowledged.min(1000)).find(|back| {
            self.content(block, expected.acknowledged - back, &mut old);
            *found == old
        });
        let what = back.map_or("unknown data".to_owned(), |back| format!("the version {back} before"));
        bail!(
            "acknowledged data is lost: at {offset}, byte {at}: {what}; version {} was acknowledged (next one tried: {})",
            expected.acknowledged,
            expected.attempted
        )
    }
}

/// All witnesses of a store.
#[derive(Debug)]
pub(crate) struct Witnesses {
    knowledge: Vec<Arc<Knowledge>>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
    ends: Receiver<Result<()>>,
    /// Threads whose end has been noticed already.
    told: usize,
}

impl Witnesses {
    pub(crate) fn new() -> Self {
        let knowledge = (0..THREADS).map(|number| {
            let blocks = Mutex::new(vec![Block::default(); BLOCKS]);
            Arc::new(Knowledge { number, blocks, counters: Counters::default() })
        });
        Witnesses { knowledge: knowledge.collect(), running: None }
    }

    /// Begins to use a disk, unless that has been done.
    pub(crate) fn attach(&mut self, disk: &str, random: &mut Random) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, ends) = mpsc::channel();
        for knowledge in &self.knowledge {
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk);
            let file = file.with_context(|| format!("cannot open {disk}"))?;
            let (knowledge, stop, tell) = (Arc::clone(knowledge), Arc::clone(&stop), tell.clone());
            let random = Random::new(random.next(), 0);
            std::thread::spawn(move || {
                let result = watch(&knowledge, &file, &stop, random);
                drop(file);
                // The receiver is gone if the test has failed already.
                let _ = tell.send(result);
            });
        }
        self.running = Some(Running { stop, ends, told: 0 });
        Ok(())
    }

    /// Ends the use of the disk. All requests must be able to end.
    pub(crate) fn detach(&mut self) -> Result<()> {
        self.end()?.into_iter().collect()
    }

    /// The same after a failure.
    pub(crate) fn abandon(&mut self) -> Result<()> {
        self.end().map(drop)
    }

    /// What the threads end with.
    fn end(&mut self) -> Result<Vec<Result<()>>> {
        let Some(Running { stop, ends, told }) = self.running.take() else { return Ok(Vec::new()) };
        stop.store(true, Ordering::Relaxed);
        let begin = Instant::now();
        (told..THREADS)
            .map(|_| {
                let left = PATIENCE.saturating_sub(begin.elapsed());
                ends.recv_timeout(left).context("a request of a witness does not end")
            })
            .collect()
    }

    /// Waits until each thread has had a request that went well: nothing is held any more.
    pub(crate) fn progress(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        let done = |knowledge: &Knowledge| knowledge.counters.done.load(Ordering::Relaxed);
        for knowledge in self.knowledge.clone() {
            // Two: the first may have ended before the server died.
            let goal = done(&knowledge) + 2;
            until("requests of the witnesses", || {
                self.complaint()?;
                Ok((done(&knowledge) >= goal).then_some(()))
            })?;
        }
        Ok(begin.elapsed())
    }

    /// What a thread has complained of so far.
    fn complaint(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let Ok(end) = running.ends.try_recv() else { return Ok(()) };
        running.told += 1;
        end.and_then(|()| bail!("a witness has ended"))
    }

    /// Compares the store with what was acknowledged. No server may be running.
    pub(crate) fn compare(&mut self, store: &Store) -> Result<()> {
        self.complaint()?;
        let mut page = [0; BLOCK];
        for knowledge in &self.knowledge {
            for at in 0..BLOCKS {
                // Requests may be acknowledged still, whose data is there: know first, look later.
                let expected = knowledge.blocks()[at];
                store.read(knowledge.offset(at), &mut page)?;
                knowledge.check(at, expected, &page)?;
            }
        }
        Ok(())
    }

    pub(crate) fn tally(&self, tally: &mut Tally) {
        for knowledge in &self.knowledge {
            tally.witness_ios += knowledge.counters.done.load(Ordering::Relaxed);
            tally.witness_errors += knowledge.counters.failed.load(Ordering::Relaxed);
        }
    }
}

/// A thread's life.
fn watch(knowledge: &Knowledge, file: &File, stop: &AtomicBool, mut random: Random) -> Result<()> {
    let mut page = Box::new(Page([0; BLOCK]));
    while !stop.load(Ordering::Relaxed) {
        let at = random.below(BLOCKS as u64) as usize;
        let offset = knowledge.offset(at);
        let outcome = if random.chance(60) {
            let version = {
                let mut blocks = knowledge.blocks();
                blocks[at].attempted = true;
                blocks[at].acknowledged + 1
            };
            knowledge.content(at, version, &mut page.0);
            let outcome = file.write_at(&page.0, offset);
            if matches!(outcome, Ok(BLOCK)) {
                knowledge.blocks()[at] = Block { acknowledged: version, attempted: false };
            }
            outcome
        } else {
            let outcome = file.read_at(&mut page.0, offset);
            if matches!(outcome, Ok(BLOCK)) {
                // No other thread writes this block.
                let expected = knowledge.blocks()[at];
                knowledge.check(at, expected, &page.0)?;
            }
            outcome
        };
        match outcome {
            Ok(BLOCK) => {
                knowledge.counters.done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(length @ 1..) => bail!("{length} bytes of a block were moved"),
            // A disk that is gone has no data.
            Ok(0) | Err(_) => {
                knowledge.counters.failed.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knowledge() -> Knowledge {
        Knowledge { number: 1, blocks: Mutex::new(Vec::new()), counters: Counters::default() }
    }

    #[test]
    fn only_what_was_acknowledged_or_tried_next_will_do() {
        let knowledge = knowledge();
        let (mut old, mut new) = ([0; BLOCK], [0; BLOCK]);
        knowledge.content(3, 7, &mut old);
        knowledge.content(3, 8, &mut new);
        let sure = Block { acknowledged: 7, attempted: false };
        let unsure = Block { acknowledged: 7, attempted: true };
        assert!(knowledge.check(3, sure, &old).is_ok());
        assert!(knowledge.check(3, sure, &new).is_err());
        assert!(knowledge.check(3, unsure, &new).is_ok());
        // A write that was cut short.
        old[..99].copy_from_slice(&new[..99]);
        assert!(knowledge.check(3, unsure, &old).is_ok());
        assert!(knowledge.check(3, sure, &old).is_err());
        let error = knowledge.check(3, Block { acknowledged: 10, attempted: false }, &new).unwrap_err();
        assert!(error.to_string().contains("the version 2 before"), "{error}");
    }
}
