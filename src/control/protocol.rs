//! What goes over the control socket: one JSON object per line, a [`Response`] for each [`Request`]; for [`Request::Trace`] many, until
//! one of the two ends hangs up.
//!
//! The socket is a unix stream socket that root alone may use. With [`Request::Serve`] an open `/dev/fuse` travels along (`SCM_RIGHTS`).

use std::collections::BTreeMap;

use crate::config::{ResetChoice, VirtioDevice};
use crate::doctor::Finding;
use conf_space::address::Bdf;
use serde::{Deserialize, Serialize};

use super::policy::{DroppedShown, GuestSettingsShown, SettingsShown};
use super::traced::{Filter, Traced};
use super::virtio::VirtioGuest;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Hide devices from dom0.
    Hide {
        /// Lists of devices, each as an operator writes them.
        devices: Vec<String>,
        /// Also what dom0 lives on, and physical functions whose virtual functions guests have: the guests lose them.
        force: bool,
    },
    /// Give hidden devices back to dom0.
    Unhide {
        /// As above.
        devices: Vec<String>,
        /// Also physical functions whose virtual functions guests have: the guests lose them.
        force: bool,
    },
    /// Hide devices from dom0, each with its whole IOMMU group, or not at all.
    HideGroup {
        /// As above.
        devices: Vec<String>,
        /// As for [`Request::Hide`].
        force: bool,
    },
    /// Give hidden devices back to dom0, each with all that is hidden of its IOMMU group.
    UnhideGroup {
        /// As above.
        devices: Vec<String>,
    },
    /// Reset hidden devices that no guest has.
    Reset {
        /// As above.
        devices: Vec<String>,
        /// How; as each device's settings say if not given.
        method: Option<ResetChoice>,
        /// Also physical functions whose virtual functions guests have: the guests lose them.
        force: bool,
    },
    /// All devices of the host.
    List,
    /// One hidden device's configuration space as a guest sees it.
    Show {
        /// The device.
        device: String,
    },
    /// The devices that have SR-IOV, and their virtual functions.
    VirtualFunctions {
        /// This one only.
        physical: Option<Bdf>,
    },
    /// Make virtual functions.
    CreateVirtualFunctions {
        /// Of this physical function.
        physical: Bdf,
        /// How many it is to have.
        count: u16,
        /// For guests: no driver of dom0's sees them, and they are hidden.
        hide: bool,
    },
    /// Take all virtual functions away.
    DestroyVirtualFunctions {
        /// Of this physical function.
        physical: Bdf,
        /// Also from guests.
        force: bool,
    },
    /// Sets something for a device, until its guest gives it back, and shows its settings.
    Set {
        /// The device.
        device: String,
        /// `KEY=VALUE`, or `permissive+=RANGES`; none: only shows.
        assignments: Vec<String>,
    },
    /// Sets something for guests of a name, from their next start on and until the host is booted anew, and shows it.
    SetGuest {
        /// The name.
        guest: String,
        /// `topology=VALUE`; none: only shows.
        assignments: Vec<String>,
    },
    /// The writes of a device's guest that did not reach the device.
    Dropped {
        /// The device.
        device: String,
    },
    /// What is wrong with devices.
    Doctor {
        /// One device; all that are hidden if not given.
        device: Option<String>,
        /// Try every reset that the kernel offers for those that no guest has.
        try_resets: bool,
    },
    /// Guests' virtio devices.
    Virtio {
        /// This guest's only, by name or number.
        guest: Option<String>,
    },
    /// Give a guest that has not started yet one more virtio device.
    AddVirtio {
        /// The guest, by name or number.
        guest: String,
        /// The device.
        device: Box<VirtioDevice>,
    },
    /// Wait until a guest's virtio devices are there, so that it can start.
    AwaitVirtio {
        /// The guest, by name or number.
        guest: String,
    },
    /// The daemon and its guests.
    Status,
    /// Serve a facade that the caller mounted in its own mount namespace.
    Serve,
    /// The guests' operations as they happen.
    Trace(Filter),
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Hide`], [`Request::Unhide`] and [`Request::Reset`]: one for each entry and each device that an entry stands for. To
    /// [`Request::CreateVirtualFunctions`] and [`Request::DestroyVirtualFunctions`]: one for each device.
    Entries {
        /// In the order of the request.
        entries: Vec<Entry>,
    },
    /// To [`Request::List`].
    Devices {
        /// In order of their addresses.
        devices: Vec<DeviceLine>,
    },
    /// To [`Request::Show`].
    Device(Box<Shown>),
    /// To [`Request::VirtualFunctions`].
    VirtualFunctions {
        /// In order of their addresses.
        physical: Vec<PhysicalFunction>,
    },
    /// To [`Request::Set`].
    Settings(SettingsShown),
    /// To [`Request::SetGuest`].
    GuestSettings(GuestSettingsShown),
    /// To [`Request::Dropped`].
    Dropped(DroppedShown),
    /// To [`Request::Doctor`].
    Findings {
        /// Device by device.
        findings: Vec<Finding>,
    },
    /// To [`Request::Virtio`].
    Virtio {
        /// In order of their numbers; after them those that were refused.
        guests: Vec<VirtioGuest>,
    },
    /// To [`Request::AddVirtio`] and [`Request::AwaitVirtio`].
    Placed {
        /// Where the added device is, or all devices are: `slot 1f`.
        places: Vec<String>,
    },
    /// To [`Request::Status`].
    Status(DaemonStatus),
    /// To [`Request::Serve`].
    Served,
    /// To [`Request::Trace`], first: from now on operations are sent.
    Tracing {
        /// The guests that are traced now.
        guests: Vec<u16>,
    },
    /// To [`Request::Trace`]: an operation.
    Operation(Box<Traced>),
    /// To [`Request::Trace`]: the reader was too slow, and missed some.
    Lost {
        /// The guest that they were of.
        domain: u16,
        /// How many, wanted or not.
        operations: u64,
    },
    /// The request as a whole failed.
    Failed {
        /// Why, and what to do.
        message: String,
    },
}

/// What became of one entry of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The entry as written, or the device that it stood for.
    pub entry: String,
    /// Whether it is done.
    pub ok: bool,
    /// What was done, or why not and what to do.
    pub message: String,
}

/// One device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLine {
    /// Its address.
    pub device: Bdf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub id: u16,
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
    /// Its place in the machine, which stays the same when buses are renumbered: `0000:00:1c.0/00.0`.
    pub path: Option<String>,
    /// Class code, 24 bits.
    pub class: u32,
    /// `dom0`, or what a hidden device is at: `hidden`, `assigned`, `releasing`, ...
    pub state: String,
    /// What is being done to it now, if that may take long: `resetting`, `unbinding its driver`, ...
    pub activity: Option<String>,
    /// How often it was reset since it was hidden.
    pub resets: u32,
    /// dom0's driver, or the one it will get back.
    pub driver: Option<String>,
    /// The guest that has it.
    pub domain: Option<u16>,
    /// That guest's name.
    pub guest: Option<String>,
    /// Its address in the guest.
    pub seen_as: Option<Bdf>,
    /// The guest may write every register.
    pub permissive: bool,
    /// Its errors, if it is hidden.
    pub errors: Option<DeviceErrors>,
}

/// Errors that a hidden device has reported (PCI Express AER), and DMA of its that was stopped.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceErrors {
    /// Correctable ones since the host was started; `None` where the kernel does not count them.
    pub correctable: Option<u64>,
    /// Non-fatal ones since it was hidden.
    pub non_fatal: u32,
    /// Fatal ones since it was hidden.
    pub fatal: u32,
    /// How the recovery from the last one goes, or went.
    pub recovery: Option<String>,
    /// How often the host's IOMMU has stopped its DMA since it was hidden, as far as the kernel has told.
    pub stopped_dma: u32,
}

/// A device that has SR-IOV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalFunction {
    /// The device.
    pub device: DeviceLine,
    /// How many virtual functions it can have.
    pub total: u16,
    /// Those that it has, in order of their indices.
    pub virtual_functions: Vec<VirtualFunction>,
}

/// One virtual function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualFunction {
    /// Its number with its physical function, from 0: what `ip link set ... vf` calls it by.
    pub index: u16,
    /// The device.
    pub device: DeviceLine,
}

/// A device's configuration space as a guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// The device.
    pub device: DeviceLine,
    /// Register by register, in order of their offsets.
    pub fields: Vec<Field>,
}

/// One register, or the bytes between two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    /// The header or capability that it is in; empty for bytes between two.
    pub block: String,
    /// Name, as the specification has it; empty for bytes between two registers.
    pub name: String,
    /// Offset.
    pub offset: u16,
    /// Length in bytes.
    pub length: u16,
    /// What the guest reads, for a register of up to four bytes.
    pub value: Option<u32>,
    /// What the hardware holds.
    pub hardware: Option<u32>,
    /// How the guest's accesses are treated, in a word.
    pub treatment: String,
    /// Where it is specified.
    pub spec: String,
}

/// The daemon and its guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// The daemon's version.
    pub version: String,
    /// `xen` or `sim`.
    pub platform: String,
    /// Who sees the facade: `global`, `private` or `off`; with a reason when it is not as configured.
    pub facade: String,
    /// For how long it has been running.
    pub uptime_seconds: u64,
    /// Hidden devices that did not come back from a reset.
    pub dead: Vec<Bdf>,
    /// Hidden devices that have reported uncorrectable errors, or whose DMA was stopped.
    pub device_errors: Vec<(Bdf, DeviceErrors)>,
    /// Its guests.
    pub guests: Vec<GuestLine>,
}

/// One guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestLine {
    /// Its number.
    pub domain: u16,
    /// Its name.
    pub name: String,
    /// The backend's state.
    pub backend: String,
    /// The frontend's state.
    pub frontend: String,
    /// Its devices: host address, guest address.
    pub devices: Vec<(Bdf, Bdf)>,
    /// What it could not be given: device, reason.
    pub failed: Vec<(String, String)>,
    /// Operations since this daemon began to serve it.
    pub operations: u64,
    /// How many of each kind, by the command's name; those that occurred.
    pub kinds: BTreeMap<String, u64>,
    /// What became of those that did not do what the guest wished.
    pub errors: Errors,
    /// How long they took.
    pub latency: Latency,
    /// Somebody traces them.
    pub traced: bool,
}

/// Operations that did not do what the guest wished.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    /// Writes that succeeded and did not reach the device, as no rule lets them.
    pub dropped: u64,
    /// Asked of functions that the guest does not have. Every Linux guest probes all of them when it starts.
    pub absent: u64,
    /// Refused by the rules.
    pub refused: u64,
    /// Failed in the device, the kernel or Xen.
    pub failed: u64,
}

/// How long operations took, from being found in the guest's page to the guest's being told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of them took at most so long, as exactly as the buckets tell.
    pub p50_ns: u64,
    /// As above, for 99 per cent.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Those that are not empty, the fastest operations first.
    pub buckets: Vec<Bucket>,
}

/// Operations that took about as long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// They took at most so long, and more than half of it; of the first, any time up to this. None: longer than all other buckets' bounds.
    pub up_to_ns: Option<u64>,
    /// How many.
    pub operations: u64,
}
