//! What a device of a running guest is made of is gone after a restart: the guest's other devices are served, and who uses this one waits.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceType;

use crate::asking::shown;
use crate::backends::{Card, die, in_own_network, ip, talk};
use crate::common::{GuestHal, Machine};
use crate::house::{House, until};
use crate::mmio::slot;
use crate::transports::{Mmio, Modern, Reach};
use crate::xl_disks::image;
use crate::{SHORT, draw, guest, house};

/// Besides it the guest has an entropy device, which it always can have.
fn house_with(device: &str) -> House {
    house(&format!(
        "[[guest.web.virtio]]\ntransport = \"mmio\"\ntype = \"rng\"\n[[guest.web.virtio]]\n{device}"
    ))
}

fn rng(machine: &Machine) -> VirtIORng<GuestHal, Mmio> {
    VirtIORng::new(slot(machine, 0)).unwrap()
}

/// Why the device in slot 1f waits.
fn waiting(house: &House) -> Option<String> {
    let mut devices = Vec::new();
    until("the guest is served", || {
        let guest = shown(house, Some("web")).remove(0);
        devices = guest.devices;
        guest.state == "served"
    });
    let mut devices = devices.into_iter();
    let device = devices.find(|device| device.place == "slot 1f").unwrap();
    assert!(device.driven.is_some());
    device.waiting
}

#[test]
fn a_disk_that_is_gone_after_a_restart_holds_up_who_uses_it_and_nobody_else() {
    let image = image(16);
    let path = image.path();
    let away = path.with_extension("away");
    let house = house_with(&format!("type = \"blk\"\npath = \"{}\"", path.display()));
    let machine = guest(&house);
    let mut rng = rng(&machine);
    let modern = Modern::find(&machine, DeviceType::Block, Reach::Bars);
    let mut disk = VirtIOBlk::<GuestHal, _>::new(modern).unwrap();
    disk.write_blocks(3, &[7; 512]).unwrap();
    let registers = || [0, 4, 8, 0x10, 0x2c].map(|at| machine.vcpu().config_read(0xf8, at, 4));
    let before = registers();
    assert_eq!(waiting(&house), None);
    house.kill();
    std::fs::rename(path, &away).unwrap();
    // A daemon that finds it missing goes on where another one has done so.
    for _ in 0..3 {
        house.start();
        draw(&mut rng);
        assert_eq!(registers(), before);
        let why = waiting(&house).unwrap();
        assert!(why.contains(path.to_str().unwrap()), "{why}");
        house.kill();
    }
    house.start();
    thread::scope(|scope| {
        let returning = scope.spawn(|| {
            thread::sleep(4 * SHORT);
            assert!(waiting(&house).is_some());
            std::fs::rename(&away, path).unwrap();
            Instant::now()
        });
        let mut read = [0; 512];
        disk.read_blocks(3, &mut read).unwrap();
        let answered = Instant::now();
        assert_eq!(read, [7; 512]);
        assert!(returning.join().unwrap() < answered);
    });
    assert_eq!(waiting(&house), None);
    disk.write_blocks(4, &[8; 512]).unwrap();
    draw(&mut rng);
}

#[test]
fn a_guest_that_ends_while_a_device_is_missing_leaves_nothing() {
    let image = image(16);
    let path = image.path();
    let away = path.with_extension("away");
    let house = house_with(&format!("type = \"blk\"\npath = \"{}\"", path.display()));
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::Block, Reach::Bars);
    let mut disk = VirtIOBlk::<GuestHal, _>::new(modern).unwrap();
    disk.write_blocks(3, &[7; 512]).unwrap();
    house.kill();
    std::fs::rename(path, &away).unwrap();
    house.start();
    assert!(waiting(&house).is_some());
    die(&house, &machine, disk);
    let domain = machine.guest().domain();
    until("nothing of it is mapped", || {
        house.machine.held_by_dom0(domain).is_none()
    });
    std::fs::rename(&away, path).unwrap();
}

#[test]
fn a_card_whose_bridge_is_gone_after_a_restart_goes_on_when_it_is_there_again() {
    in_own_network(|| {
        let house = house_with("type = \"net\"\nbridge = \"br0\"");
        let machine = guest(&house);
        let mut rng = rng(&machine);
        let modern = Modern::find(&machine, DeviceType::Network, Reach::Bars);
        let mut card = Card::new(modern);
        card.ask();
        house.kill();
        ip("link del br0");
        house.start();
        draw(&mut rng);
        assert!(waiting(&house).unwrap().contains("br0"));
        ip("link add br0 type bridge");
        ip("addr add 10.0.0.1/24 dev br0");
        ip("link set br0 up");
        card.ask();
        assert_eq!(waiting(&house), None);
    });
}

#[test]
fn a_console_whose_path_is_taken_after_a_restart_goes_on_when_it_is_free_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let socket = path.display();
    let house = house_with(&format!("type = \"console\"\nsocket = \"{socket}\""));
    let machine = guest(&house);
    let mut rng = rng(&machine);
    let modern = Modern::find(&machine, DeviceType::Console, Reach::Bars);
    let mut console = VirtIOConsole::<GuestHal, _>::new(modern).unwrap();
    talk(&mut console, &mut UnixStream::connect(&path).unwrap());
    house.kill();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "something else").unwrap();
    house.start();
    draw(&mut rng);
    assert!(waiting(&house).unwrap().contains("console"));
    std::fs::remove_file(&path).unwrap();
    until("it can be reached", || UnixStream::connect(&path).is_ok());
    talk(&mut console, &mut UnixStream::connect(&path).unwrap());
}
