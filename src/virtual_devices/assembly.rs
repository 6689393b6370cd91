//! From the configuration to devices in their slots.

use std::io;
use std::sync::Arc;

use conf_space::emulated::BuildError;
use virtio::Features;
use virtio::device::Device;
use virtio::ioreq::{DomainInterrupts, Placed};
use virtio::late::Late;
use virtio::memory::GuestRam;
use virtio::pci::VirtioFunction;
use virtio::transport::mmio::{MmioDevice, PlugError};
use virtio::transport::{Parts, RING_FEATURES};
use xenbus::{DomId, PciDevice, Xen};

use super::backends::{self, Backend, BackendError, Terminal};
use super::kept::KeptFds;
use super::missing::Missing;
use super::mmio;
use super::place::{At, PlaceError, Seat, place};
use super::record::Record;
use super::session::Setup;
use crate::config::VirtioDevice;
use crate::text::chain;

/// A guest's devices cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// They cannot all be where they should.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It does not fit into its slot of virtio-mmio.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// Nobody wants them any more.
    #[error("its session is to end")]
    Stopped,
    /// What a device is made of is not there.
    #[error("the {kind} device in {at} cannot be made")]
    Backend {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        at: At,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// Its record cannot be kept.
    #[error("the {kind} device in {at} has no record")]
    Record {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        at: At,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not fit into a PCI function.
    #[error("the {kind} device in {at} does not fit into a PCI function")]
    Function {
        /// What it is.
        kind: &'static str,
        /// Where it is to be.
        at: At,
        /// Why.
        #[source]
        source: BuildError,
    },
}

/// A guest's devices, and what of them there is to tell of.
pub(super) struct Assembled {
    pub targets: Vec<Placed>,
    pub terminals: Vec<(At, Terminal)>,
}

/// A device that is open at the host's end, and nowhere else.
pub(super) struct Opened {
    seat: Seat,
    kind: &'static str,
    features: Features,
    backend: Backend,
}

/// Opens what a guest's devices are made of: all of it or nothing, of a guest that `runs` as much as there is.
///
/// # Errors
/// [`AssemblyError`].
pub(super) fn open_backends(
    setup: &Setup,
    runs: bool,
    devices: &[VirtioDevice],
    is_wanted: impl Fn() -> bool,
) -> Result<(Vec<Opened>, Vec<Missing>), AssemblyError> {
    let mut missing = Vec::new();
    let opened = place(devices)?.into_iter().map(|(seat, configured)| {
        // Another session may be at it by now.
        if !is_wanted() {
            return Err(AssemblyError::Stopped);
        }
        let model = &configured.model;
        let (kind, at) = (model.name(), seat.at());
        let failed = |source| AssemblyError::Backend { kind, at, source };
        let kept = KeptFds::new(&setup.fds, setup.domain, &setup.record, at);
        let backend = match backends::open(model, setup.domain, &setup.name, &kept) {
            Err(error) if runs => {
                let stand_in = backends::stand_in(model, &setup.name, at).map_err(failed)?;
                let (late, supply) = Late::new(stand_in);
                missing.push(Missing {
                    at,
                    model: model.clone(),
                    supply,
                    why: chain(&error),
                });
                (Box::new(late) as Box<dyn Device>).into()
            }
            other => other.map_err(failed)?,
        };
        let mut features = RING_FEATURES;
        features.set(Features::RING_PACKED, configured.packed);
        Ok(Opened {
            seat,
            kind,
            features,
            backend,
        })
    });
    let opened = opened.collect::<Result<_, AssemblyError>>()?;
    Ok((opened, missing))
}

/// Makes a guest's devices. They come to life where the guest had them at work before a restart.
///
/// # Errors
/// [`AssemblyError`].
pub(super) fn assemble(
    xen: &Arc<dyn Xen>,
    domain: DomId,
    ram: &Arc<GuestRam>,
    record: &Record,
    opened: Vec<Opened>,
) -> Result<Assembled, AssemblyError> {
    let mut assembled = Assembled {
        targets: Vec::new(),
        terminals: Vec::new(),
    };
    let mut board = mmio::board();
    for opened in opened {
        let Opened {
            seat,
            kind,
            features,
            backend,
        } = opened;
        let at = seat.at();
        let device = backend.device;
        let notes = record
            .device(at, &*device)
            .map_err(|source| AssemblyError::Record { kind, at, source })?;
        let interrupts = DomainInterrupts::new(Arc::clone(xen) as _, domain, seat.line());
        let parts = Parts {
            name: format!("domain {domain}, {kind} in {at}"),
            device,
            features,
            ram: Arc::clone(ram),
            sink: Arc::new(interrupts),
            notes,
        };
        match seat {
            Seat::Pci { slot, shape } => {
                let function = VirtioFunction::new(parts, &shape)
                    .map_err(|source| AssemblyError::Function { kind, at, source })?;
                let address = PciDevice {
                    segment: 0,
                    bus: 0,
                    devfn: slot.number() << 3,
                };
                assembled.targets.push(Placed {
                    function: Some(address),
                    target: Box::new(function),
                });
            }
            Seat::Mmio { slot, version } => {
                board.plug(slot.number().into(), MmioDevice::new(parts, version))?;
            }
        }
        let terminals = backend.terminals.into_iter();
        assembled
            .terminals
            .extend(terminals.map(|terminal| (at, terminal)));
    }
    if board.slots().any(|slot| slot.is_some()) {
        assembled.targets.push(Placed {
            function: None,
            target: Box::new(board),
        });
    }
    Ok(assembled)
}
