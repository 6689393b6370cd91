//! Which target answers at which address.

use conf_space::Width;
use vm_memory::{Bytes, GuestAddress};
use xenbus::device_model::{IoRange, IoSpace};

use super::request::{Access, Direction, ElementSize, Operand};
use super::target::{Claim, Placed, Target, Window};
use crate::inspect::DeviceView;
use crate::memory::View;

/// Targets, and where they are.
#[derive(Debug, Default)]
pub struct Spaces {
    targets: Vec<Placed>,
    /// Each claim with the index of the target whose it is.
    routes: Vec<(Claim, usize)>,
    /// Reused.
    claims: Vec<Claim>,
}

/// What came of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The answer's data.
    pub data: u64,
    /// Claims may have changed.
    pub configured: bool,
    /// The guest's side of the data is not in its memory: not all elements were moved.
    pub fault: bool,
    /// A target holds the CPU, before the rest of the access.
    pub held: Option<Hold>,
}

/// Where a CPU is held in the middle of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hold {
    /// Who holds it.
    target: usize,
    window: Window,
    offset: u64,
    /// The element that is next.
    pub next: u32,
}

/// Where an element goes.
struct Place<'a> {
    index: usize,
    target: &'a mut dyn Target,
    window: Window,
    offset: u64,
}

impl Place<'_> {
    fn read(&mut self, size: ElementSize) -> u64 {
        let Self { window, offset, .. } = *self;
        match width(size) {
            Some(width) => (self.target.read(window, offset, width) & width.mask()).into(),
            None => {
                let low = self.target.read(window, offset, Width::Four);
                let high = self
                    .target
                    .read(window, offset.saturating_add(4), Width::Four);
                u64::from(high) << 32 | u64::from(low)
            }
        }
    }

    fn write(&mut self, size: ElementSize, value: u64) {
        let Self { window, offset, .. } = *self;
        match width(size) {
            Some(width) => {
                let value = value as u32 & width.mask();
                self.target.write(window, offset, width, value);
            }
            None => {
                let (low, high) = (value as u32, (value >> 32) as u32);
                self.target.write(window, offset, Width::Four, low);
                let offset = offset.saturating_add(4);
                self.target.write(window, offset, Width::Four, high);
            }
        }
    }
}

/// `None`: two of four bytes each.
fn width(size: ElementSize) -> Option<Width> {
    match size {
        ElementSize::One => Some(Width::One),
        ElementSize::Two => Some(Width::Two),
        ElementSize::Four => Some(Width::Four),
        ElementSize::Eight => None,
    }
}

impl Spaces {
    /// Adds a target. Where it overlaps an earlier one, that one answers.
    pub fn add(&mut self, target: Placed) {
        self.targets.push(target);
        self.refresh();
    }

    /// Has all targets stop for good. True: they have.
    pub(super) fn halt(&mut self) -> bool {
        let mut halted = true;
        for target in &mut self.targets {
            halted &= target.target.halt();
        }
        halted
    }

    /// What there is to see of all devices.
    pub(super) fn inspect(&self) -> Vec<DeviceView> {
        let targets = self.targets.iter();
        targets.flat_map(|target| target.target.inspect()).collect()
    }

    /// Asks all targets for their claims.
    pub(super) fn refresh(&mut self) {
        self.routes.clear();
        for (index, target) in self.targets.iter().enumerate() {
            self.claims.clear();
            target.claims(&mut self.claims);
            self.routes
                .extend(self.claims.iter().map(|claim| (*claim, index)));
        }
    }

    /// All that is claimed now.
    pub(super) fn claimed(&self) -> impl Iterator<Item = IoRange> {
        self.routes.iter().map(|(claim, _)| claim.range)
    }

    fn find(&mut self, space: IoSpace, address: u64) -> Option<Place<'_>> {
        // In configuration space a claim is of functions, and the register is the offset.
        let (address, register) = match space {
            IoSpace::Config => (address >> 32, Some(address & 0xffff_ffff)),
            _ => (address, None),
        };
        let (claim, index) = self.routes.iter().find(|(claim, _)| {
            claim.range.space == space && (claim.range.first..=claim.range.last).contains(&address)
        })?;
        let offset = match register {
            Some(register) => register,
            None => address.checked_sub(claim.range.first)?,
        };
        let window = claim.window;
        Some(Place {
            index: *index,
            target: self.targets.get_mut(*index)?.target.as_mut(),
            window,
            offset,
        })
    }

    /// Whether a CPU is not to go on yet.
    pub(super) fn holds(&mut self, hold: &Hold) -> bool {
        let target = self.targets.get_mut(hold.target);
        target.is_some_and(|target| target.target.holds(hold.window, hold.offset))
    }

    /// Carries an access out, from its element `first` on. What nobody answers reads as all ones.
    pub(super) fn access(&mut self, access: &Access, first: u32, memory: &View) -> Outcome {
        let mut outcome = Outcome {
            data: u64::MAX,
            configured: false,
            fault: false,
            held: None,
        };
        for index in first..access.count {
            let Some(at) = access.element(index) else {
                break;
            };
            let place = self.find(access.space, at);
            match (access.direction, access.operand) {
                (Direction::Read, operand) => {
                    let value = place.map_or(u64::MAX, |mut place| place.read(access.size));
                    if let Operand::Value(_) = operand {
                        outcome.data = value;
                    } else if !store(memory, access.element_in_memory(index), access.size, value) {
                        outcome.fault = true;
                        break;
                    }
                }
                (Direction::Write, operand) => {
                    let value = match operand {
                        Operand::Value(value) => Some(value),
                        Operand::Memory(_) => {
                            load(memory, access.element_in_memory(index), access.size)
                        }
                    };
                    let Some(value) = value else {
                        outcome.fault = true;
                        break;
                    };
                    if let Some(mut place) = place {
                        place.write(access.size, value);
                        let Place { window, offset, .. } = place;
                        let hold = Hold {
                            target: place.index,
                            window,
                            offset,
                            next: index.saturating_add(1),
                        };
                        let is_held = place.target.holds(window, offset);
                        if window == Window::Config {
                            outcome.configured = true;
                            self.refresh();
                        }
                        if is_held {
                            outcome.held = Some(hold);
                            break;
                        }
                    }
                }
            }
        }
        outcome
    }
}

/// Writes the low bytes of a value to the guest's memory. False: there is none.
fn store(memory: &View, address: Option<u64>, size: ElementSize, value: u64) -> bool {
    let bytes = value.to_le_bytes();
    let bytes = bytes.get(..size.bytes() as usize);
    let (Some(address), Some(bytes)) = (address, bytes) else {
        return false;
    };
    memory.write_slice(bytes, GuestAddress(address)).is_ok()
}

/// Reads a value from the guest's memory.
fn load(memory: &View, address: Option<u64>, size: ElementSize) -> Option<u64> {
    let mut bytes = [0; 8];
    let part = bytes.get_mut(..size.bytes() as usize)?;
    memory.read_slice(part, GuestAddress(address?)).ok()?;
    Some(u64::from_le_bytes(bytes))
}
