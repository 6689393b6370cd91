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
        let devices = match device.map(str::parse) {
            Some(Ok(device)) => vec![device],
            Some(Err(error)) => {
                return Response::Failed {
                    message: format!("{}: {error}", device.unwrap_or_default()),
                };
            }
            None => self
                .devices
                .list()
                .iter()
                .map(|device| device.bdf)
                .collect(),
        };
        let mut findings = Vec::new();
        for bdf in devices {
            match self.facts(bdf, try_resets) {
                Ok(facts) => findings.extend(device::judge(&facts)),
                Err(error) => {
                    return Response::Failed {
                        message: chain(&error),
                    };
                }
            }
        }
        Response::Findings { findings }
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
