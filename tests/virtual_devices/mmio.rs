//! Devices in slots of virtio-mmio.

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceType, Transport};
use xenbus::device_model::{IntxPin, IoRange, IoSpace};

use crate::common::{GuestHal, Machine};
use crate::transports::{Block, Mmio};
use crate::{LONG, draw, guest, house};

const BASE: u64 = 0xfe70_0000;

pub fn slot(machine: &Machine, number: u64) -> Mmio {
    let address = BASE + 0x200 * number;
    Mmio(Block::new(machine, IoSpace::Memory, address))
}

/// The interrupt pins that slots have: GSI 16 and on.
fn line(number: u8) -> IntxPin {
    IntxPin {
        device: number / 4,
        pin: number % 4,
    }
}

fn devices(of: &[&str]) -> String {
    let of = of.iter();
    of.map(|keys| format!("[[guest.web.virtio]]\ntransport = \"mmio\"\n{keys}\n"))
        .collect()
}

#[test]
fn any_device_works_in_any_slot_and_tells_of_it_by_the_slot_s_line() {
    let house = house(&devices(&[
        "type = \"rng\"\nslot = \"5\"\nversion = 1",
        "type = \"rng\"",
    ]));
    let machine = guest(&house);
    for number in [5, 0] {
        let transport = slot(&machine, number.into());
        assert_eq!(transport.device_type(), DeviceType::EntropySource);
        let mut driver = VirtIORng::<GuestHal, _>::new(transport).unwrap();
        driver.enable_interrupts();
        draw(&mut driver);
        let line = line(number);
        assert!(machine.guest().wait_intx(line, true, LONG));
        let _ = driver.ack_interrupt();
        assert!(machine.guest().wait_intx(line, false, LONG));
    }
    let version = |number| slot(&machine, number).0.read(4, conf_space::Width::Four);
    assert_eq!((version(5), version(0)), (1, 2));
}

#[test]
fn all_slots_are_there_and_those_without_a_device_say_so() {
    let house = house(&devices(&["type = \"rng\"\nslot = \"3\""]));
    let machine = guest(&house);
    for number in 0..7 {
        let kind = slot(&machine, number).0.read(8, conf_space::Width::Four);
        assert_eq!(kind, if number == 3 { 4 } else { 0 });
    }
    let row = IoRange {
        space: IoSpace::Memory,
        first: BASE,
        last: BASE + 7 * 0x200 - 1,
    };
    assert_eq!(machine.row(), [row]);
    assert_eq!(machine.claims(), []);
}

#[test]
fn a_guest_may_have_devices_on_both() {
    let mmio = devices(&["type = \"rng\""]);
    let house = house(&format!("[[guest.web.virtio]]\ntype = \"rng\"\n{mmio}"));
    let machine = guest(&house);
    assert_eq!(machine.vcpu().config_read(0xf8, 0, 4), Ok(0x1005_1af4));
    assert_eq!(slot(&machine, 0).device_type(), DeviceType::EntropySource);
}

#[test]
fn a_disk_of_either_version_keeps_its_data_while_the_daemon_is_killed() {
    for version in [1, 2] {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 10).unwrap();
        let path = image.path().display();
        let disk = format!("type = \"blk\"\nversion = {version}\npath = \"{path}\"");
        let house = house(&devices(&[&disk]));
        let machine = guest(&house);
        let transport = slot(&machine, 0);
        let mut driver = VirtIOBlk::<GuestHal, _>::new(transport).unwrap();
        for sector in 0..128 {
            if sector % 40 == 0 {
                house.kill();
                house.start();
            }
            driver.write_blocks(sector, &[sector as u8; 512]).unwrap();
        }
        driver.flush().unwrap();
        let written = std::fs::read(image.path()).unwrap();
        let mut sectors = written.chunks(512).enumerate();
        assert!(sectors.all(|(sector, data)| data == [sector as u8; 512]));
    }
}
