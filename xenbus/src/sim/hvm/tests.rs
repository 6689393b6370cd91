use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::device_model::{DeviceModel, IntxPin, IoRange, IoSpace, IoreqServerId};
use crate::ioreq::{Flags, Ioreq, IoreqPage, Kind, SLOTS, State};
use crate::platform::{EventPort, Xen};
use crate::sim::{DomainKind, Machine, MachineOptions};
use crate::types::{DomId, PciDevice};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(30);

struct Setup {
    machine: Machine,
    domain: DomId,
    guest: HvmGuest,
    _run_dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let options = MachineOptions {
        hvm_memory: 16 * 4096,
        ..MachineOptions::default()
    };
    let machine = Machine::with_options(run_dir.path(), options).unwrap();
    let domain = machine.create_domain("guest", DomainKind::Hvm).unwrap();
    Setup {
        guest: machine.hvm_guest(domain),
        machine,
        domain,
        _run_dir: run_dir,
    }
}

/// A server of one CPU, as simple as one can be.
struct Server {
    id: IoreqServerId,
    page: IoreqPage,
    port: Box<dyn EventPort>,
}

impl Setup {
    fn server(&self, ranges: &[IoRange]) -> Server {
        let Self {
            machine, domain, ..
        } = self;
        let id = machine.create_ioreq_server(*domain).unwrap();
        let page = IoreqPage::new(machine.map_ioreq_page(*domain, id).unwrap());
        machine.set_ioreq_server_state(*domain, id, true).unwrap();
        for range in ranges {
            machine.map_io_range(*domain, id, *range).unwrap();
        }
        let mut port = machine.bind_interdomain(*domain, page.port(0)).unwrap();
        // Binding sets it pending.
        assert!(port.take().unwrap());
        port.unmask().unwrap();
        Server { id, page, port }
    }

    fn vcpu(&self) -> Vcpu {
        self.guest.vcpu(0)
    }
}

impl Server {
    /// Waits for a request.
    fn next(&mut self) -> Ioreq {
        let start = std::time::Instant::now();
        while !self.port.take().unwrap() {
            assert!(start.elapsed() < LONG, "no request");
            thread::sleep(Duration::from_micros(100));
        }
        self.port.unmask().unwrap();
        assert_eq!(self.page.state(0), Some(State::Ready));
        self.page.set_state(0, State::InProcess);
        self.page.fetch(0)
    }

    fn answer(&self, value: u64) {
        self.page.set_data(0, value);
        self.page.set_state(0, State::Answered);
        self.port.notify().unwrap();
    }

    /// On a thread of its own: answers one request, and gives it.
    fn answering(mut self, value: u64) -> JoinHandle<(Self, Ioreq)> {
        thread::spawn(move || {
            let request = self.next();
            self.answer(value);
            (self, request)
        })
    }
}

fn ports(first: u64, last: u64) -> IoRange {
    let space = IoSpace::Port;
    IoRange { space, first, last }
}

fn memory(first: u64, last: u64) -> IoRange {
    let space = IoSpace::Memory;
    IoRange { space, first, last }
}

#[test]
fn an_access_waits_until_it_is_answered() {
    let setup = setup();
    let server = setup
        .server(&[ports(0xc000, 0xc03f)])
        .answering(0x1234_5678);
    assert_eq!(setup.vcpu().port_read(0xc010, 2), Ok(0x5678));
    let (server, request) = server.join().unwrap();
    assert_eq!((request.addr, request.size, request.count), (0xc010, 2, 1));
    assert_eq!(Kind::from_wire(request.kind), Some(Kind::Port));
    assert!(request.flags().contains(Flags::READ));
    let server = server.answering(0);
    setup.vcpu().port_write(0xc000, 4, 7).unwrap();
    let (server, request) = server.join().unwrap();
    assert_eq!((request.data, request.flags()), (7, Flags::empty()));
    assert_eq!(server.page.state(0), Some(State::None));
}

#[test]
fn a_cpu_that_is_not_answered_hangs_for_ever() {
    let setup = setup();
    let mut server = setup.server(&[ports(1, 1)]);
    let vcpu = setup.vcpu().with_patience(SHORT);
    assert_eq!(vcpu.port_read(1, 1), Err(VcpuError::Hangs));
    server.next();
    server.page.set_state(0, State::Answered);
    drop(server);
    let other = setup.guest.vcpu(1).with_patience(SHORT);
    assert_eq!(other.port_read(2, 1), Ok(0xff), "claimed by nobody");
}

#[test]
fn an_answer_without_an_event_is_not_noticed() {
    let setup = setup();
    let mut server = setup.server(&[ports(1, 1)]);
    let vcpu = setup.vcpu().with_patience(SHORT);
    let cpu = thread::spawn(move || vcpu.port_read(1, 1));
    server.next();
    server.page.set_state(0, State::Answered);
    assert_eq!(cpu.join().unwrap(), Err(VcpuError::Hangs));
}

#[test]
fn a_state_that_goes_back_crashes_the_guest() {
    let setup = setup();
    let mut server = setup.server(&[ports(1, 1)]);
    let vcpu = setup.vcpu();
    let cpu = thread::spawn(move || vcpu.port_read(1, 1));
    server.next();
    server.port.notify().unwrap();
    thread::sleep(SHORT); // it may not see the state in between, but then waits for the next event
    server.page.set_state(0, State::Ready);
    server.port.notify().unwrap();
    assert_eq!(cpu.join().unwrap(), Err(VcpuError::Crashed));
    assert!(
        setup
            .machine
            .domain_info(setup.domain)
            .unwrap()
            .unwrap()
            .gone
    );
}

#[test]
fn of_two_servers_the_later_has_precedence() {
    let setup = setup();
    let first = setup.server(&[ports(0, 0xffff)]);
    let second = setup.server(&[ports(0xc000, 0xc00f)]);
    assert!(second.id > first.id);
    let (first, second) = (first.answering(1), second.answering(2));
    assert_eq!(setup.vcpu().port_read(0xc00c, 4), Ok(2));
    assert_eq!(
        setup.vcpu().port_read(0xc00d, 4),
        Ok(1),
        "not all of it is the second's"
    );
    first.join().unwrap();
    second.join().unwrap();
}

#[test]
fn nobody_answers_a_disabled_server_s_ranges() {
    let setup = setup();
    let server = setup.server(&[memory(0xf000_0000, 0xf000_0fff)]);
    let Setup {
        machine, domain, ..
    } = &setup;
    machine
        .set_ioreq_server_state(*domain, server.id, false)
        .unwrap();
    assert_eq!(setup.vcpu().memory_read(0xf000_0000, 4), Ok(0xffff_ffff));
    machine
        .set_ioreq_server_state(*domain, server.id, true)
        .unwrap();
    let server = server.answering(3);
    assert_eq!(setup.vcpu().memory_read(0xf000_0000, 8), Ok(3));
    server.join().unwrap();
}

#[test]
fn a_string_instruction_goes_to_who_has_all_of_its_addresses() {
    let setup = setup();
    let server = setup
        .server(&[memory(0x1_0000_0000, 0x1_0000_00ff)])
        .answering(0);
    let base = 0x1_0000_0000;
    setup.vcpu().memory_fill(base + 0xf8, 4, 5, 3).unwrap();
    setup.vcpu().memory_fill(base + 0xf8, 4, 5, 2).unwrap();
    let (server, request) = server.join().unwrap();
    assert_eq!(
        (request.addr, request.count, request.data),
        (base + 0xf8, 2, 5)
    );
    let server = server.answering(0);
    let copy = |count| {
        let direction = Direction::Read;
        setup
            .vcpu()
            .string(Kind::Memory, direction, base + 8, 0x1000, (count, 4), true)
    };
    copy(4).unwrap();
    copy(3).unwrap();
    let (_, request) = server.join().unwrap();
    assert_eq!(
        (request.addr, request.count, request.data),
        (base + 8, 3, 0x1000)
    );
    assert_eq!(request.flags(), Flags::all());
}

#[test]
fn configuration_is_accessed_through_two_ports() {
    let setup = setup();
    let function = PciDevice {
        segment: 0,
        bus: 0,
        devfn: 0xf8,
    };
    let server = setup.server(&[IoRange::config(function)]).answering(0x1af4);
    assert_eq!(setup.vcpu().config_read(0xf0, 0, 4), Ok(0xffff_ffff));
    assert_eq!(setup.vcpu().config_read(0xf8, 0x3e, 2), Ok(0x1af4));
    let (server, request) = server.join().unwrap();
    assert_eq!(Kind::from_wire(request.kind), Some(Kind::Config));
    assert_eq!(request.addr, 0xf8 << 32 | 0x3e);
    let server = server.answering(0);
    setup.vcpu().config_write(0xf8, 4, 2, 6).unwrap();
    assert_eq!(server.join().unwrap().1.data, 6);
    setup.vcpu().port_write(0xcf8, 4, 0xf800).unwrap();
    assert_eq!(
        setup.vcpu().port_read(0xcfc, 4),
        Ok(0xffff_ffff),
        "not enabled"
    );
}

#[test]
fn broadcasts_go_to_all_and_wait_for_all() {
    let setup = setup();
    let (first, second) = (
        setup.server(&[]).answering(0),
        setup.server(&[]).answering(0),
    );
    setup.guest.balloon_out(&setup.vcpu(), 3).unwrap();
    for server in [first, second] {
        let (server, request) = server.join().unwrap();
        assert_eq!(Kind::from_wire(request.kind), Some(Kind::Invalidate));
        setup
            .machine
            .destroy_ioreq_server(setup.domain, server.id)
            .unwrap();
    }
    let server = setup.server(&[]).answering(0);
    setup.guest.set_clock(&setup.vcpu(), -3600).unwrap();
    let (_, request) = server.join().unwrap();
    assert_eq!(Kind::from_wire(request.kind), Some(Kind::TimeOffset));
    assert_eq!(request.data.cast_signed(), -3600);
}

/// One byte of a mapping.
fn byte(mapping: &dyn crate::device_model::ForeignMapping, offset: usize) -> &AtomicU8 {
    assert!(mapping.present()[offset / 4096]);
    // SAFETY: the page is there, and the byte lives as long as the mapping is borrowed.
    unsafe { AtomicU8::from_ptr(mapping.base().as_ptr().add(offset)) }
}

#[test]
fn foreign_pages_are_the_guest_s_and_missing_ones_are_said_to_be() {
    let setup = setup();
    setup.guest.write(4096 * 2 - 1, &[7, 8]).unwrap();
    setup.guest.balloon_out(&setup.vcpu(), 3).unwrap();
    let mapping = setup.machine.map_foreign(setup.domain, 1, 4).unwrap();
    assert_eq!(mapping.present(), [true, true, false, true]);
    assert_eq!(byte(&*mapping, 4095).load(Relaxed), 7);
    assert_eq!(byte(&*mapping, 4096).load(Relaxed), 8);
    byte(&*mapping, 4096).store(9, Relaxed);
    let mut read = [0];
    setup.guest.read(4096 * 2, &mut read).unwrap();
    assert_eq!(read, [9]);
    assert!(setup.guest.write(3 * 4096, &[1]).is_err());
    assert!(setup.guest.read(3 * 4096 - 1, &mut [0; 2]).is_err());
    let beyond = setup.machine.map_foreign(setup.domain, 15, 2).unwrap();
    assert_eq!(beyond.present(), [true, false]);
    let far = setup
        .machine
        .map_foreign(setup.domain, u64::MAX, 2)
        .unwrap();
    assert_eq!(far.present(), [false, false]);
}

#[test]
fn a_page_that_was_ballooned_out_and_in_is_another() {
    let setup = setup();
    setup.guest.write(4096, &[1]).unwrap();
    let old = setup.machine.map_foreign(setup.domain, 1, 1).unwrap();
    setup.guest.balloon_out(&setup.vcpu(), 1).unwrap();
    setup.guest.balloon_in(1).unwrap();
    byte(&*old, 0).store(2, Relaxed);
    let mut read = [9];
    setup.guest.read(4096, &mut read).unwrap();
    assert_eq!(read, [0]);
    let new = setup.machine.map_foreign(setup.domain, 1, 1).unwrap();
    byte(&*new, 0).store(3, Relaxed);
    setup.guest.read(4096, &mut read).unwrap();
    assert_eq!(read, [3]);
}

#[test]
fn a_page_that_came_later_can_be_had_when_it_is_tried_again() {
    let setup = setup();
    setup.guest.balloon_out(&setup.vcpu(), 2).unwrap();
    let mapping = setup.machine.map_foreign(setup.domain, 1, 2).unwrap();
    assert!(!mapping.retry(1).unwrap());
    setup.guest.balloon_in(2).unwrap();
    assert!(mapping.retry(1).unwrap());
    // SAFETY: the page is there now, and lives as long as the mapping.
    let first = unsafe { AtomicU8::from_ptr(mapping.base().as_ptr().add(4096)) };
    first.store(5, Relaxed);
    let mut read = [0];
    setup.guest.read(8192, &mut read).unwrap();
    assert_eq!(read, [5]);
    assert!(mapping.retry(0).is_err() && mapping.retry(2).is_err());
}

#[test]
fn a_dead_guest_stays_a_zombie_while_dom0_maps_something_of_it() {
    let setup = setup();
    let server = setup.server(&[ports(1, 1)]);
    let mapping = setup.machine.map_foreign(setup.domain, 0, 1).unwrap();
    assert_eq!(setup.machine.held_by_dom0(setup.domain), Some(2));
    let vcpu = setup.vcpu();
    let cpu = thread::spawn(move || vcpu.port_read(1, 1));
    while server.page.state(0) != Some(State::Ready) {
        thread::sleep(Duration::from_micros(100));
    }
    setup.machine.destroy_domain(setup.domain).unwrap();
    assert_eq!(cpu.join().unwrap(), Err(VcpuError::Gone));
    assert!(
        setup
            .machine
            .domain_info(setup.domain)
            .unwrap()
            .unwrap()
            .gone
    );
    drop(server);
    assert_eq!(setup.machine.held_by_dom0(setup.domain), Some(1));
    drop(mapping);
    assert_eq!(setup.machine.held_by_dom0(setup.domain), None);
    assert_eq!(setup.machine.domain_info(setup.domain).unwrap(), None);
}

#[test]
fn destroying_a_server_lets_its_cpus_go() {
    let setup = setup();
    let mut server = setup.server(&[ports(1, 1)]);
    let vcpu = setup.vcpu();
    let cpu = thread::spawn(move || vcpu.port_read(1, 1));
    server.next();
    setup
        .machine
        .destroy_ioreq_server(setup.domain, server.id)
        .unwrap();
    assert_eq!(cpu.join().unwrap(), Ok(0xff));
}

#[test]
fn what_xen_refuses_is_refused() {
    let setup = setup();
    let Setup {
        machine, domain, ..
    } = &setup;
    let errno = |error: Option<crate::XenError>| error.unwrap().errno();
    let pv = machine.create_domain("pv", DomainKind::Pv).unwrap();
    assert_eq!(
        errno(machine.create_ioreq_server(pv).err()),
        Some(libc::EINVAL)
    );
    assert_eq!(
        errno(machine.create_ioreq_server(DomId(99)).err()),
        Some(libc::ESRCH)
    );
    let id = machine.create_ioreq_server(*domain).unwrap();
    machine.map_io_range(*domain, id, ports(4, 7)).unwrap();
    let overlap = machine.map_io_range(*domain, id, ports(7, 9));
    assert_eq!(errno(overlap.err()), Some(libc::EEXIST));
    let more = machine.unmap_io_range(*domain, id, ports(4, 8));
    assert_eq!(errno(more.err()), Some(libc::ENOENT));
    machine.unmap_io_range(*domain, id, ports(5, 6)).unwrap();
    assert_eq!(machine.claimed(*domain, id), [ports(4, 4), ports(7, 7)]);
    // Xen gives it a page of the guest's then, which is no use to us.
    machine.set_ioreq_server_state(*domain, id, true).unwrap();
    assert_eq!(
        errno(machine.map_ioreq_page(*domain, id).err()),
        Some(libc::EPERM)
    );
    let more: Vec<_> = (0..8)
        .map_while(|_| machine.create_ioreq_server(*domain).ok())
        .collect();
    assert_eq!(more.len(), 7);
    assert_eq!(
        errno(machine.create_ioreq_server(*domain).err()),
        Some(libc::ENOSPC)
    );
    machine.destroy_ioreq_server(*domain, id).unwrap();
    assert_eq!(machine.create_ioreq_server(*domain).unwrap(), id);
    assert_eq!(
        errno(machine.inject_msi(*domain, 0xfee0_0000, 0).err()),
        Some(libc::EINVAL)
    );
    let pin = IntxPin { device: 32, pin: 0 };
    assert_eq!(
        errno(machine.set_pci_intx_level(*domain, pin, true).err()),
        Some(libc::EINVAL)
    );
    assert_eq!(
        errno(machine.set_isa_irq_level(*domain, 16, true).err()),
        Some(libc::EINVAL)
    );
}

#[test]
fn interrupts_reach_the_guest() {
    let setup = setup();
    let Setup {
        machine,
        domain,
        guest,
        ..
    } = &setup;
    machine.inject_msi(*domain, 0xfee0_1000, 0x41).unwrap();
    machine.inject_msi(*domain, 0xfee0_0000, 0x42).unwrap();
    let taken = guest.take_message(LONG, |message| message.data == 0x42);
    assert_eq!(taken.map(|message| message.address), Some(0xfee0_0000));
    assert_eq!(
        guest.take_message(SHORT, |message| message.data == 0x42),
        None
    );
    assert!(guest.take_message(LONG, |_| true).is_some());
    let pin = IntxPin { device: 31, pin: 0 };
    assert!(!guest.wait_intx(pin, true, SHORT));
    let (late, wait) = (machine.clone(), guest.clone());
    let waiting = thread::spawn(move || wait.wait_intx(pin, true, LONG));
    late.set_pci_intx_level(*domain, pin, true).unwrap();
    assert!(waiting.join().unwrap());
    machine.set_isa_irq_level(*domain, 5, true).unwrap();
    assert!(guest.wait_isa(5, true, LONG) && !guest.wait_isa(6, true, SHORT));
}

#[test]
fn there_are_ports_for_as_many_cpus_as_the_guest_has() {
    let setup = setup();
    let count = setup.machine.vcpu_count(setup.domain).unwrap();
    assert_eq!(count, 2);
    let server = setup.server(&[]);
    let ports: Vec<_> = (0..SLOTS).map(|slot| server.page.port(slot).0).collect();
    assert!(ports[0] != 0 && ports[1] != 0 && ports[0] != ports[1]);
    assert!(ports[2..].iter().all(|port| *port == 0));
    assert_eq!(setup.guest.vcpu(2).port_read(1, 1), Err(VcpuError::Gone));
}
