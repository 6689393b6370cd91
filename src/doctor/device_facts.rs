//! Gathering the facts about a device. Nothing is written to it.

use conf_space::address::Bdf;
use conf_space::capabilities::{Capabilities, CapabilityId};
use conf_space::overlay::PowerState;
use conf_space::registers::{header, msix, power_management};
use conf_space::{ConfigSize, Width};
use msi::Interrupts;
use xenbus::DomId;

use crate::config::DeviceSettings;
use crate::host::group::Group;
use crate::host::record::{Flags, Owner, Phase, Record};
use crate::host::sharing::{Hidden, Holder, Shared, in_pages, neighbours, on_line};
use crate::host::{Backend, Bus, Description, Function, HostError};
use crate::text::chain;

/// Where a hidden device is, as its record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Where on its way.
    pub phase: Phase,
    /// The guest that has it, or had it last.
    pub owner: Option<Owner>,
    /// What it was granted.
    pub flags: Flags,
}

impl Standing {
    /// From a record; `None` when nothing was written to it.
    pub fn of(record: &Record) -> Option<Self> {
        Some(Self {
            phase: record.phase()?,
            owner: record.owner(),
            flags: record.flags(),
        })
    }

    /// The guest that has it now.
    pub fn holder(&self) -> Option<DomId> {
        let owner = self.owner.filter(|_| self.phase == Phase::Assigned);
        owner.map(|owner| owner.domain)
    }
}

/// What there is to say about a device.
#[derive(Debug, Clone)]
pub struct DeviceFacts {
    /// What the bus knows of it.
    pub description: Description,
    /// How it is reached.
    pub backend: Backend,
    /// Its IOMMU group, if Linux has one.
    pub group: Option<Group>,
    /// Where it is; `None`: it is not hidden.
    pub standing: Option<Standing>,
    /// What it is reserved for.
    pub driver_override: Option<String>,
    /// What its registers say, or why they cannot be read.
    pub registers: Result<Registers, String>,
    /// The kernel may let it lose its power while dom0 does not use it.
    pub may_lose_power: bool,
    /// Why dom0 needs it.
    pub needed: Option<String>,
    /// Who else uses its INTx line.
    pub line: Vec<Shared<u32>>,
    /// Who else has memory in a page with it.
    pub pages: Vec<Shared<u64>>,
    /// The other functions behind its bridge, and who has them.
    pub beside: Vec<(Bdf, Holder)>,
    /// For a virtual function: who has its physical function.
    pub physical: Option<(Bdf, Holder)>,
    /// What is set for it, if a daemon says.
    pub settings: Option<DeviceSettings>,
    /// Guests that could not get it, and why.
    pub failed: Vec<(DomId, String)>,
    /// Resets that were tried, in that order, or why they were not.
    pub tried: Result<Vec<Tried>, String>,
}

/// A reset that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// The kernel's name of it.
    pub method: String,
    /// What it failed with.
    pub result: Result<(), String>,
}

/// What a device's registers say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registers {
    /// Not everything reads as ones.
    pub answers: bool,
    /// Its power state, if it has power management.
    pub power: Option<PowerState>,
    /// It has an interrupt pin.
    pub pin: bool,
    /// It is a PCI Express function.
    pub express: bool,
    /// It has MSI.
    pub msi: bool,
    /// It has MSI-X: where the table is, or what is wrong with that.
    pub msix: Option<Result<Table, String>>,
}

/// Where an MSI-X table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Entries.
    pub vectors: u16,
    /// The BAR that holds it.
    pub bar: u8,
    /// Its offset there, in bytes.
    pub offset: u32,
}

impl DeviceFacts {
    /// Looks at a device. `standing` says where a hidden one is.
    ///
    /// # Errors
    /// When there is no such device, or the bus cannot be listed.
    pub fn gather(
        bus: &dyn Bus,
        bdf: Bdf,
        standing: impl Fn(Bdf) -> Option<Standing>,
    ) -> Result<Self, HostError> {
        let description = bus.describe(bdf)?;
        let own = standing(bdf);
        let owner = own.and_then(|own| own.holder());
        let around = neighbours(bus.survey()?, bdf, |other| {
            standing(other).map(|standing| Hidden {
                owner: standing.holder(),
                without_intx: standing.flags.contains(Flags::WITHOUT_INTX),
            })
        });
        let who = |other: Bdf| {
            let found = around.iter().find(|around| around.occupies.bdf == other);
            (
                other,
                found.map_or(Holder::Dom0(None), |found| found.holder.clone()),
            )
        };
        let resources = &description.identity.resources;
        Ok(Self {
            backend: bus.backend(),
            group: bus.group(bdf),
            standing: own,
            driver_override: bus.driver_override(bdf).ok().flatten(),
            registers: registers(bus, &description),
            may_lose_power: bus.may_lose_power(bdf).unwrap_or(false),
            needed: bus.needed_by_dom0(bdf).ok().flatten(),
            line: on_line(description.irq, owner, &around),
            pages: in_pages(resources, owner, &around),
            beside: bus
                .beside(bdf)
                .unwrap_or_default()
                .into_iter()
                .map(who)
                .collect(),
            physical: match description.function {
                Function::Virtual { physical, .. } => Some(who(physical)),
                _ => None,
            },
            description,
            settings: None,
            failed: Vec::new(),
            tried: Ok(Vec::new()),
        })
    }
}

fn registers(bus: &dyn Bus, description: &Description) -> Result<Registers, String> {
    let failed = |error: &dyn std::error::Error| chain(error);
    let config = bus
        .open(description.identity.bdf)
        .map_err(|error| failed(&error))?;
    // Not the first double word: a virtual function's reads as ones.
    let command = config
        .read(header::COMMAND.offset, Width::Four)
        .map_err(|error| failed(&error))?;
    if command == u32::MAX {
        return Ok(Registers::default());
    }
    let capabilities =
        Capabilities::walk(&*config, ConfigSize::Conventional).map_err(|error| failed(&error))?;
    let resources = &description.identity.resources;
    let interrupts = Interrupts::discover(&*config, resources).map_err(|error| failed(&error))?;
    let read = |base: u16, offset: u16, width| {
        base.checked_add(offset)
            .and_then(|offset| config.read(offset, width).ok())
    };
    let power = capabilities
        .find(CapabilityId::POWER_MANAGEMENT)
        .and_then(|base| read(base, power_management::CONTROL.offset, Width::Two))
        .and_then(|control| u16::try_from(control).ok());
    let pin = config.read(header::INTERRUPT_PIN.offset, Width::One);
    Ok(Registers {
        answers: true,
        power: power.map(PowerState::from_bits),
        pin: pin.is_ok_and(|pin| pin != 0),
        express: capabilities.find(CapabilityId::PCI_EXPRESS).is_some(),
        msi: interrupts.msi().is_some(),
        msix: interrupts.msix().map(|msix| {
            let msix = msix.map_err(|error| failed(&error))?;
            let table = read(msix.offset, msix::TABLE.offset, Width::Four).unwrap_or(0);
            /// The BAR's number; the rest is the offset (PCIe 7.7.2.3).
            const BAR: u32 = 7;
            Ok(Table {
                vectors: msix.vectors,
                bar: (table & BAR).to_le_bytes()[0],
                offset: table & !BAR,
            })
        }),
    })
}
