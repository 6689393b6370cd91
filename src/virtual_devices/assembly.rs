//! From the configuration to devices in their slots.

use std::io;
use std::sync::Arc;

use conf_space::emulated::BuildError;
use virtio::ioreq::{DomainInterrupts, Placed};
use virtio::memory::GuestRam;
use virtio::pci::VirtioFunction;
use virtio::transport::{Parts, RING_FEATURES};
use xenbus::device_model::IntxPin;
use xenbus::{DomId, PciDevice, Xen};

use super::backends::{self, BackendError, Terminal};
use super::record::Record;
use crate::config::{Slot, VirtioDevice};

/// A guest's devices cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// Two want one slot.
    #[error(
        "two virtio devices are to be in slot {slot:02x}: give one of them another slot, or none to have one chosen"
    )]
    SlotTaken {
        /// The slot.
        slot: u8,
    },
    /// There are more than slots.
    #[error("there are more virtio devices than slots; a guest has 30 for them")]
    NoSlot,
    /// What a device is made of is not there.
    #[error("the {kind} device in slot {slot:02x} cannot be made")]
    Backend {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        slot: u8,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// Its record cannot be kept.
    #[error("the {kind} device in slot {slot:02x} has no record")]
    Record {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        slot: u8,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not fit into a PCI function.
    #[error("the {kind} device in slot {slot:02x} does not fit into a PCI function")]
    Function {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        slot: u8,
        /// Why.
        #[source]
        source: BuildError,
    },
}

/// Gives each device its slot: first those that ask for one, then the others, from the highest downwards.
///
/// # Errors
/// [`AssemblyError::SlotTaken`], [`AssemblyError::NoSlot`].
pub(super) fn place(devices: &[VirtioDevice]) -> Result<Vec<(Slot, &VirtioDevice)>, AssemblyError> {
    let mut placed: Vec<(Slot, &VirtioDevice)> = Vec::with_capacity(devices.len());
    for device in devices {
        let Some(slot) = device.slot else { continue };
        if placed.iter().any(|(taken, _)| *taken == slot) {
            let slot = slot.number();
            return Err(AssemblyError::SlotTaken { slot });
        }
        placed.push((slot, device));
    }
    for device in devices.iter().filter(|device| device.slot.is_none()) {
        let slot = (Slot::FIRST.number()..=Slot::LAST.number())
            .rev()
            .filter_map(|number| Slot::new(number).ok())
            .find(|slot| placed.iter().all(|(taken, _)| taken != slot))
            .ok_or(AssemblyError::NoSlot)?;
        placed.push((slot, device));
    }
    Ok(placed)
}

/// A guest's devices, and what of them there is to tell of.
pub(super) struct Assembled {
    pub targets: Vec<Placed>,
    /// By slot.
    pub terminals: Vec<(u8, Terminal)>,
}

/// Makes a guest's devices. What they are made of is opened before any of them comes to life.
///
/// # Errors
/// [`AssemblyError`].
pub(super) fn assemble(
    xen: &Arc<dyn Xen>,
    domain: DomId,
    guest: &str,
    ram: &Arc<GuestRam>,
    record: &Record,
    devices: &[VirtioDevice],
) -> Result<Assembled, AssemblyError> {
    let placed = place(devices)?.into_iter();
    let opened = placed.map(|(slot, configured)| {
        let (kind, slot) = (configured.model.name(), slot.number());
        backends::open(&configured.model, domain, &format!("s{slot:02x}"), guest)
            .map(|backend| (slot, configured, backend))
            .map_err(|source| AssemblyError::Backend { kind, slot, source })
    });
    let opened: Vec<_> = opened.collect::<Result<_, _>>()?;
    let mut assembled = Assembled {
        targets: Vec::new(),
        terminals: Vec::new(),
    };
    for (slot, configured, backend) in opened {
        let kind = configured.model.name();
        let device = backend.device;
        let notes = record
            .device(slot, &*device)
            .map_err(|source| AssemblyError::Record { kind, slot, source })?;
        let pin = IntxPin {
            device: slot,
            pin: 0,
        };
        let parts = Parts {
            name: format!("domain {domain}, {kind} in slot {slot:02x}"),
            device,
            features: RING_FEATURES,
            ram: Arc::clone(ram),
            sink: Arc::new(DomainInterrupts::new(Arc::clone(xen) as _, domain, pin)),
            notes,
        };
        let function = VirtioFunction::new(parts, &configured.shape)
            .map_err(|source| AssemblyError::Function { kind, slot, source })?;
        let address = PciDevice {
            segment: 0,
            bus: 0,
            devfn: slot << 3,
        };
        assembled.targets.push(Placed {
            function: Some(address),
            target: Box::new(function),
        });
        let terminals = backend.terminals.into_iter();
        assembled
            .terminals
            .extend(terminals.map(|terminal| (slot, terminal)));
    }
    Ok(assembled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn slots(devices: &str) -> Result<Vec<u8>, AssemblyError> {
        let config: Config = devices.parse().unwrap();
        let placed = place(&config.guest["web"].virtio)?;
        Ok(placed.iter().map(|(slot, _)| slot.number()).collect())
    }

    const ANY: &str = "[[guest.web.virtio]]\ntype = \"rng\"\n";

    fn at(slot: &str) -> String {
        format!("{ANY}slot = \"{slot}\"\n")
    }

    #[test]
    fn devices_without_a_slot_get_the_highest_that_are_free() {
        let devices = [ANY, &at("1e"), ANY, &at("5")].concat();
        assert_eq!(slots(&devices).unwrap(), [0x1e, 5, 0x1f, 0x1d]);
    }

    #[test]
    fn a_slot_is_one_device_s() {
        let taken = slots(&[at("10"), at("10")].concat());
        assert!(matches!(
            taken,
            Err(AssemblyError::SlotTaken { slot: 0x10 })
        ));
        assert_eq!(slots(&ANY.repeat(30)).unwrap().len(), 30);
        assert!(matches!(slots(&ANY.repeat(31)), Err(AssemblyError::NoSlot)));
    }
}
