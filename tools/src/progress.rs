//! What takes long, told on a terminal while somebody waits for it.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use conf_space::Bdf;
use pcibackd::control::client;
use pcibackd::control::protocol::{DeviceLine, Request, Response};
use pcibackd::text::printable;

/// Nothing is told of what is done sooner.
const PERIOD: Duration = Duration::from_secs(1);
/// To the beginning of the line, which is cleared (ECMA-48).
const CLEAR: &str = "\r\x1b[K";

/// Tells until it is dropped.
#[derive(Debug)]
pub struct Progress {
    told: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Begins, if standard error is a terminal.
    pub fn start(run_dir: &Path) -> Self {
        if !io::stderr().is_terminal() {
            return Self { told: None };
        }
        let (stop, stopped) = mpsc::channel();
        let run_dir: PathBuf = run_dir.to_owned();
        let watch = move || {
            let mut since = BTreeMap::new();
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // The command itself tells if the daemon is gone.
                if let Ok(Response::Devices { devices }) = client::ask(&run_dir, &Request::List) {
                    show(&line(&devices, &mut since, Instant::now()));
                }
            }
            show("");
        };
        let thread = thread::Builder::new().spawn(watch);
        Self {
            told: thread.ok().map(|thread| (stop, thread)),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.told.take() {
            drop(stop);
            // A panic has been told of.
            let _ = thread.join();
        }
    }
}

fn show(line: &str) {
    // If it is closed there is nobody left to tell.
    let _ = write!(io::stderr(), "{CLEAR}{line}");
    let _ = io::stderr().flush();
}

/// What is being done, and for how long as far as this program has seen. Of several devices the first, so that it fits on a line.
fn line(
    devices: &[DeviceLine],
    since: &mut BTreeMap<Bdf, (String, Instant)>,
    now: Instant,
) -> String {
    let busy: BTreeMap<Bdf, &String> = devices
        .iter()
        .filter_map(|device| Some((device.device, device.activity.as_ref()?)))
        .collect();
    since.retain(|device, (activity, _)| busy.get(device) == Some(&&*activity));
    for (device, activity) in &busy {
        // It had begun before the first look.
        let begin = now.checked_sub(PERIOD).unwrap_or(now);
        since.entry(*device).or_insert(((*activity).clone(), begin));
    }
    let Some((device, (activity, begin))) = since.first_key_value() else {
        return String::new();
    };
    let others = match since.len() {
        1 => String::new(),
        all => format!(", and {} more", all.saturating_sub(1)),
    };
    let seconds = now.saturating_duration_since(*begin).as_secs();
    format!("{device}: {} ({seconds} s){others}", printable(activity))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(bdf: &str, activity: Option<&str>) -> DeviceLine {
        DeviceLine {
            activity: activity.map(str::to_owned),
            ..crate::devices::network_card(bdf, "hiding", None)
        }
    }

    #[test]
    fn what_is_done_is_told_with_its_seconds_and_starts_anew_with_each_step() {
        let (mut since, start) = (BTreeMap::new(), Instant::now());
        let mut at = |seconds: u64, devices: &[DeviceLine]| {
            line(devices, &mut since, start + Duration::from_secs(seconds))
        };
        assert_eq!(at(0, &[device("03:00.0", None)]), "");
        let unbinding = device("03:00.0", Some("unbinding its driver"));
        assert_eq!(
            at(1, &[unbinding]),
            "0000:03:00.0: unbinding its driver (1 s)"
        );
        let resetting = [device("03:00.0", Some("resetting"))];
        assert_eq!(at(2, &resetting), "0000:03:00.0: resetting (1 s)");
        assert_eq!(at(13, &resetting), "0000:03:00.0: resetting (12 s)");
        let both = [resetting[0].clone(), device("04:00.0", Some("resetting"))];
        assert_eq!(at(14, &both), "0000:03:00.0: resetting (13 s), and 1 more");
        assert_eq!(at(15, &[device("03:00.0", None)]), "");
    }
}
