//! `pciback list`.

use std::path::Path;

use clap::Args;
use pcibackd::control::protocol::{DeviceLine, Request, Response};
use serde::Serialize;

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::output::{self, class, names};

const HELP: &str = "\
A driver in brackets is the one that the device will get back. RESETS counts since the device was hidden.

Examples:
  pciback list
  pciback list --json | jq -r '.[] | select(.state == \"hidden\") | .device'";

/// What `pciback list` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct List {
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Lists the host's devices.
pub fn run(run_dir: &Path, arguments: &List) -> Result<Outcome, CommandError> {
    let devices: Vec<DeviceLine> =
        daemon::ask(run_dir, &Request::List, |response| match response {
            Response::Devices { devices } => Some(devices),
            _ => None,
        })?;
    let names = names::of(devices.iter().map(ids));
    let devices: Vec<Listed> = devices
        .into_iter()
        .map(|line| Listed {
            name: names.get(&ids(&line)).cloned(),
            line,
        })
        .collect();
    output::show(arguments.json, &devices, |devices, paint| {
        table(devices, paint)
    })
}

/// A device with its name, as far as this system knows it.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    line: DeviceLine,
    name: Option<String>,
}

fn ids(line: &DeviceLine) -> names::Ids {
    (line.vendor, line.id)
}

fn table(devices: &[Listed], paint: Paint) -> String {
    let mut table = Table::new(&[
        "DEVICE",
        "STATE",
        "DRIVER",
        "GUEST",
        "SEEN AS",
        "PATH",
        "RESETS",
        "ID",
        "DESCRIPTION",
    ]);
    for Listed { line: device, name } in devices {
        table.row([
            device.device.to_string().into(),
            state(device),
            driver(device),
            guest(device),
            device
                .seen_as
                .map_or(Cell::from("-"), |address| address.to_string().into()),
            device.path.as_deref().unwrap_or("-").into(),
            resets(device),
            format!("{:04x}:{:04x}", device.vendor, device.id).into(),
            description(device, name.as_deref()).into(),
        ]);
    }
    table.render(paint)
}

/// Where it is, and what is being done to it.
fn state(device: &DeviceLine) -> Cell {
    let style = style(&device.state);
    match &device.activity {
        Some(activity) => Cell::new(&format!("{} ({activity})", device.state), style),
        None => Cell::new(&device.state, style),
    }
}

/// Of a device that is dom0's nobody counts them.
fn resets(device: &DeviceLine) -> Cell {
    match device.state.as_str() {
        "dom0" => "-".into(),
        _ => device.resets.to_string().into(),
    }
}

fn description(device: &DeviceLine, name: Option<&str>) -> String {
    let class = class::name(device.class);
    match name {
        Some(name) => format!("{class}: {name}"),
        None => class.to_owned(),
    }
}

/// How a device's state looks.
pub fn style(state: &str) -> Style {
    match state {
        "dom0" => Style::Faint,
        "assigned" => Style::Good,
        "hidden" => Style::Plain,
        "dead" => Style::Bad,
        _ => Style::Notable,
    }
}

/// The driver; in brackets when it is the one that the device will get back.
pub fn driver(device: &DeviceLine) -> Cell {
    match &device.driver {
        None => "-".into(),
        Some(driver) if device.state == "dom0" => driver.as_str().into(),
        Some(driver) => Cell::new(&format!("({driver})"), Style::Faint),
    }
}

/// Number and name of the guest that has a device.
pub fn guest(device: &DeviceLine) -> Cell {
    match (device.domain, &device.guest) {
        (None, _) => "-".into(),
        (Some(domain), None) => domain.to_string().into(),
        (Some(domain), Some(name)) => format!("{domain} {name}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::network_card as device;

    #[test]
    fn each_device_is_a_line_under_the_headings() {
        let assigned = DeviceLine {
            domain: Some(3),
            guest: Some("web".into()),
            seen_as: Some("00:00.0".parse().unwrap()),
            resets: 2,
            ..device("03:00.0", "assigned", Some("e1000e"))
        };
        let releasing = DeviceLine {
            activity: Some("resetting".into()),
            ..device("04:00.0", "releasing", None)
        };
        let listed = |line, name: Option<&str>| Listed {
            line,
            name: name.map(str::to_owned),
        };
        let devices = [
            listed(device("00:02.0", "dom0", Some("igb")), None),
            listed(assigned, Some("Intel Corporation 82574L")),
            listed(releasing, None),
        ];
        let expected = "\
DEVICE        STATE                  DRIVER    GUEST  SEEN AS       PATH               RESETS  ID         DESCRIPTION
0000:00:02.0  dom0                   igb       -      -             0000:00:1c.0/00.0  -       8086:10d3  Ethernet controller
0000:03:00.0  assigned               (e1000e)  3 web  0000:00:00.0  0000:00:1c.0/00.0  2       8086:10d3  Ethernet controller: Intel Corporation 82574L
0000:04:00.0  releasing (resetting)  -         -      -             0000:00:1c.0/00.0  0       8086:10d3  Ethernet controller
";
        assert_eq!(table(&devices, Paint::NONE), expected);
    }
}
