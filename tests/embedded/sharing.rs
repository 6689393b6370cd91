//! Devices that have an INTx line, or a memory page, in common with somebody else's.

use std::time::Duration;

use conf_space::registers::header::{INTERRUPT_LINE, INTERRUPT_PIN, command};
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::control::protocol::Request;
use pcibackd::host::Bus;
use pcibackd::host::sim::{FunctionBuilder, INTX_ONLY, MSI_ONLY};
use xenbus::sim::{Frontend, MachineOptions};
use xenbus::{DomId, PciDevice};

use crate::house::{House, LONG, at, entries, until};

const FIRST: PciDevice = at(0, 0);
const SECOND: PciDevice = at(1, 0);
/// A USB controller without MSI.
const USB: Bdf = Bdf::from_devfn(0, 0x00, 0x1d << 3);

fn usb(gsi: u8) -> FunctionBuilder {
    FunctionBuilder::new(USB, 0x8086, 0x293a, 0x0c_0320)
        .memory_bar(0, 0x400)
        .intx(gsi)
        .driver("ehci-pci")
}

/// A house with one more device in dom0, on the line of another.
fn beside(gsi: u8, settings: &str) -> House {
    let config = settings.parse::<Config>().unwrap();
    let house = House::with(config, MachineOptions::default(), &[]);
    house.bus.add(usb(gsi));
    house.hide(&[MSI_ONLY, INTX_ONLY]);
    house
}

fn line(frontend: &mut Frontend, device: PciDevice) -> (u32, u32) {
    let mut read = |offset: u16| frontend.conf_read(device, offset, 1).unwrap();
    (read(INTERRUPT_LINE.offset), read(INTERRUPT_PIN.offset))
}

fn is_silent(house: &House, bdf: Bdf) -> bool {
    let command = house.config(bdf).read(4, Width::Two).unwrap();
    command & u32::from(command::INTX_DISABLE) != 0
}

fn end(house: &House, domain: DomId, frontend: Frontend, device: Bdf) {
    drop(frontend);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    house.until_gone(domain);
    house.until_free(device);
}

#[test]
fn a_line_that_dom0_uses_is_kept_from_a_guest_and_messages_go_on() {
    let house = beside(20, "");
    let (domain, mut frontend) = house.boot(&[MSI_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    for _ in 0..2 {
        assert_eq!(line(&mut frontend, FIRST), (0, 0));
        assert!(is_silent(&house, MSI_ONLY));
        frontend.enable_msi(FIRST).unwrap();
        assert!(house.bus.raise_interrupt(MSI_ONLY, 0));
        assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
        frontend.release_interrupts(FIRST).unwrap();
        assert!(is_silent(&house, MSI_ONLY));
        // Whatever the guest writes.
        let now = frontend.conf_read(FIRST, 4, 2).unwrap();
        frontend
            .conf_write(FIRST, 4, 2, now & !u32::from(command::INTX_DISABLE))
            .unwrap();
        assert!(is_silent(&house, MSI_ONLY));
        assert!(!house.bus.raise_interrupt(MSI_ONLY, 0));
        house.bus.lower_interrupt(MSI_ONLY);
        house.restart();
        until("it is served again", || {
            frontend.conf_read(FIRST, 0, 4).is_ok()
        });
    }
    end(&house, domain, frontend, MSI_ONLY);
    assert!(!is_silent(&house, MSI_ONLY));
}

#[test]
fn a_guest_that_is_to_have_no_line_gets_messages_alone() {
    let house = beside(21, "[defaults]\nintx = \"off\"");
    let (_, mut frontend) = house.boot(&[MSI_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    assert_eq!(line(&mut frontend, FIRST), (0, 0));
    assert!(is_silent(&house, MSI_ONLY));
    frontend.enable_msi(FIRST).unwrap();
    assert!(house.bus.raise_interrupt(MSI_ONLY, 0));
    assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
}

#[test]
fn a_guest_keeps_the_line_that_it_has_when_somebody_else_comes_to_it() {
    let house = beside(21, "");
    let (domain, mut frontend) = house.boot(&[INTX_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    frontend.enable_intx(FIRST).unwrap();
    house.bus.add(usb(19));
    house.restart();
    until("it is served again", || {
        frontend.conf_read(FIRST, 0, 4).is_ok()
    });
    assert_eq!(line(&mut frontend, FIRST), (19, 1));
    assert!(house.bus.raise_interrupt(INTX_ONLY, 0));
    assert!(frontend.wait_for_interrupt(FIRST, 0, LONG).unwrap());
    house.bus.lower_interrupt(INTX_ONLY);
    end(&house, domain, frontend, INTX_ONLY);
    // The next one does not get it, and the one after the other has gone does.
    let (domain, mut frontend) = house.boot(&[INTX_ONLY]);
    assert_eq!(line(&mut frontend, FIRST), (0, 0));
    house.bus.unbind(USB).unwrap();
    assert_eq!(line(&mut frontend, FIRST), (0, 0));
    end(&house, domain, frontend, INTX_ONLY);
    let (_, mut frontend) = house.boot(&[INTX_ONLY]);
    assert_eq!(line(&mut frontend, FIRST), (19, 1));
}

#[test]
fn one_guest_may_have_all_devices_of_a_line_and_another_gets_none_of_it() {
    let house = beside(19, "");
    house.hide(&[USB]);
    let (_, mut frontend) = house.boot(&[INTX_ONLY, USB]);
    assert_eq!(line(&mut frontend, FIRST), (19, 1));
    assert_eq!(line(&mut frontend, SECOND), (19, 1));
    house.bus.add(
        FunctionBuilder::new(Bdf::from_devfn(0, 7, 0), 0x8086, 0x1234, 0x0c_0320)
            .intx(19)
            .driver("uhci_hcd"),
    );
    house.hide(&[Bdf::from_devfn(0, 7, 0)]);
    let (_, mut frontend) = house.boot(&[Bdf::from_devfn(0, 7, 0)]);
    assert_eq!(line(&mut frontend, FIRST), (0, 0));
}

#[test]
fn an_operator_can_allow_a_shared_line() {
    let house = beside(
        19,
        "[[device]]\nbdf = \"03:00.0\"\nallow_shared_interrupt = true",
    );
    let (_, mut frontend) = house.boot(&[INTX_ONLY]);
    frontend.enable_device(FIRST).unwrap();
    assert_eq!(frontend.enable_intx(FIRST).unwrap().0, 19);
    assert!(!is_silent(&house, INTX_ONLY));
}

const SMALL: Bdf = Bdf::from_devfn(0, 8, 0);
const ITS_NEIGHBOUR: Bdf = Bdf::from_devfn(0, 8, 1);

/// A house with two devices whose registers are in one page; the first is hidden.
fn in_one_page(settings: &str) -> House {
    let options = MachineOptions {
        toolstack_timeout: Duration::from_millis(50),
        ..MachineOptions::default()
    };
    let house = House::with(settings.parse().unwrap(), options, &[]);
    house.bus.pack_bars();
    for bdf in [SMALL, ITS_NEIGHBOUR] {
        let device = FunctionBuilder::new(bdf, 0x8086, 0x2930, 0x0c_0500);
        house
            .bus
            .add(device.memory_bar(0, 0x100).driver("i801_smbus"));
    }
    house.hide(&[SMALL]);
    house
}

#[test]
fn a_device_in_a_page_with_somebody_elses_is_refused_and_the_reason_told() {
    let house = in_one_page("");
    let domain = house.guest(&[SMALL]);
    house.until_node(domain, "state-0", "6");
    let reason = || Some(house.guest_line(domain)?.failed.first()?.1.clone());
    until("the reason is told", || {
        reason().is_some_and(|reason| {
            reason.contains("together with 0000:08:00.1 (dom0's i801_smbus)")
                && reason.contains("allow_shared_pages")
        })
    });
    assert_eq!(
        house.record(SMALL).owner().map(|owner| owner.domain),
        Some(DomId(0))
    );
}

#[test]
fn devices_in_one_page_may_be_one_guests() {
    let house = in_one_page("");
    house.hide(&[ITS_NEIGHBOUR]);
    let (_, mut frontend) = house.boot(&[SMALL, ITS_NEIGHBOUR]);
    for device in [FIRST, at(0, 1)] {
        assert_eq!(frontend.conf_read(device, 2, 2).unwrap(), 0x2930);
    }
}

#[test]
fn of_two_guests_that_come_for_devices_in_one_page_at_once_one_gets_its_own() {
    let house = in_one_page("");
    house.hide(&[ITS_NEIGHBOUR]);
    for bdf in [SMALL, ITS_NEIGHBOUR] {
        house.bus.set_access_time(bdf, Duration::from_millis(5));
    }
    let guests = [SMALL, ITS_NEIGHBOUR].map(|bdf| house.guest(&[bdf]));
    let states = || {
        let mut states = guests.map(|domain| house.node(domain, "state-0").unwrap_or_default());
        states.sort();
        states
    };
    until("both are decided on", || {
        states().iter().all(|state| state == "3" || state == "6")
    });
    assert_eq!(states(), ["3", "6"]);
}

#[test]
fn a_device_in_a_page_with_a_guests_is_not_given_back_to_dom0() {
    for (settings, given_back) in [("", false), ("[defaults]\nallow_shared_pages = true", true)] {
        let house = in_one_page(settings);
        house.hide(&[ITS_NEIGHBOUR]);
        let (domain, frontend) = house.boot(&[SMALL]);
        let request = Request::Unhide {
            devices: vec![ITS_NEIGHBOUR.to_string()],
            force: false,
        };
        let entry = &entries(house.ask(&request)).unwrap()[0];
        assert_eq!(entry.ok, given_back, "{entry:?}");
        if !given_back {
            let told = format!("together with {SMALL} (domain {domain})");
            assert!(entry.message.contains(&told), "{entry:?}");
        }
        end(&house, domain, frontend, SMALL);
        assert!(given_back || entries(house.ask(&request)).unwrap()[0].ok);
    }
}

#[test]
fn an_operator_can_allow_shared_pages() {
    let house = in_one_page("[defaults]\nallow_shared_pages = true");
    let (_, mut frontend) = house.boot(&[SMALL]);
    assert_eq!(frontend.conf_read(FIRST, 2, 2).unwrap(), 0x2930);
}
