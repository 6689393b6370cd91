//! What is set for a device, and how the file says it.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use conf_space::overlay::quirk::Quirks;
use conf_space::overlay::{Permissive, Quirk, Range, Ranges};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// All that holds for one device, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceSettings {
    /// Which registers without a rule of their own the guest may write.
    pub permissive: Permissive,
    /// Single registers that the guest may write, bit by bit.
    pub quirks: Quirks,
    /// How the device is reset between guests.
    pub reset: ResetChoice,
    /// Whether the guest may set the interrupt enable bits itself.
    pub allow_interrupt_control: InterruptControl,
    /// The guest may use the INTx line although a device of somebody else uses it, too.
    pub allow_shared_interrupt: bool,
    /// The guest may have the device although it has memory in a page with a device of somebody else.
    pub allow_shared_pages: bool,
    /// What becomes of a guest whose device has had an error.
    pub aer: AerPolicy,
    /// How the device is reached.
    pub host: HostChoice,
    /// Whether the guest gets its INTx line.
    pub intx: Intx,
}

/// How a device is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostChoice {
    /// As the platform does: sysfs under Xen, VFIO where Linux has the IOMMU.
    #[default]
    Auto,
    /// Through sysfs, or not at all.
    Sysfs,
    /// Through VFIO, or not at all.
    Vfio,
}

impl HostChoice {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Sysfs => "sysfs",
            Self::Vfio => "vfio",
        }
    }
}

/// Whether a guest gets its device's INTx line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Intx {
    /// If nobody else uses it.
    #[default]
    Auto,
    /// Never: its driver uses MSI or MSI-X.
    Off,
}

impl Intx {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
        }
    }
}

/// Whether a guest may set the MSI, MSI-X and INTx enable bits of its device itself. A qemu in a stub domain has to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InterruptControl {
    /// Only a stub domain.
    #[default]
    StubDomains,
    /// Any guest.
    Yes,
    /// None.
    No,
}

impl InterruptControl {
    /// Whether a guest may, which is or is not a stub domain.
    pub const fn allows(self, stub_domain: bool) -> bool {
        match self {
            Self::StubDomains => stub_domain,
            Self::Yes => true,
            Self::No => false,
        }
    }

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StubDomains => "auto",
            Self::Yes => "true",
            Self::No => "false",
        }
    }
}

impl From<bool> for InterruptControl {
    fn from(allowed: bool) -> Self {
        if allowed { Self::Yes } else { Self::No }
    }
}

impl<'de> Deserialize<'de> for InterruptControl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = InterruptControl;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or \"auto\" (stub domains)")
            }

            fn visit_bool<E: de::Error>(self, allowed: bool) -> Result<InterruptControl, E> {
                Ok(allowed.into())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<InterruptControl, E> {
                match text {
                    "auto" => Ok(InterruptControl::StubDomains),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// How a device is reset.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ResetChoice {
    /// By the best method that the kernel offers.
    #[default]
    Auto,
    /// Function-level reset.
    Flr,
    /// By putting the device to sleep (D3hot) and waking it.
    Pm,
    /// With its whole bus.
    Bus,
    /// Not at all: what one guest leaves behind, the next one finds.
    #[value(skip)]
    None,
}

impl ResetChoice {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Flr, Self::Pm, Self::Bus, Self::None];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Flr => "flr",
            Self::Pm => "pm",
            Self::Bus => "bus",
            Self::None => "none",
        }
    }
}

/// What becomes of a guest that does not recover from an error of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AerPolicy {
    /// What is done.
    pub on_failure: OnFailure,
    /// How long the guest has to answer each step.
    pub timeout: Duration,
    /// A driver that goes on without a reset is told that registers can be accessed again (`mmio_enabled`). Linux's frontend before 7.3
    /// crashes if the driver has nothing that listens.
    pub mmio_enabled: bool,
}

impl Default for AerPolicy {
    fn default() -> Self {
        Self {
            on_failure: OnFailure::default(),
            timeout: Duration::from_secs(10),
            mmio_enabled: false,
        }
    }
}

/// What is done when a guest does not recover from an error of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The device is taken from it.
    #[default]
    Detach,
    /// The guest is destroyed.
    Kill,
    /// Nothing.
    Ignore,
}

impl OnFailure {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Detach, Self::Kill, Self::Ignore];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Detach => "detach",
            Self::Kill => "kill",
            Self::Ignore => "ignore",
        }
    }
}

/// The settings that one table of the file makes. What it does not say it leaves to others.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Partial {
    pub permissive: Option<PermissiveSetting>,
    pub quirks: Option<QuirkList>,
    pub reset: Option<ResetChoice>,
    pub allow_interrupt_control: Option<InterruptControl>,
    pub allow_shared_interrupt: Option<bool>,
    pub allow_shared_pages: Option<bool>,
    pub aer: Option<AerSetting>,
    pub host: Option<HostChoice>,
    pub intx: Option<Intx>,
}

impl Partial {
    pub fn apply_to(&self, settings: &mut DeviceSettings) {
        if let Some(permissive) = &self.permissive {
            settings.permissive = permissive.value;
        }
        if let Some(QuirkList(quirks)) = self.quirks {
            settings.quirks = quirks;
        }
        if let Some(reset) = self.reset {
            settings.reset = reset;
        }
        if let Some(allow) = self.allow_interrupt_control {
            settings.allow_interrupt_control = allow;
        }
        if let Some(allow) = self.allow_shared_interrupt {
            settings.allow_shared_interrupt = allow;
        }
        if let Some(allow) = self.allow_shared_pages {
            settings.allow_shared_pages = allow;
        }
        if let Some(aer) = self.aer {
            aer.apply_to(&mut settings.aer);
        }
        if let Some(host) = self.host {
            settings.host = host;
        }
        if let Some(intx) = self.intx {
            settings.intx = intx;
        }
    }
}

/// `aer = { on_failure = "detach", timeout = 10 }`: what it does not say it leaves to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AerSetting {
    /// In place of [`AerPolicy::on_failure`].
    pub on_failure: Option<OnFailure>,
    /// In place of [`AerPolicy::timeout`], in seconds.
    pub timeout: Option<NonZeroU32>,
    /// In place of [`AerPolicy::mmio_enabled`].
    pub mmio_enabled: Option<bool>,
}

impl AerSetting {
    /// Lays it over what others say.
    pub fn apply_to(&self, policy: &mut AerPolicy) {
        policy.on_failure = self.on_failure.unwrap_or(policy.on_failure);
        policy.timeout = self.timeout.map_or(policy.timeout, |seconds| {
            Duration::from_secs(seconds.get().into())
        });
        policy.mmio_enabled = self.mmio_enabled.unwrap_or(policy.mmio_enabled);
    }
}

/// `permissive = true`, or a list of ranges: `["0x40..0x48", { range = "0x50..0x52", reason = "why" }]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PermissiveSetting {
    pub value: Permissive,
    /// Ranges with the reason that was given.
    pub reasons: Vec<(Range, String)>,
}

impl<'de> Deserialize<'de> for PermissiveSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = PermissiveSetting;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a list of ranges such as [\"0x40..0x48\"]")
            }

            fn visit_bool<E: de::Error>(self, all: bool) -> Result<PermissiveSetting, E> {
                Ok(PermissiveSetting {
                    value: all.into(),
                    reasons: Vec::new(),
                })
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> Result<PermissiveSetting, A::Error> {
                let mut ranges = Ranges::EMPTY;
                let mut reasons = Vec::new();
                while let Some(RangeEntry { range, reason }) = list.next_element()? {
                    ranges.insert(range).map_err(de::Error::custom)?;
                    reasons.extend(reason.map(|reason| (range, reason)));
                }
                let value = if ranges.is_empty() {
                    Permissive::No
                } else {
                    Permissive::Ranges(ranges)
                };
                Ok(PermissiveSetting { value, reasons })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A range, with or without the reason.
struct RangeEntry {
    range: Range,
    reason: Option<String>,
}

impl<'de> Deserialize<'de> for RangeEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            range: String,
            reason: Option<String>,
        }
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RangeEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"0x40..0x48\" or { range = \"0x40..0x48\", reason = \"...\" }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RangeEntry, E> {
                Ok(RangeEntry {
                    range: text.parse().map_err(E::custom)?,
                    reason: None,
                })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RangeEntry, A::Error> {
                let table = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(RangeEntry {
                    range: table.range.parse().map_err(de::Error::custom)?,
                    reason: table.reason,
                })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `quirks = ["c8:2:00ff"]`: offset, width and mask as in the kernel's `quirks` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QuirkList(pub Quirks);

impl<'de> Deserialize<'de> for QuirkList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = QuirkList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of quirks such as [\"c8:2:00ff\"]: offset, width, mask")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<QuirkList, A::Error> {
                let mut quirks = Quirks::EMPTY;
                while let Some(text) = list.next_element::<String>()? {
                    let quirk: Quirk = text.parse().map_err(|error| {
                        de::Error::custom(format_args!("{text:?} is no quirk: {error}"))
                    })?;
                    quirks.insert(quirk).map_err(de::Error::custom)?;
                }
                Ok(QuirkList(quirks))
            }
        }
        deserializer.deserialize_seq(List)
    }
}
