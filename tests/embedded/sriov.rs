//! SR-IOV: virtual functions in guests, made and taken away while the daemon runs, by its own commands and behind its back.

use std::time::Duration;

use conf_space::Bdf;
use pcibackd::config::{Config, ResetChoice};
use pcibackd::control::protocol::{Entry, PhysicalFunction, Request, Response};
use pcibackd::host::Bus;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{BRIDGE, NIC, NIC_VF0, NIC_VF1, NVME};
use xenbus::sim::{Frontend, MachineOptions, Variant};

use crate::house::{House, LONG, at, entries, until};

/// What somebody else in dom0 does: `echo COUNT > sriov_numvfs`.
fn set(house: &House, count: u16) {
    house.bus.set_virtual_functions(NIC, count).unwrap();
}

pub fn create(house: &House, count: u16, hide: bool) -> Result<Vec<Entry>, String> {
    let physical = NIC;
    entries(house.ask(&Request::CreateVirtualFunctions {
        physical,
        count,
        hide,
    }))
}

pub fn destroy(house: &House, force: bool) -> Result<Vec<Entry>, String> {
    let physical = NIC;
    entries(house.ask(&Request::DestroyVirtualFunctions { physical, force }))
}

fn listed(house: &House, physical: Option<Bdf>) -> Result<Vec<PhysicalFunction>, String> {
    match house.ask(&Request::VirtualFunctions { physical }) {
        Response::VirtualFunctions { physical } => Ok(physical),
        Response::Failed { message } => Err(message),
        other => panic!("{other:?}"),
    }
}

/// Who has the network card's virtual functions.
fn states(house: &House) -> Vec<(u16, String)> {
    let all = listed(house, Some(NIC)).unwrap();
    let members = all[0].virtual_functions.iter();
    members
        .map(|member| (member.index, member.device.state.clone()))
        .collect()
}

fn hide(house: &House, bdf: Bdf, force: bool) -> Entry {
    let devices = vec![bdf.to_string()];
    entries(house.ask(&Request::Hide { devices, force })).unwrap()[0].clone()
}

/// The guest's driver has the device's interrupts.
pub fn interrupts(house: &House, frontend: &mut Frontend) {
    frontend.enable_device(at(0, 0)).unwrap();
    frontend.enable_msix(at(0, 0), &[0, 1]).unwrap();
    assert!(house.bus.raise_interrupt(NIC_VF0, 0));
}

/// What somebody else in dom0 does: `modprobe -r igb; modprobe igb`.
fn reload_driver(house: &House) {
    house.bus.unbind(NIC).unwrap();
    house.bus.bind(NIC, None).unwrap();
}

fn until_forgotten(house: &House, bdf: Bdf) {
    until(format!("{bdf} is forgotten"), || {
        !house.records().contains(&bdf)
    });
}

#[test]
fn a_guest_drives_its_virtual_function() {
    let house = House::new(&[NIC_VF0]);
    let (_, mut frontend) = house.boot(&[NIC_VF0]);
    let device = at(0, 0);
    let ids = frontend.conf_read(device, 0x00, 4).unwrap();
    assert_eq!(ids, 0x10ca_8086, "its registers read as ones");
    let subsystem = frontend.conf_read(device, 0x2c, 4).unwrap();
    assert_eq!(subsystem, 0x10c9_8086, "which are its own");
    let bars = house.bus.describe(NIC_VF0).unwrap().identity.resources;
    for (register, bar) in [(0x10, bars[0]), (0x1c, bars[3])] {
        let read = frontend.conf_read(device, register, 4).unwrap();
        assert_eq!(u64::from(read), bar.start);
        frontend.conf_write(device, register, 4, u32::MAX).unwrap();
        let size = frontend.conf_read(device, register, 4).unwrap();
        assert_eq!(u64::from(!size + 1), bar.size);
        frontend.conf_write(device, register, 4, read).unwrap();
    }
    assert_eq!(frontend.conf_read(device, 0x04, 2).unwrap() & 2, 0);
    frontend.enable_device(device).unwrap();
    assert_eq!(frontend.conf_read(device, 0x04, 2).unwrap() & 2, 2);
    frontend.enable_msix(device, &[0, 1, 2]).unwrap();
    for vector in 0..3 {
        assert!(house.bus.raise_interrupt(NIC_VF0, vector));
        assert!(
            frontend
                .wait_for_interrupt(device, vector.into(), LONG)
                .unwrap()
        );
    }
}

#[test]
fn hidden_virtual_functions_that_somebody_takes_away_are_forgotten() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    set(&house, 0);
    until_forgotten(&house, NIC_VF0);
    until_forgotten(&house, NIC_VF1);
    // New ones at the same addresses are other devices.
    set(&house, 2);
    let driver = house.bus.describe(NIC_VF1).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("igbvf"));
    house.hide(&[NIC_VF1]);
    let (_, frontend) = house.boot(&[NIC_VF1]);
    assert_eq!(frontend.functions().count(), 1);
}

#[test]
fn a_virtual_function_that_is_taken_away_under_its_guest_is_gone_for_the_guest_too() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    reload_driver(&house);
    until_forgotten(&house, NIC_VF0);
    house.until_node(domain, "state-0", "6");
    let why = house.node(domain, "error-0").unwrap();
    assert!(why.contains("removed from this machine"), "{why}");
    until("the guest has it no more", || {
        house.guest_line(domain).unwrap().devices.is_empty()
    });
    let line = house.guest_line(domain).unwrap();
    assert!(line.failed[0].1.contains("removed"), "{:?}", line.failed);
    assert!(frontend.conf_read(at(0, 0), 0, 4).is_err());
    assert!(frontend.conf_write(at(0, 0), 4, 2, 7).is_err());

    // Made anew, it is nobody's but dom0's; the guest that lost it can have it again.
    set(&house, 1);
    assert!(frontend.conf_read(at(0, 0), 0, 4).is_err());
    house.hide(&[NIC_VF0]);
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    house.attach(domain, NIC_VF0).unwrap();
    let mut frontend = house.connected(domain);
    assert_eq!(frontend.conf_read(at(0, 0), 0, 4).unwrap(), 0x10ca_8086);
}

#[test]
fn virtual_functions_go_with_their_physical_functions_driver() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, _frontend) = house.boot(&[NIC_VF1]);
    reload_driver(&house);
    until_forgotten(&house, NIC_VF0);
    until_forgotten(&house, NIC_VF1);
    house.until_node(domain, "state-0", "6");
}

#[test]
fn what_is_taken_away_while_no_daemon_runs_is_forgotten_at_its_start() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (_, _frontend) = house.boot(&[NIC_VF1]);
    house.kill();
    reload_driver(&house);
    house.start();
    assert_eq!(house.records(), []);
    // And there may be new ones.
    set(&house, 2);
}

#[test]
fn what_was_made_anew_while_no_daemon_ran_is_dom0s() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, _frontend) = house.boot(&[NIC_VF1]);
    house.kill();
    reload_driver(&house);
    house.bus.keep_virtual_functions(NIC, false).unwrap();
    house.bus.set_functions_probed(NIC, false).unwrap();
    set(&house, 2);
    house.start();
    assert_eq!(house.records(), []);
    let mut frontend = house.frontend(domain, Variant::Linux);
    frontend.set_op_timeout(Some(LONG));
    house.hide(&[NIC_VF0]);
    assert_eq!(house.phase(NIC_VF0), Some(Phase::Hidden));
}

#[test]
fn one_that_goes_while_it_is_reset_is_forgotten() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    house
        .bus
        .set_reset_time(NIC_VF0, Duration::from_millis(300));
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    reload_driver(&house);
    until_forgotten(&house, NIC_VF0);
}

#[test]
fn virtual_functions_are_made_for_guests_and_taken_away_again() {
    let house = House::new(&[]);
    assert!(destroy(&house, false).unwrap()[0].message.contains("2"));
    assert_eq!(states(&house), []);
    let made = create(&house, 3, true).unwrap();
    assert_eq!(made.len(), 3);
    assert!(made.iter().all(|entry| entry.ok), "{made:?}");
    assert_eq!(states(&house), [0, 1, 2].map(|n| (n, "hidden".to_owned())));
    let driver = house.record(NIC_VF0).driver();
    assert_eq!(driver, None, "dom0's driver never had it");
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    assert_eq!(states(&house)[0].1, "assigned");
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    house.until_free(NIC_VF0);
    destroy(&house, false).unwrap();
    assert_eq!(house.records(), []);
    assert_eq!(house.bus.orphaned_interrupts(), 0);
    // For dom0.
    let made = create(&house, 1, false).unwrap();
    assert!(made[0].message.contains("igbvf"), "{made:?}");
    assert_eq!(states(&house), [(0, "dom0".to_owned())]);
    assert!(destroy(&house, true).is_ok());
    let none = destroy(&house, false).unwrap();
    assert!(none[0].message.contains("no virtual functions"));
}

#[test]
fn asking_again_for_as_many_as_there_are_hides_what_is_not_hidden_yet() {
    let house = House::new(&[NIC_VF1]);
    let made = create(&house, 2, true).unwrap();
    assert!(made.iter().all(|entry| entry.ok), "{made:?}");
    assert_eq!(states(&house), [0, 1].map(|n| (n, "hidden".to_owned())));
    house.unhide(NIC_VF0);
    let driver = house.bus.describe(NIC_VF0).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("igbvf"));
}

#[test]
fn what_cannot_be_made_is_refused_with_what_to_do() {
    let house = House::new(&[]);
    let refusal = create(&house, 4, false).unwrap_err();
    assert!(refusal.contains("vf destroy"), "{refusal}");
    let refusal = create(&house, 9, false).unwrap_err();
    assert!(refusal.contains("can have 8"), "{refusal}");
    for (physical, told) in [(NVME, "no SR-IOV"), (NIC_VF0, "0000:01:00.0")] {
        let count = 1;
        let hide = false;
        for request in [
            Request::CreateVirtualFunctions {
                physical,
                count,
                hide,
            },
            Request::DestroyVirtualFunctions {
                physical,
                force: true,
            },
        ] {
            let refusal = entries(house.ask(&request)).unwrap_err();
            assert!(refusal.contains(told), "{refusal}");
        }
        let refusal = listed(&house, Some(physical)).unwrap_err();
        assert!(refusal.contains(told), "{refusal}");
    }
    let all = listed(&house, None).unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].device.device, all[0].total), (NIC, 8));
    // Without its driver.
    destroy(&house, false).unwrap();
    house.hide(&[NIC]);
    let refusal = create(&house, 1, false).unwrap_err();
    assert!(refusal.contains("pciback unhide"), "{refusal}");
    house.unhide(NIC);
    create(&house, 1, false).unwrap();
}

#[test]
fn what_guests_have_is_not_taken_away_without_force_and_it_is_said_who_has_it() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    let refusal = destroy(&house, false).unwrap_err();
    let told = format!("domain {domain} has {NIC_VF0}");
    assert!(refusal.contains(&told), "{refusal}");
    assert_eq!(house.phase(NIC_VF1), Some(Phase::Hidden), "as it was");
    assert!(!hide(&house, NIC, false).ok);
    assert!(house.bus.raise_interrupt(NIC_VF0, 1));
    assert_eq!(
        house.bus.describe(NIC).unwrap().driver.as_deref(),
        Some("igb")
    );
}

#[test]
fn by_force_guests_lose_theirs_in_order() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    destroy(&house, true).unwrap();
    assert_eq!(house.bus.orphaned_interrupts(), 0);
    assert_eq!(house.pirqs(domain), 0);
    assert_eq!(house.records(), []);
    assert_eq!(states(&house), []);
    house.until_node(domain, "state-0", "6");
    let why = house.node(domain, "error-0").unwrap();
    assert!(why.contains("operator"), "{why}");
    assert!(frontend.conf_read(at(0, 0), 0, 4).is_err());
    // Nothing stands in the way of the next, once the toolstack knows.
    house.while_following(&mut frontend, || house.detach(domain, NIC_VF0));
    create(&house, 1, true).unwrap();
    let (_, mut next) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut next);
}

#[test]
fn by_force_a_physical_function_is_hidden_and_its_guests_lose_theirs_in_order() {
    let house = House::new(&[NIC_VF0, NIC_VF1]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    let entry = hide(&house, NIC, true);
    assert!(entry.ok, "{entry:?}");
    assert_eq!(house.bus.orphaned_interrupts(), 0);
    assert_eq!(house.pirqs(domain), 0);
    assert_eq!(house.records(), [NIC]);
    assert!(!house.bus.list().unwrap().contains(&NIC_VF0));
    assert!(house.bus.list().unwrap().contains(&BRIDGE));
}

#[test]
fn a_guest_that_does_not_answer_loses_its_virtual_function_all_the_same() {
    let house = House::new(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    frontend.set_answers_reconfiguring(false);
    destroy(&house, true).unwrap();
    assert_eq!(house.bus.orphaned_interrupts(), 0);
    assert_eq!(house.pirqs(domain), 0);
}

#[test]
fn taking_virtual_functions_away_behind_the_daemons_back_leaves_interrupts_that_xen_trips_over() {
    let house = House::new(&[NIC_VF0]);
    let (_, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    reload_driver(&house);
    assert_eq!(house.bus.orphaned_interrupts(), 2);
    until_forgotten(&house, NIC_VF0);
}

#[test]
fn a_physical_function_that_is_hidden_is_left_alone_while_guests_have_what_its_driver_left_behind()
{
    let house = House::new(&[]);
    house.bus.set_leaves_functions(NIC);
    assert!(hide(&house, NIC, true).ok);
    house.hide(&[NIC_VF0]);
    let (domain, mut frontend) = house.boot(&[NIC_VF0]);
    interrupts(&house, &mut frontend);
    let resets = house.bus.resets(NIC);
    let devices = || vec![NIC.to_string()];
    let reset = |force| Request::Reset {
        devices: devices(),
        method: None,
        force,
    };
    let unhide = |force| Request::Unhide {
        devices: devices(),
        force,
    };
    let told = format!("domain {domain} has {NIC_VF0}");
    for request in [reset(false), unhide(false)] {
        let entry = &entries(house.ask(&request)).unwrap()[0];
        assert!(!entry.ok && entry.message.contains(&told), "{entry:?}");
    }
    let doctor = house.ask(&Request::Doctor {
        device: Some(NIC.to_string()),
        try_resets: true,
    });
    assert!(format!("{doctor:?}").contains(&told), "{doctor:?}");
    assert_eq!(house.bus.resets(NIC), resets);
    // Nor by force for nothing.
    let by_bus = Request::Reset {
        devices: devices(),
        method: Some(ResetChoice::Bus),
        force: true,
    };
    for in_vain in [
        by_bus,
        Request::Hide {
            devices: devices(),
            force: true,
        },
    ] {
        house.ask(&in_vain);
        assert_eq!(house.phase(NIC_VF0), Some(Phase::Assigned), "{in_vain:?}");
    }
    let entry = &entries(house.ask(&reset(true))).unwrap()[0];
    assert!(entry.ok, "{entry:?}");
    assert_eq!(house.bus.resets(NIC), resets + 1);
    assert_eq!(house.pirqs(domain), 0);
    let entry = &entries(house.ask(&unhide(true))).unwrap()[0];
    assert!(entry.ok, "{entry:?}");
}

#[test]
fn by_force_the_toolstack_is_asked_first() {
    let directory = tempfile::tempdir().unwrap();
    let told = directory.path().join("told");
    let mut config = Config::default();
    let script = format!("echo \"$0 $1\" >>{}", told.display());
    config.commands.detach = ["sh", "-c", &script, "{domain}", "{device}"]
        .map(str::to_owned)
        .into();
    let house = House::with(config, MachineOptions::default(), &[NIC_VF0]);
    let (domain, _frontend) = house.boot(&[NIC_VF0]);
    destroy(&house, true).unwrap();
    let told = std::fs::read_to_string(told).unwrap();
    assert_eq!(told, format!("{domain} {NIC_VF0}\n"));
}
