//! IOMMU groups: devices that the IOMMU cannot tell apart, or that can reach each other without it. A guest gets all of a group or none of it.

use std::fmt;
use std::fs;
use std::path::Path;

use conf_space::address::Bdf;

use super::vfio::DRIVER;

/// What to do where Linux does not use the IOMMU.
pub const SWITCH_ON: &str = "switch the IOMMU on in the firmware's setup (VT-d, AMD-Vi), and in Linux: intel_iommu=on or amd_iommu=on on its command line";

/// A device of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub bdf: Bdf,
    /// It is a bridge: never a guest's, and its driver does no DMA of its own.
    pub is_bridge: bool,
    /// The driver that is bound to it, ours as well.
    pub driver: Option<String>,
}

impl Member {
    /// Whether the host uses it, so that no guest can have any of the group: its DMA is the host's.
    fn is_in_the_way(&self) -> bool {
        /// Drivers that do no DMA (Linux `driver_managed_dma`).
        const HARMLESS: [&str; 3] = [DRIVER, "pci-stub", "pcieport"];
        let driver = self.driver.as_deref();
        !self.is_bridge && driver.is_some_and(|driver| !HARMLESS.contains(&driver))
    }
}

/// A group, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// Its devices, in order.
    pub members: Vec<Member>,
}

/// A group that cannot be used while the host uses some of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NotViable {
    /// The group.
    pub number: u32,
    /// Those that are in the way, each with its driver.
    pub others: Vec<(Bdf, String)>,
}

impl fmt::Display for NotViable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group {} also holds ", self.number)?;
        for (n, (bdf, driver)) in self.others.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{bdf}, bound to {driver}")?;
        }
        Ok(())
    }
}

impl Group {
    /// Checks that nothing of the group but `taken` is used by the host.
    ///
    /// # Errors
    /// [`NotViable`], which names what is.
    pub fn check(&self, taken: &[Bdf]) -> Result<(), NotViable> {
        let others: Vec<(Bdf, String)> = self
            .members
            .iter()
            .filter(|member| member.is_in_the_way() && !taken.contains(&member.bdf))
            .filter_map(|member| Some((member.bdf, member.driver.clone()?)))
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(NotViable {
            number: self.number,
            others,
        })
    }

    /// Those that can be a guest's.
    pub fn endpoints(&self) -> impl Iterator<Item = Bdf> {
        let endpoints = self.members.iter().filter(|member| !member.is_bridge);
        endpoints.map(|member| member.bdf)
    }
}

/// The number of a device's group; `None` without an IOMMU that Linux uses.
pub(in crate::host) fn number_of(device: &Path) -> Option<u32> {
    let link = fs::read_link(device.join("iommu_group")).ok()?;
    link.file_name()?.to_str()?.parse().ok()
}

/// The addresses of a group's devices, in order.
pub(in crate::host) fn devices_of(sys: &Path, number: u32) -> Vec<Bdf> {
    let path = sys.join(format!("kernel/iommu_groups/{number}/devices"));
    let entries = fs::read_dir(path).into_iter().flatten();
    let mut found: Vec<Bdf> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    fn group(members: &[(&str, bool, Option<&str>)]) -> Group {
        Group {
            number: 12,
            members: members
                .iter()
                .map(|&(name, is_bridge, driver)| Member {
                    bdf: bdf(name),
                    is_bridge,
                    driver: driver.map(str::to_owned),
                })
                .collect(),
        }
    }

    #[test]
    fn a_group_that_the_host_uses_is_refused_with_the_devices_in_the_way() {
        let group = group(&[
            ("03:00.0", false, Some("nouveau")),
            ("03:00.1", false, Some("snd_hda_intel")),
            ("03:00.2", false, Some("xhci_hcd")),
        ]);
        let refused = group.check(&[bdf("03:00.0")]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "group 12 also holds 0000:03:00.1, bound to snd_hda_intel, 0000:03:00.2, bound to xhci_hcd"
        );
        let all: Vec<Bdf> = group.endpoints().collect();
        assert_eq!(group.check(&all), Ok(()));
    }

    #[test]
    fn bridges_and_devices_that_nobody_drives_are_in_nobodys_way() {
        let group = group(&[
            ("00:01.0", true, Some("pcieport")),
            ("00:01.1", true, Some("some_bridge_driver")),
            ("01:00.0", false, Some("e1000e")),
            ("01:00.1", false, None),
            ("01:00.2", false, Some("vfio-pci")),
            ("01:00.3", false, Some("pci-stub")),
        ]);
        assert_eq!(group.check(&[bdf("01:00.0")]), Ok(()));
        assert!(!group.endpoints().any(|member| member == bdf("00:01.0")));
    }

    #[test]
    fn groups_are_read_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let devices = sys.path().join("kernel/iommu_groups/7/devices");
        fs::create_dir_all(&devices).unwrap();
        for name in ["0000:03:00.1", "0000:03:00.0"] {
            fs::create_dir(devices.join(name)).unwrap();
        }
        let device = sys.path().join("device");
        fs::create_dir(&device).unwrap();
        assert_eq!(number_of(&device), None);
        std::os::unix::fs::symlink("../../kernel/iommu_groups/7", device.join("iommu_group"))
            .unwrap();
        assert_eq!(number_of(&device), Some(7));
        assert_eq!(devices_of(sys.path(), 7), [bdf("03:00.0"), bdf("03:00.1")]);
    }
}
