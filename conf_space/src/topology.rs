//! Where a guest sees its devices.
//!
//! Two ways, each guest its own: [`TopologyKind::Vpci`] puts all devices on one virtual bus
//! 0000:00, [`TopologyKind::Passthrough`] leaves them at their physical addresses. The rules are
//! those of Linux's xen-pciback, which has one topology for all guests; their numbers are also in
//! the names of the tests:
//!
//! - V-1: on the virtual bus a function keeps its number, and functions of one device share a slot.
//!   A virtual function with number 0 is alone in its slot, since a guest takes a function 0
//!   without the multi-function bit for the only one. A device goes to its siblings, or else to
//!   the first free of 32 slots.
//! - V-2: only devices that were placed are found; numbers too large for an address find nothing.
//! - V-3: bridges are refused by [`crate::overlay`], so that none gets here.
//! - V-4: a slot is free again once its last device is gone. An operator can ask for one.
//! - V-5: the virtual bus is the one root of its topology.
//! - V-6: with physical addresses, each bus that has devices is a root.
//! - V-7: finding nothing is quick, since a guest asks for every function of a root.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::Bdf;

/// How a guest's buses look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TopologyKind {
    /// One virtual bus, 0000:00, with 32 slots. A function keeps its number, functions of one
    /// physical device share a slot.
    #[default]
    Vpci,
    /// Virtual addresses are the physical ones.
    Passthrough,
}

impl fmt::Display for TopologyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vpci => "vpci",
            Self::Passthrough => "passthrough",
        })
    }
}

/// No topology has that name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no topology; write \"vpci\" or \"passthrough\"")]
pub struct UnknownTopology(pub String);

impl FromStr for TopologyKind {
    type Err = UnknownTopology;

    fn from_str(name: &str) -> Result<Self, UnknownTopology> {
        match name {
            "vpci" => Ok(Self::Vpci),
            "passthrough" => Ok(Self::Passthrough),
            _ => Err(UnknownTopology(name.to_owned())),
        }
    }
}

/// A device that wants a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Its physical address.
    pub bdf: Bdf,
    /// Whether it is a virtual function of an SR-IOV device.
    pub is_virtual_function: bool,
    /// The virtual devfn that the operator asked for (`vdevfn-N`). Its slot is taken if it is free;
    /// the function stays the physical one. The passthrough topology has no choice and ignores it.
    pub hint: Option<u8>,
}

/// Why a device got no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// All slots of the virtual bus are taken.
    #[error(
        "no slot is left for {0} on the guest's virtual bus, which has 32; \
         detach another device first"
    )]
    NoSlot(Bdf),
    /// The guest has this device already.
    #[error("{0} is in this guest already")]
    AlreadyPlaced(Bdf),
    /// The virtual address to restore cannot be.
    #[error(
        "{physical} cannot be at {address} of the guest: \
         the address is taken, or not one of this topology"
    )]
    NotPossible {
        /// The device.
        physical: Bdf,
        /// The virtual address.
        address: Bdf,
    },
}

/// A root bus to publish to the guest. Displays as the xenstore node `root-N` has it: `%04x:%02x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Root {
    /// Segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}", self.segment, self.bus)
    }
}

/// A device in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    physical: Bdf,
    address: Bdf,
    is_virtual_function: bool,
}

/// The places of one guest's devices.
#[derive(Debug, Clone)]
pub struct Topology {
    kind: TopologyKind,
    /// Ordered by virtual address, which no two share.
    placed: Vec<Placed>,
}

const VIRTUAL_ROOT: Root = Root { segment: 0, bus: 0 };

impl Topology {
    /// An empty topology.
    pub const fn new(kind: TopologyKind) -> Self {
        Self {
            kind,
            placed: Vec::new(),
        }
    }

    /// Its kind.
    pub const fn kind(&self) -> TopologyKind {
        self.kind
    }

    /// Finds a place for a device and returns its virtual address.
    ///
    /// # Errors
    /// [`PlaceError::NoSlot`], [`PlaceError::AlreadyPlaced`].
    pub fn place(&mut self, device: Placement) -> Result<Bdf, PlaceError> {
        self.refuse_placed(device.bdf)?;
        let address = match self.kind {
            TopologyKind::Vpci => self
                .free_address(device)
                .ok_or(PlaceError::NoSlot(device.bdf))?,
            TopologyKind::Passthrough => device.bdf,
        };
        self.insert(device, address)?;
        Ok(address)
    }

    /// Puts a device back to the virtual address that it had before a restart of the daemon.
    ///
    /// # Errors
    /// [`PlaceError::NotPossible`], [`PlaceError::AlreadyPlaced`].
    pub fn restore(&mut self, device: Placement, address: Bdf) -> Result<(), PlaceError> {
        self.refuse_placed(device.bdf)?;
        let possible = match self.kind {
            TopologyKind::Vpci => {
                VIRTUAL_ROOT == root_of(address)
                    && address.function() == device.bdf.function()
                    && self.fits(device, address.device())
            }
            TopologyKind::Passthrough => address == device.bdf,
        };
        if !possible {
            return Err(PlaceError::NotPossible {
                physical: device.bdf,
                address,
            });
        }
        self.insert(device, address)
    }

    /// Takes a device away by its physical address and returns the virtual address that it had.
    pub fn remove(&mut self, physical: Bdf) -> Option<Bdf> {
        let index = self
            .placed
            .iter()
            .position(|placed| placed.physical == physical)?;
        Some(self.placed.remove(index).address)
    }

    /// The physical address of the device that the guest addresses; the numbers are the guest's,
    /// from the shared page.
    pub fn find(&self, domain: u32, bus: u32, devfn: u32) -> Option<Bdf> {
        let address = Bdf::from_devfn(
            u16::try_from(domain).ok()?,
            u8::try_from(bus).ok()?,
            u8::try_from(devfn).ok()?,
        );
        let index = self
            .placed
            .binary_search_by_key(&address, |placed| placed.address)
            .ok()?;
        self.placed.get(index).map(|placed| placed.physical)
    }

    /// The virtual address of a device.
    pub fn address_of(&self, physical: Bdf) -> Option<Bdf> {
        self.placed
            .iter()
            .find(|placed| placed.physical == physical)
            .map(|placed| placed.address)
    }

    /// All devices: (physical address, virtual address), ordered by the latter.
    pub fn devices(&self) -> impl Iterator<Item = (Bdf, Bdf)> + '_ {
        self.placed
            .iter()
            .map(|placed| (placed.physical, placed.address))
    }

    /// The root buses to publish, in order, each once. The virtual bus exists even without devices.
    ///
    /// A device below an exported bridge would need no root of its own; bridges are never exported,
    /// so each device's bus is one.
    pub fn roots(&self) -> Vec<Root> {
        match self.kind {
            TopologyKind::Vpci => vec![VIRTUAL_ROOT],
            TopologyKind::Passthrough => {
                let mut roots: Vec<Root> = self
                    .placed
                    .iter()
                    .map(|placed| root_of(placed.address))
                    .collect();
                roots.dedup();
                roots
            }
        }
    }

    fn refuse_placed(&self, physical: Bdf) -> Result<(), PlaceError> {
        match self.address_of(physical) {
            Some(_) => Err(PlaceError::AlreadyPlaced(physical)),
            None => Ok(()),
        }
    }

    fn insert(&mut self, device: Placement, address: Bdf) -> Result<(), PlaceError> {
        match self
            .placed
            .binary_search_by_key(&address, |placed| placed.address)
        {
            Ok(_) => Err(PlaceError::NotPossible {
                physical: device.bdf,
                address,
            }),
            Err(index) => {
                self.placed.insert(
                    index,
                    Placed {
                        physical: device.bdf,
                        address,
                        is_virtual_function: device.is_virtual_function,
                    },
                );
                Ok(())
            }
        }
    }

    fn free_address(&self, device: Placement) -> Option<Bdf> {
        let mut slots = 0..=Bdf::MAX_DEVICE;
        let hinted = device
            .hint
            .map(|devfn| devfn >> 3)
            .filter(|slot| self.fits(device, *slot));
        let beside_siblings = || {
            slots
                .clone()
                .find(|slot| !self.is_empty(*slot) && self.fits(device, *slot))
        };
        let slot = hinted
            .or_else(beside_siblings)
            .or_else(|| slots.find(|slot| self.is_empty(*slot)))?;
        Bdf::new(
            VIRTUAL_ROOT.segment,
            VIRTUAL_ROOT.bus,
            slot,
            device.bdf.function(),
        )
    }

    fn is_empty(&self, slot: u8) -> bool {
        self.in_slot(slot).next().is_none()
    }

    fn in_slot(&self, slot: u8) -> impl Iterator<Item = &Placed> {
        self.placed
            .iter()
            .filter(move |placed| placed.address.device() == slot)
    }

    /// Whether a device may be in a slot with those that are there: functions of one physical
    /// device only, and virtual functions with number 0 alone, since a guest takes a function 0
    /// without the multi-function bit, which they lack, for the only one.
    fn fits(&self, device: Placement, slot: u8) -> bool {
        self.in_slot(slot).all(|other| {
            !is_lone(device.bdf, device.is_virtual_function)
                && !is_lone(other.physical, other.is_virtual_function)
                && other.physical.same_device(device.bdf)
        })
    }
}

fn is_lone(physical: Bdf, is_virtual_function: bool) -> bool {
    is_virtual_function && physical.function() == 0
}

fn root_of(address: Bdf) -> Root {
    Root {
        segment: address.segment(),
        bus: address.bus(),
    }
}
