//! `pciback create`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use pcibackd::config::VirtioDevice;
use pcibackd::control::protocol::{Request, Response};
use serde::Deserialize;

use crate::outcome::{CommandError, Outcome};
use crate::{daemon, output, virtio_device};

const HELP: &str = "\
The guest is made paused by 'xl create', its virtio devices are attached (those of pcibackd's configuration, and those
of --virtio), and it starts when all of them are there. If one of them cannot be had, the guest is destroyed again.

Examples:
  pciback create web.cfg
  pciback create web.cfg --virtio type=blk,path=/var/lib/images/web.raw --virtio type=net,bridge=xenbr0
  pciback create web.cfg -- 'memory=1024'";

/// What `pciback create` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Create {
    /// The guest's configuration, as xl takes it
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// One more virtio device: KEY=VALUE,... with the keys of pcibackd's configuration
    #[arg(long, value_name = "DEVICE", value_parser = virtio_device::parse)]
    pub virtio: Vec<VirtioDevice>,
    /// What 'xl create' is to get besides
    #[arg(last = true, value_name = "XL-ARGUMENTS")]
    pub xl: Vec<String>,
}

/// Makes a guest with all its virtio devices, or none.
pub fn run(run_dir: &Path, arguments: &Create) -> Result<Outcome, CommandError> {
    refuse_waiting(&arguments.xl)?;
    // Nothing is begun without the daemon.
    let request = Request::Virtio { guest: None };
    daemon::ask(run_dir, &request, |response| {
        matches!(response, Response::Virtio { .. }).then_some(())
    })?;
    let name = name_of(arguments)?;
    xl(&create(arguments, "-p"))?;
    let started = equip(run_dir, &name, &arguments.virtio)
        .and_then(|places| xl(&["unpause".into(), name.clone()]).map(|()| places));
    match started {
        Ok(places) => {
            if !places.is_empty() {
                output::tell(&format!(
                    "{name} has virtio devices in {}",
                    places.join(", ")
                ));
            }
            Ok(Outcome::Done)
        }
        Err(error) => {
            output::complain(&format!("{name} does not start; it is destroyed again"));
            xl(&["destroy".into(), name])?;
            Err(error)
        }
    }
}

/// With these xl does not come back as long as the guest runs, or its console is open: the guest would stay paused.
fn refuse_waiting(words: &[String]) -> Result<(), CommandError> {
    const WAITING: [&str; 8] = [
        "-c",
        "--console",
        "-F",
        "--foreground",
        "-V",
        "--vncviewer",
        "-A",
        "--vncviewer-autopass",
    ];
    match words.iter().find(|word| WAITING.contains(&word.as_str())) {
        Some(word) => Err(CommandError::XlWaits { word: word.clone() }),
        None => Ok(()),
    }
}

/// Attaches devices, and waits until all are there.
fn equip(
    run_dir: &Path,
    guest: &str,
    devices: &[VirtioDevice],
) -> Result<Vec<String>, CommandError> {
    let placed = |response| match response {
        Response::Placed { places } => Some(places),
        _ => None,
    };
    let guest = guest.to_owned();
    for device in devices {
        let (guest, device) = (guest.clone(), Box::new(device.clone()));
        daemon::ask(run_dir, &Request::AddVirtio { guest, device }, placed)?;
    }
    daemon::ask(run_dir, &Request::AwaitVirtio { guest }, placed)
}

fn create(arguments: &Create, how: &str) -> Vec<String> {
    let file = arguments.file.to_string_lossy().into_owned();
    let mut words = vec!["create".to_owned(), how.to_owned(), file];
    words.extend(arguments.xl.iter().cloned());
    words
}

/// What xl reads the guest's name as: it knows its own syntax best.
fn name_of(arguments: &Create) -> Result<String, CommandError> {
    name_in(&words_of(&create(arguments, "-n"))?)
}

/// The name in what `xl create -n` prints: the guest's configuration as JSON, after what it has to say.
fn name_in(printed: &str) -> Result<String, CommandError> {
    #[derive(Deserialize)]
    struct Configuration {
        c_info: CreateInfo,
    }
    #[derive(Deserialize)]
    struct CreateInfo {
        name: String,
    }
    let json = printed.find('{').and_then(|start| printed.get(start..));
    let first = serde_json::Deserializer::from_str(json.unwrap_or_default())
        .into_iter::<Configuration>()
        .next();
    match first {
        Some(Ok(configuration)) => Ok(configuration.c_info.name),
        Some(Err(error)) => Err(failed("create -n", error.into())),
        None => Err(failed("create -n", io::ErrorKind::UnexpectedEof.into())),
    }
}

fn failed(words: &str, source: io::Error) -> CommandError {
    let words = words.to_owned();
    CommandError::Xl { words, source }
}

fn ended(status: std::process::ExitStatus, words: &[String]) -> Result<(), CommandError> {
    if status.success() {
        return Ok(());
    }
    Err(failed(
        &words.join(" "),
        io::Error::other(status.to_string()),
    ))
}

/// Runs xl, which says itself what is wrong.
fn xl(words: &[String]) -> Result<(), CommandError> {
    let status = Command::new("xl").args(words).status();
    ended(
        status.map_err(|error| failed(&words.join(" "), error))?,
        words,
    )
}

/// Runs xl, and returns what it prints.
fn words_of(words: &[String]) -> Result<String, CommandError> {
    let output = Command::new("xl")
        .args(words)
        .stderr(Stdio::inherit())
        .output();
    let output = output.map_err(|error| failed(&words.join(" "), error))?;
    ended(output.status, words)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_xl_from_coming_back_is_refused() {
        for word in ["-c", "-F", "--vncviewer"] {
            let error = refuse_waiting(&["memory=1024".into(), word.into()]).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        refuse_waiting(&["memory=1024".into(), "-e".into()]).unwrap();
    }

    #[test]
    fn the_guest_s_name_is_what_xl_makes_of_its_configuration() {
        let printed = "Parsing config from web.cfg\n{\n \"c_info\": {\n \"type\": \"hvm\",\n \"name\": \"web\"\n }, \"b_info\": {} }\n";
        assert_eq!(name_in(printed).unwrap(), "web");
        for printed in ["", "nothing", "{\"c_info\": {}}", "{"] {
            assert!(name_in(printed).is_err(), "{printed}");
        }
    }
}
