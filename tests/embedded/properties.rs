//! Whatever a guest writes, into its page or into xenstore: the daemon lives on, its session stays sane, and others are served.

use std::time::Duration;

use pcibackd::config::Config;
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NIC_VF0, NVME};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use xenbus::pciif::{MsixEntry, PciOp};
use xenbus::sim::{Frontend, MachineOptions, Variant};
use xenbus::xenstore::Store;
use xenbus::{DomId, PciDevice};

use crate::house::{House, at};

const FIRST: PciDevice = at(0, 0);

/// A guest that nobody disturbs.
fn bystander(house: &House) -> (DomId, Frontend) {
    house.boot(&[INTX_ONLY])
}

fn is_served(frontend: &mut Frontend) -> Result<(), TestCaseError> {
    let id = frontend.conf_read(FIRST, 0, 4);
    prop_assert_eq!(
        id.map_err(|error| TestCaseError::fail(error.to_string()))?,
        0x8139_10ec
    );
    Ok(())
}

fn destroy(house: &House, domain: DomId, frontend: Frontend) {
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
}

fn patient_for(time: Duration, hidden: &[conf_space::Bdf]) -> House {
    let options = MachineOptions {
        toolstack_timeout: time,
        ..MachineOptions::default()
    };
    House::with(Config::default(), options, hidden)
}

/// Mostly what makes sense, so that not all is refused at the door.
fn operation() -> impl Strategy<Value = PciOp> {
    let command = prop_oneof![8 => 0..11u32, 1 => any::<u32>()];
    let devfn =
        prop_oneof![8 => Just(0u32), 4 => (0..4u32).prop_map(|slot| slot << 3), 1 => any::<u32>()];
    let offset = prop_oneof![8 => 0..0x100i32, 2 => 0..0x1000, 1 => any::<i32>()];
    let size = prop_oneof![8 => prop::sample::select(vec![1, 2, 4]), 1 => any::<i32>()];
    let small = || prop_oneof![4 => 0..6u32, 2 => Just(u32::MAX), 2 => any::<u32>()];
    let entries = prop::collection::vec((any::<u16>(), 0..5u16), 0..5);
    (command, devfn, offset, size, small(), small(), entries).prop_map(
        |(cmd, devfn, offset, size, value, info, entries)| {
            let mut op = PciOp {
                cmd,
                devfn,
                offset,
                size,
                value,
                info,
                ..PciOp::default()
            };
            for (slot, (vector, entry)) in op.msix_entries.iter_mut().zip(entries) {
                *slot = MsixEntry { vector, entry };
            }
            op
        },
    )
}

#[test]
fn any_operations_are_answered_and_leave_the_devices_whole() {
    let devices = [NVME, MSI_ONLY, NIC_VF0];
    let house = patient_for(
        Duration::from_millis(5),
        &[INTX_ONLY, NVME, MSI_ONLY, NIC_VF0],
    );
    let (_, mut other) = bystander(&house);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(16));
    let operations = prop::collection::vec(operation(), 1..60);
    let other = std::cell::RefCell::new(&mut other);
    runner
        .run(&operations, |operations| {
            let (domain, mut frontend) = house.boot(&devices);
            for op in &operations {
                let answer = frontend.operate(op);
                let answer = answer.map_err(|error| TestCaseError::fail(error.to_string()))?;
                prop_assert_eq!((answer.cmd, answer.offset), (op.cmd, op.offset));
            }
            is_served(&mut other.borrow_mut())?;
            destroy(&house, domain, frontend);
            devices.iter().for_each(|bdf| house.until_free(*bdf));
            Ok(())
        })
        .unwrap();
}

#[derive(Debug, Clone)]
enum Deed {
    Write(&'static str, String),
    Remove(&'static str),
    State(u8),
    Publish,
    Operate,
    Restart,
}

const NODES: [&str; 5] = [
    "state",
    "pci-op-ref",
    "event-channel",
    "magic",
    "backend-id",
];

fn deed() -> impl Strategy<Value = Deed> {
    let node = || prop::sample::select(NODES.to_vec());
    let text = prop_oneof![
        "[0-9]{1,10}",
        "[ -~]{0,20}",
        (0..9u8).prop_map(|state| state.to_string())
    ];
    prop_oneof![
        4 => (node(), text).prop_map(|(node, text)| Deed::Write(node, text)),
        1 => node().prop_map(Deed::Remove),
        6 => (0..9u8).prop_map(Deed::State),
        3 => Just(Deed::Publish),
        2 => Just(Deed::Operate),
        1 => Just(Deed::Restart),
    ]
}

#[test]
fn any_nodes_and_states_of_a_frontend_end_in_a_sane_session() {
    let house = patient_for(Duration::from_millis(5), &[INTX_ONLY, NVME]);
    let (_, mut other) = bystander(&house);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(24));
    let deeds = prop::collection::vec(deed(), 1..20);
    let other = std::cell::RefCell::new(&mut other);
    runner
        .run(&deeds, |deeds| {
            let domain = house.guest(&[NVME]);
            let mut frontend = house.frontend(domain, Variant::Linux);
            frontend.set_op_timeout(Some(Duration::from_millis(10)));
            for deed in deeds {
                let path = |node| format!("device/pci/0/{node}");
                // What the guest is refused, it is refused.
                match deed {
                    Deed::Write(node, text) => {
                        let _ = frontend.store().write(&path(node), text);
                    }
                    Deed::Remove(node) => {
                        let _ = frontend.store().rm(&path(node));
                    }
                    Deed::State(state) => {
                        let _ = frontend.write_state(&state.to_string());
                    }
                    Deed::Publish => frontend.publish().unwrap(),
                    Deed::Operate => {
                        let _ = frontend.conf_read(FIRST, 0, 4);
                    }
                    Deed::Restart => house.restart(),
                }
            }
            is_served(&mut other.borrow_mut())?;
            destroy(&house, domain, frontend);
            house.until_free(NVME);
            Ok(())
        })
        .unwrap();
    let (_, frontend) = house.boot(&[NVME]);
    assert_eq!(frontend.functions().count(), 1);
}
