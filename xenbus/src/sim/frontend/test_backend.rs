//! A backend that is just good enough to test frontends with: it passes configuration accesses through to the bus, follows the states,
//! and maps interrupts.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};

use crate::pciif::{AerCommand, AerResult, ChannelState, Command, PciError, PciOp, SharedInfo};
use crate::platform::{EventPort, MsiRequest, Xen};
use crate::sim::hardware::Hardware;
use crate::sim::test_bus::TestBus;
use crate::sim::{Machine, lock};
use crate::state::XenbusState as State;
use crate::types::{DomId, PciDevice, Pirq};
use crate::xenstore::{Client, Store};

/// What the test and the backend's thread share.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Answers no operation.
    deaf: AtomicBool,
    /// A step of recovery to ask for, and the answer.
    aer: Mutex<Option<(AerCommand, PciDevice)>>,
    aer_result: Mutex<Option<AerResult>>,
    /// The operations that came.
    operations: Mutex<Vec<PciOp>>,
}

/// The running backend.
pub(super) struct TestBackend {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl TestBackend {
    pub fn start(machine: &Machine, bus: &Arc<TestBus>, domain: DomId) -> Self {
        let shared = Arc::new(Shared::default());
        let mut session = Session {
            shared: Arc::clone(&shared),
            store: machine.connect_xenstore().unwrap(),
            machine: machine.clone(),
            bus: Arc::clone(bus),
            domain,
            backend: format!("/local/domain/0/backend/pci/{domain}/0"),
            frontend: format!("/local/domain/{domain}/device/pci/0"),
            devices: BTreeMap::new(),
            link: None,
            last_frontend: State::Unknown,
            pirqs: BTreeMap::new(),
        };
        let thread = std::thread::spawn(move || session.run());
        Self {
            shared,
            thread: Some(thread),
        }
    }

    pub fn set_deaf(&self, deaf: bool) {
        self.shared.deaf.store(deaf, Ordering::Release);
    }

    pub fn ask_aer(&self, command: AerCommand, function: PciDevice) {
        *lock(&self.shared.aer) = Some((command, function));
    }

    pub fn aer_result(&self) -> Option<AerResult> {
        *lock(&self.shared.aer_result)
    }

    /// The operations that came since the last call.
    pub fn take_operations(&self) -> Vec<PciOp> {
        std::mem::take(&mut lock(&self.shared.operations))
    }
}

impl Drop for TestBackend {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let result = self.thread.take().unwrap().join();
        assert!(
            std::thread::panicking() || result.is_ok(),
            "the backend has panicked"
        );
    }
}

struct Session {
    shared: Arc<Shared>,
    store: Client,
    machine: Machine,
    bus: Arc<TestBus>,
    domain: DomId,
    backend: String,
    frontend: String,
    /// By virtual address.
    devices: BTreeMap<PciDevice, PciDevice>,
    link: Option<(SharedInfo, Box<dyn EventPort>)>,
    last_frontend: State,
    pirqs: BTreeMap<PciDevice, Vec<Pirq>>,
}

impl Session {
    fn run(&mut self) {
        for path in [self.backend.clone(), format!("{}/state", self.frontend)] {
            self.store.watch(&path, "state").unwrap();
        }
        while !self.shared.stop.load(Ordering::Acquire) {
            while self.store.next_event().unwrap().is_some() {
                self.follow_states();
            }
            self.serve();
            let mut fds = vec![PollFd::new(self.store.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.link
                    .iter()
                    .map(|(_, port)| PollFd::new(port.fd(), PollFlags::POLLIN)),
            );
            poll(&mut fds, 2u8).unwrap();
        }
    }

    fn node(&mut self, name: &str) -> Option<String> {
        self.store
            .read_string(&format!("{}/{name}", self.backend))
            .ok()
    }

    fn set(&mut self, name: &str, value: &str) {
        self.store
            .write(&format!("{}/{name}", self.backend), value)
            .unwrap();
    }

    fn set_state(&mut self, state: State) {
        self.set("state", &state.number().to_string());
    }

    fn follow_states(&mut self) {
        let Some(own) = self.node("state") else {
            return;
        };
        let own = State::parse(own.as_bytes());
        let frontend = self
            .store
            .read_state(&format!("{}/state", self.frontend))
            .unwrap();
        let changed = frontend != self.last_frontend;
        match (own, frontend) {
            (State::Initialising, _) => {
                self.export();
                self.set_state(State::Initialised);
            }
            (State::Initialised, State::Initialised) => self.connect(),
            (State::Initialised, _) => self.export(),
            (State::Reconfiguring, State::Reconfiguring) => {
                self.export();
                self.set_state(State::Reconfigured);
            }
            (State::Reconfigured, State::Connected) => self.set_state(State::Connected),
            (_, State::Closing) if changed => self.disconnect(State::Closing),
            (_, State::Closed) if changed => {
                self.disconnect(State::Closed);
                // For the frontend to see it.
                std::thread::sleep(Duration::from_millis(20));
                self.set_state(State::Initialised);
            }
            _ => {}
        }
        self.last_frontend = frontend;
    }

    fn export(&mut self) {
        let count: u32 = self.node("num_devs").unwrap().parse().unwrap();
        for index in 0..count {
            let state = self.node(&format!("state-{index}")).unwrap_or_default();
            if state == "1" {
                let device =
                    super::operations::parse_address(&self.node(&format!("dev-{index}")).unwrap())
                        .unwrap();
                let slot = (0..32)
                    .find(|slot| !self.devices.keys().any(|known| known.devfn >> 3 == *slot))
                    .unwrap();
                let address = PciDevice {
                    segment: 0,
                    bus: 0,
                    devfn: slot << 3 | device.devfn & 7,
                };
                self.devices.insert(address, device);
                self.machine.prepare_msix(device).unwrap();
                self.set(
                    &format!("vdev-{index}"),
                    &format!("0000:00:{slot:02x}.{:02x}", device.devfn & 7),
                );
                self.set(&format!("state-{index}"), "3");
            } else if state == "5" {
                let address =
                    super::operations::parse_address(&self.node(&format!("vdev-{index}")).unwrap())
                        .unwrap();
                self.devices.remove(&address);
            }
        }
        // Once: it watches its own directory.
        if self.node("root_num").is_none() {
            self.set("root_num", "1");
            self.set("root-0", "0000:00");
        }
    }

    fn connect(&mut self) {
        let number = |store: &mut Client, path: String| store.read_u32(&path).ok();
        let reference = number(&mut self.store, format!("{}/pci-op-ref", self.frontend));
        let port = number(&mut self.store, format!("{}/event-channel", self.frontend));
        let magic = self
            .store
            .read(&format!("{}/magic", self.frontend))
            .unwrap_or_default();
        let page = reference.and_then(|reference| {
            self.machine
                .map_page(self.domain, crate::GrantRef(reference))
                .ok()
        });
        let port = port.and_then(|port| {
            self.machine
                .bind_interdomain(self.domain, crate::Port(port))
                .ok()
        });
        match (page, port) {
            (Some(page), Some(port)) if magic == b"7" => {
                self.link = Some((SharedInfo::new(page), port));
                self.set_state(State::Connected);
            }
            _ => self.set_state(State::Closing),
        }
    }

    fn disconnect(&mut self, state: State) {
        self.link = None;
        self.set_state(state);
    }

    fn serve(&mut self) {
        let Some((page, mut port)) = self.link.take() else {
            return;
        };
        if port.take().unwrap() {
            port.unmask().unwrap();
        }
        if let Some((command, function)) = lock(&self.shared.aer).take() {
            page.post_aer(command, ChannelState::Frozen, function);
            port.notify().unwrap();
        }
        *lock(&self.shared.aer_result) = page.take_aer_result();
        if page.active() && !self.shared.deaf.load(Ordering::Acquire) {
            let op = page.fetch();
            lock(&self.shared.operations).push(op);
            let mut vectors = Vec::new();
            let (error, value) = self.carry_out(&op, &mut vectors);
            page.publish(error, value, Some(&vectors));
            port.notify().unwrap();
        }
        self.link = Some((page, port));
    }

    fn carry_out(&mut self, op: &PciOp, vectors: &mut Vec<u16>) -> (PciError, u32) {
        let virtual_address = PciDevice {
            segment: 0,
            bus: 0,
            devfn: op.devfn.try_into().unwrap_or(0xff),
        };
        let Some(device) = self
            .devices
            .get(&virtual_address)
            .copied()
            .filter(|_| op.bus == 0 && op.domain == 0)
        else {
            return (PciError::DEV_NOT_FOUND, op.value);
        };
        let (Ok(offset), Ok(width)) = (u16::try_from(op.offset), u8::try_from(op.size)) else {
            return (PciError::INVALID_OFFSET, op.value);
        };
        let map = |request| self.machine.map_msi(self.domain, device, request).unwrap();
        let mapped = match op.command() {
            Some(Command::ConfRead) => {
                return (
                    PciError::SUCCESS,
                    self.bus.config_read(device, offset, width),
                );
            }
            Some(Command::ConfWrite) => {
                let value = match offset {
                    // 128 KiB of memory, 32 ports, and no other register.
                    0x10 => op.value & !0x1_ffff,
                    0x14 => op.value & !0x1f | 1,
                    0x18..=0x27 | 0x30 => 0,
                    0x40.. => return (PciError::ACCESS_DENIED, op.value),
                    _ => op.value,
                };
                self.bus.config_write(device, offset, width, value);
                return (PciError::SUCCESS, op.value);
            }
            Some(Command::EnableMsi) => vec![map(MsiRequest::Msi)],
            Some(Command::EnableMultiMsi) => {
                let first = map(MsiRequest::MultiMsi {
                    count: op.info.try_into().unwrap(),
                });
                return (PciError::SUCCESS, first.0);
            }
            Some(Command::EnableMsix) => {
                let entries = op.msix_entries.iter().take(op.value.try_into().unwrap());
                entries
                    .map(|entry| {
                        map(MsiRequest::MsiX {
                            entry: entry.entry,
                            table_base: 0xfe00_0000,
                        })
                    })
                    .collect()
            }
            Some(Command::DisableMsi | Command::DisableMsix) => {
                for pirq in self.pirqs.remove(&device).unwrap_or_default() {
                    self.machine.unmap_pirq(self.domain, pirq).unwrap();
                }
                return (PciError::SUCCESS, 0);
            }
            None => return (PciError::NOT_IMPLEMENTED, op.value),
        };
        vectors.extend(mapped.iter().map(|pirq| u16::try_from(pirq.0).unwrap()));
        let first = if op.command() == Some(Command::EnableMsi) {
            mapped[0].0
        } else {
            0
        };
        self.pirqs.insert(device, mapped);
        (PciError::SUCCESS, first)
    }
}
