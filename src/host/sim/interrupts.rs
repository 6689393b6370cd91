//! A function's interrupts, from the device's side.

use conf_space::ConfigSpace;
use conf_space::registers::header::{self, command};
use conf_space::registers::{Register, msi, msix};
use xenbus::Gsi;
use xenbus::sim::{Machine, MsiTarget};

use super::function::Function;
use super::lock;

/// An entry of the MSI-X table (PCIe 7.7.2).
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
    /// Its bit in the pending bit array.
    pub pending: bool,
}

/// What the device is to send, and what it has raised.
#[derive(Debug)]
pub(super) struct Messages {
    pub table: Vec<Entry>,
    /// The device wants its line raised.
    pub line: bool,
}

impl Messages {
    /// As after power-on: everything masked.
    pub fn new(table_length: usize) -> Self {
        let entry = Entry {
            address: 0,
            data: 0,
            masked: true,
            pending: false,
        };
        Self {
            table: vec![entry; table_length],
            line: false,
        }
    }
}

/// Bit of the status register: the device wants its line raised, whether or not it may (PCIe
/// 7.5.1.1.4).
const INTERRUPT_STATUS: u32 = 1 << 3;

impl Function {
    /// Sends a message or raises the line. True when a guest was interrupted.
    pub fn raise(&self, machine: &Machine, vector: u16) -> bool {
        if self.is_gone() || self.is_asleep() {
            return false;
        }
        if let Some(control) = self.msix_control()
            && control & msix::control::ENABLE != 0
        {
            return self.send_msix(machine, vector, control);
        }
        if let Some((base, control)) = self.msi_control()
            && control & msi::control::ENABLE != 0
        {
            return self.send_msi(machine, vector, base, control);
        }
        self.set_line(true);
        self.drive_line(machine)
    }

    /// Lowers the line.
    pub fn lower(&self) {
        self.set_line(false);
    }

    fn set_line(&self, raised: bool) {
        if self.register(0, &header::INTERRUPT_PIN) == 0 {
            return;
        }
        lock(&self.messages).line = raised;
        let status = u32::from(self.register(0, &header::STATUS)) & !INTERRUPT_STATUS;
        let bit = if raised { INTERRUPT_STATUS } else { 0 };
        self.set_register(0, &header::STATUS, status | bit);
    }

    fn drive_line(&self, machine: &Machine) -> bool {
        lock(&self.messages).line
            && self.command() & command::INTX_DISABLE == 0
            && machine.raise_gsi(Gsi(u32::from(self.fixed.gsi))) != 0
    }

    /// A message is a write to memory like any other, so the device must be a bus master.
    fn is_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }

    fn send_msix(&self, machine: &Machine, vector: u16, control: u16) -> bool {
        let message = {
            let mut messages = lock(&self.messages);
            let Some(entry) = messages.table.get_mut(usize::from(vector)) else {
                return false;
            };
            entry.pending = entry.masked || control & msix::control::FUNCTION_MASK != 0;
            (!entry.pending && self.is_master()).then_some((entry.address, entry.data))
        };
        message.is_some_and(|(address, data)| machine.deliver_msi(address, data))
    }

    fn send_msi(&self, machine: &Machine, vector: u16, base: u16, control: u16) -> bool {
        let low = u32::from(msi::used_vectors(control)).wrapping_sub(1);
        // A device with fewer vectors than it wanted shares them.
        let vector = u32::from(vector) & low;
        let layout = Layout::of(control);
        if layout
            .mask
            .is_some_and(|mask| self.double_word(base, mask) & 1u32.wrapping_shl(vector) != 0)
            || !self.is_master()
        {
            return false;
        }
        let high = layout
            .address_high
            .map_or(0, |register| self.double_word(base, register));
        let address = u64::from(high) << 32 | u64::from(self.double_word(base, &msi::ADDRESS));
        let data = u32::from(self.register(base, layout.data)) & !low | vector;
        machine.deliver_msi(address, data)
    }

    fn double_word(&self, base: u16, register: &Register) -> u32 {
        self.space
            .read(base.wrapping_add(register.offset), register.width)
            .unwrap_or(0)
    }

    /// Raises the line if that waited for INTx to be allowed.
    pub fn intx_allowed(&self, machine: &Machine) {
        self.drive_line(machine);
    }

    /// Sends what has waited for a mask to go.
    pub fn send_pending(&self, machine: &Machine) {
        let control = self.msix_control().unwrap_or(0);
        if control & msix::control::ENABLE != 0 && control & msix::control::FUNCTION_MASK == 0 {
            let pending: Vec<u16> = (0u16..)
                .zip(&lock(&self.messages).table)
                .filter(|(_, entry)| entry.pending && !entry.masked)
                .map(|(vector, _)| vector)
                .collect();
            for vector in pending {
                self.send_msix(machine, vector, control);
            }
        }
    }

    /// Xen programs a message.
    pub fn program(&self, machine: &Machine, target: MsiTarget) {
        let Some(vector) = target.entry else {
            if let Some((base, control)) = self.msi_control() {
                self.set_msi(base, control, target.address, target.data);
            }
            return;
        };
        if let Some(entry) = lock(&self.messages).table.get_mut(usize::from(vector)) {
            entry.address = target.address;
            entry.data = target.data;
            entry.masked = false;
        }
        self.send_pending(machine);
    }

    /// Xen takes a message back.
    pub fn clear(&self, entry: Option<u16>) {
        let Some(vector) = entry else {
            if let Some((base, control)) = self.msi_control() {
                self.set_msi(base, control, 0, 0);
            }
            return;
        };
        if let Some(entry) = lock(&self.messages).table.get_mut(usize::from(vector)) {
            entry.masked = true;
            entry.pending = false;
        }
    }

    fn set_msi(&self, base: u16, control: u16, address: u64, data: u32) {
        let layout = Layout::of(control);
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        self.set_register(base, &msi::ADDRESS, u32::from_le_bytes([a, b, c, d]));
        if let Some(register) = layout.address_high {
            self.set_register(base, register, u32::from_le_bytes([e, f, g, h]));
        }
        self.set_register(base, layout.data, data);
    }
}

/// Where the MSI capability has its registers.
struct Layout {
    address_high: Option<&'static Register>,
    data: &'static Register,
    mask: Option<&'static Register>,
}

impl Layout {
    fn of(control: u16) -> Self {
        let wide = control & msi::control::ADDRESS_64 != 0;
        let maskable = control & msi::control::MASKABLE != 0;
        Self {
            address_high: wide.then_some(&msi::ADDRESS_HIGH),
            data: if wide { &msi::DATA_64 } else { &msi::DATA_32 },
            mask: maskable.then_some(if wide { &msi::MASK_64 } else { &msi::MASK_32 }),
        }
    }
}
