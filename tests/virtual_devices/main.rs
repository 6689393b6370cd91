//! Virtio devices of HVM guests, end to end on the embedded Xen: a driver in the guest, whose CPUs stop with every
//! access until the daemon has answered.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod asking;
mod backends;
mod changes;
mod common;
#[path = "../embedded/house.rs"]
#[allow(dead_code)]
mod house;
mod missing;
mod mmio;
#[path = "../embedded/mortal.rs"]
#[allow(dead_code)]
mod mortal;
mod net;
mod qemu;
mod storage;
// The drivers are those that the transports are tested with.
#[path = "../../virtio/tests/drivers/transports.rs"]
#[allow(dead_code)]
mod transports;

mod xl_disks;

use std::thread;
use std::time::Duration;

use conf_space::Width::{Four, Two};
use virtio::Features;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::pci::bus::{BarInfo, PciRoot};
use virtio_drivers::transport::{DeviceType, Transport};
use xenbus::device_model::{IntxPin, IoSpace};
use xenbus::sim::{DomainKind, MachineOptions};

use common::{GuestHal, Machine};
use house::{House, until};
use transports::{Block, FUNCTION, Legacy, Modern, Reach, place_bars};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(50);

fn house(devices: &str) -> House {
    House::with(devices.parse().unwrap(), MachineOptions::default(), &[])
}

fn with_rng(settings: &str) -> House {
    house(&format!("[[guest.web.virtio]]\ntype = \"rng\"\n{settings}"))
}

/// A guest of this name, not yet started, and its devices there.
fn guest(house: &House) -> Machine {
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    let machine = Machine::new(&house.machine, domain);
    // As `pciback create` does: those of a guest that are served first are no sign of the others.
    asking::wait(house, "web").unwrap();
    house.machine.unpause_domain(domain).unwrap();
    machine
}

fn draw<T: Transport>(driver: &mut VirtIORng<GuestHal, T>) {
    for length in [1, 100, 5000] {
        let mut data = vec![0; length];
        assert_eq!(driver.request_entropy(&mut data).unwrap(), length);
        assert!(length < 100 || data.iter().any(|byte| *byte != 0));
    }
}

fn use_rng<T: Transport>(transport: T) {
    let mut driver = VirtIORng::<GuestHal, T>::new(transport).unwrap();
    draw(&mut driver);
}

#[test]
fn a_modern_driver_draws_random_numbers_over_pci() {
    for settings in ["", "layout = \"compact\"\nmode = \"modern\""] {
        let house = with_rng(settings);
        let machine = guest(&house);
        for reach in [Reach::Bars, Reach::Window] {
            use_rng(Modern::find(&machine, DeviceType::EntropySource, reach));
        }
    }
}

#[test]
fn packed_rings_are_offered_where_the_operator_wants_them() {
    for (settings, offered) in [("", false), ("packed = true", true)] {
        let house = with_rng(settings);
        let machine = guest(&house);
        let mut modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
        let features = Features::from_bits_retain(modern.read_device_features());
        assert_eq!(features.contains(Features::RING_PACKED), offered);
    }
}

#[test]
fn interrupts_reach_the_guest_by_line_and_by_message() {
    let house = with_rng("");
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
    driver.enable_interrupts();
    draw(&mut driver);
    let pin = IntxPin {
        device: 0x1f,
        pin: 0,
    };
    assert!(machine.guest().wait_intx(pin, true, LONG));
    let _ = driver.ack_interrupt();
    assert!(machine.guest().wait_intx(pin, false, LONG));
    drop(driver);

    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let bars = PciRoot::new(machine.clone()).bars(FUNCTION).unwrap();
    let (table, _) = bars[1].as_ref().unwrap().memory_address_size().unwrap();
    let entry = Block::new(&machine, IoSpace::Memory, table + 16);
    for (offset, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x4041), (12, 0)] {
        entry.write(offset, Four, value);
    }
    machine.write_config(0x42, Two, 0x8000);
    let common = modern.common.clone();
    let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
    common.write(0x16, Two, 0);
    common.write(0x1a, Two, 1);
    driver.enable_interrupts();
    draw(&mut driver);
    let message = machine.guest().take_message(LONG, |_| true).unwrap();
    assert_eq!((message.address, message.data), (0xfee0_1000, 0x4041));
    assert!(!machine.guest().wait_intx(pin, true, SHORT));
}

#[test]
fn a_legacy_driver_finds_the_ports_of_bar_0() {
    let house = with_rng("mode = \"legacy\"");
    let machine = guest(&house);
    let Some(BarInfo::IO { address, .. }) = place_bars(&machine)[0] else {
        panic!("BAR 0 is no I/O");
    };
    let block = Block::new(&machine, IoSpace::Port, address.into());
    let mut legacy = Legacy::new(block, DeviceType::EntropySource, false);
    assert_eq!(legacy.max_queue_size(0), 64);
    assert_eq!(legacy.max_queue_size(1), 0);
}

#[test]
fn each_device_is_in_its_slot_and_nothing_in_the_others() {
    let rng = "[[guest.web.virtio]]\ntype = \"rng\"\n";
    let house = house(&format!("{rng}{rng}slot = \"1e\"\n"));
    let machine = guest(&house);
    for slot in 2..0x20 {
        let expected = if slot >= 0x1e { 0x1005_1af4 } else { u32::MAX };
        assert_eq!(machine.vcpu().config_read(slot << 3, 0, 4), Ok(expected));
    }
}

#[test]
fn a_guest_that_runs_already_gets_no_devices() {
    let house = with_rng("");
    house.kill();
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    house.machine.unpause_domain(domain).unwrap();
    house.start();
    let machine = Machine::new(&house.machine, domain);
    assert_eq!(machine.vcpu().config_read(0xf8, 0, 4), Ok(u32::MAX));
    assert!(!machine.is_served());
}

#[test]
fn guests_of_other_names_and_kinds_get_none() {
    let house = with_rng("");
    for (name, kind) in [("other", DomainKind::Hvm), ("web", DomainKind::Pv)] {
        let domain = house.machine.create_domain(name, kind).unwrap();
        let machine = Machine::new(&house.machine, domain);
        // By then the daemon has seen both.
        drop(guest(&house));
        assert!(!machine.is_served());
    }
}

#[test]
fn a_guest_that_is_gone_can_be_forgotten_by_xen() {
    let house = with_rng("");
    let machine = guest(&house);
    use_rng(Modern::find(
        &machine,
        DeviceType::EntropySource,
        Reach::Bars,
    ));
    machine.let_go();
    let domain = machine.guest().domain();
    house.machine.destroy_domain(domain).unwrap();
    until("nothing of it is mapped", || {
        house.machine.held_by_dom0(domain).is_none()
    });
    let records = house.machine.run_dir().join("virtual");
    until("its records are gone", || {
        std::fs::read_dir(&records).unwrap().count() == 0
    });
}

#[test]
fn a_cpu_that_waits_while_the_daemon_is_killed_is_answered_by_the_next() {
    let house = with_rng("");
    let machine = guest(&house);
    for _ in 0..3 {
        house.kill();
        let waiting = machine.clone();
        let cpu = thread::spawn(move || waiting.vcpu().config_read(0xf8, 0, 4));
        thread::sleep(SHORT);
        assert!(!cpu.is_finished());
        house.start();
        assert_eq!(cpu.join().unwrap(), Ok(0x1005_1af4));
    }
    use_rng(Modern::find(
        &machine,
        DeviceType::EntropySource,
        Reach::Bars,
    ));
}

#[test]
fn a_driver_does_not_notice_that_the_daemon_was_killed() {
    let house = with_rng("");
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::EntropySource, Reach::Bars);
    let mut driver = VirtIORng::<GuestHal, _>::new(modern).unwrap();
    let claims = machine.claims();
    for pause in 0..8 {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(pause));
                house.kill();
                house.start();
            });
            for _ in 0..20 {
                draw(&mut driver);
            }
        });
        draw(&mut driver);
        assert_eq!(machine.claims(), claims);
    }
}

#[test]
fn a_guest_keeps_its_devices_whatever_the_configuration_says_later() {
    let mut house = with_rng("slot = \"1f\"");
    let machine = guest(&house);
    let rng = |slot| format!("[[guest.web.virtio]]\ntype = \"rng\"\nslot = \"{slot}\"");
    for config in [String::new(), rng("10")] {
        house.kill();
        house.configure(config.parse().unwrap());
        house.start();
        let seen = [0xf8, 0x80].map(|function| machine.vcpu().config_read(function, 0, 4));
        assert_eq!(seen, [Ok(0x1005_1af4), Ok(u32::MAX)]);
    }
    use_rng(Modern::find(
        &machine,
        DeviceType::EntropySource,
        Reach::Bars,
    ));
}

#[test]
fn a_disk_keeps_what_is_written_while_the_daemon_is_killed_again_and_again() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().display();
    let disk = format!("type = \"blk\"\npath = \"{path}\"\nserial = \"web-0\"");
    let house = house(&format!("[[guest.web.virtio]]\n{disk}"));
    let machine = guest(&house);
    let modern = Modern::find(&machine, DeviceType::Block, Reach::Bars);
    let mut driver = VirtIOBlk::<GuestHal, _>::new(modern).unwrap();
    assert_eq!(driver.capacity(), 2048);
    let mut serial = [0; 20];
    driver.device_id(&mut serial).unwrap();
    assert_eq!(&serial[..5], b"web-0");
    let content = |sector: usize| [sector as u8 ^ (sector >> 8) as u8; 512];
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            for pause in 0..6 {
                thread::sleep(Duration::from_millis(pause));
                house.kill();
                house.start();
            }
        });
        for sector in 0..2048 {
            driver.write_blocks(sector, &content(sector)).unwrap();
        }
        killer.join().unwrap();
    });
    driver.flush().unwrap();
    for sector in 0..2048 {
        let mut read = [0; 512];
        driver.read_blocks(sector, &mut read).unwrap();
        assert_eq!(read, content(sector));
    }
    let written = std::fs::read(image.path()).unwrap();
    let sectors = written.chunks(512).enumerate();
    assert!(
        sectors
            .into_iter()
            .all(|(sector, data)| data == content(sector))
    );
}

#[test]
fn a_guest_whose_disk_is_missing_gets_no_devices_at_all() {
    let rng = "[[guest.web.virtio]]\ntype = \"rng\"\n";
    let house = house(&format!(
        "{rng}[[guest.web.virtio]]\ntype = \"blk\"\npath = \"/does/not/exist\"\n\
         [[guest.other.virtio]]\ntype = \"rng\""
    ));
    let create = |name| {
        let domain = house.machine.create_domain(name, DomainKind::Hvm).unwrap();
        Machine::new(&house.machine, domain)
    };
    let web = create("web");
    let other = create("other");
    until("the other guest has its device", || other.is_served());
    assert!(!web.is_served());
    // Nor does it get them later, when they would come as a surprise.
    house.machine.unpause_domain(web.guest().domain()).unwrap();
    house.kill();
    house.start();
    assert_eq!(other.vcpu().config_read(0xf8, 0, 4), Ok(0x1005_1af4));
    assert!(!web.is_served());
    let records = house.machine.run_dir().join("virtual");
    assert_eq!(std::fs::read_dir(&records).unwrap().count(), 1);
}
