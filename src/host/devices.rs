//! The devices that are hidden from dom0, and how they change hands: dom0 -> hidden -> a guest -> hidden -> dom0.
//!
//! A device is dom0's, hidden, or assigned to one guest at one virtual address, never two of them. Its [`Record`] says which, and is
//! written before each step, so that a daemon that was killed half-way goes on from there. Steps that may take long (a reset: up to a
//! minute) run on threads of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use conf_space::Width;
use conf_space::address::Bdf;
use nix::errno::Errno;
use xenbus::{DomId, PciDevice, Xen, XenError};

use super::config_state;
use super::record::{Flags, Owner, Phase, Record, RecordError};
use super::{Bus, Config, Description, FunctionKind, HostError};
use crate::text::chain;

/// The name that `driver_override` reserves a hidden device for. The kernel's own backend and libvirt use the same.
pub const RESERVED_FOR: &str = "pciback";

/// A device that cannot change hands.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host refused.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Its record cannot be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Xen refused.
    #[error("{bdf}: {what}")]
    Xen {
        /// The device.
        bdf: Bdf,
        /// What was to be done, and the remedy.
        what: &'static str,
        /// Xen's reason.
        #[source]
        source: XenError,
    },
    /// dom0 lives on it.
    #[error("{bdf} stays in dom0: {reason}. To hide it all the same: pciback hide --force {bdf}")]
    Needed {
        /// The device.
        bdf: Bdf,
        /// Why dom0 needs it.
        reason: String,
    },
    /// It is a bridge.
    #[error("{bdf} is a bridge: only the devices behind it can be given to a guest")]
    Bridge {
        /// The device.
        bdf: Bdf,
    },
    /// It has virtual functions, which a reset would take away.
    #[error(
        "{bdf} has {count} virtual functions in use; remove them first (echo 0 > /sys/bus/pci/devices/{bdf}/sriov_numvfs), or use --force"
    )]
    HasVirtualFunctions {
        /// The device.
        bdf: Bdf,
        /// How many.
        count: u16,
    },
    /// Something else is being done to it.
    #[error("{bdf} is busy ({phase}); try again in a moment")]
    Busy {
        /// The device.
        bdf: Bdf,
        /// What is being done.
        phase: &'static str,
    },
    /// A guest has it.
    #[error("{bdf} is in use by domain {domain}; take it away first: xl pci-detach {domain} {bdf}")]
    InUse {
        /// The device.
        bdf: Bdf,
        /// The guest.
        domain: DomId,
    },
    /// It is not hidden.
    #[error("{bdf} is not hidden from dom0; hide it first: pciback hide {bdf}")]
    NotHidden {
        /// The device.
        bdf: Bdf,
    },
    /// It came back dead from a reset.
    #[error(
        "{bdf} did not come back from its last reset (it reads as all ones); a power cycle of the host may revive it, then: pciback unhide {bdf}"
    )]
    Dead {
        /// The device.
        bdf: Bdf,
    },
}

/// Whether Xen is told to keep the device's DMA from everybody while no guest has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quarantine {
    /// By us, as `xl pci-assignable-add` does.
    Ours,
    /// By whoever asked: xl does it itself right afterwards.
    Callers,
}

/// What becomes of a device that is dom0's again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebind {
    /// The driver it had before, or else whichever matches, takes it.
    Driver,
    /// It stays without one: the caller binds one.
    Nothing,
}

/// How a guest came to hold a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It was free.
    Taken,
    /// The guest had it before the daemon was restarted.
    Resumed,
}

/// A hidden device.
#[derive(Debug)]
pub struct Device {
    /// Its address on the host.
    pub bdf: Bdf,
    /// What the bus knows of it.
    pub description: Description,
    /// Its configuration space.
    pub config: Config,
    /// For a virtual function: its physical function's configuration space.
    pub physical: Option<Config>,
    /// What interrupts it has.
    pub interrupts: msi::Interrupts,
    /// Held while its interrupts change.
    pub interrupts_lock: Mutex<()>,
    /// What is remembered of it.
    pub record: Record,
}

impl Device {
    /// The device as hypercalls name it.
    pub fn xen(&self) -> PciDevice {
        for_xen(self.bdf)
    }

    /// Whether its registers can be read at all. A virtual function's identity registers read as absent by design.
    pub fn responds(&self) -> bool {
        const COMMAND: u16 = 0x04;
        self.config
            .read(COMMAND, Width::Four)
            .is_ok_and(|value| value != u32::MAX)
    }
}

/// A device that no record belongs to yet.
struct Parts {
    bdf: Bdf,
    description: Description,
    config: Config,
    physical: Option<Config>,
    interrupts: msi::Interrupts,
}

impl Parts {
    fn with(self, record: Record) -> Device {
        let Self {
            bdf,
            description,
            config,
            physical,
            interrupts,
        } = self;
        Device {
            bdf,
            description,
            config,
            physical,
            interrupts,
            interrupts_lock: Mutex::new(()),
            record,
        }
    }
}

/// A host address as hypercalls name it.
pub fn for_xen(bdf: Bdf) -> PciDevice {
    PciDevice {
        segment: bdf.segment(),
        bus: bdf.bus(),
        devfn: bdf.devfn(),
    }
}

/// Called when a device has become free.
pub type Waker = Box<dyn Fn() + Send>;

#[derive(Debug, Default)]
struct Table {
    hidden: BTreeMap<Bdf, Arc<Device>>,
    /// Being hidden: not in `hidden` yet.
    coming: BTreeSet<Bdf>,
}

/// All hidden devices.
pub struct Devices {
    bus: Arc<dyn Bus>,
    xen: Arc<dyn Xen>,
    directory: PathBuf,
    table: Mutex<Table>,
    wakers: Mutex<BTreeMap<DomId, Waker>>,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("bus", &self.bus)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Devices {
    /// Takes up what the records in `directory` say: hidden devices stay hidden, what was begun is finished.
    ///
    /// # Errors
    /// When the directory cannot be used. A single device that cannot be taken up is logged, and left out.
    pub fn open(
        bus: Arc<dyn Bus>,
        xen: Arc<dyn Xen>,
        directory: PathBuf,
    ) -> Result<Arc<Self>, RecordError> {
        let error = |source| RecordError::Io {
            path: directory.clone(),
            source,
        };
        fs::create_dir_all(&directory).map_err(error)?;
        let found = Record::list(&directory).map_err(error)?;
        let devices = Arc::new(Self {
            bus,
            xen,
            directory: directory.clone(),
            table: Mutex::default(),
            wakers: Mutex::default(),
        });
        for bdf in found {
            if let Err(error) = devices.take_up(bdf) {
                log::error!(
                    "{bdf} was hidden by an earlier pcibackd and cannot be taken up: {}",
                    chain(&error)
                );
            }
        }
        let all = devices.list();
        for device in all
            .iter()
            .filter(|device| device.record.phase() == Some(Phase::Assigned))
        {
            if let Err(error) = super::interrupts::recover(device, &*devices.xen, &all) {
                log::error!("{}: {}", device.bdf, chain(&error));
            }
        }
        Ok(devices)
    }

    /// Continues with a device that has a record.
    fn take_up(self: &Arc<Self>, bdf: Bdf) -> Result<(), DeviceError> {
        let record = Record::open(&self.directory, bdf)?;
        let Some(phase) = record.phase() else {
            return Ok(record.remove()?);
        };
        let description = match self.bus.describe(bdf) {
            Err(HostError::NoDevice { .. }) => {
                log::warn!("{bdf} was hidden and is no longer in this machine; forgetting it");
                return Ok(record.remove()?);
            }
            other => other?,
        };
        if let Some(driver) = &description.driver {
            log::warn!(
                "{bdf} was hidden, but dom0's driver {driver} has been bound to it since; it stays in dom0 (hide it again: pciback hide {bdf})"
            );
            return Ok(record.remove()?);
        }
        match phase {
            Phase::Hiding => {
                drop(record);
                let quarantine = Quarantine::Ours;
                self.hide(bdf, true, quarantine).map(drop)
            }
            Phase::Returning => {
                self.insert(bdf, record, description)?;
                self.give_back(bdf, Rebind::Driver)
            }
            Phase::Hidden | Phase::Assigned | Phase::Dead => {
                self.insert(bdf, record, description).map(drop)
            }
            Phase::Releasing => {
                let device = self.insert(bdf, record, description)?;
                self.reset_in_background(device);
                Ok(())
            }
        }
    }

    fn insert(
        &self,
        bdf: Bdf,
        record: Record,
        description: Description,
    ) -> Result<Arc<Device>, DeviceError> {
        let parts = self.open_parts(bdf, description)?;
        let device = Arc::new(parts.with(record));
        self.table().hidden.insert(bdf, Arc::clone(&device));
        Ok(device)
    }

    fn open_parts(&self, bdf: Bdf, description: Description) -> Result<Parts, DeviceError> {
        let config = self.bus.open(bdf)?;
        let physical = match description.kind {
            FunctionKind::Virtual { physical } => Some(self.bus.open(physical)?),
            FunctionKind::Plain | FunctionKind::Physical { .. } => None,
        };
        let interrupts = msi::Interrupts::discover(&*config, &description.identity.resources)
            .map_err(|source| HostError::Unreadable { bdf, source })?;
        if let Some(Err(broken)) = interrupts.msix() {
            log::warn!("{bdf}: guests cannot use its MSI-X: {}", chain(&broken));
        }
        Ok(Parts {
            bdf,
            description,
            config,
            physical,
            interrupts,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bus that the devices are on.
    pub fn bus(&self) -> &Arc<dyn Bus> {
        &self.bus
    }

    /// The hidden devices, in order of their addresses.
    pub fn list(&self) -> Vec<Arc<Device>> {
        self.table().hidden.values().cloned().collect()
    }

    /// One hidden device.
    pub fn get(&self, bdf: Bdf) -> Option<Arc<Device>> {
        self.table().hidden.get(&bdf).cloned()
    }

    /// Hides a device from dom0. `false`: it was hidden already.
    ///
    /// # Errors
    /// [`DeviceError`]; the device is then dom0's as before.
    pub fn hide(&self, bdf: Bdf, force: bool, quarantine: Quarantine) -> Result<bool, DeviceError> {
        {
            let mut table = self.table();
            if let Some(device) = table.hidden.get(&bdf) {
                return match device.record.phase() {
                    Some(Phase::Dead) => Err(DeviceError::Dead { bdf }),
                    Some(phase @ Phase::Returning) => Err(DeviceError::Busy {
                        bdf,
                        phase: phase.name(),
                    }),
                    _ => Ok(false),
                };
            }
            if !table.coming.insert(bdf) {
                return Err(DeviceError::Busy {
                    bdf,
                    phase: Phase::Hiding.name(),
                });
            }
        }
        let result = self.take(bdf, force, quarantine);
        let mut table = self.table();
        table.coming.remove(&bdf);
        table.hidden.insert(bdf, result?);
        Ok(true)
    }

    fn take(
        &self,
        bdf: Bdf,
        force: bool,
        quarantine: Quarantine,
    ) -> Result<Arc<Device>, DeviceError> {
        const BRIDGE: u32 = 0x06;
        let before = self.bus.describe(bdf)?;
        if before.class >> 16 == BRIDGE {
            return Err(DeviceError::Bridge { bdf });
        }
        if !force {
            if let FunctionKind::Physical {
                virtual_functions: count @ 1..,
            } = before.kind
            {
                return Err(DeviceError::HasVirtualFunctions { bdf, count });
            }
            if let Some(reason) = self.bus.needed_by_dom0(bdf)? {
                return Err(DeviceError::Needed { bdf, reason });
            }
        }
        let record = Record::open(&self.directory, bdf)?;
        if record.phase().is_none() {
            record.set_driver(before.driver.as_deref());
            record.set_phase(Phase::Hiding);
        }
        self.prepare(bdf, record, quarantine)
            .map_err(|(record, error)| {
                // Nothing stays half-way: dom0 gets it back as it was.
                self.undo(bdf, &record, Rebind::Driver);
                error
            })
    }

    /// From bound in dom0 to hidden. On failure the record comes back, for undoing.
    fn prepare(
        &self,
        bdf: Bdf,
        record: Record,
        quarantine: Quarantine,
    ) -> Result<Arc<Device>, (Record, DeviceError)> {
        let steps = || -> Result<Parts, DeviceError> {
            // Reserved first: nobody may grab it between two steps.
            self.bus.set_driver_override(bdf, Some(RESERVED_FOR))?;
            self.bus.unbind(bdf)?;
            if !record.flags().contains(Flags::ENABLED) {
                self.bus.enable(bdf, true)?;
                record.insert(Flags::ENABLED);
            }
            // Only now is the interrupt routed and its number right.
            let parts = self.open_parts(bdf, self.bus.describe(bdf)?)?;
            if !record.flags().contains(Flags::SAVED) {
                record.set_config(&config_state::save(
                    &*parts.config,
                    parts.description.identity.config_size,
                ));
            }
            Ok(parts)
        };
        let device = match steps() {
            Ok(parts) => parts.with(record),
            Err(error) => return Err((record, error)),
        };
        match self
            .hand_to_xen(&device, quarantine)
            .and_then(|()| self.reset_and_restore(&device))
        {
            Ok(()) => {
                device.record.set_phase(Phase::Hidden);
                Ok(Arc::new(device))
            }
            Err(error) => Err((device.record, error)),
        }
    }

    fn hand_to_xen(&self, device: &Device, quarantine: Quarantine) -> Result<(), DeviceError> {
        let (bdf, xen) = (device.bdf, device.xen());
        if device.interrupts.msix().is_some() {
            // Xen must record the table before a guest can touch it. A Xen without this call needs none (before 4.4).
            match self.xen.prepare_msix(xen) {
                Ok(()) => device.record.insert(Flags::MSIX_PREPARED),
                Err(error) if error.errno() == Some(libc::ENOSYS) => {}
                Err(error) => log::warn!(
                    "{bdf}: its MSI-X will not work in a guest: {}",
                    chain(&error)
                ),
            }
        }
        if quarantine == Quarantine::Ours {
            match self.xen.assign_device(DomId::IO, xen) {
                Ok(()) => device.record.insert(Flags::QUARANTINED),
                Err(error) if no_iommu(&error) => {
                    log::info!("{bdf}: no IOMMU, so nothing to quarantine")
                }
                Err(source) => {
                    return Err(DeviceError::Xen {
                        bdf,
                        what: "Xen will not quarantine its DMA; see 'xl dmesg' for Xen's reason",
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Resets the device and gives it the configuration it had before any guest. A device that cannot be reset is used as it is.
    fn reset_and_restore(&self, device: &Device) -> Result<(), DeviceError> {
        let bdf = device.bdf;
        match self.bus.reset(bdf) {
            Ok(()) => {}
            Err(error) if device.responds() => {
                log::warn!("{bdf} is used without a reset: {}", chain(&error))
            }
            Err(error) => log::error!("{}", chain(&error)),
        }
        if !device.responds() {
            return Err(DeviceError::Dead { bdf });
        }
        let saved = device.record.config();
        config_state::restore(&*device.config, &saved, config_state::saved_command(&saved));
        Ok(())
    }

    /// Gives a hidden device back to dom0.
    ///
    /// # Errors
    /// [`DeviceError::InUse`], [`DeviceError::Busy`], [`DeviceError::NotHidden`], and what the host refuses.
    pub fn unhide(&self, bdf: Bdf, rebind: Rebind) -> Result<(), DeviceError> {
        let device = self.get(bdf).ok_or(DeviceError::NotHidden { bdf })?;
        let record = &device.record;
        if record.advance(Phase::Hidden, Phase::Returning)
            || record.advance(Phase::Dead, Phase::Returning)
        {
            return self.give_back(bdf, rebind);
        }
        Err(match (record.phase(), record.owner()) {
            (Some(Phase::Assigned), Some(owner)) => DeviceError::InUse {
                bdf,
                domain: owner.domain,
            },
            (phase, _) => DeviceError::Busy {
                bdf,
                phase: phase.map_or("unknown", Phase::name),
            },
        })
    }

    fn give_back(&self, bdf: Bdf, rebind: Rebind) -> Result<(), DeviceError> {
        let device = self.get(bdf).ok_or(DeviceError::NotHidden { bdf })?;
        if let Err(error) = self.reset_and_restore(&device) {
            log::warn!("{}", chain(&error));
        }
        self.table().hidden.remove(&bdf);
        self.undo(bdf, &device.record, rebind);
        Ok(())
    }

    /// The way back to dom0, from wherever the device is on the way. Goes on past what fails: each step helps without the others.
    fn undo(&self, bdf: Bdf, record: &Record, rebind: Rebind) {
        let xen = for_xen(bdf);
        // Also when the quarantine was xl's, or the one that Xen puts a device in after a guest: dom0 needs its DMA and MSI back.
        match self.xen.deassign_device(DomId::IO, xen) {
            Ok(()) => {}
            Err(error)
                if no_iommu(&error)
                    || error.errno() == Some(libc::ENODEV)
                    || error.errno() == Some(libc::EINVAL) => {}
            Err(error) => log::error!(
                "{bdf}: Xen does not give its DMA back to dom0, so dom0's driver will not work: {}",
                chain(&error)
            ),
        }
        if record.flags().contains(Flags::MSIX_PREPARED)
            && let Err(error) = self.xen.release_msix(xen)
        {
            log::warn!("{bdf}: {}", chain(&error));
        }
        if record.flags().contains(Flags::ENABLED)
            && let Err(error) = self.bus.enable(bdf, false)
        {
            log::warn!("{}", chain(&error));
        }
        if let Err(error) = self.bus.set_driver_override(bdf, None) {
            log::error!("{}", chain(&error));
        }
        if rebind == Rebind::Driver
            && let Err(error) = self.bus.bind(bdf, record.driver().as_deref())
        {
            log::warn!("{}", chain(&error));
        }
        if let Err(error) = record.remove() {
            log::error!("{}", chain(&error));
        }
    }

    /// A hidden device that a guest is to have.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] when waiting for the next call of the waker will help, [`DeviceError::NotHidden`].
    pub fn find(&self, bdf: Bdf) -> Result<Arc<Device>, DeviceError> {
        let table = self.table();
        match table.hidden.get(&bdf) {
            Some(device) => Ok(Arc::clone(device)),
            None if table.coming.contains(&bdf) => Err(DeviceError::Busy {
                bdf,
                phase: Phase::Hiding.name(),
            }),
            None => Err(DeviceError::NotHidden { bdf }),
        }
    }

    /// Gives a hidden device to a guest, or finds that the guest has it already (after a restart of the daemon).
    ///
    /// # Errors
    /// [`DeviceError::Busy`] when waiting for the next call of the waker will help; others when it will not.
    pub fn claim(&self, device: &Device, owner: Owner) -> Result<Claim, DeviceError> {
        // Keeps two claimants apart between the two stores.
        let _table = self.table();
        let (bdf, record) = (device.bdf, &device.record);
        match record.phase() {
            Some(Phase::Hidden) => {
                record.set_owner(owner);
                record.set_phase(Phase::Assigned);
                Ok(Claim::Taken)
            }
            Some(Phase::Assigned) => match record.owner() {
                Some(holder) if holder == owner => Ok(Claim::Resumed),
                Some(holder) => Err(DeviceError::InUse {
                    bdf,
                    domain: holder.domain,
                }),
                None => Err(DeviceError::Busy {
                    bdf,
                    phase: Phase::Assigned.name(),
                }),
            },
            Some(Phase::Dead) => Err(DeviceError::Dead { bdf }),
            Some(phase @ (Phase::Hiding | Phase::Releasing)) => Err(DeviceError::Busy {
                bdf,
                phase: phase.name(),
            }),
            Some(Phase::Returning) | None => Err(DeviceError::NotHidden { bdf }),
        }
    }

    /// Takes a device from its guest: at once as far as the guest is concerned, and free for the next one after its reset.
    pub fn release(self: &Arc<Self>, device: &Arc<Device>) {
        if device.record.advance(Phase::Assigned, Phase::Releasing) {
            self.reset_in_background(Arc::clone(device));
        }
    }

    fn reset_in_background(self: &Arc<Self>, device: Arc<Device>) {
        let bdf = device.bdf;
        let devices = Arc::clone(self);
        let work = move || {
            super::interrupts::release(&device, &*devices.xen);
            let phase = match devices.reset_and_restore(&device) {
                Ok(()) => Phase::Hidden,
                Err(error) => {
                    log::error!("{}", chain(&error));
                    Phase::Dead
                }
            };
            // Nothing that one guest did or was granted reaches the next.
            device
                .record
                .clear(Flags::PERMISSIVE | Flags::INTERRUPT_CONTROL);
            device.record.set_overlay(0);
            device.record.set_phase(phase);
            log::info!("{bdf} is free for the next guest");
            devices.wake();
        };
        if let Err(error) = thread::Builder::new()
            .name(format!("reset {bdf}"))
            .stack_size(RESET_STACK)
            .spawn(work)
        {
            log::error!(
                "{bdf} stays unusable, as no thread can be started to reset it ({error}); restart pcibackd when memory is free again"
            );
        }
    }

    /// Resets a device now, on the caller's thread. A guest that has it keeps its configuration and interrupts.
    ///
    /// # Errors
    /// The bus's, and [`DeviceError::Dead`].
    pub fn reset(&self, bdf: Bdf) -> Result<(), DeviceError> {
        let device = self.get(bdf).ok_or(DeviceError::NotHidden { bdf })?;
        // The kernel saves and restores the standard configuration around it.
        self.bus.reset(bdf)?;
        if !device.responds() {
            return Err(DeviceError::Dead { bdf });
        }
        if device.record.phase() == Some(Phase::Assigned) {
            self.restore_interrupts(&device);
        }
        Ok(())
    }

    /// Puts MSI and MSI-X of a device that was reset under its guest back to what they were.
    pub fn restore_interrupts(&self, device: &Device) {
        super::interrupts::restore(device, &*self.xen);
    }

    /// Has `waker` called when a device becomes free, until [`Devices::forget_waker`]. One for each guest.
    pub fn set_waker(&self, domain: DomId, waker: Waker) {
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(domain, waker);
    }

    /// Ends [`Devices::set_waker`].
    pub fn forget_waker(&self, domain: DomId) {
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&domain);
    }

    fn wake(&self) {
        for waker in self
            .wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            waker();
        }
    }
}

/// A reset writes a few files: it needs no more.
const RESET_STACK: usize = 128 * 1024;

fn no_iommu(error: &XenError) -> bool {
    matches!(
        error.errno().map(Errno::from_raw),
        Some(Errno::ENOSYS | Errno::EOPNOTSUPP)
    )
}
