//! The message-signalled interrupts of a hidden device: the rules of [`msi`] with our record as their ledger and Xen behind them.

use std::sync::{Arc, PoisonError};

use conf_space::AccessError;
use log::{error, info};
use msi::{CleanupError, Operations, Pirqs, Recovered, Refusal, Vectors, memory_decode};
use xenbus::pciif::MsixEntry;
use xenbus::{DomId, MsiRequest, Pirq, Xen, XenError};

use super::devices::{Device, Line};
use super::record::Phase;
use crate::text::chain;

/// A device in a domain, as Xen maps interrupts.
struct Mapping<'a> {
    xen: &'a dyn Xen,
    domain: DomId,
    device: &'a Device,
}

impl Pirqs for Mapping<'_> {
    fn map(&self, request: MsiRequest) -> Result<Pirq, XenError> {
        self.xen.map_msi(self.domain, self.device.xen(), request)
    }

    fn unmap(&self, pirq: Pirq) -> Result<(), XenError> {
        self.xen.unmap_pirq(self.domain, pirq)
    }
}

/// A guest's hold on its device's interrupts.
#[derive(Debug)]
pub struct Interrupts {
    device: Arc<Device>,
    domain: DomId,
    xen: Arc<dyn Xen>,
}

impl Interrupts {
    /// Of a device that is assigned to `domain`.
    pub fn new(device: Arc<Device>, domain: DomId, xen: Arc<dyn Xen>) -> Self {
        Self {
            device,
            domain,
            xen,
        }
    }

    /// Enables MSI with `count` vectors; the PIRQs after the first follow it.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn enable_msi(&self, count: u32) -> Result<Pirq, Refusal> {
        with(&self.device, &*self.xen, self.domain, |operations| {
            operations.enable_msi(count)
        })
    }

    /// Enables MSI-X for the first `count` of `entries`.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn enable_msix(&self, entries: &[MsixEntry], count: u32) -> Result<Vectors, Refusal> {
        let decode =
            || memory_decode(&**self.device.physical.as_ref().unwrap_or(&self.device.config));
        with(&self.device, &*self.xen, self.domain, |operations| {
            operations.enable_msix(entries, count, decode)
        })
    }

    /// Disables whichever is on.
    ///
    /// # Errors
    /// [`CleanupError`]; it is off all the same.
    pub fn disable(&self) -> Result<(), CleanupError> {
        with(&self.device, &*self.xen, self.domain, |operations| {
            operations.disable_msi()
        })
    }

    /// The PIRQ of the legacy interrupt, which the device has while neither is on; 0: none.
    pub fn legacy(&self) -> u32 {
        match self.device.line() {
            Line::Usable => self.device.description.irq,
            Line::Refused => 0,
        }
    }

    /// Puts back what the device lost.
    pub fn restore(&self) {
        restore(&self.device, &*self.xen);
    }
}

fn with<T>(
    device: &Device,
    xen: &dyn Xen,
    domain: DomId,
    act: impl FnOnce(Operations<'_>) -> T,
) -> T {
    // A reset asked for by the toolstack may put interrupts back at this moment.
    let _alone = device
        .interrupts_lock
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let mapping = Mapping {
        xen,
        domain,
        device,
    };
    act(device
        .interrupts
        .operate(&*device.config, &mapping, device.record.msi()))
}

/// Puts MSI and MSI-X back into a device that was reset under its guest: first what Xen holds, then the enable bits.
pub fn restore(device: &Device, xen: &dyn Xen) {
    let Some(owner) = device
        .record
        .owner()
        .filter(|_| device.record.phase() == Some(Phase::Assigned))
    else {
        return;
    };
    if msi::Held::read(device.record.msi()).is_none() {
        return;
    }
    if let Err(error) = xen.restore_msi(device.xen()) {
        error!(
            "{}: after its reset its interrupts are lost until its driver is loaded anew: {}",
            device.bdf,
            chain(&error)
        );
    }
    let restored: Result<_, AccessError> = with(device, xen, owner.domain, |operations| {
        operations.reprogram()
    });
    if let Err(error) = restored {
        error!(
            "{}: after its reset its interrupts stay off until its driver is loaded anew: {}",
            device.bdf,
            chain(&error)
        );
    }
}

/// Takes all interrupts from the guest that has, or had, the device.
pub fn release(device: &Device, xen: &dyn Xen) {
    let Some(owner) = device.record.owner() else {
        return;
    };
    if let Err(error) = with(device, xen, owner.domain, |operations| operations.release()) {
        error!("{}: {}", device.bdf, chain(&error));
    }
}

/// After a restart: keeps what is on, undoes what was half done. `others` are all hidden devices, `lines` the legacy interrupts of all devices
/// of the host: the toolstack may have mapped any of them for the guest (`irqs=` of xl.cfg), and a PV guest's PIRQ has the line's number.
/// Messages have PIRQs above all lines.
///
/// # Errors
/// [`CleanupError`].
pub fn recover<'a>(
    device: &Device,
    xen: &dyn Xen,
    others: &[Arc<Device>],
    lines: impl Fn() -> &'a [u32],
) -> Result<(), CleanupError> {
    /// Legacy interrupts of the ISA bus are below, and more PIRQs than this no Xen gives a guest.
    const CANDIDATES: std::ops::Range<u32> = 16..4096;
    let Some(owner) = device.record.owner() else {
        return Ok(());
    };
    let of_the_same_guest = || {
        others.iter().filter(|other| {
            other
                .record
                .owner()
                .is_some_and(|other| other.domain == owner.domain)
        })
    };
    let claimed = |pirq: Pirq| {
        lines().contains(&pirq.0)
            || of_the_same_guest()
                .any(|other| msi::Held::pirqs(other.record.msi()).any(|held| held == pirq))
    };
    match with(device, xen, owner.domain, |operations| {
        operations.recover(CANDIDATES.map(Pirq), claimed)
    })? {
        Recovered::Nothing | Recovered::Enabled(_) => {}
        Recovered::Undone { swept } => {
            info!(
                "{}: an interrupted change of its interrupts was undone ({swept} unknown PIRQs taken back); its guest asks again",
                device.bdf
            );
        }
    }
    Ok(())
}
