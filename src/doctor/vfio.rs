//! The host of a daemon that reaches devices through VFIO, without Xen (`--platform vfio`).

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;

use super::{Finding, Findings};
use crate::host::group::SWITCH_ON;

/// What there is to say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VfioFacts {
    /// Linux has devices in IOMMU groups.
    pub groups: bool,
    /// The kernel has the driver vfio-pci.
    pub driver: bool,
    /// `/dev/vfio/vfio`.
    pub node: Node,
    /// It allows interrupts to be assigned although nothing keeps devices from sending any.
    pub unsafe_interrupts: bool,
}

/// What becomes of opening `/dev/vfio/vfio`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// It can be opened.
    Usable,
    /// It is there, and not for us.
    Denied,
    /// There is none, or nobody behind it.
    Missing,
}

impl Node {
    fn of(path: &Path) -> Self {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) => Self::Usable,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Self::Denied,
            Err(_) => Self::Missing,
        }
    }
}

impl VfioFacts {
    /// Looks around. `root` is the directory that `sys` and `dev` are in.
    pub fn gather(root: &Path) -> Self {
        let has_entries = |path: &str| {
            let entries = std::fs::read_dir(root.join(path));
            entries.is_ok_and(|mut entries| entries.next().is_some())
        };
        let switch = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        Self {
            groups: has_entries("sys/kernel/iommu_groups"),
            driver: root.join("sys/bus/pci/drivers/vfio-pci").exists(),
            node: Node::of(&root.join("dev/vfio/vfio")),
            unsafe_interrupts: std::fs::read_to_string(root.join(switch))
                .is_ok_and(|text| text.starts_with('Y')),
        }
    }
}

/// Judges the facts.
pub fn judge(facts: &VfioFacts) -> Vec<Finding> {
    let mut findings = Findings::default();
    if facts.groups {
        findings.ok("IOMMU", "Linux uses it");
    } else {
        findings.problem(
            "IOMMU",
            "Linux has none: no device can be given to a guest",
            SWITCH_ON,
        );
    }
    match facts.node {
        Node::Denied => findings.problem(
            "VFIO",
            "/dev/vfio/vfio may not be used by whoever runs this",
            "run it as root; pcibackd runs as root, too, and under systemd with DeviceAllow=char-vfio",
        ),
        Node::Usable if facts.driver => findings.ok("VFIO", "it is loaded"),
        Node::Usable | Node::Missing => findings.problem(
            "VFIO",
            "it is not loaded: no device can be hidden",
            "modprobe vfio-pci",
        ),
    }
    if facts.unsafe_interrupts {
        findings.warning(
            "interrupt remapping",
            "vfio_iommu_type1 does without (allow_unsafe_interrupts): a guest's device can send any interrupt to any CPU",
            "give devices to guests only that are trusted",
        );
    }
    findings.into_list()
}

#[cfg(test)]
mod tests {
    use super::super::{Verdict, root};
    use super::*;

    fn verdicts(files: &[(&str, &str)]) -> Vec<(String, Verdict)> {
        let findings = judge(&VfioFacts::gather(root(files).path()));
        let about = findings.into_iter();
        about
            .map(|finding| (finding.check, finding.verdict))
            .collect()
    }

    #[test]
    fn an_iommu_and_the_driver_are_what_it_takes() {
        let good = [
            ("sys/kernel/iommu_groups/0/type", "DMA\n"),
            ("sys/bus/pci/drivers/vfio-pci/bind", ""),
            ("dev/vfio/vfio", ""),
        ];
        assert!(
            verdicts(&good)
                .iter()
                .all(|(_, verdict)| *verdict == Verdict::Ok)
        );
        let bad = verdicts(&[]);
        assert!(
            bad.iter().all(|(_, verdict)| *verdict == Verdict::Problem),
            "{bad:?}"
        );
        let switch = (
            "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            "Y\n",
        );
        let with = verdicts(&[good[0], good[1], good[2], switch]);
        let warning = ("interrupt remapping".to_owned(), Verdict::Warning);
        assert!(with.contains(&warning), "{with:?}");
    }

    #[test]
    fn who_may_not_use_vfio_is_not_told_to_load_it() {
        let findings = judge(&VfioFacts {
            groups: true,
            driver: true,
            node: Node::Denied,
            unsafe_interrupts: false,
        });
        let vfio = findings.iter().find(|finding| finding.check == "VFIO");
        let text = format!("{vfio:?}");
        assert!(
            text.contains("Problem") && text.contains("DeviceAllow=char-vfio"),
            "{text}"
        );
        assert!(!text.contains("modprobe"), "{text}");
    }
}
