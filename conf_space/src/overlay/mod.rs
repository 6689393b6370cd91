//! What a guest sees and may change of one function's configuration space.

mod state;

use thiserror::Error;

pub use state::OverlayState;

use crate::access::{AccessError, ConfigSize, ConfigSpace, Width};
use crate::address::Bdf;
use crate::resource::Resource;

/// What the host knows of a function, and its registers may not say: those of a virtual function
/// least of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Physical address.
    pub bdf: Bdf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Whether it is a virtual function of an SR-IOV device.
    pub is_virtual_function: bool,
    /// What the guest reads as interrupt line: the low 8 bits of the GSI that the toolstack maps
    /// for it, 0 if there is none.
    pub interrupt_line: u8,
    /// What BARs 0 to 5 and, last, the expansion ROM decode. The upper half of a 64-bit BAR is
    /// [`Resource::ABSENT`].
    pub resources: [Resource; 7],
    /// Size of its configuration space.
    pub config_size: ConfigSize,
}

/// What the operator lets a guest do beyond the ordinary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// Writes that the overlay would drop reach the device.
    pub permissive: bool,
    /// The guest may set the MSI, MSI-X and INTx enable bits itself; for stub domains.
    pub allow_interrupt_control: bool,
}

/// A function that cannot be given to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BuildError {
    /// It is a bridge.
    #[error(
        "{bdf} is a bridge (header type {header_type}) and cannot be given to a guest; give the devices behind it"
    )]
    Bridge {
        /// The function.
        bdf: Bdf,
        /// Layout of its header: 1 PCI-to-PCI, 2 CardBus.
        header_type: u8,
    },
    /// Its header has a layout that nobody knows.
    #[error("{bdf} has the unknown header type {header_type:#04x}; the device is broken")]
    UnknownHeader {
        /// The function.
        bdf: Bdf,
        /// The layout.
        header_type: u8,
    },
    /// It reads as all ones.
    #[error(
        "{bdf} does not answer (its header reads as all ones); reset its slot or power-cycle the machine"
    )]
    NoAnswer {
        /// The function.
        bdf: Bdf,
    },
    /// Its configuration space cannot be reached.
    #[error("cannot read the configuration space of {bdf}")]
    Access {
        /// The function.
        bdf: Bdf,
        /// Why.
        #[source]
        source: AccessError,
    },
}

/// Why a guest's operation fails. [`OpError::code`] is what the guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpError {
    /// The device is gone.
    #[error("the device is gone")]
    DeviceNotFound,
    /// Offset or size are not those of an access to this function.
    #[error("no aligned access of 1, 2 or 4 bytes within the configuration space")]
    InvalidOffset,
    /// The guest may not do this.
    #[error("the guest may not write this value")]
    AccessDenied,
    /// The hardware access failed.
    #[error("the hardware access failed with errno {errno}")]
    Failed {
        /// The positive errno.
        errno: i32,
    },
}

impl OpError {
    /// The number in `op.err` of the shared page (Xen `io/pciif.h`, `XEN_PCI_ERR_*`).
    pub const fn code(self) -> i32 {
        match self {
            Self::DeviceNotFound => -1,
            Self::InvalidOffset => -2,
            Self::AccessDenied => -3,
            Self::Failed { .. } => -5,
        }
    }
}

impl From<AccessError> for OpError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Gone => Self::DeviceNotFound,
            AccessError::Denied => Self::AccessDenied,
            AccessError::Failed { errno } => Self::Failed { errno },
        }
    }
}

/// What a write did, beyond the configuration space, that its session must act on before it
/// answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effect {
    /// The guest has switched the device on: decode is now on in hardware.
    pub decode_enabled: bool,
    /// The device has changed its power state.
    pub power: Option<PowerChange>,
    /// The lowest offset of bytes that the guest wrote and the overlay dropped.
    pub dropped: Option<u16>,
}

/// Power state of a function (PCI Power Management 1.2, section 5.4.1). Orders from most to least
/// power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PowerState {
    /// Fully on.
    D0,
    /// Light sleep.
    D1,
    /// Deeper sleep.
    D2,
    /// Off but for its configuration space.
    D3Hot,
}

/// A change of power state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerChange {
    /// State before.
    pub from: PowerState,
    /// State now.
    pub to: PowerState,
    /// The device has lost its configuration on the way (D3hot to D0 without No_Soft_Reset):
    /// configuration and MSI are to be restored.
    pub configuration_lost: bool,
}

/// What a guest sees and may change of one function.
#[derive(Debug)]
pub struct Overlay {
    identity: Identity,
    state: OverlayState,
}

impl Overlay {
    /// Builds the overlay of a function.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn new<C: ConfigSpace + ?Sized>(
        identity: &Identity,
        _space: &C,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            identity: identity.clone(),
            state: OverlayState::default(),
        })
    }

    /// What the guest reads. `offset` and `size` are the guest's.
    ///
    /// # Errors
    /// See [`OpError`].
    pub fn read<C: ConfigSpace + ?Sized>(
        &self,
        space: &C,
        offset: i32,
        size: i32,
    ) -> Result<u32, OpError> {
        let (offset, width) = self.check(offset, size)?;
        Ok(space.read(offset, width)?)
    }

    /// Writes what the guest may write. `offset`, `size` and `value` are the guest's.
    ///
    /// # Errors
    /// See [`OpError`].
    pub fn write<C: ConfigSpace + ?Sized>(
        &mut self,
        _space: &C,
        offset: i32,
        size: i32,
        _value: u32,
        _policy: &Policy,
    ) -> Result<Effect, OpError> {
        let (offset, _) = self.check(offset, size)?;
        Ok(Effect {
            dropped: Some(offset),
            ..Effect::default()
        })
    }

    /// All that this guest's writes have left behind in the overlay.
    pub const fn state(&self) -> OverlayState {
        self.state
    }

    /// Takes on a state from before a restart of the daemon.
    pub const fn set_state(&mut self, state: OverlayState) {
        self.state = state;
    }

    /// Forgets what the guest wrote; the next guest finds the overlay as new.
    pub fn release(&mut self) {
        self.state = OverlayState::default();
    }

    /// The function it belongs to.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    fn check(&self, offset: i32, size: i32) -> Result<(u16, Width), OpError> {
        let width = u32::try_from(size)
            .ok()
            .and_then(Width::from_bytes)
            .ok_or(OpError::InvalidOffset)?;
        let offset = u16::try_from(offset).map_err(|_| OpError::InvalidOffset)?;
        if offset & width.bytes().wrapping_sub(1) != 0
            || offset >= self.identity.config_size.bytes()
        {
            return Err(OpError::InvalidOffset);
        }
        Ok((offset, width))
    }
}
