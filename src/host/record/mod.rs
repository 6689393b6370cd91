//! What is remembered of a hidden device beyond the daemon's life: one small file per device in `RUN_DIR/devices`, mapped into memory.
//!
//! A store into the mapping survives `kill -9` of the daemon at any moment and costs no system call, so what an operation of a guest
//! changes can be written down before its effect becomes visible. The directory is on tmpfs: after a reboot of the host there are no
//! hidden devices and no records either.

mod dropped;
mod errors;
mod settings;

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use conf_space::address::Bdf;
use conf_space::overlay::DroppedWrite;
use msi::ledger;
use xenbus::DomId;

pub use self::dropped::Dropped;
pub use self::errors::Errors;
pub use self::settings::RunTime;

/// A record that cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be used.
    #[error("cannot use {path}; is its directory writable and on a local file system?")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a record of this version.
    #[error(
        "{path} is not a device record of this version of pcibackd; unhide the device with the version that hid it, or remove the file"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
}

/// Where a device is on its way between dom0 and a guest. Written before the step it names is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Being taken from dom0.
    Hiding = 1,
    /// Nobody's: can be given to a guest.
    Hidden = 2,
    /// A guest's.
    Assigned = 3,
    /// A guest's no more, being reset.
    Releasing = 4,
    /// Being given back to dom0.
    Returning = 5,
    /// Did not come back from a reset. Given to nobody until unhidden.
    Dead = 6,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Hiding,
        Self::Hidden,
        Self::Assigned,
        Self::Releasing,
        Self::Returning,
        Self::Dead,
    ];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| *phase as u32 == number)
    }

    /// The phase in an operator's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hiding => "hiding",
            Self::Hidden => "hidden",
            Self::Assigned => "assigned",
            Self::Releasing => "releasing",
            Self::Returning => "returning",
            Self::Dead => "dead",
        }
    }
}

/// Who holds a device: a guest, and where the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The guest.
    pub domain: DomId,
    /// The device's address in the guest.
    pub seen_as: Bdf,
}

bitflags::bitflags! {
    /// What was done to a device when it was hidden.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// Its enable count in the kernel was raised.
        const ENABLED = 1;
        /// Xen recorded its MSI-X table.
        const MSIX_PREPARED = 1 << 1;
        /// It was assigned to `DOMID_IO` by us.
        const QUARANTINED = 1 << 2;
        /// Its saved configuration is complete.
        const SAVED = 1 << 3;
        /// The kernel could let it lose its power, before.
        const COULD_LOSE_POWER = 1 << 4;
        /// The kernel was told to reset it by one method only, for one reset.
        const RESET_NARROWED = 1 << 6;
        /// The guest has no part in its INTx line, which somebody else uses. Until release.
        const WITHOUT_INTX = 1 << 7;
        /// The toolstack took it back, and the guest, which did not let it go, may use it no more. Until release.
        const REVOKED = 1 << 8;
        /// A virtual function that its guest is not to have yet: others could still take it away.
        const WITHHELD = 1 << 9;
        /// It was reserved for us before, since the host booted.
        const RESERVED = 1 << 10;
        /// All of its IOMMU group is being hidden. Until all of it is.
        const WITH_GROUP = 1 << 11;
    }
}

const DRIVER_MAX: usize = 64;
const CONFIG_MAX: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"pciback\x02");

/// The file's layout, native byte order. A file of zeros is a record with nothing in it.
#[repr(C)]
struct Layout {
    magic: AtomicU64,
    overlay: AtomicU64,
    phase: AtomicU32,
    flags: AtomicU32,
    owner: AtomicU32,
    seen_as: AtomicU64,
    resets: AtomicU32,
    msi: [AtomicU32; ledger::WORDS],
    settings: settings::Words,
    dropped: dropped::Table,
    errors: errors::Errors,
    driver: [AtomicU8; DRIVER_MAX],
    config_len: AtomicU32,
    config: [AtomicU8; CONFIG_MAX],
}

/// A device's record. Dropping it unmaps the file and leaves it where it is.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    layout: NonNull<Layout>,
    /// Held while the settings change.
    settings: Mutex<()>,
}

// SAFETY: the mapping belongs to this value alone and holds nothing but atomics.
unsafe impl Send for Record {}
// SAFETY: as above.
unsafe impl Sync for Record {}

impl Record {
    /// Opens the record of a device, or makes an empty one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn open(directory: &Path, bdf: Bdf) -> Result<Self, RecordError> {
        let path = directory.join(bdf.to_string());
        let error = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error)?;
        let size = size_of::<Layout>() as u64;
        let found = file.metadata().map_err(error)?.len();
        if found == 0 {
            file.set_len(size).map_err(error)?;
        } else if found != size {
            return Err(RecordError::Foreign { path });
        }
        let layout = map(&file).map_err(error)?;
        let record = Self {
            path,
            layout,
            settings: Mutex::new(()),
        };
        match record.layout().magic.load(Ordering::Relaxed) {
            0 => record.layout().magic.store(MAGIC, Ordering::Relaxed),
            MAGIC => {}
            _ => {
                return Err(RecordError::Foreign {
                    path: record.path.clone(),
                });
            }
        }
        Ok(record)
    }

    /// The devices that have a record.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(directory: &Path) -> io::Result<Vec<Bdf>> {
        let mut found: Vec<Bdf> = fs::read_dir(directory)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        found.sort();
        Ok(found)
    }

    /// Removes the record: the device is dom0's again.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn remove(&self) -> Result<(), RecordError> {
        fs::remove_file(&self.path).map_err(|source| RecordError::Io {
            path: self.path.clone(),
            source,
        })
    }

    fn layout(&self) -> &Layout {
        // SAFETY: `layout` points to a mapping of the whole structure that lives as long as `self`, and every field is an atomic.
        unsafe { self.layout.as_ref() }
    }

    /// Where the device is; `None` in a record that nothing was written to.
    pub fn phase(&self) -> Option<Phase> {
        Phase::from_number(self.layout().phase.load(Ordering::Acquire))
    }

    /// Moves on to `phase`.
    pub fn set_phase(&self, phase: Phase) {
        self.layout().phase.store(phase as u32, Ordering::Release);
    }

    /// Moves from `from` to `to`, unless somebody else moved first.
    pub fn advance(&self, from: Phase, to: Phase) -> bool {
        self.layout()
            .phase
            .compare_exchange(from as u32, to as u32, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Who holds the device. Meaningful while it is assigned or being released.
    pub fn owner(&self) -> Option<Owner> {
        let layout = self.layout();
        let domain = u16::try_from(layout.owner.load(Ordering::Acquire)).ok()?;
        let packed = layout.seen_as.load(Ordering::Acquire);
        let [_, _, _, _, segment_high, segment_low, bus, devfn] = packed.to_be_bytes();
        Some(Owner {
            domain: DomId(domain),
            seen_as: Bdf::from_devfn(u16::from_be_bytes([segment_high, segment_low]), bus, devfn),
        })
    }

    /// Writes down who holds the device from now on.
    pub fn set_owner(&self, owner: Owner) {
        let layout = self.layout();
        let seen_as = owner.seen_as;
        let packed = u64::from(seen_as.segment()) << 16
            | u64::from(seen_as.bus()) << 8
            | u64::from(seen_as.devfn());
        layout.seen_as.store(packed, Ordering::Release);
        layout
            .owner
            .store(u32::from(owner.domain.0), Ordering::Release);
    }

    /// What was done to the device.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.layout().flags.load(Ordering::Acquire))
    }

    /// Adds flags.
    pub fn insert(&self, flags: Flags) {
        self.layout().flags.fetch_or(flags.bits(), Ordering::AcqRel);
    }

    /// Takes flags away.
    pub fn clear(&self, flags: Flags) {
        self.layout()
            .flags
            .fetch_and(!flags.bits(), Ordering::AcqRel);
    }

    /// The driver that dom0 had bound to the device.
    pub fn driver(&self) -> Option<String> {
        let bytes: Vec<u8> = self
            .layout()
            .driver
            .iter()
            .map(|byte| byte.load(Ordering::Acquire))
            .take_while(|byte| *byte != 0)
            .collect();
        String::from_utf8(bytes)
            .ok()
            .filter(|name| !name.is_empty())
    }

    /// Writes down the driver that dom0 had bound. A name longer than the kernel's own (56 bytes) is not kept.
    pub fn set_driver(&self, name: Option<&str>) {
        let name = name
            .filter(|name| name.len() < DRIVER_MAX)
            .unwrap_or_default();
        let bytes = name.bytes().chain(std::iter::repeat(0));
        for (slot, byte) in self.layout().driver.iter().zip(bytes) {
            slot.store(byte, Ordering::Release);
        }
    }

    /// The configuration space from before any guest; empty when none was saved.
    pub fn config(&self) -> Vec<u8> {
        let layout = self.layout();
        if !self.flags().contains(Flags::SAVED) {
            return Vec::new();
        }
        let len = layout.config_len.load(Ordering::Acquire) as usize;
        layout
            .config
            .iter()
            .take(len)
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect()
    }

    /// Saves the configuration space: at most 4096 bytes.
    pub fn set_config(&self, bytes: &[u8]) {
        let layout = self.layout();
        self.clear(Flags::SAVED);
        for (slot, byte) in layout.config.iter().zip(bytes) {
            slot.store(*byte, Ordering::Relaxed);
        }
        layout.config_len.store(
            u32::try_from(bytes.len().min(CONFIG_MAX)).unwrap_or(0),
            Ordering::Release,
        );
        self.insert(Flags::SAVED);
    }

    /// The overlay's state as a number.
    pub fn overlay(&self) -> u64 {
        self.layout().overlay.load(Ordering::Acquire)
    }

    /// Keeps the overlay's state.
    pub fn set_overlay(&self, bits: u64) {
        self.layout().overlay.store(bits, Ordering::Release);
    }

    /// After a restart of the daemon, which may have been killed while it changed the settings.
    pub fn recover_settings(&self) {
        self.layout().settings.recover();
    }

    /// What was set at run time.
    pub fn settings(&self) -> RunTime {
        let _changing = self.settings_lock();
        self.layout()
            .settings
            .load()
            .map_or_else(RunTime::default, |(_, settings)| settings)
    }

    /// Changes what is set at run time. Returns what is set then.
    ///
    /// # Errors
    /// Those of `change`; nothing has changed then.
    pub fn change_settings<E>(
        &self,
        change: impl FnOnce(&mut RunTime) -> Result<(), E>,
    ) -> Result<RunTime, E> {
        let _changing = self.settings_lock();
        let words = &self.layout().settings;
        let mut settings = words
            .load()
            .map_or_else(RunTime::default, |(_, settings)| settings);
        change(&mut settings)?;
        words.store(&settings);
        Ok(settings)
    }

    /// The same for a change that cannot fail.
    pub fn update_settings(&self, change: impl FnOnce(&mut RunTime)) {
        let Ok(_) = self.change_settings(|settings| -> Result<(), Infallible> {
            change(settings);
            Ok(())
        });
    }

    /// What was set at run time, and its version, without waiting: `None` while it is being changed.
    pub fn try_settings(&self) -> Option<(u32, RunTime)> {
        self.layout().settings.load()
    }

    /// Another number when other settings hold.
    pub fn settings_version(&self) -> u32 {
        self.layout().settings.version()
    }

    fn settings_lock(&self) -> MutexGuard<'_, ()> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a write of the guest's that did not reach the device. Called by the guest's thread alone.
    pub fn count_dropped(&self, write: DroppedWrite) {
        self.layout().dropped.count(write);
    }

    /// Writes that did not reach the device since a guest got it: by register, and how many to further ones.
    pub fn dropped(&self) -> (Vec<Dropped>, u32) {
        self.layout().dropped.read()
    }

    /// Forgets those: another guest gets the device.
    pub fn clear_dropped(&self) {
        self.layout().dropped.clear();
    }

    /// Its errors.
    pub fn errors(&self) -> &Errors {
        &self.layout().errors
    }

    /// Forgets what a guest that has ended was granted and held.
    pub fn forget_guest(&self) {
        self.update_settings(|settings| *settings = RunTime::default());
        for word in self.msi() {
            word.store(0, Ordering::Release);
        }
    }

    /// How often the device was reset since it was hidden.
    pub fn resets(&self) -> u32 {
        self.layout().resets.load(Ordering::Relaxed)
    }

    /// Counts a reset.
    pub fn count_reset(&self) {
        self.layout().resets.fetch_add(1, Ordering::Relaxed);
    }

    /// The words of the interrupts' ledger.
    pub fn msi(&self) -> &[AtomicU32; ledger::WORDS] {
        &self.layout().msi
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nothing refers to it any more.
        let unmapped = unsafe { nix::sys::mman::munmap(self.layout.cast(), size_of::<Layout>()) };
        if let Err(error) = unmapped {
            log::error!("{}: cannot unmap: {error}", self.path.display());
        }
    }
}

fn map(file: &File) -> io::Result<NonNull<Layout>> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap};
    let length =
        std::num::NonZeroUsize::new(size_of::<Layout>()).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a fresh shared mapping at an address of the kernel's choice; the file was given the full length before.
    let base = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
            file,
            0,
        )
    }?;
    Ok(base.cast())
}

#[cfg(test)]
mod tests;
