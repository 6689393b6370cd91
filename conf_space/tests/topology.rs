//! Where a guest sees its devices. Numbers like V-1 are those of the rules listed in
//! `src/topology.rs`.
#![allow(clippy::indexing_slicing, clippy::unwrap_used)]

use conf_space::Bdf;
use conf_space::topology::{PlaceError, Placement, Topology, TopologyKind};
use proptest::prelude::*;

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn function(text: &str) -> Placement {
    Placement {
        bdf: bdf(text),
        is_virtual_function: false,
        hint: None,
    }
}

fn virtual_function(text: &str) -> Placement {
    Placement {
        is_virtual_function: true,
        ..function(text)
    }
}

fn with_hint(text: &str, hint: u8) -> Placement {
    Placement {
        hint: Some(hint),
        ..function(text)
    }
}

/// Places devices on a virtual bus and returns where they went.
fn placed(devices: &[Placement]) -> Vec<String> {
    let mut topology = Topology::new(TopologyKind::Vpci);
    devices
        .iter()
        .map(|device| topology.place(*device).unwrap().to_string())
        .collect()
}

fn find(topology: &Topology, address: Bdf) -> Option<Bdf> {
    topology.find(
        address.segment().into(),
        address.bus().into(),
        address.devfn().into(),
    )
}

fn roots(topology: &Topology) -> Vec<String> {
    topology.roots().iter().map(ToString::to_string).collect()
}

#[test]
fn v1_each_device_has_a_slot_and_functions_keep_their_numbers() {
    let devices = ["03:00.0", "04:00.1", "03:01.0", "0001:03:00.2"].map(function);
    let expected = [
        "0000:00:00.0",
        "0000:00:01.1",
        "0000:00:02.0",
        "0000:00:03.2",
    ];
    assert_eq!(placed(&devices), expected);
}

#[test]
fn v1_functions_of_one_device_share_its_slot() {
    let devices = ["03:00.1", "04:00.0", "03:00.0", "03:00.7"].map(function);
    let expected = [
        "0000:00:00.1",
        "0000:00:01.0",
        "0000:00:00.0",
        "0000:00:00.7",
    ];
    assert_eq!(placed(&devices), expected);
}

#[test]
fn v1_a_virtual_function_0_is_alone_in_its_slot() {
    let virtual_functions = ["03:10.1", "03:10.0", "03:10.2"].map(virtual_function);
    assert_eq!(
        placed(&virtual_functions),
        ["0000:00:00.1", "0000:00:01.0", "0000:00:00.2"]
    );
    let virtual_functions = ["03:10.0", "03:10.1"].map(virtual_function);
    assert_eq!(placed(&virtual_functions), ["0000:00:00.0", "0000:00:01.1"]);
}

#[test]
fn v1_the_thirty_third_slot_does_not_exist() {
    let mut topology = Topology::new(TopologyKind::Vpci);
    for bus in 0..32 {
        let bdf = Bdf::new(0, bus, 0, 0).unwrap();
        topology
            .place(Placement {
                bdf,
                is_virtual_function: false,
                hint: None,
            })
            .unwrap();
    }
    let refused = topology.place(function("40:00.0"));
    assert_eq!(refused, Err(PlaceError::NoSlot(bdf("40:00.0"))));
    assert_eq!(topology.address_of(bdf("40:00.0")), None);
    assert_eq!(
        topology.place(function("05:00.3")),
        Ok(bdf("00:05.3")),
        "a sibling fits"
    );
}

#[test]
fn v2_only_addresses_that_exist_are_found() {
    for kind in [TopologyKind::Vpci, TopologyKind::Passthrough] {
        let mut topology = Topology::new(kind);
        let address = topology.place(function("00:00.0")).unwrap();
        assert_eq!(find(&topology, address), Some(bdf("00:00.0")));
        for (domain, bus, devfn) in [
            (0, 0, 1),
            (0, 0, 0x100),
            (0, 0x100, 0),
            (0x1_0000, 0, 0),
            (1, 0, 0),
            (0, 1, 0),
            (u32::MAX, u32::MAX, u32::MAX),
        ] {
            assert_eq!(
                topology.find(domain, bus, devfn),
                None,
                "{domain} {bus} {devfn}"
            );
        }
    }
}

#[test]
fn v4_the_lowest_free_slot_is_used_again() {
    let mut topology = Topology::new(TopologyKind::Vpci);
    for device in ["01:00.0", "02:00.0", "02:00.1", "03:00.0"] {
        topology.place(function(device)).unwrap();
    }
    assert_eq!(topology.remove(bdf("02:00.0")), Some(bdf("00:01.0")));
    assert_eq!(
        topology.place(function("04:00.0")),
        Ok(bdf("00:03.0")),
        "a sibling is left"
    );
    assert_eq!(topology.remove(bdf("02:00.1")), Some(bdf("00:01.1")));
    assert_eq!(topology.remove(bdf("02:00.1")), None);
    assert_eq!(topology.place(function("05:00.0")), Ok(bdf("00:01.0")));
}

#[test]
fn v4_a_slot_that_was_asked_for_is_given_if_it_is_free() {
    let devices = [
        with_hint("01:00.0", 0x1f << 3),
        with_hint("02:00.0", 0x1f << 3),
        with_hint("01:00.1", 0x1f << 3),
        with_hint("03:00.2", 0x08),
        function("04:00.0"),
    ];
    let expected = [
        "0000:00:1f.0",
        "0000:00:00.0",
        "0000:00:1f.1",
        "0000:00:01.2",
        "0000:00:02.0",
    ];
    assert_eq!(placed(&devices), expected);
}

#[test]
fn v4_asking_for_a_slot_puts_no_virtual_function_0_beside_others() {
    let lone = Placement {
        hint: Some(0),
        ..virtual_function("03:10.0")
    };
    let devices = [virtual_function("03:10.1"), lone];
    assert_eq!(placed(&devices), ["0000:00:00.1", "0000:00:01.0"]);
}

#[test]
fn v5_the_virtual_bus_is_the_only_root() {
    let mut topology = Topology::new(TopologyKind::Vpci);
    assert_eq!(roots(&topology), ["0000:00"]);
    topology.place(function("0002:03:00.0")).unwrap();
    assert_eq!(roots(&topology), ["0000:00"]);
}

#[test]
fn v6_passthrough_leaves_devices_where_they_are_and_publishes_each_bus_once() {
    let mut topology = Topology::new(TopologyKind::Passthrough);
    assert!(roots(&topology).is_empty());
    for device in ["0001:03:00.0", "03:00.0", "03:10.0", "02:1f.7", "03:00.1"] {
        let placement = Placement {
            hint: Some(0x88),
            ..virtual_function(device)
        };
        assert_eq!(topology.place(placement), Ok(bdf(device)));
    }
    assert_eq!(roots(&topology), ["0000:02", "0000:03", "0001:03"]);
    assert_eq!(
        find(&topology, bdf("0001:03:00.0")),
        Some(bdf("0001:03:00.0"))
    );
    assert_eq!(find(&topology, bdf("0001:02:1f.7")), None);
}

#[test]
fn a_device_is_placed_once() {
    for kind in [TopologyKind::Vpci, TopologyKind::Passthrough] {
        let mut topology = Topology::new(kind);
        topology.place(function("03:00.0")).unwrap();
        let again = Err(PlaceError::AlreadyPlaced(bdf("03:00.0")));
        assert_eq!(topology.place(function("03:00.0")), again);
        assert_eq!(topology.place(virtual_function("03:00.0")), again);
        assert_eq!(topology.devices().count(), 1);
    }
}

#[test]
fn a_restart_restores_places_and_refuses_those_that_cannot_be() {
    let mut topology = Topology::new(TopologyKind::Vpci);
    assert_eq!(
        topology.restore(function("03:00.1"), bdf("00:07.1")),
        Ok(())
    );
    assert_eq!(find(&topology, bdf("00:07.1")), Some(bdf("03:00.1")));
    assert_eq!(
        topology.restore(function("03:00.0"), bdf("00:07.0")),
        Ok(())
    );
    for (device, address) in [
        ("04:00.0", "00:07.0"),
        ("04:00.2", "00:07.2"),
        ("04:00.0", "00:08.1"),
        ("04:00.0", "01:08.0"),
        ("04:00.0", "0001:00:08.0"),
    ] {
        let (physical, address) = (bdf(device), bdf(address));
        let refused = topology.restore(function(device), address);
        assert_eq!(refused, Err(PlaceError::NotPossible { physical, address }));
    }
    let again = topology.restore(function("03:00.0"), bdf("00:08.0"));
    assert_eq!(again, Err(PlaceError::AlreadyPlaced(bdf("03:00.0"))));

    let mut topology = Topology::new(TopologyKind::Passthrough);
    assert_eq!(
        topology.restore(function("04:00.0"), bdf("04:00.0")),
        Ok(())
    );
    let refused = topology.restore(function("05:00.0"), bdf("00:00.0"));
    assert!(matches!(refused, Err(PlaceError::NotPossible { .. })));
}

#[test]
fn kinds_are_written_in_lower_case() {
    assert_eq!(TopologyKind::default(), TopologyKind::Vpci);
    for kind in [TopologyKind::Vpci, TopologyKind::Passthrough] {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    assert!("Vpci".parse::<TopologyKind>().is_err());
}

proptest! {
    #[test]
    fn no_two_devices_share_an_address_nor_strangers_a_slot(
        devices in prop::collection::vec(
            (0u8..3, any::<u8>(), any::<bool>(), any::<Option<u8>>(), any::<bool>()),
            0..80,
        ),
    ) {
        let mut topology = Topology::new(TopologyKind::Vpci);
        for (bus, devfn, is_virtual_function, hint, remove) in devices {
            let bdf = Bdf::from_devfn(0, bus, devfn);
            if remove {
                topology.remove(bdf);
            } else {
                let _ = topology.place(Placement { bdf, is_virtual_function, hint });
            }
            let mut addresses: Vec<Bdf> = topology.devices().map(|(_, address)| address).collect();
            prop_assert!(addresses.is_sorted());
            addresses.dedup();
            prop_assert_eq!(addresses.len(), topology.devices().count());
            for (physical, address) in topology.devices() {
                prop_assert_eq!(address.function(), physical.function());
                prop_assert_eq!(find(&topology, address), Some(physical));
                prop_assert_eq!(topology.address_of(physical), Some(address));
                for (other, beside) in topology.devices() {
                    prop_assert!(!beside.same_device(address) || other.same_device(physical));
                }
            }
        }
    }
}
