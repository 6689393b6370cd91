//! Why a device cannot change hands.

use std::fmt;

use conf_space::address::Bdf;
use xenbus::{DomId, XenError};

use crate::config::ResetChoice;
use crate::host::HostError;
use crate::host::record::RecordError;
use crate::host::reset::Missing;
use crate::text::listed;

/// A device that cannot change hands.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host refused.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Its record cannot be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Xen refused.
    #[error("{bdf}: {what}")]
    Xen {
        /// The device.
        bdf: Bdf,
        /// What was to be done, and the remedy.
        what: &'static str,
        /// Xen's reason.
        #[source]
        source: XenError,
    },
    /// dom0 lives on it.
    #[error("{bdf} stays in dom0: {reason}. To hide it all the same: pciback hide --force {bdf}")]
    Needed {
        /// The device.
        bdf: Bdf,
        /// Why dom0 needs it.
        reason: String,
    },
    /// It is a bridge.
    #[error("{bdf} is a bridge: only the devices behind it can be given to a guest")]
    Bridge {
        /// The device.
        bdf: Bdf,
    },
    /// It has virtual functions, which go when its driver does.
    #[error(
        "{bdf} has {count} virtual functions, which would go with its driver; take them away first (pciback vf destroy {bdf}), or use --force"
    )]
    HasVirtualFunctions {
        /// The device.
        bdf: Bdf,
        /// How many.
        count: u16,
    },
    /// Guests have its virtual functions, which would die with it.
    #[error(
        "guests have virtual functions of {bdf}: {users}. Take them away first (xl pci-detach), or use --force"
    )]
    FunctionsInGuests {
        /// The physical function.
        bdf: Bdf,
        /// Which guest has which.
        users: Users,
    },
    /// Not even by force.
    #[error(
        "guests still have virtual functions of {bdf}, which were to be taken from them: {users}. See pcibackd's log and 'pciback status'; what a \
         guest has is free at the latest when it is destroyed"
    )]
    NotVacated {
        /// The physical function.
        bdf: Bdf,
        /// Which guest has which.
        users: Users,
    },
    /// It cannot have so many virtual functions.
    #[error(transparent)]
    Functions(#[from] sriov::Refusal),
    /// Something else is being done to it.
    #[error("{bdf} is busy ({phase}); try again in a moment")]
    Busy {
        /// The device.
        bdf: Bdf,
        /// What is being done.
        phase: &'static str,
    },
    /// A guest has it.
    #[error("{bdf} is in use by domain {domain}; take it away first: xl pci-detach {domain} {bdf}")]
    InUse {
        /// The device.
        bdf: Bdf,
        /// The guest.
        domain: DomId,
    },
    /// It has memory in a page with a guest's device.
    #[error(
        "{bdf} stays hidden: it has memory in the page at {page:#x} together with {with}, and that guest could reach it. Take the other one from \
         the guest first, or set allow_shared_pages = true for {bdf}"
    )]
    SharedPage {
        /// The device.
        bdf: Bdf,
        /// The page's address.
        page: u64,
        /// The other device, and who has it.
        with: String,
    },
    /// Others are hidden that it goes together with.
    #[error(
        "{bdf} is in one IOMMU group with {}, and goes back to dom0 together with that only: pciback unhide --group {bdf}",
        listed(others)
    )]
    Together {
        /// The device.
        bdf: Bdf,
        /// The others.
        others: Vec<Bdf>,
    },
    /// It is not hidden.
    #[error("{bdf} is not hidden from dom0; hide it first: pciback hide {bdf}")]
    NotHidden {
        /// The device.
        bdf: Bdf,
    },
    /// It came back dead from a reset.
    #[error(
        "{bdf} did not come back from its last reset (it reads as all ones), and no guest gets it; try another reset (pciback reset {bdf}), \
         or a power cycle of the host"
    )]
    Dead {
        /// The device.
        bdf: Bdf,
    },
    /// The kernel does not offer the reset that is wanted.
    #[error("{bdf}: {missing}{}", in_the_way(missing, beside))]
    NoSuchReset {
        /// The device.
        bdf: Bdf,
        /// What is wanted, and what there is.
        missing: Missing,
        /// The other functions on its bus.
        beside: Vec<Bdf>,
    },
}

/// The kernel resets a bus for a device only that is alone on it.
fn in_the_way(missing: &Missing, beside: &[Bdf]) -> String {
    if missing.wanted != ResetChoice::Bus || beside.is_empty() {
        return String::new();
    }
    format!("; a reset of its bus would hit {} as well", listed(beside))
}

/// Which guest has which device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users(pub Vec<(Bdf, DomId)>);

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (bdf, domain)) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}domain {domain} has {bdf}")?;
        }
        Ok(())
    }
}
