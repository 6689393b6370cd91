//! A guest without a driver: the test itself holds its page, its port and its nodes.

use std::sync::{Arc, Mutex, MutexGuard};

use conf_space::Bdf;
use conf_space::overlay::Permissive;
use pcibackd::host::devices::for_xen;
use pcibackd::host::record::RunTime;
use xenbus::pciif::{Command, Flags as PageFlags, Frontend, PciOp};
use xenbus::sim::{GuestPlatform, GuestPort};
use xenbus::xenstore::{Client, Store};
use xenbus::{DomId, PciDevice};

use crate::house::{House, LONG, until};
use crate::mortal::Deed;

/// The page, which a witness of the daemon's deeds may change at the same time.
pub type Page = Arc<Mutex<Frontend>>;

/// Offsets of fields in the page.
pub const OFFSET: usize = 24;
pub const ENTRIES: usize = 40;

pub struct Guest {
    pub domain: DomId,
    pub page: Page,
    pub store: Client,
    port: GuestPort,
}

impl Guest {
    /// A guest with these devices, connected.
    pub fn connected(house: &House, devices: &[Bdf]) -> Self {
        let domain = house.guest(devices);
        let guest = Self::publishing(house, domain, |reference| reference.to_string());
        house.until_node(domain, "state", "4");
        guest.write("state", "4")
    }

    /// Offers a page whose grant reference is told as `told`.
    pub fn publishing(house: &House, domain: DomId, told: impl Fn(u32) -> String) -> Self {
        let platform = house.machine.guest(domain);
        let granted = platform.grant_page(DomId::DOM0).unwrap();
        let port = platform.alloc_unbound(DomId::DOM0).unwrap();
        let guest = Self {
            domain,
            page: Arc::new(Mutex::new(Frontend::new(Box::new(granted.page)))),
            store: platform.connect_xenstore().unwrap(),
            port,
        };
        let port = guest.port.number().to_string();
        guest
            .write("pci-op-ref", &told(granted.reference.0))
            .write("event-channel", &port)
            .write("magic", "7")
            .write("state", "3")
    }

    fn write(mut self, node: &str, value: &str) -> Self {
        let path = format!("device/pci/0/{node}");
        self.store.write(&path, value).unwrap();
        self
    }

    pub fn page(&self) -> MutexGuard<'_, Frontend> {
        self.page.lock().unwrap()
    }

    pub fn notify(&self) {
        self.port.notify().unwrap();
    }

    /// Hands an operation over, and returns when the page is the guest's again.
    pub fn operate(&self, op: &PciOp) -> PciOp {
        self.page().submit(op);
        self.notify();
        while self.page().pending() {
            assert!(self.port.wait(LONG).unwrap(), "no answer to {op:?}");
        }
        self.page().answer()
    }

    pub fn read(&self, at: PciDevice, offset: i32, size: i32) -> PciOp {
        self.operate(&op(Command::ConfRead, at, offset, size, 0))
    }

    pub fn write_config(&self, at: PciDevice, offset: i32, size: i32, value: u32) -> PciOp {
        self.operate(&op(Command::ConfWrite, at, offset, size, value))
    }

    pub fn set_flags(&self, flags: u32) {
        self.page().set_flags(PageFlags::from_bits_retain(flags));
    }
}

pub fn op(command: Command, at: PciDevice, offset: i32, size: i32, value: u32) -> PciOp {
    PciOp {
        cmd: command as u32,
        domain: at.segment.into(),
        bus: at.bus.into(),
        devfn: at.devfn.into(),
        offset,
        size,
        value,
        ..PciOp::default()
    }
}

/// Lets a device's guest do all that an operator can let it do.
pub fn grant_everything(house: &House, bdf: Bdf) {
    house.set(bdf, |settings| {
        settings.permissive = Some(Permissive::Yes);
        settings.allow_interrupt_control = Some(true);
    });
}

/// Whether nothing is granted to a device's guest.
pub fn nothing_is_granted(house: &House, bdf: Bdf) -> bool {
    house.record(bdf).settings() == RunTime::default()
}

/// What the daemon has done, in order.
#[derive(Clone, Default)]
pub struct Diary(Arc<Mutex<Vec<Deed>>>);

impl Diary {
    /// From now on.
    pub fn of(house: &House) -> Self {
        let diary = Self::default();
        let writer = diary.clone();
        house.life().witness(move |deed| writer.note(deed));
        diary
    }

    pub fn note(&self, deed: &Deed) {
        self.0.lock().unwrap().push(*deed);
    }

    /// What was done since the last call, but for xenstore and events.
    pub fn take(&self) -> Vec<Deed> {
        let mut deeds = std::mem::take(&mut *self.0.lock().unwrap());
        deeds.retain(|deed| !matches!(deed, Deed::Request | Deed::Unmask));
        deeds
    }
}

/// Ends a guest, and waits until its devices are free.
pub fn destroy(house: &House, domain: DomId, devices: &[Bdf]) {
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    for bdf in devices {
        house.until_free(*bdf);
    }
}

/// Whose DMA a device does.
pub fn owner(house: &House, bdf: Bdf) -> DomId {
    house.machine.device_owner(for_xen(bdf)).unwrap()
}

/// Waits until a device is in quarantine.
pub fn until_quarantined(house: &House, bdf: Bdf) {
    until(format!("{bdf} is in quarantine"), || {
        owner(house, bdf) == DomId::IO
    });
}
