//! `pciback set`.

use std::path::Path;

use clap::Args;
use conf_space::Bdf;
use pcibackd::control::policy::SettingsShown;
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

Examples:
  pciback set 03:00.0
  pciback set 03:00.0 permissive+=0xe8..0xea
  pciback set 03:00.0 permissive=default quirk=default";

/// What `pciback set` takes.
#[derive(Debug, Args)]
#[command(after_help = SETTINGS)]
pub struct Set {
    /// The device
    #[arg(value_name = "BDF")]
    pub device: Bdf,
    /// What to set, until the guest gives the device back; without any: shows the settings
    #[arg(value_name = "KEY=VALUE")]
    pub assignments: Vec<String>,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Sets something for a device, and shows its settings.
pub fn run(run_dir: &Path, arguments: &Set) -> Result<Outcome, CommandError> {
    let request = Request::Set {
        device: arguments.device.to_string(),
        assignments: arguments.assignments.clone(),
    };
    let shown = daemon::ask(run_dir, &request, |response| match response {
        Response::Settings(shown) => Some(shown),
        _ => None,
    })?;
    output::show(arguments.json, &shown, text)
}

fn text(shown: &SettingsShown, paint: Paint) -> String {
    let mut table = Table::new(&["SETTING", "VALUE", "FROM"]);
    for line in &shown.settings {
        table.row([
            line.name.as_str().into(),
            line.value.as_str().into(),
            line.from.as_str().into(),
        ]);
    }
    let mut text = format!(
        "{}\n{}",
        paint.paint(Style::Heading, &shown.device.to_string()),
        table.render(paint)
    );
    for (range, reason) in shown.settings.iter().flat_map(|line| &line.reasons) {
        text += &format!("{range}: {}\n", pcibackd::text::printable(reason));
    }
    if let Some(until) = &shown.until {
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
