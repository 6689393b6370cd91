//! The devices that are hidden from dom0, and how they change hands: dom0 -> hidden -> a guest -> hidden -> dom0.
//!
//! A device is dom0's, hidden, or assigned to one guest at one virtual address, never two of them. Its [`Record`] says which, and is
//! written before each step, so that a daemon that was killed half-way goes on from there. Steps that may take long (a reset: up to a
//! minute) run on threads of their own.
mod activity;
mod device;
mod error;
mod flaws;
mod guest;
mod hide;
mod recovery;
mod removed;
mod reset;
mod sharing;
mod together;
mod unfinished;
mod unprobed;
mod virtual_functions;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use conf_space::address::Bdf;
use conf_space::selector::DeviceNames;
use xenbus::{DomId, Xen};

pub use self::device::{Device, for_xen};
pub use self::error::{DeviceError, Users};
pub use self::guest::{Claim, Line, Waker};
pub use self::hide::{Quarantine, RESERVED_FOR, Rebind};
pub use self::reset::Attempt;
pub use self::sharing::{Sharing, silence};
pub use self::virtual_functions::NewFunctions;

use self::device::Parts;
use self::unfinished::Unfinished;
use super::record::{Flags, Phase, Record, RecordError};
use super::{Bus, Description, Function, HostError};
use crate::config::{DeviceSettings, Live};
use crate::text::chain;

#[derive(Debug, Default)]
struct Table {
    hidden: BTreeMap<Bdf, Arc<Device>>,
    /// Being hidden, or given back: not in `hidden`.
    coming: BTreeMap<Bdf, Phase>,
}

/// All hidden devices.
pub struct Devices {
    bus: Arc<dyn Bus>,
    xen: Arc<dyn Xen>,
    config: Arc<Live>,
    directory: PathBuf,
    table: Mutex<Table>,
    wakers: Mutex<BTreeMap<DomId, Waker>>,
    /// See [`Devices::admission`].
    admission: Mutex<()>,
    /// Held while it is decided whether a physical function may lose its virtual ones.
    keeping: Mutex<()>,
    /// Held while a physical function's number of virtual ones is changed.
    provisioning: Mutex<()>,
    /// How often it was asked whether devices were removed, since somebody began to look; 0: nobody looks.
    looks: AtomicUsize,
    activities: Mutex<BTreeMap<Bdf, &'static str>>,
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
        config: Arc<Live>,
        directory: PathBuf,
    ) -> Result<Arc<Self>, RecordError> {
        let error = |source| RecordError::Io {
            path: directory.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(error)?;
        let found = Record::list(&directory).map_err(error)?;
        let devices = Arc::new(Self {
            bus,
            xen,
            config,
            directory: directory.clone(),
            table: Mutex::default(),
            wakers: Mutex::default(),
            admission: Mutex::default(),
            keeping: Mutex::default(),
            provisioning: Mutex::default(),
            looks: AtomicUsize::new(0),
            activities: Mutex::default(),
        });
        let mut unfinished = Unfinished::default();
        for bdf in found {
            if let Err(error) = devices.take_up(bdf, &mut unfinished) {
                log::error!(
                    "{bdf} was hidden by an earlier pcibackd and cannot be taken up: {}",
                    chain(&error)
                );
                devices.abandon(bdf);
            }
        }
        devices.finish(unfinished);
        let all = devices.list();
        devices.keep_all_functions();
        devices.have_functions_probed_again();
        let lines = OnceCell::new();
        // Only of a guest that has them: asking takes a while on a large host.
        let lines = || lines.get_or_init(|| devices.lines()).as_slice();
        for device in all
            .iter()
            .filter(|device| device.record.phase() == Some(Phase::Assigned))
        {
            if let Err(error) = super::interrupts::recover(device, &*devices.xen, &all, lines) {
                log::error!("{}: {}", device.bdf, chain(&error));
            }
        }
        Ok(devices)
    }

    /// Continues with a device that has a record. One that was on its way is noted in `unfinished`.
    fn take_up(self: &Arc<Self>, bdf: Bdf, unfinished: &mut Unfinished) -> Result<(), DeviceError> {
        let record = Record::open(&self.directory, bdf)?;
        let Some(phase) = record.phase() else {
            return Ok(record.remove()?);
        };
        record.recover_settings();
        let description = match self.bus.describe(bdf) {
            Err(HostError::NoDevice { .. }) => {
                log::warn!("{bdf} was hidden and is no longer in this machine; forgetting it");
                return Ok(record.remove()?);
            }
            other => other?,
        };
        let held = matches!(
            phase,
            Phase::Hidden | Phase::Assigned | Phase::Releasing | Phase::Dead
        );
        if held
            && matches!(description.function, Function::Virtual { .. })
            && self.bus.driver_override(bdf)?.as_deref() != Some(RESERVED_FOR)
        {
            log::error!(
                "{bdf} was {}, and has been taken away and made anew since; it is dom0's (hide it again: pciback hide {bdf})",
                phase.name()
            );
            return Ok(record.remove()?);
        }
        // While it was being hidden, its driver may not have been unbound yet.
        if let Some(driver) = &description.driver
            && phase != Phase::Hiding
        {
            log::warn!(
                "{bdf} was hidden, but dom0's driver {driver} has been bound to it since; it stays in dom0 (hide it again: pciback hide {bdf})"
            );
            return Ok(record.remove()?);
        }
        if record.flags().contains(Flags::RESET_NARROWED) {
            self.widen(bdf, &record, &[]);
        }
        // It may have been hidden by a pcibackd that did not see to that yet.
        if held && let Err(error) = self.keep_powered(bdf, &record) {
            log::warn!("{}", chain(&error));
        }
        match phase {
            Phase::Hiding => {
                drop(record);
                // Before any session begins: a guest that waits for it is to go on waiting.
                self.table().coming.insert(bdf, Phase::Hiding);
                unfinished.hiding.push(bdf);
                Ok(())
            }
            Phase::Returning => {
                self.insert(bdf, record, description)?;
                unfinished.returning.push(bdf);
                Ok(())
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

    /// Does on a thread of its own what may wait for a reset.
    fn in_background(
        self: &Arc<Self>,
        bdf: Bdf,
        what: &str,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        if let Err(error) = self.spawn(format!("{what} {bdf}"), work) {
            log::error!(
                "{bdf} stays unusable, as no thread can be started to {what} it ({error}); restart pcibackd when memory is free again"
            );
        }
    }

    fn spawn(
        self: &Arc<Self>,
        name: String,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        /// A reset writes a few files: it needs no more.
        const STACK: usize = 128 * 1024;
        let devices = Arc::clone(self);
        thread::Builder::new()
            .name(name)
            .stack_size(STACK)
            .spawn(move || work(&devices))
            .map(drop)
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
        let physical = match description.function {
            Function::Virtual { physical, .. } => Some(self.bus.open(physical)?),
            Function::Plain | Function::Physical { .. } => None,
        };
        let interrupts = msi::Interrupts::discover(&*config, &description.identity.resources)
            .map_err(|source| HostError::Unreadable { bdf, source })?;
        for flaw in flaws::find(&*config, description.identity.config_size, &interrupts) {
            log::warn!("{bdf}: {flaw}");
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

    /// The configuration.
    pub fn config(&self) -> &Arc<Live> {
        &self.config
    }

    /// What holds for a device now: what the configuration says, and over it what was set at run time.
    pub fn settings(&self, device: &Device) -> DeviceSettings {
        let mut settings = self.config.get().settings_for(&device.description.names());
        device.record.settings().apply_to(&mut settings);
        settings
    }

    /// The bus that the devices are on.
    pub fn bus(&self) -> &Arc<dyn Bus> {
        &self.bus
    }

    /// All devices of the host by what they can be told by. One that vanishes meanwhile is left out.
    ///
    /// # Errors
    /// When the bus itself cannot be listed.
    pub fn names(&self) -> Result<Vec<DeviceNames>, HostError> {
        let found = self.bus.list()?.into_iter();
        Ok(found
            .filter_map(|bdf| self.bus.describe(bdf).ok())
            .map(|description| description.names())
            .collect())
    }

    /// The legacy interrupts of all devices of the host.
    fn lines(&self) -> Vec<u32> {
        let found = self.bus.list().unwrap_or_default().into_iter();
        found
            .filter_map(|bdf| self.bus.describe(bdf).ok())
            .map(|description| description.irq)
            .collect()
    }

    /// The hidden devices, in order of their addresses.
    pub fn list(&self) -> Vec<Arc<Device>> {
        self.table().hidden.values().cloned().collect()
    }

    /// Where a device is on its way; `None`: it is dom0's.
    pub fn phase(&self, bdf: Bdf) -> Option<Phase> {
        let table = self.table();
        match table.hidden.get(&bdf) {
            Some(device) => device.record.phase(),
            None => table.coming.get(&bdf).copied(),
        }
    }

    /// One hidden device.
    pub fn get(&self, bdf: Bdf) -> Option<Arc<Device>> {
        self.table().hidden.get(&bdf).cloned()
    }
}
