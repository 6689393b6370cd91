//! The network device, from its queues to its links.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use rings::{BUFFERS, Driver, Guest, Live, PATIENCE, Part, readable, writable};
use virtio::Features;
use virtio::device::Device;
use virtio::memory::Words;
use virtio::net::{Link, LinkError, Net, feature};

const MAC: [u8; 6] = [0x00, 0x16, 0x3e, 1, 2, 3];
const HEADER: usize = 12;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A card with one pair of queues and a control queue, and the other end of its link.
struct Machine {
    guest: Guest,
    drivers: Vec<Driver>,
    device: Live<Net>,
    host: UnixDatagram,
}

fn merging() -> Features {
    Features::EVENT_IDX | feature::MRG_RXBUF | feature::CTRL_VQ
}

impl Machine {
    fn new(features: Features) -> Self {
        let (ours, host) = UnixDatagram::pair().unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        let guest = Guest::default();
        let drivers: Vec<Driver> = (0..3)
            .map(|queue| Driver::new(queue, 64, features | Features::EVENT_IDX))
            .collect();
        let net = Net::new(vec![Link::of_socket(ours.into()).unwrap()], MAC).unwrap();
        assert_eq!(net.queue_sizes(), [256, 256, 64]);
        let device = Live::new(net, &guest, &drivers.iter().collect::<Vec<_>>());
        Self {
            guest,
            drivers,
            device,
            host,
        }
    }

    fn transmit(&mut self, packet: &[u8], parts: &[Part]) {
        let mut at = 0;
        for part in parts {
            let end = at + part.len as usize;
            self.guest.write(part.address, &packet[at..end]);
            at = end;
        }
        self.drivers[TRANSMIT]
            .offer(&self.guest, parts, None)
            .unwrap();
        self.device.notify(TRANSMIT as u16);
        let (_, written) = self.device.used(&mut self.drivers[TRANSMIT], &self.guest);
        assert_eq!(written, 0);
    }

    fn offer(&mut self, slot: u64, len: u32) -> (u16, u64) {
        let at = BUFFERS + 0x10_0000 + slot * 0x1_0000;
        let parts = [writable(at, len)];
        let head = self.drivers[RECEIVE]
            .offer(&self.guest, &parts, None)
            .unwrap();
        self.device.notify(RECEIVE as u16);
        (head, at)
    }

    fn received(&mut self) -> (u16, usize) {
        let (head, len) = self.device.used(&mut self.drivers[RECEIVE], &self.guest);
        (head, len as usize)
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.guest.write(BUFFERS, bytes);
        self.guest.write(BUFFERS + 0x1000, &[0xff]);
        let parts = [
            readable(BUFFERS, bytes.len() as u32),
            writable(BUFFERS + 0x1000, 1),
        ];
        self.drivers[2].offer(&self.guest, &parts, None).unwrap();
        self.device.notify(2);
        assert_eq!(self.device.used(&mut self.drivers[2], &self.guest).1, 1);
        self.guest.read(BUFFERS + 0x1000, 1)[0]
    }

    fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        self.device.device.read_config(0, &mut mac);
        mac
    }
}

fn packet(len: usize, seed: u8) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|byte| (byte as u8).wrapping_mul(3).wrapping_add(seed)));
    packet
}

#[test]
fn a_packet_goes_to_the_host_with_its_header_wherever_the_borders_of_its_buffers_are() {
    for format in [Features::empty(), Features::RING_PACKED] {
        let mut machine = Machine::new(merging() | format);
        for seed in 0..100 {
            let mut sent = packet(1000, seed);
            sent[0] = 1;
            sent[2..4].copy_from_slice(&54u16.to_le_bytes());
            let parts = [
                readable(BUFFERS, 5),
                readable(BUFFERS + 0x1000, 30),
                readable(BUFFERS + 0x2000, 977),
            ];
            machine.transmit(&sent, &parts);
            let mut bytes = [0; 2000];
            let len = machine.host.recv(&mut bytes).unwrap();
            assert_eq!(bytes[..len], sent);
        }
    }
}

#[test]
fn a_packet_from_the_host_lies_in_one_buffer_if_it_fits() {
    for features in [merging(), Features::EVENT_IDX, Features::RING_PACKED] {
        let mut machine = Machine::new(features);
        for seed in 0..100 {
            let (head, at) = machine.offer(seed % 8, 2000);
            let sent = packet(600, seed as u8);
            machine.host.send(&sent).unwrap();
            assert_eq!(machine.received(), (head, 612));
            let mut expected = sent;
            expected[10] = 1;
            assert_eq!(machine.guest.read(at, 612), expected);
        }
    }
}

#[test]
fn a_long_packet_is_spread_over_buffers_and_waits_for_those_that_are_missing() {
    let mut machine = Machine::new(merging());
    let sent = packet(2500, 9);
    machine.host.send(&sent).unwrap();
    let mut buffers = vec![machine.offer(0, 1000), machine.offer(1, 1000)];
    std::thread::sleep(Duration::from_millis(20));
    assert!(machine.drivers[RECEIVE].used(&machine.guest).is_none());
    buffers.push(machine.offer(2, 1000));
    let mut whole = Vec::new();
    for (head, at) in buffers {
        let (used, len) = machine.received();
        assert_eq!(used, head);
        whole.extend(machine.guest.read(at, len));
    }
    let mut expected = sent;
    expected[10] = 3;
    assert!(whole == expected);
}

#[test]
fn without_merging_a_packet_that_does_not_fit_is_lost_and_the_next_one_arrives() {
    let mut machine = Machine::new(Features::EVENT_IDX);
    let (first, _) = machine.offer(0, 100);
    let (second, at) = machine.offer(1, 2000);
    machine.host.send(&packet(500, 1)).unwrap();
    machine.host.send(&packet(500, 2)).unwrap();
    assert_eq!(machine.received(), (first, 0));
    assert_eq!(machine.received(), (second, 512));
    assert_eq!(machine.guest.read(at + 12, 500), packet(500, 2)[12..]);
}

#[test]
fn a_packet_too_long_for_the_whole_ring_is_lost_and_the_next_one_arrives() {
    for format in [Features::empty(), Features::RING_PACKED] {
        let mut machine = Machine::new(merging() | format);
        let buffers: Vec<_> = (0..64).map(|slot| machine.offer(slot % 16, 100)).collect();
        machine.host.send(&packet(6400, 1)).unwrap();
        for (head, _) in buffers {
            assert_eq!(machine.received(), (head, 0));
        }
        let (head, at) = machine.offer(0, 100);
        machine.host.send(&packet(50, 2)).unwrap();
        assert_eq!(machine.received(), (head, 62));
        assert_eq!(machine.guest.read(at + 12, 50), packet(50, 2)[12..]);
    }
}

#[test]
fn a_packet_longer_than_any_is_lost_and_the_next_one_goes() {
    let mut machine = Machine::new(merging());
    let long = readable(BUFFERS, 0x2_0000);
    machine.drivers[TRANSMIT]
        .offer(&machine.guest, &[long], None)
        .unwrap();
    machine.device.notify(1);
    machine
        .device
        .used(&mut machine.drivers[TRANSMIT], &machine.guest);
    machine.transmit(&packet(20, 3), &[readable(BUFFERS, 32)]);
    let mut bytes = [0; 100];
    assert_eq!(machine.host.recv(&mut bytes).unwrap(), 32);
}

#[test]
fn the_control_queue_does_what_it_knows_and_refuses_the_rest() {
    let mut machine = Machine::new(merging());
    assert_eq!(machine.command(&[0, 0, 1]), 0, "promiscuous");
    assert_eq!(machine.command(&[0, 6, 1]), 1);
    assert_eq!(machine.command(&[0, 0]), 1, "on or off?");
    assert_eq!(machine.command(&[1, 1, 2, 4, 6, 8, 10, 12]), 0);
    assert_eq!(machine.mac(), [2, 4, 6, 8, 10, 12]);
    assert_eq!(machine.command(&[1, 1, 2, 4, 6, 8, 10]), 1);
    assert_eq!(
        machine.command(&[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]),
        0
    );
    assert_eq!(machine.command(&[1, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]), 1);
    assert_eq!(
        machine.command(&[4, 0, 1, 0]),
        1,
        "one pair, so the feature is not there"
    );
    assert_eq!(machine.command(&[9, 9]), 1);
    assert_eq!(machine.command(&[0]), 1);
}

#[test]
fn a_legacy_driver_writes_the_address() {
    let mut machine = Machine::new(Features::empty());
    assert_eq!(machine.mac(), MAC);
    machine.device.device.write_config(3, &[7, 8]);
    machine.device.device.write_config(usize::MAX, &[1; 8]);
    assert_eq!(machine.mac(), [0x00, 0x16, 0x3e, 7, 8, 3]);
    let mut bytes = [0xff; 6];
    machine.device.device.read_config(6, &mut bytes);
    assert_eq!(bytes, [1, 0, 1, 0, 0, 0], "link up, one pair");
}

#[test]
fn a_driver_that_knows_of_no_second_pair_finds_control_behind_the_first() {
    let mut machine = Machine::new(merging());
    let links = [(); 2].map(|()| {
        let (ours, _) = UnixDatagram::pair().unwrap();
        Link::of_socket(ours.into()).unwrap()
    });
    let net = Net::new(links.into(), MAC).unwrap();
    assert_eq!(net.queue_sizes().len(), 5);
    machine.device = Live::new(
        net,
        &machine.guest,
        &machine.drivers.iter().collect::<Vec<_>>(),
    );
    assert_eq!(machine.command(&[1, 1, 2, 4, 6, 8, 10, 12]), 0);
    assert_eq!(machine.mac(), [2, 4, 6, 8, 10, 12]);
}

#[test]
fn an_address_that_the_driver_has_set_outlives_a_restart_and_not_a_reset() {
    let words = Words::volatile(2).unwrap();
    let restarted = || {
        let mut machine = Machine::new(merging());
        machine.device.device.keep(words.clone());
        machine
    };
    let mut machine = restarted();
    assert_eq!(machine.command(&[1, 1, 2, 4, 6, 8, 10, 12]), 0);
    let mut machine = restarted();
    assert_eq!(machine.mac(), [2, 4, 6, 8, 10, 12]);
    machine.device.device.write_config(5, &[0]);
    let mut machine = restarted();
    assert_eq!(machine.mac(), [2, 4, 6, 8, 10, 0]);
    machine.device.reset();
    assert_eq!(machine.mac(), MAC);
    assert_eq!(restarted().mac(), MAC);
}

#[test]
fn a_reset_lets_go_of_the_guest_at_once_with_a_packet_half_way() {
    let mut machine = Machine::new(merging());
    machine.offer(0, 1000);
    machine.host.send(&packet(2500, 9)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    machine.device.reset();
    machine.guest.ram.invalidate();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.guest.memory.mappings(), 0);
}

#[test]
fn a_driver_that_breaks_its_ring_gets_its_memory_back_at_once() {
    let mut machine = Machine::new(merging());
    let wrong = [(readable(1 << 45, 1), 0)];
    machine.drivers[TRANSMIT].put(&machine.guest, &wrong);
    machine.device.notify(TRANSMIT as u16);
    machine.device.broken();
    machine.guest.ram.invalidate();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.guest.memory.mappings(), 0);
}

#[test]
fn taps_that_cannot_be_used_are_refused_with_the_reason() {
    let missing = Link::tap("no-such-tap", 1).unwrap_err();
    assert!(matches!(missing, LinkError::Missing { .. }), "{missing}");
    assert!(missing.to_string().contains("ip tuntap add no-such-tap"));
    let wild = Link::tap("../../etc", 1).unwrap_err();
    assert!(matches!(wild, LinkError::Missing { .. }));
}

/// A network of this thread's own with one tap, or nothing if that is not allowed here.
fn own_network(options: &[&str]) -> bool {
    let run = |arguments: &[&str]| {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?}");
    };
    if unshare(CloneFlags::CLONE_NEWNET).is_err() {
        eprintln!("skipped: making networks takes root");
        return false;
    }
    run(&[&["tuntap", "add", "tap0", "mode", "tap"], options].concat());
    run(&["addr", "add", "10.0.0.1/24", "dev", "tap0"]);
    run(&["link", "set", "tap0", "up"]);
    true
}

/// Who has 10.0.0.1?
fn arp_request() -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    packet.extend(MAC);
    packet.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    packet
}

#[test]
fn the_hosts_kernel_answers_through_a_tap() {
    for (queues, options) in [(1, &[][..]), (2, &["multi_queue"][..])] {
        std::thread::spawn(move || {
            if !own_network(options) {
                return;
            }
            let links = Link::tap("tap0", queues).unwrap();
            let busy = Link::tap("tap0", 1).unwrap_err();
            assert!(matches!(
                busy,
                LinkError::Busy { .. } | LinkError::Kind { .. }
            ));
            let guest = Guest::default();
            let features = merging() | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::MQ;
            let mut drivers: Vec<Driver> = (0..2 * queues + 1)
                .map(|queue| Driver::new(queue, 16, features))
                .collect();
            let net = Net::new(links, MAC).unwrap();
            assert_eq!(net.features().contains(feature::MQ), queues > 1);
            let device = Live::new(net, &guest, &drivers.iter().collect::<Vec<_>>());
            let request = arp_request();
            guest.write(BUFFERS, &request);
            let parts = [readable(BUFFERS, request.len() as u32)];
            for slot in 0..16 {
                let at = BUFFERS + 0x10_0000 + slot * 0x1000;
                drivers[RECEIVE]
                    .offer(&guest, &[writable(at, 2000)], None)
                    .unwrap();
            }
            device.notify(RECEIVE as u16);
            // The kernel also says things of its own, and does not answer before it has seen that
            // somebody holds the tap.
            let (mut heard, mut answered) = (0, false);
            for _ in 0..100 {
                drivers[TRANSMIT].offer(&guest, &parts, None).unwrap();
                device.notify(TRANSMIT as u16);
                device.used(&mut drivers[TRANSMIT], &guest);
                std::thread::sleep(Duration::from_millis(50));
                while let Some((_, len)) = drivers[RECEIVE].used(&guest) {
                    let at = BUFFERS + 0x10_0000 + heard * 0x1000;
                    let packet = guest.read(at, len as usize);
                    answered |= packet[HEADER..HEADER + 6] == MAC
                        && packet[HEADER + 12..HEADER + 22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]
                        && packet[HEADER + 28..HEADER + 32] == [10, 0, 0, 1];
                    heard += 1;
                }
                if answered {
                    return;
                }
            }
            panic!("no answer, but {heard} packets");
        })
        .join()
        .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_command_gets_an_answer(
        commands in prop::collection::vec((0..6u8, 0..3u8, prop::collection::vec(any::<u8>(), 0..24)), 1..20),
    ) {
        let mut machine = Machine::new(merging());
        for (class, command, data) in commands {
            let mut bytes = vec![class, command];
            bytes.extend(data);
            prop_assert!(machine.command(&bytes) <= 1);
        }
    }

    #[test]
    fn packets_arrive_whole_and_in_order_whatever_the_sizes(
        sizes in prop::collection::vec((1..3000usize, 13..1500u32), 1..30),
    ) {
        let mut machine = Machine::new(merging());
        for (index, (len, room)) in sizes.into_iter().enumerate() {
            let mut expected = packet(len, index as u8);
            machine.host.send(&expected).unwrap();
            let count = expected.len().div_ceil(room as usize);
            prop_assume!(count <= 32);
            let offered: Vec<_> = (0..count).map(|slot| {
                let at = BUFFERS + 0x10_0000 + slot as u64 * 0x1000;
                let head = machine.drivers[RECEIVE].offer(&machine.guest, &[writable(at, room)], None).unwrap();
                (head, at)
            }).collect();
            machine.device.notify(0);
            let mut whole = Vec::new();
            for (head, at) in offered {
                let (used, len) = machine.received();
                prop_assert_eq!(used, head);
                whole.extend(machine.guest.read(at, len));
            }
            expected[10..12].copy_from_slice(&(count as u16).to_le_bytes());
            prop_assert!(whole == expected);
        }
    }

    #[test]
    fn buffers_come_back_in_their_order_whatever_they_are_like(
        rooms in prop::collection::vec(prop_oneof![1 => Just(0), 3 => 1..3000u32], 1..20),
        packed in any::<bool>(),
        merge in any::<bool>(),
        len in 1..5000usize,
    ) {
        let mut features = Features::EVENT_IDX | Features::IN_ORDER;
        features.set(Features::RING_PACKED, packed);
        features.set(feature::MRG_RXBUF, merge);
        let mut machine = Machine::new(features);
        let mut offered = VecDeque::new();
        for (slot, room) in (0..).zip(rooms) {
            let at = BUFFERS + 0x10_0000 + slot * 0x1000;
            // One without room is one that the device may only read.
            let part = if room == 0 { readable(at, 16) } else { writable(at, room) };
            offered.extend(machine.drivers[RECEIVE].offer(&machine.guest, &[part], None));
        }
        // For what does not fit into the last one any more.
        machine.offer(30, 5100);
        machine.host.set_nonblocking(true).unwrap();
        let until = Instant::now() + PATIENCE;
        while let Some(head) = offered.front() {
            let _ = machine.host.send(&packet(len, 0));
            if let Some((used, _)) = machine.drivers[RECEIVE].used(&machine.guest) {
                prop_assert_eq!(used, *head);
                offered.pop_front();
            }
            prop_assert!(Instant::now() < until);
        }
    }
}
