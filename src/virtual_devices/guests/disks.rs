//! Disks of xl's configuration come and go. The daemon's main loop looks whether there is something to do; what is done may wait for
//! storage, so each guest's is done by a thread of its own.

use std::sync::Arc;
use std::time::Duration;

use log::{error, info};
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, XenbusState};

use super::turns::Turn;
use super::{ChangeError, Guest, Seen, VirtualGuests};
use crate::session::nodes::{self, optional};
use crate::text::{chain, printable};
use crate::virtual_devices::place::At;
use crate::virtual_devices::xl_disk::{BACKENDS, Nodes, Step, Unfit, step};

/// Where errors are told, a directory for each guest.
const ERRORS: &str = "/local/domain/0/error/backend/virtio_disk";

/// So long xl waits for a disk (libxl, LIBXL_INIT_TIMEOUT).
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest does not get a disk.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("the guest is no HVM guest: only these get virtio disks")]
    NotHvm,
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl VirtualGuests {
    /// Looks what the toolstack wishes of all disks, and has it done.
    ///
    /// # Errors
    /// xenstore's.
    pub(super) fn scan_disks(self: &Arc<Self>, store: &mut Client) -> Result<(), StoreError> {
        for domain in optional(store.directory(BACKENDS))?.unwrap_or_default() {
            let Ok(domain) = domain.parse::<DomId>() else {
                continue;
            };
            if self.has_steps(store, domain)?
                && let Some(turn) = self.turns.begin(domain)
            {
                self.see_to(turn);
            }
        }
        self.forget_errors(store)
    }

    /// Of guests that are gone.
    fn forget_errors(&self, store: &mut Client) -> Result<(), StoreError> {
        for domain in optional(store.directory(ERRORS))?.unwrap_or_default() {
            if domain.parse().is_ok_and(|domain| self.is_gone(domain)) {
                nodes::remove(store, &format!("{ERRORS}/{domain}"))?;
            }
        }
        Ok(())
    }

    fn has_steps(&self, store: &mut Client, domain: DomId) -> Result<bool, StoreError> {
        for device in disks_of(store, domain)? {
            if next_step(store, domain, device)?.1 != Step::Stay {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Does what the toolstack wishes of a guest's disks.
    ///
    /// # Errors
    /// xenstore's.
    pub(super) fn see_to_disks(
        self: &Arc<Self>,
        store: &mut Client,
        turn: &Arc<Turn>,
    ) -> Result<(), StoreError> {
        for device in disks_of(store, turn.domain())? {
            self.see_to_disk(store, turn, device)?;
        }
        Ok(())
    }

    fn see_to_disk(
        self: &Arc<Self>,
        store: &mut Client,
        turn: &Arc<Turn>,
        device: u32,
    ) -> Result<(), StoreError> {
        let domain = turn.domain();
        let directory = format!("{BACKENDS}/{domain}/{device}");
        let (state, step) = next_step(store, domain, device)?;
        match step {
            Step::Stay => {}
            Step::Attach => {
                let nodes = Nodes::read(store, &directory)?;
                let attached = match self.look(store, domain)? {
                    Seen::Guest(guest) => self.attach(turn, &guest, device, &nodes),
                    Seen::NotHvm => Err(Refusal::NotHvm),
                    Seen::Unknown => return Ok(()),
                };
                // The next daemon sees to it.
                if self.turns.is_closed() {
                    return Ok(());
                }
                // xl may have given it up meanwhile, and then takes it away.
                if next_step(store, domain, device)?.1 != Step::Attach {
                    return Ok(());
                }
                match attached {
                    Ok(at) => {
                        let dev = printable(&nodes.dev);
                        info!("domain {domain}: its disk {dev} is in {at}");
                        store.switch_state(&directory, state, XenbusState::InitWait)?;
                    }
                    Err(refusal) => refuse(store, domain, device, &nodes, &refusal)?,
                }
            }
            Step::Detach => {
                let taken = match self.look(store, domain)? {
                    Seen::Guest(guest) => self.take(domain, &guest, device),
                    // What a guest had that is gone, went with it.
                    Seen::NotHvm => Ok(()),
                    Seen::Unknown => return Ok(()),
                };
                if let Err(error) = taken {
                    error!(
                        "domain {domain}: disk {device} is not let go of, trying again: {}",
                        chain(&error)
                    );
                    self.try_again();
                    return Ok(());
                }
                store.switch_state(&directory, state, XenbusState::Closed)?;
            }
        }
        Ok(())
    }

    fn attach(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        guest: &Guest,
        device: u32,
        nodes: &Nodes,
    ) -> Result<At, Refusal> {
        let config = self.config.get();
        let settings = config
            .guest
            .get(&guest.name)
            .and_then(|guest| guest.disk.get(&nodes.dev));
        let wanted = nodes.device(&settings.cloned().unwrap_or_default())?;
        Ok(self.give(turn, guest, &wanted, Some(device), PATIENCE)?)
    }
}

fn disks_of(store: &mut Client, domain: DomId) -> Result<Vec<u32>, StoreError> {
    let names = optional(store.directory(&format!("{BACKENDS}/{domain}")))?;
    let names = names.unwrap_or_default().into_iter();
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// What is to be done about a disk, and the state that it is in.
fn next_step(
    store: &mut Client,
    domain: DomId,
    device: u32,
) -> Result<(XenbusState, Step), StoreError> {
    let directory = format!("{BACKENDS}/{domain}/{device}");
    let state = store.read_state(&format!("{directory}/state"))?;
    let online = optional(store.read_string(&format!("{directory}/online")))?;
    Ok((state, step(state, online.as_deref() == Some("1"))))
}

/// Says why. Without a state the disk is gone for libxl, which then gives its guest up at once and does not wait.
fn refuse(
    store: &mut Client,
    domain: DomId,
    device: u32,
    nodes: &Nodes,
    refusal: &Refusal,
) -> Result<(), StoreError> {
    let why = format!(
        "the disk {} cannot be had: {}",
        printable(&nodes.dev),
        chain(refusal)
    );
    error!("domain {domain}: {why}");
    store.write(
        &format!("{ERRORS}/{domain}/{device}/error"),
        format!("{} {why}", libc::EINVAL),
    )?;
    optional(store.rm(&format!("{BACKENDS}/{domain}/{device}/state")))?;
    Ok(())
}
