//! `[defaults]` and `[[device]]`.

use std::fmt;

use conf_space::address::Bdf;
use conf_space::selector::{DeviceId, DeviceNames, SlotPath};
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use toml::Spanned;

use super::settings::{
    AerSetting, HostChoice, InterruptControl, Intx, Partial, PermissiveSetting, QuirkList,
    ResetChoice,
};

/// What holds for all devices that nothing else is said of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Defaults(pub(super) Partial);

/// Which devices an entry is for: those that all keys agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    bdf: Option<Bdf>,
    id: Option<DeviceId>,
    path: Option<SlotPath>,
}

impl Keys {
    /// Whether the entry is for this device. A device that only some of the keys fit is another one: a card that has come to the address
    /// or into the slot of the one that was meant.
    pub fn match_all(&self, device: &DeviceNames) -> bool {
        self.bdf.is_none_or(|bdf| bdf == device.bdf)
            && self.id.is_none_or(|id| id.matches(device))
            && self
                .path
                .as_ref()
                .is_none_or(|path| device.path.as_ref() == Some(path))
    }

    /// Whether some of the keys fit this device, and others do not.
    pub fn disagree_on(&self, device: &DeviceNames) -> bool {
        let place = self.bdf.is_some_and(|bdf| bdf == device.bdf)
            || self
                .path
                .as_ref()
                .is_some_and(|path| device.path.as_ref() == Some(path));
        place && !self.match_all(device)
    }
}

/// As it stands in the file.
impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = [
            self.bdf.map(|bdf| format!("bdf = \"{bdf}\"")),
            self.id.map(|id| format!("id = \"{id}\"")),
            self.path.as_ref().map(|path| format!("path = \"{path}\"")),
        ];
        let keys: Vec<String> = keys.into_iter().flatten().collect();
        f.write_str(&keys.join(", "))
    }
}

/// A `[[device]]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceEntry {
    /// Which devices it is for.
    pub keys: Keys,
    /// The line that it begins at, counted from 1.
    pub line: usize,
    pub(super) settings: Partial,
}

impl DeviceEntry {
    /// From the tables as they were read. `text` is the file.
    pub(super) fn all(tables: Vec<Spanned<DeviceTable>>, text: &str) -> Vec<Self> {
        let entry = |table: Spanned<DeviceTable>| {
            let before = text.get(..table.span().start).unwrap_or_default();
            let DeviceTable { keys, settings } = table.into_inner();
            Self {
                keys,
                line: before.matches('\n').count().saturating_add(1),
                settings,
            }
        };
        tables.into_iter().map(entry).collect()
    }
}

/// The same as it is read.
#[derive(Debug)]
pub(super) struct DeviceTable {
    keys: Keys,
    settings: Partial,
}

impl<'de> Deserialize<'de> for DeviceTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // All of `Partial` again: serde's `flatten` would let unknown keys pass.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            bdf: Option<Bdf>,
            id: Option<String>,
            path: Option<String>,
            permissive: Option<PermissiveSetting>,
            quirks: Option<QuirkList>,
            reset: Option<ResetChoice>,
            allow_interrupt_control: Option<InterruptControl>,
            allow_shared_interrupt: Option<bool>,
            allow_shared_pages: Option<bool>,
            aer: Option<AerSetting>,
            host: Option<HostChoice>,
            intx: Option<Intx>,
        }
        let table = Table::deserialize(deserializer)?;
        let id = table.id.map(|text| {
            text.parse()
                .map_err(|error| Error::custom(format_args!("id {text:?}: {error}")))
        });
        let path = table.path.map(|text| {
            text.parse()
                .map_err(|error| Error::custom(format_args!("path {text:?}: {error}")))
        });
        let keys = Keys {
            bdf: table.bdf,
            id: id.transpose()?,
            path: path.transpose()?,
        };
        if (&keys.bdf, &keys.id, &keys.path) == (&None, &None, &None) {
            return Err(Error::custom(
                "a [[device]] says which devices it is for: bdf, id or path, or several of them; what holds for all goes into [defaults]",
            ));
        }
        Ok(Self {
            keys,
            settings: Partial {
                permissive: table.permissive,
                quirks: table.quirks,
                reset: table.reset,
                allow_interrupt_control: table.allow_interrupt_control,
                allow_shared_interrupt: table.allow_shared_interrupt,
                allow_shared_pages: table.allow_shared_pages,
                aer: table.aer,
                host: table.host,
                intx: table.intx,
            },
        })
    }
}
