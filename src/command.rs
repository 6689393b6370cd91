//! Running programs on the host: the commands of the configuration, which are the toolstack's and talk to us meanwhile, so that they run beside
//! everything else; and what a sandbox keeps us from doing ourselves.

use std::env;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use conf_space::address::Bdf;
use log::{error, info};
use nix::sys::memfd::{MFdFlags, memfd_create};
use xenbus::DomId;

use crate::text::printable;

/// `xl` waits up to 10 s here and there, and for its lock. What takes longer will not end.
const LIMIT: Duration = Duration::from_secs(120);
/// The same for what systemd runs: it ends the program and all that this has started, and kills what has not ended a little later. Both are
/// over before we are.
const SYSTEMDS_LIMITS: [&str; 2] = [
    "--property=TimeoutStartSec=115",
    "--property=TimeoutStopSec=3",
];
const LOOK: Duration = Duration::from_millis(20);
/// So much of the end of its output goes into the log.
const OUTPUT: i64 = 1000;
const STACK: usize = 128 * 1024;

/// Runs a program with its arguments, in the background. What goes wrong is logged.
pub(crate) fn in_background(words: Vec<String>, domain: DomId, device: Bdf) {
    let shown = words.join(" ");
    let spawned = thread::Builder::new()
        .name(format!("policy {device}"))
        .stack_size(STACK)
        .spawn(move || run(&words, domain, device));
    if let Err(error) = spawned {
        error!("domain {domain}: {device}: cannot run '{shown}': {error}; do it by hand");
    }
}

/// Runs a program with its arguments, and waits for its end. What goes wrong is logged.
pub(crate) fn run(words: &[String], domain: DomId, device: Bdf) {
    let shown = words.join(" ");
    match end_of(&on_the_host(words)) {
        Ok(End::Status(status, _)) if status.success() => {
            info!("domain {domain}: {device}: '{shown}' is done");
        }
        Ok(End::Status(status, output)) => error!(
            "domain {domain}: {device}: '{shown}' has failed ({status}); do it by hand. It said: {}",
            printable(&output)
        ),
        Ok(End::TooLong(output)) => error!(
            "domain {domain}: {device}: '{shown}' was ended after {} s; do it by hand. It said: {}",
            LIMIT.as_secs(),
            printable(&output)
        ),
        Err(error) => error!(
            "domain {domain}: {device}: cannot run '{shown}': {error}; see [commands] in the configuration"
        ),
    }
}

/// A service of systemd's is in a sandbox. The toolstack's commands, and the scripts that they run, are no part of it: systemd runs them for us. Their
/// output goes into the journal.
fn on_the_host(words: &[String]) -> Vec<String> {
    // A oneshot's start ends with it, and tells of its failure, without the D-Bus daemon that --wait takes.
    const SYSTEMD_RUN: [&str; 4] = [
        "systemd-run",
        "--quiet",
        "--collect",
        "--service-type=oneshot",
    ];
    if !is_service() {
        return words.to_vec();
    }
    let run = SYSTEMD_RUN
        .into_iter()
        .chain(SYSTEMDS_LIMITS)
        .chain(["--"])
        .map(str::to_owned);
    run.chain(words.iter().cloned()).collect()
}

/// Whether this is a service of systemd's.
pub(crate) fn is_service() -> bool {
    // Set by systemd for its services (systemd.exec(5)).
    env::var_os("INVOCATION_ID").is_some() && Path::new("/run/systemd/system").exists()
}

/// Runs a program on the host, outside of the sandbox of a service, and waits for its end.
///
/// # Errors
/// When it cannot be run or fails; with what it said.
pub(crate) fn on_the_host_to_its_end(words: &[String]) -> io::Result<()> {
    match end_of(&on_the_host(words))? {
        End::Status(status, _) if status.success() => Ok(()),
        End::Status(status, output) => Err(io::Error::other(format!(
            "'{}' has failed ({status}): {}",
            words.join(" "),
            printable(&output)
        ))),
        End::TooLong(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

enum End {
    Status(ExitStatus, String),
    TooLong(String),
}

fn end_of(words: &[String]) -> io::Result<End> {
    let (program, arguments) = words
        .split_first()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // In memory, so that it can be as long as it likes without anybody reading it meanwhile.
    let output: OwnedFd = memfd_create("output", MFdFlags::MFD_CLOEXEC)?;
    let output = File::from(output);
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .spawn()?;
    let end = wait(&mut child)?;
    let output = tail(output)?;
    Ok(match end {
        Some(status) => End::Status(status, output),
        None => End::TooLong(output),
    })
}

/// `None`: it was ended, as it took too long.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let begin = Instant::now();
    while begin.elapsed() < LIMIT {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(LOOK);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

fn tail(mut output: File) -> io::Result<String> {
    let length = i64::try_from(output.metadata()?.len()).unwrap_or(i64::MAX);
    output.seek(SeekFrom::End(length.min(OUTPUT).saturating_neg()))?;
    let mut bytes = Vec::new();
    output.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn what_a_command_says_and_how_it_ends_is_known() {
        let End::Status(status, output) =
            end_of(&words(&["sh", "-c", "echo one; echo two >&2; exit 3"])).unwrap()
        else {
            panic!("it took too long");
        };
        assert_eq!((status.code(), output.as_str()), (Some(3), "one\ntwo"));
    }

    #[test]
    fn much_output_holds_nobody_up_and_only_its_end_is_kept() {
        let script = "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo the end";
        let End::Status(status, output) = end_of(&words(&["sh", "-c", script])).unwrap() else {
            panic!("it took too long");
        };
        assert!(status.success() && output.ends_with("the end"));
        assert!(output.len() <= 1000);
    }

    #[test]
    fn words_are_no_shells() {
        let End::Status(status, output) = end_of(&words(&["echo", "$HOME; ls"])).unwrap() else {
            panic!("it took too long");
        };
        assert!(status.success());
        assert_eq!(output, "$HOME; ls");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        assert!(end_of(&words(&["/nonexistent/xl"])).is_err());
        assert!(end_of(&[]).is_err());
    }
}
