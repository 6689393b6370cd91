//! `pciback status`.

use std::path::Path;

use clap::Args;
use conf_space::Bdf;
use pcibackd::control::protocol::{
    DaemonStatus, DeviceErrors, Errors, GuestLine, Latency, Request, Response,
};
use pcibackd::text::printable;

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::output::{self, duration, errors};

const HELP: &str = "\
Operations are counted since this daemon began to serve the guest. Dropped writes succeed and do not reach the
device: no rule lets them. Refused operations are against the rules; failed ones failed in the device, the kernel
or Xen. The histogram tells how long operations took, until the guest was told.

Examples:
  pciback status
  pciback status --json | jq '.guests[] | {name, errors}'";

/// What `pciback status` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
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
    output::show(arguments.json, &status, text)
}

fn text(status: &DaemonStatus, paint: Paint) -> String {
    let mut text = format!(
        "pcibackd {}, platform {}, facade {}, up {}\n",
        printable(&status.version),
        printable(&status.platform),
        printable(&status.facade),
        duration::uptime(status.uptime_seconds)
    );
    for device in &status.dead {
        let told = format!("{device} did not come back from its last reset");
        text.push_str(&paint.paint(Style::Bad, &told));
        text.push('\n');
    }
    let assigned = |device: &Bdf| {
        let mut devices = status.guests.iter().flat_map(|guest| &guest.devices);
        devices.any(|(assigned, _)| assigned == device)
    };
    for (device, errors) in &status.device_errors {
        if let Some((told, style)) = errors::text(errors).filter(|_| !assigned(device)) {
            text.push_str(&paint.paint(style, &format!("{device}: {told}")));
            text.push('\n');
        }
    }
    if status.guests.is_empty() {
        text.push_str("no guest has PCI devices\n");
    }
    for guest in &status.guests {
        text.push('\n');
        text.push_str(&guest_text(guest, &status.device_errors, paint));
    }
    text
}

fn guest_text(guest: &GuestLine, errors: &[(Bdf, DeviceErrors)], paint: Paint) -> String {
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
        "{}: {}{}\n",
        paint.paint(Style::Heading, &name),
        paint.paint(style, &states),
        if guest.traced { ", traced" } else { "" },
    );
    let mut table = Table::new(&["DEVICE", "SEEN AS", ""]).indented(2);
    for (device, seen_as) in &guest.devices {
        let errors = errors.iter().find(|(of, _)| of == device);
        let told = errors.and_then(|(_, errors)| errors::text(errors));
        let told = told.map_or_else(|| "".into(), |(text, style)| Cell::new(&text, style));
        table.row([device.to_string().into(), seen_as.to_string().into(), told]);
    }
    for (device, reason) in &guest.failed {
        table.row([
            device.as_str().into(),
            "-".into(),
            Cell::new(&format!("failed: {reason}"), Style::Bad),
        ]);
    }
    text.push_str(&table.render(paint));
    text.push_str(&operations(guest, paint));
    text
}

/// What the guest asked, what became of it, and how long it took.
fn operations(guest: &GuestLine, paint: Paint) -> String {
    let counted = |(name, count): (&String, &u64)| format!("{} {count}", printable(name));
    let kinds: Vec<String> = guest.kinds.iter().map(counted).collect();
    let mut text = format!("  operations: {}", guest.operations);
    if !kinds.is_empty() {
        text.push_str(&format!(" ({})", kinds.join(", ")));
    }
    text.push('\n');
    let Errors {
        dropped,
        absent,
        refused,
        failed,
    } = guest.errors;
    let unusual = |count: u64, what: &str, style| {
        (count > 0).then(|| paint.paint(style, &format!("{count} {what}")))
    };
    let errors: Vec<String> = [
        unusual(failed, "failed", Style::Bad),
        unusual(refused, "refused", Style::Notable),
        unusual(dropped, "writes dropped", Style::Notable),
        unusual(absent, "to functions that are not there", Style::Plain),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !errors.is_empty() {
        text.push_str(&format!("  of these: {}\n", errors.join(", ")));
    }
    if guest.operations > 0 {
        text.push_str(&latency(&guest.latency, paint));
    }
    text
}

/// Widest bar of the histogram.
const WIDEST: u64 = 40;

fn latency(latency: &Latency, paint: Paint) -> String {
    let mut text = format!(
        "  latency: half within {}, 99 % within {}, longest {}\n",
        duration::short(latency.p50_ns),
        duration::short(latency.p99_ns),
        duration::short(latency.max_ns)
    );
    let most = latency.buckets.iter().map(|bucket| bucket.operations).max();
    let mut table = Table::new(&["UP TO", "OPERATIONS", ""]).indented(4);
    for bucket in &latency.buckets {
        let width = bucket.operations.saturating_mul(WIDEST);
        let width = width.div_ceil(most.unwrap_or(1).max(1)).min(WIDEST);
        let bar = "#".repeat(usize::try_from(width).unwrap_or(0));
        let bound = bucket.up_to_ns.map_or("longer".to_owned(), duration::short);
        table.row([
            bound.into(),
            bucket.operations.to_string().into(),
            bar.into(),
        ]);
    }
    text.push_str(&table.render(paint));
    text
}

#[cfg(test)]
mod tests {
    use pcibackd::control::protocol::Bucket;

    use super::*;

    fn status(guests: Vec<GuestLine>) -> DaemonStatus {
        DaemonStatus {
            version: "0.1.0".into(),
            platform: "xen".into(),
            facade: "global".into(),
            uptime_seconds: 93_784,
            dead: vec!["05:00.0".parse().unwrap()],
            device_errors: Vec::new(),
            guests,
        }
    }

    #[test]
    fn a_daemon_without_guests_says_so() {
        let expected = "\
pcibackd 0.1.0, platform xen, facade global, up 1 d 2 h
0000:05:00.0 did not come back from its last reset
no guest has PCI devices
";
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
            ..GuestLine::default()
        };
        let expected = "
domain 3 'web': backend Connected (4), frontend Connected (4)
  DEVICE        SEEN AS
  0000:03:00.0  0000:00:00.0
  0000:04:00.0  -             failed: it is not hidden
  operations: 0
";
        let text = text(&status(vec![guest]), Paint::NONE);
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn errors_stand_with_the_device_that_had_them_whoever_has_it() {
        let had = |recovery: &str| DeviceErrors {
            non_fatal: 1,
            recovery: Some(recovery.into()),
            ..DeviceErrors::default()
        };
        let bdf = |text: &str| text.parse().unwrap();
        let guest = GuestLine {
            devices: vec![(bdf("03:00.0"), bdf("00:00.0"))],
            ..GuestLine::default()
        };
        let mut status = status(vec![guest]);
        status.device_errors = vec![
            (bdf("03:00.0"), had("recovered")),
            (bdf("04:00.0"), had("not recovered")),
        ];
        let text = text(&status, Paint::NONE);
        let told = "errors: 1 non-fatal, 0 fatal; the last one:";
        let assigned = format!("  0000:03:00.0  0000:00:00.0  {told} recovered\n");
        assert!(text.contains(&assigned), "{text}");
        let free = format!("\n0000:04:00.0: {told} not recovered\n");
        assert!(text.contains(&free), "{text}");
        assert_eq!(text.matches("03:00.0").count(), 1);
    }

    #[test]
    fn a_guests_operations_are_told_by_kind_by_what_became_of_them_and_by_their_latency() {
        let bucket = |up_to_ns, operations| Bucket {
            up_to_ns,
            operations,
        };
        let guest = GuestLine {
            operations: 1520,
            kinds: [
                ("conf_read".to_owned(), 1500),
                ("conf_write".to_owned(), 20),
            ]
            .into(),
            errors: Errors {
                dropped: 2,
                absent: 255,
                refused: 0,
                failed: 1,
            },
            latency: Latency {
                p50_ns: 4096,
                p99_ns: 8192,
                max_ns: 12_000_000_000,
                buckets: vec![
                    bucket(Some(4096), 1000),
                    bucket(Some(8192), 519),
                    bucket(None, 1),
                ],
            },
            ..GuestLine::default()
        };
        let expected = "  operations: 1520 (conf_read 1500, conf_write 20)
  of these: 1 failed, 2 writes dropped, 255 to functions that are not there
  latency: half within 4.0 µs, 99 % within 8.1 µs, longest 12.0 s
    UP TO   OPERATIONS
    4.0 µs  1000        ########################################
    8.1 µs  519         #####################
    longer  1           #
";
        assert_eq!(operations(&guest, Paint::NONE), expected);
    }
}
