//! What the doctor says of devices.

use std::time::Duration;

use conf_space::registers::power_management;
use conf_space::{Bdf, Width};
use pcibackd::config::Config;
use pcibackd::control::protocol::{Request, Response};
use pcibackd::daemon::records;
use pcibackd::doctor::{Finding, Verdict, offline};
use pcibackd::host::Bus;
use pcibackd::host::record::Phase;
use pcibackd::host::sim::{
    BOOT_CONTROLLER, BRIDGE, BROKEN, FunctionBuilder, INTX_ONLY, MSI_ONLY, NIC, NIC_VF0, NVME,
};
use xenbus::sim::MachineOptions;

use crate::house::{House, until};

struct Findings(Vec<Finding>);

impl Findings {
    fn of(house: &House, device: Option<Bdf>, try_resets: bool) -> Self {
        let device = device.map(|bdf| bdf.to_string());
        match house.ask(&Request::Doctor { device, try_resets }) {
            Response::Findings { findings } => Self(findings),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn about(&self, check: &str) -> &Finding {
        let mut found = self.0.iter().filter(|finding| finding.check == check);
        let finding = found.next().unwrap_or_else(|| panic!("{:?}", self.0));
        assert_eq!(found.next(), None);
        finding
    }

    #[track_caller]
    fn says(&self, check: &str, verdict: Verdict, message: &str) {
        let finding = self.about(check);
        assert_eq!(finding.verdict, verdict, "{finding:?}");
        assert!(finding.message.contains(message), "{finding:?}");
        assert_eq!(
            finding.remedy.is_some(),
            verdict >= Verdict::Warning,
            "{finding:?}"
        );
    }

    fn is_good(&self) -> bool {
        self.0.iter().all(|finding| finding.verdict <= Verdict::Ok)
    }
}

fn look(house: &House, bdf: Bdf) -> Findings {
    Findings::of(house, Some(bdf), false)
}

fn with(settings: &str) -> House {
    let options = MachineOptions {
        toolstack_timeout: Duration::from_millis(50),
        ..MachineOptions::default()
    };
    House::with(settings.parse::<Config>().unwrap(), options, &[])
}

#[test]
fn a_healthy_device_has_good_findings_wherever_it_is() {
    let house = House::new(&[]);
    let dom0 = look(&house, NVME);
    assert!(dom0.is_good(), "{:?}", dom0.0);
    dom0.says("holder", Verdict::Ok, "dom0's nvme");
    house.hide(&[NVME]);
    let hidden = look(&house, NVME);
    assert!(hidden.is_good(), "{:?}", hidden.0);
    hidden.says("holder", Verdict::Ok, "can be given to a guest");
    hidden.says("MSI-X", Verdict::Ok, "table of 4 at 0x2000 of BAR 0");
    hidden.says("reset", Verdict::Ok, "by flr; set: auto");
    let (domain, _frontend) = house.boot(&[NVME]);
    let assigned = look(&house, NVME);
    assert!(assigned.is_good(), "{:?}", assigned.0);
    let whose = format!("domain {domain}, which sees it as 0000:00:00.0");
    assigned.says("holder", Verdict::Ok, &whose);
}

#[test]
fn without_a_device_all_hidden_ones_are_looked_at() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let all = Findings::of(&house, None, false);
    let mut devices: Vec<Bdf> = all.0.iter().filter_map(|finding| finding.device).collect();
    devices.dedup();
    assert_eq!(devices, [NVME, MSI_ONLY]);
}

#[test]
fn what_cannot_be_looked_at_is_refused_with_the_reason() {
    let house = House::new(&[]);
    for device in ["77:00.0", "nonsense"] {
        let device = Some(device.to_owned());
        let try_resets = false;
        let answer = house.ask(&Request::Doctor { device, try_resets });
        assert!(matches!(answer, Response::Failed { .. }), "{answer:?}");
    }
}

#[test]
fn what_dom0_needs_and_what_no_guest_can_have_is_told() {
    let house = House::new(&[]);
    let disk = look(&house, BOOT_CONTROLLER);
    disk.says("needed by dom0", Verdict::Warning, "root file system");
    let bridge = look(&house, BRIDGE);
    assert_eq!(bridge.0.len(), 1);
    bridge.says("kind", Verdict::NotApplicable, "a bridge");
}

#[test]
fn a_dead_device_is_a_problem_with_a_way_out() {
    let house = House::impatient(&[NVME]);
    let (domain, frontend) = house.boot(&[NVME]);
    drop(frontend);
    house.bus.set_reset_fails(NVME, true);
    house.machine.domain_shut_down(domain).unwrap();
    house.machine.destroy_domain(domain).unwrap();
    until("it is found dead", || {
        house.phase(NVME) == Some(Phase::Dead)
    });
    let tried = Findings::of(&house, Some(NVME), true);
    tried.says("resets tried", Verdict::NotApplicable, "did not come back");
    let dead = look(&house, NVME);
    dead.says("holder", Verdict::Problem, "did not come back");
    dead.says("registers", Verdict::Problem, "read as ones");
    let remedy = dead.about("holder").remedy.as_ref().unwrap();
    assert!(remedy.contains("pciback reset --method bus 0000:02:00.0"));
    assert!(remedy.contains("/sys/bus/pci/rescan"));
}

#[test]
fn a_reservation_that_does_not_fit_is_told() {
    let house = House::new(&[NVME]);
    house.bus.set_driver_override(NVME, None).unwrap();
    look(&house, NVME).says("driver_override", Verdict::Problem, "taken back");
    house.bus.unbind(MSI_ONLY).unwrap();
    house
        .bus
        .set_driver_override(MSI_ONLY, Some("pciback"))
        .unwrap();
    look(&house, MSI_ONLY).says("driver_override", Verdict::Warning, "not hidden");
    house
        .bus
        .set_driver_override(MSI_ONLY, Some("vfio-pci"))
        .unwrap();
    look(&house, MSI_ONLY).says("driver_override", Verdict::Ok, "'vfio-pci'");
}

#[test]
fn a_device_that_sleeps_although_nobody_has_it_is_told() {
    let house = House::new(&[NVME]);
    let config = house.config(NVME);
    let base = (0x40..0x100)
        .step_by(4)
        .find(|offset| config.read(*offset, Width::One) == Ok(1))
        .unwrap();
    let control = base + power_management::CONTROL.offset;
    config.write(control, Width::Two, 3).unwrap();
    look(&house, NVME).says("power", Verdict::Warning, "D3Hot");
    house.bus.set_may_lose_power(NVME, true).unwrap();
    look(&house, NVME).says("power", Verdict::Warning, "cut its power");
}

#[test]
fn a_shared_line_is_told_with_what_it_means_for_the_driver() {
    let house = House::new(&[MSI_ONLY, INTX_ONLY]);
    look(&house, INTX_ONLY).says("INTx", Verdict::Ok, "line 19, for itself");
    for (bus, gsi) in [(7, 19), (8, 20)] {
        let device = FunctionBuilder::new(Bdf::from_devfn(0, bus, 0), 0x8086, 0x1234, 0x0c_0300);
        house.bus.add(device.intx(gsi).driver("uhci_hcd"));
    }
    let without = look(&house, INTX_ONLY);
    without.says("INTx", Verdict::Warning, "0000:07:00.0 (dom0's uhci_hcd)");
    without.says("INTx", Verdict::Warning, "gets no interrupts");
    look(&house, MSI_ONLY).says("INTx", Verdict::Warning, "has to use MSI");
    let (_, _frontend) = house.boot(&[MSI_ONLY]);
    house.bus.unbind(Bdf::from_devfn(0, 8, 0)).unwrap();
    look(&house, MSI_ONLY).says("INTx", Verdict::Warning, "was shared");
}

#[test]
fn a_shared_page_is_a_problem_unless_it_is_allowed() {
    for (settings, verdict) in [
        ("", Verdict::Problem),
        ("[defaults]\nallow_shared_pages = true", Verdict::Warning),
    ] {
        let house = with(settings);
        house.bus.pack_bars();
        let [first, second] = [0, 1].map(|function| Bdf::from_devfn(0, 8, function));
        for bdf in [first, second] {
            let device = FunctionBuilder::new(bdf, 0x8086, 0x2930, 0x0c_0500);
            house.bus.add(device.memory_bar(0, 0x100));
        }
        house.hide(&[first]);
        look(&house, first).says("pages", verdict, "together with 0000:08:00.1 (dom0)");
        // Conventional PCI, too.
        look(&house, first).says("requester ID", Verdict::Warning, "one with 0000:08:00.1");
        house.hide(&[second]);
        look(&house, first).says("pages", Verdict::Ok, "");
        look(&house, first).says("requester ID", Verdict::Ok, "nobody else's");
    }
}

#[test]
fn a_guest_that_could_not_get_a_device_is_named() {
    let house = with("");
    house.bus.pack_bars();
    let [first, second] = [0, 1].map(|function| Bdf::from_devfn(0, 8, function));
    for bdf in [first, second] {
        let device = FunctionBuilder::new(bdf, 0x8086, 0x2930, 0x0c_0500);
        house.bus.add(device.memory_bar(0, 0x100));
    }
    house.hide(&[first]);
    let domain = house.guest(&[first]);
    house.until_node(domain, "state-0", "6");
    until("the reason is known", || {
        house
            .guest_line(domain)
            .is_some_and(|line| !line.failed.is_empty())
    });
    look(&house, first).says("attach", Verdict::Problem, "allow_shared_pages");
}

#[test]
fn resets_are_judged_by_what_is_offered_and_what_is_set() {
    let house = with(
        "[[device]]\nbdf = \"02:00.0\"\nreset = \"bus\"\n[[device]]\nbdf = \"04:00.0\"\nreset = \"none\"",
    );
    house.hide(&[NVME, MSI_ONLY, INTX_ONLY]);
    look(&house, NVME).says("reset", Verdict::Warning, "the kernel offers flr");
    look(&house, MSI_ONLY).says("reset", Verdict::Warning, "as its settings say");
    look(&house, INTX_ONLY).says("reset", Verdict::Warning, "no way to reset it");
}

#[test]
fn every_reset_is_tried_when_asked_for_until_one_kills_the_device() {
    let card = Bdf::from_devfn(0, 6, 0);
    let house = House::new(&[NVME]);
    let device = FunctionBuilder::new(card, 0x1002, 0x67df, 0x03_0000);
    house
        .bus
        .add(device.reset_methods(&["bus", "flr", "pm"]).driver("amdgpu"));
    house.hide(&[card]);
    let tried = Findings::of(&house, Some(card), true);
    for method in ["bus", "flr", "pm"] {
        tried.says(&format!("reset by {method}"), Verdict::Ok, "is back");
    }
    assert_eq!(house.phase(card), Some(Phase::Hidden));
    assert_eq!(
        house.bus.describe(card).unwrap().reset_methods,
        ["bus", "flr", "pm"]
    );
    let device = FunctionBuilder::new(card, 0x1002, 0x67df, 0x03_0000);
    house.unhide(card);
    house
        .bus
        .add(device.reset_methods(&["flr", "pm"]).driver("amdgpu"));
    house.hide(&[card]);
    house.bus.set_reset_fails(card, true);
    let tried = Findings::of(&house, Some(card), true);
    tried.says("reset by flr", Verdict::Problem, "did not come back");
    assert!(!tried.0.iter().any(|finding| finding.check == "reset by pm"));
    assert_eq!(house.phase(card), Some(Phase::Dead));
    tried.says("holder", Verdict::Problem, "did not come back");
}

#[test]
fn no_reset_is_tried_on_a_device_that_somebody_has() {
    let house = House::new(&[NVME]);
    let (_, _frontend) = house.boot(&[NVME]);
    let before = (house.bus.resets(NVME), house.bus.resets(NIC));
    for (bdf, why) in [(NVME, "in use by domain"), (NIC, "not hidden")] {
        let tried = Findings::of(&house, Some(bdf), true);
        tried.says("resets tried", Verdict::NotApplicable, why);
    }
    assert_eq!((house.bus.resets(NVME), house.bus.resets(NIC)), before);
}

#[test]
fn sriov_relations_are_told() {
    let house = House::new(&[NIC_VF0]);
    look(&house, NIC).says("SR-IOV", Verdict::Warning, "2 virtual functions");
    look(&house, NIC_VF0).says("SR-IOV", Verdict::Ok, "which dom0's igb has");
}

#[test]
fn what_a_guest_may_beyond_the_ordinary_is_told() {
    let house = with(
        "[[device]]\nbdf = \"04:00.0\"\npermissive = [\"0x40..0x48\"]\n\
         [[device]]\nbdf = \"02:00.0\"\npermissive = true\nallow_interrupt_control = true",
    );
    look(&house, NVME).says("permissions", Verdict::Warning, "write every register");
    house.hide(&[NVME, MSI_ONLY, INTX_ONLY]);
    look(&house, INTX_ONLY).says("permissions", Verdict::Ok, "ordinary");
    look(&house, MSI_ONLY).says("permissions", Verdict::Ok, "permissive ranges");
    let wide = look(&house, NVME);
    wide.says("permissions", Verdict::Warning, "write every register");
    wide.says("permissions", Verdict::Warning, "switch its interrupts");
}

#[test]
fn a_broken_msix_table_is_told() {
    let house = House::new(&[BROKEN]);
    look(&house, BROKEN).says("MSI-X", Verdict::Warning, "guests cannot use it");
    let odd = Bdf::from_devfn(0, 9, 0);
    let device = FunctionBuilder::new(odd, 0x8086, 0x2725, 0x02_8000);
    house
        .bus
        .add(device.memory_bar(0, 0x4000).msix(8, 0, 0x1800));
    look(&house, odd).says("MSI-X", Verdict::Warning, "in the middle of a page");
}

#[test]
fn without_a_daemon_its_records_tell() {
    let house = House::new(&[NVME, MSI_ONLY]);
    let (domain, _frontend) = house.boot(&[NVME]);
    house.kill();
    let directory = house.records_directory();
    assert_eq!(records(directory.parent().unwrap()), directory);
    let all = Findings(offline::examine(&*house.bus, &directory, None).unwrap());
    let whose = format!("domain {domain}");
    let holder = |bdf: Bdf| {
        let mut all = all.0.iter();
        all.find(|finding| finding.device == Some(bdf) && finding.check == "holder")
            .unwrap()
    };
    assert!(holder(NVME).message.contains(&whose));
    assert!(holder(MSI_ONLY).message.contains("can be given"));
    let other = Findings(offline::examine(&*house.bus, &directory, Some(NIC)).unwrap());
    other.says("holder", Verdict::Ok, "dom0's igb");
    other.says("permissions", Verdict::NotApplicable, "pcibackd runs");
    // One that is no longer there keeps nobody from hearing of the others.
    house.bus.remove(MSI_ONLY);
    let all = Findings(offline::examine(&*house.bus, &directory, None).unwrap());
    all.says("device", Verdict::Problem, "no PCI device");
    all.says("needed by dom0", Verdict::Ok, "no");
    assert!(offline::examine(&*house.bus, &directory, Some(MSI_ONLY)).is_err());
    // Looking made no records.
    assert_eq!(house.records(), [NVME, MSI_ONLY]);
    assert!(
        offline::examine(&*house.bus, &directory.join("x"), None)
            .unwrap()
            .is_empty()
    );
    house.start();
}
