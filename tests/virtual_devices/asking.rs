//! What operators see of the devices, and devices that they add.

use pcibackd::config::VirtioDevice;
use pcibackd::control::protocol::{Request, Response};
use pcibackd::control::virtio::VirtioGuest;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::DeviceType;
use xenbus::sim::DomainKind;

use crate::common::{GuestHal, Machine};
use crate::house::{House, until};
use crate::transports::{Modern, Reach};
use crate::{house, with_rng};

fn device(text: &str) -> VirtioDevice {
    let text = format!("[[guest.any.virtio]]\n{}", text.replace(", ", "\n"));
    let config: pcibackd::config::Config = text.parse().unwrap();
    config.guest["any"].virtio[0].clone()
}

pub fn add(house: &House, guest: &str, text: &str) -> Result<Vec<String>, String> {
    placed(house.ask(&Request::AddVirtio {
        guest: guest.to_owned(),
        device: Box::new(device(text)),
    }))
}

pub fn wait(house: &House, guest: &str) -> Result<Vec<String>, String> {
    let guest = guest.to_owned();
    placed(house.ask(&Request::AwaitVirtio { guest }))
}

fn placed(response: Response) -> Result<Vec<String>, String> {
    match response {
        Response::Placed { places } => Ok(places),
        Response::Failed { message } => Err(message),
        other => panic!("{other:?}"),
    }
}

pub fn shown(house: &House, guest: Option<&str>) -> Vec<VirtioGuest> {
    let guest = guest.map(str::to_owned);
    match house.ask(&Request::Virtio { guest }) {
        Response::Virtio { guests } => guests,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_that_is_paused_gets_what_is_added_besides_what_it_was_to_have() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = format!("type = \"blk\", path = \"{}\"", image.path().display());
    let house = with_rng("");
    let domain = house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    assert_eq!(wait(&house, "web").unwrap(), ["slot 1f"]);
    assert_eq!(add(&house, "web", &disk).unwrap(), ["slot 1e"]);
    let taken = add(&house, "web", "type = \"rng\", slot = \"1f\"").unwrap_err();
    assert!(taken.contains("slot 1f"), "{taken}");
    assert_eq!(add(&house, "web", "type = \"rng\"").unwrap(), ["slot 1d"]);
    let number = domain.to_string();
    let error = add(&house, &number, "type = \"blk\", path = \"/none\"").unwrap_err();
    assert!(error.contains("/none"), "{error}");
    assert_eq!(wait(&house, &number).unwrap().len(), 3);
    let machine = Machine::new(&house.machine, domain);
    house.machine.unpause_domain(domain).unwrap();
    let ids = [0xf8, 0xf0, 0xe8].map(|function| machine.vcpu().config_read(function, 0, 4));
    assert_eq!(ids, [Ok(0x1005_1af4), Ok(0x1001_1af4), Ok(0x1005_1af4)]);
}

#[test]
fn a_guest_with_slots_of_virtio_mmio_gets_what_is_added_and_keeps_what_it_had() {
    let house = with_rng("slot = \"3\"\ntransport = \"mmio\"\n");
    house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    assert_eq!(wait(&house, "web").unwrap(), ["mmio slot 3"]);
    assert_eq!(add(&house, "web", "type = \"rng\"").unwrap(), ["slot 1f"]);
    let more = "type = \"rng\", transport = \"mmio\"";
    assert_eq!(add(&house, "web", more).unwrap(), ["mmio slot 0"]);
    assert_eq!(wait(&house, "web").unwrap().len(), 3);
}

#[test]
fn devices_are_added_to_no_guest_that_runs_or_is_none() {
    let house = with_rng("");
    for (name, kind) in [
        ("running", DomainKind::Hvm),
        ("paused", DomainKind::Hvm),
        ("pv", DomainKind::Pv),
    ] {
        let domain = house.machine.create_domain(name, kind).unwrap();
        house.machine.unpause_domain(domain).unwrap();
        if name == "paused" {
            house.machine.pause_domain(domain).unwrap();
        }
    }
    for (guest, why) in [
        ("running", "runs already"),
        ("paused", "runs already"),
        ("pv", "no HVM guest"),
        ("none", "no guest none"),
    ] {
        let error = add(&house, guest, "type = \"rng\"").unwrap_err();
        assert!(error.contains(why), "{guest}: {error}");
    }
    assert_eq!(shown(&house, None), []);
}

#[test]
fn why_a_guest_has_no_devices_is_told_to_who_waits_for_them() {
    let house = house("[[guest.web.virtio]]\ntype = \"blk\"\npath = \"/does/not/exist\"\n");
    house.machine.create_domain("web", DomainKind::Hvm).unwrap();
    let error = wait(&house, "web").unwrap_err();
    assert!(error.contains("/does/not/exist"), "{error}");
    let guest = &shown(&house, Some("web"))[0];
    assert_eq!((guest.state.as_str(), guest.devices.len()), ("refused", 0));
    assert!(guest.reason.as_ref().unwrap().contains("/does/not/exist"));
}

#[test]
fn queues_and_features_are_shown_as_the_driver_has_set_them() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = format!("type = \"blk\"\npath = \"{}\"", image.path().display());
    let house = house(&format!("[[guest.web.virtio]]\n{disk}"));
    let machine = crate::guest(&house);
    let fresh = shown(&house, Some("web")).remove(0).devices.remove(0);
    assert!(fresh.driven.unwrap().status.is_empty());
    let modern = Modern::find(&machine, DeviceType::Block, Reach::Bars);
    let mut driver = VirtIOBlk::<GuestHal, _>::new(modern).unwrap();
    driver.write_blocks(0, &[1; 512]).unwrap();
    until("the request is given back", || {
        let guest = shown(&house, Some("web")).remove(0);
        let driven = guest.devices[0].driven.clone().unwrap();
        assert_eq!(driven.interface, "modern");
        assert!(driven.status.contains(&"DRIVER_OK".to_owned()));
        assert!(driven.features.contains(&"VERSION_1".to_owned()));
        let queue = &driven.queues[0];
        assert!(queue.enabled && queue.descriptors != 0);
        queue.available == Some(1) && queue.used == Some(1) && queue.in_flight == 0
    });
}
