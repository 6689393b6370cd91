//! `pciback virtio`: virtio devices of HVM guests.

use std::path::Path;

use clap::{Args, Subcommand};
use pcibackd::config::{CardLink, Model};
use pcibackd::control::protocol::{Request, Response};
use pcibackd::control::virtio::{Driven, QueueLine, VirtioGuest, VirtioLine};

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::virtio_device::DeviceOptions;

const HELP: &str = "\
A guest's devices are those of the configuration file when it is made. A guest's firmware looks for them once, as it
starts: so what is added has to be there before, while the guest is paused. 'pciback create' does all of it.

Examples:
  pciback virtio list
  pciback virtio show web
  xl create -p web.cfg && pciback virtio add web --type blk --path /var/lib/images/web.raw && xl unpause web";

/// What `pciback virtio` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Virtio {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with virtio devices.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the guests' devices
    List(List),
    /// Show a guest's devices: what their drivers have chosen, and their queues
    Show(Show),
    /// Give a guest that was created paused (xl create -p) one more device
    Add(Box<Add>),
}

/// What `pciback virtio list` takes.
#[derive(Debug, Args)]
pub struct List {
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// What `pciback virtio show` takes.
#[derive(Debug, Args)]
pub struct Show {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// What `pciback virtio add` takes.
#[derive(Debug, Args)]
pub struct Add {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// The device
    #[command(flatten)]
    pub device: DeviceOptions,
}

/// Lists, shows and adds virtio devices.
pub fn run(run_dir: &Path, arguments: &Virtio) -> Result<Outcome, CommandError> {
    match &arguments.command {
        Command::List(arguments) => {
            let guests = ask(run_dir, None)?;
            output::show(arguments.json, &guests, |guests, paint| list(guests, paint))
        }
        Command::Show(arguments) => {
            let guests = ask(run_dir, Some(arguments.guest.clone()))?;
            output::show(arguments.json, &guests, |guests, paint| {
                guests.iter().map(|guest| show(guest, paint)).collect()
            })
        }
        Command::Add(arguments) => add(run_dir, arguments),
    }
}

fn ask(run_dir: &Path, guest: Option<String>) -> Result<Vec<VirtioGuest>, CommandError> {
    daemon::ask(
        run_dir,
        &Request::Virtio { guest },
        |response| match response {
            Response::Virtio { guests } => Some(guests),
            _ => None,
        },
    )
}

fn add(run_dir: &Path, arguments: &Add) -> Result<Outcome, CommandError> {
    let device = match arguments.device.device() {
        Ok(device) => device,
        Err(why) => {
            output::complain(&why);
            return Ok(Outcome::Usage);
        }
    };
    let kind = device.model.name();
    let request = Request::AddVirtio {
        guest: arguments.guest.clone(),
        device: Box::new(device),
    };
    let places = daemon::ask(run_dir, &request, |response| match response {
        Response::Placed { places } => Some(places),
        _ => None,
    })?;
    output::tell(&format!(
        "{} has a {kind} device in {}",
        arguments.guest,
        places.join(", ")
    ));
    Ok(Outcome::Done)
}

fn list(guests: &[VirtioGuest], paint: Paint) -> String {
    if guests.is_empty() {
        return "no guest has virtio devices of pcibackd's\n".to_owned();
    }
    let mut table = Table::new(&["GUEST", "PLACE", "TYPE", "STATE", "DRIVER", "BACKEND"]);
    for guest in guests {
        let name = format!("{} {}", guest.domain, guest.name);
        let state = || match guest.state.as_str() {
            "served" => Cell::new("served", Style::Good),
            state => Cell::new(state, Style::Bad),
        };
        if guest.devices.is_empty() {
            let reason = guest.reason.as_deref().unwrap_or_default();
            table.row([
                name.into(),
                "-".into(),
                "-".into(),
                state(),
                "-".into(),
                reason.into(),
            ]);
            continue;
        }
        for device in &guest.devices {
            table.row([
                name.as_str().into(),
                device.place.as_str().into(),
                device.configured.model.name().into(),
                match &device.waiting {
                    Some(_) => Cell::new("waiting", Style::Bad),
                    None => state(),
                },
                driver(device.driven.as_ref()),
                device
                    .waiting
                    .clone()
                    .unwrap_or_else(|| backend(device))
                    .into(),
            ]);
        }
    }
    table.render(paint)
}

/// How far the driver has come.
fn driver(driven: Option<&Driven>) -> Cell {
    let Some(driven) = driven else {
        return "?".into();
    };
    let has = |bit: &str| driven.status.iter().any(|name| name == bit);
    if has("FAILED") || has("DEVICE_NEEDS_RESET") {
        Cell::new("failed", Style::Bad)
    } else if has("DRIVER_OK") {
        Cell::new(&driven.interface, Style::Good)
    } else {
        Cell::new("none", Style::Faint)
    }
}

/// What it is made of.
fn backend(device: &VirtioLine) -> String {
    match &device.configured.model {
        Model::Rng {} => "-".to_owned(),
        Model::Blk(disk) => {
            let read_only = if disk.read_only { " (read-only)" } else { "" };
            format!("{}{read_only}", disk.path.display())
        }
        Model::Net(card) => match &card.link {
            CardLink::Tap(tap) => tap.as_str().to_owned(),
            CardLink::Bridge(bridge) => format!("bridge {}", bridge.as_str()),
        },
        Model::Console(console) => {
            let sockets = console.socket.iter().map(|path| path.display().to_string());
            let terminals = device.terminals.iter().map(|terminal| {
                let path = terminal.path.display();
                match &terminal.port {
                    Some(port) => format!("{port}: {path}"),
                    None => path.to_string(),
                }
            });
            sockets.chain(terminals).collect::<Vec<_>>().join(", ")
        }
    }
}

fn show(guest: &VirtioGuest, paint: Paint) -> String {
    let mut text = paint.paint(
        Style::Heading,
        &format!("domain {} ({})", guest.domain, guest.name),
    );
    text += &format!(": {}", guest.state);
    if let Some(reason) = &guest.reason {
        text += &format!(": {reason}");
    }
    text.push('\n');
    for device in &guest.devices {
        let title = format!("{}: {}", device.place, device.configured.model.name());
        text += &format!(
            "\n{}  {}\n",
            paint.paint(Style::Heading, &title),
            backend(device)
        );
        if let Some(why) = &device.waiting {
            text += &format!("  waiting   {why}\n");
        }
        let Some(driven) = &device.driven else {
            text += "  not served now\n";
            continue;
        };
        text += &format!("  status    {}\n", words(&driven.status));
        text += &format!(
            "  interface {}, interrupts by {}\n",
            driven.interface,
            if driven.msix { "MSI-X" } else { "line" }
        );
        text += &format!("  features  {}\n", words(&driven.features));
        text += &format!("  not used  {}\n", words(&driven.not_chosen));
        text += &queues(&driven.queues).render(paint);
    }
    text
}

fn words(words: &[String]) -> String {
    if words.is_empty() {
        return "none".to_owned();
    }
    words.join(" ")
}

fn queues(queues: &[QueueLine]) -> Table {
    let mut table = Table::new(&[
        "QUEUE",
        "SIZE",
        "DESCRIPTORS",
        "DRIVER",
        "DEVICE",
        "AVAILABLE",
        "USED",
        "IN FLIGHT",
        "VECTOR",
    ])
    .indented(2);
    let number = |number: Option<u16>| number.map_or("-".to_owned(), |number| number.to_string());
    for queue in queues {
        if !queue.enabled {
            let size = format!("up to {}", queue.max_size);
            table.row([
                queue.queue.to_string().into(),
                size.into(),
                "not enabled".into(),
            ]);
            continue;
        }
        table.row([
            queue.queue.to_string().into(),
            queue.size.to_string().into(),
            format!("{:#x}", queue.descriptors).into(),
            format!("{:#x}", queue.driver).into(),
            format!("{:#x}", queue.device).into(),
            number(queue.available).into(),
            number(queue.used).into(),
            queue.in_flight.to_string().into(),
            number(queue.vector).into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use crate::virtio_device::parse;

    use super::*;

    fn guest() -> VirtioGuest {
        let queue = |queue, enabled| QueueLine {
            queue,
            enabled,
            size: 128,
            max_size: 256,
            descriptors: 0x1000,
            driver: 0x2000,
            device: 0x3000,
            available: Some(7),
            used: Some(5),
            in_flight: 2,
            vector: Some(1),
        };
        VirtioGuest {
            domain: 3,
            name: "web".into(),
            state: "served".into(),
            reason: None,
            devices: vec![VirtioLine {
                place: "slot 1f".into(),
                configured: parse("type=blk,path=/disk,read_only").unwrap(),
                driven: Some(Driven {
                    status: ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK"]
                        .map(str::to_owned)
                        .into(),
                    interface: "modern".into(),
                    msix: true,
                    features: vec!["FLUSH".into(), "VERSION_1".into()],
                    not_chosen: vec![],
                    queues: vec![queue(0, true), queue(1, false)],
                }),
                waiting: None,
                terminals: vec![],
            }],
        }
    }

    #[test]
    fn a_list_says_who_has_what_and_why_not() {
        let mut waiting = guest();
        (waiting.domain, waiting.name) = (5, "mail".into());
        for device in &mut waiting.devices {
            device.waiting = Some("cannot open the disk image /disk".into());
        }
        let refused = VirtioGuest {
            domain: 4,
            name: "db".into(),
            state: "refused".into(),
            reason: Some("it runs already".into()),
            devices: vec![],
        };
        let expected = "\
GUEST   PLACE    TYPE  STATE    DRIVER  BACKEND
3 web   slot 1f  blk   served   modern  /disk (read-only)
4 db    -        -     refused  -       it runs already
5 mail  slot 1f  blk   waiting  modern  cannot open the disk image /disk
";
        assert_eq!(list(&[guest(), refused, waiting], Paint::NONE), expected);
    }

    #[test]
    fn a_device_is_shown_with_its_features_and_queues() {
        let expected = "\
domain 3 (web): served

slot 1f: blk  /disk (read-only)
  status    ACKNOWLEDGE DRIVER DRIVER_OK
  interface modern, interrupts by MSI-X
  features  FLUSH VERSION_1
  not used  none
  QUEUE  SIZE       DESCRIPTORS  DRIVER  DEVICE  AVAILABLE  USED  IN FLIGHT  VECTOR
  0      128        0x1000       0x2000  0x3000  7          5     2          1
  1      up to 256  not enabled
";
        assert_eq!(show(&guest(), Paint::NONE), expected);
    }
}
