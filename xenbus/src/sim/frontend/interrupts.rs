//! Interrupts of functions: INTx, MSI and MSI-X.

use std::time::Duration;

use super::operations::operation;
use super::scan::{COMMAND, COMMAND_INTX_OFF, INTERRUPT_LINE};
use super::{Frontend, FrontendError};
use crate::pciif::{Command, MsixEntry, PciOp};
use crate::sim::guest::GuestPort;
use crate::sim::hardware::{CAPABILITY_MSI, CAPABILITY_MSIX};
use crate::types::{PciDevice, Pirq};

/// Bits of MSI's and MSI-X's control words.
const MSI_ENABLE: u32 = 1 << 0;
const MSIX_ENABLE: u32 = 1 << 15;
const MSIX_MASK_ALL: u32 = 1 << 14;

/// The interrupts that a function has at present: their ports.
#[derive(Debug)]
pub(super) enum Interrupts {
    None,
    Line(GuestPort),
    Msi(Vec<GuestPort>),
    Msix(Vec<GuestPort>),
}

impl Interrupts {
    fn ports(&self) -> &[GuestPort] {
        match self {
            Self::None => &[],
            Self::Line(port) => std::slice::from_ref(port),
            Self::Msi(ports) | Self::Msix(ports) => ports,
        }
    }
}

/// PIRQs in a row.
fn block(first: u32, count: u32) -> Vec<Pirq> {
    (first..first.saturating_add(count)).map(Pirq).collect()
}

impl Frontend {
    fn control_offset(
        &self,
        address: PciDevice,
        id: u8,
        what: &'static str,
    ) -> Result<u16, FrontendError> {
        let offset = self
            .functions
            .get(&address)
            .and_then(|function| function.capability(id));
        offset
            .map(|offset| offset.saturating_add(2))
            .ok_or(FrontendError::Missing {
                function: address,
                what,
            })
    }

    /// Changes bits of a control word, as Linux does around the operations. A backend that keeps them to itself refuses or ignores it.
    fn change_control(
        &mut self,
        address: PciDevice,
        offset: u16,
        clear: u32,
        set: u32,
    ) -> Result<(), FrontendError> {
        let control = self.conf_read(address, offset, 2)?;
        self.conf_try_write(address, offset, 2, control & !clear | set)
    }

    fn intx(&mut self, address: PciDevice, on: bool) -> Result<(), FrontendError> {
        let command = self.conf_read(address, COMMAND, 2)?;
        let new = if on {
            command & !COMMAND_INTX_OFF
        } else {
            command | COMMAND_INTX_OFF
        };
        if new != command {
            self.conf_try_write(address, COMMAND, 2, new)?;
        }
        Ok(())
    }

    fn bind(&self, pirqs: &[Pirq]) -> Result<Vec<GuestPort>, FrontendError> {
        Ok(pirqs
            .iter()
            .map(|pirq| self.platform.bind_pirq(*pirq))
            .collect::<Result<_, _>>()?)
    }

    fn keep(&mut self, address: PciDevice, interrupts: Interrupts) {
        if let Some(function) = self.functions.get_mut(&address) {
            function.interrupts = interrupts;
        }
    }

    fn supports_msi(&self, function: PciDevice) -> Result<(), FrontendError> {
        if self.variant.traits().msi {
            return Ok(());
        }
        Err(FrontendError::Missing {
            function,
            what: "MSI that this system's frontend could use",
        })
    }

    /// Enables MSI with one vector and binds its PIRQ.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::Missing`], [`FrontendError::Xen`].
    pub fn enable_msi(&mut self, address: PciDevice) -> Result<Pirq, FrontendError> {
        self.enable_msi_vectors(address, Command::EnableMsi, 1)
            .map(|pirqs| pirqs.first().copied().unwrap_or(Pirq(0)))
    }

    /// Enables MSI with several vectors and binds their PIRQs, by the operation that Xen's header has and no known frontend uses.
    ///
    /// # Errors
    /// As [`Frontend::enable_msi`].
    pub fn enable_multi_msi(
        &mut self,
        address: PciDevice,
        count: u32,
    ) -> Result<Vec<Pirq>, FrontendError> {
        self.enable_msi_vectors(address, Command::EnableMultiMsi, count)
    }

    fn enable_msi_vectors(
        &mut self,
        address: PciDevice,
        command: Command,
        count: u32,
    ) -> Result<Vec<Pirq>, FrontendError> {
        self.supports_msi(address)?;
        let control = self.control_offset(address, CAPABILITY_MSI, "MSI")?;
        self.change_control(address, control, MSI_ENABLE, 0)?;
        let function = self.address(address)?;
        let info = if command == Command::EnableMultiMsi {
            count
        } else {
            0
        };
        let answer = self.perform(
            command,
            &PciOp {
                info,
                ..operation(command, function)
            },
        )?;
        let pirqs = block(answer.value, count);
        let ports = self.bind(&pirqs)?;
        self.keep(address, Interrupts::Msi(ports));
        self.intx(address, false)?;
        self.change_control(address, control, 0, MSI_ENABLE)?;
        Ok(pirqs)
    }

    /// Enables MSI-X with these entries of the table and binds their PIRQs.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::Missing`], [`FrontendError::Xen`].
    pub fn enable_msix(
        &mut self,
        address: PciDevice,
        entries: &[u16],
    ) -> Result<Vec<Pirq>, FrontendError> {
        self.supports_msi(address)?;
        let control = self.control_offset(address, CAPABILITY_MSIX, "MSI-X")?;
        self.change_control(address, control, 0, MSIX_ENABLE | MSIX_MASK_ALL)?;
        let function = self.address(address)?;
        let value = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let mut op = PciOp {
            value,
            ..operation(Command::EnableMsix, function)
        };
        for (slot, entry) in op.msix_entries.iter_mut().zip(entries) {
            *slot = MsixEntry {
                vector: u16::MAX,
                entry: *entry,
            };
        }
        let answer = self.perform(Command::EnableMsix, &op)?;
        let pirqs: Vec<_> = answer
            .msix_entries
            .iter()
            .take(entries.len())
            .map(|entry| Pirq(entry.vector.into()))
            .collect();
        let ports = self.bind(&pirqs)?;
        self.keep(address, Interrupts::Msix(ports));
        self.intx(address, false)?;
        self.change_control(address, control, MSIX_MASK_ALL, 0)?;
        Ok(pirqs)
    }

    /// Binds the PIRQ of the function's interrupt line: its number is what the line register says.
    ///
    /// # Errors
    /// [`FrontendError::Missing`] without a pin, [`FrontendError::Xen`].
    pub fn enable_intx(&mut self, address: PciDevice) -> Result<Pirq, FrontendError> {
        if self
            .functions
            .get(&address)
            .is_none_or(|function| function.interrupt_pin == 0)
        {
            return Err(FrontendError::Missing {
                function: address,
                what: "interrupt pin",
            });
        }
        let pirq = Pirq(self.conf_read(address, INTERRUPT_LINE, 1)?);
        let port = self.platform.bind_pirq(pirq)?;
        self.keep(address, Interrupts::Line(port));
        Ok(pirq)
    }

    /// Waits for an interrupt: of the `index`th vector that was enabled, 0 for INTx. False when none came in time.
    ///
    /// # Errors
    /// [`FrontendError::Missing`] when there is no such interrupt.
    pub fn wait_for_interrupt(
        &self,
        address: PciDevice,
        index: usize,
        timeout: Duration,
    ) -> Result<bool, FrontendError> {
        let ports = self
            .functions
            .get(&address)
            .map(|function| function.interrupts.ports())
            .unwrap_or_default();
        let port = ports.get(index).ok_or(FrontendError::Missing {
            function: address,
            what: "such interrupt",
        })?;
        Ok(port.wait(timeout)?)
    }

    /// Disables whatever interrupts the function has, the way the variant does, and closes their ports.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::NoAnswer`].
    pub fn release_interrupts(&mut self, address: PciDevice) -> Result<(), FrontendError> {
        let Some(function) = self.functions.get_mut(&address) else {
            return Ok(());
        };
        let interrupts = std::mem::replace(&mut function.interrupts, Interrupts::None);
        let result = match interrupts {
            Interrupts::None | Interrupts::Line(_) => Ok(()),
            Interrupts::Msi(_) => self.disable(
                address,
                CAPABILITY_MSI,
                "MSI",
                MSI_ENABLE,
                Command::DisableMsi,
            ),
            Interrupts::Msix(_) => {
                let as_such = self.variant.traits().disables_msix_as_such;
                let command = if as_such {
                    Command::DisableMsix
                } else {
                    Command::DisableMsi
                };
                self.disable(address, CAPABILITY_MSIX, "MSI-X", MSIX_ENABLE, command)
            }
        };
        for port in interrupts.ports() {
            self.platform.close_port(port.number())?;
        }
        result
    }

    fn disable(
        &mut self,
        address: PciDevice,
        id: u8,
        what: &'static str,
        enable: u32,
        command: Command,
    ) -> Result<(), FrontendError> {
        let control = self.control_offset(address, id, what)?;
        self.change_control(address, control, enable, 0)?;
        self.intx(address, true)?;
        let function = self.address(address)?;
        self.perform(command, &operation(command, function))
            .map(drop)
    }
}
