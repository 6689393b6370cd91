//! `pciback show --dropped`.

use std::path::Path;

use conf_space::Bdf;
use pcibackd::control::policy::{DroppedLine, DroppedShown};
use pcibackd::control::protocol::{Request, Response};

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};

/// Shows the writes of a device's guest that did not reach the device, and what would let them through.
pub fn run(run_dir: &Path, device: Bdf, json: bool) -> Result<Outcome, CommandError> {
    let request = Request::Dropped {
        device: device.to_string(),
    };
    let shown = daemon::ask(run_dir, &request, |response| match response {
        Response::Dropped(shown) => Some(shown),
        _ => None,
    })?;
    output::show(json, &shown, text)
}

fn text(shown: &DroppedShown, paint: Paint) -> String {
    let title = paint.paint(Style::Heading, &shown.device.to_string());
    if shown.writes.is_empty() {
        return format!(
            "{title}: no write of the guest's was dropped ({}).\n",
            shown.of
        );
    }
    let mut text = format!("{title}: writes that were dropped, of {}\n", shown.of);
    let mut table = Table::new(&["OFFSET", "BYTES", "REGISTER", "COUNT", "LAST VALUE", ""]);
    for write in &shown.writes {
        table.row(row(write));
    }
    text += &table.render(paint);
    if shown.elsewhere > 0 {
        text += &format!(
            "and {} writes to further registers, which are not told apart: no driver does that\n",
            shown.elsewhere
        );
    }
    if let Some(suggestion) = &shown.suggestion {
        text += &format!(
            "\nIf the guest's driver needs them, this lets them through, and no others:\n  pciback {}\n\
             until the guest gives the device back. For good, in the configuration file:\n",
            suggestion.command
        );
        for line in suggestion.entry.lines() {
            text += &format!("  {line}\n");
        }
        if suggestion.left_out > 0 {
            text += &format!(
                "There is no room for ranges for {} more of the registers; permissive=true opens all that have no rule of their own.\n",
                suggestion.left_out
            );
        }
    }
    text
}

fn row(write: &DroppedLine) -> [Cell; 6] {
    let digits = usize::from(write.width).saturating_mul(2);
    let register = match (write.block.as_str(), write.register.as_str()) {
        ("", _) => "unknown".to_owned(),
        (block, "") => format!("{block}, unknown"),
        (block, register) => format!("{block}, {register}"),
    };
    let (remark, weight) = match (&write.never, &write.note) {
        (Some(never), _) => (format!("not for guests: {never}"), Style::Faint),
        (None, Some(note)) => (note.clone(), Style::Notable),
        (None, None) => (String::new(), Style::Plain),
    };
    [
        format!("{:#05x}", write.offset).into(),
        write.width.to_string().into(),
        register.into(),
        write.count.to_string().into(),
        format!("{:0digits$x}", write.last).into(),
        Cell::new(&remark, weight),
    ]
}

#[cfg(test)]
mod tests {
    use pcibackd::control::policy::Suggestion;

    use super::*;

    #[test]
    fn registers_stand_with_what_was_written_and_what_would_let_it_through() {
        let line = |block: &str, register: &str, offset, never: Option<&str>| DroppedLine {
            block: block.into(),
            register: register.into(),
            offset,
            width: 2,
            count: 3,
            last: 0x28,
            never: never.map(str::to_owned),
            note: None,
        };
        let shown = DroppedShown {
            device: "03:00.0".parse().unwrap(),
            of: "domain 3".into(),
            writes: vec![
                line("PCI Express", "Device Control", 0xe8, None),
                line("Header", "Status", 6, Some("the header is the host's")),
                line("Vendor", "", 0xf0, None),
            ],
            elsewhere: 7,
            suggestion: Some(Suggestion {
                command: "set 0000:03:00.0 permissive+=0xe8..0xea".into(),
                entry: "[[device]]\nid = \"8086:10d3\"\n".into(),
                left_out: 2,
            }),
        };
        let expected = "\
0000:03:00.0: writes that were dropped, of domain 3
OFFSET  BYTES  REGISTER                     COUNT  LAST VALUE  
0x0e8   2      PCI Express, Device Control  3      0028        
0x006   2      Header, Status               3      0028        not for guests: the header is the host's
0x0f0   2      Vendor, unknown              3      0028        
and 7 writes to further registers, which are not told apart: no driver does that

If the guest's driver needs them, this lets them through, and no others:
  pciback set 0000:03:00.0 permissive+=0xe8..0xea
until the guest gives the device back. For good, in the configuration file:
  [[device]]
  id = \"8086:10d3\"
There is no room for ranges for 2 more of the registers; permissive=true opens all that have no rule of their own.
";
        let text = text(&shown, Paint::NONE);
        let trimmed = |text: &str| -> Vec<String> {
            text.lines()
                .map(|line| line.trim_end().to_owned())
                .collect()
        };
        assert_eq!(trimmed(&text), trimmed(expected));
    }
}
