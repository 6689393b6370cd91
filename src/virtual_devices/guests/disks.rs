//! Disks of xl's configuration come and go. Each change is a restart of the guest's session with another list of devices,
//! which its other devices' drivers notice no more than they do a restart of the daemon.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info};
use virtio::blk::{Image, ImageError};
use xenbus::xenstore::{Client, Error as StoreError, Store};
use xenbus::{DomId, XenbusState};

use super::{Guest, StartError, VirtualGuests, lock};
use crate::config::{Model, Place, VirtioDevice};
use crate::session::nodes::{self, optional};
use crate::text::{chain, printable};
use crate::virtual_devices::place::{At, PlaceError, settle_last};
use crate::virtual_devices::record::Record;
use crate::virtual_devices::xl_disk::{BACKENDS, Nodes, Step, Unfit, step};

/// Where errors are told, a directory for each guest.
const ERRORS: &str = "/local/domain/0/error/backend/virtio_disk";

/// How long requests under way may take to end when a disk is taken away.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(5);

/// A guest does not get a disk.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("the guest is no HVM guest: only these get virtio disks")]
    NotHvm,
    #[error("the guest runs already: a virtio disk is to be there when it is made")]
    Runs,
    #[error("the guest's other virtio devices cannot be had")]
    Others,
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Session(#[from] StartError),
    #[error("its record cannot be kept")]
    Record(#[from] io::Error),
}

/// A disk that is served.
struct Attached {
    at: At,
    dev: String,
}

impl VirtualGuests {
    /// Does what the toolstack wishes of all disks.
    ///
    /// # Errors
    /// xenstore's.
    pub(super) fn scan_disks(&self, store: &mut Client) -> Result<(), StoreError> {
        let numbers = |names: Option<Vec<String>>| {
            let names = names.unwrap_or_default().into_iter();
            names.filter_map(|name| name.parse::<u32>().ok())
        };
        for domain in numbers(optional(store.directory(BACKENDS))?) {
            let Ok(number) = domain.to_string().parse::<DomId>() else {
                continue;
            };
            for device in numbers(optional(store.directory(&format!("{BACKENDS}/{domain}")))?) {
                self.see_to_disk(store, number, device)?;
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

    fn see_to_disk(
        &self,
        store: &mut Client,
        domain: DomId,
        device: u32,
    ) -> Result<(), StoreError> {
        let directory = format!("{BACKENDS}/{domain}/{device}");
        let state = store.read_state(&format!("{directory}/state"))?;
        let online = optional(store.read_string(&format!("{directory}/online")))?;
        match step(state, online.as_deref() == Some("1")) {
            Step::Stay => {}
            Step::Attach => {
                let nodes = Nodes::read(store, &directory)?;
                match self.attach(store, domain, device, &nodes)? {
                    Ok(Attached { at, dev }) => {
                        let dev = printable(&dev);
                        info!("domain {domain}: its disk {dev} is in {at}");
                        store.switch_state(&directory, state, XenbusState::InitWait)?;
                    }
                    Err(refusal) => refuse(store, domain, device, &nodes, &refusal)?,
                }
            }
            Step::Detach => {
                if let Err(error) = self.detach(store, domain, device)? {
                    error!(
                        "domain {domain}: disk {device} is not let go of: {}",
                        chain(&error)
                    );
                    return Ok(());
                }
                store.switch_state(&directory, state, XenbusState::Closed)?;
            }
        }
        Ok(())
    }

    fn attach(
        &self,
        store: &mut Client,
        domain: DomId,
        device: u32,
        nodes: &Nodes,
    ) -> Result<Result<Attached, Refusal>, StoreError> {
        let guest = match self.look(store, domain)? {
            Some(guest) => guest,
            None => return Ok(Err(Refusal::NotHvm)),
        };
        Ok(self.add(domain, &guest, device, nodes))
    }

    fn add(
        &self,
        domain: DomId,
        guest: &Guest,
        device: u32,
        nodes: &Nodes,
    ) -> Result<Attached, Refusal> {
        let config = self.config.get();
        let settings = config
            .guest
            .get(&guest.name)
            .and_then(|guest| guest.disk.get(&nodes.dev));
        let wanted = nodes.device(&settings.cloned().unwrap_or_default())?;
        if lock(&self.refused).contains_key(&domain) {
            return Err(Refusal::Others);
        }
        let record = Record::open(guest.record.clone())?;
        let mut disks = record.disks()?;
        let dev = nodes.dev.clone();
        if let Some(VirtioDevice {
            place: Place::Mmio {
                slot: Some(slot), ..
            },
            ..
        }) = disks.get(&device)
        {
            // A daemon before this one was killed before it could say so.
            let at = At::Mmio(*slot);
            return Ok(Attached { at, dev });
        }
        if !guest.is_paused {
            return Err(Refusal::Runs);
        }
        let before = disks.clone();
        let others = match record.devices()? {
            Some(devices) => devices,
            None => guest.configured.clone(),
        };
        let all: Vec<_> = others
            .iter()
            .chain(before.values())
            .chain([&wanted])
            .collect();
        let (at, settled) = settle_last(&all)?;
        disks.insert(device, settled);
        // Its thread first, for it has the images open.
        let had_others = self.end(domain);
        record.set_disks(&disks)?;
        let started = self.start(domain, guest, true);
        if let Err(error) = started {
            if !had_others {
                std::fs::remove_dir_all(&guest.record)?;
                return Err(error.into());
            }
            record.set_disks(&before)?;
            self.start(domain, guest, true)?;
            return Err(error.into());
        }
        Ok(Attached { at, dev })
    }

    fn detach(
        &self,
        store: &mut Client,
        domain: DomId,
        device: u32,
    ) -> Result<Result<(), Refusal>, StoreError> {
        // What a guest had that is gone, went with it.
        let Some(guest) = self.look(store, domain)? else {
            return Ok(Ok(()));
        };
        Ok(self.remove(domain, &guest, device))
    }

    fn remove(&self, domain: DomId, guest: &Guest, device: u32) -> Result<(), Refusal> {
        if guest.is_new() {
            return Ok(());
        }
        let record = Record::open(guest.record.clone())?;
        let mut disks = record.disks()?;
        let others = record.devices()?.unwrap_or_default();
        let all = disks.values().chain(&others).cloned().collect::<Vec<_>>();
        let Some(disk) = disks.remove(&device) else {
            return Ok(());
        };
        let was_served = self.end(domain);
        record.set_disks(&disks)?;
        if let Place::Mmio {
            slot: Some(slot), ..
        } = disk.place
        {
            record.forget(At::Mmio(slot))?;
        }
        wait_for_last_requests(&all);
        if was_served {
            self.start(domain, guest, false)?;
        }
        info!("domain {domain}: disk {device} is taken away");
        Ok(())
    }
}

/// Until then an image is locked. Whoever hears that the disk is gone may use the image for something else, and the next
/// session wants those of the others.
fn wait_for_last_requests(devices: &[VirtioDevice]) {
    let begin = Instant::now();
    for device in devices {
        let path = match &device.model {
            Model::Blk(disk) if !disk.read_only => &disk.path,
            _ => continue,
        };
        while let Err(ImageError::Locked { .. }) = Image::open(path, false, false) {
            if begin.elapsed() >= LAST_REQUESTS {
                error!(
                    "requests for {} have not ended: they may still write to it",
                    path.display()
                );
                return;
            }
            thread::sleep(LOOK);
        }
    }
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
