//! The answer to [`Request::SetGuest`](crate::control::protocol::Request::SetGuest).

use super::service::DaemonService;
use crate::config::{Config, Topology};
use crate::control::policy::{GuestSettingsShown, SettingLine};
use crate::control::protocol::Response;
use crate::text::printable;

/// Names of domains are shorter (libxl has no limit of its own; xenstore's nodes have).
const LONGEST_NAME: usize = 1024;

impl DaemonService {
    /// Sets what is asked for, all or nothing, and shows what holds from the guest's next start on.
    pub(super) fn set_guest(&self, guest: &str, assignments: &[String]) -> Response {
        let told = || -> Result<GuestSettingsShown, String> {
            if guest.is_empty() || guest.len() > LONGEST_NAME {
                return Err("a guest is named as in its configuration (name = \"...\")".to_owned());
            }
            let wanted = assignments
                .iter()
                .map(|text| assignment(text))
                .collect::<Result<Vec<_>, _>>()?;
            // Of several the last one holds.
            if let Some(topology) = wanted.last() {
                self.topologies.set(guest, *topology).map_err(|error| {
                    format!("cannot keep that for {}: {error}", printable(guest))
                })?;
                log::info!("guest {}: set {}", printable(guest), assignments.join(" "));
            }
            let config = self.devices.config();
            let at_run_time = config.topologies().get(guest).copied();
            Ok(GuestSettingsShown {
                guest: guest.to_owned(),
                settings: vec![line(&config.get(), guest, at_run_time)],
                until: at_run_time.map(|_| {
                    "from the next start of a guest of that name on, until this host is booted anew"
                        .to_owned()
                }),
            })
        };
        match told() {
            Ok(shown) => Response::GuestSettings(shown),
            Err(message) => Response::Failed { message },
        }
    }
}

/// `None`: as the file says.
fn assignment(text: &str) -> Result<Option<Topology>, String> {
    match text.split_once('=') {
        Some(("topology", "default")) => Ok(None),
        Some(("topology", value)) => Topology::ALL
            .into_iter()
            .find(|topology| topology.name() == value)
            .map(Some)
            .ok_or_else(|| format!("{text}: expected vpci, passthrough or default")),
        _ => Err(format!(
            "{text}: what can be set for a guest is topology=vpci, passthrough or default"
        )),
    }
}

fn line(config: &Config, guest: &str, at_run_time: Option<Topology>) -> SettingLine {
    let own = config.guest.get(guest).and_then(|guest| guest.topology);
    let from = match (at_run_time, own) {
        (Some(_), _) => "set at run time".to_owned(),
        (None, Some(_)) => format!("[guest.\"{guest}\"]"),
        (None, None) => "topology, for all guests".to_owned(),
    };
    SettingLine {
        name: "topology".to_owned(),
        value: at_run_time
            .or(own)
            .unwrap_or(config.topology)
            .name()
            .to_owned(),
        from,
        reasons: Vec::new(),
    }
}
