//! Which device is where in the guest.

use std::fmt;

use virtio::pci::Shape;
use virtio::transport::mmio::Version;
use xenbus::device_model::IntxPin;

use super::mmio;
use crate::config::{MmioSlot, Place, Slot, VirtioDevice};

/// Where a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    /// On the guest's first PCI bus.
    Pci(Slot),
    /// Among its slots of virtio-mmio.
    Mmio(MmioSlot),
}

/// The number that consoles have in front of those of virtio-mmio: there are 32 slots of PCI.
const BEHIND_PCI: u8 = 32;

impl At {
    /// As part of a file's or a network interface's name.
    pub fn tag(self) -> String {
        match self {
            Self::Pci(slot) => format!("s{:02x}", slot.number()),
            Self::Mmio(slot) => format!("m{slot}"),
        }
    }

    /// A number that no other place has: a PCI slot's own, or 32 and more.
    pub fn number(self) -> u8 {
        match self {
            Self::Pci(slot) => slot.number(),
            Self::Mmio(slot) => BEHIND_PCI.saturating_add(slot.number()),
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(slot) => write!(f, "slot {:02x}", slot.number()),
            Self::Mmio(slot) => write!(f, "mmio slot {slot}"),
        }
    }
}

/// A device's place, and what it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seat {
    Pci { slot: Slot, shape: Shape },
    Mmio { slot: MmioSlot, version: Version },
}

impl Seat {
    pub fn at(self) -> At {
        match self {
            Self::Pci { slot, .. } => At::Pci(slot),
            Self::Mmio { slot, .. } => At::Mmio(slot),
        }
    }

    /// What says that it is there and nowhere else.
    fn place(self) -> Place {
        match self {
            Self::Pci { slot, shape } => Place::Pci {
                slot: Some(slot),
                shape,
            },
            Self::Mmio { slot, version } => Place::Mmio {
                slot: Some(slot),
                version,
            },
        }
    }

    /// The interrupt line of what is there.
    pub fn line(self) -> IntxPin {
        match self {
            Self::Pci { slot, .. } => IntxPin {
                device: slot.number(),
                pin: 0,
            },
            Self::Mmio { slot, .. } => mmio::line(slot),
        }
    }
}

/// Devices cannot all be where they should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Two want one place.
    #[error(
        "two virtio devices are to be in {0}: give one of them another slot, or none to have one chosen"
    )]
    Taken(At),
    /// There are more than slots.
    #[error(
        "there are more virtio devices than slots: a guest has 30 on PCI and {} of virtio-mmio",
        MmioSlot::COUNT
    )]
    Full,
}

/// Gives each device its place: first those that ask for one, then the others: PCI functions from the highest slot
/// downwards, away from QEMU's; virtio-mmio from the lowest upwards.
///
/// # Errors
/// [`PlaceError`].
pub(super) fn place<'a>(
    devices: impl IntoIterator<Item = &'a VirtioDevice>,
) -> Result<Vec<(Seat, &'a VirtioDevice)>, PlaceError> {
    let mut seated: Vec<(Seat, &VirtioDevice)> = Vec::new();
    let mut others = Vec::new();
    for device in devices {
        let seat = match device.place {
            Place::Pci { slot, shape } => slot.map(|slot| Seat::Pci { slot, shape }),
            Place::Mmio { slot, version } => slot.map(|slot| Seat::Mmio { slot, version }),
        };
        match seat {
            None => others.push(device),
            Some(seat) if is_free(&seated, seat) => seated.push((seat, device)),
            Some(seat) => return Err(PlaceError::Taken(seat.at())),
        }
    }
    for device in others {
        let free = |seat: &Seat| is_free(&seated, *seat);
        let seat = match device.place {
            Place::Pci { shape, .. } => {
                let seats = Slot::all().rev().map(|slot| Seat::Pci { slot, shape });
                seats.into_iter().find(free)
            }
            Place::Mmio { version, .. } => {
                let seats = MmioSlot::all().map(|slot| Seat::Mmio { slot, version });
                seats.into_iter().find(free)
            }
        };
        seated.push((seat.ok_or(PlaceError::Full)?, device));
    }
    Ok(seated)
}

/// The same devices, each with the slot that it gets: it keeps this one when others come.
///
/// # Errors
/// [`PlaceError`].
pub(super) fn settled(devices: &[VirtioDevice]) -> Result<Vec<VirtioDevice>, PlaceError> {
    let seated = place(devices)?.into_iter();
    let settled = seated.map(|(seat, device)| VirtioDevice {
        place: seat.place(),
        ..device.clone()
    });
    Ok(settled.collect())
}

/// The last of these devices with the slot that it gets among all of them, and where that is.
///
/// # Errors
/// [`PlaceError`].
pub(super) fn settle_last(devices: &[&VirtioDevice]) -> Result<(At, VirtioDevice), PlaceError> {
    let last = devices.last().copied();
    let seated = place(devices.iter().copied())?;
    let found = seated
        .into_iter()
        .find(|(_, device)| last.is_some_and(|last| std::ptr::eq(last, *device)));
    let (seat, device) = found.ok_or(PlaceError::Full)?;
    let settled = VirtioDevice {
        place: seat.place(),
        ..device.clone()
    };
    Ok((seat.at(), settled))
}

fn is_free(seated: &[(Seat, &VirtioDevice)], seat: Seat) -> bool {
    seated.iter().all(|(taken, _)| taken.at() != seat.at())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn places(devices: &str) -> Result<Vec<String>, PlaceError> {
        let config: Config = devices.parse().unwrap();
        let placed = place(&config.guest["web"].virtio)?;
        Ok(placed.iter().map(|(seat, _)| seat.at().tag()).collect())
    }

    const ANY: &str = "[[guest.web.virtio]]\ntype = \"rng\"\n";
    const MMIO: &str = "[[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\n";

    fn at(slot: &str) -> String {
        format!("{ANY}slot = \"{slot}\"\n")
    }

    #[test]
    fn devices_without_a_slot_get_the_highest_that_are_free() {
        let devices = [ANY, &at("1e"), ANY, &at("5")].concat();
        assert_eq!(places(&devices).unwrap(), ["s1e", "s05", "s1f", "s1d"]);
    }

    #[test]
    fn on_virtio_mmio_they_get_the_lowest() {
        let devices = [MMIO, ANY, MMIO, "slot = \"0\"\n", MMIO].concat();
        assert_eq!(places(&devices).unwrap(), ["m0", "m1", "s1f", "m2"]);
    }

    #[test]
    fn a_slot_is_one_device_s() {
        let taken = places(&[at("10"), at("10")].concat()).unwrap_err();
        assert_eq!(taken, PlaceError::Taken(At::Pci(Slot::new(0x10).unwrap())));
        for (one, most) in [(ANY, 30), (MMIO, 7)] {
            assert_eq!(places(&one.repeat(most)).unwrap().len(), most);
            assert_eq!(places(&one.repeat(most + 1)), Err(PlaceError::Full));
        }
    }

    #[test]
    fn each_place_has_a_number_of_its_own() {
        let all = Slot::all()
            .map(At::Pci)
            .chain(MmioSlot::all().map(At::Mmio));
        let mut numbers: Vec<_> = all.map(At::number).collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), count);
    }
}
