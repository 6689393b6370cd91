//! Judging the host.

use super::host_facts::{Fuse, HostFacts, Lockdown, Role, RunningDaemon};
use super::modules::KernelBackend;
use super::{Finding, Findings};
use crate::facade::Laid;

/// Judges the facts. `version` is that of the command line.
pub fn judge(facts: &HostFacts, version: &str) -> Vec<Finding> {
    let mut findings = Findings::default();
    daemon(&mut findings, &facts.daemon, version);
    xen(&mut findings, facts);
    lockdown(&mut findings, facts.lockdown);
    kernel_backend(&mut findings, facts.kernel_backend);
    fuse(&mut findings, facts.fuse);
    facade(&mut findings, facts);
    findings.into_list()
}

fn daemon(findings: &mut Findings, daemon: &Result<RunningDaemon, String>, version: &str) {
    const CHECK: &str = "daemon";
    match daemon {
        Ok(running) if running.version == version => {
            findings.ok(CHECK, format!("pcibackd {version} runs"));
        }
        Ok(running) => findings.warning(
            CHECK,
            format!(
                "pcibackd {} runs, and this is pciback {version}",
                running.version
            ),
            "systemctl restart pcibackd; guests keep their devices",
        ),
        Err(reason) => findings.problem(
            CHECK,
            format!("no pcibackd answers ({reason}): guests' configuration accesses fail, and xl finds no devices"),
            "systemctl start pcibackd; if it ends at once: journalctl -u pcibackd",
        ),
    }
}

fn xen(findings: &mut Findings, facts: &HostFacts) {
    let (iommu, remapping) = ("IOMMU", "interrupt remapping");
    let version = facts.version.as_deref().unwrap_or("of an unknown version");
    match facts.role {
        Role::Dom0 => findings.ok("Xen", format!("this is dom0 of Xen {version}")),
        Role::PvhDom0 => findings.problem(
            "Xen",
            format!(
                "this is dom0 of Xen {version}, and PVH: devices cannot be given to guests, since Xen does not map their interrupts for such a dom0, \
                 or xl asks the kernel's own backend for them"
            ),
            "take dom0=pvh from Xen's command line, and boot again: dom0 is then PV",
        ),
        Role::Guest => findings.problem(
            "Xen",
            "this is a guest",
            "pcibackd runs in dom0, which the devices belong to",
        ),
        Role::None => findings.problem(
            "Xen",
            "this system does not run on Xen",
            "boot it by Xen (on Debian: the entry 'with Xen hypervisor'); for a try without: pciback demo. Without Xen, and with an IOMMU: pcibackd --platform vfio",
        ),
    }
    if !facts.role.is_dom0() {
        return;
    }
    match &facts.xenstore {
        Ok(()) => findings.ok("xenstore", "xenstored answers"),
        Err(reason) => findings.problem(
            "xenstore",
            format!("xenstored cannot be reached ({reason})"),
            "systemctl status xenstored (Debian: xen); it cannot be started anew while guests run",
        ),
    }
    match facts.iommu {
        Some(true) => findings.ok(iommu, "Xen uses it"),
        Some(false) => findings.problem(
            iommu,
            "Xen has none: xl gives no device to a guest, and a device would reach all memory",
            "switch VT-d or AMD-Vi on in the firmware's setup, keep iommu=no off Xen's command line; 'xl dmesg' tells Xen's reason",
        ),
        None => findings.not_applicable(iommu, "'xl info' does not tell"),
    }
    match facts.interrupt_remapping {
        Some(true) => findings.ok(remapping, "Xen uses it"),
        Some(false) => findings.warning(
            remapping,
            "off: a guest's device can send any interrupt to any CPU",
            "give devices to guests only that are trusted; newer firmware or hardware may have it ('xl dmesg' tells Xen's reason)",
        ),
        None if facts.iommu == Some(false) => {
            findings.not_applicable(remapping, "there is none without an IOMMU");
        }
        None => findings.not_applicable(
            remapping,
            "Xen's messages of its boot are no longer in 'xl dmesg'",
        ),
    }
}

fn lockdown(findings: &mut Findings, lockdown: Lockdown) {
    const CHECK: &str = "lockdown";
    match lockdown {
        Lockdown::None => findings.ok(CHECK, "the kernel lets configuration space be written"),
        Lockdown::On => findings.problem(
            CHECK,
            "the kernel is locked down and lets nobody write configuration space: devices cannot be hidden",
            "switch Secure Boot off, or take lockdown= from the kernel's command line",
        ),
    }
}

fn kernel_backend(findings: &mut Findings, backend: KernelBackend) {
    const CHECK: &str = "xen-pciback";
    const KEEP_AWAY: &str = "cp packaging/modprobe.conf /etc/modprobe.d/pcibackd.conf (or: printf 'blacklist xen-pciback\\ninstall xen-pciback /bin/false\\n' > /etc/modprobe.d/pcibackd.conf)";
    match backend {
        KernelBackend::Absent => findings.ok(CHECK, "this kernel's own backend is not there"),
        KernelBackend::KeptAway => findings.ok(CHECK, "the kernel's own backend is kept away"),
        KernelBackend::Registered { built_in: true } => findings.problem(
            CHECK,
            "the kernel's own backend is built in, and answers the same guests",
            "boot with initcall_blacklist=xen_pcibk_init on the kernel's command line",
        ),
        KernelBackend::Registered { built_in: false } => findings.problem(
            CHECK,
            "the kernel's own backend is loaded, and answers the same guests",
            format!("stop the guests that use it; modprobe -r xen-pciback; {KEEP_AWAY}"),
        ),
        KernelBackend::LoadedByAlias => findings.warning(
            CHECK,
            "udev will load the kernel's own backend at the first guest with a PCI device, and both will answer",
            KEEP_AWAY,
        ),
        KernelBackend::LoadedByName => findings.warning(
            CHECK,
            "the kernel's own backend is blacklisted, which does not stop 'modprobe xen-pciback', as Xen's init scripts run it",
            KEEP_AWAY,
        ),
    }
}

fn fuse(findings: &mut Findings, fuse: Fuse) {
    const CHECK: &str = "FUSE";
    match fuse {
        Fuse::There => findings.ok(CHECK, "the kernel has it"),
        Fuse::Module => findings.warning(
            CHECK,
            "the kernel's module is not loaded, and the facade needs it",
            "modprobe fuse; echo fuse > /etc/modules-load.d/fuse.conf",
        ),
        Fuse::Missing => findings.problem(
            CHECK,
            "this kernel has none: xl cannot see hidden devices",
            "a kernel with CONFIG_FUSE_FS; without it: facade = \"off\", and a toolstack that does not look there",
        ),
    }
}

fn facade(findings: &mut Findings, facts: &HostFacts) {
    const CHECK: &str = "facade";
    const UNMOUNT: &str = "umount -l /sys/bus/pci/drivers";
    let wanted = facts
        .daemon
        .as_ref()
        .is_ok_and(|daemon| daemon.facade == "global");
    match facts.facade {
        None => findings.not_applicable(CHECK, "/sys/bus/pci/drivers cannot be looked at"),
        Some(Laid::Dead) => findings.problem(
            CHECK,
            "the one over /sys/bus/pci/drivers is dead: nobody reaches any driver",
            UNMOUNT,
        ),
        Some(Laid::Silent { process }) => findings.problem(
            CHECK,
            format!("process {process}, which serves /sys/bus/pci/drivers, does not answer"),
            format!("systemctl restart pcibackd; if that does not help: {UNMOUNT}"),
        ),
        Some(Laid::Alive { process }) => {
            findings.ok(CHECK, format!("served by process {process}"));
        }
        Some(Laid::No) if wanted => findings.problem(
            CHECK,
            "somebody has unmounted it: xl finds no hidden devices",
            "systemctl restart pcibackd; guests keep their devices",
        ),
        Some(Laid::No) => findings.not_applicable(
            CHECK,
            match &facts.daemon {
                Ok(daemon) if daemon.facade == "private" => {
                    "for commands that 'pciback exec' runs only"
                }
                Ok(_) => "off: xl does not see hidden devices",
                Err(_) => "not there while no pcibackd runs",
            },
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{self, NotApplicable, Ok as Fine, Problem, Warning};
    use super::*;

    fn healthy() -> HostFacts {
        HostFacts {
            role: Role::Dom0,
            version: Some("4.17.5".into()),
            daemon: Ok(RunningDaemon {
                version: "1.0".into(),
                facade: "global".into(),
            }),
            xenstore: Ok(()),
            iommu: Some(true),
            interrupt_remapping: Some(true),
            lockdown: Lockdown::None,
            kernel_backend: KernelBackend::KeptAway,
            fuse: Fuse::There,
            facade: Some(Laid::Alive { process: 7 }),
        }
    }

    /// The verdict on one thing, once the facts are changed.
    fn verdict(check: &str, change: impl FnOnce(&mut HostFacts)) -> Verdict {
        let mut facts = healthy();
        change(&mut facts);
        let findings = judge(&facts, "1.0");
        for finding in &findings {
            let bad = finding.verdict >= Warning;
            assert_eq!(bad, finding.remedy.is_some(), "{finding:?}");
        }
        let mut about = findings.iter().filter(|finding| finding.check == check);
        let verdict = about.next().unwrap().verdict;
        assert!(about.next().is_none());
        verdict
    }

    #[test]
    fn a_healthy_host_has_nothing_but_good_findings() {
        let findings = judge(&healthy(), "1.0");
        assert!(
            findings.iter().all(|finding| finding.verdict == Fine),
            "{findings:?}"
        );
        assert_eq!(findings.len(), 9);
    }

    #[test]
    fn the_daemon_is_to_run_and_to_be_of_this_version() {
        assert_eq!(
            verdict("daemon", |facts| facts.daemon = Err("x".into())),
            Problem
        );
        let other = |facts: &mut HostFacts| facts.daemon.as_mut().unwrap().version = "0.9".into();
        assert_eq!(verdict("daemon", other), Warning);
    }

    #[test]
    fn outside_of_dom0_nothing_is_asked_of_xen() {
        for role in [Role::None, Role::Guest] {
            assert_eq!(verdict("Xen", |facts| facts.role = role), Problem);
            let facts = HostFacts { role, ..healthy() };
            let findings = judge(&facts, "1.0");
            assert!(!findings.iter().any(|finding| finding.check == "IOMMU"));
        }
    }

    #[test]
    fn l11_a_pvh_dom0_cannot_give_devices_away_and_is_told_so() {
        let change = |facts: &mut HostFacts| facts.role = Role::PvhDom0;
        assert_eq!(verdict("Xen", change), Problem);
        assert_eq!(verdict("IOMMU", change), Fine);
    }

    #[test]
    fn what_xen_lacks_is_told_and_what_is_unknown_is_no_problem() {
        assert_eq!(verdict("IOMMU", |facts| facts.iommu = Some(false)), Problem);
        assert_eq!(verdict("IOMMU", |facts| facts.iommu = None), NotApplicable);
        let remapping = |value| {
            verdict("interrupt remapping", move |facts| {
                facts.interrupt_remapping = value;
            })
        };
        assert_eq!(remapping(Some(false)), Warning);
        assert_eq!(remapping(None), NotApplicable);
        assert_eq!(
            verdict("xenstore", |facts| facts.xenstore = Err("x".into())),
            Problem
        );
    }

    #[test]
    fn the_kernel_is_to_let_us_work() {
        assert_eq!(
            verdict("lockdown", |facts| facts.lockdown = Lockdown::On),
            Problem
        );
        assert_eq!(verdict("FUSE", |facts| facts.fuse = Fuse::Module), Warning);
        assert_eq!(verdict("FUSE", |facts| facts.fuse = Fuse::Missing), Problem);
    }

    #[test]
    fn the_kernels_backend_is_a_problem_when_it_is_there_and_a_warning_when_it_may_come() {
        let backend = |backend| verdict("xen-pciback", move |facts| facts.kernel_backend = backend);
        assert_eq!(
            backend(KernelBackend::Registered { built_in: true }),
            Problem
        );
        assert_eq!(
            backend(KernelBackend::Registered { built_in: false }),
            Problem
        );
        assert_eq!(backend(KernelBackend::LoadedByAlias), Warning);
        assert_eq!(backend(KernelBackend::LoadedByName), Warning);
        assert_eq!(backend(KernelBackend::Absent), Fine);
    }

    #[test]
    fn the_facade_is_to_be_there_when_the_daemon_says_so_and_never_dead() {
        let facade = |laid, said: Option<&str>| {
            verdict("facade", move |facts| {
                facts.facade = Some(laid);
                match said {
                    Some(said) => facts.daemon.as_mut().unwrap().facade = said.into(),
                    None => facts.daemon = Err("x".into()),
                }
            })
        };
        assert_eq!(facade(Laid::No, Some("global")), Problem);
        assert_eq!(facade(Laid::No, Some("off")), NotApplicable);
        assert_eq!(facade(Laid::No, Some("private")), NotApplicable);
        assert_eq!(facade(Laid::No, None), NotApplicable);
        assert_eq!(facade(Laid::Dead, None), Problem);
        assert_eq!(facade(Laid::Silent { process: 3 }, Some("global")), Problem);
    }
}
