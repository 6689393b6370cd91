//! From a device's message or line to the guest's event channel.
//!
//! Has a lock of its own, which is held while nothing else is called: a device may raise an interrupt at any time, in the middle of being
//! programmed too.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::evtchn::{new_eventfd, signal};
use crate::types::{DomId, Gsi, Pirq};

/// Vectors that a CPU has for devices: 0x20 to 0xff.
const VECTORS_PER_CPU: usize = 224;
const FIRST_VECTOR: u32 = 0x20;
const CPUS: usize = 4;
/// Where messages to CPU 0 go; the CPU's number stands in bits 19:12 (Intel SDM, volume 3, 11.11.1).
const MESSAGE_BASE: u64 = 0xfee0_0000;

/// Numbers of vectors across all CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Vector(usize);

impl Vector {
    /// Message address and data.
    pub fn message(self) -> (u64, u32) {
        let cpu = u64::try_from(self.0 / VECTORS_PER_CPU).unwrap_or_default();
        let vector = u32::try_from(self.0 % VECTORS_PER_CPU).unwrap_or_default();
        (
            MESSAGE_BASE | cpu << 12,
            FIRST_VECTOR.saturating_add(vector),
        )
    }

    fn of_message(address: u64, data: u32) -> Option<Self> {
        let cpu = usize::try_from(address.checked_sub(MESSAGE_BASE)? >> 12)
            .ok()
            .filter(|cpu| *cpu < CPUS)?;
        let vector = usize::try_from(data.checked_sub(FIRST_VECTOR)?)
            .ok()
            .filter(|vector| *vector < VECTORS_PER_CPU)?;
        Some(Self(
            cpu.saturating_mul(VECTORS_PER_CPU).saturating_add(vector),
        ))
    }

    fn plus(self, count: usize) -> Self {
        Self(self.0.saturating_add(count))
    }
}

/// Who gets which interrupt.
#[derive(Debug)]
pub(super) struct Interrupts {
    vectors: Vec<Option<(DomId, Pirq)>>,
    lines: BTreeMap<Gsi, BTreeSet<(DomId, Pirq)>>,
    bound: BTreeMap<(DomId, Pirq), EventFd>,
}

impl Interrupts {
    pub fn new() -> Self {
        Self {
            vectors: vec![None; VECTORS_PER_CPU.saturating_mul(CPUS)],
            lines: BTreeMap::new(),
            bound: BTreeMap::new(),
        }
    }

    /// Takes vectors in a row for PIRQs in a row. `count` is a power of 2, and the first vector's data a multiple of it: devices with
    /// several MSI vectors count in its lowest bits.
    pub fn allocate(&mut self, domain: DomId, first: Pirq, count: usize) -> Option<Vector> {
        let block = self
            .vectors
            .chunks_exact_mut(count)
            .enumerate()
            .find(|(_, block)| block.iter().all(Option::is_none));
        let (index, block) = block?;
        for (slot, pirq) in block.iter_mut().zip(first.0..) {
            *slot = Some((domain, Pirq(pirq)));
        }
        Some(Vector(index.saturating_mul(count)))
    }

    /// Gives vectors back.
    pub fn free(&mut self, first: Vector, count: usize) {
        for slot in self.vectors.iter_mut().skip(first.0).take(count) {
            *slot = None;
        }
    }

    /// Wires a line to a domain's PIRQ as well.
    pub fn connect_line(&mut self, gsi: Gsi, domain: DomId, pirq: Pirq) {
        self.lines.entry(gsi).or_default().insert((domain, pirq));
    }

    /// Undoes [`Interrupts::connect_line`].
    pub fn disconnect_line(&mut self, gsi: Gsi, domain: DomId, pirq: Pirq) {
        if let Some(targets) = self.lines.get_mut(&gsi) {
            targets.remove(&(domain, pirq));
        }
    }

    /// Makes the event that a PIRQ fires from now on.
    ///
    /// # Errors
    /// EEXIST when it has one.
    pub fn bind(&mut self, domain: DomId, pirq: Pirq) -> Result<&EventFd, Errno> {
        if self.bound.contains_key(&(domain, pirq)) {
            return Err(Errno::EEXIST);
        }
        let event = new_eventfd().map_err(|_| Errno::ENOMEM)?;
        Ok(self.bound.entry((domain, pirq)).or_insert(event))
    }

    /// Undoes [`Interrupts::bind`].
    pub fn unbind(&mut self, domain: DomId, pirq: Pirq) {
        self.bound.remove(&(domain, pirq));
    }

    fn fire(&self, target: (DomId, Pirq)) -> bool {
        self.bound
            .get(&target)
            .is_some_and(|event| signal(event.as_fd()).is_ok())
    }

    /// A device has sent a message. True when a guest was interrupted.
    pub fn deliver(&self, address: u64, data: u32) -> bool {
        let vector = Vector::of_message(address, data);
        vector
            .and_then(|vector| self.vectors.get(vector.0).copied().flatten())
            .is_some_and(|target| self.fire(target))
    }

    /// A device has raised a line. Gives how many guests were interrupted.
    pub fn raise(&self, gsi: Gsi) -> usize {
        self.lines.get(&gsi).map_or(0, |targets| {
            targets.iter().filter(|target| self.fire(**target)).count()
        })
    }
}

/// The vectors of a block, one by one.
pub(super) fn block(first: Vector, count: usize) -> impl Iterator<Item = Vector> {
    (0..count).map(move |index| first.plus(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: DomId = DomId(1);

    #[test]
    fn a_message_finds_the_pirq_that_it_was_made_for() {
        let mut interrupts = Interrupts::new();
        let vectors: Vec<_> = (0..300)
            .map(|pirq| interrupts.allocate(GUEST, Pirq(pirq), 1).unwrap())
            .collect();
        let event = interrupts
            .bind(GUEST, Pirq(250))
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .unwrap();
        for (pirq, vector) in vectors.iter().enumerate() {
            let (address, data) = vector.message();
            assert_eq!(interrupts.deliver(address, data), pirq == 250);
        }
        assert!(super::super::evtchn::take(&event).unwrap());
        for (address, data) in [
            (0, 0),
            (0xfee0_0000, 0x1f),
            (0xfee0_0000, 0x100),
            (0xfee0_4000, 0x20),
            (u64::MAX, u32::MAX),
        ] {
            assert!(!interrupts.deliver(address, data));
        }
    }

    #[test]
    fn a_block_of_vectors_is_aligned_so_that_the_device_can_count_in_its_data() {
        let mut interrupts = Interrupts::new();
        interrupts.allocate(GUEST, Pirq(0), 1).unwrap();
        let first = interrupts.allocate(GUEST, Pirq(10), 8).unwrap();
        let (address, data) = first.message();
        assert_eq!(data % 8, 0);
        for (index, vector) in block(first, 8).enumerate() {
            assert_eq!(
                vector.message(),
                (address, data + u32::try_from(index).unwrap())
            );
        }
        interrupts.bind(GUEST, Pirq(17)).unwrap();
        assert!(interrupts.deliver(address, data + 7));
        interrupts.free(first, 8);
        assert!(!interrupts.deliver(address, data + 7));
    }

    #[test]
    fn vectors_run_out() {
        let mut interrupts = Interrupts::new();
        let taken = std::iter::from_fn(|| interrupts.allocate(GUEST, Pirq(0), 32)).count();
        assert_eq!(taken, VECTORS_PER_CPU * CPUS / 32);
    }
}
