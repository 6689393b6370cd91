//! How the frontends of different systems differ, as far as a backend can tell.

use std::time::Duration;

/// Whose frontend is played. Each was read in its source; the versions are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Linux from 6.1 on (`drivers/pci/xen-pcifront.c`). Publishes page, port and magic in a transaction and its state after it, without
    /// looking at the backend. Gives an operation up after 2 s. Scans all 256 functions of each root. Handles AER and says so in the page.
    /// Disables MSI-X by the operation for MSI. If it finds the backend reconfiguring before it was connected, it answers, and scans later.
    Linux,
    /// Linux up to 5.16: disables MSI-X by its own operation. A backend that reconfigures before it was connected is not answered.
    LinuxOld,
    /// NetBSD 6 to 10 (`sys/arch/xen/xen/xpci_xenbus.c`). Its state is part of the transaction. Does not handle AER. Listens to no event
    /// while an operation is under way, but looks at the page all the time, and never gives up. Only uses roots of segment 0. Reads ids and
    /// command of all 256 functions in 4 bytes, and turns decoding on, by the address registers that are in use, where the command says
    /// that all is off. Knows no MSI and no hot-plug: states 7 and 8 of the backend are a panic. Answers the backend's 5 by 6.
    NetBsd,
    /// FreeBSD up to 9, i386 (`sys/dev/xen/pcifront/pcifront.c`). The page is not cleared before use, but for its flags. Its state is part
    /// of the transaction. Does not handle AER. Says 4 before it scans. Insists on `root_num`, and on roots whose segment is the backend's
    /// domain id. Finds functions above 0 only beside a function 0 that says that it has several. Knows no MSI and no hot-plug. Answers the
    /// backend's 5 and 6 by 5, and never goes to 6.
    FreeBsd,
    /// Mini-OS (`pcifront.c`). Starts when the backend's state is 4 or less. Its state is part of the transaction. Does not handle AER. Never
    /// gives an operation up. Scans nothing: it lists `dev-N`, knows functions by their *physical* addresses, and looks `vdev-N` up before
    /// each operation. Answers 7 by 7 and 8 by 4 without more ado. On the backend's 5 it goes through 5, 6 and 1, waiting for the backend
    /// each time, and leaves the page's reference in its directory. Disables MSI-X by its own operation.
    MiniOs,
}

/// How a variant finds its functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// Every function of each root.
    AllFunctions,
    /// Functions above 0 only where function 0 says that there are some.
    BySlot,
    /// The toolstack's list of devices.
    List,
}

/// A variant's differences, in the order in which they show.
#[derive(Debug)]
pub(super) struct Traits {
    /// The page's flags say that AER is handled.
    pub handles_aer: bool,
    /// What the page holds at first.
    pub clears_page: bool,
    /// The state is written in the transaction that publishes the rest.
    pub state_in_transaction: bool,
    /// State 4 is written before the scan.
    pub connected_before_scan: bool,
    /// A missing `root_num` means that there is root 0000:00.
    pub root_num_optional: bool,
    pub scan: Scan,
    /// An operation is given up after this time.
    pub op_timeout: Option<Duration>,
    /// Waits for the event channel while an operation is under way.
    pub waits_for_event: bool,
    /// Uses MSI and MSI-X at all.
    pub msi: bool,
    /// Has an operation of its own for disabling MSI-X.
    pub disables_msix_as_such: bool,
}

/// What Linux gives an operation.
const TWO_SECONDS: Option<Duration> = Some(Duration::from_secs(2));

impl Variant {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Linux,
        Self::LinuxOld,
        Self::NetBsd,
        Self::FreeBsd,
        Self::MiniOs,
    ];

    pub(super) fn traits(self) -> Traits {
        let linux = Traits {
            handles_aer: true,
            clears_page: true,
            state_in_transaction: false,
            connected_before_scan: false,
            root_num_optional: true,
            scan: Scan::AllFunctions,
            op_timeout: TWO_SECONDS,
            waits_for_event: true,
            msi: true,
            disables_msix_as_such: false,
        };
        match self {
            Self::Linux => linux,
            Self::LinuxOld => Traits {
                disables_msix_as_such: true,
                ..linux
            },
            Self::NetBsd => Traits {
                handles_aer: false,
                state_in_transaction: true,
                op_timeout: None,
                waits_for_event: false,
                msi: false,
                ..linux
            },
            Self::FreeBsd => Traits {
                handles_aer: false,
                clears_page: false,
                state_in_transaction: true,
                connected_before_scan: true,
                root_num_optional: false,
                scan: Scan::BySlot,
                msi: false,
                ..linux
            },
            Self::MiniOs => Traits {
                handles_aer: false,
                state_in_transaction: true,
                scan: Scan::List,
                op_timeout: None,
                connected_before_scan: true,
                disables_msix_as_such: true,
                ..linux
            },
        }
    }
}
