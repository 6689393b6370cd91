//! A guest in the process, and drivers of both ring formats: simple ones, which put everything into the
//! guest's memory byte by byte as the specification says, and share no code with the device's side.
#![allow(dead_code)]

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio::Features;
use virtio::device::{Activation, Device, Events};
use virtio::memory::{GuestRam, Memfd, PAGE_SIZE, View};
use virtio::queue::{Queue, QueueConfig, QueueError, Record};
use vm_memory::{Bytes, GuestAddress};

/// Where the rings of queue 0 are; each queue has RING_SPACE for them.
pub const RINGS: u64 = 0x1_0000;
pub const RING_SPACE: u64 = 0x1_0000;
const DRIVER: u64 = 0x8000;
const DEVICE: u64 = 0xa000;
/// Where buffers begin.
pub const BUFFERS: u64 = 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Hears nothing, and takes no failure.
pub struct Nobody;

impl Events for Nobody {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &dyn Display) {
        panic!("{why}");
    }
}

/// A guest's memory.
pub struct Guest {
    pub memory: Memfd,
    pub ram: Arc<GuestRam>,
}

impl Guest {
    pub fn new(pages: usize) -> Self {
        let memory = Memfd::new(pages).unwrap();
        let ram = Arc::new(GuestRam::new(Arc::new(memory.clone()), 64));
        Self { memory, ram }
    }

    pub fn view(&self) -> Arc<View> {
        self.ram.view()
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.view()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub fn write_u16(&self, address: u64, value: u16) {
        self.write(address, &value.to_le_bytes());
    }

    pub fn read_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }

    pub fn read_u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().unwrap())
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new(4 << 20 >> 12)
    }
}

/// A buffer of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub address: u64,
    pub len: u32,
    pub write: bool,
}

pub fn readable(address: u64, len: u32) -> Part {
    Part {
        address,
        len,
        write: false,
    }
}

pub fn writable(address: u64, len: u32) -> Part {
    Part {
        address,
        len,
        write: true,
    }
}

/// The driver's side of a queue.
pub struct Driver {
    pub config: QueueConfig,
    pub features: Features,
    pub record: Record,
    ring: Ring,
    in_flight: HashMap<u16, Vec<u16>>,
}

enum Ring {
    Split {
        free: Vec<u16>,
        available: u16,
        used: u16,
    },
    Packed {
        free: Vec<u16>,
        slots: u16,
        available: (u16, bool),
        used: (u16, bool),
    },
}

impl Driver {
    /// Queue `index` of a device, with `size` descriptors.
    pub fn new(index: u16, size: u16, features: Features) -> Self {
        let base = RINGS + u64::from(index) * RING_SPACE;
        let mut config = QueueConfig::new(size);
        config.descriptors = base;
        config.driver = base + DRIVER;
        config.device = base + DEVICE;
        config.ready = true;
        let ring = if features.contains(Features::RING_PACKED) {
            Ring::Packed {
                free: (0..size).rev().collect(),
                slots: size,
                available: (0, true),
                used: (0, true),
            }
        } else {
            Ring::Split {
                free: (0..size).rev().collect(),
                available: 0,
                used: 0,
            }
        };
        Self {
            config,
            features: features | Features::VERSION_1,
            record: Record::volatile(size).unwrap(),
            ring,
            in_flight: HashMap::new(),
        }
    }

    /// The same where there has been a queue before.
    pub fn again(guest: &Guest, index: u16, size: u16, features: Features) -> Self {
        let driver = Self::new(index, size, features);
        guest.write(driver.config.descriptors, &[0; RING_SPACE as usize]);
        driver
    }

    pub fn try_queue(&self, guest: &Guest) -> Result<Queue, QueueError> {
        self.config
            .activate(&guest.view(), self.features, self.record.clone())
    }

    /// The device's side. A second one goes on where the first one was left.
    pub fn queue(&self, guest: &Guest) -> Queue {
        self.try_queue(guest).unwrap()
    }

    pub fn descriptor(&self, guest: &Guest, table: u64, index: u16, part: Part, x: u16, y: u16) {
        let mut bytes = part.address.to_le_bytes().to_vec();
        bytes.extend(part.len.to_le_bytes());
        let words = match self.ring {
            Ring::Split { .. } => [x, y],
            Ring::Packed { .. } => [y, x],
        };
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        guest.write(table + u64::from(index) * 16, &bytes);
    }

    /// Makes a chain available, by a table at `table` if there is one. Returns its number, or
    /// None if the ring is full.
    pub fn offer(&mut self, guest: &Guest, parts: &[Part], table: Option<u64>) -> Option<u16> {
        if let Some(table) = table {
            let last = parts.len() - 1;
            for (index, part) in parts.iter().enumerate() {
                let next = if index < last { NEXT } else { 0 };
                let split = matches!(self.ring, Ring::Split { .. });
                let flags = if split { next } else { 0 } | if part.write { WRITE } else { 0 };
                self.descriptor(guest, table, index as u16, *part, flags, index as u16 + 1);
            }
            let whole = readable(table, parts.len() as u32 * 16);
            return self.put(guest, &[(whole, INDIRECT)]);
        }
        let parts: Vec<(Part, u16)> = parts
            .iter()
            .map(|part| (*part, if part.write { WRITE } else { 0 }))
            .collect();
        self.put(guest, &parts)
    }

    /// Makes a chain available as it is.
    pub fn put(&mut self, guest: &Guest, parts: &[(Part, u16)]) -> Option<u16> {
        let size = self.config.size;
        let base = self.config.descriptors;
        let count = parts.len() as u16;
        match &mut self.ring {
            Ring::Split { free, .. } => {
                if free.len() < parts.len() {
                    return None;
                }
                let taken = free.split_off(free.len() - parts.len());
                for (at, (part, flags)) in parts.iter().enumerate() {
                    let next = taken.get(at + 1);
                    let flags = flags | if next.is_some() { NEXT } else { 0 };
                    let next = next.copied().unwrap_or(0xffff);
                    self.descriptor(guest, base, taken[at], *part, flags, next);
                }
                let head = taken[0];
                self.in_flight.insert(head, taken);
                self.publish(guest, head);
                Some(head)
            }
            Ring::Packed {
                free,
                slots,
                available,
                ..
            } => {
                if *slots < count {
                    return None;
                }
                *slots -= count;
                let id = free.pop().unwrap();
                let mut at = *available;
                let mut written = Vec::new();
                for (index, (part, flags)) in parts.iter().enumerate() {
                    let next = if index + 1 < parts.len() { NEXT } else { 0 };
                    let wrap = if at.1 { AVAIL } else { USED };
                    written.push((at.0, *part, flags | next | wrap));
                    at = step(at, 1, size);
                }
                *available = at;
                self.in_flight.insert(id, vec![0; parts.len()]);
                // The first one's flags last.
                for (index, part, flags) in written.into_iter().rev() {
                    self.descriptor(guest, base, index, part, flags, id);
                }
                Some(id)
            }
        }
    }

    /// Split: puts `head` into the available ring.
    pub fn publish(&mut self, guest: &Guest, head: u16) {
        let Ring::Split { available, .. } = &mut self.ring else {
            return;
        };
        let slot = u64::from(*available % self.config.size);
        guest.write_u16(self.config.driver + 4 + 2 * slot, head);
        *available = available.wrapping_add(1);
        guest.write_u16(self.config.driver + 2, *available);
    }

    /// The next chain that the device has given back, with its length.
    pub fn used(&mut self, guest: &Guest) -> Option<(u16, u32)> {
        let size = self.config.size;
        if !self.has_used(guest) {
            return None;
        }
        match &mut self.ring {
            Ring::Split { free, used, .. } => {
                let at = self.config.device + 4 + 8 * u64::from(*used % size);
                *used = used.wrapping_add(1);
                let (head, len) = (guest.read_u32(at) as u16, guest.read_u32(at + 4));
                free.extend(self.in_flight.remove(&head).unwrap());
                Some((head, len))
            }
            Ring::Packed {
                free, slots, used, ..
            } => {
                let at = self.config.descriptors + 16 * u64::from(used.0);
                let flags = guest.read_u16(at + 14);
                let (len, id) = (guest.read_u32(at + 8), guest.read_u16(at + 12));
                let count = self.in_flight.remove(&id).unwrap().len() as u16;
                free.push(id);
                *slots += count;
                *used = step(*used, count, size);
                Some((id, if flags & WRITE != 0 { len } else { 0 }))
            }
        }
    }

    /// Whether there is one.
    pub fn has_used(&self, guest: &Guest) -> bool {
        match self.ring {
            Ring::Split { used, .. } => guest.read_u16(self.config.device + 2) != used,
            Ring::Packed { used, .. } => {
                let at = self.config.descriptors + 16 * u64::from(used.0);
                let flags = guest.read_u16(at + 14);
                (flags & AVAIL != 0) == used.1 && (flags & USED != 0) == used.1
            }
        }
    }

    /// Wants an interrupt when the next chain is given back.
    pub fn want_next(&self, guest: &Guest) {
        match self.ring {
            Ring::Split { used, .. } => {
                let at = self.config.driver + 4 + 2 * u64::from(self.config.size);
                guest.write_u16(at, used);
            }
            Ring::Packed { used, .. } => {
                guest.write_u16(self.config.driver, used.0 | u16::from(used.1) << 15);
                guest.write_u16(self.config.driver + 2, 2);
            }
        }
    }

    /// Wants interrupts for everything, or for nothing, without event indices.
    pub fn want(&self, guest: &Guest, wanted: bool) {
        match self.ring {
            Ring::Split { .. } => guest.write_u16(self.config.driver, (!wanted).into()),
            Ring::Packed { .. } => guest.write_u16(self.config.driver + 2, (!wanted).into()),
        }
    }

    /// Whether the device wants to hear of the chain that was made available last.
    pub fn is_wanted(&self, guest: &Guest) -> bool {
        let size = self.config.size;
        let by_index = self.features.contains(Features::EVENT_IDX);
        match self.ring {
            Ring::Split { available, .. } if by_index => {
                let at = self.config.device + 4 + 8 * u64::from(size);
                guest.read_u16(at) == available.wrapping_sub(1)
            }
            Ring::Split { .. } => guest.read_u16(self.config.device) & 1 == 0,
            Ring::Packed { available, .. } => match guest.read_u16(self.config.device + 2) {
                0 => true,
                1 => false,
                _ => {
                    let event = guest.read_u16(self.config.device);
                    step((event & 0x7fff, event >> 15 != 0), 1, size) == available
                }
            },
        }
    }
}

fn step((index, wrap): (u16, bool), count: u16, size: u16) -> (u16, bool) {
    let next = u32::from(index) + u32::from(count);
    if next < size.into() {
        (next as u16, wrap)
    } else {
        ((next - u32::from(size)) as u16, !wrap)
    }
}

/// The page that an address is in.
pub fn page_of(address: u64) -> usize {
    address as usize / PAGE_SIZE
}

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A device that is active, and what it tells.
pub struct Live<D> {
    pub device: D,
    told: Arc<Told>,
}

#[derive(Default)]
struct Told {
    used: Mutex<HashMap<u16, usize>>,
    changed: Condvar,
    broken: Mutex<Option<String>>,
}

impl Events for Told {
    fn used(&self, queue: u16) {
        *self.used.lock().unwrap().entry(queue).or_default() += 1;
        self.changed.notify_all();
    }

    fn config_changed(&self) {}

    fn needs_reset(&self, why: &dyn Display) {
        *self.broken.lock().unwrap() = Some(why.to_string());
    }
}

impl<D: Device> Live<D> {
    /// The device, activated with these drivers' queues as its first ones.
    pub fn new(device: D, guest: &Guest, drivers: &[&Driver]) -> Self {
        let mut live = Self {
            device,
            told: Arc::default(),
        };
        live.activate(guest, drivers);
        live
    }

    pub fn activate(&mut self, guest: &Guest, drivers: &[&Driver]) {
        *self.told.broken.lock().unwrap() = None;
        for driver in drivers {
            driver.want_next(guest);
        }
        let queues = drivers.iter().enumerate();
        self.device.activate(Activation {
            ram: Arc::clone(&guest.ram),
            queues: queues
                .map(|(index, driver)| (index as u16, driver.queue(guest)))
                .collect(),
            features: drivers[0].features,
            events: Arc::clone(&self.told) as Arc<dyn Events>,
        });
    }

    pub fn notify(&self, queue: u16) {
        self.device.notify(queue);
    }

    /// The next chain given back, for which an interrupt comes unless it has been seen before.
    pub fn used(&self, driver: &mut Driver, guest: &Guest) -> (u16, u32) {
        let until = Instant::now() + PATIENCE;
        loop {
            let interrupts = self.interrupts();
            if let Some(used) = driver.used(guest) {
                driver.want_next(guest);
                return used;
            }
            let told = self.told.used.lock().unwrap();
            let total = |told: &HashMap<u16, usize>| told.values().sum::<usize>();
            let (told, timeout) = self
                .told
                .changed
                .wait_timeout_while(told, Duration::from_millis(500), |told| {
                    total(told) == interrupts
                })
                .unwrap();
            drop(told);
            if timeout.timed_out() && driver.has_used(guest) {
                panic!("a chain was given back and no interrupt came");
            }
            let broken = self.told.broken.lock().unwrap().clone();
            assert_eq!(broken, None, "the device needs a reset");
            assert!(Instant::now() < until, "nothing was given back");
        }
    }

    /// Interrupts so far.
    pub fn interrupts(&self) -> usize {
        self.told.used.lock().unwrap().values().sum()
    }

    /// Why the device needs a reset.
    pub fn broken(&self) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(why) = self.told.broken.lock().unwrap().clone() {
                return why;
            }
            assert!(Instant::now() < until, "the device still works");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn reset(&mut self) {
        self.device.reset();
        let until = Instant::now() + PATIENCE;
        while !self.device.is_reset() {
            assert!(Instant::now() < until, "the device does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
