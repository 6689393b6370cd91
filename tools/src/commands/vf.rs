//! `pciback vf`: SR-IOV.

use std::path::Path;

use clap::{Args, Subcommand};
use conf_space::Bdf;
use pcibackd::control::protocol::{DeviceLine, PhysicalFunction, Request, Response};

use super::hide::Tell;
use super::list::{driver, guest, style};
use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::progress::Progress;

const HELP: &str = "\
Virtual functions are made by dom0's driver for the device, so that must not be hidden. What they are to be
(MAC addresses, VLANs, trust) is set through it as well, by 'ip link set DEV vf INDEX ...', before a guest has them.

Examples:
  pciback vf list
  pciback vf create 4 --hide 03:00.0
  pciback vf destroy 03:00.0";

/// What `pciback vf` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Vf {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with virtual functions.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the devices that have SR-IOV, and who has their virtual functions
    List(List),
    /// Make virtual functions
    Create(Create),
    /// Take all virtual functions of a device away
    Destroy(Destroy),
}

/// What `pciback vf list` takes.
#[derive(Debug, Args)]
pub struct List {
    /// This device only
    #[arg(value_name = "PF")]
    pub physical: Option<Bdf>,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// What `pciback vf create` takes.
#[derive(Debug, Args)]
pub struct Create {
    /// How many there are to be
    #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,
    /// The device
    #[arg(value_name = "PF")]
    pub physical: Bdf,
    /// Hide them at once, so that no driver of dom0's ever sees them
    #[arg(long)]
    pub hide: bool,
    /// For programs: a JSON object per line, for each device
    #[arg(long)]
    pub json: bool,
}

/// What `pciback vf destroy` takes.
#[derive(Debug, Args)]
pub struct Destroy {
    /// The device
    #[arg(value_name = "PF")]
    pub physical: Bdf,
    /// Also those that guests have: the guests lose them
    #[arg(long)]
    pub force: bool,
    /// For programs: a JSON object per line, for each device
    #[arg(long)]
    pub json: bool,
}

/// Lists, makes and takes away virtual functions.
pub fn run(run_dir: &Path, arguments: &Vf) -> Result<Outcome, CommandError> {
    match &arguments.command {
        Command::List(arguments) => list(run_dir, arguments),
        Command::Create(arguments) => {
            let request = Request::CreateVirtualFunctions {
                physical: arguments.physical,
                count: arguments.count,
                hide: arguments.hide,
            };
            carry_out(run_dir, "vf create", &request, arguments.json)
        }
        Command::Destroy(arguments) => {
            let request = Request::DestroyVirtualFunctions {
                physical: arguments.physical,
                force: arguments.force,
            };
            carry_out(run_dir, "vf destroy", &request, arguments.json)
        }
    }
}

fn carry_out(
    run_dir: &Path,
    command: &str,
    request: &Request,
    json: bool,
) -> Result<Outcome, CommandError> {
    let progress = Progress::start(run_dir);
    let entries = daemon::ask(run_dir, request, |response| match response {
        Response::Entries { entries } => Some(entries),
        _ => None,
    })?;
    drop(progress);
    Tell { command, json }.report_all(&entries)
}

fn list(run_dir: &Path, arguments: &List) -> Result<Outcome, CommandError> {
    let request = Request::VirtualFunctions {
        physical: arguments.physical,
    };
    let physical = daemon::ask(run_dir, &request, |response| match response {
        Response::VirtualFunctions { physical } => Some(physical),
        _ => None,
    })?;
    output::show(arguments.json, &physical, |physical, paint| {
        text(physical, paint)
    })
}

fn text(physical: &[PhysicalFunction], paint: Paint) -> String {
    if physical.is_empty() {
        return "no device of this host has SR-IOV (some have it only once it is switched on in the firmware's settings)\n".to_owned();
    }
    let mut table = Table::new(&["DEVICE", "VF", "STATE", "DRIVER", "GUEST", "SEEN AS"]);
    let mut row = |name: String, vf: Cell, device: &DeviceLine| {
        let seen_as = device.seen_as;
        table.row([
            name.into(),
            vf,
            Cell::new(&device.state, style(&device.state)),
            driver(device),
            guest(device),
            seen_as.map_or(Cell::from("-"), |address| address.to_string().into()),
        ]);
    };
    for PhysicalFunction {
        device,
        total,
        virtual_functions,
    } in physical
    {
        let count = format!("{} of {total}", virtual_functions.len());
        let count = Cell::new(&count, Style::Plain);
        row(device.device.to_string(), count, device);
        for member in virtual_functions {
            let index = member.index.to_string();
            row(
                format!("  {}", member.device.device),
                index.into(),
                &member.device,
            );
        }
    }
    table.render(paint)
}

#[cfg(test)]
mod tests {
    use pcibackd::control::protocol::VirtualFunction;

    use super::*;
    use crate::devices::network_card as device;

    #[test]
    fn virtual_functions_stand_below_their_physical_function() {
        let assigned = DeviceLine {
            domain: Some(3),
            guest: Some("web".into()),
            seen_as: Some("00:00.0".parse().unwrap()),
            ..device("03:10.2", "assigned", Some("igbvf"))
        };
        let member = |index, device| VirtualFunction { index, device };
        let physical = [
            PhysicalFunction {
                device: device("03:00.0", "dom0", Some("igb")),
                total: 7,
                virtual_functions: vec![
                    member(0, device("03:10.0", "dom0", Some("igbvf"))),
                    member(1, assigned),
                ],
            },
            PhysicalFunction {
                device: device("04:00.0", "dom0", Some("nvme")),
                total: 16,
                virtual_functions: vec![],
            },
        ];
        let expected = "\
DEVICE          VF       STATE     DRIVER   GUEST  SEEN AS
0000:03:00.0    2 of 7   dom0      igb      -      -
  0000:03:10.0  0        dom0      igbvf    -      -
  0000:03:10.2  1        assigned  (igbvf)  3 web  0000:00:00.0
0000:04:00.0    0 of 16  dom0      nvme     -      -
";
        assert_eq!(text(&physical, Paint::NONE), expected);
    }
}
