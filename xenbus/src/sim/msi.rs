//! PIRQs and message-signalled interrupts: what `PHYSDEVOP_map_pirq` and its relatives do, by the rules of Xen 4.17.

use std::sync::Arc;

use nix::errno::Errno;

use super::hardware::{CAPABILITY_MSI, CAPABILITY_MSIX, Hardware, MsiTarget, Registers};
use super::hypervisor::{Domain, Hypervisor};
use super::interrupts::{Vector, block};
use super::lock;
use crate::platform::MsiRequest;
use crate::types::{DomId, Gsi, PciDevice, Pirq};

/// MSI control word: enabled.
const MSI_ENABLE: u32 = 1 << 0;
/// MSI control word: how many vectors the device is able to use (bits 3:1) and may use (bits 6:4), as powers of 2.
const MSI_CAPABLE_SHIFT: u32 = 1;
const MSI_ENABLED_SHIFT: u32 = 4;
const MSI_COUNT_MASK: u32 = 0b111;
/// MSI-X control word: enabled, and the table's size less 1.
const MSIX_ENABLE: u32 = 1 << 15;
const MSIX_TABLE_SIZE: u32 = 0x7ff;
/// The most vectors that MSI has.
const MOST_MSI: u8 = 32;

/// What a PIRQ of a domain is mapped to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mapped {
    Line(Gsi),
    /// The MSI capability: `count` PIRQs from this one on.
    Msi {
        device: PciDevice,
        vector: Vector,
        count: usize,
    },
    /// Another PIRQ of such a block.
    MsiFollower,
    MsiX {
        device: PciDevice,
        vector: Vector,
        entry: u16,
    },
    /// Interrupts that Xen has freed, as the device was removed. `count` PIRQs still name them.
    Freed {
        count: usize,
    },
}

impl Mapped {
    fn device(self) -> Option<PciDevice> {
        match self {
            Self::Msi { device, .. } | Self::MsiX { device, .. } => Some(device),
            Self::Line(_) | Self::MsiFollower | Self::Freed { .. } => None,
        }
    }
}

/// Writes address and data into the device.
fn program(
    hardware: &dyn Hardware,
    device: PciDevice,
    domain: DomId,
    entry: Option<u16>,
    vector: Vector,
) -> Result<(), Errno> {
    let (address, data) = vector.message();
    let programmed = hardware.program_msi(
        device,
        MsiTarget {
            domain,
            entry,
            address,
            data,
        },
    );
    programmed.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Sets how many MSI vectors the device may use.
fn with_count(control: u32, count: usize) -> u32 {
    control & !(MSI_COUNT_MASK << MSI_ENABLED_SHIFT) | count.trailing_zeros() << MSI_ENABLED_SHIFT
}

impl Domain {
    /// PIRQs in a row that are free, from the top down. Gives the first.
    fn free_pirqs(&self, gsis: u32, extra: u32, count: usize) -> Result<Pirq, Errno> {
        let mut run = 0usize;
        for number in (gsis..gsis.saturating_add(extra)).rev() {
            run = if self.pirqs.contains_key(&Pirq(number)) {
                0
            } else {
                run.saturating_add(1)
            };
            if run == count {
                return Ok(Pirq(number));
            }
        }
        Err(Errno::ENOSPC)
    }
}

impl Hypervisor {
    /// Entries of a device's MSI-X table that are in use, the recorded table itself counting as one.
    fn msix_in_use(&self, device: PciDevice) -> usize {
        let prepared = self
            .devices
            .get(&device)
            .is_some_and(|record| record.msix_prepared);
        let of_device = |mapped: &&Mapped| matches!(mapped, Mapped::MsiX { device: other, .. } if *other == device);
        let mapped = self
            .domains
            .values()
            .map(|domain| domain.pirqs.values().filter(of_device).count());
        mapped.fold(usize::from(prepared), usize::saturating_add)
    }

    /// `PHYSDEVOP_prepare_msix`.
    ///
    /// # Errors
    /// ENODEV without device or MSI-X, ENXIO without memory decode, EBUSY when it was done already.
    pub fn prepare_msix(&mut self, device: PciDevice) -> Result<(), Errno> {
        self.device(device)?;
        let registers = Registers {
            hardware: &*self.hardware,
            device,
        };
        registers.capability(CAPABILITY_MSIX).ok_or(Errno::ENODEV)?;
        let decoded = registers.memory_decoded();
        if self.msix_in_use(device) != 0 {
            return Err(Errno::EBUSY);
        }
        if !decoded {
            return Err(Errno::ENXIO);
        }
        self.device(device)?.msix_prepared = true;
        Ok(())
    }

    /// `PHYSDEVOP_release_msix`.
    ///
    /// # Errors
    /// ENODEV without device or MSI-X, EBUSY when it was not prepared or is in use.
    pub fn release_msix(&mut self, device: PciDevice) -> Result<(), Errno> {
        self.device(device)?;
        Registers {
            hardware: &*self.hardware,
            device,
        }
        .capability(CAPABILITY_MSIX)
        .ok_or(Errno::ENODEV)?;
        if self.msix_in_use(device) != 1 || !self.device(device)?.msix_prepared {
            return Err(Errno::EBUSY);
        }
        self.device(device)?.msix_prepared = false;
        Ok(())
    }

    /// `PHYSDEVOP_map_pirq` for a message-signalled interrupt.
    ///
    /// # Errors
    /// ESRCH without the domain, EDOM for an impossible count, ENOSPC when PIRQs or vectors have run out, ENODEV when the device is not the
    /// domain's or has no such capability, ENFILE for more MSI vectors than the device has, EINVAL for an entry beyond the table, ENXIO
    /// without memory decode, ENODATA when the table was not recorded; what the hardware says.
    pub fn map_msi(
        &mut self,
        id: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, Errno> {
        let count = match request {
            MsiRequest::MultiMsi { count } if count == 0 || count > MOST_MSI => {
                return Err(Errno::EDOM);
            }
            MsiRequest::MultiMsi { count } => {
                usize::from(count.checked_next_power_of_two().ok_or(Errno::EDOM)?)
            }
            MsiRequest::Msi | MsiRequest::MsiX { .. } => 1,
        };
        let (gsis, extra) = (self.options.gsis, self.options.extra_pirqs);
        let first = self.alive(id)?.free_pirqs(gsis, extra, count)?;
        if self.device(device)?.owner != id {
            return Err(Errno::ENODEV);
        }
        let hardware = Arc::clone(&self.hardware);
        let registers = Registers {
            hardware: &*hardware,
            device,
        };
        let msix = match request {
            MsiRequest::MsiX { entry, .. } => Some(entry),
            MsiRequest::Msi | MsiRequest::MultiMsi { .. } => None,
        };
        match msix {
            Some(entry) => self.check_msix(&registers, entry)?,
            None => check_msi(&registers, count)?,
        }
        let vector = lock(&self.interrupts)
            .allocate(id, first, count)
            .ok_or(Errno::ENOSPC)?;
        let mapped = match msix {
            Some(entry) => Mapped::MsiX {
                device,
                vector,
                entry,
            },
            None => Mapped::Msi {
                device,
                vector,
                count,
            },
        };
        if let (None, Some(offset)) = (msix, registers.capability(CAPABILITY_MSI)) {
            registers.set_control(offset, with_count(registers.control(offset), count));
        }
        let pirqs = (first.0..).zip(block(vector, count));
        let pirqs = pirqs.map(|(number, _)| Pirq(number));
        if let Err(errno) = program(&*hardware, device, id, msix, vector) {
            let mut interrupts = lock(&self.interrupts);
            interrupts.free(vector, count);
            for pirq in pirqs {
                interrupts.forget(id, pirq);
            }
            return Err(errno);
        }
        let domain = self.alive(id)?;
        for pirq in pirqs {
            domain.pirqs.insert(pirq, Mapped::MsiFollower);
        }
        domain.pirqs.insert(first, mapped);
        Ok(first)
    }

    fn check_msix(&self, registers: &Registers<'_>, entry: u16) -> Result<(), Errno> {
        let offset = registers.capability(CAPABILITY_MSIX).ok_or(Errno::ENODEV)?;
        if u32::from(entry) > registers.control(offset) & MSIX_TABLE_SIZE {
            return Err(Errno::EINVAL);
        }
        if !registers.memory_decoded() {
            return Err(Errno::ENXIO);
        }
        let prepared = self
            .devices
            .get(&registers.device)
            .is_some_and(|record| record.msix_prepared);
        if prepared {
            Ok(())
        } else {
            Err(Errno::ENODATA)
        }
    }

    /// `PHYSDEVOP_map_pirq` for a line, to the PIRQ of the same number, as libxl asks for it.
    ///
    /// # Errors
    /// ESRCH without the domain, EINVAL when there is no such line.
    pub fn map_line(&mut self, id: DomId, gsi: Gsi) -> Result<Pirq, Errno> {
        let known = gsi.0 < self.options.gsis;
        let domain = self.alive(id)?;
        if !known {
            return Err(Errno::EINVAL);
        }
        let pirq = Pirq(gsi.0);
        domain.pirqs.insert(pirq, Mapped::Line(gsi));
        lock(&self.interrupts).connect_line(gsi, id, pirq);
        Ok(pirq)
    }

    /// The line that a domain's PIRQ is mapped to.
    ///
    /// # Errors
    /// ESRCH without the domain, EINVAL when it is mapped to none.
    pub fn line_of_pirq(&mut self, id: DomId, pirq: Pirq) -> Result<Gsi, Errno> {
        match self.alive(id)?.pirqs.get(&pirq) {
            Some(Mapped::Line(gsi)) => Ok(*gsi),
            _ => Err(Errno::EINVAL),
        }
    }

    /// `PHYSDEVOP_unmap_pirq`.
    ///
    /// # Errors
    /// ESRCH without the domain, EINVAL when it is not mapped, EBUSY for any but the first of a block.
    pub fn unmap_pirq(&mut self, id: DomId, pirq: Pirq) -> Result<(), Errno> {
        let domain = self.alive(id)?;
        let mapped = *domain.pirqs.get(&pirq).ok_or(Errno::EINVAL)?;
        let count = match mapped {
            Mapped::MsiFollower => return Err(Errno::EBUSY),
            Mapped::Msi { count, .. } | Mapped::Freed { count } => count,
            Mapped::Line(_) | Mapped::MsiX { .. } => 1,
        };
        let numbers = (pirq.0..).zip(0..count).map(|(number, _)| Pirq(number));
        for number in numbers.clone() {
            domain.pirqs.remove(&number);
        }
        let mut interrupts = lock(&self.interrupts);
        for number in numbers {
            interrupts.forget(id, number);
        }
        match mapped {
            Mapped::Line(gsi) => interrupts.disconnect_line(gsi, id, pirq),
            Mapped::Msi { vector, .. } | Mapped::MsiX { vector, .. } => {
                interrupts.free(vector, count)
            }
            Mapped::MsiFollower | Mapped::Freed { .. } => {}
        }
        drop(interrupts);
        self.silence(mapped);
        Ok(())
    }

    /// `PHYSDEVOP_pci_device_remove`: forgets a device and frees its interrupts, whoever has them mapped. Gives how many were.
    pub fn remove_device(&mut self, device: PciDevice) -> usize {
        self.devices.remove(&device);
        let mut interrupts = lock(&self.interrupts);
        let mut orphaned = 0usize;
        let pirqs = self
            .domains
            .values_mut()
            .flat_map(|domain| domain.pirqs.values_mut())
            .filter(|mapped| mapped.device() == Some(device));
        for mapped in pirqs {
            let (vector, count) = match *mapped {
                Mapped::Msi { vector, count, .. } => (vector, count),
                Mapped::MsiX { vector, .. } => (vector, 1),
                Mapped::Line(_) | Mapped::MsiFollower | Mapped::Freed { .. } => continue,
            };
            interrupts.free(vector, count);
            orphaned = orphaned.saturating_add(count);
            *mapped = Mapped::Freed { count };
        }
        orphaned
    }

    /// Stops a device from sending what nobody expects any more.
    fn silence(&self, mapped: Mapped) {
        match mapped {
            Mapped::Msi { device, .. } => {
                let registers = Registers {
                    hardware: &*self.hardware,
                    device,
                };
                if let Some(offset) = registers.capability(CAPABILITY_MSI) {
                    registers.set_control(offset, registers.control(offset) & !MSI_ENABLE);
                }
                self.hardware.clear_msi(device, None);
            }
            Mapped::MsiX { device, entry, .. } => self.hardware.clear_msi(device, Some(entry)),
            Mapped::Line(_) | Mapped::MsiFollower | Mapped::Freed { .. } => {}
        }
    }

    /// `PHYSDEVOP_restore_msi_ext`: programs a device anew with all that is mapped, and enables it.
    ///
    /// # Errors
    /// ENODEV without the device, ENXIO for MSI-X without memory decode; what the hardware says of the first that it does not take.
    pub fn restore_msi(&mut self, device: PciDevice) -> Result<(), Errno> {
        self.device(device)?;
        let registers = Registers {
            hardware: &*self.hardware,
            device,
        };
        let all = self.domains.iter().flat_map(|(id, domain)| {
            let pirqs = domain.pirqs.values();
            pirqs.map(|mapped| (*id, mapped))
        });
        let mut result = Ok(());
        for (id, mapped) in all.filter(|(_, mapped)| mapped.device() == Some(device)) {
            match *mapped {
                Mapped::Msi { vector, count, .. } => {
                    result = result.and(program(&*self.hardware, device, id, None, vector));
                    if let Some(offset) = registers.capability(CAPABILITY_MSI) {
                        registers.set_control(
                            offset,
                            with_count(registers.control(offset), count) | MSI_ENABLE,
                        );
                    }
                }
                Mapped::MsiX { vector, entry, .. } => {
                    if !registers.memory_decoded() {
                        return Err(Errno::ENXIO);
                    }
                    let programmed = program(&*self.hardware, device, id, Some(entry), vector);
                    result = result.and(programmed);
                    if let Some(offset) = registers.capability(CAPABILITY_MSIX) {
                        registers.set_control(offset, registers.control(offset) | MSIX_ENABLE);
                    }
                }
                Mapped::Line(_) | Mapped::MsiFollower | Mapped::Freed { .. } => {}
            }
        }
        result
    }
}

fn check_msi(registers: &Registers<'_>, count: usize) -> Result<(), Errno> {
    let offset = registers.capability(CAPABILITY_MSI).ok_or(Errno::ENODEV)?;
    let able = registers.control(offset) >> MSI_CAPABLE_SHIFT & MSI_COUNT_MASK;
    // 6 and 7 are reserved.
    let most = 1usize << able.min(5);
    if count > most {
        Err(Errno::ENFILE)
    } else {
        Ok(())
    }
}
