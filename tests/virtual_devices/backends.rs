//! Devices that end at something of the host's: pseudo-terminals, sockets, taps.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::{DeviceType, Transport};
use xenbus::Xen;
use xenbus::sim::DomainKind;
use xenbus::xenstore::Store;

use crate::common::{GuestHal, Machine};
use crate::house::until;
use crate::transports::{Modern, Reach};
use crate::{SHORT, guest, house};

/// What is said at one end is heard at the other.
fn talk<T: Transport>(console: &mut VirtIOConsole<GuestHal, T>, host: &mut (impl Read + Write)) {
    host.write_all(b"hello guest").unwrap();
    for expected in b"hello guest" {
        let mut heard = None;
        until("the guest hears it", || {
            heard = console.recv(true).unwrap();
            heard.is_some()
        });
        assert_eq!(heard, Some(*expected));
    }
    console.send_bytes(b"hello host").unwrap();
    let mut heard = [0; 10];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello host");
}

#[test]
fn xenstore_says_where_the_console_is() {
    let house = house("[[guest.web.virtio]]\ntype = \"console\"\n");
    let machine = guest(&house);
    let node = format!("/local/domain/{}/serial/31/tty", machine.guest().domain());
    let mut store = house.machine.connect_xenstore().unwrap();
    let path = store.read_string(&node).unwrap();
    let mut terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let modern = Modern::find(&machine, DeviceType::Console, Reach::Bars);
    let mut console = VirtIOConsole::new(modern).unwrap();
    talk(&mut console, &mut terminal);
}

#[test]
fn a_console_at_a_socket_is_there_again_after_the_daemon_was_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let house = house(&format!(
        "[[guest.web.virtio]]\ntype = \"console\"\nsocket = \"{}\"\n",
        path.display()
    ));
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::Console, Reach::Bars);
    let mut console = VirtIOConsole::new(modern).unwrap();
    talk(&mut console, &mut UnixStream::connect(&path).unwrap());
    house.kill();
    house.start();
    let mut stream = None;
    until("it can be reached", || {
        stream = UnixStream::connect(&path).ok();
        stream.is_some()
    });
    talk(&mut console, &mut stream.unwrap());
}

#[test]
fn a_path_that_something_else_is_at_is_no_console_s() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let house = house(&format!(
        "[[guest.web.virtio]]\ntype = \"console\"\nsocket = \"{}\"\n\
         [[guest.other.virtio]]\ntype = \"rng\"",
        file.path().display()
    ));
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    let web = Machine::new(&house.machine, domain);
    let domain = house
        .machine
        .create_domain("other", DomainKind::Hvm)
        .unwrap();
    let other = Machine::new(&house.machine, domain);
    until("the other guest has its device", || other.is_served());
    assert!(!web.is_served());
    assert!(file.path().exists());
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Runs a test in a network of its own with the bridge `br0`, in which the host is 10.0.0.1; not where that is not allowed.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let run = || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            eprintln!("skipped: making networks takes root");
            return;
        }
        ip("link add br0 type bridge");
        ip("addr add 10.0.0.1/24 dev br0");
        ip("link set br0 up");
        test();
    };
    thread::spawn(run).join().unwrap();
}

/// Asks who has 10.0.0.1 until the host answers.
fn ask<T: Transport>(card: &mut VirtIONetRaw<GuestHal, T, 16>) {
    let mac = card.mac_address();
    let mut request = vec![0xff; 6];
    request.extend(mac);
    request.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    request.extend(mac);
    request.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    let mut buffer = [0; 2048];
    // SAFETY: the buffer stays where it is until it is complete.
    let mut token = unsafe { card.receive_begin(&mut buffer) }.unwrap();
    until("the host answers", || {
        card.send(&request).unwrap();
        thread::sleep(SHORT);
        let mut answered = false;
        while card.poll_receive() == Some(token) {
            // SAFETY: it is the buffer of this token.
            let (header, len) = unsafe { card.receive_complete(token, &mut buffer) }.unwrap();
            let packet = &buffer[header..header + len];
            answered |= packet[..6] == mac && packet[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
            // SAFETY: as above.
            token = unsafe { card.receive_begin(&mut buffer) }.unwrap();
        }
        answered
    });
}

#[test]
fn a_card_reaches_the_host_through_its_bridge() {
    in_own_network(|| {
        let house = house("[[guest.web.virtio]]\ntype = \"net\"\nbridge = \"br0\"\n");
        let machine = guest(&house);
        let modern = Modern::find(&machine, DeviceType::Network, Reach::Bars);
        let mut card = VirtIONetRaw::<GuestHal, _, 16>::new(modern).unwrap();
        assert_eq!(card.mac_address()[..3], [0x00, 0x16, 0x3e]);
        ask(&mut card);
    });
}

#[test]
fn a_guest_whose_tap_or_bridge_is_missing_gets_no_devices() {
    in_own_network(|| {
        let house = house(
            "[[guest.tap.virtio]]\ntype = \"net\"\ntap = \"none0\"\n\
             [[guest.bridge.virtio]]\ntype = \"net\"\nbridge = \"none0\"\n\
             [[guest.other.virtio]]\ntype = \"rng\"",
        );
        let guests = ["tap", "bridge", "other"].map(|name| {
            let domain = house.machine.create_domain(name, DomainKind::Hvm).unwrap();
            Machine::new(&house.machine, domain)
        });
        let [tap, bridge, other] = &guests;
        until("the other guest has its device", || other.is_served());
        assert!(!tap.is_served() && !bridge.is_served());
        assert!(!Path::new("/proc/sys/net/ipv4/conf/none0").exists());
    });
}
