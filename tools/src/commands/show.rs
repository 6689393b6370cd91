//! `pciback show`.

use std::path::Path;

use clap::Args;
use conf_space::Bdf;
use pcibackd::control::protocol::{Field, Request, Response, Shown};

use super::dropped;
use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::output::{self, class, errors};

const TREATMENTS: &str = "\
What becomes of a guest's accesses:
  emulated        the guest reads what pcibackd says; its writes do not reach the device, or only by a rule
  passed          reads and writes reach the device
  filtered        reads come from the device, writes reach it as far as a rule allows
  read-only       reads come from the device, writes are ignored
  writes dropped  reads come from the device, writes reach it only if the device is permissive
  hidden          the guest reads zeros

Examples:
  pciback show 03:00.0
  pciback show --json 03:00.0 | jq '.fields[] | select(.value != .hardware)'";

/// What `pciback show` takes.
#[derive(Debug, Args)]
#[command(after_help = TREATMENTS)]
pub struct Show {
    /// The device
    #[arg(value_name = "BDF")]
    pub device: Bdf,
    /// Instead, the writes of its guest that did not reach it, and what would let them through
    #[arg(long)]
    pub dropped: bool,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Shows a device's configuration space.
pub fn run(run_dir: &Path, arguments: &Show) -> Result<Outcome, CommandError> {
    if arguments.dropped {
        return dropped::run(run_dir, arguments.device, arguments.json);
    }
    let request = Request::Show {
        device: arguments.device.to_string(),
    };
    let shown = daemon::ask(run_dir, &request, |response| match response {
        Response::Device(shown) => Some(shown),
        _ => None,
    })?;
    output::show(arguments.json, &*shown, text)
}

fn text(shown: &Shown, paint: Paint) -> String {
    let mut text = title(shown, paint);
    for group in groups(&shown.fields) {
        text.push('\n');
        text.push_str(&paint.paint(Style::Heading, group.name));
        text.push('\n');
        let mut table =
            Table::new(&["OFFSET", "REGISTER", "GUEST", "HARDWARE", "TREATMENT"]).indented(2);
        for field in group.fields {
            table.row(row(field));
        }
        text.push_str(&table.render(paint));
    }
    text
}

/// Which device this is, and whose eyes it is seen with.
fn title(Shown { device, .. }: &Shown, paint: Paint) -> String {
    let seen_by = match (device.domain, device.seen_as) {
        (Some(domain), Some(seen_as)) => {
            let name = device.guest.as_deref().map(|name| format!(" '{name}'"));
            format!(
                "as domain {domain}{} sees it at {seen_as}",
                name.unwrap_or_default()
            )
        }
        _ => format!("as a guest would see it; now: {}", device.state),
    };
    let permissive = if device.permissive {
        "; permissive"
    } else {
        ""
    };
    let kind = format!(
        "{} {} [{:04x}:{:04x}]",
        device.device,
        class::name(device.class),
        device.vendor,
        device.id
    );
    let seen_by = pcibackd::text::printable(&seen_by);
    let (subvendor, subdevice) = device.subsystem;
    let id = format!(
        "{:04x}:{:04x}:{subvendor:04x}:{subdevice:04x}",
        device.vendor, device.id
    );
    let path = device.path.as_deref().unwrap_or("unknown");
    let mut title = format!(
        "{}, {seen_by}{permissive}\nid {id}, path {path}\n",
        paint.paint(Style::Heading, &kind)
    );
    if let Some((text, style)) = device.errors.as_ref().and_then(errors::text) {
        title.push_str(&format!("{}\n", paint.paint(style, &text)));
    }
    title
}

/// Registers of one capability, with the bytes between them.
struct Group<'a> {
    name: &'a str,
    fields: &'a [Field],
}

/// Bytes between capabilities are a group of their own; bytes between two registers of the same one are not.
fn groups(fields: &[Field]) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    let mut rest = fields;
    while let Some(first) = rest.first() {
        let block = first.block.as_str();
        let others = rest
            .iter()
            .position(|field| field.block != block && !field.block.is_empty());
        let (mine, behind) = rest
            .split_at_checked(others.unwrap_or(rest.len()))
            .unwrap_or((rest, &[]));
        let end = if block.is_empty() {
            mine.len()
        } else {
            mine.iter()
                .rposition(|field| field.block == block)
                .map_or(mine.len(), |last| last.saturating_add(1))
        };
        let (mine, between) = mine.split_at_checked(end).unwrap_or((mine, &[]));
        let name = if block.is_empty() {
            "Without a known register"
        } else {
            block
        };
        groups.push(Group { name, fields: mine });
        if !between.is_empty() {
            groups.push(Group {
                name: "Without a known register",
                fields: between,
            });
        }
        rest = behind;
    }
    groups
}

fn row(field: &Field) -> [Cell; 5] {
    let last = field.offset.saturating_add(field.length.saturating_sub(1));
    let offset = if field.name.is_empty() {
        format!("{:#05x}-{last:#05x}", field.offset)
    } else {
        format!("{:#05x}", field.offset)
    };
    let name = if field.name.is_empty() {
        format!("{} bytes", field.length)
    } else {
        field.name.clone()
    };
    let differs = field.value != field.hardware;
    let weight = if differs {
        Style::Notable
    } else {
        Style::Plain
    };
    [
        offset.into(),
        name.into(),
        Cell::new(&value(field, field.value), weight),
        value(field, field.hardware).into(),
        field.treatment.as_str().into(),
    ]
}

/// A register's value with all its digits.
fn value(field: &Field, value: Option<u32>) -> String {
    match value {
        Some(value) => format!(
            "{value:0digits$x}",
            digits = usize::from(field.length).saturating_mul(2)
        ),
        // A register that the device did not answer for, or bytes that are not one value.
        None if field.name.is_empty() => String::new(),
        None => "unreadable".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use pcibackd::control::protocol::DeviceLine;

    use super::*;
    use crate::devices::network_card;

    fn field(
        block: &str,
        name: &str,
        offset: u16,
        length: u16,
        values: Option<(u32, u32)>,
        treatment: &str,
    ) -> Field {
        Field {
            block: block.into(),
            name: name.into(),
            offset,
            length,
            value: values.map(|(guest, _)| guest),
            hardware: values.map(|(_, hardware)| hardware),
            treatment: treatment.into(),
            spec: String::new(),
        }
    }

    fn shown() -> Shown {
        Shown {
            device: DeviceLine {
                domain: Some(3),
                guest: Some("web".into()),
                seen_as: Some("00:00.0".parse().unwrap()),
                ..network_card("03:00.0", "assigned", None)
            },
            fields: vec![
                field(
                    "Header",
                    "Vendor ID",
                    0,
                    2,
                    Some((0x8086, 0x8086)),
                    "emulated",
                ),
                field("", "", 2, 2, None, "writes dropped"),
                field(
                    "Header",
                    "Command",
                    4,
                    2,
                    Some((0x0106, 0x0406)),
                    "filtered",
                ),
                field("", "", 6, 0x4a, None, "writes dropped"),
                field("MSI", "Message Control", 0x52, 2, None, "filtered"),
            ],
        }
    }

    #[test]
    fn registers_stand_under_their_capability_with_what_guest_and_hardware_have() {
        let expected = "\
0000:03:00.0 Ethernet controller [8086:10d3], as domain 3 'web' sees it at 0000:00:00.0
id 8086:10d3:8086:a01f, path 0000:00:1c.0/00.0

Header
  OFFSET       REGISTER   GUEST  HARDWARE  TREATMENT
  0x000        Vendor ID  8086   8086      emulated
  0x002-0x003  2 bytes                     writes dropped
  0x004        Command    0106   0406      filtered

Without a known register
  OFFSET       REGISTER  GUEST  HARDWARE  TREATMENT
  0x006-0x04f  74 bytes                   writes dropped

MSI
  OFFSET  REGISTER         GUEST       HARDWARE    TREATMENT
  0x052   Message Control  unreadable  unreadable  filtered
";
        assert_eq!(text(&shown(), Paint::NONE), expected);
    }

    #[test]
    fn a_device_that_no_guest_has_is_shown_as_one_would_see_it() {
        let mut shown = shown();
        shown.device.domain = None;
        shown.device.seen_as = None;
        shown.device.state = "dom0".into();
        assert!(text(&shown, Paint::NONE).contains("as a guest would see it; now: dom0\n"));
    }

    #[test]
    fn no_field_is_left_out_or_shown_twice_however_they_mix() {
        let mut shown = shown();
        shown.fields.insert(0, field("", "", 0, 1, None, ""));
        shown
            .fields
            .push(field("Header", "late", 0xf0, 1, None, ""));
        shown.fields.push(field("", "", 0xf1, 1, None, ""));
        let grouped: Vec<&Field> = groups(&shown.fields)
            .iter()
            .flat_map(|group| group.fields)
            .collect();
        assert_eq!(grouped, shown.fields.iter().collect::<Vec<_>>());
    }
}
