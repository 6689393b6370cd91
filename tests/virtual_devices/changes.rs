//! Devices come and go while others do, and while storage does not answer.

use std::thread;
use std::time::{Duration, Instant};

use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::device::rng::VirtIORng;
use xenbus::sim::{DomainKind, MachineOptions, ToolstackError, VirtioDisk};
use xenbus::xenstore::Store;
use xenbus::{DomId, Xen, XenbusState};

use crate::asking::{add, wait};
use crate::common::{GuestHal, Machine};
use crate::house::{House, until};
use crate::mmio::slot;
use crate::storage::Storage;
use crate::xl_disks::{disk, domain, image, is_locked};
use crate::{SHORT, draw, house};

fn create(house: &House, name: &str) -> Machine {
    let domain = house.machine.create_domain(name, DomainKind::Hvm).unwrap();
    Machine::new(&house.machine, domain)
}

fn state_of(house: &House, domain: DomId, device: u32) -> XenbusState {
    let mut store = house.machine.connect_xenstore().unwrap();
    let path = format!("/local/domain/0/backend/virtio_disk/{domain}/{device}/state");
    store.read_state(&path).unwrap()
}

#[test]
fn storage_that_does_not_answer_holds_up_its_own_guest_alone() {
    let Some(storage) = Storage::mount() else {
        return;
    };
    storage.stall_opens();
    let options = MachineOptions {
        toolstack_timeout: Duration::from_secs(1),
        ..MachineOptions::default()
    };
    let config = "[[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"";
    let house = House::with(config.parse().unwrap(), options, &[]);
    let web = create(&house, "web");
    assert_eq!(wait(&house, "web").unwrap(), ["mmio slot 0"]);
    thread::scope(|scope| {
        let hanging = scope.spawn(|| {
            let disk = disk('e', &storage.path());
            house.machine.virtio_disk_add(domain(&web), &disk)
        });
        until("the image is being opened", || storage.waiting() > 0);
        // What the guest has, it keeps.
        let kind = |number| slot(&web, number).0.read(8, conf_space::Width::Four);
        assert_eq!([0, 1].map(kind), [4, 0]);
        let image = image(16);
        for _ in 0..3 {
            let other = create(&house, "other");
            let begun = Instant::now();
            let disk = disk('e', image.path());
            house
                .machine
                .virtio_disk_add(domain(&other), &disk)
                .unwrap();
            assert!(begun.elapsed() < Duration::from_secs(1));
            house.machine.unpause_domain(domain(&other)).unwrap();
            let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&other, 0)).unwrap();
            driver.write_blocks(1, &[7; 512]).unwrap();
            drop(driver);
            other.let_go();
            house.machine.destroy_domain(domain(&other)).unwrap();
        }
        let refused = hanging.join().unwrap();
        assert!(matches!(refused, Err(ToolstackError::DiskNotReady { .. })));
        assert_eq!(storage.waiting(), 1, "nobody else waits there");
        web.let_go();
        house.machine.destroy_domain(domain(&web)).unwrap();
        until("the guest is forgotten", || {
            house.machine.held_by_dom0(domain(&web)).is_none()
        });
    });
    storage.go_on();
    let records = house.machine.run_dir().join("virtual");
    until("its record is gone", || {
        std::fs::read_dir(&records).unwrap().count() == 0
    });
}

#[test]
fn devices_that_several_add_at_once_are_all_there() {
    for _ in 0..5 {
        let house = house("");
        let image = image(16);
        let machine = create(&house, "web");
        thread::scope(|scope| {
            let operators: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| add(&house, "web", "type = \"rng\"").unwrap()))
                .collect();
            scope.spawn(|| {
                // Each makes the daemon look at all guests.
                for _ in 0..5 {
                    let domain = house.machine.create_domain("x", DomainKind::Hvm).unwrap();
                    house.machine.destroy_domain(domain).unwrap();
                }
            });
            let disk = disk('e', image.path());
            house
                .machine
                .virtio_disk_add(domain(&machine), &disk)
                .unwrap();
            let operators = operators
                .into_iter()
                .flat_map(|thread| thread.join().unwrap());
            let mut places: Vec<_> = operators.collect();
            places.sort();
            assert_eq!(places, ["slot 1d", "slot 1e", "slot 1f"]);
        });
        assert_eq!(wait(&house, "web").unwrap().len(), 4);
        house.machine.unpause_domain(domain(&machine)).unwrap();
        let ids = [0xf8, 0xf0, 0xe8].map(|function| machine.vcpu().config_read(function, 0, 4));
        assert_eq!(ids, [Ok(0x1005_1af4); 3]);
        let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 0)).unwrap();
        driver.write_blocks(1, &[7; 512]).unwrap();
    }
}

#[test]
fn a_disk_is_only_said_to_be_there_when_it_is_served() {
    let house = house("");
    let image = image(16);
    let machine = create(&house, "web");
    let (id, xvde) = (domain(&machine), disk('e', image.path()));
    house.machine.virtio_disk_add(id, &xvde).unwrap();
    // As a daemon leaves it that is killed before it says so.
    house.kill();
    let mut store = house.machine.connect_xenstore().unwrap();
    let path = format!(
        "/local/domain/0/backend/virtio_disk/{id}/{}/state",
        xvde.device
    );
    store.write(&path, "1").unwrap();
    let taken = virtio::blk::Image::open(image.path(), false, false).unwrap();
    house.start();
    thread::sleep(4 * SHORT);
    assert_eq!(state_of(&house, id, xvde.device), XenbusState::Initialising);
    drop(taken);
    until("it is there", || {
        state_of(&house, id, xvde.device) == XenbusState::InitWait
    });
    let kind = slot(&machine, 0).0.read(8, conf_space::Width::Four);
    assert_eq!(kind, 2);
}

#[test]
fn a_read_under_way_when_another_disk_goes_is_done_once() {
    let Some(storage) = Storage::mount() else {
        return;
    };
    let house = house("[[guest.web.virtio]]\ntype = \"rng\"\ntransport = \"mmio\"");
    let others = [image(16), image(16)];
    let machine = create(&house, "web");
    let id = domain(&machine);
    let slow = VirtioDisk {
        read_only: true,
        ..disk('e', &storage.path())
    };
    house.machine.virtio_disk_add(id, &slow).unwrap();
    for (letter, image) in ['f', 'g'].into_iter().zip(&others) {
        let disk = disk(letter, image.path());
        house.machine.virtio_disk_add(id, &disk).unwrap();
    }
    house.machine.unpause_domain(id).unwrap();
    let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 1)).unwrap();
    let mut rng = VirtIORng::<GuestHal, _>::new(slot(&machine, 0)).unwrap();
    // Should this fail, it answers before the driver waits for the device's reset.
    let storage = storage;
    // The daemon waits for it, or not for ever: then the next session does.
    for (device, other, is_short) in [(51792, &others[0], true), (51808, &others[1], false)] {
        storage.stall_reads();
        let before = storage.reads();
        let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
        let mut data = [0; 512];
        // SAFETY: all three live, and are left alone, until the read is completed below.
        let token = unsafe { driver.read_blocks_nb(3, &mut request, &mut data, &mut response) };
        let token = token.unwrap();
        until("the read is under way", || storage.waiting() == 1);
        thread::scope(|scope| {
            if is_short {
                scope.spawn(|| {
                    thread::sleep(SHORT);
                    storage.go_on();
                });
            }
            house.machine.virtio_disk_remove(id, device).unwrap();
            assert!(!is_locked(other));
        });
        if !is_short {
            thread::sleep(4 * SHORT);
            assert_eq!(storage.reads(), before + 1, "the read is begun anew");
            storage.go_on();
        }
        until("the read is answered", || driver.peek_used() == Some(token));
        // SAFETY: as above.
        unsafe { driver.complete_read_blocks(token, &request, &mut data, &mut response) }.unwrap();
        assert_eq!(data, [0x5a; 512]);
        assert_eq!(storage.reads(), before + 1);
        draw(&mut rng);
        let mut data = [0; 512];
        driver.read_blocks(1, &mut data).unwrap();
    }
}

#[test]
fn a_driver_that_resets_a_device_waits_for_its_requests_and_other_cpus_do_not() {
    let Some(storage) = Storage::mount() else {
        return;
    };
    let house = house("");
    let machine = create(&house, "web");
    let id = domain(&machine);
    house
        .machine
        .virtio_disk_add(id, &disk('e', &storage.path()))
        .unwrap();
    house.machine.unpause_domain(id).unwrap();
    let mut driver = VirtIOBlk::<GuestHal, _>::new(slot(&machine, 0)).unwrap();
    let storage = storage;
    storage.stall_reads();
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut data = [0; 512];
    // SAFETY: all three live until the end of the test, which nothing of the device outlives.
    unsafe { driver.read_blocks_nb(3, &mut request, &mut data, &mut response) }.unwrap();
    until("the read is under way", || storage.waiting() == 1);
    const STATUS: u64 = 0xfe70_0070;
    let second = machine.guest().vcpu(1);
    thread::scope(|scope| {
        let reset = scope.spawn(|| machine.vcpu().memory_write(STATUS, 4, 0));
        for _ in 0..20 {
            let begun = Instant::now();
            assert_eq!(second.memory_read(0xfe70_0000, 4), Ok(0x7472_6976));
            assert!(begun.elapsed() < Duration::from_millis(500));
        }
        assert!(!reset.is_finished());
        storage.go_on();
        reset.join().unwrap().unwrap();
        assert_eq!(second.memory_read(STATUS, 4), Ok(0));
    });
}
