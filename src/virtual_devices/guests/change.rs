//! A guest gets a device, or loses one. Each change is a restart of the guest's session with another list of devices,
//! which its other devices' drivers notice no more than they do a restart of the daemon.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use log::{error, info};
use virtio::blk::{Image, ImageError};
use xenbus::DomId;

use super::turns::Turn;
use super::{Guest, StartError, VirtualGuests, lock};
use crate::config::{Model, Place, VirtioDevice};
use crate::text::chain;
use crate::virtual_devices::place::{At, PlaceError, settle_last, settled};
use crate::virtual_devices::qemu::Function;
use crate::virtual_devices::record::Record;
use crate::virtual_devices::session::{End, Phase};

/// How long the kernel may take to let go of an image.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(5);

/// A guest does not get a device, and has what it had.
#[derive(Debug, thiserror::Error)]
pub(in crate::virtual_devices) enum ChangeError {
    /// Its firmware has looked.
    #[error("the guest runs already, and its firmware has looked for devices")]
    Runs,
    /// What it has is not served.
    #[error("the guest's other virtio devices cannot be had: {0}")]
    Others(String),
    /// There is no place for it.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// QEMU has a function where it is to be.
    #[error("slot {:02x} is taken by QEMU ({})", .0.slot, .0.what)]
    Qemu(Function),
    /// QEMU cannot be asked.
    #[error("cannot ask QEMU which slots it has taken")]
    Ask(#[source] io::Error),
    /// It cannot be made.
    #[error(transparent)]
    Start(#[from] StartError),
    /// What the guest has cannot be written down.
    #[error("its record cannot be kept; is the run directory full?")]
    Record(#[from] io::Error),
}

/// What a guest has.
#[derive(Debug, Clone)]
struct Lists {
    /// From the configuration, or from the operator. `None`: nobody has begun with them yet.
    devices: Option<Vec<VirtioDevice>>,
    /// Disks of xl's configuration, by its numbers of them.
    disks: BTreeMap<u32, VirtioDevice>,
}

impl Lists {
    fn read(record: &Record) -> io::Result<Self> {
        Ok(Self {
            devices: record.devices()?,
            disks: record.disks()?,
        })
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        // With the devices it becomes the record of a guest that is served.
        record.set_disks(&self.disks)?;
        self.devices
            .iter()
            .try_for_each(|devices| record.set_devices(devices))
    }

    fn all(&self) -> impl Iterator<Item = &VirtioDevice> {
        self.devices.iter().flatten().chain(self.disks.values())
    }
}

impl VirtualGuests {
    /// Gives a guest that has not run a device: the disk of this number of xl's, or one of the operator's. Returns where it is, and it is served.
    ///
    /// # Errors
    /// [`ChangeError`]; the guest has what it had.
    pub(in crate::virtual_devices) fn give(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        guest: &Guest,
        device: &VirtioDevice,
        disk: Option<u32>,
        patience: Duration,
    ) -> Result<At, ChangeError> {
        let domain = turn.domain();
        let record = Record::open(guest.record.clone())?;
        let before = Lists::read(&record)?;
        let known = disk.and_then(|disk| before.disks.get(&disk));
        if let Some(slot) = known.and_then(mmio_slot) {
            // A daemon before this one was killed before it could say so.
            let served = self.wait_until_served(domain, patience);
            if served.is_err()
                && let Some(disk) = disk
            {
                self.take(domain, guest, disk)?;
            }
            return served.map(|()| slot);
        }
        if guest.has_run {
            return Err(ChangeError::Runs);
        }
        if self.watched(domain).is_some() || lock(&self.refused).contains_key(&domain) {
            self.wait_until_served(domain, patience)?;
        }
        let mut wanted = before.clone();
        if wanted.devices.is_none() {
            wanted.devices = Some(settled(&guest.configured)?);
        }
        let all: Vec<_> = wanted.all().chain([device]).collect();
        let (at, device) = settle_last(&all)?;
        if let At::Pci(slot) = at
            && let Some(function) =
                Self::conflict(domain, |theirs| theirs == slot).map_err(ChangeError::Ask)?
        {
            return Err(ChangeError::Qemu(function));
        }
        self.try_out(turn, &device, patience)?;
        // That may have taken a while.
        if !self.may_be_equipped(domain) {
            return Err(ChangeError::Runs);
        }
        match disk {
            Some(disk) => drop(wanted.disks.insert(disk, device)),
            None => wanted.devices.get_or_insert_default().push(device),
        }
        // First, for it has the images open.
        self.end(domain);
        let written = wanted.write(&record).map_err(ChangeError::from);
        let started = written.and_then(|()| Ok(self.start(domain, guest, patience)?));
        if started.is_err() {
            self.restore(domain, guest, &record, &before);
        }
        started.map(|()| at)
    }

    /// Has a guest have what it had.
    fn restore(&self, domain: DomId, guest: &Guest, record: &Record, before: &Lists) {
        let restored = if before.devices.is_none() && before.disks.is_empty() {
            fs::remove_dir_all(&guest.record)
        } else {
            // It was there a moment ago, so it will be again: nobody waits.
            before
                .write(record)
                .and_then(|()| self.resume(domain, guest))
        };
        if let Err(error) = restored {
            error!(
                "domain {domain}: its virtio devices cannot be put back as they were, trying again: {error}"
            );
            self.try_again();
        }
    }

    /// A guest loses the disk of this number of xl's, and its image is free, unless its storage does not answer.
    ///
    /// # Errors
    /// [`ChangeError::Record`].
    pub(super) fn take(&self, domain: DomId, guest: &Guest, disk: u32) -> Result<(), ChangeError> {
        if guest.is_new() {
            return Ok(());
        }
        let record = Record::open(guest.record.clone())?;
        let mut lists = Lists::read(&record)?;
        let Some(gone) = lists.disks.remove(&disk) else {
            return Ok(());
        };
        let end = self.end(domain);
        let written = record.set_disks(&lists.disks);
        let forgotten =
            written.and_then(|()| mmio_slot(&gone).map_or(Ok(()), |at| record.forget(at)));
        if end.is_some() {
            self.resume(domain, guest)?;
        }
        forgotten?;
        if end == Some(End::Quiet) {
            wait_until_free(&gone);
        }
        info!("domain {domain}: disk {disk} is taken away");
        Ok(())
    }

    /// Waits until the session of a guest answers.
    fn wait_until_served(&self, domain: DomId, patience: Duration) -> Result<(), ChangeError> {
        if let Some(refused) = lock(&self.refused).get(&domain) {
            let reason = refused.reason.clone().unwrap_or_default();
            return Err(ChangeError::Others(reason));
        }
        let watched = self.watched(domain);
        let phase = watched.map(|watched| watched.wait_until_served(patience));
        match phase {
            Some(Phase::Serving) => Ok(()),
            Some(Phase::Waiting(why) | Phase::Failed(why)) => Err(ChangeError::Others(why)),
            Some(Phase::Opening) => Err(StartError::TooLong(patience).into()),
            None => Err(ChangeError::Others("nobody serves it".to_owned())),
        }
    }

    /// Opens the image of a disk, and closes it. Storage that does not answer is noticed while the guest's session still has all others
    /// open; whoever waits for it keeps the turn until it does, so they are not many.
    fn try_out(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        device: &VirtioDevice,
        patience: Duration,
    ) -> Result<(), StartError> {
        let Model::Blk(disk) = &device.model else {
            return Ok(());
        };
        let (sender, opened) = mpsc::channel();
        let (path, read_only, direct) = (disk.path.to_path_buf(), disk.read_only, disk.direct);
        let (guests, turn) = (Arc::clone(self), Arc::clone(turn));
        let open = move || {
            // Who has asked may have given up.
            let _ = sender.send(Image::open(&path, read_only, direct).map(drop));
            guests.let_go(turn);
        };
        thread::Builder::new()
            .name("virtio image".into())
            .spawn(open)
            .map_err(StartError::Host)?;
        match opened.recv_timeout(patience) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(StartError::Failed(chain(&error))),
            Err(_) => Err(StartError::TooLong(patience)),
        }
    }
}

fn mmio_slot(device: &VirtioDevice) -> Option<At> {
    match device.place {
        Place::Mmio { slot, .. } => slot.map(At::Mmio),
        Place::Pci { .. } => None,
    }
}

/// What the kernel has done for us it may let go of a moment later, and until then the image is locked. Whoever hears that the disk is gone may
/// use the image for something else.
fn wait_until_free(disk: &VirtioDevice) {
    let path = match &disk.model {
        Model::Blk(disk) if !disk.read_only => disk.path.to_path_buf(),
        _ => return,
    };
    let (sender, free) = mpsc::channel::<()>();
    let image = path.clone();
    // Its storage may not answer any more, which is a reason to take it away.
    let look = move || {
        let begin = Instant::now();
        while let Err(ImageError::Locked { .. }) = Image::open(&image, false, false)
            && begin.elapsed() < LAST_REQUESTS
        {
            thread::sleep(LOOK);
        }
        drop(sender);
    };
    let thread = thread::Builder::new().name("virtio image".into());
    let waited = thread.spawn(look).map(|_| free.recv_timeout(LAST_REQUESTS));
    if !matches!(waited, Ok(Err(RecvTimeoutError::Disconnected))) {
        error!(
            "{} is still in use, or its storage does not answer",
            path.display()
        );
    }
}
