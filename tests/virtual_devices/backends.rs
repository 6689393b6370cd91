//! Devices that end at something of the host's: pseudo-terminals, sockets, taps.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use pcibackd::fdstore;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::{DeviceType, Transport};
use xenbus::Xen;
use xenbus::sim::DomainKind;
use xenbus::xenstore::Store;

use crate::common::{GuestHal, Machine};
use crate::house::{House, until};
use crate::transports::{Modern, Reach};
use crate::{SHORT, guest, house};

/// What is said at one end is heard at the other.
pub fn talk<T: Transport>(
    console: &mut VirtIOConsole<GuestHal, T>,
    host: &mut (impl Read + Write),
) {
    host.write_all(b"hello guest").unwrap();
    hear(console, b"hello guest");
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

/// What a daemon of this house has open outlives it, as it does with the process that does this for real (`tests/fdstore.rs`).
fn keep_open(house: &House) {
    let listener = fdstore::listen(&house.run_dir().join(fdstore::SOCKET)).unwrap();
    thread::spawn(move || fdstore::serve(listener).unwrap());
}

/// The guest goes away without a word of its driver.
pub fn die(house: &House, machine: &Machine, driver: impl Sized) {
    std::mem::forget(driver);
    machine.let_go();
    let domain = machine.guest().domain();
    house.machine.destroy_domain(domain).unwrap();
}

fn hear<T: Transport>(console: &mut VirtIOConsole<GuestHal, T>, expected: &[u8]) {
    for expected in expected {
        let mut heard = None;
        until("the guest hears it", || {
            heard = console.recv(true).unwrap();
            heard.is_some()
        });
        assert_eq!(heard, Some(*expected));
    }
}

#[test]
fn a_terminal_stays_open_while_the_daemon_is_killed_and_no_byte_is_lost() {
    let house = house("[[guest.web.virtio]]\ntype = \"console\"\n");
    keep_open(&house);
    let machine = guest(&house);
    let domain = machine.guest().domain();
    let node = format!("/local/domain/{domain}/serial/31/tty");
    let path = || house.store().read_string(&node).unwrap();
    let first = path();
    let mut terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&first)
        .unwrap();
    let modern = Modern::find(&machine, DeviceType::Console, Reach::Bars);
    let mut console = VirtIOConsole::new(modern).unwrap();
    talk(&mut console, &mut terminal);
    for round in 0..5 {
        house.kill();
        let word = format!("while nobody is there {round}");
        terminal.write_all(word.as_bytes()).unwrap();
        house.start();
        hear(&mut console, word.as_bytes());
        talk(&mut console, &mut terminal);
        assert_eq!(path(), first);
    }
    // Killed once more, and while nobody is there the guest goes away.
    house.kill();
    die(&house, &machine, console);
    house.start();
    until("the terminal is hung up", || {
        terminal.write_all(b"x").is_err()
    });
}

#[test]
fn who_is_connected_to_a_console_stays_so_while_the_daemon_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let house = house(&format!(
        "[[guest.web.virtio]]\ntype = \"console\"\nsocket = \"{}\"\n",
        path.display()
    ));
    keep_open(&house);
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::Console, Reach::Bars);
    let mut console = VirtIOConsole::new(modern).unwrap();
    let mut first = UnixStream::connect(&path).unwrap();
    talk(&mut console, &mut first);
    house.kill();
    first.write_all(b"while nobody is there").unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    house.start();
    hear(&mut console, b"while nobody is there");
    talk(&mut console, &mut first);
    // One at a time, and who goes is gone.
    first.shutdown(Shutdown::Write).unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    talk(&mut console, &mut second);
    house.kill();
    house.start();
    talk(&mut console, &mut second);
    die(&house, &machine, console);
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
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

pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Runs a test in a network of its own with the bridge `br0`, in which the host is 10.0.0.1; not where that is not allowed.
pub fn in_own_network(test: impl FnOnce() + Send + 'static) {
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

/// A card with a buffer for what arrives.
pub struct Card<T: Transport> {
    card: VirtIONetRaw<GuestHal, T, 16>,
    buffer: Box<[u8; 2048]>,
    token: u16,
}

impl<T: Transport> Card<T> {
    pub fn new(transport: T) -> Self {
        let mut card = VirtIONetRaw::new(transport).unwrap();
        let mut buffer = Box::new([0; 2048]);
        // SAFETY: the buffer stays where it is until it is complete.
        let token = unsafe { card.receive_begin(&mut *buffer) }.unwrap();
        Self {
            card,
            buffer,
            token,
        }
    }

    /// Asks who has 10.0.0.1 until the host answers.
    pub fn ask(&mut self) {
        let mac = self.card.mac_address();
        let mut request = vec![0xff; 6];
        request.extend(mac);
        request.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
        request.extend(mac);
        request.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
        until("the host answers", || {
            self.card.send(&request).unwrap();
            thread::sleep(SHORT);
            let mut answered = false;
            while self.card.poll_receive() == Some(self.token) {
                let buffer = &mut *self.buffer;
                // SAFETY: it is the buffer of this token.
                let received = unsafe { self.card.receive_complete(self.token, buffer) };
                let (header, len) = received.unwrap();
                let packet = &buffer[header..header + len];
                answered |= packet[..6] == mac && packet[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
                // SAFETY: as above.
                self.token = unsafe { self.card.receive_begin(buffer) }.unwrap();
            }
            answered
        });
    }
}

#[test]
fn a_card_reaches_the_host_through_its_bridge() {
    in_own_network(|| {
        let house = house("[[guest.web.virtio]]\ntype = \"net\"\nbridge = \"br0\"\n");
        let machine = guest(&house);
        let modern = Modern::find(&machine, DeviceType::Network, Reach::Bars);
        let mut card = Card::new(modern);
        assert_eq!(card.card.mac_address()[..3], [0x00, 0x16, 0x3e]);
        card.ask();
    });
}

#[test]
fn a_card_s_link_stays_up_while_the_daemon_is_killed() {
    in_own_network(|| {
        ip("tuntap add web0 mode tap");
        ip("addr add 10.1.0.1/24 dev web0");
        ip("link set web0 up");
        let house = house(
            "[[guest.web.virtio]]\ntype = \"net\"\nbridge = \"br0\"\nqueues = 2\n\
             [[guest.web.virtio]]\ntype = \"net\"\ntap = \"web0\"\n",
        );
        keep_open(&house);
        let machine = guest(&house);
        let modern = Modern::find(&machine, DeviceType::Network, Reach::Bars);
        let mut card = Card::new(modern);
        card.ask();
        let own = format!("vif{}.s1f", machine.guest().domain());
        let state = || {
            [own.as_str(), "web0"].map(|name| {
                let facts = ["ifindex", "carrier", "carrier_changes", "operstate"];
                facts.map(|fact| of_interface(name, fact))
            })
        };
        let before = state();
        assert_eq!(before[1][1], "1");
        for _ in 0..3 {
            house.kill();
            assert_eq!(state(), before);
            house.start();
            card.ask();
            assert_eq!(state(), before);
        }
        // One that somebody has taken away meanwhile is made anew.
        house.kill();
        ip(&format!("link del {own}"));
        house.start();
        card.ask();
        assert_ne!(state()[0], before[0]);
        die(&house, &machine, card);
        until("the tap is gone", || {
            of_interface(&own, "ifindex").is_empty()
        });
        until("the other one is let go", || {
            of_interface("web0", "carrier") == "0"
        });
    });
}

/// What the kernel says of an interface of this thread's network, which has a /sys of its own; nothing if there is none.
fn of_interface(name: &str, fact: &str) -> String {
    let script = format!("mount -t sysfs none /sys && cat /sys/class/net/{name}/{fact}");
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output();
    String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
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
