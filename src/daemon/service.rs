//! What the daemon answers on the control socket.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use conf_space::address::Bdf;
use conf_space::overlay::{Overlay, OverlayState, Permissive, Treatment};
use conf_space::selector;
use conf_space::{ConfigSpace, Width};
use xenbus::DomId;

use super::driver::SlotDriver;
use super::facade::Standing;
use super::guests::Guests;
use super::platform::Kind;
use super::topologies::Topologies;
use crate::config::ResetChoice;
use crate::control::protocol::{DeviceLine, Entry, Field, Request, Response, Shown};
use crate::control::server::Service;
use crate::control::traced::Filter;
use crate::facade::{self, RealDrivers};
use crate::host::devices::{DeviceError, Devices, Quarantine, Rebind};
use crate::host::record::Phase;
use crate::host::{HostError, ReadOnly};
use crate::text::{chain, listed};
use crate::trace;
use crate::virtual_devices::VirtualGuests;

/// The daemon's answers.
#[derive(Debug)]
pub struct DaemonService {
    pub(super) started: SystemTime,
    pub(super) platform: Kind,
    pub(super) facade: Arc<Standing>,
    pub(super) devices: Arc<Devices>,
    pub(super) guests: Arc<Guests>,
    pub(super) virtual_guests: Arc<VirtualGuests>,
    pub(super) driver: Arc<SlotDriver>,
    pub(super) drivers: Option<RealDrivers>,
    pub(super) topologies: Topologies,
}

impl DaemonService {
    /// Does something with every device that the lists name: each on its own, and told of on its own.
    fn for_each(
        &self,
        lists: &[String],
        act: impl Fn(Bdf) -> Result<String, DeviceError>,
    ) -> Response {
        let existing = match self.devices.names() {
            Ok(existing) => existing,
            Err(error) => {
                return Response::Failed {
                    message: chain(&error),
                };
            }
        };
        let mut entries = Vec::new();
        let failed = |entry: String, message: String| Entry {
            entry,
            ok: false,
            message,
        };
        for selector in lists.iter().flat_map(|list| selector::parse(list)) {
            let selector = match selector {
                Ok(selector) => selector,
                Err(error) => {
                    let why = error.problem.to_string();
                    entries.push(failed(error.entry, why));
                    continue;
                }
            };
            let matching = existing.iter().filter(|device| selector.matches(device));
            let mut named: Vec<Bdf> = matching.map(|device| device.bdf).collect();
            // A device that is named is tried, so that the reason is told; a range that is empty is itself the failure.
            named.extend(selector.exact().filter(|bdf| !named.contains(bdf)));
            if named.is_empty() {
                entries.push(failed(
                    selector.to_string(),
                    "no device matches; 'pciback list' shows those that are there".into(),
                ));
            }
            entries.extend(named.into_iter().map(|bdf| match act(bdf) {
                Ok(message) => Entry {
                    entry: bdf.to_string(),
                    ok: true,
                    message,
                },
                Err(error) => failed(bdf.to_string(), chain(&error)),
            }));
        }
        Response::Entries { entries }
    }

    fn hide(&self, lists: &[String], force: bool) -> Response {
        self.for_each(lists, |bdf| {
            // Not for one that is hidden already: nothing is done to it.
            if force && self.devices.phase(bdf).is_none() {
                self.vacate(bdf)?;
            }
            let new = self.devices.hide(bdf, force, Quarantine::Ours)?;
            Ok(if new { "hidden" } else { "hidden already" }.to_owned())
        })
    }

    fn unhide(&self, lists: &[String], force: bool) -> Response {
        self.for_each(lists, |bdf| {
            if force {
                self.devices.check_free(bdf)?;
                self.vacate(bdf)?;
            }
            self.devices.unhide(bdf, Rebind::Driver)?;
            let driver = self
                .devices
                .bus()
                .describe(bdf)
                .ok()
                .and_then(|description| description.driver);
            Ok(driver.map_or_else(
                || "given back to dom0, where no driver is bound to it".to_owned(),
                |driver| format!("given back to dom0's {driver}"),
            ))
        })
    }

    fn hide_group(&self, lists: &[String], force: bool) -> Response {
        self.for_each(lists, |bdf| {
            let new = self.devices.hide_group(bdf, force)?;
            Ok(match with_others(bdf, &new) {
                _ if new.is_empty() => "hidden already".to_owned(),
                others => format!("hidden{others}"),
            })
        })
    }

    fn unhide_group(&self, lists: &[String]) -> Response {
        self.for_each(lists, |bdf| {
            let back = self.devices.unhide_group(bdf)?;
            Ok(format!("given back to dom0{}", with_others(bdf, &back)))
        })
    }

    fn reset(&self, lists: &[String], method: Option<ResetChoice>, force: bool) -> Response {
        self.for_each(lists, |bdf| {
            let device = self.devices.find(bdf)?;
            let choice = method.unwrap_or_else(|| self.devices.settings(&device).reset);
            if force {
                self.devices.check_reset(bdf, choice)?;
                self.vacate(bdf)?;
            }
            self.devices.reset_free(bdf, choice)?;
            Ok(match choice {
                ResetChoice::None => "not reset, as its settings say (reset = \"none\")",
                _ => "reset; it answers, and can be given to a guest",
            }
            .to_owned())
        })
    }

    pub(super) fn guest_names(&self) -> BTreeMap<DomId, String> {
        let status = self.guests.status().into_iter();
        status
            .map(|(domain, status)| (domain, status.name))
            .collect()
    }

    pub(super) fn line(
        &self,
        bdf: Bdf,
        guests: &BTreeMap<DomId, String>,
    ) -> Result<DeviceLine, HostError> {
        let description = self.devices.bus().describe(bdf)?;
        let hidden = self.devices.get(bdf);
        let phase = self.devices.phase(bdf);
        let owner = hidden
            .as_ref()
            .filter(|_| phase == Some(Phase::Assigned))
            .and_then(|device| device.record.owner());
        Ok(DeviceLine {
            device: bdf,
            vendor: description.identity.vendor,
            id: description.identity.device,
            subsystem: description.subsystem,
            path: description.path.map(|path| path.to_string()),
            class: description.class,
            state: phase.map_or("dom0", Phase::name).to_owned(),
            activity: self.devices.activity(bdf).map(str::to_owned),
            resets: hidden.as_ref().map_or(0, |device| device.record.resets()),
            driver: description
                .driver
                .or_else(|| hidden.as_ref().and_then(|device| device.record.driver())),
            domain: owner.map(|owner| owner.domain.0),
            guest: owner.and_then(|owner| guests.get(&owner.domain).cloned()),
            seen_as: owner.map(|owner| owner.seen_as),
            permissive: hidden
                .as_ref()
                .is_some_and(|device| self.devices.settings(device).permissive != Permissive::No),
            errors: hidden.map(|device| self.errors_of(&device)),
        })
    }

    fn list(&self) -> Response {
        let guests = self.guest_names();
        match self.devices.bus().list() {
            // One that vanishes meanwhile is left out.
            Ok(found) => Response::Devices {
                devices: found
                    .into_iter()
                    .filter_map(|bdf| self.line(bdf, &guests).ok())
                    .collect(),
            },
            Err(error) => Response::Failed {
                message: chain(&error),
            },
        }
    }

    fn show(&self, device: &str) -> Response {
        let failed = |message: String| Response::Failed { message };
        let bdf: Bdf = match device.parse() {
            Ok(bdf) => bdf,
            Err(error) => return failed(format!("{device}: {error}")),
        };
        let line = match self.line(bdf, &self.guest_names()) {
            Ok(line) => line,
            Err(error) => return failed(chain(&error)),
        };
        let description = match self.devices.bus().describe(bdf) {
            Ok(description) => description,
            Err(error) => return failed(chain(&error)),
        };
        let config = match self.devices.bus().open(bdf) {
            Ok(config) => config,
            Err(error) => return failed(chain(&error)),
        };
        // Looking must not touch a device that is dom0's.
        let reading = ReadOnly(&*config);
        let mut overlay = match Overlay::new(&description.identity, &reading) {
            Ok(overlay) => overlay,
            Err(error) => return failed(chain(&error)),
        };
        if let Some(hidden) = self.devices.get(bdf) {
            overlay.set_quirks(&self.devices.settings(&hidden).quirks);
            if hidden.record.phase() == Some(Phase::Assigned) {
                overlay.set_state(OverlayState::from_bits(hidden.record.overlay()));
            }
        }
        let fields = overlay.fields().map(|field| {
            let width = Width::from_bytes(field.length.into());
            let value = width.and_then(|_| {
                overlay
                    .read(&reading, field.offset.into(), field.length.into())
                    .ok()
            });
            let hardware = width.and_then(|width| reading.read(field.offset, width).ok());
            Field {
                block: field.block.to_owned(),
                name: field.name.to_owned(),
                offset: field.offset,
                length: field.length,
                value,
                hardware,
                treatment: treatment(field.treatment).to_owned(),
                spec: field.spec.to_owned(),
            }
        });
        Response::Device(Box::new(Shown {
            device: line,
            fields: fields.collect(),
        }))
    }

    fn serve(&self, fuse: Option<OwnedFd>) -> Response {
        let failed = |message: &str| Response::Failed {
            message: message.to_owned(),
        };
        let Some(fuse) = fuse else {
            return failed("the request came without an open /dev/fuse");
        };
        let Some(drivers) = self.drivers.clone() else {
            return failed("the embedded platform has no PCI drivers to lay a facade over");
        };
        match facade::serve(
            fuse,
            Arc::clone(&self.driver) as Arc<dyn facade::Driver>,
            drivers,
        ) {
            // It ends by itself when the caller's mount namespace does.
            Ok(_) => Response::Served,
            Err(error) => Response::Failed {
                message: chain(&error),
            },
        }
    }
}

impl Service for DaemonService {
    fn answer(&self, request: Request, fd: Option<OwnedFd>) -> Response {
        match request {
            Request::Hide { devices, force } => self.hide(&devices, force),
            Request::Unhide { devices, force } => self.unhide(&devices, force),
            Request::HideGroup { devices, force } => self.hide_group(&devices, force),
            Request::UnhideGroup { devices } => self.unhide_group(&devices),
            Request::Reset {
                devices,
                method,
                force,
            } => self.reset(&devices, method, force),
            Request::List => self.list(),
            Request::Show { device } => self.show(&device),
            Request::VirtualFunctions { physical } => self.virtual_functions(physical),
            Request::CreateVirtualFunctions {
                physical,
                count,
                hide,
            } => self.create_functions(physical, count, hide),
            Request::DestroyVirtualFunctions { physical, force } => {
                self.destroy_functions(physical, force)
            }
            Request::Set {
                device,
                assignments,
            } => self.set(&device, &assignments),
            Request::SetGuest { guest, assignments } => self.set_guest(&guest, &assignments),
            Request::Dropped { device } => self.dropped(&device),
            Request::Doctor { device, try_resets } => self.doctor(device.as_deref(), try_resets),
            Request::Virtio { guest } => self.virtio(guest.as_deref()),
            Request::AddVirtio { guest, device } => self.add_virtio(&guest, &device),
            Request::AwaitVirtio { guest } => self.await_virtio(&guest),
            Request::Status => self.status(),
            Request::Serve => self.serve(fd),
            Request::Trace(_) => Response::Failed {
                message: "a trace is no single answer".to_owned(),
            },
        }
    }

    fn served(&self, client: &Arc<UnixStream>) {
        self.facade.served(client);
    }

    fn trace(
        &self,
        filter: &Filter,
        client: &UnixStream,
        stop: &AtomicBool,
    ) -> std::io::Result<()> {
        trace::follow(
            filter,
            || self.guests.sources(),
            &self.devices,
            client,
            || stop.load(Ordering::Acquire),
        )
    }
}

/// The devices that something was done to besides the one that was named.
fn with_others(named: Bdf, all: &[Bdf]) -> String {
    let others = listed(all.iter().filter(|other| **other != named));
    if others.is_empty() {
        return others;
    }
    format!(", with {others}")
}

fn treatment(treatment: Treatment) -> &'static str {
    match treatment {
        Treatment::Emulated => "emulated",
        Treatment::Passed => "passed",
        Treatment::Filtered => "filtered",
        Treatment::ReadOnly => "read-only",
        Treatment::Dropped => "writes dropped",
        Treatment::Hidden => "hidden",
    }
}
