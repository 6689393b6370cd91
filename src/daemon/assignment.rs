//! What `pciback set` takes: `permissive=true`, `permissive+=0xc8..0xca`, `quirk=c8:2:00ff`, `reset=flr`, ...

use std::num::NonZeroU32;
use std::str::FromStr;

use conf_space::overlay::{Permissive, Quirk, Quirks, Range, Ranges};

use crate::config::{DeviceSettings, OnFailure, ResetChoice};
use crate::host::record::RunTime;

/// One setting that is changed until the guest gives the device back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Assignment {
    /// `permissive=VALUE`; `None`: as the file says.
    Permissive(Option<Permissive>),
    /// `permissive+=RANGES`: besides what the guest may write already.
    MoreRanges(Ranges),
    /// `quirk=OFFSET:WIDTH:MASK`: besides those that there are.
    Quirk(Quirk),
    /// `quirk=default`: those of the file, and no more.
    NoQuirks,
    /// `allow_interrupt_control=VALUE`; `None`: as the file says.
    InterruptControl(Option<bool>),
    /// `allow_shared_interrupt=VALUE`; `None`: as the file says.
    SharedInterrupt(Option<bool>),
    /// `allow_shared_pages=VALUE`; `None`: as the file says.
    SharedPages(Option<bool>),
    /// `reset=VALUE`; `None`: as the file says.
    Reset(Option<ResetChoice>),
    /// `aer.on_failure=VALUE`; `None`: as the file says.
    OnFailure(Option<OnFailure>),
    /// `aer.timeout=SECONDS`; `None`: as the file says.
    AerTimeout(Option<NonZeroU32>),
    /// `aer.mmio_enabled=VALUE`; `None`: as the file says.
    MmioEnabled(Option<bool>),
}

/// The settings, for messages.
const KEYS: &str = "permissive=true, false, default or RANGE,...; permissive+=RANGE,...; quirk=OFFSET:WIDTH:MASK or default; \
                    allow_interrupt_control, allow_shared_interrupt, allow_shared_pages=true, false or default; \
                    reset=auto, flr, pm, bus, none or default; aer.on_failure=detach, kill, ignore or default; \
                    aer.timeout=SECONDS or default; aer.mmio_enabled=true, false or default";

impl FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| format!("{text}: expected KEY=VALUE. What can be set: {KEYS}"))?;
        let wrong = |what: &str| format!("{text}: {what}");
        let switch = |value: &str| match value {
            "default" => Ok(None),
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(wrong("expected true, false or default")),
        };
        Ok(match (key, value) {
            ("permissive", "default") => Self::Permissive(None),
            ("permissive", "true") => Self::Permissive(Some(Permissive::Yes)),
            ("permissive", "false") => Self::Permissive(Some(Permissive::No)),
            ("permissive", list) => Self::Permissive(Some(Permissive::Ranges(
                ranges(list).map_err(|what| wrong(&what))?,
            ))),
            ("permissive+", list) => Self::MoreRanges(ranges(list).map_err(|what| wrong(&what))?),
            ("quirk", "default") => Self::NoQuirks,
            ("quirk", quirk) => {
                Self::Quirk(quirk.parse().map_err(|error| wrong(&format!("{error}")))?)
            }
            ("allow_interrupt_control", text) => Self::InterruptControl(switch(text)?),
            ("allow_shared_interrupt", text) => Self::SharedInterrupt(switch(text)?),
            ("allow_shared_pages", text) => Self::SharedPages(switch(text)?),
            ("reset", "default") => Self::Reset(None),
            ("reset", choice) => {
                let found = ResetChoice::ALL
                    .into_iter()
                    .find(|known| known.name() == choice);
                let what = "expected auto, flr, pm, bus, none or default";
                Self::Reset(Some(found.ok_or_else(|| wrong(what))?))
            }
            ("aer.on_failure", "default") => Self::OnFailure(None),
            ("aer.on_failure", choice) => {
                let found = OnFailure::ALL
                    .into_iter()
                    .find(|known| known.name() == choice);
                let what = "expected detach, kill, ignore or default";
                Self::OnFailure(Some(found.ok_or_else(|| wrong(what))?))
            }
            ("aer.timeout", "default") => Self::AerTimeout(None),
            ("aer.timeout", seconds) => Self::AerTimeout(Some(
                seconds
                    .parse()
                    .map_err(|_| wrong("expected seconds, 1 or more, or default"))?,
            )),
            ("aer.mmio_enabled", text) => Self::MmioEnabled(switch(text)?),
            _ => {
                return Err(format!(
                    "{text}: there is no such setting. What can be set: {KEYS}"
                ));
            }
        })
    }
}

fn ranges(list: &str) -> Result<Ranges, String> {
    let mut ranges = Ranges::EMPTY;
    for text in list.split(',') {
        let range: Range = text.parse().map_err(|error| format!("{error}"))?;
        ranges.insert(range).map_err(|error| error.to_string())?;
    }
    Ok(ranges)
}

impl Assignment {
    /// Changes what is set at run time. `file` is what holds without that.
    ///
    /// # Errors
    /// When there is no room for more; as a text.
    pub fn apply_to(&self, settings: &mut RunTime, file: &DeviceSettings) -> Result<(), String> {
        match self {
            Self::Permissive(value) => settings.permissive = *value,
            Self::MoreRanges(more) => {
                let mut all = match settings.permissive.unwrap_or(file.permissive) {
                    Permissive::Yes => return Ok(()),
                    Permissive::No => Ranges::EMPTY,
                    Permissive::Ranges(ranges) => ranges,
                };
                for range in more.iter() {
                    all.insert(range).map_err(|error| error.to_string())?;
                }
                settings.permissive = Some(Permissive::Ranges(all));
            }
            Self::Quirk(quirk) => {
                let mut all = file.quirks;
                for other in settings.quirks.iter().chain([*quirk]) {
                    all.insert(other).map_err(|error| error.to_string())?;
                }
                settings
                    .quirks
                    .insert(*quirk)
                    .map_err(|error| error.to_string())?;
            }
            Self::NoQuirks => settings.quirks = Quirks::EMPTY,
            Self::InterruptControl(value) => settings.allow_interrupt_control = *value,
            Self::SharedInterrupt(value) => settings.allow_shared_interrupt = *value,
            Self::SharedPages(value) => settings.allow_shared_pages = *value,
            Self::Reset(value) => settings.reset = *value,
            Self::OnFailure(value) => settings.aer.on_failure = *value,
            Self::AerTimeout(value) => settings.aer.timeout = *value,
            Self::MmioEnabled(value) => settings.aer.mmio_enabled = *value,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::AerPolicy;

    fn set(assignments: &[&str], file: &DeviceSettings) -> Result<RunTime, String> {
        let mut settings = RunTime::default();
        for text in assignments {
            text.parse::<Assignment>()?.apply_to(&mut settings, file)?;
        }
        Ok(settings)
    }

    fn shown(permissive: Option<Permissive>) -> Vec<String> {
        match permissive {
            Some(Permissive::Ranges(ranges)) => {
                ranges.iter().map(|range| range.to_string()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ranges_take_the_place_of_others_or_are_added_to_them() {
        let file = DeviceSettings {
            permissive: Permissive::Ranges(ranges("0x40..0x44").unwrap()),
            ..DeviceSettings::default()
        };
        let settings = set(&["permissive=0xc8..0xca,0x60..0x61"], &file).unwrap();
        assert_eq!(shown(settings.permissive), ["0x60..0x61", "0xc8..0xca"]);
        let settings = set(&["permissive+=0x44..0x46", "permissive+=0xc8..0xca"], &file).unwrap();
        assert_eq!(shown(settings.permissive), ["0x40..0x46", "0xc8..0xca"]);
        let settings = set(&["permissive=true", "permissive+=0x44..0x46"], &file).unwrap();
        assert_eq!(settings.permissive, Some(Permissive::Yes));
        let settings = set(&["permissive=true", "permissive=default"], &file).unwrap();
        assert_eq!(settings, RunTime::default());
    }

    #[test]
    fn other_settings_are_set_and_taken_back() {
        let file = DeviceSettings::default();
        let all = [
            "quirk=c8:2:ff",
            "allow_interrupt_control=true",
            "allow_shared_interrupt=true",
            "allow_shared_pages=false",
            "reset=none",
            "aer.on_failure=kill",
            "aer.timeout=3",
            "aer.mmio_enabled=true",
        ];
        let settings = set(&all, &file).unwrap();
        assert_eq!(settings.quirks.iter().count(), 1);
        assert_eq!(settings.allow_interrupt_control, Some(true));
        assert_eq!(settings.allow_shared_interrupt, Some(true));
        assert_eq!(settings.allow_shared_pages, Some(false));
        assert_eq!(settings.reset, Some(ResetChoice::None));
        let mut held = DeviceSettings::default();
        settings.apply_to(&mut held);
        let policy = AerPolicy {
            on_failure: OnFailure::Kill,
            timeout: Duration::from_secs(3),
            mmio_enabled: true,
        };
        assert_eq!(held.aer, policy);
        let back = all.map(|text| {
            let (key, _) = text.split_once('=').unwrap();
            format!("{key}=default")
        });
        let back = back.iter().map(String::as_str);
        let all: Vec<&str> = all.into_iter().chain(back).collect();
        assert_eq!(set(&all, &file), Ok(RunTime::default()));
    }

    #[test]
    fn what_makes_no_sense_is_told_with_what_would() {
        for (text, part) in [
            ("permissive", "KEY=VALUE"),
            ("permisive=true", "allow_interrupt_control"),
            ("permissive=yes", "0x40..0x48"),
            ("permissive+=true", "0x40..0x48"),
            ("quirk=c8:3:ff", "1, 2 or 4"),
            ("allow_interrupt_control=1", "true, false or default"),
            ("allow_shared_pages=auto", "true, false or default"),
            ("reset=hard", "flr"),
            ("aer.on_failure=shoot", "detach"),
            ("aer.timeout=0", "1 or more"),
            ("aer.timeout=soon", "seconds"),
            ("aer.time=1", "aer.timeout=SECONDS"),
        ] {
            let error = set(&[text], &DeviceSettings::default()).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn quirks_of_the_file_count_against_the_room_for_more() {
        let mut file = DeviceSettings::default();
        for offset in 0..16 {
            let quirk: Quirk = format!("{:x}:1:1", 0xc0 + offset).parse().unwrap();
            file.quirks.insert(quirk).unwrap();
        }
        assert!(set(&["quirk=e0:1:1"], &file).is_err());
        assert!(set(&["quirk=c0:1:ff"], &file).is_ok());
    }
}
