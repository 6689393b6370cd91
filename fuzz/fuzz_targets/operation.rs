//! Any operations of a guest, from its page to the hardware and back.
//!
//! Each operation is 13 bytes: command (u8), devfn (u8), offset (i16), size (i8), value (u32), number of vectors (u8), entries of the MSI-X
//! table (3 times u8). What does not fit into these is what the pages of the first byte 0xff are for: those are taken as they are.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use conf_space::topology::TopologyKind;
use conf_space::{Bdf, Width};
use libfuzzer_sys::fuzz_target;
use pcibackd::host::Bus;
use pcibackd::host::config_state::{restore, saved_command};
use pcibackd::host::devices::{Devices, Quarantine, for_xen};
use pcibackd::host::sim::{MSI_ONLY, NIC_VF0, NIC_VF1, NVME, SimBus};
use pcibackd::rate_limit::RateLimit;
use pcibackd::session::exports::Exports;
use pcibackd::session::operation::serve;
use xenbus::pciif::{Command, LocalPage, MsixEntry, PciOp, SharedInfo};
use xenbus::sim::{DomainKind, Machine, PciOptions};
use xenbus::{DomId, Xen};
use zerocopy::IntoBytes;

/// The guest's devices, all of which can be reset, and one that is not its own.
const DEVICES: [Bdf; 3] = [NVME, MSI_ONLY, NIC_VF0];
const FOREIGN: Bdf = NIC_VF1;

struct Guest {
    machine: Machine,
    bus: Arc<SimBus>,
    devices: Arc<Devices>,
    domain: DomId,
    exports: Exports,
    /// The overlays' state before any operation.
    overlays: Vec<u64>,
    lines: usize,
    _directory: tempfile::TempDir,
}

static GUEST: LazyLock<Mutex<Guest>> = LazyLock::new(|| Mutex::new(Guest::new()));

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::new(directory.path()).unwrap();
        let xen: Arc<dyn Xen> = Arc::new(machine.clone());
        let bus = SimBus::with_example_devices(&machine);
        let records = directory.path().join("devices");
        let devices = Devices::open(Arc::clone(&bus) as _, Arc::clone(&xen), Arc::default(), records).unwrap();
        let domain = machine.create_domain("guest", DomainKind::Pv).unwrap();
        let mut exports = Exports::new(domain, TopologyKind::Vpci, Arc::clone(&devices), xen);
        for bdf in DEVICES {
            devices.hide(bdf, false, Quarantine::Ours).unwrap();
            machine
                .pci_attach(domain, for_xen(bdf), &PciOptions::default())
                .unwrap();
            exports.add(bdf, None).unwrap();
        }
        let overlays = exports
            .iter()
            .map(|export| export.device.record.overlay())
            .collect();
        let lines = machine.mapped_pirqs(domain).len();
        Self {
            machine,
            bus,
            devices,
            domain,
            exports,
            overlays,
            lines,
            _directory: directory,
        }
    }

    /// All registers of the device that is not the guest's.
    fn foreign(&self) -> Vec<u32> {
        let config = self.bus.open(FOREIGN).unwrap();
        let read = |offset| config.read(offset, Width::Four).unwrap();
        (0..0x100).step_by(4).map(read).collect()
    }

    fn play(&mut self, op: &PciOp) {
        let mut content = [0; 4096];
        content[..4].copy_from_slice(&1u32.to_le_bytes());
        content[4..4 + size_of::<PciOp>()].copy_from_slice(op.as_bytes());
        let page = SharedInfo::new(Box::new(LocalPage::new(content)));
        let op = page.fetch();
        let mut limit = RateLimit::new(0, Duration::MAX);
        let reply = serve(&mut self.exports, &op, &mut limit);
        if op.command() == Some(Command::ConfRead) && reply.error.0 == 0 {
            let width = u32::try_from(op.size).ok().and_then(Width::from_bytes);
            assert_eq!(reply.value & !width.unwrap().mask(), 0);
        }
        let vectors = reply.vectors.as_ref();
        page.publish(
            reply.error,
            reply.value,
            vectors.map(|vectors| vectors.as_slice()),
        );
        assert!(!page.active());
    }

    /// Everything as in the beginning, as a daemon finds it that is started anew.
    fn reset(&mut self) {
        let mut fresh = Exports::new(
            self.domain,
            TopologyKind::Vpci,
            Arc::clone(&self.devices),
            Arc::new(self.machine.clone()),
        );
        let places: Vec<_> = self
            .exports
            .iter()
            .map(|export| (Arc::clone(&export.device), export.seen_as))
            .collect();
        for ((device, place), overlay) in places.into_iter().zip(self.overlays.clone()) {
            self.play(&PciOp {
                cmd: Command::DisableMsi as u32,
                devfn: place.devfn().into(),
                ..PciOp::default()
            });
            self.devices.reset(device.bdf).unwrap();
            let saved = device.record.config();
            restore(&*device.config, &saved, saved_command(&saved));
            device.record.set_overlay(overlay);
            assert_eq!(fresh.add(device.bdf, None).unwrap(), place);
        }
        self.exports = fresh;
        assert_eq!(self.machine.mapped_pirqs(self.domain).len(), self.lines);
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        })
    }

    fn operation(&mut self) -> PciOp {
        let ([command, devfn], offset) = (self.take(), i16::from_le_bytes(self.take()));
        let ([size], value) = (self.take(), u32::from_le_bytes(self.take()));
        let ([info], entries) = (self.take(), self.take::<3>());
        let mut op = PciOp {
            cmd: u32::from(command % 12),
            devfn: devfn.into(),
            offset: offset.into(),
            size: i32::from(size as i8),
            value,
            info: info.into(),
            ..PciOp::default()
        };
        for (slot, entry) in op.msix_entries.iter_mut().zip(entries) {
            *slot = MsixEntry {
                vector: 0,
                entry: entry.into(),
            };
        }
        op
    }
}

fuzz_target!(|data: &[u8]| {
    if let Some((0xff, content)) = data.split_first() {
        return xenbus::fuzzing::shared_page(content);
    }
    let mut guest = GUEST.lock().unwrap();
    let foreign = guest.foreign();
    let mut input = Input(data);
    while !input.0.is_empty() {
        let op = input.operation();
        guest.play(&op);
    }
    assert_eq!(guest.foreign(), foreign);
    guest.reset();
});
