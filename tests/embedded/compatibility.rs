//! What toolstacks and frontends rely on, where no other test does: docs/compatibility.md says which is tested where.

use std::collections::BTreeSet;

use conf_space::Bdf;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{FunctionBuilder, INTX_ONLY, MSI_ONLY, NVME};
use xenbus::pciif::{Command, PciError, PciOp};
use xenbus::sim::{DomainKind, ToolstackError};
use xenbus::xenstore::Store;

use crate::house::{House, at, until};

/// As many devices, from bus 0x40 on.
fn cards(house: &House, count: u8) -> Vec<Bdf> {
    let cards: Vec<Bdf> = (0..count)
        .map(|index| Bdf::from_devfn(0, 0x40 + index, 0))
        .collect();
    for card in &cards {
        house
            .bus
            .add(FunctionBuilder::new(*card, 0x10ec, 0x8139, 0x02_0000).memory_bar(0, 0x1000));
    }
    house.hide(&cards);
    cards
}

#[test]
fn w2_commands_that_are_none_are_answered_as_such() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    for cmd in [6, 7, 8, 9, 11, 12, 255, 1 << 16, u32::MAX] {
        let op = PciOp {
            cmd,
            value: 0x55,
            ..PciOp::default()
        };
        let answer = frontend.operate(&op).unwrap();
        assert_eq!(answer.err, PciError::NOT_IMPLEMENTED.0, "{cmd}");
        assert_eq!(answer.value, 0x55, "{cmd}");
    }
}

#[test]
fn o2_disabling_is_answered_with_the_line_that_the_device_has_then() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    for cmd in [Command::DisableMsi, Command::DisableMsix] {
        let op = PciOp {
            cmd: cmd as u32,
            ..PciOp::default()
        };
        let answer = frontend.operate(&op).unwrap();
        assert_eq!((answer.err, answer.value), (0, 18), "{cmd}");
    }
}

#[test]
fn x1_the_backend_adds_just_the_nodes_that_frontends_and_toolstacks_know() {
    let house = House::new(&[NVME]);
    // The second is not hidden.
    let (domain, _frontend) = house.boot(&[NVME, MSI_ONLY]);
    let known = [
        "root_num", "root-0", "vdev-0", "state", "state-0", "state-1", "error-1",
    ];
    let by_the_toolstack = [
        "frontend",
        "frontend-id",
        "online",
        "domain",
        "num_devs",
        "dev-0",
        "key-0",
        "opts-0",
        "dev-1",
        "key-1",
        "opts-1",
    ];
    let nodes: BTreeSet<String> = house
        .store()
        .directory(house.backend(domain, "").trim_end_matches('/'))
        .unwrap()
        .into_iter()
        .collect();
    for node in &nodes {
        let node = node.as_str();
        assert!(
            known.contains(&node) || by_the_toolstack.contains(&node),
            "{node}"
        );
    }
    for node in known {
        assert!(nodes.contains(node), "{node}");
    }
}

#[test]
fn x6_a_device_for_which_there_is_no_place_stays_free() {
    let house = House::new(&[]);
    let cards = cards(&house, 33);
    let domain = house.guest(&cards);
    house.until_node(domain, "state-32", "6");
    let why = house.node(domain, "error-32").unwrap();
    assert!(why.contains("cannot be placed"), "{why}");
    house.until_node(domain, "state-31", "3");
    assert_eq!(house.phase(cards[32]), Some(Phase::Hidden));
    house.unhide(cards[32]);
}

#[test]
fn v5_each_bus_is_published_once_whatever_comes_and_whoever_restarts() {
    let house = House::new(&[NVME, INTX_ONLY]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    house.restart();
    house.while_following(&mut frontend, || house.attach(domain, INTX_ONLY));
    assert_eq!(house.node(domain, "root_num").as_deref(), Some("1"));
    assert_eq!(house.node(domain, "root-0").as_deref(), Some("0000:00"));
    assert_eq!(frontend.conf_read(at(1, 0), 0, 4).unwrap(), 0x8139_10ec);
}

#[test]
fn l8_an_hvm_guests_devices_come_and_go_while_it_runs() -> Result<(), ToolstackError> {
    let house = House::new(&[NVME, INTX_ONLY]);
    let domain = house.machine.create_domain("hvm", DomainKind::Hvm).unwrap();
    house.attach(domain, NVME)?;
    house.machine.unpause_domain(domain)?;
    house.until_node(domain, "state-0", "3");
    house.attach(domain, INTX_ONLY)?;
    until("it has the second", || {
        house.phase(INTX_ONLY) == Some(Phase::Assigned)
    });
    house.detach(domain, INTX_ONLY)?;
    house.until_free(INTX_ONLY);
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
    Ok(())
}
