//! The answers to requests about SR-IOV: what virtual functions there are, and that they be made or taken away.

use conf_space::address::Bdf;

use super::service::DaemonService;
use crate::control::protocol::{Entry, PhysicalFunction, Response, VirtualFunction};
use crate::host::devices::{DeviceError, NewFunctions, Quarantine};
use crate::host::{Function, HostError};
use crate::text::chain;

impl DaemonService {
    /// One physical function with its virtual ones, or all.
    pub(super) fn virtual_functions(&self, physical: Option<Bdf>) -> Response {
        let found = match physical {
            Some(bdf) => self.physical_function(bdf).and_then(|found| {
                let refusal = || sriov::Refusal::Plain { device: bdf };
                Ok(vec![found.ok_or_else(refusal)?])
            }),
            None => self.devices.bus().list().map_err(Into::into).map(|all| {
                // One that vanishes meanwhile is left out.
                let found = |bdf| self.physical_function(bdf).ok().flatten();
                all.into_iter().filter_map(found).collect()
            }),
        };
        match found {
            Ok(physical) => Response::VirtualFunctions { physical },
            Err(error) => failed(&error),
        }
    }

    fn physical_function(&self, bdf: Bdf) -> Result<Option<PhysicalFunction>, DeviceError> {
        let (total, members) = match self.devices.bus().describe(bdf)?.function {
            Function::Physical {
                total,
                virtual_functions,
                ..
            } => (total, virtual_functions),
            Function::Virtual { physical, .. } => {
                return Err(sriov::Refusal::Virtual {
                    device: bdf,
                    physical,
                }
                .into());
            }
            Function::Plain => return Ok(None),
        };
        let guests = self.guest_names();
        let member = |(index, bdf)| {
            Some(VirtualFunction {
                index,
                device: self.line(bdf, &guests).ok()?,
            })
        };
        Ok(Some(PhysicalFunction {
            device: self.line(bdf, &guests)?,
            total,
            virtual_functions: members.into_iter().filter_map(member).collect(),
        }))
    }

    /// One entry for each virtual function that there is then.
    pub(super) fn create_functions(&self, physical: Bdf, count: u16, hide: bool) -> Response {
        let new = if hide {
            NewFunctions::LeftAlone
        } else {
            NewFunctions::Probed
        };
        let made = match self.devices.create_functions(physical, count, new) {
            Ok(made) => made,
            Err(error) => return failed(&error),
        };
        let entries = made.into_iter().map(|bdf| {
            let done = if hide {
                let hidden = self.devices.hide(bdf, false, Quarantine::Ours);
                hidden.map(|_| "there, and hidden".to_owned())
            } else {
                self.at_home(bdf).map_err(DeviceError::from)
            };
            let (ok, message) = match done {
                Ok(message) => (true, message),
                Err(error) => (false, chain(&error)),
            };
            Entry {
                entry: bdf.to_string(),
                ok,
                message,
            }
        });
        Response::Entries {
            entries: entries.collect(),
        }
    }

    fn at_home(&self, bdf: Bdf) -> Result<String, HostError> {
        if let Some(phase) = self.devices.get(bdf).and_then(|found| found.record.phase()) {
            return Ok(format!("there, and {}", phase.name()));
        }
        let driver = self.devices.bus().describe(bdf)?.driver;
        Ok(driver.map_or_else(
            || "there, without a driver in dom0".to_owned(),
            |driver| format!("there, with dom0's driver {driver}"),
        ))
    }

    /// One entry, for the physical function.
    pub(super) fn destroy_functions(&self, physical: Bdf, force: bool) -> Response {
        let destroyed = if force { self.vacate(physical) } else { Ok(()) }
            .and_then(|()| self.devices.destroy_functions(physical));
        match destroyed {
            Ok(count) => Response::Entries {
                entries: vec![Entry {
                    entry: physical.to_string(),
                    ok: true,
                    message: match count {
                        0 => "it had no virtual functions".to_owned(),
                        count => format!("its {count} virtual functions are taken away"),
                    },
                }],
            },
            Err(error) => failed(&error),
        }
    }

    /// By order of an operator who insists: guests lose the virtual functions of a physical one. Does nothing to other devices.
    pub(super) fn vacate(&self, physical: Bdf) -> Result<(), DeviceError> {
        self.devices.vacate(physical)
    }
}

fn failed(error: &DeviceError) -> Response {
    Response::Failed {
        message: chain(error),
    }
}
