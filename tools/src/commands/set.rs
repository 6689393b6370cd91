//! `pciback set`.

use std::path::Path;

use clap::Args;
use conf_space::Bdf;
use pcibackd::control::policy::{GuestSettingsShown, SettingLine, SettingsShown};
use pcibackd::control::protocol::{Request, Response};

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::Table;

const SETTINGS: &str = "\
What can be set, and 'default' takes it back:
  permissive=false               no register without a rule of its own
  permissive=true                every one
  permissive=0xc8..0xca,...      those in these ranges, without the second offset
  permissive+=0xc8..0xca,...     those as well
  quirk=c8:2:00ff                of the register of 2 bytes at c8 the bits 00ff, besides other quirks
  allow_interrupt_control=true   the guest may set the MSI, MSI-X and INTx enable bits itself
  allow_shared_interrupt=true    the guest may have an INTx line that somebody else uses; before it has the device
  allow_shared_pages=true        it may have the device beside somebody else's in a memory page; before it has it
  reset=auto|flr|pm|bus|none     how the device is reset when the guest gives it back
  aer.on_failure=detach|kill|ignore, aer.timeout=SECONDS, aer.mmio_enabled=true
                                 what follows an error of the device
For guests of a name, from their next start on and until this host is booted anew:
  topology=vpci|passthrough      they see one bus, 0000:00, or their devices at their addresses on the host

Examples:
  pciback set 03:00.0
  pciback set 03:00.0 permissive+=0xe8..0xea
  pciback set 03:00.0 permissive=default quirk=default
  pciback set --guest database topology=passthrough";

/// What `pciback set` takes.
#[derive(Debug, Args)]
#[command(after_help = SETTINGS)]
pub struct Set {
    /// The guests of that name, instead of a device
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// The device, unless a guest is named
    #[arg(value_name = "BDF", value_parser = first, required_unless_present = "guest")]
    pub first: Option<First>,
    /// What to set, until the guest gives the device back; without any: shows the settings
    #[arg(value_name = "KEY=VALUE")]
    pub assignments: Vec<String>,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// What comes first: the device, or, where a guest is named, what to set for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum First {
    /// A device.
    Device(Bdf),
    /// `KEY=VALUE`.
    Assignment(String),
}

fn first(text: &str) -> Result<First, String> {
    if text.contains('=') {
        return Ok(First::Assignment(text.to_owned()));
    }
    text.parse()
        .map(First::Device)
        .map_err(|error: conf_space::address::ParseBdfError| error.to_string())
}

/// Sets something for a device or for a guest, and shows the settings.
pub fn run(run_dir: &Path, arguments: &Set) -> Result<Outcome, CommandError> {
    let assignments = || arguments.assignments.iter().cloned();
    match (&arguments.guest, &arguments.first) {
        (None, Some(First::Device(device))) => {
            let request = Request::Set {
                device: device.to_string(),
                assignments: assignments().collect(),
            };
            let shown = daemon::ask(run_dir, &request, |response| match response {
                Response::Settings(shown) => Some(shown),
                _ => None,
            })?;
            output::show(arguments.json, &shown, text)
        }
        (Some(guest), None | Some(First::Assignment(_))) => {
            let first = match &arguments.first {
                Some(First::Assignment(text)) => Some(text.clone()),
                _ => None,
            };
            let request = Request::SetGuest {
                guest: guest.clone(),
                assignments: first.into_iter().chain(assignments()).collect(),
            };
            let shown = daemon::ask(run_dir, &request, |response| match response {
                Response::GuestSettings(shown) => Some(shown),
                _ => None,
            })?;
            output::show(arguments.json, &shown, text_of_guest)
        }
        (None, _) => {
            output::complain("set: name a device first, or a guest with --guest NAME");
            Ok(Outcome::Usage)
        }
        (Some(_), Some(First::Device(device))) => {
            output::complain(&format!(
                "set: {device} and --guest: name a device or a guest, not both"
            ));
            Ok(Outcome::Usage)
        }
    }
}

fn text(shown: &SettingsShown, paint: Paint) -> String {
    let name = shown.device.to_string();
    sheet(&name, &shown.settings, shown.until.as_deref(), paint)
}

fn text_of_guest(shown: &GuestSettingsShown, paint: Paint) -> String {
    let name = pcibackd::text::printable(&shown.guest);
    sheet(&name, &shown.settings, shown.until.as_deref(), paint)
}

fn sheet(name: &str, settings: &[SettingLine], until: Option<&str>, paint: Paint) -> String {
    let mut table = Table::new(&["SETTING", "VALUE", "FROM"]);
    for line in settings {
        table.row([
            line.name.as_str().into(),
            line.value.as_str().into(),
            line.from.as_str().into(),
        ]);
    }
    let mut text = format!(
        "{}\n{}",
        paint.paint(Style::Heading, name),
        table.render(paint)
    );
    for (range, reason) in settings.iter().flat_map(|line| &line.reasons) {
        text += &format!("{range}: {}\n", pcibackd::text::printable(reason));
    }
    if let Some(until) = until {
        text += &format!("What was set at run time holds {until}.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use pcibackd::control::policy::SettingLine;

    use super::*;

    #[test]
    fn each_setting_is_shown_with_where_it_comes_from() {
        let line = |name: &str, value: &str, from: &str| SettingLine {
            name: name.into(),
            value: value.into(),
            from: from.into(),
            reasons: Vec::new(),
        };
        let mut permissive = line("permissive", "[\"0xe8..0xea\"]", "[[device]], line 3");
        permissive.reasons = vec![("0xe8..0xea".into(), "payload\nsize".into())];
        let shown = SettingsShown {
            device: "03:00.0".parse().unwrap(),
            settings: vec![permissive, line("reset", "flr", "set at run time")],
            until: Some("until domain 3 gives the device back".into()),
        };
        let expected = "\
0000:03:00.0
SETTING     VALUE           FROM
permissive  [\"0xe8..0xea\"]  [[device]], line 3
reset       flr             set at run time
0xe8..0xea: payload\\nsize
What was set at run time holds until domain 3 gives the device back.
";
        assert_eq!(text(&shown, Paint::NONE), expected);
    }
}
