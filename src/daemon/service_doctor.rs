//! The answer to [`Request::Doctor`](crate::control::protocol::Request::Doctor).

use conf_space::address::Bdf;

use super::service::DaemonService;
use crate::control::protocol::Response;
use crate::doctor::device;
use crate::doctor::device_facts::{DeviceFacts, Standing, Tried};
use crate::host::HostError;
use crate::host::devices::Attempt;
use crate::text::chain;

impl DaemonService {
    /// Looks at one device, or at all that are hidden.
    pub(super) fn doctor(&self, device: Option<&str>, try_resets: bool) -> Response {
        let look = |bdf| Ok(device::judge(&self.facts(bdf, try_resets)?));
        let found = match device.map(|device| device.parse().map_err(|error| (device, error))) {
            Some(Ok(bdf)) => look(bdf).map_err(|error: HostError| chain(&error)),
            Some(Err((device, error))) => Err(format!("{device}: {error}")),
            None => Ok(self
                .devices
                .list()
                .iter()
                .flat_map(|device| {
                    let bdf = device.bdf;
                    look(bdf).unwrap_or_else(|error| device::unknown(bdf, &error))
                })
                .collect()),
        };
        match found {
            Ok(findings) => Response::Findings { findings },
            Err(message) => Response::Failed { message },
        }
    }

    fn facts(&self, bdf: Bdf, try_resets: bool) -> Result<DeviceFacts, HostError> {
        let tried = if try_resets {
            self.devices.try_resets(bdf).map(told)
        } else {
            Ok(Vec::new())
        };
        let standing = |bdf| {
            let device = self.devices.get(bdf)?;
            Standing::of(&device.record)
        };
        let facts = DeviceFacts::gather(&**self.devices.bus(), bdf, standing)?;
        let name = bdf.to_string();
        let failed = self
            .guests
            .status()
            .into_iter()
            .flat_map(|(domain, status)| {
                let failed = status.failed.into_iter();
                failed.map(move |(device, reason)| (domain, device, reason))
            });
        Ok(DeviceFacts {
            settings: Some(self.devices.get(bdf).map_or_else(
                || {
                    self.devices
                        .config()
                        .get()
                        .settings_for(&facts.description.names())
                },
                |device| self.devices.settings(&device),
            )),
            failed: failed
                .filter(|(_, device, _)| *device == name)
                .map(|(domain, _, reason)| (domain, reason))
                .collect(),
            tried: tried.map_err(|error| chain(&error)),
            ..facts
        })
    }
}

fn told(attempts: Vec<Attempt>) -> Vec<Tried> {
    attempts
        .into_iter()
        .map(|(method, result)| Tried {
            method,
            result: result.map_err(|error| chain(&error)),
        })
        .collect()
}
