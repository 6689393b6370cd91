//! `pciback doctor`.

use std::path::Path;

use clap::Args;
use conf_space::Bdf;
use pcibackd::control::client;
use pcibackd::control::protocol::{DaemonStatus, Request, Response};
use pcibackd::daemon::{PlatformKind, records};
use pcibackd::doctor::host_facts::{HostFacts, RunningDaemon, run_xl};
use pcibackd::doctor::vfio::{self, VfioFacts};
use pcibackd::doctor::{Finding, Verdict, host, offline};
use pcibackd::host::sysfs::Sysfs;
use pcibackd::text::{chain, printable};
use xenbus::xenstore::Client;

use crate::daemon;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::{Paint, Style};
use crate::output::table::{Cell, Table};
use crate::progress::Progress;

const HELP: &str = "\
Looks at the host and at its hidden devices, or at the one that is named, and says what is wrong and what to do
about it. Works without pcibackd, too. Nothing is changed, unless resets are to be tried.

Exit codes: 0 no problem (there may be warnings), 1 a problem, 2 the command line makes no sense.

Examples:
  pciback doctor
  pciback doctor 03:00.0
  pciback doctor --try-resets 03:00.0";

/// What `pciback doctor` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Doctor {
    /// Try every reset that the kernel offers, on devices that are hidden and no guest has
    #[arg(long)]
    pub try_resets: bool,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
    /// A device
    #[arg(value_name = "BDF")]
    pub device: Option<Bdf>,
}

/// Says what is wrong.
pub fn run(run_dir: &Path, arguments: &Doctor) -> Result<Outcome, CommandError> {
    let status = daemon::ask(run_dir, &Request::Status, |response| match response {
        Response::Status(status) => Some(status),
        _ => None,
    });
    let runs_on = |kind: PlatformKind| {
        status
            .as_ref()
            .is_ok_and(|status| status.platform == kind.name())
    };
    let mut findings = if runs_on(PlatformKind::Sim) {
        // The host is none of its business.
        Vec::new()
    } else if runs_on(PlatformKind::Vfio) {
        vfio::judge(&VfioFacts::gather(Path::new("/")))
    } else {
        examine_host(&status)
    };
    findings.extend(examine_devices(run_dir, arguments, status.is_ok())?);
    if arguments.json {
        output::print_json(&findings)?;
    } else {
        output::print(&text(&findings, Paint::for_stdout()))?;
    }
    let problem = findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Problem);
    Ok(if problem {
        Outcome::Failed
    } else {
        Outcome::Done
    })
}

fn examine_host(status: &Result<DaemonStatus, CommandError>) -> Vec<Finding> {
    let daemon = match status {
        Ok(status) => Ok(RunningDaemon {
            version: status.version.clone(),
            facade: status.facade.clone(),
        }),
        Err(CommandError::Client(client::ClientError::NoDaemon { source, .. })) => {
            Err(source.to_string())
        }
        Err(error) => Err(chain(error)),
    };
    let xenstore = Client::connect().map(drop).map_err(|error| chain(&error));
    let facts = HostFacts::gather(Path::new("/"), run_xl, daemon, xenstore);
    host::judge(&facts, env!("CARGO_PKG_VERSION"))
}

fn examine_devices(
    run_dir: &Path,
    arguments: &Doctor,
    daemon_runs: bool,
) -> Result<Vec<Finding>, CommandError> {
    let (device, try_resets) = (arguments.device, arguments.try_resets);
    if !daemon_runs {
        if try_resets {
            return Err(CommandError::Refused(
                "resets can be tried when pcibackd runs only: systemctl start pcibackd".to_owned(),
            ));
        }
        let bus = Sysfs::to_look_at("/sys");
        return offline::examine(&bus, &records(run_dir), device)
            .map_err(|error| CommandError::Refused(chain(&error)));
    }
    let request = Request::Doctor {
        device: device.map(|device| device.to_string()),
        try_resets,
    };
    let _progress = try_resets.then(|| Progress::start(run_dir));
    daemon::ask(run_dir, &request, |response| match response {
        Response::Findings { findings } => Some(findings),
        _ => None,
    })
}

fn text(findings: &[Finding], paint: Paint) -> String {
    let mut text = String::new();
    for about in findings.chunk_by(|one, next| one.device == next.device) {
        let device = about.first().and_then(|finding| finding.device);
        let heading = device.map_or_else(|| "host".to_owned(), |device| device.to_string());
        let mut table = Table::new(&[&heading, "", ""]);
        for finding in about {
            table.row([
                Cell::from(format!("  {}", finding.check)),
                Cell::new(finding.verdict.name(), style(finding.verdict)),
                Cell::from(finding.message.as_str()),
            ]);
            if let Some(remedy) = &finding.remedy {
                table.row([
                    Cell::default(),
                    Cell::default(),
                    Cell::new(&format!("-> {remedy}"), Style::Heading),
                ]);
            }
        }
        text.push_str(&table.render(paint));
        text.push('\n');
    }
    text.push_str(&printable(&sum(findings)));
    text.push('\n');
    text
}

fn style(verdict: Verdict) -> Style {
    match verdict {
        Verdict::NotApplicable => Style::Faint,
        Verdict::Ok => Style::Good,
        Verdict::Warning => Style::Notable,
        Verdict::Problem => Style::Bad,
    }
}

fn sum(findings: &[Finding]) -> String {
    let count = |verdict| {
        let found = findings.iter().filter(|finding| finding.verdict == verdict);
        found.count()
    };
    let say = |count: usize, what: &str| match count {
        0 => format!("no {what}s"),
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    format!(
        "{}, {}",
        say(count(Verdict::Problem), "problem"),
        say(count(Verdict::Warning), "warning")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(
        device: Option<&str>,
        check: &str,
        verdict: Verdict,
        remedy: Option<&str>,
    ) -> Finding {
        Finding {
            device: device.map(|device| device.parse().unwrap()),
            check: check.into(),
            verdict,
            message: format!("about {check}"),
            remedy: remedy.map(str::to_owned),
        }
    }

    #[test]
    fn each_thing_has_a_heading_and_each_trouble_its_remedy_below() {
        let findings = [
            finding(None, "daemon", Verdict::Ok, None),
            finding(None, "FUSE", Verdict::Warning, Some("modprobe fuse")),
            finding(
                Some("03:00.0"),
                "holder",
                Verdict::Problem,
                Some("reset it"),
            ),
        ];
        let expected = "\
host
  daemon  ok       about daemon
  FUSE    warning  about FUSE
                   -> modprobe fuse

0000:03:00.0
  holder      problem  about holder
                       -> reset it

1 problem, 1 warning
";
        assert_eq!(text(&findings, Paint::NONE), expected);
    }
}
