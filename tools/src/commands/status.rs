//! `pciback status`.

use std::path::Path;

use clap::Args;
use pcibackd::control::protocol::{DaemonStatus, GuestLine, Request, Response};
use pcibackd::text::printable;

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};

/// What `pciback status` takes.
#[derive(Debug, Args)]
pub struct Status {
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Shows the daemon and its guests.
pub fn run(run_dir: &Path, arguments: &Status) -> Result<Outcome, CommandError> {
    let status = daemon::ask(run_dir, &Request::Status, |response| match response {
        Response::Status(status) => Some(status),
        _ => None,
    })?;
    if arguments.json {
        output::print_json(&status)?;
    } else {
        output::print(&text(&status, Paint::for_stdout()))?;
    }
    Ok(Outcome::Done)
}

fn text(status: &DaemonStatus, paint: Paint) -> String {
    let mut text = format!(
        "pcibackd {}, platform {}, facade {}\n",
        printable(&status.version),
        printable(&status.platform),
        printable(&status.facade)
    );
    if status.guests.is_empty() {
        text.push_str("no guest has PCI devices\n");
    }
    for guest in &status.guests {
        text.push('\n');
        text.push_str(&guest_text(guest, paint));
    }
    text
}

fn guest_text(guest: &GuestLine, paint: Paint) -> String {
    let name = printable(&format!("domain {} '{}'", guest.domain, guest.name));
    let states = printable(&format!(
        "backend {}, frontend {}",
        guest.backend, guest.frontend
    ));
    let connected =
        guest.backend.starts_with("Connected") && guest.frontend.starts_with("Connected");
    let style = if connected {
        Style::Good
    } else {
        Style::Notable
    };
    let mut text = format!(
        "{}: {}, {} operations\n",
        paint.paint(Style::Heading, &name),
        paint.paint(style, &states),
        guest.operations
    );
    let mut table = Table::new(&["DEVICE", "SEEN AS", ""]).indented(2);
    for (device, seen_as) in &guest.devices {
        table.row([device.to_string().into(), seen_as.to_string().into()]);
    }
    for (device, reason) in &guest.failed {
        table.row([
            device.as_str().into(),
            "-".into(),
            Cell::new(&format!("failed: {reason}"), Style::Bad),
        ]);
    }
    text.push_str(&table.render(paint));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(guests: Vec<GuestLine>) -> DaemonStatus {
        DaemonStatus {
            version: "0.1.0".into(),
            platform: "xen".into(),
            facade: "global".into(),
            guests,
        }
    }

    #[test]
    fn a_daemon_without_guests_says_so() {
        let expected = "pcibackd 0.1.0, platform xen, facade global\nno guest has PCI devices\n";
        assert_eq!(text(&status(Vec::new()), Paint::NONE), expected);
    }

    #[test]
    fn each_guest_has_its_states_its_devices_and_what_failed() {
        let guest = GuestLine {
            domain: 3,
            name: "web".into(),
            backend: "Connected (4)".into(),
            frontend: "Connected (4)".into(),
            devices: vec![("03:00.0".parse().unwrap(), "00:00.0".parse().unwrap())],
            failed: vec![("0000:04:00.0".into(), "it is not hidden".into())],
            operations: 1520,
        };
        let expected = "\
pcibackd 0.1.0, platform xen, facade global

domain 3 'web': backend Connected (4), frontend Connected (4), 1520 operations
  DEVICE        SEEN AS
  0000:03:00.0  0000:00:00.0
  0000:04:00.0  -             failed: it is not hidden
";
        assert_eq!(text(&status(vec![guest]), Paint::NONE), expected);
    }
}
