//! `pciback list`.

use std::path::Path;

use clap::Args;
use pcibackd::control::protocol::{DeviceLine, Request, Response};

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::output::{self, class};

/// What `pciback list` takes.
#[derive(Debug, Args)]
pub struct List {
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Lists the host's devices.
pub fn run(run_dir: &Path, arguments: &List) -> Result<Outcome, CommandError> {
    let devices = daemon::ask(run_dir, &Request::List, |response| match response {
        Response::Devices { devices } => Some(devices),
        _ => None,
    })?;
    if arguments.json {
        output::print_json(&devices)?;
    } else {
        output::print(&table(&devices, Paint::for_stdout()))?;
    }
    Ok(Outcome::Done)
}

fn table(devices: &[DeviceLine], paint: Paint) -> String {
    let mut table = Table::new(&[
        "DEVICE", "STATE", "DRIVER", "GUEST", "SEEN AS", "PATH", "ID", "CLASS",
    ]);
    for device in devices {
        table.row([
            device.device.to_string().into(),
            Cell::new(&device.state, style(&device.state)),
            driver(device),
            guest(device),
            device
                .seen_as
                .map_or(Cell::from("-"), |address| address.to_string().into()),
            device.path.as_deref().unwrap_or("-").into(),
            format!("{:04x}:{:04x}", device.vendor, device.id).into(),
            class::name(device.class).into(),
        ]);
    }
    table.render(paint)
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

    fn device(bdf: &str, state: &str, driver: Option<&str>) -> DeviceLine {
        DeviceLine {
            device: bdf.parse().unwrap(),
            vendor: 0x8086,
            id: 0x10d3,
            subsystem: (0x8086, 0xa01f),
            path: Some("0000:00:1c.0/00.0".into()),
            class: 0x02_00_00,
            state: state.to_owned(),
            driver: driver.map(str::to_owned),
            domain: None,
            guest: None,
            seen_as: None,
            permissive: false,
        }
    }

    #[test]
    fn each_device_is_a_line_under_the_headings() {
        let assigned = DeviceLine {
            domain: Some(3),
            guest: Some("web".into()),
            seen_as: Some("00:00.0".parse().unwrap()),
            ..device("03:00.0", "assigned", Some("e1000e"))
        };
        let devices = [
            device("00:02.0", "dom0", Some("igb")),
            assigned,
            device("04:00.0", "dead", None),
        ];
        let expected = "\
DEVICE        STATE     DRIVER    GUEST  SEEN AS       PATH               ID         CLASS
0000:00:02.0  dom0      igb       -      -             0000:00:1c.0/00.0  8086:10d3  Ethernet controller
0000:03:00.0  assigned  (e1000e)  3 web  0000:00:00.0  0000:00:1c.0/00.0  8086:10d3  Ethernet controller
0000:04:00.0  dead      -         -      -             0000:00:1c.0/00.0  8086:10d3  Ethernet controller
";
        assert_eq!(table(&devices, Paint::NONE), expected);
    }
}
