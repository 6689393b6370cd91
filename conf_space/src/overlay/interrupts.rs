//! The control words of MSI and MSI-X.
//!
//! PV guests turn MSI on by asking for it through the shared page, and the daemon then sets the
//! bits. Only a stub domain, whose device model does it through the configuration space, may write
//! them itself, if its policy says so. Xen forwards writes of exactly two bytes.

use super::{OpError, Operation};
use crate::access::ConfigSpace;
use crate::registers::{msi, msix};

/// A control word, and what a guest with the permission may do to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ControlWord {
    offset: u16,
    enable: u16,
    changeable: u16,
}

impl ControlWord {
    pub(super) const fn msi(base: u16) -> Self {
        let enable = msi::control::ENABLE;
        Self {
            offset: msi::CONTROL.at(base).offset,
            enable,
            changeable: enable,
        }
    }

    pub(super) const fn msix(base: u16) -> Self {
        let enable = msix::control::ENABLE;
        let changeable = enable | msix::control::FUNCTION_MASK;
        Self {
            offset: msix::CONTROL.at(base).offset,
            enable,
            changeable,
        }
    }

    pub(super) fn write<C: ConfigSpace + ?Sized>(
        &self,
        operation: &Operation<'_, C>,
        value: u16,
    ) -> Result<(), OpError> {
        let hardware = operation.read_word(self.offset)?;
        let changed = hardware ^ value;
        if changed == 0 {
            return Ok(());
        }
        if !operation.policy.allow_interrupt_control || changed & !self.changeable != 0 {
            return Err(OpError::AccessDenied);
        }
        if value & self.enable != 0 && self.is_other_on(operation)? {
            return Err(OpError::AccessDenied);
        }
        operation.write_word(self.offset, value)
    }

    /// Whether the function uses the other kind of message interrupts. No function may use both
    /// (PCI Express Base Specification 6.0, section 6.1.4).
    fn is_other_on<C: ConfigSpace + ?Sized>(
        &self,
        operation: &Operation<'_, C>,
    ) -> Result<bool, OpError> {
        for other in [operation.claims.msi, operation.claims.msix]
            .into_iter()
            .flatten()
        {
            if other != *self && operation.read_word(other.offset)? & other.enable != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
