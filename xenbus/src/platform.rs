//! What the daemon asks of Xen, whichever Xen it is.

use std::fmt::{self, Debug};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::device_model::DeviceModel;
use crate::types::{DomId, GrantRef, PciDevice, Pirq, Port};
use crate::xenstore;

/// A hypercall or a device of Xen's failed.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    /// Xen (or Linux on its way there) said no.
    #[error("{operation} failed")]
    Failed {
        /// The operation in Xen's terms, with its subject.
        operation: String,
        /// Xen's errno.
        #[source]
        source: io::Error,
    },
    /// One of Linux's devices for Xen cannot be opened.
    #[error(
        "cannot open {path}: is this dom0, are we root, and is the module {module} loaded? \
         (modprobe {module})"
    )]
    Device {
        /// The device.
        path: &'static str,
        /// The module that provides it.
        module: &'static str,
        /// Linux's errno.
        #[source]
        source: io::Error,
    },
    /// This Xen speaks a domctl interface that is not known to be laid out as we expect.
    #[error("this Xen's domctl interface is none of the known versions {first:#x} to {last:#x}")]
    UnknownDomctlVersion {
        /// Oldest version tried.
        first: u32,
        /// Newest version tried.
        last: u32,
    },
}

impl XenError {
    /// Builds [`XenError::Failed`] from an errno.
    pub fn from_errno(operation: impl Into<String>, errno: i32) -> Self {
        Self::Failed {
            operation: operation.into(),
            source: io::Error::from_raw_os_error(errno),
        }
    }

    /// The errno behind it, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Failed { source, .. } | Self::Device { source, .. } => source.raw_os_error(),
            Self::UnknownDomctlVersion { .. } => None,
        }
    }
}

/// What to map with `PHYSDEVOP_map_pirq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsiRequest {
    /// One MSI vector (`MAP_PIRQ_TYPE_MSI_SEG`).
    Msi,
    /// `count` MSI vectors in a row (`MAP_PIRQ_TYPE_MULTI_MSI`). The answer is the first PIRQ; the
    /// others follow it.
    MultiMsi {
        /// How many: 1, 2, 4, 8, 16 or 32.
        count: u8,
    },
    /// One MSI-X table entry (`MAP_PIRQ_TYPE_MSI_SEG` with a table base).
    MsiX {
        /// Entry in the table, 0 to 2047.
        entry: u16,
        /// Start address of the BAR that holds the table (not of the table itself).
        table_base: u64,
    },
}

impl fmt::Display for MsiRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Msi => f.write_str("MSI"),
            Self::MultiMsi { count } => write!(f, "{count} MSI vectors"),
            Self::MsiX { entry, .. } => write!(f, "MSI-X entry {entry}"),
        }
    }
}

/// What is known of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainInfo {
    /// An HVM or PVH guest; otherwise PV.
    pub hvm: bool,
    /// The toolstack keeps it from running: it is being built, or was paused.
    pub paused: bool,
    /// Its CPUs have run, or may at any moment: it is not paused, or was not always.
    pub has_run: bool,
    /// The domain has shut down, crashed or is being destroyed: nobody runs in it any more.
    pub gone: bool,
}

/// A guest's page mapped into this process. Unmapped on drop.
///
/// # Safety
/// `base` must point to 4096 bytes that stay readable and writable for as long as the value lives,
/// aligned to 4096.
pub unsafe trait PageMapping: Send + Debug {
    /// Where the page is.
    fn base(&self) -> NonNull<u8>;
}

/// Our end of an interdomain event channel. Closed on drop.
pub trait EventPort: Send + Debug {
    /// Becomes readable when the other end notifies. Non-blocking.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes a pending event, if there is one. The channel stays masked (delivers nothing further)
    /// until [`EventPort::unmask`].
    ///
    /// # Errors
    /// Only when the channel is beyond use.
    fn take(&mut self) -> io::Result<bool>;

    /// Lets the next event through.
    ///
    /// # Errors
    /// Only when the channel is beyond use.
    fn unmask(&mut self) -> io::Result<()>;

    /// Sends an event to the other end. One that is dead or has closed is no error.
    ///
    /// # Errors
    /// Only when the channel is beyond use.
    fn notify(&self) -> io::Result<()>;
}

/// Xen, as a PCI backend in dom0 sees it. All of it may be called from any thread.
pub trait Xen: DeviceModel {
    /// Opens a connection of its own to xenstore.
    ///
    /// # Errors
    /// When xenstored cannot be reached.
    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error>;

    /// Maps one page that `domain` granted to us.
    ///
    /// # Errors
    /// When the reference is not one that `domain` granted us for writing.
    fn map_page(
        &self,
        domain: DomId,
        reference: GrantRef,
    ) -> Result<Box<dyn PageMapping>, XenError>;

    /// Binds to a port that `domain` left unbound for us. Binding again after our end was closed
    /// works, and sets the port pending once.
    ///
    /// # Errors
    /// When the port is not one that `domain` left for us.
    fn bind_interdomain(&self, domain: DomId, port: Port) -> Result<Box<dyn EventPort>, XenError>;

    /// What Xen knows of a domain; `None` when there is none of that number.
    ///
    /// # Errors
    /// When Xen cannot be asked.
    fn domain_info(&self, domain: DomId) -> Result<Option<DomainInfo>, XenError>;

    /// Maps a message-signalled interrupt of `device` to a PIRQ of `domain` and programs the
    /// device's address and data. Does not enable it.
    ///
    /// Xen prevents little: an MSI-X entry mapped twice gets two PIRQs, and mapping MSI while MSI-X
    /// is mapped (or the other way round) switches the other off.
    ///
    /// # Errors
    /// Xen's. ENODEV: the device is not assigned to `domain`. ESRCH: there is no such domain.
    /// ENXIO: memory decode is off. ENODATA: [`Xen::prepare_msix`] was not called. EINVAL: there is
    /// no such entry. ENFILE: the device has fewer MSI vectors. ENOSPC: no vector or PIRQ is left.
    fn map_msi(
        &self,
        domain: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, XenError>;

    /// Takes a PIRQ back from a domain. For the first of a MULTI_MSI block, all of the block.
    ///
    /// # Errors
    /// Xen's: EINVAL when it is not mapped, ESRCH when the domain is gone.
    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError>;

    /// `PHYSDEVOP_prepare_msix`: Xen records where the MSI-X table is, while the device is still
    /// ours. An already prepared device is no error.
    ///
    /// # Errors
    /// Xen's: ENODEV when there is no such device or it has no MSI-X.
    fn prepare_msix(&self, device: PciDevice) -> Result<(), XenError>;

    /// `PHYSDEVOP_release_msix`: undoes [`Xen::prepare_msix`].
    ///
    /// # Errors
    /// Xen's: EBUSY when it is not prepared, or entries are still mapped.
    fn release_msix(&self, device: PciDevice) -> Result<(), XenError>;

    /// `PHYSDEVOP_restore_msi_ext`: writes MSI and MSI-X state that Xen holds into a device that
    /// was reset.
    ///
    /// # Errors
    /// Xen's.
    fn restore_msi(&self, device: PciDevice) -> Result<(), XenError>;

    /// `XEN_DOMCTL_assign_device`: gives the device's DMA to a domain. [`DomId::IO`] quarantines
    /// it, any number of times. Dom0 is no domain to assign to: deassign instead.
    ///
    /// # Errors
    /// Xen's. ENOSYS or EOPNOTSUPP: no IOMMU. EBUSY: another guest has it, or its MSI-X is masked
    /// as a whole, so it was not reset. [`XenError::UnknownDomctlVersion`].
    fn assign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError>;

    /// `XEN_DOMCTL_deassign_device`: takes it from `domain`. From a guest it goes to quarantine,
    /// from [`DomId::IO`] back to dom0.
    ///
    /// # Errors
    /// As [`Xen::assign_device`]; ENODEV when it is not `domain`'s.
    fn deassign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError>;
}
