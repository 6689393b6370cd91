//! What an operator lets a guest do beyond the ordinary: from the file and at run time, until the guest gives its device back.

use conf_space::overlay::{Permissive, Ranges};
use conf_space::registers::express;
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::control::policy::{DroppedShown, SettingsShown};
use pcibackd::control::protocol::{Request, Response};
use pcibackd::host::record::{Dropped, Phase, RunTime};
use pcibackd::host::sim::{INTX_ONLY, MSI_ONLY, NVME};
use xenbus::sim::{DomainKind, Frontend, MachineOptions};
use xenbus::xenstore::Store;
use xenbus::{DomId, PciDevice};

use crate::house::{House, until};

const FIRST: PciDevice = PciDevice {
    segment: 0,
    bus: 0,
    devfn: 0,
};

/// The device's PCI Express capability.
fn express(frontend: &mut Frontend) -> u16 {
    let mut at = frontend.conf_read(FIRST, 0x34, 1).unwrap() as u16;
    while frontend.conf_read(FIRST, at, 1).unwrap() != 0x10 {
        at = frontend.conf_read(FIRST, at + 1, 1).unwrap() as u16;
        assert_ne!(at, 0);
    }
    at
}

fn device_control(frontend: &mut Frontend) -> u16 {
    express(frontend) + express::DEVICE_CONTROL.offset
}

fn device_control_2(frontend: &mut Frontend) -> u16 {
    express(frontend) + express::DEVICE_CONTROL_2.offset
}

/// What the device has in device control, after its guest has written this there.
fn after_writing(house: &House, frontend: &mut Frontend, offset: u16, value: u32) -> u32 {
    frontend.conf_write(FIRST, offset, 2, value).unwrap();
    house.config(NVME).read(offset, Width::Two).unwrap()
}

fn ranges(start: u16, end: u16) -> Permissive {
    let mut ranges = Ranges::EMPTY;
    ranges
        .insert(conf_space::overlay::Range::new(start, end).unwrap())
        .unwrap();
    Permissive::Ranges(ranges)
}

fn shut_down(house: &House, domain: DomId, frontend: Frontend) {
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
}

#[test]
fn a_dropped_write_is_counted_until_the_next_guest_has_the_device() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let offset = device_control(&mut frontend);
    let before = house.config(NVME).read(offset, Width::Two).unwrap();
    for value in [0x2810, 0x5910] {
        assert_eq!(after_writing(&house, &mut frontend, offset, value), before);
    }
    frontend.conf_write(FIRST, 0x06, 2, 0xf900).unwrap();
    let expected = [
        (offset, Width::Two, 2, 0x5910),
        (0x06, Width::Two, 1, 0xf900),
    ]
    .map(|(offset, width, count, last)| Dropped {
        offset,
        width,
        count,
        last,
    });
    assert_eq!(house.record(NVME).dropped(), (expected.to_vec(), 0));
    house.restart();
    shut_down(&house, domain, frontend);
    house.until_free(NVME);
    assert_eq!(house.record(NVME).dropped(), (expected.to_vec(), 0));
    let (_, _frontend) = house.boot(&[NVME]);
    assert_eq!(house.record(NVME).dropped(), (Vec::new(), 0));
}

#[test]
fn a_guest_cannot_make_the_count_grow_without_end() {
    let house = House::new(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    for offset in (0x200..0x400).step_by(4) {
        frontend.conf_write(FIRST, offset, 4, 1).unwrap();
    }
    let (dropped, elsewhere) = house.record(NVME).dropped();
    assert_eq!(dropped.len() + elsewhere as usize, 0x200 / 4);
    assert!(dropped.len() < 64 && elsewhere > 0);
}

#[test]
fn what_is_set_at_run_time_holds_at_once_and_until_the_device_is_given_back() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let (control, control_2) = (
        device_control(&mut frontend),
        device_control_2(&mut frontend),
    );
    let other = house.config(NVME).read(control_2, Width::Two).unwrap();
    house.set(NVME, |settings| {
        settings.permissive = Some(ranges(control, control + 2));
    });
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        0x2830
    );
    assert_eq!(
        after_writing(&house, &mut frontend, control_2, 0x0005),
        other,
        "another register stays closed"
    );
    house.restart();
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2810),
        0x2810
    );
    shut_down(&house, domain, frontend);
    house.until_free(NVME);
    assert_eq!(house.record(NVME).settings(), RunTime::default());
    let before = house.config(NVME).read(control, Width::Two).unwrap();
    let (_, mut frontend) = house.boot(&[NVME]);
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x5910),
        before
    );
}

#[test]
fn a_quirk_opens_the_bits_of_its_mask_and_is_gone_with_its_guest() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let control = device_control(&mut frontend);
    let before = house.config(NVME).read(control, Width::Two).unwrap();
    house.set(NVME, |settings| {
        let quirk = format!("{control:x}:2:00e0").parse().unwrap();
        settings.quirks.insert(quirk).unwrap();
    });
    let after = after_writing(&house, &mut frontend, control, before ^ 0xffff);
    assert_eq!(after, before ^ 0x00e0);
    house.set(NVME, |settings| *settings = RunTime::default());
    assert_eq!(after_writing(&house, &mut frontend, control, before), after);
    shut_down(&house, domain, frontend);
}

#[test]
fn the_file_opens_registers_of_the_devices_that_it_names() {
    let file = "[[device]]\nid = \"1b36:0010\"\npermissive = [\"0x40..0x100\"]\n\
                [[device]]\nbdf = \"02:00.0\"\nid = \"8086:10c9\"\npermissive = true\n";
    let config: Config = file.parse().unwrap();
    let house = House::with(config, MachineOptions::default(), &[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    let control = device_control(&mut frontend);
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        0x2830
    );
    let status = frontend.conf_write(FIRST, 0x06, 2, 0xf900);
    assert!(status.is_ok());
    let (dropped, _) = house.record(NVME).dropped();
    assert_eq!(
        dropped.len(),
        1,
        "the other entry is for another card, which is not there"
    );
}

#[test]
fn a_file_that_is_read_again_holds_at_once_and_a_broken_one_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pcibackd.toml");
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    write("");
    let config = Config::load(Some(&path)).unwrap();
    let house = House::with(config, MachineOptions::default(), &[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    let control = device_control(&mut frontend);
    let before = house.config(NVME).read(control, Width::Two).unwrap();
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        before
    );
    write("[[device]]\nid = \"1b36:0010\"\npermissive = true\n");
    house.reload();
    until("the new file holds", || {
        after_writing(&house, &mut frontend, control, 0x2830) == 0x2830
    });
    write("[[device]]\nid = \"1b36:0010\"\npermisive = false\n");
    house.reload();
    write("[[device]]\nid = \"1b36:0010\"\nquirks = [\"4:1:1\"]\n");
    // Until this one holds, the one before the broken one does.
    house.reload();
    until("the last file holds", || {
        let now = house.config(NVME).read(control, Width::Two).unwrap();
        after_writing(&house, &mut frontend, control, now ^ 0x0020) == now
    });
    assert!(house.status().guests.len() == 1);
}

#[test]
fn what_hide_names_newly_is_hidden_at_once_and_what_it_names_no_more_stays_hidden() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pcibackd.toml");
    let write = |devices: &[Bdf]| {
        let devices: Vec<String> = devices.iter().map(Bdf::to_string).collect();
        std::fs::write(&path, format!("hide = {devices:?}\n")).unwrap();
    };
    write(&[NVME, INTX_ONLY]);
    let config = Config::load(Some(&path)).unwrap();
    let house = House::with(config, MachineOptions::default(), &[]);
    house.unhide(INTX_ONLY);
    let (_, mut frontend) = house.boot(&[NVME]);
    write(&[INTX_ONLY, MSI_ONLY]);
    house.reload();
    until("what is new there is hidden", || {
        house.phase_if_any(MSI_ONLY) == Some(Phase::Hidden)
    });
    // What an operator gave back stays dom0's, and what a guest has stays the guest's.
    assert_eq!(house.phase_if_any(INTX_ONLY), None);
    assert_eq!(house.phase(NVME), Some(Phase::Assigned));
    assert_eq!(frontend.conf_read(FIRST, 0, 4).unwrap(), 0x0010_1b36);
}

fn topology(house: &House, assignments: &[&str]) -> Result<(String, String), String> {
    let request = Request::SetGuest {
        guest: "database".into(),
        assignments: assignments.iter().map(|text| (*text).to_owned()).collect(),
    };
    match house.ask(&request) {
        Response::GuestSettings(shown) => {
            let line = &shown.settings[0];
            Ok((line.value.clone(), line.from.clone()))
        }
        Response::Failed { message } => Err(message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_topology_that_is_set_at_run_time_is_that_of_the_guests_next_start() {
    let house = House::new(&[NVME]);
    let run = |expected: &str| {
        let domain = house.named_guest("database", &[NVME]);
        house.until_node(domain, "state-0", "3");
        assert_eq!(
            house.record(NVME).owner().unwrap().seen_as.to_string(),
            expected
        );
        domain
    };
    let end = |domain: DomId| {
        house.machine.domain_shut_down(domain).unwrap();
        house.machine.destroy_domain(domain).unwrap();
        house.until_gone(domain);
        house.until_free(NVME);
    };
    let domain = run("0000:00:00.0");
    let set = topology(&house, &["topology=passthrough"]).unwrap();
    assert_eq!(set, ("passthrough".into(), "set at run time".into()));
    // The guest that runs goes on seeing it where it is, also with the next daemon.
    house.restart();
    until("it is served again", || house.guest_line(domain).is_some());
    assert_eq!(house.seen_as(NVME).bus, 0);
    end(domain);
    let domain = run(&NVME.to_string());
    end(domain);
    topology(&house, &["topology=default"]).unwrap();
    end(run("0000:00:00.0"));
    let refusal = topology(&house, &["topology=round"]).unwrap_err();
    assert!(refusal.contains("passthrough"), "{refusal}");
    let refusal = topology(&house, &["reset=flr"]).unwrap_err();
    assert!(refusal.contains("topology=vpci"), "{refusal}");
}

fn settings(house: &House, assignments: &[&str]) -> Result<SettingsShown, String> {
    let request = Request::Set {
        device: NVME.to_string(),
        assignments: assignments.iter().map(|text| (*text).to_owned()).collect(),
    };
    match house.ask(&request) {
        Response::Settings(shown) => Ok(shown),
        Response::Failed { message } => Err(message),
        other => panic!("{other:?}"),
    }
}

fn dropped(house: &House) -> DroppedShown {
    let device = NVME.to_string();
    match house.ask(&Request::Dropped { device }) {
        Response::Dropped(shown) => shown,
        other => panic!("{other:?}"),
    }
}

/// From "it does not work" to a rule for just that.
#[test]
fn what_a_dropped_write_suggests_lets_it_through_and_no_other() {
    let house = House::impatient(&[NVME]);
    let (domain, mut frontend) = house.boot(&[NVME]);
    let control = device_control(&mut frontend);
    let control_2 = device_control_2(&mut frontend);
    let other = house.config(NVME).read(control_2, Width::Two).unwrap();
    after_writing(&house, &mut frontend, control, 0x2830);
    frontend.conf_write(FIRST, 0x06, 2, 0xf900).unwrap();

    let shown = dropped(&house);
    let registers: Vec<(&str, bool)> = shown
        .writes
        .iter()
        .map(|write| (write.register.as_str(), write.never.is_some()))
        .collect();
    assert_eq!(registers, [("Device Control", false), ("Status", true)]);
    let suggestion = shown.suggestion.unwrap();
    let words: Vec<&str> = suggestion.command.split(' ').collect();
    assert_eq!(words[..2], ["set", "0000:02:00.0"]);
    let now = settings(&house, &words[2..]).unwrap();
    let permissive = &now.settings[0];
    let expected = format!("[\"{control:#04x}..{:#04x}\"]", control + 2);
    assert_eq!(
        (permissive.value.as_str(), permissive.from.as_str()),
        (expected.as_str(), "set at run time")
    );
    assert!(now.until.unwrap().contains(&domain.to_string()));
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        0x2830
    );
    assert_eq!(
        after_writing(&house, &mut frontend, control_2, 0x0005),
        other
    );
    shut_down(&house, domain, frontend);
    house.until_free(NVME);
    assert_eq!(settings(&house, &[]).unwrap().until, None);

    // For good.
    let config: Config = suggestion.entry.parse().unwrap();
    let house = House::with(config, MachineOptions::default(), &[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        0x2830
    );
    let shown = settings(&house, &[]).unwrap();
    assert_eq!(
        shown.settings[0].from,
        "[[device]], line 1: id = \"1b36:0010\""
    );
}

#[test]
fn of_more_registers_than_there_is_room_for_as_many_are_suggested_as_there_is() {
    let house = House::impatient(&[NVME]);
    let (_, mut frontend) = house.boot(&[NVME]);
    for place in 0..20 {
        frontend.conf_write(FIRST, 0x800 + 8 * place, 4, 1).unwrap();
    }
    let suggestion = dropped(&house).suggestion.unwrap();
    assert_eq!(suggestion.left_out, 4);
    let words: Vec<&str> = suggestion.command.split(' ').collect();
    assert!(settings(&house, &words[2..]).is_ok());
    suggestion.entry.parse::<Config>().unwrap();
}

#[test]
fn of_several_assignments_all_or_none_are_made() {
    let house = House::new(&[NVME]);
    for (wrong, part) in [
        ("permissive=0x48..0x40", "0x1000"),
        ("quirk=4:2:ff", "Command"),
        ("rset=flr", "reset="),
    ] {
        let error = settings(&house, &["permissive=true", wrong]).unwrap_err();
        assert!(error.contains(part), "{error}");
        assert_eq!(house.record(NVME).settings(), RunTime::default());
    }
    house.unhide(NVME);
    assert!(settings(&house, &["permissive=true"]).is_err());
    assert!(settings(&house, &[]).is_ok());
}

#[test]
fn what_was_granted_to_a_guest_that_never_got_the_device_is_not_the_next_ones() {
    let house = House::new(&[NVME]);
    let failing = house
        .machine
        .create_domain("failing", DomainKind::Pv)
        .unwrap();
    house.set(NVME, |settings| {
        settings.permissive = Some(Permissive::Yes);
        settings.meant_for = Some(failing);
    });
    house.machine.destroy_domain(failing).unwrap();
    let (_, _frontend) = house.boot(&[NVME]);
    assert_eq!(house.record(NVME).settings(), RunTime::default());
}

#[test]
fn what_was_granted_to_a_guest_is_its_own_when_it_gets_the_device() {
    let house = House::new(&[NVME]);
    let domain = house
        .machine
        .create_domain("guest", DomainKind::Pv)
        .unwrap();
    house.set(NVME, |settings| {
        settings.permissive = Some(Permissive::Yes);
        settings.meant_for = Some(domain);
    });
    house.attach(domain, NVME).unwrap();
    house.machine.unpause_domain(domain).unwrap();
    let mut frontend = house.connected(domain);
    let control = device_control(&mut frontend);
    assert_eq!(
        after_writing(&house, &mut frontend, control, 0x2830),
        0x2830
    );
}

#[test]
fn what_was_set_for_a_device_that_its_guest_cannot_have_is_taken_back() {
    let house = House::new(&[NVME, INTX_ONLY]);
    house.make_permissive(NVME);
    house.record(NVME).set_phase(Phase::Dead);
    let domain = house.guest(&[NVME]);
    until("it is told of", || house.node(domain, "error-0").is_some());
    assert_eq!(house.record(NVME).settings(), RunTime::default());
}

#[test]
fn a_stub_domain_may_set_the_interrupt_enable_bits_and_no_other_guest() {
    for (told, allowed) in [(true, true), (false, false)] {
        let house = House::new(&[NVME]);
        let target = house.machine.create_domain("hvm", DomainKind::Hvm).unwrap();
        let stub = house.machine.create_domain("stub", DomainKind::Pv).unwrap();
        let mut store = house.store();
        let node = format!("/local/domain/{stub}/target");
        store.write(&node, target.to_string()).unwrap();
        if told {
            let node = format!("/local/domain/{target}/image/device-model-domid");
            store.write(&node, stub.to_string()).unwrap();
        }
        // The toolstack names the guest whose device model it is.
        house.set(NVME, |settings| {
            settings.permissive = Some(Permissive::Yes);
            settings.meant_for = Some(target);
        });
        house.attach(stub, NVME).unwrap();
        house.machine.unpause_domain(stub).unwrap();
        let mut frontend = house.connected(stub);
        let command = frontend.conf_read(FIRST, 4, 2).unwrap();
        frontend.conf_write(FIRST, 4, 2, command | 0x400).unwrap();
        let hardware = house.config(NVME).read(4, Width::Two).unwrap();
        assert_eq!(hardware & 0x400 != 0, allowed);
        assert_eq!(house.is_permissive(NVME), allowed);
    }
}
