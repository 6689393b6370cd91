//! `XEN_DOMCTL_*`: what the toolstack asks of Xen (Xen `domctl.h`).
//!
//! Not a stable interface: each release of Xen takes its own version number and refuses all others
//! with EACCES before it does anything. The few operations here are laid out alike in all versions
//! that are tried.

use std::io;
use std::ops::RangeInclusive;
use std::sync::OnceLock;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, transmute};

use super::Privcmd;
use crate::platform::{DomainInfo, XenError};
use crate::types::{DomId, PciDevice};

/// Xen 4.11 to 4.22.
const KNOWN_VERSIONS: RangeInclusive<u32> = 0x10..=0x18;

const GETDOMAININFO: u32 = 5;
const ASSIGN_DEVICE: u32 = 37;
const DEASSIGN_DEVICE: u32 = 47;

/// `struct xen_domctl`: 16 bytes and a union of 128.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct XenDomctl {
    cmd: u32,
    interface_version: u32,
    domain: u16,
    pad: [u16; 3],
    payload: Payload,
}

type Payload = [u64; 16];

/// `struct xen_domctl_getdomaininfo`: the part that is needed, which is the same in all versions.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct GetDomainInfo {
    domain: u16,
    pad: u16,
    flags: u32,
    pages: [u64; 6],
    /// Nanoseconds for which its CPUs have run.
    cpu_time: u64,
    rest: [u64; 8],
}

/// `struct xen_domctl_assign_device` for a PCI device.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct AssignDevice {
    /// 0: PCI.
    dev: u32,
    flags: u32,
    machine_sbdf: u32,
    rest: [u32; 29],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<GetDomainInfo>() == 128 && size_of::<AssignDevice>() == 128);
    assert!(size_of::<XenDomctl>() == 144 && size_of::<XenDomctl>() == 144);
    assert!(offset_of!(XenDomctl, domain) == 8 && offset_of!(XenDomctl, payload) == 16);
    assert!(offset_of!(GetDomainInfo, flags) == 4 && offset_of!(GetDomainInfo, cpu_time) == 56);
    assert!(offset_of!(AssignDevice, machine_sbdf) == 8);
};

bitflags::bitflags! {
    /// `XEN_DOMINF_*`.
    struct DomInf: u32 {
        const DYING = 1 << 0;
        const HVM_GUEST = 1 << 1;
        const SHUTDOWN = 1 << 2;
        const PAUSED = 1 << 3;
    }
}

/// Where the flags hold the reason of a shutdown.
const SHUTDOWN_SHIFT: u32 = 16;
const SHUTDOWN_MASK: u32 = 255;

/// Reads `XEN_DOMINF_*` and the time of its CPUs. A domain that is suspended may be resumed, so it is not gone.
fn domain_info_from(bits: u32, cpu_time: u64) -> DomainInfo {
    let flags = DomInf::from_bits_retain(bits);
    let reason = (bits >> SHUTDOWN_SHIFT) & SHUTDOWN_MASK;
    let shut_down = flags.contains(DomInf::SHUTDOWN) && reason != xen_sys::SHUTDOWN_suspend;
    DomainInfo {
        hvm: flags.contains(DomInf::HVM_GUEST),
        paused: flags.contains(DomInf::PAUSED),
        has_run: cpu_time > 0 || !flags.contains(DomInf::PAUSED),
        gone: shut_down || flags.contains(DomInf::DYING),
    }
}

/// The domctls of this host's Xen. Finds out its version when the first one is needed.
#[derive(Debug, Default)]
pub(crate) struct Domctl {
    version: OnceLock<u32>,
}

impl Domctl {
    pub(crate) fn domain_info(
        &self,
        privcmd: &Privcmd,
        domain: DomId,
    ) -> Result<Option<DomainInfo>, XenError> {
        if domain >= DomId::FIRST_RESERVED {
            return Ok(None); // Xen would say EINVAL
        }
        let version = self.version(privcmd)?;
        match get_domain_info(privcmd, version, domain) {
            // For a number that is not in use, some versions answer with the next domain that
            // exists.
            Ok(info) if info.domain != domain.0 => Ok(None),
            Ok(info) => Ok(Some(domain_info_from(info.flags, info.cpu_time))),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(source) => Err(XenError::Failed {
                operation: format!("XEN_DOMCTL_getdomaininfo for domain {domain}"),
                source,
            }),
        }
    }

    pub(crate) fn assign_device(
        &self,
        privcmd: &Privcmd,
        domain: DomId,
        device: PciDevice,
    ) -> Result<(), XenError> {
        let version = self.version(privcmd)?;
        change_device(privcmd, version, ASSIGN_DEVICE, domain, device).map_err(|source| {
            XenError::Failed {
                operation: format!("XEN_DOMCTL_assign_device of {device} to domain {domain}"),
                source,
            }
        })
    }

    pub(crate) fn deassign_device(
        &self,
        privcmd: &Privcmd,
        domain: DomId,
        device: PciDevice,
    ) -> Result<(), XenError> {
        let version = self.version(privcmd)?;
        change_device(privcmd, version, DEASSIGN_DEVICE, domain, device).map_err(|source| {
            XenError::Failed {
                operation: format!("XEN_DOMCTL_deassign_device of {device} from domain {domain}"),
                source,
            }
        })
    }

    /// The version that this Xen answers to.
    fn version(&self, privcmd: &Privcmd) -> Result<u32, XenError> {
        if let Some(version) = self.version.get() {
            return Ok(*version);
        }
        let version =
            find_version(|version| get_domain_info(privcmd, version, DomId::DOM0).map(drop))?;
        Ok(*self.version.get_or_init(|| version))
    }
}

/// Tries the known versions, newest first, until one is not refused with EACCES.
fn find_version(mut attempt: impl FnMut(u32) -> io::Result<()>) -> Result<u32, XenError> {
    for version in KNOWN_VERSIONS.rev() {
        match attempt(version) {
            Ok(()) => return Ok(version),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
            Err(source) => {
                return Err(XenError::Failed {
                    operation: "XEN_DOMCTL_getdomaininfo for domain 0".to_owned(),
                    source,
                });
            }
        }
    }
    Err(XenError::UnknownDomctlVersion {
        first: *KNOWN_VERSIONS.start(),
        last: *KNOWN_VERSIONS.end(),
    })
}

fn get_domain_info(privcmd: &Privcmd, version: u32, domain: DomId) -> io::Result<GetDomainInfo> {
    domctl(privcmd, version, GETDOMAININFO, domain, Payload::default())
        .map(|payload| transmute!(payload))
}

fn change_device(
    privcmd: &Privcmd,
    version: u32,
    cmd: u32,
    domain: DomId,
    device: PciDevice,
) -> io::Result<()> {
    let assign = AssignDevice {
        machine_sbdf: device.sbdf(),
        ..AssignDevice::new_zeroed()
    };
    domctl(privcmd, version, cmd, domain, transmute!(assign)).map(drop)
}

fn domctl(
    privcmd: &Privcmd,
    version: u32,
    cmd: u32,
    domain: DomId,
    payload: Payload,
) -> io::Result<Payload> {
    let domctl = XenDomctl {
        cmd,
        interface_version: version,
        domain: domain.0,
        pad: [0; 3],
        payload,
    };
    privcmd.domctl(&domctl).map(|answer| answer.payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_that_is_not_refused() {
        let xen_4_17 = |version| {
            if version == 0x15 {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::EACCES))
            }
        };
        assert_eq!(find_version(xen_4_17).unwrap(), 0x15);
    }

    #[test]
    fn a_newer_xen_is_not_talked_to() {
        let error = find_version(|_| Err(io::Error::from_raw_os_error(libc::EACCES))).unwrap_err();
        assert!(matches!(
            error,
            XenError::UnknownDomctlVersion {
                first: 0x10,
                last: 0x18
            }
        ));
    }

    #[test]
    fn another_refusal_ends_the_search() {
        let mut tries = 0;
        let error = find_version(|_| {
            tries += 1;
            Err(io::Error::from_raw_os_error(libc::EPERM))
        });
        assert_eq!((error.unwrap_err().errno(), tries), (Some(libc::EPERM), 1));
    }

    #[test]
    fn a_domain_that_is_paused_has_run_if_its_cpus_have() {
        let paused = 1 << 3;
        assert!(!domain_info_from(paused, 0).has_run);
        assert!(domain_info_from(paused, 1).has_run);
        assert!(domain_info_from(0, 0).has_run, "it may at any moment");
    }

    #[test]
    fn a_domain_is_gone_when_it_died_or_shut_down_but_not_when_it_is_suspended() {
        let info = |flags| domain_info_from(flags, 1);
        assert_eq!(
            info(1 << 5),
            DomainInfo {
                hvm: false,
                paused: false,
                has_run: true,
                gone: false
            }
        );
        assert_eq!(
            info(1 << 1),
            DomainInfo {
                hvm: true,
                paused: false,
                has_run: true,
                gone: false
            }
        );
        assert!(info(1 << 3 | 1 << 4).paused);
        assert!(info(1 << 0).gone);
        assert!(info(1 << 2).gone, "power-off");
        assert!(info(1 << 2 | 3 << 16).gone, "crash");
        assert!(!info(1 << 2 | 2 << 16).gone, "suspend");
        assert!(
            info(1 << 0 | 1 << 2 | 2 << 16).gone,
            "destroyed while suspended"
        );
    }
}
