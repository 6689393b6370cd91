//! Blocks of a disk that are written and read by several jobs at a time. Every block holds its number and how often it was written, so that it shows
//! when a write got lost, was torn, or was done again after a later one; and a buffer that was read into shows when that is done again later.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::random::Random;

const BLOCK: usize = 4096;
/// Blocks of each job, one after the other from the disk's beginning.
const BLOCKS: usize = 128;
/// The most blocks in one request.
const RUN: usize = 16;
/// Buffers of each job.
const BUFFERS: usize = 8;
/// What a buffer holds that nobody is to touch.
const POISON: u8 = 0xa5;

/// As a disk that is not cached wants it.
#[repr(C, align(4096))]
struct Buffer([u8; RUN * BLOCK]);

struct Job {
    disk: File,
    /// Its first block.
    first: usize,
    /// How often each of its blocks was written.
    written: Vec<u32>,
    /// Boxed: requests know them by where they are.
    buffers: Vec<Box<Buffer>>,
    random: Random,
    requests: u64,
    longest: Duration,
}

/// Keeps `jobs` jobs at it until there is a file `stop`. Prints `hammering` when it begins, and at the end `N requests, all right, the longest took T ms`.
pub fn hammer(disk: &str, jobs: usize, stop: &Path) -> Result<(), Box<dyn Error>> {
    let jobs: Vec<Job> = (0..jobs)
        .map(|index| Job::new(disk, index.saturating_mul(BLOCKS)))
        .collect::<Result<_, _>>()?;
    println!("hammering");
    let mut done = Vec::new();
    thread::scope(|scope| {
        let threads: Vec<_> = jobs
            .into_iter()
            .map(|job| scope.spawn(move || job.run(stop)))
            .collect();
        for thread in threads {
            done.push(thread.join().unwrap_or_else(|_| Err("panicked".into())));
        }
    });
    let (mut requests, mut longest) = (0u64, Duration::ZERO);
    for result in done {
        let (count, time) = result?;
        requests = requests.saturating_add(count);
        longest = longest.max(time);
    }
    println!(
        "{requests} requests, all right, the longest took {} ms",
        longest.as_millis()
    );
    Ok(())
}

impl Job {
    fn new(disk: &str, first: usize) -> Result<Self, Box<dyn Error>> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(disk);
        Ok(Self {
            disk: opened.map_err(|error| format!("{disk}: {error}"))?,
            first,
            written: vec![0; BLOCKS],
            buffers: (0..BUFFERS)
                .map(|_| Box::new(Buffer([POISON; RUN * BLOCK])))
                .collect(),
            random: Random::seeded(first as u64),
            requests: 0,
            longest: Duration::ZERO,
        })
    }

    /// How many requests it made, and the longest that one took; or what was wrong.
    fn run(mut self, stop: &Path) -> Result<(u64, Duration), String> {
        for at in (0..BLOCKS).step_by(RUN) {
            self.write(at, RUN)?;
        }
        while !stop.exists() {
            let at = self.below(BLOCKS);
            let count = self
                .below(RUN.min(BLOCKS.saturating_sub(at)))
                .saturating_add(1);
            match self.random.word() % 16 {
                0 => self.flush()?,
                1..8 => self.write(at, count)?,
                _ => self.read(at, count)?,
            }
        }
        for at in (0..BLOCKS).step_by(RUN) {
            self.read(at, RUN)?;
        }
        self.flush()?;
        if self.buffers.iter().any(|buffer| buffer.was_touched()) {
            return Err("a read was done again".to_owned());
        }
        Ok((self.requests, self.longest))
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.random.word() as usize)
            .checked_rem(limit)
            .unwrap_or_default()
    }

    /// A buffer, which nobody has touched since it was used last.
    fn take(&mut self) -> Result<Box<Buffer>, String> {
        let index = self.below(self.buffers.len());
        let buffer = self.buffers.swap_remove(index);
        if buffer.was_touched() {
            return Err("a read was done again".to_owned());
        }
        Ok(buffer)
    }

    fn give_back(&mut self, mut buffer: Box<Buffer>) {
        buffer.0.fill(POISON);
        self.buffers.push(buffer);
    }

    fn write(&mut self, at: usize, count: usize) -> Result<(), String> {
        let mut buffer = self.take()?;
        for (index, block) in (at..).zip(buffer.blocks(count)) {
            let times = self.written.get_mut(index).ok_or("no such block")?;
            *times = times.wrapping_add(1);
            let mark = mark(self.first.saturating_add(index), *times);
            block.as_chunks_mut().0.fill(mark);
        }
        self.transfer(at, |disk, offset| {
            disk.write_all_at(buffer.bytes(count), offset)
        })?;
        self.give_back(buffer);
        Ok(())
    }

    fn read(&mut self, at: usize, count: usize) -> Result<(), String> {
        let mut buffer = self.take()?;
        self.transfer(at, |disk, offset| {
            disk.read_exact_at(buffer.bytes(count), offset)
        })?;
        for (index, block) in (at..).zip(buffer.blocks(count)) {
            let number = self.first.saturating_add(index);
            let times = *self.written.get(index).ok_or("no such block")?;
            let mark = mark(number, times);
            if let Some(wrong) = block.as_chunks().0.iter().find(|found| **found != mark) {
                return Err(format!(
                    "block {number} holds {wrong:x?}, and not {mark:x?} as written last"
                ));
            }
        }
        self.give_back(buffer);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        self.transfer(0, |disk, _| disk.sync_data())
    }

    fn transfer(
        &mut self,
        at: usize,
        request: impl FnOnce(&File, u64) -> std::io::Result<()>,
    ) -> Result<(), String> {
        let offset = self.first.saturating_add(at).saturating_mul(BLOCK) as u64;
        let begin = Instant::now();
        request(&self.disk, offset).map_err(|error| format!("at byte {offset}: {error}"))?;
        self.longest = self.longest.max(begin.elapsed());
        self.requests = self.requests.saturating_add(1);
        Ok(())
    }
}

impl Buffer {
    fn bytes(&mut self, blocks: usize) -> &mut [u8] {
        self.0
            .get_mut(..blocks.saturating_mul(BLOCK))
            .unwrap_or_default()
    }

    fn blocks(&mut self, count: usize) -> impl Iterator<Item = &mut [u8]> {
        self.0.chunks_exact_mut(BLOCK).take(count)
    }

    fn was_touched(&self) -> bool {
        self.0.iter().any(|byte| *byte != POISON)
    }
}

/// What a block is full of that was written for the `times`th time.
fn mark(number: usize, times: u32) -> [u8; 8] {
    (u64::from(times) << 32 | number as u64).to_be_bytes()
}
