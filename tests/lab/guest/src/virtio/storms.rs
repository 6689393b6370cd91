//! Mistakes by chance. MSI-X stays off, so that no message goes astray in the guest itself.

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::disk::{
    DEVICE_CONFIG, Device, NOTIFY, NOTIFY_END, QUEUE_ADDRESSES, QUEUE_ENABLE, QUEUE_RESET,
    QUEUE_SELECT, QUEUE_SIZE, RING_SIZE, STATUS, WORKS,
};
use super::ring::{DATA, Descriptor, IN, INDIRECT, NEXT, RING, Ring, SCRATCH, WRITE};
use crate::memory::Memory;
use crate::random::Random;

/// Offset of BAR 4 in configuration space.
const BAR_REGISTER: u64 = 0x20;

pub type Step = fn(&mut Storms, &Device<'_>, &mut Ring<'_>) -> Result<(), Box<dyn Error>>;

/// Mistakes by chance, as fast as they go.
pub struct Storms {
    random: Random,
    nowhere: [u64; 6],
}

impl Storms {
    /// Those that use addresses have them from `nowhere`, or in the device's memory: never in somebody else's.
    pub fn new(nowhere: [u64; 6]) -> Self {
        let random = Random::new();
        Self { random, nowhere }
    }

    /// Steps, for `duration`, from a device that works, which is reset whenever it needs it. How many.
    pub fn rage(
        &mut self,
        device: &mut Device<'_>,
        duration: Duration,
        step: Step,
    ) -> Result<u32, Box<dyn Error>> {
        let (begin, mut count) = (Instant::now(), 0u32);
        let mut ring = device.start(&|_| ())?;
        while begin.elapsed() < duration {
            step(self, device, &mut ring)?;
            count = count.saturating_add(1);
            if device.read(STATUS)? != WORKS {
                ring = device.start(&|_| ())?;
            }
        }
        device.serve_honestly()?;
        Ok(count)
    }

    fn of<T: Copy + Default>(&mut self, choices: &[T]) -> T {
        self.random.of(choices).unwrap_or_default()
    }

    fn address(&mut self, memory: &Memory) -> u64 {
        let nowhere = self.nowhere;
        match self.random.word() % 8 {
            0 => self.of(&nowhere),
            _ => memory.physical(self.of(&[
                RING,
                SCRATCH,
                DATA,
                DATA + 1,
                DATA + 512,
                DATA + 0x1000,
            ])),
        }
    }

    /// Random descriptors, tables and indices.
    pub fn noise(
        &mut self,
        device: &Device<'_>,
        ring: &mut Ring<'_>,
    ) -> Result<(), Box<dyn Error>> {
        let memory = ring.memory;
        for table in [RING, SCRATCH] {
            for index in 0..RING_SIZE {
                let descriptor = Descriptor {
                    address: self.address(memory),
                    len: self.of(&[0, 1, 15, 16, 16, 32, 64, 512, 512, 4096, u32::MAX]),
                    flags: self.of(&[0, NEXT, NEXT, NEXT | WRITE, WRITE, INDIRECT, u16::MAX]),
                    next: self.of(&[0, 1, 2, 3, 5, 15, 16, u16::MAX]),
                };
                descriptor.put(memory, table, index);
            }
        }
        // Headers: types that there are and others, sectors that there are and others; not those that an honest request reads.
        for place in [SCRATCH, DATA, DATA + 512] {
            memory.set32(place, self.of(&[0, 1, 4, 8, 11, 13, 99, u32::MAX]));
            memory.set64(
                place.saturating_add(8),
                self.of(&[16, 99, 1 << 20, u64::MAX]),
            );
        }
        for _ in 0..self.random.word() % 4 {
            let head = self.of(&[0, 1, 2, 3, 7, 15, RING_SIZE, u16::MAX]);
            ring.offer(head);
        }
        device.notify(0)
    }

    /// Random values in all registers; only addresses are chosen.
    pub fn registers(
        &mut self,
        device: &Device<'_>,
        ring: &mut Ring<'_>,
    ) -> Result<(), Box<dyn Error>> {
        let (word, other) = (self.random.word(), self.random.word());
        match self.random.word() % 10 {
            0 => {
                let register = self.of(&QUEUE_ADDRESSES);
                let address = self.address(ring.memory);
                device.write_address(register, address)
            }
            1 => device.write(
                QUEUE_SIZE,
                self.of(&[0, 1, 2, 3, 16, 256, 257, 32768, 65535]),
            ),
            2 => device.write(QUEUE_SELECT, self.of(&[0, 0, 0, 1, 65535])),
            3 => device.write(QUEUE_ENABLE, self.of(&[0, 1, 1, 2])),
            4 => device.write(QUEUE_RESET, self.of(&[0, 1, 1, 2])),
            5 => device.write(STATUS, word & 0xff),
            6 => device.bar.write(
                DEVICE_CONFIG.saturating_add((word % 0x100) as usize),
                1,
                other,
            ),
            7 => device
                .bar
                .write(NOTIFY.saturating_add((word % 64) as usize), 1, other),
            // Features, vectors; and what is read-only. Not the addresses.
            8 => device.bar.write((word % 32) as usize, 1, other & 0xff),
            _ => device.bar.read((word % 0x8000) as usize, 1).map(drop),
        }
    }

    pub fn notifications(
        &mut self,
        device: &Device<'_>,
        _: &mut Ring<'_>,
    ) -> Result<(), Box<dyn Error>> {
        let place = NOTIFY.saturating_add((self.random.word() as usize) % (NOTIFY_END - NOTIFY));
        device.bar.write(place & !3, 4, self.random.word())
    }

    /// A reset while the device has requests, which are to end before it has ended.
    pub fn resets(
        &mut self,
        device: &Device<'_>,
        ring: &mut Ring<'_>,
    ) -> Result<(), Box<dyn Error>> {
        for head in [0, 3, 6, 9, 12] {
            ring.put_request(head, IN, 0, 0x10_0000);
            ring.offer(head);
        }
        device.notify(0)?;
        device.reset()
    }

    /// The device's registers where other things are, or nothing can be.
    pub fn moves(&mut self, device: &Device<'_>, _: &mut Ring<'_>) -> Result<(), Box<dyn Error>> {
        let nowhere = self.nowhere;
        let address = self.of(&nowhere);
        for address in [address, device.address] {
            for (half, offset) in [(address, BAR_REGISTER), (address >> 32, BAR_REGISTER + 4)] {
                let bytes = ((half & 0xffff_ffff) as u32).to_le_bytes();
                device.function.config.write_all_at(&bytes, offset)?;
            }
        }
        Ok(())
    }
}
