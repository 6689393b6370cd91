//! Guests over the socket. That this works from another process too is tested with the frontend.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};

use nix::unistd::ftruncate;

use super::{SocketGuest, SocketToolstack};
use crate::platform::{MsiRequest, Xen};
use crate::sim::evtchn::{new_eventfd, take};
use crate::sim::test_bus::{TestBus, address, bar_address};
use crate::sim::{BarSpace, DmaMemory, DomainKind, GuestPlatform, Machine, MachineOptions, lock};
use crate::types::{DomId, GrantRef, Gsi, Pirq, Port};
use crate::xenstore::Store;

mod windows;

struct Setup {
    machine: Machine,
    socket: PathBuf,
    guest: DomId,
    _run_dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(run_dir.path()).unwrap();
    let guest = machine.create_domain("guest", DomainKind::Pv).unwrap();
    let socket = run_dir.path().join("machine.sock");
    Setup {
        machine,
        socket,
        guest,
        _run_dir: run_dir,
    }
}

const LONG: Duration = Duration::from_secs(5);

#[test]
fn a_guest_becomes_a_domain_that_exists() {
    let setup = setup();
    let refused = SocketGuest::connect(&setup.socket, DomId(99)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ESRCH));
    let guest = SocketGuest::connect(&setup.socket, setup.guest).unwrap();
    let mut store = guest.connect_xenstore().unwrap();
    assert_eq!(store.read("name").unwrap(), b"guest");
    assert!(store.write("/local/domain/0/x", "").is_err());
    guest.shut_down().unwrap();
    assert!(
        setup
            .machine
            .domain_info(setup.guest)
            .unwrap()
            .unwrap()
            .gone
    );
}

#[test]
fn pages_and_ports_are_shared_with_the_backend() {
    let setup = setup();
    let guest = SocketGuest::connect(&setup.socket, setup.guest).unwrap();
    let page = guest.grant_page(DomId::DOM0).unwrap();
    let mapped = setup.machine.map_page(setup.guest, page.reference).unwrap();
    // SAFETY: both are live mappings of 4096 bytes, and no other thread uses them.
    unsafe {
        page.page.base().write_volatile(7);
        assert_eq!(mapped.base().read_volatile(), 7);
    }
    assert_eq!(
        guest.end_grant(page.reference).unwrap_err().errno(),
        Some(libc::EBUSY)
    );
    drop(mapped);
    guest.end_grant(page.reference).unwrap();
    assert_eq!(
        guest.end_grant(GrantRef(1)).unwrap_err().errno(),
        Some(libc::EINVAL)
    );

    let port = guest.alloc_unbound(DomId::DOM0).unwrap();
    let mut bound = setup
        .machine
        .bind_interdomain(setup.guest, port.number())
        .unwrap();
    assert!(bound.take().unwrap());
    bound.unmask().unwrap();
    port.notify().unwrap();
    assert!(bound.take().unwrap());
    bound.notify().unwrap();
    assert!(port.wait(LONG).unwrap());
    guest.close_port(port.number()).unwrap();
    assert_eq!(
        guest.close_port(Port(77)).unwrap_err().errno(),
        Some(libc::EINVAL)
    );
}

#[test]
fn interrupts_reach_it() {
    let setup = setup();
    let bus = TestBus::new();
    bus.add(address(0));
    setup.machine.set_hardware(bus.clone());
    setup
        .machine
        .assign_device(setup.guest, address(0))
        .unwrap();
    let pirq = setup
        .machine
        .map_msi(setup.guest, address(0), MsiRequest::Msi)
        .unwrap();
    let guest = SocketGuest::connect(&setup.socket, setup.guest).unwrap();
    assert_eq!(
        guest.bind_pirq(Pirq(25)).unwrap_err().errno(),
        Some(libc::EINVAL)
    );
    let port = guest.bind_pirq(pirq).unwrap();
    let (address_, data) = bus.with(address(0), |device| device.messages[&None]);
    assert!(setup.machine.deliver_msi(address_, data));
    assert!(port.wait(LONG).unwrap());
}

/// A connection that says what it likes.
fn connected(path: &Path) -> OwnedFd {
    let client = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::empty(),
        None,
    )
    .unwrap();
    connect(client.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    client
}

/// Sends a packet, and gives the reply's errno.
fn raw(socket: &OwnedFd, words: &[u32]) -> u32 {
    let bytes: Vec<_> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
    // The head: what may follow says whoever knows the request.
    let mut reply = [0; 16];
    let count = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()).unwrap();
    let errno = u32::from_ne_bytes(reply[..4].try_into().unwrap());
    assert!(count == 8 || errno == 0);
    errno
}

#[test]
fn what_is_no_request_is_refused_and_the_connection_stays() {
    let setup = setup();
    let client = connected(&setup.socket);
    let errno = |number: i32| u32::try_from(number).unwrap();
    assert_eq!(raw(&client, &[3, 0]), errno(libc::ENOTCONN));
    assert_eq!(raw(&client, &[99, 0]), errno(libc::ENOSYS));
    assert_eq!(raw(&client, &[1]), errno(libc::EINVAL));
    assert_eq!(raw(&client, &[1, 1, 1, 1]), errno(libc::EINVAL));
    assert_eq!(raw(&client, &[1, 0x1_0001]), errno(libc::EINVAL));
    assert_eq!(raw(&client, &[1, 1]), 0);
    assert_eq!(raw(&client, &[1, 1]), errno(libc::EISCONN));
    assert_eq!(raw(&client, &[5, 0]), 0);
}

#[test]
fn a_destroyed_domain_can_do_nothing_any_more_and_a_machine_that_ended_says_so() {
    let setup = setup();
    let guest = SocketGuest::connect(&setup.socket, setup.guest).unwrap();
    setup.machine.destroy_domain(setup.guest).unwrap();
    assert_eq!(
        guest.grant_page(DomId::DOM0).unwrap_err().errno(),
        Some(libc::ESRCH)
    );
    assert!(guest.connect_xenstore().is_err());
    drop(setup);
    assert!(guest.grant_page(DomId::DOM0).is_err());
}

/// As `setup`, with two devices, of which the guest has the first.
fn setup_with_devices(options: MachineOptions) -> (Setup, Arc<TestBus>, SocketGuest) {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::with_options(run_dir.path(), options).unwrap();
    let guest = machine.create_domain("guest", DomainKind::Pv).unwrap();
    let bus = TestBus::new();
    for number in 0..2 {
        bus.add(address(number));
    }
    machine.set_hardware(bus.clone());
    machine.assign_device(guest, address(0)).unwrap();
    let socket = run_dir.path().join("machine.sock");
    let connected = SocketGuest::connect(&socket, guest).unwrap();
    let setup = Setup {
        machine,
        socket,
        guest,
        _run_dir: run_dir,
    };
    (setup, bus, connected)
}

fn bar(number: u8) -> u64 {
    bar_address(address(number)).into()
}

#[test]
fn memory_that_a_guest_gives_is_what_its_devices_reach() {
    let (setup, bus, guest) = setup_with_devices(MachineOptions::default());
    let file = memfd_create(c"memory", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    ftruncate(&file, 0x4000).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let memory = |address| DmaMemory {
        address,
        size: 0x2000,
        offset: 0x1000,
        file: file.try_clone().unwrap(),
    };
    guest.give_memory(memory(0x10_0000)).unwrap();
    guest.give_memory(memory(0x20_0000)).unwrap();
    assert_eq!(
        guest.give_memory(memory(0x20_1000)).unwrap_err().errno(),
        Some(libc::EEXIST)
    );
    guest.take_memory(0x10_0000).unwrap();
    assert_eq!(
        guest.take_memory(0x10_0000).unwrap_err().errno(),
        Some(libc::EINVAL)
    );
    let reach = bus.reach(setup.guest).unwrap();
    assert_eq!(reach.memory, [(0x20_0000, 0x2000)].into());
}

#[test]
fn the_end_of_a_lines_interrupt_reaches_the_guests_devices() {
    let (setup, bus, guest) = setup_with_devices(MachineOptions::default());
    let refused = guest.end_of_interrupt(Pirq(17)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EINVAL));
    setup.machine.grant_irq(setup.guest, Gsi(17)).unwrap();
    guest.end_of_interrupt(Pirq(17)).unwrap();
    assert_eq!(
        bus.with(address(0), |device| device.served.clone()),
        [Gsi(17)]
    );
    assert!(bus.with(address(1), |device| device.served.is_empty()));
}

#[test]
fn a_guest_tells_the_ends_of_a_lines_interrupts_by_an_eventfd_where_the_hardware_offers_that() {
    let (setup, bus, guest) = setup_with_devices(MachineOptions::default());
    let refused = || guest.end_event(Pirq(17)).unwrap_err().errno();
    assert_eq!(refused(), Some(libc::EINVAL));
    setup.machine.grant_irq(setup.guest, Gsi(17)).unwrap();
    assert_eq!(refused(), Some(libc::EOPNOTSUPP));
    let offered: Arc<OwnedFd> = Arc::new(new_eventfd().unwrap().into());
    bus.with(address(0), |device| {
        device.end_event = Some(Arc::clone(&offered));
    });
    let event = guest.end_event(Pirq(17)).unwrap();
    assert!(!take(&offered).unwrap());
    event.end_of_interrupt().unwrap();
    assert!(take(&offered).unwrap());
}

#[test]
fn a_line_that_a_former_driver_left_unserved_interrupts_the_next_one() {
    let (setup, bus, guest) = setup_with_devices(MachineOptions::default());
    setup.machine.grant_irq(setup.guest, Gsi(17)).unwrap();
    let served = || bus.with(address(0), |device| device.served.len());
    let port = guest.bind_pirq(Pirq(17)).unwrap();
    let before = served();
    guest.close_port(port.number()).unwrap();
    guest.bind_pirq(Pirq(17)).unwrap();
    assert_eq!(served(), before + 1);
}

#[test]
fn dom0s_toolstack_can_be_another_process() {
    let (setup, _bus, guest) = setup_with_devices(MachineOptions::default());
    let toolstack = SocketToolstack::connect(&setup.socket).unwrap();
    for name in ["", "a/b", "a b", &"x".repeat(65)] {
        let refused = toolstack.create_domain(name).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EINVAL), "{name}");
    }
    let domain = toolstack.create_domain("second").unwrap();
    toolstack.pci_attach(domain, address(1)).unwrap();
    toolstack.unpause_domain(domain).unwrap();
    assert_eq!(setup.machine.device_owner(address(1)), Some(domain));
    let refused = toolstack.pci_attach(setup.guest, address(1)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EBUSY));
    let second = SocketGuest::connect(&setup.socket, domain).unwrap();
    assert_eq!(
        second.connect_xenstore().unwrap().read("name").unwrap(),
        b"second"
    );
    assert!(second.open_window(BarSpace::Memory, bar(1)).is_ok());
    let refused = toolstack.pci_detach(setup.guest, address(1)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENODEV));
    setup.machine.domain_shut_down(domain).unwrap();
    drop(guest);
}

#[test]
fn what_is_dom0s_is_refused_to_guests_and_packets_have_their_sizes() {
    let setup = setup();
    let errno = |number: i32| u32::try_from(number).unwrap();
    let guest = connected(&setup.socket);
    assert_eq!(raw(&guest, &[1, setup.guest.0.into()]), 0);
    for request in 15..=19 {
        assert_eq!(raw(&guest, &[request, 1, 0, 0]), errno(libc::EPERM));
    }
    // Too short and too long; memory without a descriptor; a window that is not open, and one of no address space.
    assert_eq!(raw(&guest, &[11, 0]), errno(libc::EINVAL));
    assert_eq!(raw(&guest, &[11, 0, 0]), errno(libc::EINVAL));
    assert_eq!(raw(&guest, &[11, 0, 0, 0, 0, 0]), errno(libc::EINVAL));
    assert_eq!(
        raw(&guest, &[10, 0, 0, 0, 0x1000, 0, 0, 0]),
        errno(libc::EINVAL)
    );
    assert_eq!(raw(&guest, &[13, 0, 0, 0, 4, 0]), errno(libc::EINVAL));
    assert_eq!(raw(&guest, &[12, 2, 0xc000, 0]), errno(libc::EINVAL));
    assert_eq!(
        raw(&guest, &[13, u32::MAX, 0, 0, 4, 0]),
        errno(libc::EINVAL)
    );
    assert_eq!(raw(&guest, &[3, 0, 0, 0]), errno(libc::EINVAL));
    assert_eq!(raw(&guest, &[0; 200]), errno(libc::EINVAL));
    let dom0 = connected(&setup.socket);
    assert_eq!(raw(&dom0, &[1, 0]), 0);
    assert_eq!(raw(&dom0, &[16, 1, 0, 1]), errno(libc::EINVAL));
    assert_eq!(raw(&dom0, &[19, 77]), errno(libc::ESRCH));
    assert_eq!(raw(&dom0, &[3, 0]), errno(libc::ESRCH));
}

const BUSY: Duration = Duration::from_secs(1);

#[test]
fn a_guest_that_keeps_the_machine_busy_keeps_no_other_waiting() {
    let (setup, _bus, guest) = setup_with_devices(MachineOptions {
        toolstack_timeout: BUSY,
        ..MachineOptions::default()
    });
    let toolstack = SocketToolstack::connect(&setup.socket).unwrap();
    let domain = toolstack.create_domain("second").unwrap();
    toolstack.pci_attach(domain, address(1)).unwrap();
    toolstack.unpause_domain(domain).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Waits for a backend that nobody runs.
            toolstack.pci_detach(domain, address(1)).unwrap_err();
            done.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(BUSY / 5);
        let window = guest.open_window(BarSpace::Memory, bar(0)).unwrap();
        window.access.read(0, 4).unwrap();
        assert!(!done.load(Ordering::SeqCst));
    });
}
