//! From a device's message or line to the guest's event channel.
//!
//! Has a lock of its own, which is held while nothing else is called: a device may raise an interrupt at any time, in the middle of being
//! programmed too.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::evtchn::{GuestEnd, new_eventfd, signal};
use super::machine::about;
use super::{Machine, lock};
use crate::platform::XenError;
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
    /// What PIRQs fire, from the first use of each until it is unmapped: the next one of that number has another.
    events: BTreeMap<(DomId, Pirq), Arc<OwnedFd>>,
    bound: BTreeSet<(DomId, Pirq)>,
}

impl Interrupts {
    pub fn new() -> Self {
        Self {
            vectors: vec![None; VECTORS_PER_CPU.saturating_mul(CPUS)],
            lines: BTreeMap::new(),
            events: BTreeMap::new(),
            bound: BTreeSet::new(),
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

    /// The event that a PIRQ fires.
    ///
    /// # Errors
    /// ENOMEM.
    fn event(&mut self, target: (DomId, Pirq)) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(event) = self.events.get(&target) {
            return Ok(Arc::clone(event));
        }
        let event: Arc<OwnedFd> = Arc::new(new_eventfd().map_err(|_| Errno::ENOMEM)?.into());
        self.events.insert(target, Arc::clone(&event));
        Ok(event)
    }

    /// The event of a domain's PIRQ that a message is for.
    ///
    /// # Errors
    /// EINVAL when it is for none of that domain's; ENOMEM.
    pub fn event_of_message(
        &mut self,
        domain: DomId,
        address: u64,
        data: u32,
    ) -> Result<Arc<OwnedFd>, Errno> {
        let target = self.target(address, data);
        let target = target.filter(|(owner, _)| *owner == domain);
        self.event(target.ok_or(Errno::EINVAL)?)
    }

    /// The event of the PIRQ that a domain has for a line.
    ///
    /// # Errors
    /// As [`Interrupts::event_of_message`].
    pub fn event_of_line(&mut self, domain: DomId, gsi: Gsi) -> Result<Arc<OwnedFd>, Errno> {
        let mut targets = self.lines.get(&gsi).into_iter().flatten();
        let target = targets.find(|(owner, _)| *owner == domain).copied();
        self.event(target.ok_or(Errno::EINVAL)?)
    }

    /// Lets a PIRQ's event be fired from now on.
    ///
    /// # Errors
    /// EEXIST when it has a port; ENOMEM.
    pub fn bind(&mut self, domain: DomId, pirq: Pirq) -> Result<Arc<OwnedFd>, Errno> {
        if self.bound.contains(&(domain, pirq)) {
            return Err(Errno::EEXIST);
        }
        let event = self.event((domain, pirq))?;
        self.bound.insert((domain, pirq));
        Ok(event)
    }

    /// Undoes [`Interrupts::bind`].
    pub fn unbind(&mut self, domain: DomId, pirq: Pirq) {
        self.bound.remove(&(domain, pirq));
    }

    /// A PIRQ is unmapped: whoever still has its event hears nothing by it any more.
    pub fn forget(&mut self, domain: DomId, pirq: Pirq) {
        self.unbind(domain, pirq);
        self.events.remove(&(domain, pirq));
    }

    fn fire(&self, target: (DomId, Pirq)) -> bool {
        let event = self.events.get(&target);
        self.bound.contains(&target) && event.is_some_and(|event| signal(event).is_ok())
    }

    fn target(&self, address: u64, data: u32) -> Option<(DomId, Pirq)> {
        let vector = Vector::of_message(address, data)?;
        self.vectors.get(vector.0).copied().flatten()
    }

    /// A device has sent a message. True when a guest was interrupted.
    pub fn deliver(&self, address: u64, data: u32) -> bool {
        let target = self.target(address, data);
        target.is_some_and(|target| self.fire(target))
    }

    /// A device has raised a line. Gives how many guests were interrupted.
    pub fn raise(&self, gsi: Gsi) -> usize {
        self.lines.get(&gsi).map_or(0, |targets| {
            targets.iter().filter(|target| self.fire(**target)).count()
        })
    }
}

impl Machine {
    /// A device has sent a message. True when it interrupted a guest; otherwise nobody has mapped that message or bound its PIRQ, and it
    /// is lost.
    pub fn deliver_msi(&self, address: u64, data: u32) -> bool {
        lock(&self.inner.interrupts).deliver(address, data)
    }

    /// A device has raised its line. Gives the number of guests that it interrupted.
    pub fn raise_gsi(&self, gsi: Gsi) -> usize {
        lock(&self.inner.interrupts).raise(gsi)
    }

    /// The eventfd that [`Machine::deliver_msi`] would signal, for hardware that does so itself. It is that of the message for as long as the
    /// message is programmed; an event that comes before the guest binds its PIRQ waits for that.
    ///
    /// # Errors
    /// EINVAL when that domain has not mapped that message, ENOMEM.
    pub fn event_of_message(
        &self,
        domain: DomId,
        address: u64,
        data: u32,
    ) -> io::Result<Arc<OwnedFd>> {
        Ok(lock(&self.inner.interrupts).event_of_message(domain, address, data)?)
    }

    /// As [`Machine::event_of_message`], of a line that is a domain's: until the device is the domain's no more.
    ///
    /// # Errors
    /// EINVAL when the line is not that domain's, ENOMEM.
    pub fn event_of_line(&self, domain: DomId, gsi: Gsi) -> io::Result<Arc<OwnedFd>> {
        Ok(lock(&self.inner.interrupts).event_of_line(domain, gsi)?)
    }

    pub(super) fn bind_pirq(&self, domain: DomId, pirq: Pirq) -> Result<GuestEnd, XenError> {
        let (result, line) = {
            let mut hypervisor = lock(&self.inner.hypervisor);
            let result = hypervisor.bind_pirq(domain, pirq);
            (result, hypervisor.line_of_pirq(domain, pirq))
        };
        // What a former driver left unserved does not keep the line from the new one.
        if let (Ok(_), Ok(gsi)) = (&result, line) {
            self.hardware().end_of_interrupt(domain, gsi);
        }
        result.map_err(|errno| {
            XenError::from_errno(
                format!("EVTCHNOP_bind_pirq of PIRQ {pirq} in domain {domain}"),
                errno as i32,
            )
        })
    }

    pub(super) fn end_of_interrupt(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError> {
        let line = lock(&self.inner.hypervisor).line_of_pirq(domain, pirq);
        let gsi = about(
            format!("PHYSDEVOP_eoi of PIRQ {pirq} in domain {domain}"),
            line,
        )?;
        self.hardware().end_of_interrupt(domain, gsi);
        Ok(())
    }

    pub(super) fn end_event(&self, domain: DomId, pirq: Pirq) -> Result<OwnedFd, XenError> {
        let operation = format!("an eventfd for the ends of PIRQ {pirq} of domain {domain}");
        let line = lock(&self.inner.hypervisor).line_of_pirq(domain, pirq);
        let gsi = about(operation.clone(), line)?;
        let event = self.hardware().end_event(domain, gsi);
        event.map_err(|source| XenError::Failed { operation, source })
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
        let event = interrupts.bind(GUEST, Pirq(250)).unwrap();
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
    fn a_pirq_that_is_mapped_anew_fires_another_event() {
        let mut interrupts = Interrupts::new();
        let vector = interrupts.allocate(GUEST, Pirq(30), 1).unwrap();
        let (address, data) = vector.message();
        let event = interrupts.event_of_message(GUEST, address, data).unwrap();
        let others = interrupts.event_of_message(DomId(2), address, data);
        assert_eq!(others.unwrap_err(), Errno::EINVAL);
        let same = interrupts.bind(GUEST, Pirq(30)).unwrap();
        assert!(Arc::ptr_eq(&event, &same));
        interrupts.forget(GUEST, Pirq(30));
        assert!(!interrupts.deliver(address, data));
        let other = interrupts.bind(GUEST, Pirq(30)).unwrap();
        assert!(interrupts.deliver(address, data));
        assert!(super::super::evtchn::take(&other).unwrap());
        assert!(!super::super::evtchn::take(&event).unwrap());
        interrupts.free(vector, 1);
        let gone = interrupts.event_of_message(GUEST, address, data);
        assert_eq!(gone.unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn a_line_has_an_event_for_each_domain_that_it_is_wired_to() {
        let mut interrupts = Interrupts::new();
        interrupts.connect_line(Gsi(17), GUEST, Pirq(17));
        let of_the_line = interrupts.event_of_line(GUEST, Gsi(17)).unwrap();
        let bound = interrupts.bind(GUEST, Pirq(17)).unwrap();
        assert!(Arc::ptr_eq(&of_the_line, &bound));
        let other = interrupts.event_of_line(DomId(2), Gsi(17));
        assert_eq!(other.unwrap_err(), Errno::EINVAL);
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
