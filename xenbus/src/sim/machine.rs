//! The machine: a handle to everything that is embedded.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nix::errno::Errno;

use super::evtchn::GuestEnd;
use super::grants::{MappedPage, new_page};
use super::guest_socket::GuestServer;
use super::hardware::Hardware;
use super::hypervisor::Hypervisor;
use super::interrupts::Interrupts;
use super::lock;
use super::xenstored::Xenstored;
use crate::platform::{DomainInfo, EventPort, MsiRequest, PageMapping, Xen, XenError};
use crate::types::{DomId, GrantRef, PciDevice, Pirq, Port};
use crate::xenstore;

/// What a machine is like.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    /// There is an IOMMU. Without one no device can be assigned, and so no message-signalled interrupt mapped.
    pub iommu: bool,
    /// Interrupt lines. A domain's PIRQs below this number are for lines.
    pub gsis: u32,
    /// PIRQs that each domain has for message-signalled interrupts (Xen's `extra_guest_irqs`).
    pub extra_pirqs: u32,
    /// How long the toolstack waits for a backend. libxl: 10 s.
    pub toolstack_timeout: Duration,
    /// CPUs of an HVM guest; at most 128.
    pub hvm_vcpus: u32,
    /// Bytes of an HVM guest's memory, which begins at address 0. It takes up what is written to.
    pub hvm_memory: u64,
    /// Guests may map memory of their devices into their own processes. What they get for that may be more than a piece of memory: of a device
    /// on VFIO it is the whole device's descriptor, and whoever has it can do all that the daemon can with the device.
    pub map_windows: bool,
    /// Bytes of memory that each guest may give its devices, which real ones have pinned; without end by default.
    pub guest_memory: u64,
    /// Bytes of memory that all guests together may give their devices; without end by default.
    pub all_guests_memory: u64,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self {
            iommu: true,
            gsis: 24,
            extra_pirqs: 32,
            toolstack_timeout: Duration::from_secs(10),
            hvm_vcpus: 2,
            hvm_memory: 64 << 20,
            map_windows: false,
            guest_memory: u64::MAX,
            all_guests_memory: u64::MAX,
        }
    }
}

/// What kind of guest a domain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainKind {
    /// Paravirtualised: it uses devices through a PCI frontend.
    Pv,
    /// Hardware-virtualised.
    Hvm,
}

/// The machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Another one is alive there.
    #[error("an embedded Xen is running in {0} already: stop it, or choose another run directory")]
    InUse(PathBuf),
    /// The system refused something.
    #[error("cannot start an embedded Xen in {run_dir}: {what}")]
    Io {
        /// The run directory.
        run_dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Xen embedded in this process. A cheap handle: clones are the same machine, which ends with the last of them (and of the mappings, ports
/// and guests that came from it).
#[derive(Debug, Clone)]
pub struct Machine {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    run_dir: PathBuf,
    pub(super) toolstack_timeout: Duration,
    pub(super) hypervisor: Mutex<Hypervisor>,
    pub(super) interrupts: Arc<Mutex<Interrupts>>,
    pub(super) xenstored: Xenstored,
    /// Set right after the rest: it refers to it.
    guests: OnceLock<GuestServer>,
}

impl Machine {
    /// Builds a machine that listens on `xenstored.sock` (xenstore's wire protocol; whoever connects is dom0) and `machine.sock` (guests)
    /// in `run_dir`, which is made if it is missing. Only this user can connect.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(run_dir: impl AsRef<Path>) -> Result<Self, MachineError> {
        Self::with_options(run_dir, MachineOptions::default())
    }

    /// As [`Machine::new`], for a machine that is out of the ordinary.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn with_options(
        run_dir: impl AsRef<Path>,
        options: MachineOptions,
    ) -> Result<Self, MachineError> {
        let run_dir = run_dir.as_ref().to_owned();
        let failed = |what| {
            let run_dir = run_dir.clone();
            move |source| MachineError::Io {
                run_dir,
                what,
                source,
            }
        };
        std::fs::create_dir_all(&run_dir).map_err(failed("making the directory"))?;
        let socket = run_dir.join("xenstored.sock");
        if UnixStream::connect(&socket).is_ok() {
            return Err(MachineError::InUse(run_dir));
        }
        let listener = listen(&socket).map_err(failed("listening on xenstored.sock"))?;
        let xenstored =
            Xenstored::start(listener, &socket).map_err(failed("starting xenstored"))?;
        let interrupts = Arc::new(Mutex::new(Interrupts::new()));
        let toolstack_timeout = options.toolstack_timeout;
        let hypervisor = Mutex::new(Hypervisor::new(options, Arc::clone(&interrupts)));
        let guests = OnceLock::new();
        let inner = Arc::new(Inner {
            run_dir: run_dir.clone(),
            toolstack_timeout,
            hypervisor,
            interrupts,
            xenstored,
            guests,
        });
        let socket = run_dir.join("machine.sock");
        remove_stale(&socket).map_err(failed("replacing machine.sock"))?;
        let server = GuestServer::start(&socket, Arc::downgrade(&inner))
            .map_err(failed("listening on machine.sock"))?;
        inner.guests.get_or_init(|| server);
        Ok(Self { inner })
    }

    /// Where the sockets are.
    pub fn run_dir(&self) -> &Path {
        &self.inner.run_dir
    }

    /// Plugs the machine's PCI devices in.
    pub fn set_hardware(&self, hardware: Arc<dyn Hardware>) {
        lock(&self.inner.hypervisor).hardware = hardware;
    }

    /// dom0's kernel tells Xen that a device was removed (`PHYSDEVOP_pci_device_remove`): one that comes back at its address is a new
    /// one, and dom0's. Gives how many of its interrupts domains had mapped: their PIRQs now name nothing, and the real Xen (4.17)
    /// panics when a guest that has bound one of them to an event channel closes that.
    pub fn device_removed(&self, device: PciDevice) -> usize {
        self.cut_off(device);
        lock(&self.inner.hypervisor).remove_device(device)
    }

    pub(super) fn hardware(&self) -> Arc<dyn Hardware> {
        Arc::clone(&lock(&self.inner.hypervisor).hardware)
    }

    /// Connects to xenstore as a domain does: with its permissions, its quotas, and paths relative to its own directory.
    ///
    /// # Errors
    /// When the system has no file descriptor left.
    pub fn connect_as(&self, domain: DomId) -> Result<xenstore::Client, xenstore::Error> {
        xenstore::Client::from_stream(self.stream_as(domain)?)
    }

    pub(super) fn stream_as(&self, domain: DomId) -> Result<UnixStream, xenstore::Error> {
        let tried = || format!("the embedded xenstored, as domain {domain}");
        self.inner
            .xenstored
            .connect_as(domain)
            .map_err(|source| xenstore::Error::Unreachable {
                tried: tried(),
                source,
            })
    }

    /// Everything in xenstore: each path with its value.
    pub fn xenstore_nodes(&self) -> BTreeMap<String, Vec<u8>> {
        self.inner.xenstored.values()
    }

    /// Whose a device is: a guest's, [`DomId::IO`] in quarantine, otherwise [`DomId::DOM0`]. `None` when there is no such device.
    pub fn device_owner(&self, device: PciDevice) -> Option<DomId> {
        lock(&self.inner.hypervisor)
            .device(device)
            .ok()
            .map(|record| record.owner)
    }

    /// How many mappings of a domain's pages exist. A backend that has let go of a domain leaves none.
    pub fn mapped_grants(&self, domain: DomId) -> usize {
        lock(&self.inner.hypervisor)
            .domains
            .get(&domain)
            .map_or(0, |domain| domain.grants.mappings())
    }

    /// The PIRQs that a domain has.
    pub fn mapped_pirqs(&self, domain: DomId) -> Vec<Pirq> {
        lock(&self.inner.hypervisor)
            .domains
            .get(&domain)
            .map(|domain| domain.pirqs.keys().copied().collect())
            .unwrap_or_default()
    }
}

/// What guests ask of Xen. [`super::guest`] makes it presentable.
impl Machine {
    /// ESRCH when there is no such domain.
    pub(super) fn check_alive(&self, domain: DomId) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).alive(domain).map(drop);
        result.map_err(|errno| {
            XenError::from_errno(format!("looking for domain {domain}"), errno as i32)
        })
    }

    pub(super) fn grant_page(
        &self,
        domain: DomId,
        to: DomId,
    ) -> Result<(GrantRef, OwnedFd), XenError> {
        let failed = |errno: Errno| {
            XenError::from_errno(
                format!("granting a page of domain {domain} to domain {to}"),
                errno as i32,
            )
        };
        let page = new_page().map_err(|_| failed(Errno::ENOMEM))?;
        let copy = page
            .as_fd()
            .try_clone_to_owned()
            .map_err(|_| failed(Errno::ENOMEM))?;
        let mut hypervisor = lock(&self.inner.hypervisor);
        let reference = hypervisor
            .alive(domain)
            .and_then(|domain| domain.grants.grant(copy, to))
            .map_err(failed)?;
        Ok((reference, page))
    }

    pub(super) fn end_grant(&self, domain: DomId, reference: GrantRef) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor)
            .alive(domain)
            .and_then(|domain| domain.grants.end(reference));
        result.map_err(|errno| {
            XenError::from_errno(
                format!("ending grant {reference} of domain {domain}"),
                errno as i32,
            )
        })
    }

    pub(super) fn alloc_unbound(&self, domain: DomId, remote: DomId) -> Result<GuestEnd, XenError> {
        let result = lock(&self.inner.hypervisor)
            .alive(domain)
            .and_then(|domain| domain.ports.alloc_unbound(remote));
        result.map_err(|errno| {
            XenError::from_errno(
                format!("EVTCHNOP_alloc_unbound in domain {domain}"),
                errno as i32,
            )
        })
    }

    pub(super) fn close_port(&self, domain: DomId, port: Port) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).close_port(domain, port);
        result.map_err(|errno| {
            XenError::from_errno(
                format!("EVTCHNOP_close of port {port} in domain {domain}"),
                errno as i32,
            )
        })
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(socket: &Path) -> io::Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Lets nobody but this user connect to a socket.
pub(super) fn only_for_this_user(socket: &Path) -> io::Result<()> {
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    remove_stale(socket)?;
    let listener = UnixListener::bind(socket)?;
    only_for_this_user(socket)?;
    Ok(listener)
}

/// A granted page in dom0.
#[derive(Debug)]
struct GrantMapping {
    page: Option<MappedPage>,
    machine: Machine,
    domain: DomId,
    reference: GrantRef,
    base: NonNull<u8>,
}

// SAFETY: `base` is the address of `page`, which stays mapped until the drop; a mapped page may be used from any thread.
unsafe impl Send for GrantMapping {}

// SAFETY: a `MappedPage` is 4096 bytes, mapped readable and writable at a page boundary until it is dropped, and cannot be shrunk.
unsafe impl PageMapping for GrantMapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for GrantMapping {
    fn drop(&mut self) {
        self.page = None;
        let mut hypervisor = lock(&self.machine.inner.hypervisor);
        if let Some(domain) = hypervisor.domains.get_mut(&self.domain) {
            domain.grants.unmapped(self.reference);
        }
        hypervisor.bury(self.domain);
    }
}

/// Gives an errno its operation.
pub(super) fn about<T>(operation: String, result: Result<T, Errno>) -> Result<T, XenError> {
    result.map_err(|errno| XenError::from_errno(operation, errno as i32))
}

impl Xen for Machine {
    fn connect_xenstore(&self) -> Result<xenstore::Client, xenstore::Error> {
        xenstore::Client::connect_to(self.inner.run_dir.join("xenstored.sock"))
    }

    fn map_page(
        &self,
        domain: DomId,
        reference: GrantRef,
    ) -> Result<Box<dyn PageMapping>, XenError> {
        let mut hypervisor = lock(&self.inner.hypervisor);
        let result = hypervisor
            .alive(domain)
            .map_err(|_| Errno::EINVAL)
            .and_then(|domain| domain.grants.map(reference, DomId::DOM0));
        drop(hypervisor);
        let page = about(
            format!("mapping grant {reference} of domain {domain}"),
            result,
        )?;
        Ok(Box::new(GrantMapping {
            base: page.base(),
            page: Some(page),
            machine: self.clone(),
            domain,
            reference,
        }))
    }

    fn bind_interdomain(&self, domain: DomId, port: Port) -> Result<Box<dyn EventPort>, XenError> {
        let mut hypervisor = lock(&self.inner.hypervisor);
        let result = hypervisor
            .alive(domain)
            .and_then(|domain| domain.ports.bind_interdomain(port, DomId::DOM0));
        let bound = about(
            format!("EVTCHNOP_bind_interdomain of port {port} of domain {domain}"),
            result,
        )?;
        Ok(Box::new(bound))
    }

    fn domain_info(&self, domain: DomId) -> Result<Option<DomainInfo>, XenError> {
        Ok(lock(&self.inner.hypervisor).info(domain))
    }

    fn map_msi(
        &self,
        domain: DomId,
        device: PciDevice,
        request: MsiRequest,
    ) -> Result<Pirq, XenError> {
        let result = lock(&self.inner.hypervisor).map_msi(domain, device, request);
        about(
            format!("PHYSDEVOP_map_pirq for domain {domain}, {device}"),
            result,
        )
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).unmap_pirq(domain, pirq);
        about(
            format!("PHYSDEVOP_unmap_pirq of PIRQ {pirq} of domain {domain}"),
            result,
        )
    }

    fn prepare_msix(&self, device: PciDevice) -> Result<(), XenError> {
        let result = match lock(&self.inner.hypervisor).prepare_msix(device) {
            Err(Errno::EBUSY) => Ok(()),
            other => other,
        };
        about(format!("PHYSDEVOP_prepare_msix for {device}"), result)
    }

    fn release_msix(&self, device: PciDevice) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).release_msix(device);
        about(format!("PHYSDEVOP_release_msix for {device}"), result)
    }

    fn restore_msi(&self, device: PciDevice) -> Result<(), XenError> {
        let result = lock(&self.inner.hypervisor).restore_msi(device);
        about(format!("PHYSDEVOP_restore_msi_ext for {device}"), result)
    }

    fn assign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        self.assign(domain, device)
            .map_err(|source| XenError::Failed {
                operation: format!("XEN_DOMCTL_assign_device of {device} to domain {domain}"),
                source,
            })
    }

    fn deassign_device(&self, domain: DomId, device: PciDevice) -> Result<(), XenError> {
        let result = self.deassign(domain, device);
        about(
            format!("XEN_DOMCTL_deassign_device of {device} from domain {domain}"),
            result,
        )
    }
}
