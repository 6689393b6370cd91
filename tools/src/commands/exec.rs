//! `pciback exec`.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use clap::Args;
use pcibackd::control::client;
use pcibackd::control::protocol::Response;
use pcibackd::facade;
use pcibackd::text::chain;

use crate::daemon::understand;
use crate::outcome::{CommandError, Outcome};

const HELP: &str = "\
The command runs in a mount namespace of its own, in which /sys/bus/pci/drivers has a driver pciback as it
has with the kernel's backend. It is for machines where the configuration says facade = \"private\".

Exit codes: the command's; 125 if the namespace cannot be prepared, 126 if the command cannot be run, 127 if
it is not found.

Examples:
  pciback exec -- xl create guest.cfg";

/// What `pciback exec` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Exec {
    /// The command with its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub command: Vec<String>,
}

/// Becomes the command. Returns only if that failed.
pub fn run(run_dir: &Path, arguments: &Exec) -> Result<Outcome, CommandError> {
    // clap demands the first.
    let Some((program, rest)) = arguments.command.split_first() else {
        return Ok(Outcome::Usage);
    };
    let mut command = Command::new(program);
    command.args(rest);
    match facade::exec(command, |fuse| hand_over(run_dir, fuse.as_fd()))? {}
}

/// Brings the mounted facade to the daemon, which serves it from then on.
fn hand_over(run_dir: &Path, fuse: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    let served = |response| match response {
        Response::Served => Some(()),
        _ => None,
    };
    client::ask_to_serve(run_dir, fuse)
        .map_err(CommandError::from)
        .and_then(|(response, _)| understand(response, served))
        .map_err(|error| io::Error::other(chain(&error)))
}
