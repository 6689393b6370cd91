//! A device between two guests: how it is reset, and one that does not come back.

use conf_space::registers::power_management;
use conf_space::{Bdf, Width};
use pcibackd::config::{Config, ResetChoice};
use pcibackd::control::protocol::{Entry, Request, Response};
use pcibackd::host::Bus;
use pcibackd::host::record::{Flags, Phase};
use pcibackd::host::sim::{FunctionBuilder, INTX_ONLY, MSI_ONLY, NVME};
use xenbus::PciDevice;
use xenbus::sim::MachineOptions;
use xenbus::xenstore::Store;

use crate::house::{House, at, until};

const FIRST: PciDevice = at(0, 0);
/// Two functions of one card behind a bridge, which can be reset in several ways.
const CARD: Bdf = Bdf::from_devfn(0, 0x06, 0);
const SECOND_OF_CARD: Bdf = Bdf::from_devfn(0, 0x06, 1);

fn card(bdf: Bdf, methods: &[&str]) -> FunctionBuilder {
    FunctionBuilder::new(bdf, 0x1002, 0x67df, 0x03_0000)
        .memory_bar(0, 0x1000)
        .power_management(false)
        .driver("amdgpu")
        .reset_methods(methods)
}

fn impatient_with(settings: &str) -> House {
    let options = MachineOptions {
        toolstack_timeout: std::time::Duration::from_millis(50),
        ..MachineOptions::default()
    };
    House::with(settings.parse::<Config>().unwrap(), options, &[])
}

fn reset(house: &House, bdf: Bdf, method: Option<ResetChoice>) -> Entry {
    let devices = vec![bdf.to_string()];
    let force = false;
    match house.ask(&Request::Reset {
        devices,
        method,
        force,
    }) {
        Response::Entries { mut entries } => entries.remove(0),
        other => panic!("{other:?}"),
    }
}

/// A guest has the device, and ends.
fn one_guest(house: &House, bdf: Bdf) {
    let (domain, frontend) = house.boot(&[bdf]);
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
}

fn dies(house: &House, bdf: Bdf) {
    let (domain, frontend) = house.boot(&[bdf]);
    drop(frontend);
    house.bus.set_reset_fails(bdf, true);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    until("it is found dead", || house.phase(bdf) == Some(Phase::Dead));
}

fn is_refused(house: &House, bdf: Bdf) {
    let (domain, _frontend) = house.boot(&[INTX_ONLY]);
    let mut store = house.store();
    for (node, value) in [
        ("dev-1", bdf.to_string()),
        ("state-1", "1".to_owned()),
        ("num_devs", "2".to_owned()),
        ("state", "3".to_owned()),
    ] {
        store.write(&house.backend(domain, node), value).unwrap();
    }
    house.until_node(domain, "state-1", "6");
    let reason = || Some(house.guest_line(domain)?.failed.first()?.1.clone());
    until("the reason is told", || {
        reason().is_some_and(|reason| reason.contains("did not come back"))
    });
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(INTX_ONLY);
}

#[test]
fn a_dead_device_stays_in_quarantine_through_restarts() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    dies(&house, NVME);
    for _ in 0..2 {
        is_refused(&house, NVME);
        house.restart();
        assert_eq!(house.phase(NVME), Some(Phase::Dead));
    }
    let Response::Devices { devices } = house.ask(&Request::List) else {
        panic!("no list");
    };
    let line = devices.iter().find(|line| line.device == NVME).unwrap();
    assert_eq!(line.state, "dead");
}

#[test]
fn a_dead_device_that_comes_back_from_another_reset_is_given_to_guests_again() {
    let house = House::impatient(&[INTX_ONLY]);
    house.bus.add(card(CARD, &["flr", "bus"]));
    house.hide(&[CARD]);
    dies(&house, CARD);
    let tried = reset(&house, CARD, None);
    assert!(
        !tried.ok && tried.message.contains("power cycle"),
        "{tried:?}"
    );
    assert_eq!(house.phase(CARD), Some(Phase::Dead));
    let tried = reset(&house, CARD, Some(ResetChoice::Bus));
    assert!(tried.ok, "{tried:?}");
    one_guest(&house, CARD);
    house.until_free(CARD);
}

#[test]
fn a_dead_device_can_be_given_back_and_hidden_anew_after_a_power_cycle() {
    let house = House::impatient(&[NVME, INTX_ONLY]);
    dies(&house, NVME);
    house.bus.set_reset_fails(NVME, false);
    house.bus.vanish(NVME, false);
    house.unhide(NVME);
    house.hide(&[NVME]);
    one_guest(&house, NVME);
}

#[test]
fn the_configured_method_is_used_and_the_others_are_there_afterwards() {
    let house = impatient_with("[[device]]\nbdf = \"06:00.0\"\nreset = \"pm\"");
    house.bus.add(card(CARD, &["flr", "pm", "bus"]));
    house.hide(&[CARD]);
    assert_eq!(house.bus.last_reset(CARD).as_deref(), Some("pm"));
    let all = |house: &House| house.bus.describe(CARD).unwrap().reset_methods;
    assert_eq!(all(&house), ["flr", "pm", "bus"]);
    assert!(reset(&house, CARD, Some(ResetChoice::Flr)).ok);
    assert_eq!(house.bus.last_reset(CARD).as_deref(), Some("flr"));
    one_guest(&house, CARD);
    house.until_free(CARD);
    assert_eq!(house.bus.last_reset(CARD).as_deref(), Some("pm"));
    assert_eq!(all(&house), ["flr", "pm", "bus"]);
}

#[test]
fn a_daemon_that_is_killed_around_a_reset_leaves_the_kernel_with_all_methods() {
    let house = impatient_with("[[device]]\nbdf = \"06:00.0\"\nreset = \"pm\"");
    house.bus.add(card(CARD, &["flr", "pm", "bus"]));
    house.hide(&[CARD]);
    let mut step = 0;
    loop {
        step += 1;
        let died = house.surviving(step, || {
            let request = Request::Reset {
                devices: vec![CARD.to_string()],
                method: None,
                force: false,
            };
            let _ = house.try_ask(&request);
        });
        house.until_free(CARD);
        let methods = house.bus.describe(CARD).unwrap().reset_methods;
        assert_eq!(methods, ["flr", "pm", "bus"], "killed at step {step}");
        if !died {
            break;
        }
    }
    assert!(step > 8);
}

#[test]
fn a_device_that_is_given_back_can_be_reset_by_all_methods_again() {
    let house = House::new(&[]);
    house.bus.add(card(CARD, &["flr", "pm"]));
    house.hide(&[CARD]);
    // The kernel would not take the methods back after the last reset.
    house.bus.set_reset_methods(CARD, &["flr"]).unwrap();
    house.record(CARD).insert(Flags::RESET_NARROWED);
    house.unhide(CARD);
    let methods = house.bus.describe(CARD).unwrap().reset_methods;
    assert_eq!(methods, ["flr", "pm"]);
}

#[test]
fn without_a_reset_a_guest_gets_the_device_as_it_is() {
    let house = impatient_with("[defaults]\nreset = \"none\"");
    house.hide(&[NVME]);
    one_guest(&house, NVME);
    house.until_free(NVME);
    assert_eq!(house.bus.last_reset(NVME), None);
}

#[test]
fn a_method_that_is_not_there_is_told_with_those_that_are() {
    let house = House::new(&[]);
    house.bus.add(card(CARD, &["flr"]));
    house.bus.add(card(SECOND_OF_CARD, &["flr"]));
    house.hide(&[CARD]);
    let tried = reset(&house, CARD, Some(ResetChoice::Bus));
    assert!(!tried.ok);
    assert_eq!(
        tried.message,
        "0000:06:00.0: no reset by bus: the kernel offers flr; a reset of its bus would hit 0000:06:00.1 as well"
    );
    assert_eq!(house.phase(CARD), Some(Phase::Hidden));
}

#[test]
fn a_device_that_a_guest_has_is_not_reset_by_hand() {
    let house = House::new(&[NVME]);
    let (_, _frontend) = house.boot(&[NVME]);
    let before = house.bus.resets(NVME);
    let tried = reset(&house, NVME, None);
    assert!(
        !tried.ok && tried.message.contains("in use by domain"),
        "{tried:?}"
    );
    assert_eq!(house.bus.resets(NVME), before);
}

#[test]
fn a_device_that_was_sent_to_sleep_is_awake_for_the_next_guest_even_without_a_reset() {
    let house = impatient_with("[defaults]\nreset = \"none\"");
    house.hide(&[MSI_ONLY]);
    let bars = |house: &House| -> Vec<u32> {
        let config = house.config(MSI_ONLY);
        (0x10..0x28)
            .step_by(4)
            .map(|bar| config.read(bar, Width::Four).unwrap())
            .collect()
    };
    let before = bars(&house);
    let (domain, mut frontend) = house.boot(&[MSI_ONLY]);
    let power = frontend.function(FIRST).unwrap().capability(1).unwrap();
    let control = power + power_management::CONTROL.offset;
    frontend.conf_write(FIRST, control, 2, 3).unwrap();
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(MSI_ONLY);
    let state = house.config(MSI_ONLY).read(control, Width::Two).unwrap();
    assert_eq!(state & u32::from(power_management::control::POWER_STATE), 0);
    assert_eq!(bars(&house), before);
    one_guest(&house, MSI_ONLY);
}
