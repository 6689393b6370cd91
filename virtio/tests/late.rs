//! Devices whose back-ends come late: what drivers see and do meanwhile.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::Duration;

use rings::{BUFFERS, Driver, Guest, Live, readable, writable};
use tempfile::NamedTempFile;
use virtio::Features;
use virtio::blk::{Blk, Image, Options};
use virtio::console::{Console, Endpoint, Port};
use virtio::device::Device;
use virtio::late::{Late, Supply};
use virtio::memory::Words;
use virtio::net::{Link, Net};

const SHORT: Duration = Duration::from_millis(50);
const WRITEBACK: usize = 32;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(77 * 512).unwrap();
    file
}

fn disk(image: &NamedTempFile, read_only: bool) -> Blk {
    let image = Image::open(image.path(), read_only, false).unwrap();
    Blk::new(image, &Options::default())
}

fn config(device: &dyn Device) -> [u8; 80] {
    let mut config = [0xff; 80];
    device.read_config(0, &mut config);
    config
}

/// What a driver finds, and what is kept.
fn seen(device: &dyn Device) -> (u16, Features, Vec<u16>, usize, [u8; 80]) {
    (
        device.kind().id(),
        device.features(),
        device.queue_sizes().to_vec(),
        device.kept_words(),
        config(device),
    )
}

/// A device that is late, where one was before that has kept something.
fn late(stand_in: impl Device + 'static, words: &Words) -> (Late, Supply) {
    let (mut late, supply) = Late::new(Box::new(stand_in));
    late.keep(words.clone());
    (late, supply)
}

/// A disk that is late.
fn late_disk(image: &NamedTempFile) -> (Late, Supply) {
    let words = Words::volatile(3).unwrap();
    disk(image, false).keep(words.clone());
    late(Blk::without_image(false, &Options::default()), &words)
}

#[test]
fn what_can_be_seen_of_a_device_that_is_late_is_as_it_was() {
    let images = [image(), image()];
    let links = |count| {
        let link = |_| Link::of_socket(OwnedFd::from(UnixDatagram::pair().unwrap().0)).unwrap();
        (0..count).map(link).collect()
    };
    let ports = |count| {
        let port = |number: usize| Port {
            name: format!("port{number}"),
            endpoint: Endpoint::pty().unwrap().0,
        };
        (0..count).map(port).collect()
    };
    let options = Options::default();
    let mut pairs: Vec<[Box<dyn Device>; 2]> = Vec::new();
    for (image, read_only) in images.iter().zip([false, true]) {
        let stand_in = Blk::without_image(read_only, &options);
        pairs.push([Box::new(disk(image, read_only)), Box::new(stand_in)]);
    }
    for count in [1, 3] {
        let net = Net::new(links(count), MAC).unwrap();
        pairs.push([Box::new(net), Box::new(Net::without_links(count, MAC))]);
        let console = Console::new(ports(count.into())).unwrap();
        let stand_in = Console::without_ports(count.into()).unwrap();
        pairs.push([Box::new(console), Box::new(stand_in)]);
    }
    let stand_in = Net::without_links(1, MAC).without_offloads();
    let net = Net::new(links(1), MAC).unwrap().without_offloads();
    pairs.push([Box::new(net), Box::new(stand_in)]);
    for [mut real, stand_in] in pairs {
        let words = Words::volatile(real.kept_words()).unwrap();
        real.keep(words.clone());
        // The driver sets what it can: the mode of the cache, the address.
        real.write_config(0, &[2, 0, 0, 0, 0, 9]);
        real.write_config(WRITEBACK, &[0]);
        let before = seen(&*real);
        drop(real);
        let (mut late, _supply) = Late::new(stand_in);
        late.keep(words.clone());
        assert_eq!(seen(&late), before);
    }
}

#[test]
fn requests_wait_for_a_disk_that_is_late_and_what_is_set_meanwhile_holds() {
    let image = image();
    let (late, supply) = late_disk(&image);
    let guest = Guest::default();
    let mut driver = Driver::new(0, 64, Features::EVENT_IDX);
    let mut live = Live::new(late, &guest, &[&driver]);
    guest.write(BUFFERS, &[0; 16]);
    let read = [
        readable(BUFFERS, 16),
        writable(BUFFERS + 0x1000, 512),
        writable(BUFFERS + 0x2000, 1),
    ];
    driver.offer(&guest, &read, None).unwrap();
    live.notify(0);
    live.device.write_config(WRITEBACK, &[0]);
    thread::sleep(SHORT);
    assert_eq!(driver.used(&guest), None);
    supply.give(Box::new(disk(&image, false)));
    assert_eq!(live.used(&mut driver, &guest).1, 513);
    assert_eq!(config(&live.device)[WRITEBACK], 0);
    // From now on it is like any other.
    driver.offer(&guest, &read, None).unwrap();
    live.notify(0);
    live.used(&mut driver, &guest);
}

#[test]
fn a_queue_that_is_reset_meanwhile_is_not_served_until_it_is_enabled_again() {
    let image = image();
    let (late, supply) = late_disk(&image);
    let guest = Guest::default();
    let mut driver = Driver::new(0, 64, Features::EVENT_IDX);
    let mut live = Live::new(late, &guest, &[&driver]);
    live.device.reset_queue(0);
    assert!(live.device.is_queue_reset(0));
    let read = [readable(BUFFERS, 16), writable(BUFFERS + 0x1000, 513)];
    guest.write(BUFFERS, &[0; 16]);
    driver.offer(&guest, &read, None).unwrap();
    supply.give(Box::new(disk(&image, false)));
    thread::sleep(SHORT);
    assert_eq!(driver.used(&guest), None);
    live.device.enable_queue(0, driver.queue(&guest));
    live.used(&mut driver, &guest);
}

#[test]
fn a_device_that_is_reset_meanwhile_or_gone_leaves_the_guest_alone() {
    let image = image();
    let words = Words::volatile(3).unwrap();
    disk(&image, false).keep(words.clone());
    let guest = Guest::default();
    for is_gone in [false, true] {
        let (late, supply) = late(Blk::without_image(false, &Options::default()), &words);
        let mut driver = Driver::new(0, 64, Features::EVENT_IDX);
        let mut live = Live::new(late, &guest, &[&driver]);
        driver.offer(&guest, &[readable(BUFFERS, 16)], None);
        live.device.reset();
        assert!(live.device.is_reset());
        let live = (!is_gone).then_some(live);
        supply.give(Box::new(disk(&image, false)));
        thread::sleep(SHORT);
        assert_eq!(driver.used(&guest), None);
        // A disk that nobody wants any more is not locked either.
        assert_eq!(Image::open(image.path(), false, false).is_ok(), is_gone);
        drop(live);
    }
}
