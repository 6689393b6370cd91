//! Our devices, with the drivers of `virtio-drivers`, over every face of the transports.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use virtio::Features;
use virtio::blk::{Blk, Image, Options};
use virtio::console::{Console, Endpoint, Port};
use virtio::device::{Activation, Device, DeviceKind};
use virtio::memory::Words;
use virtio::net::{Link, Net};
use virtio::pci::{Layout, Mode, Shape, VirtioFunction};
use virtio::queue::Queue;
use virtio::rng::Rng;
use virtio::transport::mmio::{Board, MmioDevice, Version};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceType, Transport};
use xenbus::device_model::IoSpace;

use crate::common::{Machine, Sink, parts};
use crate::legacy_block;
use crate::memory::{GuestHal, ram};
use crate::transports::{Block, Legacy, Mmio, Modern, Reach};

/// A device with smaller queues. The drivers ask for a size of their own, where a legacy driver has
/// to take the device's.
struct Small {
    device: Box<dyn Device>,
    queue_sizes: Vec<u16>,
}

impl Small {
    fn new(device: Box<dyn Device>, size: u16) -> Self {
        Self {
            queue_sizes: vec![size; device.queue_sizes().len()],
            device,
        }
    }
}

impl Device for Small {
    fn kind(&self) -> DeviceKind {
        self.device.kind()
    }

    fn features(&self) -> Features {
        self.device.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    fn kept_words(&self) -> usize {
        self.device.kept_words()
    }

    fn keep(&mut self, words: Words) {
        self.device.keep(words);
    }

    fn agree(&mut self, features: Features) {
        self.device.agree(features);
    }

    fn activate(&mut self, activation: Activation) {
        self.device.activate(activation);
    }

    fn notify(&self, queue: u16) {
        self.device.notify(queue);
    }

    fn reset(&mut self) {
        self.device.reset();
    }

    fn is_reset(&self) -> bool {
        self.device.is_reset()
    }

    fn reset_queue(&mut self, queue: u16) {
        self.device.reset_queue(queue);
    }

    fn is_queue_reset(&self, queue: u16) -> bool {
        self.device.is_queue_reset(queue)
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.device.enable_queue(index, queue);
    }
}

/// What a guest does with a device, whatever the transport.
trait Client {
    const KIND: DeviceType;
    /// The size of the queues that the driver has.
    const QUEUE: u16;

    fn device(&mut self) -> Box<dyn Device>;

    fn run<T: Transport>(&mut self, transport: T);
}

fn run_over_every_face<C: Client>(mut client: C) {
    for (mode, layout) in [
        (Mode::Legacy, Layout::Qemu),
        (Mode::Transitional, Layout::Qemu),
        (Mode::Transitional, Layout::Compact),
        (Mode::Modern, Layout::Compact),
    ] {
        let shape = Shape {
            mode,
            layout,
            legacy_in_memory: true,
        };
        let device = Small::new(client.device(), C::QUEUE);
        let parts = parts(device, ram(), Arc::new(Sink::default()));
        let machine = Machine::new(VirtioFunction::new(parts, &shape).unwrap());
        if mode.has_legacy() {
            for bar in [0, 3] {
                let block = legacy_block(&machine, bar);
                client.run(Legacy::new(block, C::KIND, false));
            }
        }
        if mode.has_modern() {
            for reach in [Reach::Bars, Reach::Window] {
                client.run(Modern::find(&machine, C::KIND, reach));
            }
        }
    }
    const BASE: u64 = 0xfe70_0000;
    for version in [Version::One, Version::Two] {
        let device = Small::new(client.device(), 64);
        let parts = parts(device, ram(), Arc::new(Sink::default()));
        let mut board = Board::new(BASE, 1);
        board.plug(0, MmioDevice::new(parts, version)).unwrap();
        let machine = Machine::new(board);
        for _ in 0..2 {
            client.run(Mmio(Block::new(&machine, IoSpace::Memory, BASE)));
        }
    }
}

struct Random;

impl Client for Random {
    const KIND: DeviceType = DeviceType::EntropySource;
    const QUEUE: u16 = 8;

    fn device(&mut self) -> Box<dyn Device> {
        Box::new(Rng::new().unwrap())
    }

    fn run<T: Transport>(&mut self, transport: T) {
        let mut driver = VirtIORng::<GuestHal, T>::new(transport).unwrap();
        let mut data = [[0; 64]; 2];
        for part in &mut data {
            assert_eq!(driver.request_entropy(part).unwrap(), 64);
        }
        assert_ne!(data[0], data[1]);
        assert_ne!(data[0], [0; 64]);
    }
}

#[test]
fn the_entropy_device_works_over_every_face() {
    run_over_every_face(Random);
}

struct Disk {
    directory: tempfile::TempDir,
    round: u8,
}

impl Client for Disk {
    const KIND: DeviceType = DeviceType::Block;
    const QUEUE: u16 = 16;

    fn device(&mut self) -> Box<dyn Device> {
        self.round += 1;
        let path = self.directory.path().join(self.round.to_string());
        std::fs::write(&path, vec![0x11; 1 << 20]).unwrap();
        let image = Image::open(&path, false, false).unwrap();
        let options = Options {
            serial: "serial number".into(),
            ..Options::default()
        };
        Box::new(Blk::new(image, &options))
    }

    fn run<T: Transport>(&mut self, transport: T) {
        let mut driver = VirtIOBlk::<GuestHal, T>::new(transport).unwrap();
        assert_eq!(driver.capacity(), 2048);
        assert!(!driver.readonly());
        let written: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8).collect();
        let mut read = vec![0; 8192];
        driver.write_blocks(100, &written).unwrap();
        driver.read_blocks(100, &mut read).unwrap();
        assert_eq!(read, written);
        driver.read_blocks(2047, &mut read[..512]).unwrap();
        assert_eq!(read[..512], [0x11; 512]);
        assert!(driver.read_blocks(2048, &mut read[..512]).is_err());
        driver.flush().unwrap();
        let mut serial = [0; 20];
        let length = driver.device_id(&mut serial).unwrap();
        assert_eq!(&serial[..length], b"serial number");
    }
}

#[test]
fn the_block_device_works_over_every_face() {
    let directory = tempfile::tempdir().unwrap();
    run_over_every_face(Disk {
        directory,
        round: 0,
    });
}

struct Terminal {
    directory: tempfile::TempDir,
    round: u8,
}

impl Terminal {
    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join(self.round.to_string())
    }
}

impl Client for Terminal {
    const KIND: DeviceType = DeviceType::Console;
    const QUEUE: u16 = 2;

    fn device(&mut self) -> Box<dyn Device> {
        self.round += 1;
        let endpoint = Endpoint::listen(&self.socket()).unwrap();
        let port = Port {
            name: String::new(),
            endpoint,
        };
        Box::new(Console::new(vec![port]).unwrap())
    }

    fn run<T: Transport>(&mut self, transport: T) {
        let mut driver = VirtIOConsole::<GuestHal, T>::new(transport).unwrap();
        let mut host = UnixStream::connect(self.socket()).unwrap();
        host.write_all(b"to the guest").unwrap();
        let mut received = Vec::new();
        while received.len() < b"to the guest".len() {
            // The device interrupts, which a driver asks for before it looks again.
            driver.ack_interrupt().unwrap();
            received.extend(driver.recv(true).unwrap());
        }
        assert_eq!(received, b"to the guest");
        driver.send_bytes(b"to the host").unwrap();
        let mut sent = [0; 11];
        host.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"to the host");
    }
}

#[test]
fn the_console_works_over_every_face() {
    let directory = tempfile::tempdir().unwrap();
    run_over_every_face(Terminal {
        directory,
        round: 0,
    });
}

const MAC: [u8; 6] = [0x00, 0x16, 0x3e, 1, 2, 3];

/// With the other end of its link.
struct Card(Option<UnixDatagram>);

impl Client for Card {
    const KIND: DeviceType = DeviceType::Network;
    const QUEUE: u16 = 16;

    fn device(&mut self) -> Box<dyn Device> {
        let (ours, host) = UnixDatagram::pair().unwrap();
        host.set_read_timeout(Some(std::time::Duration::from_secs(20)))
            .unwrap();
        self.0 = Some(host);
        let link = Link::of_socket(ours.into()).unwrap();
        Box::new(Net::new(vec![link], MAC).unwrap())
    }

    fn run<T: Transport>(&mut self, transport: T) {
        let host = self.0.as_ref().unwrap();
        let mut driver = VirtIONetRaw::<GuestHal, T, 16>::new(transport).unwrap();
        assert_eq!(driver.mac_address(), MAC);
        for round in 0..20u8 {
            driver.send(&[round; 100]).unwrap();
            let mut sent = [0xff; 200];
            let len = host.recv(&mut sent).unwrap();
            // The header is shorter by the interface from before 1.0.
            let header = len - 100;
            assert!([10, 12].contains(&header), "{len}");
            assert_eq!(sent[header..len], [round; 100]);

            let mut packet = vec![0; header];
            packet.extend([round ^ 0xff; 300]);
            host.send(&packet).unwrap();
            let mut received = [0; 2000];
            let place = driver.receive_wait(&mut received).unwrap();
            assert_eq!(place, (header, 300));
            assert_eq!(received[header..header + 300], [round ^ 0xff; 300]);
        }
    }
}

#[test]
fn the_network_card_works_over_every_face() {
    run_over_every_face(Card(None));
}
