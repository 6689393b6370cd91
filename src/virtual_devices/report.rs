//! What operators ask of guests' devices, and wish for them.

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio::Interface;
use virtio::inspect::{DeviceView, feature_names};
use xenbus::xenstore::{Error as StoreError, Store};
use xenbus::{DomId, XenError};

use super::assembly::AssemblyError;
use super::guests::{ChangeError, DOMAINS, PATIENCE, Seen, Turn, VirtualGuests, lock};
use super::place::{At, place};
use super::qemu::Function;
use super::record::devices_of;
use super::session::{Answer, Phase, Watched};
use crate::config::VirtioDevice;
use crate::control::virtio::{Driven, QueueLine, TerminalLine, VirtioGuest, VirtioLine};
use crate::session::nodes::optional;
use crate::text::chain;

/// What is asked for cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// There is no such guest.
    #[error("there is no guest {guest}; `xl list` shows those that there are")]
    NoGuest {
        /// Name or number.
        guest: String,
    },
    /// It has none of ours.
    #[error(
        "{guest} has no virtio devices of pcibackd's; `pciback virtio list` shows the guests that have"
    )]
    NoDevices {
        /// Name or number.
        guest: String,
    },
    /// It is a PV guest.
    #[error(
        "{guest} is no HVM guest: virtio devices are for those, PV guests have Xen's own (disk=, vif=)"
    )]
    NotHvm {
        /// Name or number.
        guest: String,
    },
    /// Its firmware has looked for devices already.
    #[error(
        "{guest} runs already, and its firmware has looked for devices: shut it down and create it with them (pciback create, or xl create -p, \
         pciback virtio add, xl unpause)"
    )]
    Runs {
        /// Name or number.
        guest: String,
    },
    /// Its devices cannot be made.
    #[error("{guest} has no virtio devices: {why}")]
    Failed {
        /// Name or number.
        guest: String,
        /// Why.
        why: String,
    },
    /// It takes too long.
    #[error(
        "the virtio devices of {guest} are not there after {} s: storage or a tap does not answer (pciback virtio list)",
        PATIENCE.as_secs()
    )]
    TooLong {
        /// Name or number.
        guest: String,
    },
    /// QEMU has a function there.
    #[error(
        "slot {slot:02x} of {guest} is taken by QEMU ({what}), whose device the guest would see: give ours another slot"
    )]
    Qemu {
        /// Name or number.
        guest: String,
        /// Which.
        slot: u8,
        /// What QEMU has there.
        what: String,
    },
    /// QEMU cannot be asked.
    #[error("cannot ask the QEMU of {guest} which slots it has taken")]
    Ask {
        /// Name or number.
        guest: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The devices do not fit together.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    /// xenstore's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Xen's.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// Another change of its devices does not come to its end.
    #[error(
        "the devices of {guest} are being changed, and have been for {} s: storage or a tap does not answer (see the daemon's log)",
        PATIENCE.as_secs()
    )]
    Busy {
        /// Name or number.
        guest: String,
    },
}

impl VirtualGuests {
    /// The guest of this name or number, or all: how their devices are.
    ///
    /// # Errors
    /// [`VirtioError::NoDevices`] when this guest has none.
    pub fn report(&self, guest: Option<&str>) -> Result<Vec<VirtioGuest>, VirtioError> {
        let sessions: Vec<_> = lock(&self.sessions)
            .iter()
            .map(|(domain, session)| {
                let (name, record) = (session.name.clone(), session.record.clone());
                (*domain, name, record, session.handle.watched())
            })
            .collect();
        // Each may be in the middle of something, and holds up nobody but who asks.
        let mut guests: Vec<_> = sessions
            .into_iter()
            .map(|(domain, name, record, session)| of_session(domain, name, &record, &session))
            .collect();
        for guest in &mut guests {
            let conflicts = lock(&self.conflicts);
            let conflict = conflicts.get(&DomId(guest.domain)).cloned();
            guest.reason = guest.reason.take().or(conflict);
        }
        guests.extend(lock(&self.refused).values().cloned());
        if let Some(wanted) = guest {
            guests.retain(|guest| guest.name == wanted || guest.domain.to_string() == wanted);
            if guests.is_empty() {
                let guest = wanted.to_owned();
                return Err(VirtioError::NoDevices { guest });
            }
        }
        Ok(guests)
    }

    /// Gives a guest that has not started yet one more device. Returns where it is.
    ///
    /// # Errors
    /// [`VirtioError`]; the guest has then what it had before.
    pub fn add_device(
        self: &Arc<Self>,
        guest: &str,
        device: &VirtioDevice,
    ) -> Result<String, VirtioError> {
        let domain = self.ready_to_start(guest)?;
        let turn = Arc::new(self.turn(guest, domain)?);
        let given = self.add_in(&turn, guest, device);
        self.let_go(turn);
        given
    }

    fn add_in(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        guest: &str,
        device: &VirtioDevice,
    ) -> Result<String, VirtioError> {
        let owned = || guest.to_owned();
        let known = match self.look(&mut self.xen.connect_xenstore()?, turn.domain())? {
            Seen::Guest(known) => known,
            Seen::NotHvm => return Err(VirtioError::NoGuest { guest: owned() }),
            Seen::Unknown => {
                return Err(VirtioError::Failed {
                    guest: owned(),
                    why: "Xen cannot be asked about it; the daemon's log says why".to_owned(),
                });
            }
        };
        match self.give(turn, &known, device, None, PATIENCE) {
            Ok(at) => Ok(at.to_string()),
            Err(ChangeError::Runs) => Err(VirtioError::Runs { guest: owned() }),
            Err(ChangeError::Qemu(Function { slot, what })) => Err(VirtioError::Qemu {
                guest: owned(),
                slot,
                what,
            }),
            Err(ChangeError::Ask(source)) => Err(VirtioError::Ask {
                guest: owned(),
                source,
            }),
            Err(why) => Err(VirtioError::Failed {
                guest: owned(),
                why: chain(&why),
            }),
        }
    }

    /// The turn to change a guest's devices, once others have had theirs.
    fn turn(self: &Arc<Self>, guest: &str, domain: DomId) -> Result<Turn, VirtioError> {
        let turn = self.turns.wait(domain, PATIENCE);
        turn.ok_or_else(|| VirtioError::Busy {
            guest: guest.to_owned(),
        })
    }

    /// Waits until a guest's devices are there, and looks that QEMU has none in their slots. Returns where they are.
    ///
    /// # Errors
    /// [`VirtioError`].
    pub fn wait_until_ready(self: &Arc<Self>, guest: &str) -> Result<Vec<String>, VirtioError> {
        let domain = self.find(guest)?;
        // If it is so new that nobody has seen it yet.
        let turn = Arc::new(self.turn(guest, domain)?);
        let ensured = self
            .xen
            .connect_xenstore()
            .and_then(|mut store| self.ensure_in(&turn, &mut store));
        self.let_go(turn);
        ensured?;
        if self.opened(guest, domain)?.is_none() {
            let refused = lock(&self.refused).get(&domain).cloned();
            let known = self.look(&mut self.xen.connect_xenstore()?, domain)?;
            let has_none = match known {
                Seen::Guest(known) => known.configured.is_empty(),
                Seen::NotHvm => true,
                Seen::Unknown => false,
            };
            if refused.is_none() && has_none {
                return Ok(Vec::new());
            }
            let reason = refused.and_then(|refused| refused.reason);
            return Err(VirtioError::Failed {
                guest: guest.to_owned(),
                why: reason.unwrap_or_else(|| "the daemon's log says why".to_owned()),
            });
        }
        let record = self.record_of(domain);
        let devices = record.map(|record| devices_of(&record)).unwrap_or_default();
        let seated = place(&devices).map_err(AssemblyError::from)?;
        let is_ours = |slot| seated.iter().any(|(seat, _)| seat.at() == At::Pci(slot));
        let guest = guest.to_owned();
        match Self::conflict(domain, is_ours) {
            Ok(None) => Ok(seated
                .iter()
                .map(|(seat, _)| seat.at().to_string())
                .collect()),
            Ok(Some(Function { slot, what })) => Err(VirtioError::Qemu { guest, slot, what }),
            Err(source) => Err(VirtioError::Ask { guest, source }),
        }
    }

    /// The domain of this number or name.
    fn find(&self, guest: &str) -> Result<DomId, VirtioError> {
        let mut store = self.xen.connect_xenstore()?;
        for domain in optional(store.directory(DOMAINS))?.unwrap_or_default() {
            let Ok(domain) = domain.parse::<DomId>() else {
                continue;
            };
            let name = optional(store.read_string(&format!("{DOMAINS}/{domain}/name")))?;
            if domain.to_string() == guest || name.as_deref() == Some(guest) {
                return Ok(domain);
            }
        }
        Err(VirtioError::NoGuest {
            guest: guest.to_owned(),
        })
    }

    /// An HVM guest that has not run yet.
    fn ready_to_start(&self, guest: &str) -> Result<DomId, VirtioError> {
        let domain = self.find(guest)?;
        let info = self.xen.domain_info(domain)?;
        let guest = guest.to_owned();
        match info.filter(|info| !info.gone) {
            None => Err(VirtioError::NoGuest { guest }),
            Some(info) if !info.hvm => Err(VirtioError::NotHvm { guest }),
            Some(info) if info.has_run => Err(VirtioError::Runs { guest }),
            Some(_) => Ok(domain),
        }
    }

    /// How a guest's devices are, once they are open; `None`: it has none.
    fn opened(&self, guest: &str, domain: DomId) -> Result<Option<Answer>, VirtioError> {
        let Some(watched) = self.watched(domain) else {
            return Ok(None);
        };
        let guest = guest.to_owned();
        match watched.wait(PATIENCE) {
            Phase::Opening => return Err(VirtioError::TooLong { guest }),
            Phase::Failed(why) | Phase::Waiting(why) => {
                return Err(VirtioError::Failed { guest, why });
            }
            Phase::Serving => {}
        }
        match watched.ask() {
            Some(answer) => Ok(Some(answer)),
            None => Err(VirtioError::TooLong { guest }),
        }
    }
}

fn of_session(domain: DomId, name: String, record: &Path, session: &Watched) -> VirtioGuest {
    let (state, reason) = match session.phase() {
        Phase::Opening => ("opening", None),
        Phase::Serving => ("served", None),
        Phase::Waiting(why) => ("waiting", Some(why)),
        Phase::Failed(why) => ("refused", Some(why)),
    };
    let devices = match state {
        "refused" => Vec::new(),
        _ => devices_of(record),
    };
    let views = session.ask().map(|answer| answer.devices);
    let mut views = views.unwrap_or_default().into_iter();
    let terminals = session.terminals();
    let mut missing = session.missing();
    let mut placed = place(&devices).unwrap_or_default();
    // As they are in the guest: functions in their order, then virtio-mmio by slot.
    placed.sort_by_key(|(seat, _)| match seat.at() {
        At::Pci(_) => None,
        At::Mmio(slot) => Some(slot),
    });
    let lines = placed.into_iter().map(|(seat, device)| {
        let of_place = terminals.iter().filter(|(at, _)| *at == seat.at());
        VirtioLine {
            place: seat.at().to_string(),
            configured: device.clone(),
            driven: views.next().map(|view| driven(&view)),
            waiting: missing.remove(&seat.at()),
            terminals: of_place
                .map(|(_, terminal)| TerminalLine {
                    port: terminal.port.clone(),
                    path: terminal.path.clone(),
                })
                .collect(),
        }
    });
    VirtioGuest {
        domain: domain.0,
        name,
        state: state.to_owned(),
        reason,
        devices: lines.collect(),
    }
}

fn driven(view: &DeviceView) -> Driven {
    let names = view.status.iter_names();
    let unused = view.offered.difference(view.chosen);
    Driven {
        status: names.map(|(name, _)| name.to_owned()).collect(),
        interface: match view.interface {
            Interface::Legacy => "legacy",
            Interface::Modern => "modern",
        }
        .to_owned(),
        msix: view.msix,
        features: feature_names(view.kind, view.chosen),
        not_chosen: feature_names(view.kind, unused),
        queues: (0u16..)
            .zip(&view.queues)
            .map(|(number, queue)| QueueLine {
                queue: number,
                enabled: queue.ready,
                size: queue.size,
                max_size: queue.max_size,
                descriptors: queue.descriptors,
                driver: queue.driver,
                device: queue.device,
                available: queue.indices.map(|(available, _)| available),
                used: queue.indices.map(|(_, used)| used),
                in_flight: queue.in_flight,
                vector: queue.vector,
            })
            .collect(),
    }
}
