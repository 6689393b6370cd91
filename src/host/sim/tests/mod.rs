//! The bus as dom0, Xen and a guest find it.

mod devices;
mod hands;
mod interrupts;
mod windows;

use std::sync::Arc;
use std::time::{Duration, Instant};

use conf_space::capabilities::{Capabilities, CapabilityId, ExtendedCapabilityId, ListFault};
use conf_space::{AccessError, Bdf, ConfigSize, Width};
use msi::{BrokenMsiX, Interrupts};
use xenbus::sim::{DomainKind, GuestPlatform, GuestPort, Machine, PciOptions};
use xenbus::{DomId, MsiRequest, Xen};

use super::*;
use crate::host::devices::{for_xen, for_xen as xen};
use crate::host::{Bus, Config, Function, HostError};

struct Host {
    bus: Arc<SimBus>,
    machine: Machine,
    _directory: tempfile::TempDir,
}

fn host() -> Host {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(directory.path()).unwrap();
    Host {
        bus: SimBus::with_example_devices(&machine),
        machine,
        _directory: directory,
    }
}

impl Host {
    fn config(&self, bdf: Bdf) -> Config {
        self.bus.open(bdf).unwrap()
    }

    fn word(&self, bdf: Bdf, offset: u16) -> u32 {
        self.config(bdf).read(offset, Width::Two).unwrap()
    }

    fn bar(&self, bdf: Bdf, index: usize) -> u64 {
        self.bus.describe(bdf).unwrap().identity.resources[index].start
    }

    fn find(&self, bdf: Bdf, id: CapabilityId) -> u16 {
        let config = self.config(bdf);
        let found = Capabilities::walk(&*config, ConfigSize::Conventional).unwrap();
        found.find(id).unwrap()
    }

    fn set_bits(&self, bdf: Bdf, offset: u16, bits: u32) {
        let value = self.word(bdf, offset) | bits;
        self.config(bdf).write(offset, Width::Two, value).unwrap();
    }

    /// Gives a device to a new guest, as its toolstack does.
    fn assign(&self, bdf: Bdf) -> DomId {
        self.bus.unbind(bdf).unwrap();
        self.bus.enable(bdf, true).unwrap();
        let domain = self.machine.create_domain("guest", DomainKind::Pv).unwrap();
        let msix = self.bus.describe(bdf).unwrap();
        let has_msix = Interrupts::discover(&*self.config(bdf), &msix.identity.resources)
            .unwrap()
            .msix()
            .is_some();
        if has_msix {
            self.machine.prepare_msix(xen(bdf)).unwrap();
        }
        self.machine.assign_device(DomId::IO, xen(bdf)).unwrap();
        self.machine
            .pci_attach(domain, xen(bdf), &PciOptions::default())
            .unwrap();
        domain
    }

    fn map(&self, domain: DomId, bdf: Bdf, request: MsiRequest) -> (xenbus::Pirq, GuestPort) {
        let pirq = self.machine.map_msi(domain, xen(bdf), request).unwrap();
        let port = self.machine.guest(domain).bind_pirq(pirq).unwrap();
        (pirq, port)
    }
}
