//! The console device, from its queues to the host's ends of its ports.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use proptest::prelude::*;
use rings::{BUFFERS, Driver, Guest, Live, PATIENCE, readable, writable};
use tempfile::TempDir;
use virtio::Features;
use virtio::console::{Console, Endpoint, Port, feature};
use virtio::device::Device;
use virtio::memory::Words;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// A console with its driver's six queues: of port 0, of control, of port 1.
struct Machine {
    guest: Guest,
    drivers: Vec<Driver>,
    device: Live<Console>,
    directory: TempDir,
}

impl Machine {
    /// Port 0 is as given, port 1 a socket.
    fn new(endpoint: Endpoint, features: Features) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let second = Endpoint::listen(&directory.path().join("agent")).unwrap();
        let ports = vec![
            Port {
                name: String::new(),
                endpoint,
            },
            Port {
                name: "org.agent".into(),
                endpoint: second,
            },
        ];
        let guest = Guest::default();
        let drivers: Vec<Driver> = (0..6)
            .map(|queue| Driver::new(queue, 64, features | Features::EVENT_IDX))
            .collect();
        let console = Console::new(ports).unwrap();
        assert_eq!(console.queue_sizes().len(), 6);
        let device = Live::new(console, &guest, &drivers.iter().collect::<Vec<_>>());
        Self {
            guest,
            drivers,
            device,
            directory,
        }
    }

    fn agent(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("agent")).unwrap()
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let at = BUFFERS + 0x2_0000 * queue as u64;
        self.guest.write(at, bytes);
        let parts = [readable(at, bytes.len() as u32)];
        self.drivers[queue]
            .offer(&self.guest, &parts, None)
            .unwrap();
        self.device.notify(queue as u16);
        let (_, written) = self.device.used(&mut self.drivers[queue], &self.guest);
        assert_eq!(written, 0);
    }

    fn receive(&mut self, queue: usize) -> Vec<u8> {
        let at = BUFFERS + 0x2_0000 * queue as u64;
        let parts = [writable(at, 100), writable(at + 0x1000, 50)];
        self.drivers[queue]
            .offer(&self.guest, &parts, None)
            .unwrap();
        self.device.notify(queue as u16);
        let (_, len) = self.device.used(&mut self.drivers[queue], &self.guest);
        let mut bytes = self.guest.read(at, 100);
        bytes.extend(self.guest.read(at + 0x1000, 50));
        bytes.truncate(len as usize);
        bytes
    }

    fn tell(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.send(CONTROL_TRANSMIT, &message);
    }

    /// Port, event, value, and the text after them.
    fn told(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let bytes = self.receive(CONTROL_RECEIVE);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (word(0).into(), word(4), word(6), bytes[8..].to_vec())
    }
}

fn nowhere() -> Endpoint {
    Endpoint::pty().unwrap().0
}

#[test]
fn a_pseudo_terminal_is_joined_to_the_guest_in_both_directions_unchanged() {
    for format in [Features::empty(), Features::RING_PACKED] {
        let (endpoint, path) = Endpoint::pty().unwrap();
        let mut machine = Machine::new(endpoint, format);
        let mut terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        // Until it has been seen that somebody is there, what the guest sends is lost.
        std::thread::sleep(Duration::from_millis(300));
        machine.send(TRANSMIT, b"login: \r\n\x03\x7f");
        let mut bytes = [0; 11];
        terminal.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"login: \r\n\x03\x7f");
        terminal.write_all(b"root\n\x04").unwrap();
        let mut received = Vec::new();
        while received.len() < 6 {
            received.extend(machine.receive(RECEIVE));
        }
        assert_eq!(received, b"root\n\x04");
    }
}

#[test]
fn what_is_sent_to_nobody_is_lost_at_once() {
    let mut machine = Machine::new(nowhere(), Features::empty());
    for _ in 0..100 {
        machine.send(TRANSMIT, &[b'x'; 0x1_0000]);
    }
    let whole = [readable(BUFFERS, 0x20_0000); 8];
    machine.drivers[TRANSMIT].offer(&machine.guest, &whole, None);
    machine.device.notify(TRANSMIT as u16);
    machine
        .device
        .used(&mut machine.drivers[TRANSMIT], &machine.guest);
}

#[test]
fn ports_are_made_known_with_their_names_and_tell_when_somebody_comes_and_goes() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    machine.tell(0, 0, 1);
    assert_eq!(machine.told(), (0, 1, 1, vec![]));
    assert_eq!(machine.told(), (1, 1, 1, vec![]));
    machine.tell(0, 3, 1);
    assert_eq!(machine.told(), (0, 4, 1, vec![]), "port 0 is a console");
    machine.tell(1, 3, 1);
    assert_eq!(machine.told(), (1, 7, 1, b"org.agent".to_vec()));
    let agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 1, vec![]), "open");
    drop(agent);
    assert_eq!(machine.told(), (1, 6, 0, vec![]), "closed");
    let mut agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 1, vec![]), "open again");
    machine.send(5, b"hello");
    let mut bytes = [0; 5];
    agent.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    machine.tell(1, 6, 1);
    agent.write_all(b"and back").unwrap();
    assert_eq!(machine.receive(4), b"and back");
}

#[test]
fn bytes_wait_at_the_hosts_end_until_somebody_in_the_guest_opens_the_port() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    let words = kept(&mut machine);
    machine.tell(1, 3, 1);
    machine.told();
    let mut agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 1, vec![]));
    machine.tell(1, 6, 1);
    agent.write_all(b"first").unwrap();
    assert_eq!(machine.receive(4), b"first");
    machine.tell(1, 6, 0);
    agent.write_all(b"second").unwrap();
    let buffer = [writable(BUFFERS, 100)];
    machine.drivers[4].offer(&machine.guest, &buffer, None);
    machine.device.notify(4);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.drivers[4].used(&machine.guest), None);
    machine.tell(1, 6, 1);
    let (_, len) = machine.device.used(&mut machine.drivers[4], &machine.guest);
    assert_eq!(machine.guest.read(BUFFERS, len as usize), b"second");
    // The next process knows that it is open.
    restarted(&mut machine, &words, None);
    let mut agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 0, vec![]));
    assert_eq!(machine.told(), (1, 6, 1, vec![]));
    agent.write_all(b"third").unwrap();
    assert_eq!(machine.receive(4), b"third");
}

/// Another process goes on with the driver's queues.
fn restarted(machine: &mut Machine, words: &Words, console: Option<Endpoint>) {
    let path = machine.directory.path().join("agent");
    std::fs::remove_file(&path).unwrap();
    let port = |name: &str, endpoint| Port {
        name: name.into(),
        endpoint,
    };
    let ports = vec![
        port("", console.unwrap_or_else(nowhere)),
        port("org.agent", Endpoint::listen(&path).unwrap()),
    ];
    // The first process is gone before the second looks at what it has kept.
    machine.device.device = Console::new(Vec::new()).unwrap();
    let mut console = Console::new(ports).unwrap();
    console.keep(words.clone());
    let drivers: Vec<&Driver> = machine.drivers.iter().collect();
    machine.device = Live::new(console, &machine.guest, &drivers);
}

fn kept(machine: &mut Machine) -> Words {
    let words = Words::volatile(machine.device.device.kept_words()).unwrap();
    machine.device.device.keep(words.clone());
    words
}

#[test]
fn after_a_restart_the_driver_is_told_who_is_there_and_bytes_go_on() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    let words = kept(&mut machine);
    machine.tell(1, 3, 1);
    machine.told();
    let _agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 1, vec![]));
    // The connection goes with the process that had it.
    restarted(&mut machine, &words, None);
    let mut agent = machine.agent();
    assert_eq!(machine.told(), (1, 6, 0, vec![]));
    assert_eq!(machine.told(), (1, 6, 1, vec![]));
    machine.send(5, b"hello");
    let mut bytes = [0; 5];
    agent.read_exact(&mut bytes).unwrap();
}

#[test]
fn what_the_driver_has_not_been_told_before_a_restart_it_is_told_after_it() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    let words = kept(&mut machine);
    machine.tell(0, 0, 1);
    restarted(&mut machine, &words, None);
    assert_eq!(machine.told(), (0, 1, 1, vec![]));
    restarted(&mut machine, &words, None);
    assert_eq!(machine.told(), (1, 1, 1, vec![]));
    machine.tell(1, 3, 1);
    restarted(&mut machine, &words, None);
    assert_eq!(machine.told(), (1, 7, 1, b"org.agent".to_vec()));
    machine.device.reset();
    assert!((0..words.count()).all(|word| words.get(word) == 0));
}

#[test]
fn bytes_that_are_on_their_way_at_a_restart_arrive_once() {
    let pty = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    grantpt(&pty).unwrap();
    unlockpt(&pty).unwrap();
    let mut attributes = tcgetattr(&pty).unwrap();
    cfmakeraw(&mut attributes);
    tcsetattr(&pty, SetArg::TCSANOW, &attributes).unwrap();
    let path = ptsname_r(&pty).unwrap();
    let mut terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let pty: OwnedFd = pty.into();
    let again = || Endpoint::of_pty(pty.try_clone().unwrap()).unwrap().0;

    let mut machine = Machine::new(again(), Features::empty());
    let words = kept(&mut machine);
    let data: Vec<u8> = (0..0x1_0000u32).map(|byte| (byte % 251) as u8).collect();
    machine.guest.write(BUFFERS, &data);
    let parts = [readable(BUFFERS, data.len() as u32)];
    std::thread::sleep(Duration::from_millis(300));
    machine.drivers[TRANSMIT]
        .offer(&machine.guest, &parts, None)
        .unwrap();
    machine.device.notify(TRANSMIT as u16);
    let mut received = vec![0; 10_000];
    terminal.read_exact(&mut received).unwrap();
    restarted(&mut machine, &words, Some(again()));
    let mut rest = vec![0; data.len() - received.len()];
    terminal.read_exact(&mut rest).unwrap();
    received.extend(rest);
    assert!(received == data);
    machine
        .device
        .used(&mut machine.drivers[TRANSMIT], &machine.guest);
}

#[test]
fn a_reader_that_is_slow_gets_every_byte_and_the_guest_waits() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    machine.tell(1, 3, 1);
    machine.told();
    let mut agent = machine.agent();
    assert_eq!(machine.told().1, 6);
    let data: Vec<u8> = (0..0x10_0000u32).map(|byte| (byte % 253) as u8).collect();
    machine.guest.write(BUFFERS, &data);
    let parts = [readable(BUFFERS, data.len() as u32)];
    machine.drivers[5]
        .offer(&machine.guest, &parts, None)
        .unwrap();
    machine.device.notify(5);
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        machine.drivers[5].used(&machine.guest).is_none(),
        "not all went"
    );
    let mut received = vec![0; data.len()];
    agent.read_exact(&mut received).unwrap();
    assert!(received == data);
    machine.device.used(&mut machine.drivers[5], &machine.guest);
}

#[test]
fn a_reset_in_the_middle_of_it_all_lets_go_of_the_guest_at_once() {
    let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
    machine.tell(1, 3, 1);
    machine.told();
    let mut agent = machine.agent();
    assert_eq!(machine.told().1, 6);
    let parts = [readable(BUFFERS, 0x20_0000)];
    machine.drivers[5]
        .offer(&machine.guest, &parts, None)
        .unwrap();
    machine.device.notify(5);
    let mut some = [1; 10];
    agent.read_exact(&mut some).unwrap();
    machine.device.reset();
    machine.guest.ram.invalidate();
    let until = Instant::now() + PATIENCE;
    while machine.guest.memory.mappings() > 0 {
        assert!(Instant::now() < until, "memory is still mapped");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_driver_that_breaks_its_ring_needs_a_reset() {
    let mut machine = Machine::new(nowhere(), Features::empty());
    machine.drivers[TRANSMIT].put(&machine.guest, &[(readable(1 << 45, 1), 0)]);
    machine.device.notify(TRANSMIT as u16);
    assert!(
        machine.device.broken().contains("0x2000"),
        "{}",
        machine.device.broken()
    );
}

#[test]
fn the_configuration_says_how_many_ports_there_are() {
    let machine = Machine::new(nowhere(), Features::empty());
    let mut bytes = [0xff; 12];
    machine.device.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    machine.device.device.read_config(usize::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn whatever_the_driver_says_is_taken(
        messages in prop::collection::vec((0..4u32, 0..9u16, 0..3u16), 1..40),
        bytes in prop::collection::vec(any::<u8>(), 1..30),
    ) {
        let mut machine = Machine::new(nowhere(), feature::MULTIPORT);
        for (port, event, value) in messages {
            machine.tell(if port == 3 { u32::MAX } else { port }, event, value);
        }
        machine.send(CONTROL_TRANSMIT, &bytes);
        machine.tell(0, 0, 1);
    }
}
