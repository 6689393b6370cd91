//! Disks that the toolstack's own configuration gives a guest.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use xenbus::sim::{DomainKind, ToolstackError, VirtioDisk};
use xenbus::xenstore::Store;
use xenbus::{DomId, Xen, XenbusState};

use crate::common::{GuestHal, Machine};
use crate::draw;
use crate::house::House;
use crate::mmio::slot;

/// Nobody waits for the toolstack's patience to end.
const AT_ONCE: Duration = Duration::from_secs(5);

fn house(config: &str) -> House {
    crate::house(config)
}

pub fn image(sectors: u64) -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(512 * sectors).unwrap();
    image
}

pub fn disk(letter: char, image: &Path) -> VirtioDisk {
    VirtioDisk {
        vdev: format!("xvd{letter}"),
        device: 51712 + 16 * (u32::from(letter) - u32::from('a')),
        path: image.display().to_string(),
        read_only: false,
    }
}

fn create(house: &House) -> Machine {
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    Machine::new(&house.machine, domain)
}

pub fn domain(machine: &Machine) -> DomId {
    machine.guest().domain()
}

/// A guest that runs, with these images as its disks xvde and xvdf.
fn run_with(house: &House, images: &[NamedTempFile; 2]) -> Machine {
    let machine = create(house);
    for (letter, image) in ['e', 'f'].into_iter().zip(images) {
        let disk = disk(letter, image.path());
        house
            .machine
            .virtio_disk_add(domain(&machine), &disk)
            .unwrap();
    }
    house.machine.unpause_domain(domain(&machine)).unwrap();
    machine
}

pub fn is_locked(image: &NamedTempFile) -> bool {
    let opened = virtio::blk::Image::open(image.path(), false, false);
    matches!(opened, Err(virtio::blk::ImageError::Locked { .. }))
}

pub fn nodes_below(house: &House, directory: &str) -> usize {
    let nodes = house.machine.xenstore_nodes();
    nodes.keys().filter(|path| path.contains(directory)).count()
}

#[test]
fn disks_of_the_toolstack_s_are_there_before_the_guest_runs_and_keep_what_it_writes() {
    let house = house("[guest.web.disk.xvdf]\nversion = 1\nserial = \"second\"");
    let images = [image(16), image(32)];
    let machine = run_with(&house, &images);
    for (number, image) in (0..).zip(&images) {
        let transport = slot(&machine, number);
        let mut driver = VirtIOBlk::<GuestHal, _>::new(transport).unwrap();
        let sectors = 16 + 16 * number as usize;
        assert_eq!(driver.capacity(), sectors as u64);
        for sector in 0..sectors {
            if sector == 8 {
                house.kill();
                house.start();
            }
            let content = [sector as u8 + 1; 512];
            driver.write_blocks(sector, &content).unwrap();
        }
        driver.flush().unwrap();
        let written = std::fs::read(image.path()).unwrap();
        let mut sectors = written.chunks(512).enumerate();
        assert!(sectors.all(|(sector, data)| data == [sector as u8 + 1; 512]));
    }
    let mut serial = [0; 20];
    let mut second = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 1)).unwrap();
    second.device_id(&mut serial).unwrap();
    assert!(serial.starts_with(b"second\0"));
}

#[test]
fn a_destroyed_guest_s_disks_are_let_go_of_at_once_and_their_images_are_free() {
    let house = house("");
    let images = [image(16), image(16)];
    let machine = run_with(&house, &images);
    let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 1)).unwrap();
    driver.write_blocks(0, &[1; 512]).unwrap();
    assert!(images.iter().all(is_locked));
    drop(driver);
    machine.let_go();
    let start = Instant::now();
    house.machine.destroy_domain(domain(&machine)).unwrap();
    assert!(start.elapsed() < AT_ONCE);
    assert!(
        !images.iter().any(is_locked),
        "before the toolstack goes on"
    );
    assert_eq!(nodes_below(&house, "virtio_disk"), 0);
}

#[test]
fn a_disk_that_is_taken_away_leaves_its_slot_empty_and_the_others_alone() {
    let house = house("[[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"");
    let images = [image(16), image(16)];
    let machine = run_with(&house, &images);
    let mut rng = VirtIORng::<GuestHal, _>::new(slot(&machine, 0)).unwrap();
    let mut other = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 2)).unwrap();
    house
        .machine
        .virtio_disk_remove(domain(&machine), 51776)
        .unwrap();
    let kind = |number| slot(&machine, number).0.read(8, conf_space::Width::Four);
    assert_eq!([0, 1, 2].map(kind), [4, 0, 2]);
    draw(&mut rng);
    other.write_blocks(3, &[7; 512]).unwrap();
    assert!(!is_locked(&images[0]) && is_locked(&images[1]));
    house.kill();
    house.start();
    draw(&mut rng);
    assert_eq!([0, 1, 2].map(kind), [4, 0, 2]);
}

#[test]
fn a_disk_that_cannot_be_had_is_refused_at_once_with_the_reason() {
    let house = house("");
    let there = image(16);
    let machine = create(&house);
    let id = domain(&machine);
    let first = disk('e', there.path());
    house.machine.virtio_disk_add(id, &first).unwrap();
    let missing = disk('f', Path::new("/does/not/exist"));
    let start = Instant::now();
    let refused = house.machine.virtio_disk_add(id, &missing);
    assert!(start.elapsed() < AT_ONCE);
    assert!(matches!(
        refused,
        Err(ToolstackError::DiskNotReady {
            state: XenbusState::Unknown,
            ..
        })
    ));
    let mut store = house.machine.connect_xenstore().unwrap();
    let error = format!("/local/domain/0/error/backend/virtio_disk/{id}/51792/error");
    let why = store.read_string(&error).unwrap();
    assert!(
        why.contains("xvdf") && why.contains("/does/not/exist"),
        "{why}"
    );
    // The first is as it was.
    let kind = slot(&machine, 0).0.read(8, conf_space::Width::Four);
    assert_eq!(kind, 2);
    house.machine.destroy_domain(id).unwrap();
    crate::house::until("the error is forgotten", || {
        nodes_below(&house, "virtio_disk") == 0
    });
}

#[test]
fn a_device_keeps_its_slot_when_a_disk_wants_it() {
    let house = house(
        "[[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"\n\
         [guest.web.disk.xvde]\nslot = \"0\"\n[guest.web.disk.xvdf]\nslot = \"4\"",
    );
    let images = [image(16), image(16)];
    let machine = create(&house);
    let add = |letter, image: &NamedTempFile| {
        let disk = disk(letter, image.path());
        house.machine.virtio_disk_add(domain(&machine), &disk)
    };
    add('e', &images[0]).unwrap_err();
    add('f', &images[1]).unwrap();
    let kind = |number| slot(&machine, number).0.read(8, conf_space::Width::Four);
    assert_eq!([0, 1, 4].map(kind), [4, 0, 2]);
}

#[test]
fn a_guest_that_runs_gets_no_further_disk_and_a_pv_guest_none() {
    let house = house("");
    let image = image(16);
    let disk = disk('e', image.path());
    let pv = house.machine.create_domain("pv", DomainKind::Pv).unwrap();
    let running = domain(&create(&house));
    house.machine.unpause_domain(running).unwrap();
    let paused = domain(&create(&house));
    house.machine.unpause_domain(paused).unwrap();
    house.machine.pause_domain(paused).unwrap();
    for domain in [pv, running, paused] {
        house.machine.virtio_disk_add(domain, &disk).unwrap_err();
        assert!(!is_locked(&image));
    }
}

#[test]
fn disks_come_and_go_while_the_daemon_is_killed() {
    let house = house("");
    let image = image(16);
    for pause in 0..6 {
        let machine = create(&house);
        let id = domain(&machine);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(pause));
                house.kill();
                house.start();
            });
            house
                .machine
                .virtio_disk_add(id, &disk('e', image.path()))
                .unwrap();
        });
        house.machine.unpause_domain(id).unwrap();
        let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 0)).unwrap();
        driver.write_blocks(1, &[pause as u8; 512]).unwrap();
        drop(driver);
        machine.let_go();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(pause));
                house.kill();
                house.start();
            });
            house.machine.destroy_domain(id).unwrap();
        });
        assert_eq!(nodes_below(&house, "virtio_disk"), 0);
    }
}
