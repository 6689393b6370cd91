//! The server, against the embedded Xen: guests' CPUs stop until they are answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use conf_space::Width;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xenbus::device_model::{DeviceModel, IoRange, IoSpace};
use xenbus::ioreq::{Flags, Ioreq, IoreqPage, Kind, State};
use xenbus::sim::{self, DomainKind, HvmGuest, Machine, MachineOptions, Vcpu};
use xenbus::{DomId, PciDevice, Xen};

use super::*;
use crate::memory::{DomainMemory, GuestRam, Words};

const FUNCTION: PciDevice = PciDevice {
    segment: 0,
    bus: 0,
    devfn: 0xf8,
};
const BAR: u64 = 0xf000_0000;

/// All that was done to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Read(Window, u64, Width),
    Write(Window, u64, Width, u32),
}

#[derive(Debug)]
struct Inner {
    deeds: Vec<Deed>,
    /// CPUs that write to port 8 of it are held.
    holds: bool,
    /// Where its memory is; a write to configuration register 0x10 moves it.
    bar: Option<u64>,
}

/// A device with a page of memory, 16 ports and a configuration space. Reads give their number.
#[derive(Debug, Clone)]
struct Device(Arc<Mutex<Inner>>);

impl Device {
    fn new() -> Self {
        let bar = Some(BAR);
        Self(Arc::new(Mutex::new(Inner {
            deeds: Vec::new(),
            holds: false,
            bar,
        })))
    }

    fn placed(&self) -> Placed {
        Placed {
            function: Some(FUNCTION),
            target: Box::new(self.clone()),
        }
    }

    fn deeds(&self) -> Vec<Deed> {
        std::mem::take(&mut self.0.lock().unwrap().deeds)
    }

    fn hold(&self, holds: bool) {
        self.0.lock().unwrap().holds = holds;
    }
}

fn memory(first: u64, size: u64) -> IoRange {
    IoRange {
        space: IoSpace::Memory,
        first,
        last: first + size - 1,
    }
}

const PORTS: IoRange = IoRange {
    space: IoSpace::Port,
    first: 0xc000,
    last: 0xc00f,
};

impl Target for Device {
    fn read(&mut self, window: Window, offset: u64, width: Width) -> u32 {
        let mut state = self.0.lock().unwrap();
        state.deeds.push(Deed::Read(window, offset, width));
        0xa0a0_a000 + state.deeds.len() as u32
    }

    fn write(&mut self, window: Window, offset: u64, width: Width, value: u32) {
        let mut state = self.0.lock().unwrap();
        state.deeds.push(Deed::Write(window, offset, width, value));
        if (window, offset) == (Window::Config, 0x10) {
            state.bar = (value != 0).then(|| value.into());
        }
    }

    fn holds(&mut self, window: Window, offset: u64) -> bool {
        (window, offset) == (Window::Region(0), 8) && self.0.lock().unwrap().holds
    }

    fn claims(&self, claims: &mut Vec<Claim>) {
        let mut claim = |range, window| claims.push(Claim { range, window });
        claim(PORTS, Window::Region(0));
        if let Some(bar) = self.0.lock().unwrap().bar {
            claim(memory(bar, 0x1000), Window::Region(1));
        }
    }
}

struct Setup {
    machine: Machine,
    domain: DomId,
    guest: HvmGuest,
    device: Device,
    ledger: Words,
    ram: Arc<GuestRam>,
    _run_dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::with_options(run_dir.path(), MachineOptions::default()).unwrap();
    let domain = machine.create_domain("guest", DomainKind::Hvm).unwrap();
    let mapper = DomainMemory::new(Arc::new(machine.clone()), domain);
    Setup {
        guest: machine.hvm_guest(domain),
        device: Device::new(),
        ledger: Words::volatile(Ledger::WORDS).unwrap(),
        ram: Arc::new(GuestRam::new(Arc::new(mapper), 64)),
        machine,
        domain,
        _run_dir: run_dir,
    }
}

impl Setup {
    fn open(&self) -> Server {
        let xen: Arc<dyn Xen> = Arc::new(self.machine.clone());
        let ledger = Ledger::new(self.ledger.clone()).unwrap();
        let targets = vec![self.device.placed()];
        let mut server = Server::open(xen, self.domain, Arc::clone(&self.ram), ledger).unwrap();
        server.place(targets);
        server
    }

    fn vcpu(&self) -> Vcpu {
        self.guest.vcpu(0)
    }

    fn claimed(&self) -> Vec<IoRange> {
        let id = Ledger::new(self.ledger.clone()).unwrap().server().unwrap();
        self.machine.claimed(self.domain, id)
    }

    fn serve(&self) -> Serving {
        Serving::start(self.open())
    }
}

/// A server on a thread of its own.
struct Serving {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Server>>,
}

impl Serving {
    fn start(mut server: Server) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            server.serve_all().unwrap();
            while !stopped.load(Ordering::SeqCst) {
                let mut fds: Vec<_> = server
                    .fds()
                    .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                    .collect();
                poll(&mut fds, PollTimeout::from(5u8)).unwrap();
                server.serve_all().unwrap();
                server.go_on().unwrap();
            }
            server
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) -> Server {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn an_access_reaches_the_target_with_window_offset_and_width() {
    let setup = setup();
    let _serving = setup.serve();
    let vcpu = setup.vcpu();
    assert_eq!(vcpu.port_read(0xc004, 2), Ok(0xa001));
    vcpu.port_write(0xc00f, 1, 0x1ff).unwrap();
    assert_eq!(vcpu.memory_read(BAR + 0x20, 4), Ok(0xa0a0_a003));
    assert_eq!(vcpu.config_read(0xf8, 6, 2), Ok(0xa004));
    let (one, two, four) = (Width::One, Width::Two, Width::Four);
    assert_eq!(
        setup.device.deeds(),
        [
            Deed::Read(Window::Region(0), 4, two),
            Deed::Write(Window::Region(0), 15, one, 0xff),
            Deed::Read(Window::Region(1), 0x20, four),
            Deed::Read(Window::Config, 6, two),
        ]
    );
}

#[test]
fn eight_bytes_are_two_accesses_of_four() {
    let setup = setup();
    let _serving = setup.serve();
    let value = setup.vcpu().memory_read(BAR + 8, 8);
    assert_eq!(value, Ok(0xa0a0_a002_a0a0_a001));
    setup
        .vcpu()
        .memory_write(BAR + 8, 8, 0x1111_2222_3333_4444)
        .unwrap();
    let (window, four) = (Window::Region(1), Width::Four);
    assert_eq!(
        setup.device.deeds(),
        [
            Deed::Read(window, 8, four),
            Deed::Read(window, 12, four),
            Deed::Write(window, 8, four, 0x3333_4444),
            Deed::Write(window, 12, four, 0x1111_2222),
        ]
    );
}

#[test]
fn string_instructions_move_their_elements_through_the_guest_s_memory() {
    let setup = setup();
    let _serving = setup.serve();
    let vcpu = setup.vcpu();
    let (read, write) = (sim::Direction::Read, sim::Direction::Write);

    // rep insw, upwards: one port, memory in order.
    vcpu.string(Kind::Port, read, 0xc002, 0x1fff, (3, 2), false)
        .unwrap();
    let mut bytes = [0; 6];
    setup.guest.read(0x1fff, &mut bytes).unwrap();
    assert_eq!(bytes, [0x01, 0xa0, 0x02, 0xa0, 0x03, 0xa0]);
    let (port, bar) = (Window::Region(0), Window::Region(1));
    assert_eq!(setup.device.deeds(), [Deed::Read(port, 2, Width::Two); 3]);

    // rep movsd to the device, downwards.
    setup
        .guest
        .write(0x5000, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])
        .unwrap();
    vcpu.string(Kind::Memory, write, BAR + 8, 0x5008, (3, 4), true)
        .unwrap();
    let four = Width::Four;
    assert_eq!(
        setup.device.deeds(),
        [
            Deed::Write(bar, 8, four, 3),
            Deed::Write(bar, 4, four, 2),
            Deed::Write(bar, 0, four, 1),
        ]
    );

    // rep stosb: one value to many places.
    vcpu.memory_fill(BAR + 0x40, 1, 0x77, 3).unwrap();
    let written = |offset| Deed::Write(bar, offset, Width::One, 0x77);
    assert_eq!(setup.device.deeds(), [0x40, 0x41, 0x42].map(written));
}

#[test]
fn an_instruction_whose_memory_is_missing_ends_there_and_is_answered() {
    let setup = setup();
    let serving = setup.serve();
    let vcpu = setup.vcpu();
    setup.guest.balloon_out(&vcpu, 2).unwrap();
    let (read, write) = (sim::Direction::Read, sim::Direction::Write);
    vcpu.string(Kind::Port, write, 0xc000, 0x1ffe, (4, 1), false)
        .unwrap();
    assert_eq!(setup.device.deeds().len(), 2);
    vcpu.string(Kind::Port, read, 0xc000, u64::MAX, (2, 1), false)
        .unwrap();
    assert_eq!(setup.device.deeds().len(), 1);
    assert!(matches!(
        serving.stop().take_problem(),
        Some(Problem::Fault)
    ));
}

#[test]
fn a_region_is_answered_where_the_guest_has_put_it_and_nowhere_else() {
    let setup = setup();
    let _serving = setup.serve();
    let vcpu = setup.vcpu();
    let claimed = |bar: &[IoRange]| [&[PORTS], bar, &[IoRange::config(FUNCTION)]].concat();
    assert_eq!(setup.claimed(), claimed(&[memory(BAR, 0x1000)]));
    for bar in [0xe000_0000u64, 0xe000_0800, 0xe000_1800] {
        vcpu.config_write(0xf8, 0x10, 4, bar as u32).unwrap();
        assert_eq!(setup.claimed(), claimed(&[memory(bar, 0x1000)]));
        setup.device.deeds();
        vcpu.memory_read(bar + 0xffc, 4).unwrap();
        assert_eq!(
            setup.device.deeds(),
            [Deed::Read(Window::Region(1), 0xffc, Width::Four)]
        );
        assert_eq!(vcpu.memory_read(bar - 4, 4), Ok(0xffff_ffff));
        assert_eq!(setup.device.deeds(), []);
    }
    vcpu.config_write(0xf8, 0x10, 4, 0).unwrap();
    assert_eq!(setup.claimed(), claimed(&[]));
    assert_eq!(vcpu.memory_read(0xe000_1800, 4), Ok(0xffff_ffff));
}

#[test]
fn two_devices_at_one_place_are_no_harm() {
    let setup = setup();
    let other = Device::new();
    let xen: Arc<dyn Xen> = Arc::new(setup.machine.clone());
    let ledger = Ledger::new(setup.ledger.clone()).unwrap();
    let targets = vec![setup.device.placed(), other.placed()];
    let mut server = Server::open(xen, setup.domain, Arc::clone(&setup.ram), ledger).unwrap();
    server.place(targets);
    let serving = Serving::start(server);
    setup.vcpu().memory_write(BAR, 4, 1).unwrap();
    assert_eq!((setup.device.deeds().len(), other.deeds().len()), (1, 0));
    setup
        .vcpu()
        .config_write(0xf8, 0x10, 4, 0xe000_0000)
        .unwrap();
    setup.vcpu().memory_write(BAR, 4, 1).unwrap();
    assert_eq!((setup.device.deeds().len(), other.deeds().len()), (1, 1));
    assert!(serving.stop().take_problem().is_none());
}

#[test]
fn a_request_that_makes_no_sense_is_answered_with_all_ones() {
    let setup = setup();
    let serving = setup.serve();
    let vcpu = setup.vcpu();
    let odd = Ioreq {
        addr: 0xc000,
        count: 1,
        size: 3,
        flags: Flags::READ.bits(),
        kind: Kind::Port as u8,
        ..Ioreq::default()
    };
    assert_eq!(vcpu.issue(odd), Ok(u64::MAX));
    assert_eq!(vcpu.port_read(0xc000, 1), Ok(0x01));
    let problem = serving.stop().take_problem();
    assert!(matches!(
        problem,
        Some(Problem::Request(BadRequest::Size(3)))
    ));
}

#[test]
fn broadcasts_are_answered_and_memory_is_mapped_anew() {
    let setup = setup();
    let _serving = setup.serve();
    let vcpu = setup.vcpu();
    let (read, write) = (sim::Direction::Read, sim::Direction::Write);
    setup.guest.write(0x4000, &[5]).unwrap();
    vcpu.string(Kind::Port, write, 0xc000, 0x4000, (1, 1), false)
        .unwrap();
    assert_eq!(
        setup.device.deeds(),
        [Deed::Write(Window::Region(0), 0, Width::One, 5)]
    );
    setup.guest.balloon_out(&vcpu, 4).unwrap();
    setup.guest.balloon_in(4).unwrap();
    vcpu.string(Kind::Port, read, 0xc000, 0x4000, (1, 1), false)
        .unwrap();
    let mut byte = [0];
    setup.guest.read(0x4000, &mut byte).unwrap();
    assert_eq!(byte, [0x01]);
    setup.guest.set_clock(&vcpu, 3600).unwrap();
}

#[test]
fn a_cpu_that_is_held_waits_while_the_others_are_served() {
    let setup = setup();
    let serving = setup.serve();
    setup.device.hold(true);
    let held = setup.vcpu();
    let writes = thread::spawn(move || held.port_write(0xc008, 2, 5));
    let begun = Deed::Write(Window::Region(0), 8, Width::Two, 5);
    while setup.device.deeds() != [begun] {
        thread::yield_now();
    }
    let other = setup.guest.vcpu(1);
    for _ in 0..3 {
        assert!(other.port_read(0xc000, 2).is_ok());
        assert!(other.port_write(0xc004, 2, 1).is_ok());
    }
    thread::sleep(Duration::from_millis(20));
    assert!(!writes.is_finished());
    // The next process begins anew what is not answered, and holds the CPU, too.
    drop(serving.stop());
    setup.device.deeds();
    let serving = Serving::start(setup.open());
    while setup.device.deeds() != [begun] {
        thread::yield_now();
    }
    assert!(other.port_read(0xc000, 2).is_ok());
    assert!(!writes.is_finished());
    setup.device.hold(false);
    assert_eq!(writes.join().unwrap(), Ok(()));
    setup.device.deeds();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(setup.device.deeds(), [], "nothing is done again");
    drop(serving);
}

#[test]
fn an_instruction_goes_on_where_its_cpu_was_held() {
    let setup = setup();
    let _serving = setup.serve();
    setup.device.hold(true);
    let held = setup.vcpu();
    let ioreq = Ioreq {
        addr: 0xc008,
        data: 7,
        count: 3,
        size: 2,
        kind: Kind::Port as u8,
        ..Ioreq::default()
    };
    let writes = thread::spawn(move || held.issue(ioreq));
    let element = Deed::Write(Window::Region(0), 8, Width::Two, 7);
    while setup.device.deeds() != [element] {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!(setup.device.deeds(), []);
    setup.device.hold(false);
    assert!(writes.join().unwrap().is_ok());
    assert_eq!(setup.device.deeds(), [element; 2]);
}

#[test]
fn all_cpus_are_served() {
    let setup = setup();
    let _serving = setup.serve();
    let cpus = [0, 1].map(|index| {
        let vcpu = setup.guest.vcpu(index);
        thread::spawn(move || {
            for _ in 0..500 {
                vcpu.port_write(0xc000, 1, index).unwrap();
            }
        })
    });
    for cpu in cpus {
        cpu.join().unwrap();
    }
    assert_eq!(setup.device.deeds().len(), 1000);
}

/// A slot as a process that was killed has left it.
fn left_in(state: State) {
    let setup = setup();
    drop(setup.open());
    let id = Ledger::new(setup.ledger.clone()).unwrap().server().unwrap();
    let page = setup.machine.map_ioreq_page(setup.domain, id).unwrap();
    let page = IoreqPage::new(page);
    let vcpu = setup.vcpu();
    let cpu = thread::spawn(move || vcpu.port_read(0xc008, 4));
    while page.state(0) != Some(State::Ready) {
        thread::sleep(Duration::from_micros(100));
    }
    page.set_data(0, 0x1234);
    page.set_state(0, state);
    let _serving = setup.serve();
    let expected = if state == State::Answered {
        0x1234
    } else {
        0xa0a0_a001
    };
    assert_eq!(cpu.join().unwrap(), Ok(expected));
    assert_eq!(
        setup.vcpu().port_read(0xc008, 1).map(|value| value & 0xf0),
        Ok(0)
    );
}

#[test]
fn a_request_that_nobody_has_begun_is_answered_after_a_restart() {
    left_in(State::Ready);
}

#[test]
fn a_request_found_in_process_is_answered_after_a_restart() {
    left_in(State::InProcess);
}

#[test]
fn an_answer_that_its_cpu_was_not_told_of_is_told_after_a_restart() {
    left_in(State::Answered);
}

#[test]
fn after_a_restart_the_server_is_the_same_and_has_what_its_devices_have() {
    let setup = setup();
    let first = setup.open();
    let id = first.id();
    let before = setup.claimed();
    drop(first);
    let again = setup.open();
    assert_eq!((again.id(), setup.claimed()), (id, before.clone()));

    // Killed in the middle of a move: the new place is written down, but not claimed; the old one is.
    drop(again);
    let ledger = Ledger::new(setup.ledger.clone()).unwrap();
    let new = memory(0xe000_0000, 0x1000);
    assert!(ledger.set_ranges(&[&before[..], &[new]].concat()));
    setup.device.0.lock().unwrap().bar = Some(new.first);
    let mut again = setup.open();
    assert!(again.take_problem().is_none());
    let moved: Vec<_> = [PORTS, new, IoRange::config(FUNCTION)].into();
    assert_eq!(setup.claimed(), moved);
    assert_eq!(ledger.ranges(), moved);

    // The same, but later: the old one is given back already.
    drop(again);
    let old = memory(BAR, 0x1000);
    assert!(ledger.set_ranges(&[&moved[..], &[old]].concat()));
    setup.open();
    assert_eq!(setup.claimed(), moved);
}

#[test]
fn a_server_that_xen_does_not_have_any_more_is_replaced() {
    let setup = setup();
    let server = setup.open();
    let (id, claimed) = (server.id(), setup.claimed());
    // Killed at the end of `destroy`, before that was written down.
    setup
        .machine
        .destroy_ioreq_server(setup.domain, id)
        .unwrap();
    drop(server);
    let _serving = setup.serve();
    assert_eq!(setup.claimed(), claimed);
    assert_eq!(setup.vcpu().port_read(0xc000, 1).unwrap(), 1);
}

#[test]
fn a_server_that_is_destroyed_leaves_nothing_behind() {
    let setup = setup();
    let serving = setup.serve();
    setup.vcpu().port_read(0xc000, 1).unwrap();
    serving.stop().destroy().unwrap();
    assert_eq!(Ledger::new(setup.ledger.clone()).unwrap().server(), None);
    assert_eq!(setup.vcpu().port_read(0xc000, 1), Ok(0xff));
    let next = setup.open();
    assert_eq!(setup.claimed().len(), 3);
    drop(next);
    setup.ram.invalidate();
    assert_eq!(setup.machine.held_by_dom0(setup.domain), Some(0));
}
