//! A PCI frontend of our own, beside the kernel's: a page granted to dom0, an event channel left for it, and the nodes that name them.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use xenbus::XenbusState;
use xenbus::xenstore::{Client, Store};

/// Where libxl puts the frontend, relative to the domain's own path.
pub const DIRECTORY: &str = "device/pci/0";

const PAGE_SIZE: usize = 4096;
const PAGE_WORDS: usize = PAGE_SIZE / 4;
/// Words of the page that the interface uses (`struct xen_pci_sharedinfo`, 572 bytes), and some behind it.
pub const WORDS: usize = 160;
/// Index of the flags' word.
pub const FLAGS: usize = 0;
/// `XEN_PCIF_active`.
pub const ACTIVE: u32 = 1;

/// `XEN_PCIB_AERHANDLER`.
pub const AER_HANDLER: u32 = 2;

/// `struct ioctl_gntalloc_alloc_gref` (Linux `include/uapi/xen/gntalloc.h`) for one page.
#[repr(C)]
struct AllocateGrant {
    domain: u16,
    /// Bit 0: writable.
    flags: u16,
    count: u32,
    /// Out: the offset to map at.
    index: u64,
    /// Out.
    reference: u32,
}

/// `struct ioctl_evtchn_bind_unbound_port` (Linux `include/uapi/xen/evtchn.h`).
#[repr(C)]
struct BindUnbound {
    remote_domain: u32,
}

/// `struct ioctl_evtchn_notify`.
#[repr(C)]
struct Notify {
    port: u32,
}

const ALLOCATE_GRANT: libc::Ioctl = 0x18_4705;
const BIND_UNBOUND: libc::Ioctl = 0x04_4502;
const NOTIFY: libc::Ioctl = 0x04_4504;

const _: () = assert!(
    size_of::<AllocateGrant>() == 0x18 && size_of::<BindUnbound>() == 4 && size_of::<Notify>() == 4
);

/// A page that dom0 may map. Stays mapped until the program ends.
pub struct Page {
    base: NonNull<AtomicU32>,
    pub reference: u32,
}

impl Page {
    fn grant() -> Result<Self, Box<dyn Error>> {
        let file = device("/dev/xen/gntalloc")?;
        let mut grant = AllocateGrant {
            domain: 0,
            flags: 1,
            count: 1,
            index: 0,
            reference: 0,
        };
        // SAFETY: ALLOCATE_GRANT takes this structure, with room for the one reference that is asked for.
        check(unsafe { libc::ioctl(file.as_raw_fd(), ALLOCATE_GRANT, &raw mut grant) })?;
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that is in use.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                i64::try_from(grant.index)?,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or("mapped at 0")?,
            reference: grant.reference,
        })
    }

    /// The word of that index, if the page has so many.
    fn word(&self, index: usize) -> Option<&AtomicU32> {
        // SAFETY: the page is mapped for as long as the program runs, aligned, and the index is within it. Dom0 changes it at any time, which
        // is why it is only ever seen as atomics.
        (index < PAGE_WORDS).then(|| unsafe { self.base.add(index).as_ref() })
    }

    pub fn load(&self, index: usize) -> u32 {
        self.word(index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub fn store(&self, index: usize, value: u32) {
        if let Some(word) = self.word(index) {
            word.store(value, Ordering::Release);
        }
    }
}

/// A port left unbound for dom0.
pub struct Port {
    file: File,
    pub number: u32,
}

impl Port {
    fn unbound() -> Result<Self, Box<dyn Error>> {
        let file = device("/dev/xen/evtchn")?;
        let bind = BindUnbound { remote_domain: 0 };
        // SAFETY: BIND_UNBOUND takes this structure.
        let number =
            check(unsafe { libc::ioctl(file.as_raw_fd(), BIND_UNBOUND, &raw const bind) })?;
        Ok(Self {
            file,
            number: number.cast_unsigned(),
        })
    }

    pub fn notify(&self) -> io::Result<()> {
        let notify = Notify { port: self.number };
        // SAFETY: NOTIFY takes this structure.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), NOTIFY, &raw const notify) }).map(drop)
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn device(path: &str) -> Result<File, Box<dyn Error>> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path);
    opened.map_err(|error| format!("{path}: {error}").into())
}

/// A frontend that is connected, and has behaved so far.
pub struct Frontend {
    pub page: Page,
    pub port: Port,
    pub store: Client,
    pub backend: String,
}

impl Frontend {
    /// Shares a page and a port with the backend as xen-pcifront does, and waits until it is connected.
    pub fn connect() -> Result<Self, Box<dyn Error>> {
        let mut store = Client::connect()?;
        let (page, port) = (Page::grant()?, Port::unbound()?);
        store.transaction(|t| {
            t.write(
                &format!("{DIRECTORY}/pci-op-ref"),
                page.reference.to_string(),
            )?;
            t.write(
                &format!("{DIRECTORY}/event-channel"),
                port.number.to_string(),
            )?;
            t.write(&format!("{DIRECTORY}/magic"), xenbus::pciif::MAGIC)?;
            t.write(
                &format!("{DIRECTORY}/state"),
                XenbusState::Initialised.number().to_string(),
            )
        })?;
        let backend = store.read_string(&format!("{DIRECTORY}/backend"))?;
        let begin = Instant::now();
        while store.read_state(&format!("{backend}/state"))? != XenbusState::Connected {
            if begin.elapsed() > Duration::from_secs(20) {
                return Err("the backend does not connect".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        store.write(
            &format!("{DIRECTORY}/state"),
            XenbusState::Connected.number().to_string(),
        )?;
        Ok(Self {
            page,
            port,
            store,
            backend,
        })
    }

    /// Hands what the page holds to the backend as an operation; true if that is answered within `patience`.
    pub fn operate(&self, patience: Duration) -> io::Result<bool> {
        self.page.store(FLAGS, self.page.load(FLAGS) | ACTIVE);
        self.port.notify()?;
        let begin = Instant::now();
        while self.page.load(FLAGS) & ACTIVE != 0 {
            if begin.elapsed() > patience {
                return Ok(false);
            }
            std::thread::yield_now();
        }
        Ok(true)
    }
}
