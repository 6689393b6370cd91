//! Judging a device.

use conf_space::address::Bdf;
use conf_space::overlay::{Permissive, PowerState};

use super::device_facts::{DeviceFacts, Registers, Table};
use super::{Finding, Findings};
use crate::config::{InterruptControl, ResetChoice};
use crate::host::devices::RESERVED_FOR;
use crate::host::group::{Group, SWITCH_ON};
use crate::host::record::{Flags, Phase};
use crate::host::reset::{Way, names, way};
use crate::host::sharing::Holder;
use crate::host::{Backend, Function, HostError, backend, is_bridge};
use crate::text::{chain, listed};

/// Judges the facts.
pub fn judge(facts: &DeviceFacts) -> Vec<Finding> {
    let bdf = facts.description.identity.bdf;
    let mut findings = Findings::about(bdf);
    if is_bridge(facts.description.class) {
        findings.not_applicable(
            "kind",
            "a bridge: only the devices behind it are for guests",
        );
        return findings.into_list();
    }
    holder(&mut findings, facts, bdf);
    host(&mut findings, facts, bdf);
    driver_override(&mut findings, facts, bdf);
    needed(&mut findings, facts);
    match &facts.registers {
        Err(reason) => findings.problem(
            "registers",
            format!("its configuration space cannot be read ({reason})"),
            "see the kernel's log (dmesg)",
        ),
        Ok(registers) if !registers.answers => findings.problem(
            "registers",
            "all of them read as ones: the device is dead, or has no power",
            revive(facts, bdf),
        ),
        Ok(registers) => {
            findings.ok("registers", "they can be read");
            power(&mut findings, facts, registers, bdf);
            interrupt_line(&mut findings, facts, registers, bdf);
            msix(&mut findings, registers);
            requester(&mut findings, facts, registers);
        }
    }
    resets(&mut findings, facts, bdf);
    pages(&mut findings, facts, bdf);
    sriov(&mut findings, facts, bdf);
    permissions(&mut findings, facts, bdf);
    for (domain, reason) in &facts.failed {
        findings.problem(
            "attach",
            format!("domain {domain} could not get it: {reason}"),
            format!(
                "once that is mended: xl pci-detach {domain} {bdf}; xl pci-attach {domain} {bdf}"
            ),
        );
    }
    findings.into_list()
}

/// Of one among several that cannot be looked at.
pub fn unknown(bdf: Bdf, reason: &HostError) -> Vec<Finding> {
    let mut findings = Findings::about(bdf);
    findings.problem(
        "device",
        format!("it cannot be looked at ({})", chain(reason)),
        "if it was taken out: systemctl restart pcibackd; else see the kernel's log (dmesg)",
    );
    findings.into_list()
}

fn revive(facts: &DeviceFacts, bdf: Bdf) -> String {
    let anew = format!(
        "echo 1 > /sys/bus/pci/devices/{bdf}/remove; echo 1 > /sys/bus/pci/rescan; or a power cycle of the host"
    );
    match facts.standing {
        Some(_) => format!(
            "another reset (pciback reset --method bus {bdf}); if that does not help: pciback unhide {bdf}; {anew}"
        ),
        None => anew,
    }
}

fn holder(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "holder";
    let Some(standing) = &facts.standing else {
        let driver = match &facts.description.driver {
            Some(driver) => format!("dom0's {driver}"),
            None => "dom0, without a driver".to_owned(),
        };
        findings.ok(CHECK, format!("{driver}; for a guest: pciback hide {bdf}"));
        return;
    };
    match (standing.phase, standing.owner) {
        (Phase::Assigned, Some(owner)) => findings.ok(
            CHECK,
            format!(
                "domain {}, which sees it as {}",
                owner.domain, owner.seen_as
            ),
        ),
        (Phase::Dead, _) => findings.problem(
            CHECK,
            "nobody: it did not come back from its last reset, and no guest gets it",
            revive(facts, bdf),
        ),
        (Phase::Hidden, _) => findings.ok(CHECK, "nobody: it can be given to a guest"),
        (phase, _) => findings.ok(CHECK, format!("nobody for now: {}", phase.name())),
    }
}

/// How it is reached, and why so.
fn host(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "host";
    let choice = facts.settings.map(|settings| settings.host);
    if let Err(wrong) = backend::check(choice.unwrap_or_default(), facts.backend) {
        return findings.problem(
            CHECK,
            wrong.to_string(),
            format!(
                "take 'host' out of its settings: pciback set {bdf} shows where they come from"
            ),
        );
    }
    match (facts.backend, &facts.group) {
        (Backend::Simulated, _) => findings.not_applicable(CHECK, "it is simulated"),
        (Backend::Sysfs, None) => findings.ok(
            CHECK,
            "sysfs: Linux has no IOMMU group of it, as under Xen, which keeps its DMA in bounds itself",
        ),
        (Backend::Sysfs, Some(group)) => findings.ok(
            CHECK,
            format!(
                "sysfs, as under Xen; Linux has it in IOMMU group {}, so a pcibackd without Xen (--platform vfio) would reach it through VFIO",
                group.number
            ),
        ),
        (Backend::Vfio, None) => {
            findings.problem(
                CHECK,
                "VFIO, and Linux has no IOMMU group of it",
                SWITCH_ON,
            );
        }
        (Backend::Vfio, Some(group)) => match group.check(&[bdf]) {
            Ok(()) => findings.ok(
                CHECK,
                format!("VFIO: Linux has the IOMMU; group {}{}", group.number, others(group, bdf)),
            ),
            Err(others) => findings.warning(
                CHECK,
                format!("VFIO: Linux has the IOMMU; it cannot be given to a guest alone: {others}"),
                format!("pciback hide --group {bdf}"),
            ),
        },
    }
}

fn others(group: &Group, bdf: Bdf) -> String {
    let others = listed(group.endpoints().filter(|other| *other != bdf));
    if others.is_empty() {
        return others;
    }
    format!(", which goes to one guest together with {others}")
}

fn driver_override(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "driver_override";
    let file = format!("/sys/bus/pci/devices/{bdf}/driver_override");
    let reserved = facts.driver_override.as_deref();
    match (reserved, facts.standing.is_some()) {
        (Some(RESERVED_FOR), true) => {
            findings.ok(CHECK, format!("'{RESERVED_FOR}': no driver of dom0's takes it"));
        }
        (Some(RESERVED_FOR), false) => findings.warning(
            CHECK,
            format!("'{RESERVED_FOR}', and it is not hidden: no driver takes it"),
            format!("pciback hide {bdf}; or for dom0: echo > {file}; echo {bdf} > /sys/bus/pci/drivers_probe"),
        ),
        (_, true) => findings.problem(
            CHECK,
            "somebody has taken back that it is hidden: a driver of dom0's may bind to it",
            format!("echo {RESERVED_FOR} > {file}"),
        ),
        (Some(other), false) => findings.ok(CHECK, format!("'{other}': reserved for that driver")),
        (None, false) => findings.ok(CHECK, "none"),
    }
}

fn needed(findings: &mut Findings, facts: &DeviceFacts) {
    const CHECK: &str = "needed by dom0";
    match &facts.needed {
        Some(reason) => findings.warning(
            CHECK,
            reason.as_str(),
            "it is not hidden without --force; move what dom0 has on it first",
        ),
        None => findings.ok(CHECK, "no"),
    }
}

fn power(findings: &mut Findings, facts: &DeviceFacts, registers: &Registers, bdf: Bdf) {
    const CHECK: &str = "power";
    let free = facts
        .standing
        .is_some_and(|standing| standing.phase == Phase::Hidden);
    if facts.standing.is_some() && facts.may_lose_power {
        return findings.warning(
            CHECK,
            "somebody has allowed the kernel to cut its power together with its bridge's, as if nobody used it",
            format!("echo 0 > /sys/bus/pci/devices/{bdf}/d3cold_allowed"),
        );
    }
    match registers.power {
        None => findings.not_applicable(CHECK, "it has no power management"),
        Some(PowerState::D0) => findings.ok(CHECK, "D0"),
        Some(state) if free => findings.warning(
            CHECK,
            format!("{state:?}, although nobody has it"),
            format!("pciback reset {bdf}"),
        ),
        Some(state) => findings.ok(CHECK, format!("{state:?}, as whoever has it wants")),
    }
}

fn interrupt_line(findings: &mut Findings, facts: &DeviceFacts, registers: &Registers, bdf: Bdf) {
    const CHECK: &str = "INTx";
    let irq = facts.description.irq;
    let messages = registers.msi || registers.msix.as_ref().is_some_and(Result::is_ok);
    let refused = facts.standing.is_some_and(|standing| {
        standing.holder().is_some() && standing.flags.contains(Flags::WITHOUT_INTX)
    });
    let instead = if messages {
        "its driver has to use MSI"
    } else {
        "and as it has no MSI, its driver gets no interrupts"
    };
    if !registers.pin || irq == 0 {
        findings.not_applicable(CHECK, "it has no line");
    } else if let Some(other) = facts.line.first() {
        let allowed = facts
            .settings
            .as_ref()
            .is_some_and(|settings| settings.allow_shared_interrupt);
        let what = if allowed && !refused {
            format!("line {irq} is shared with {other}, which is allowed")
        } else {
            format!("line {irq} is shared with {other}: a guest does not get it, {instead}")
        };
        findings.warning(
            CHECK,
            what,
            format!(
                "move the card to another slot, hide {} too and give both to the same guest, or set allow_shared_interrupt = true for {bdf}",
                other.with
            ),
        );
    } else if refused {
        findings.warning(
            CHECK,
            format!("line {irq} was shared when its guest got it: the guest has no part in it, {instead}"),
            "nobody else is on it now: the next start of the guest brings it back",
        );
    } else {
        findings.ok(CHECK, format!("line {irq}, for itself"));
    }
}

fn msix(findings: &mut Findings, registers: &Registers) {
    const CHECK: &str = "MSI-X";
    const PAGE: u32 = 4096;
    match &registers.msix {
        None if registers.msi => findings.not_applicable(CHECK, "it has MSI only"),
        None => findings.not_applicable(CHECK, "it has neither MSI nor MSI-X"),
        Some(Err(reason)) => findings.warning(
            CHECK,
            format!("guests cannot use it: {reason}"),
            "an update of the card's firmware; drivers that can do with MSI or INTx work",
        ),
        Some(Ok(Table {
            vectors,
            bar,
            offset,
        })) => {
            let place = format!("table of {vectors} at {offset:#x} of BAR {bar}");
            if offset.is_multiple_of(PAGE) {
                findings.ok(CHECK, format!("{place}, at the start of a page"));
            } else {
                findings.warning(
                    CHECK,
                    format!("{place}, in the middle of a page: Xen lets no PV guest write the registers before it in that page"),
                    "a driver that needs them works in an HVM guest of Xen 4.19 or later; otherwise use MSI, if the driver can be told to",
                );
            }
        }
    }
}

/// Devices behind a bridge to conventional PCI send with the bridge's requester ID: the IOMMU cannot tell them apart.
fn requester(findings: &mut Findings, facts: &DeviceFacts, registers: &Registers) {
    const CHECK: &str = "requester ID";
    if registers.express || facts.beside.is_empty() {
        findings.ok(CHECK, "its own: the IOMMU tells it from others");
        return;
    }
    let own = facts.standing.and_then(|standing| standing.holder());
    let others: Vec<String> = facts
        .beside
        .iter()
        .filter(|(_, holder)| match holder {
            Holder::Dom0(_) => true,
            Holder::Guest(domain) => Some(*domain) != own,
            Holder::Nobody => false,
        })
        .map(|(other, holder)| format!("{other} ({holder})"))
        .collect();
    if others.is_empty() {
        findings.ok(CHECK, "its bridge's, behind which is nobody else's device");
    } else {
        findings.warning(
            CHECK,
            format!(
                "conventional PCI: to the IOMMU it is one with {}",
                others.join(", ")
            ),
            "give all devices behind that bridge to the same guest",
        );
    }
}

fn resets(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "reset";
    let offered = &facts.description.reset_methods;
    let set = facts.settings.as_ref().map(|settings| settings.reset);
    let choice = set.unwrap_or(ResetChoice::Auto);
    let with: Vec<String> = facts
        .beside
        .iter()
        .map(|(other, holder)| format!("{other} ({holder})"))
        .collect();
    match way(choice, offered) {
        Ok(Way::Not) => findings.warning(
            CHECK,
            "none, as its settings say: what one guest does to it, the next one finds",
            "reset = \"auto\", or give it to one and the same guest only",
        ),
        Ok(_) if offered.is_empty() && with.is_empty() => findings.warning(
            CHECK,
            "the kernel has no way to reset it: what one guest does to it, the next one finds",
            "give it to one and the same guest only",
        ),
        Ok(_) if offered.is_empty() => findings.warning(
            CHECK,
            format!(
                "the kernel has no way to reset it; a reset of its bus is not offered, since that would hit {}",
                with.join(", ")
            ),
            "give it to one and the same guest only",
        ),
        Ok(_) => findings.ok(
            CHECK,
            set.map_or_else(
                || format!("by {}", names(offered)),
                |set| format!("by {}; set: {}", names(offered), set.name()),
            ),
        ),
        Err(missing) => findings.warning(
            CHECK,
            format!("{missing}: it goes to the next guest without one"),
            "a method that there is, in the configuration",
        ),
    }
    let tried = match &facts.tried {
        Ok(tried) => tried.as_slice(),
        Err(reason) => {
            findings.not_applicable("resets tried", reason.as_str());
            &[]
        }
    };
    for tried in tried {
        let check = format!("reset by {}", tried.method);
        match &tried.result {
            Ok(()) => findings.ok(&check, "tried: the device is back"),
            Err(reason) => findings.problem(
                &check,
                format!("tried: {reason}"),
                format!("set another method for {bdf} (reset = ...)"),
            ),
        }
    }
}

fn pages(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "pages";
    let Some(other) = facts.pages.first() else {
        findings.ok(CHECK, "its memory is in pages of its own");
        return;
    };
    let what = format!(
        "it has memory in the page at {:#x} together with {other}",
        other.what
    );
    let remedy = format!(
        "give both to the same guest, or keep them apart: pci=resource_alignment=12@{bdf} on the command line of dom0's kernel"
    );
    match &facts.settings {
        Some(settings) if settings.allow_shared_pages => {
            findings.warning(
                CHECK,
                format!("{what}, which is allowed: its guest reaches that one, too"),
                remedy,
            );
        }
        Some(_) => findings.problem(CHECK, format!("{what}: no guest gets it"), remedy),
        None => findings.warning(
            CHECK,
            format!("{what}: no guest gets it, unless allow_shared_pages is set"),
            remedy,
        ),
    }
}

fn sriov(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "SR-IOV";
    match (&facts.description.function, &facts.physical) {
        (Function::Physical { enabled: 1.., virtual_functions, .. }, _) => findings.warning(
            CHECK,
            format!("it has {} virtual functions, which it takes with it when it is reset or hidden", virtual_functions.len()),
            format!("give guests those; or take them away first: pciback vf destroy {bdf}"),
        ),
        (Function::Physical { total, .. }, _) => {
            findings.ok(CHECK, format!("it can have {total} virtual functions, and has none"));
        }
        (_, Some((physical, Holder::Dom0(Some(driver))))) => {
            findings.ok(CHECK, format!("a virtual function of {physical}, which dom0's {driver} has"));
        }
        (_, Some((physical, holder))) => findings.warning(
            CHECK,
            format!("a virtual function of {physical}, whose driver in dom0 is gone ({holder}): whoever has that one rules it"),
            format!("bind {physical} to its driver in dom0"),
        ),
        _ => findings.not_applicable(CHECK, "neither a physical nor a virtual function"),
    }
}

fn permissions(findings: &mut Findings, facts: &DeviceFacts, bdf: Bdf) {
    const CHECK: &str = "permissions";
    let mut granted = Vec::new();
    let Some(settings) = &facts.settings else {
        return findings.not_applicable(CHECK, "known when pcibackd runs only");
    };
    let permissive = settings.permissive;
    if permissive == Permissive::Yes {
        granted.push("write every register");
    } else if permissive != Permissive::No {
        granted.push("write the registers in its permissive ranges");
    }
    if settings.allow_interrupt_control == InterruptControl::Yes {
        granted.push("switch its interrupts itself");
    }
    match (granted.is_empty(), permissive) {
        (true, _) => findings.ok(CHECK, "the ordinary ones"),
        (false, Permissive::Ranges(_)) => {
            findings.ok(CHECK, format!("its guest may {}", granted.join(", and ")));
        }
        (false, _) => findings.warning(
            CHECK,
            format!("its guest may {}", granted.join(", and ")),
            format!(
                "if only some registers are missed: pciback show {bdf} --dropped suggests ranges"
            ),
        ),
    }
}
