//! Guests over the socket. That this works from another process too is tested with the frontend.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};

use super::SocketGuest;
use crate::platform::{MsiRequest, Xen};
use crate::sim::test_bus::{TestBus, address};
use crate::sim::{DomainKind, GuestPlatform, Machine};
use crate::types::{DomId, GrantRef, Pirq, Port};
use crate::xenstore::Store;

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

/// Sends a packet, and gives the reply's errno.
fn raw(socket: &OwnedFd, words: &[u32]) -> u32 {
    let bytes: Vec<_> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
    let mut reply = [0; 16];
    assert_eq!(
        recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()).unwrap(),
        8
    );
    u32::from_ne_bytes(reply[..4].try_into().unwrap())
}

#[test]
fn what_is_no_request_is_refused_and_the_connection_stays() {
    let setup = setup();
    let client = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::empty(),
        None,
    )
    .unwrap();
    connect(client.as_raw_fd(), &UnixAddr::new(&setup.socket).unwrap()).unwrap();
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
