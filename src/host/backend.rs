//! How host devices are reached, and why. Pure.

use crate::config::HostChoice;

/// How host devices are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Through Linux's sysfs: Xen has the IOMMU and the interrupts.
    Sysfs,
    /// Through VFIO: Linux has them.
    Vfio,
    /// They are simulated.
    Simulated,
}

/// A device that is not to be reached in the way that this platform has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongHost {
    /// By VFIO, under Xen.
    #[error(
        "host = \"vfio\" is set for it, and pcibackd serves guests of Xen: Xen has the IOMMU and the interrupts, and Linux, which VFIO asks for them, \
         has neither. Set host = \"auto\""
    )]
    VfioUnderXen,
    /// By sysfs, without Xen.
    #[error(
        "host = \"sysfs\" is set for it, and pcibackd runs without Xen: through sysfs alone its guest would have no interrupts, and nothing would keep \
         its DMA in bounds. Set host = \"auto\""
    )]
    SysfsWithoutXen,
}

/// Whether a device may be reached in the way that the platform has.
///
/// # Errors
/// [`WrongHost`].
pub fn check(choice: HostChoice, backend: Backend) -> Result<(), WrongHost> {
    match (choice, backend) {
        (HostChoice::Vfio, Backend::Sysfs) => Err(WrongHost::VfioUnderXen),
        (HostChoice::Sysfs, Backend::Vfio) => Err(WrongHost::SysfsWithoutXen),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_reached_as_the_platform_does_or_not_at_all() {
        use Backend::{Simulated, Sysfs, Vfio};
        for backend in [Sysfs, Vfio, Simulated] {
            assert_eq!(check(HostChoice::Auto, backend), Ok(()));
        }
        assert_eq!(check(HostChoice::Sysfs, Sysfs), Ok(()));
        assert_eq!(check(HostChoice::Vfio, Vfio), Ok(()));
        assert_eq!(check(HostChoice::Vfio, Sysfs), Err(WrongHost::VfioUnderXen));
        assert_eq!(
            check(HostChoice::Sysfs, Vfio),
            Err(WrongHost::SysfsWithoutXen)
        );
    }
}
