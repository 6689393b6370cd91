//! What happens, chapter by chapter.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use conf_space::Bdf;
use pcibackd::control::protocol::DeviceLine;
use pcibackd::host::Bus;
use pcibackd::host::devices::for_xen;
use pcibackd::host::sim::{BOOT_CONTROLLER, NIC_VF0, NVME};
use xenbus::sim::PciOptions;
use xenbus::{DomId, PciDevice, Xen};

use super::DemoError;
use super::checks::Checks;
use super::guest::Guest;
use super::stage::Stage;
use super::timeline::{Who, duration};
use super::watcher::Watcher;

/// What the guest is to have.
const DEVICES: [Bdf; 2] = [NIC_VF0, NVME];
const NAME: &str = "demo";

/// The devices as dom0 had them.
struct Before {
    lines: BTreeMap<Bdf, DeviceLine>,
    configuration: BTreeMap<Bdf, Vec<Option<u32>>>,
}

/// Tells it all.
pub fn tell(stage: &Stage, checks: &mut Checks) -> Result<(), DemoError> {
    stage.timeline.heading("The host's PCI buses");
    stage.show_host()?;
    let mut before = Before {
        lines: stage.list()?,
        configuration: BTreeMap::new(),
    };
    for bdf in DEVICES {
        before.configuration.insert(bdf, stage.config(bdf)?);
    }

    stage.timeline.heading("Devices are hidden from dom0");
    hide(stage, checks, &before)?;

    stage.timeline.heading("A guest starts with them");
    let store = stage.machine().connect_xenstore()?;
    let watcher = Watcher::start(store, stage.timeline.clone())?;
    let mut guest = start(stage, checks)?;
    stage.timeline.heading("The host's PCI buses now");
    stage.show_host()?;
    guest.show(stage);

    stage.timeline.heading("The guest's drivers use them");
    for function in guest.functions() {
        guest.use_device(stage, checks, function)?;
    }

    stage
        .timeline
        .heading("One is taken away, while the other works on, and given again");
    take_away_and_give_again(stage, checks, &mut guest)?;

    stage
        .timeline
        .heading("The guest goes, and dom0 gets its devices back");
    let domain = guest.domain;
    end(stage, checks, guest)?;
    drop(watcher);
    give_back(stage, checks, &before)?;
    nothing_is_left(stage, checks, domain)
}

fn hide(stage: &Stage, checks: &mut Checks, before: &Before) -> Result<(), DemoError> {
    for entry in stage.hide(BOOT_CONTROLLER)? {
        let what = format!("{}: not hidden", entry.entry);
        stage.timeline.tell(Who::Daemon, &what, &entry.message);
        checks.is("what dom0 lives on is not hidden", !entry.ok);
    }
    for bdf in DEVICES {
        let resets = stage.bus().resets(bdf);
        let start = Instant::now();
        for entry in stage.hide(bdf)? {
            let took = duration(start.elapsed());
            let what = format!("{}: {} in {took}", entry.entry, entry.message);
            let line = before.lines.get(&bdf);
            let driver = line.and_then(|line| line.driver.as_deref());
            let comment = format!(
                "taken from dom0's {}, {}, its DMA is {}",
                driver.unwrap_or("(no driver)"),
                times_reset(stage, bdf, resets),
                stage.owner_name(bdf)
            );
            stage.timeline.tell(Who::Daemon, &what, &comment);
            checks.is(&format!("{bdf} is hidden"), entry.ok);
        }
        let bound = stage.bus().describe(bdf)?.driver;
        checks.equal(
            &format!("no driver of dom0's is bound to {bdf}"),
            &bound,
            &None,
        );
        checks.equal(
            &format!("the DMA of {bdf} is quarantined"),
            &stage.owner(bdf),
            &Some(DomId::IO),
        );
    }
    Ok(())
}

/// How often a device was reset since it had been `before` times.
fn times_reset(stage: &Stage, bdf: Bdf, before: usize) -> String {
    match stage.bus().resets(bdf).saturating_sub(before) {
        0 => "never reset".to_owned(),
        1 => "reset once".to_owned(),
        times => format!("reset {times} times"),
    }
}

fn start(stage: &Stage, checks: &mut Checks) -> Result<Guest, DemoError> {
    let machine = stage.machine();
    let guest = Guest::start(stage, NAME, |domain| {
        for bdf in DEVICES {
            machine.pci_attach(domain, for_xen(bdf), &PciOptions::default())?;
            let what = format!("attaches {bdf}");
            let comment = "as pci = [...] in a guest's configuration asks for";
            stage.timeline.tell(Who::Toolstack, &what, comment);
        }
        Ok(())
    })?;
    compare_with_host(stage, checks, &guest)?;
    checks.equal(
        "pcibackd maps one page of the guest's",
        &machine.mapped_grants(guest.domain),
        &1,
    );
    let counted = (DEVICES.len(), 0, guest.observer.total());
    // The daemon does not stop for its status: the last operations show in it a moment later.
    let mut seen = None;
    let known = stage.wait_until("pcibackd has counted the operations", || {
        let mut guests = stage.status()?.guests.into_iter();
        let line = guests.find(|line| line.domain == guest.domain.0);
        seen = line.map(|line| (line.devices.len(), line.failed.len(), line.operations));
        Ok(seen == Some(counted))
    });
    if !matches!(known, Err(DemoError::Waited { .. })) {
        known?;
    }
    checks.equal(
        "pcibackd counts the guest's devices, failures and operations as the guest does",
        &seen,
        &Some(counted),
    );
    Ok(guest)
}

/// The guest's devices are the host's, with their identity and all their BARs.
fn compare_with_host(stage: &Stage, checks: &mut Checks, guest: &Guest) -> Result<(), DemoError> {
    let found = guest.functions().len();
    let claim = "the guest finds its devices and no other";
    checks.equal(claim, &found, &DEVICES.len());
    for (address, bdf) in host_devices(stage, guest)? {
        let Some(function) = guest.frontend.function(address) else {
            checks.is(&format!("the guest has {bdf} at {address}"), false);
            continue;
        };
        let identity = stage.bus().describe(bdf)?.identity;
        checks.equal(
            &format!("the guest reads which device {bdf} is"),
            &(function.vendor, function.device),
            &(identity.vendor, identity.device),
        );
        let seen = function.bars.iter().map(|bar| (bar.address, bar.size));
        let resources = identity.resources.iter();
        let real = resources.filter(|resource| resource.is_present());
        checks.equal(
            &format!("the guest finds the BARs of {bdf} where and as large as they are"),
            &seen.collect::<Vec<_>>(),
            &real
                .map(|resource| (resource.start, resource.size))
                .collect(),
        );
    }
    Ok(())
}

/// Which host device each of the guest's functions is, as pcibackd says.
fn host_devices(stage: &Stage, guest: &Guest) -> Result<BTreeMap<PciDevice, Bdf>, DemoError> {
    let lines = stage.list()?.into_values();
    let of_the_guest = lines.filter(|line| line.domain == Some(guest.domain.0));
    Ok(of_the_guest
        .filter_map(|line| Some((for_xen(line.seen_as?), line.device)))
        .collect())
}

fn take_away_and_give_again(
    stage: &Stage,
    checks: &mut Checks,
    guest: &mut Guest,
) -> Result<(), DemoError> {
    let devices = host_devices(stage, guest)?;
    let address_of = |wanted| devices.iter().find(|(_, bdf)| **bdf == wanted);
    let (Some((&taken, _)), Some((&kept, _))) = (address_of(NVME), address_of(NIC_VF0)) else {
        checks.is("pcibackd tells where the guest has its devices", false);
        return Ok(());
    };
    let resets = stage.bus().resets(NVME);
    let what = format!("detaches {NVME}");
    stage.timeline.tell(Who::Toolstack, &what, "xl pci-detach");
    guest.follow_while(stage.machine(), |machine, domain| {
        machine.pci_detach(domain, for_xen(NVME))
    })?;
    checks.is(
        &format!("the guest lets go of {taken}"),
        guest.frontend.function(taken).is_none(),
    );
    let waited = duration(stage.wait_for_state(NVME, "hidden")?);
    let what = format!("{NVME}: hidden, {waited} later");
    let comment = format!(
        "{} on the way, by the toolstack too",
        times_reset(stage, NVME, resets)
    );
    stage.timeline.tell(Who::Daemon, &what, &comment);
    checks.is(
        &format!("{NVME} is reset before anybody else can have it"),
        stage.bus().resets(NVME) > resets,
    );
    let gone = guest.forget_pirqs(taken);
    let mapped = stage.machine().mapped_pirqs(guest.domain);
    checks.is(
        &format!("the interrupts of {taken} are taken back"),
        !gone.is_empty() && gone.iter().all(|pirq| !mapped.contains(pirq)),
    );
    guest.take_interrupts(stage, checks, kept)?;
    guest.show(stage);
    stage.timeline.print("\n");
    give_again(stage, checks, guest, kept)
}

fn give_again(
    stage: &Stage,
    checks: &mut Checks,
    guest: &mut Guest,
    kept: PciDevice,
) -> Result<(), DemoError> {
    let what = format!("attaches {NVME}");
    stage.timeline.tell(Who::Toolstack, &what, "xl pci-attach");
    let machine = stage.machine();
    machine.pci_attach(guest.domain, for_xen(NVME), &PciOptions::default())?;
    // The toolstack does not wait this time.
    stage.wait_until("the guest has found the device", || {
        guest.frontend.follow(Duration::from_millis(10))?;
        Ok(guest.functions().len() == DEVICES.len())
    })?;
    let functions = guest.functions();
    let new = functions.into_iter().filter(|address| *address != kept);
    for address in new {
        guest.use_device(stage, checks, address)?;
    }
    Ok(())
}

fn end(stage: &Stage, checks: &mut Checks, mut guest: Guest) -> Result<(), DemoError> {
    guest.frontend.shut_down_guest()?;
    let start = Instant::now();
    stage.machine().destroy_domain(guest.domain)?;
    let took = start.elapsed();
    let what = format!("destroys domain {} in {}", guest.domain, duration(took));
    let comment = "after the guest has shut down";
    stage.timeline.tell(Who::Toolstack, &what, comment);
    drop(guest.frontend);
    let claim = "the toolstack waits less than a second for a guest's end";
    checks.is(claim, took < Duration::from_secs(1));
    let waited = stage.wait_until("pcibackd has ended the guest's session", || {
        Ok(stage.status()?.guests.is_empty())
    })?;
    for bdf in DEVICES {
        stage.wait_for_state(bdf, "hidden")?;
    }
    let what = format!("serves no guest, {} later", duration(waited));
    let comment = "its devices are hidden, for the next one to have";
    stage.timeline.tell(Who::Daemon, &what, comment);
    Ok(())
}

fn give_back(stage: &Stage, checks: &mut Checks, before: &Before) -> Result<(), DemoError> {
    for bdf in DEVICES {
        for entry in stage.unhide(bdf)? {
            let what = format!("{}: {}", entry.entry, entry.message);
            let comment = format!("its DMA is {}", stage.owner_name(bdf));
            stage.timeline.tell(Who::Daemon, &what, &comment);
            checks.is(&format!("{bdf} is given back"), entry.ok);
        }
        checks.equal(
            &format!("{bdf} is dom0's, with the driver it had"),
            &stage.line(bdf)?.as_ref(),
            &before.lines.get(&bdf),
        );
        checks.equal(
            &format!("the DMA of {bdf} is dom0's"),
            &stage.owner(bdf),
            &Some(DomId::DOM0),
        );
        checks.is(
            &format!("the configuration of {bdf} is what it was"),
            before.configuration.get(&bdf) == Some(&stage.config(bdf)?),
        );
    }
    Ok(())
}

fn nothing_is_left(stage: &Stage, checks: &mut Checks, domain: DomId) -> Result<(), DemoError> {
    let machine = stage.machine();
    let pages = machine.mapped_grants(domain);
    let pirqs = machine.mapped_pirqs(domain).len();
    let backend = format!("/local/domain/0/backend/pci/{domain}");
    let nodes = machine.xenstore_nodes();
    let nodes = nodes.keys().filter(|path| path.starts_with(&backend));
    let nodes: Vec<&String> = nodes.collect();
    let records = std::fs::read_dir(stage.run_dir().join("devices"));
    let records = records.map(Iterator::count).ok();

    let what = format!("{pages} pages and {pirqs} PIRQs are mapped");
    let comment = format!("of what was domain {domain}'s");
    stage.timeline.tell(Who::Daemon, &what, &comment);
    checks.equal("no page of the guest's is left mapped", &pages, &0);
    checks.equal("no interrupt of the guest's is left mapped", &pirqs, &0);
    let known = machine.domain_info(domain)?;
    checks.equal("Xen has forgotten the guest", &known, &None);
    let claim = "nothing of its backend is left in xenstore";
    checks.equal(claim, &nodes, &Vec::new());
    let claim = "no record of a hidden device is left";
    checks.equal(claim, &records, &Some(0));
    Ok(())
}
