//! One device that is bound to vfio-pci, and what of it is open.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use conf_space::capabilities::{Capabilities, CapabilityId};
use conf_space::overlay::Identity;
use conf_space::registers::header::{self, command};
use conf_space::registers::{msi, msix};
use conf_space::{AccessError, Bdf, ConfigSize, ConfigSpace, Width};
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use xenbus::sim::Machine;
use xenbus::{DomId, Gsi};

use super::config::change_command;
use super::interrupts::{Listener, Wiring};
use super::ioctl::{self, Affected};
use super::movable::{InUse, Movable};
use super::regions::Kept;
use super::windows::{self, Region, WINDOWS};
use super::{Complaints, lock};
use crate::host::config_file::ConfigFile;

/// Where a device's control words of MSI and MSI-X are, its MSI-X table, and its power management capability.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Controls {
    pub msi: Option<u16>,
    pub msix: Option<u16>,
    pub table: Option<Kept>,
    pub power: Option<u16>,
}

/// An open device. The kernel closes it with the last of its descriptors, and then lets its group go if that is closed, too.
#[derive(Debug)]
pub(super) struct Open {
    /// Locked for use, and as a whole for a reset, during which the kernel lets whoever touches the device wait.
    wiring: RwLock<Wiring>,
    pub config: ConfigFile,
    pub controls: Controls,
    pub regions: [Region; WINDOWS],
    /// Held while its I/O ports are accessed.
    pub ports: RwLock<()>,
    /// The kernel has a reset for it.
    pub resets: bool,
    pub file: Arc<File>,
}

impl Open {
    /// Opens a device of an open group that is in a space. The kernel switches it on, and resets it if it can.
    ///
    /// # Errors
    /// The kernel's; EPROTO when what it says of the device makes no sense.
    pub fn new(
        bdf: Bdf,
        group: &File,
        machine: &Machine,
        line: Option<Gsi>,
        listener: &Arc<dyn Listener>,
    ) -> io::Result<Self> {
        let file = Arc::new(ioctl::open_device(group, bdf)?);
        let info = ioctl::device_info(&file)?;
        let complete = info.regions > VFIO_PCI_CONFIG_REGION_INDEX
            && info.interrupts > VFIO_PCI_MSIX_IRQ_INDEX;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 || !complete {
            return Err(Errno::EPROTO.into());
        }
        let space = ioctl::region_info(&file, VFIO_PCI_CONFIG_REGION_INDEX)?;
        let config = ConfigFile::at(file.try_clone()?, space.offset);
        if let Some(Gsi(line)) = line {
            // The kernel keeps this register for us, as it does nothing to the device.
            let register = &header::INTERRUPT_LINE;
            config
                .write(register.offset, register.width, line)
                .map_err(from_access)?;
        }
        let (controls, kept) = find_controls(&config).map_err(from_access)?;
        Ok(Self {
            wiring: RwLock::new(Wiring::new(bdf, &file, machine, line, listener)?),
            config,
            controls,
            regions: windows::regions(bdf, &file, &kept)?,
            ports: RwLock::default(),
            resets: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            file,
        })
    }

    /// Its interrupts. Waits while it is being reset.
    pub fn wiring(&self) -> RwLockReadGuard<'_, Wiring> {
        self.wiring.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its interrupts, for who cannot wait. As long as they are borrowed, nobody resets it.
    ///
    /// # Errors
    /// EBUSY while it is being reset.
    pub fn wiring_at_once(&self) -> Result<RwLockReadGuard<'_, Wiring>, Errno> {
        match self.wiring.try_read() {
            Ok(wiring) => Ok(wiring),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Errno::EBUSY),
        }
    }

    /// Keeps everybody from its interrupts and its I/O ports, and Xen from all of it, while it is reset.
    pub fn hold(&self) -> (RwLockWriteGuard<'_, Wiring>, RwLockWriteGuard<'_, ()>) {
        let wiring = self.wiring.write().unwrap_or_else(PoisonError::into_inner);
        (wiring, self.silence_ports())
    }

    /// Resets it, if the kernel can.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reset(&self) -> io::Result<()> {
        if !self.resets {
            return Ok(());
        }
        let _held = self.hold();
        ioctl::reset(&self.file)
    }

    pub fn command(&self) -> Option<u32> {
        let register = &header::COMMAND;
        self.config.read(register.offset, register.width).ok()
    }

    /// Whether the command register lets the device raise its line.
    fn has_line_on(&self) -> bool {
        let off = u32::from(command::INTX_DISABLE);
        self.command().is_some_and(|command| command & off == 0)
    }
}

/// The interrupt capabilities: their control words, and what of BARs they keep to themselves.
fn find_controls(config: &ConfigFile) -> Result<(Controls, Vec<Kept>), AccessError> {
    let found = Capabilities::walk(config, ConfigSize::Conventional)?;
    let control = |id, register: u16| {
        let base = found.find(id)?;
        base.checked_add(register)
    };
    let mut controls = Controls {
        msi: control(CapabilityId::MSI, msi::CONTROL.offset),
        msix: control(CapabilityId::MSI_X, msix::CONTROL.offset),
        table: None,
        power: found.find(CapabilityId::POWER_MANAGEMENT),
    };
    let mut kept = Vec::new();
    if let Some(base) = found.find(CapabilityId::MSI_X) {
        let long = |register: u16| config.read(base.saturating_add(register), Width::Four);
        let [low, high, ..] = config
            .read(base.saturating_add(msix::CONTROL.offset), Width::Two)?
            .to_le_bytes();
        let control = u16::from_le_bytes([low, high]);
        let table = Kept::from(msix::table(control, long(msix::TABLE.offset)?));
        controls.table = Some(table);
        kept.push(table);
        kept.push(msix::pending_bits(control, long(msix::PENDING.offset)?).into());
    }
    Ok((controls, kept))
}

pub(super) fn from_access(error: AccessError) -> io::Error {
    let errno = match error {
        AccessError::Gone => libc::ENODEV,
        AccessError::Denied => libc::EPERM,
        AccessError::Failed { errno } => errno,
    };
    io::Error::from_raw_os_error(errno)
}

/// A device that vfio-pci has for us. It is closed while its group goes from one guest to another.
#[derive(Debug)]
pub(super) struct Slot {
    pub bdf: Bdf,
    /// Number of its IOMMU group.
    pub group: u32,
    /// What its INTx line is to the embedded machine.
    pub line: Option<Gsi>,
    /// What it is, and where its BARs are.
    pub identity: Identity,
    pub open: Movable<Open>,
    /// Held while a guest accesses its memory.
    owner: RwLock<Option<DomId>>,
    gone: AtomicBool,
    /// The kernel refuses the line, which was told.
    line_refused: AtomicBool,
    /// A guest has asked for its memory, and so may have a descriptor of it.
    lent: AtomicBool,
    /// What a reset of its bus reaches, as the kernel said when it was opened last; nothing, if there is no such reset.
    on_bus: Mutex<Vec<Affected>>,
    pub complaints: Complaints,
    /// Of its DMA that the IOMMU has stopped, which a guest is not to keep out of the log by others.
    pub stopped_dma: Complaints,
}

impl Slot {
    /// Not open yet.
    pub fn new(bdf: Bdf, group: u32, line: Option<Gsi>, identity: Identity) -> Self {
        Self {
            bdf,
            group,
            line,
            identity,
            open: Movable::new(),
            owner: RwLock::new(None),
            gone: AtomicBool::new(false),
            line_refused: AtomicBool::new(false),
            lent: AtomicBool::new(false),
            on_bus: Mutex::default(),
            complaints: Complaints::new(),
            stopped_dma: Complaints::new(),
        }
    }

    /// The open device.
    ///
    /// # Errors
    /// ENODEV when it is wanted back, EBUSY while it changes hands; why it could not be opened.
    pub fn get(&self) -> io::Result<InUse<'_, Open>> {
        if self.is_gone() {
            return Err(Errno::ENODEV.into());
        }
        Ok(self.open.get()?)
    }

    /// Does something with the open device.
    ///
    /// # Errors
    /// As [`Slot::get`].
    pub fn with<T>(&self, action: impl FnOnce(&Open) -> io::Result<T>) -> io::Result<T> {
        action(&*self.get()?)
    }

    /// Does something with the open device for a guest, whose it stays meanwhile.
    ///
    /// # Errors
    /// EPERM when it is not that guest's; as [`Slot::get`].
    pub fn with_for<T>(
        &self,
        domain: DomId,
        action: impl FnOnce(&Open) -> io::Result<T>,
    ) -> io::Result<T> {
        let owner = self.held_owner();
        if *owner != Some(domain) {
            return Err(Errno::EPERM.into());
        }
        self.with(action)
    }

    /// What a reset of its bus reached when it was opened last, which is no secret while it changes hands.
    pub fn on_bus(&self) -> Vec<Affected> {
        lock(&self.on_bus).clone()
    }

    /// It was opened, or could not be.
    ///
    /// # Errors
    /// That of `opened`.
    pub fn arrive(&self, opened: io::Result<Open>) -> io::Result<()> {
        if let Ok(open) = &opened {
            self.set_on_bus(ioctl::hot_reset_info(&open.file).unwrap_or_default());
        }
        self.open.arrive(opened)
    }

    /// What a reset of its bus reaches.
    pub fn set_on_bus(&self, affected: Vec<Affected>) {
        *lock(&self.on_bus) = affected;
    }

    /// Closes it for good.
    pub fn close(&self) {
        if let Some(open) = self.open.begin_to_move() {
            self.open.close(open);
        }
        let _ = self.open.arrive(Err(Errno::ENODEV.into()));
    }

    /// The guest that has it.
    pub fn owner(&self) -> Option<DomId> {
        *self.held_owner()
    }

    /// The guest that has it, and goes on having it as long as that is borrowed.
    pub fn held_owner(&self) -> RwLockReadGuard<'_, Option<DomId>> {
        self.owner.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the former one's accesses are done.
    pub fn set_owner(&self, owner: Option<DomId>) {
        *self.owner.write().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// Whether the kernel wants it back: it was pulled out, or somebody unbinds it.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// From now on it reads as gone. `false`: it did already.
    pub fn set_gone(&self) -> bool {
        !self.gone.swap(true, Ordering::AcqRel)
    }

    /// Whether somebody else may have it open.
    pub fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Acquire)
    }

    /// From now on somebody else may have it open.
    pub fn set_lent(&self) {
        self.lent.store(true, Ordering::Release);
    }

    /// Nobody else has it open any more.
    pub fn set_returned(&self) {
        self.lent.store(false, Ordering::Release);
    }

    /// Its guest has the line from now on.
    ///
    /// # Errors
    /// As [`Slot::with_for`], and the kernel's.
    pub fn give_line(&self, domain: DomId) -> io::Result<()> {
        self.with_for(domain, |open| {
            let wiring = open.wiring();
            wiring.give_line(domain);
            change_command(open, command::INTX_DISABLE, 0)?;
            self.settle_line(open, &wiring);
            Ok(())
        })
    }

    /// Has the line interrupt as long as a guest has it, the command register has the line on, and neither MSI nor MSI-X is. The kernel keeps a
    /// device off its line that is not to use it, and holds the line all the same, which another device may need.
    pub fn settle_line(&self, open: &Open, wiring: &Wiring) {
        match wiring.set_line(open.has_line_on()) {
            Ok(()) => self.line_refused.store(false, Ordering::Release),
            // It is tried again with each write of the command register.
            Err(_) if self.line_refused.swap(true, Ordering::AcqRel) => {}
            Err(error) => self.complaints.warn(|| {
                format!(
                    "{}: its guest has no interrupts by its INTx line ({error}), only by MSI or MSI-X; another device may use the same line in \
                     the host: see /proc/interrupts",
                    self.bdf
                )
            }),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use conf_space::Resource;

    use super::*;

    impl Open {
        /// Of a file that is no device: it has this configuration space, and nothing more.
        pub fn made_up(
            bdf: Bdf,
            config: File,
            machine: &Machine,
            listener: &Arc<dyn Listener>,
        ) -> Self {
            let file = config.try_clone().unwrap();
            let wiring = Wiring::made_up(bdf, file.try_clone().unwrap(), machine, listener);
            Self {
                wiring: RwLock::new(wiring),
                config: ConfigFile::at(config, 0),
                controls: Controls::default(),
                regions: Default::default(),
                ports: RwLock::default(),
                resets: true,
                file: Arc::new(file),
            }
        }
    }

    /// Of a device that is not open, in group 1.
    pub fn slot(bdf: Bdf) -> Slot {
        let identity = Identity {
            bdf,
            vendor: 0x1234,
            device: 0x11e8,
            is_virtual_function: false,
            interrupt_line: 0,
            resources: [Resource::ABSENT; WINDOWS],
            config_size: ConfigSize::Conventional,
        };
        Slot::new(bdf, 1, None, identity)
    }

    #[test]
    fn a_device_is_accessed_by_its_owner_alone() {
        let slot = slot("03:00.0".parse().unwrap());
        let access = |domain| {
            let result = slot.with_for(DomId(domain), |_| Ok(()));
            result.unwrap_err().raw_os_error()
        };
        assert_eq!(access(1), Some(libc::EPERM));
        slot.set_owner(Some(DomId(1)));
        // Nobody was given a descriptor of it.
        let areas = |domain| slot.areas(DomId(domain), 0).unwrap_err().raw_os_error();
        assert_eq!(areas(2), Some(libc::EPERM));
        assert!(!slot.is_lent());
        // It is not open here.
        assert_eq!(access(1), Some(libc::ENODEV));
        assert_eq!(access(2), Some(libc::EPERM));
        slot.set_owner(None);
        assert_eq!(access(1), Some(libc::EPERM));
    }
}
