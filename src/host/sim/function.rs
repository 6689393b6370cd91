//! One function's hardware: its configuration space, its power states and its reset.

use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use conf_space::memory::MemorySpace;
use conf_space::overlay::Identity;
use conf_space::registers::{Register, header, msi, msix, power_management};
use conf_space::selector::SlotPath;
use conf_space::{AccessError, Bdf, ConfigSpace, Width};
use xenbus::DomId;
use xenbus::sim::Machine;

use super::interrupts::Messages;
use super::lock;
use super::memory::Model;
use super::virtual_functions::Sriov;

/// What never changes.
#[derive(Debug)]
pub(super) struct Fixed {
    pub identity: Identity,
    pub subsystem: (u16, u16),
    pub path: SlotPath,
    pub class: u32,
    /// The physical function, and the number there, of a virtual one.
    pub virtual_of: Option<(Bdf, u16)>,
    /// What virtual functions it can have, of a physical one.
    pub sriov: Option<Sriov>,
    /// The line that the interrupt pin is wired to; 0: none.
    pub gsi: u8,
    pub reset_methods: Vec<String>,
    /// The driver in dom0 that matches it.
    pub native_driver: Option<String>,
    pub needed_by_dom0: Option<String>,
    /// Offsets of the capabilities that do more than hold bits.
    pub msi: Option<u16>,
    pub msix: Option<u16>,
    pub power: Option<u16>,
    pub express: Option<u16>,
    pub error_reporting: Option<u16>,
    /// BAR and offset of the MSI-X table.
    pub table: Option<(u8, u64)>,
}

/// What dom0's kernel has to do with it.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub driver: Option<String>,
    pub driver_override: Option<String>,
    pub enabled: u32,
    /// Nobody changes how many virtual functions it has.
    pub kept: bool,
    /// No driver takes virtual functions that are made.
    pub leaves_functions_alone: bool,
    /// It may not lose its power.
    pub stays_powered: bool,
    /// The reset methods that were chosen, if any were.
    pub reset_methods: Option<Vec<String>>,
}

/// What goes wrong with it, or takes time.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub access_time: Duration,
    pub reset_time: Duration,
    pub reset_fails: bool,
    /// The kernel's first way of resetting its link fails.
    pub link_reset_fails: bool,
    pub resets: usize,
    /// The method of the last reset by the kernel.
    pub last_reset: Option<String>,
    pub correctable_errors: u64,
    /// Its driver leaves virtual functions behind when it goes.
    pub leaves_functions: bool,
    pub reach: Reach,
}

/// Whether dom0 reaches a device. Through VFIO it does not always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reach {
    /// It does.
    #[default]
    Here,
    /// In a moment: the device is closed, and is opened again. Whoever opens it waits, for some seconds at most.
    Moving,
    /// Not as long as somebody else has it.
    Elsewhere,
}

/// Whether it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    There,
    /// All its registers read as ones, and the kernel does not know.
    Silent,
    /// Pulled out, and the kernel knows.
    Removed,
}

/// The kernel's name of a reset of the bus.
const BUS: &str = "bus";

/// A function: hardware, and the kernel's notes on it.
#[derive(Debug)]
pub(super) struct Function {
    pub fixed: Fixed,
    pub space: MemorySpace,
    /// The configuration space at power-on, by double words.
    pub power_on: Vec<u32>,
    pub presence: Mutex<Presence>,
    pub messages: Mutex<Messages>,
    pub model: Mutex<Option<Box<dyn Model>>>,
    /// The guest that has it, as Xen says. Held while that guest accesses what its BARs decode.
    pub owner: Mutex<Option<DomId>>,
    pub kernel: Mutex<Kernel>,
    pub faults: Mutex<Faults>,
    pub resetting: Mutex<bool>,
    pub reset_done: Condvar,
}

impl Function {
    pub fn bdf(&self) -> Bdf {
        self.fixed.identity.bdf
    }

    /// The physical function, of a virtual one.
    pub fn physical(&self) -> Option<Bdf> {
        self.fixed.virtual_of.map(|(physical, _)| physical)
    }

    pub fn is_gone(&self) -> bool {
        *lock(&self.presence) != Presence::There
    }

    pub fn set_presence(&self, presence: Presence) {
        let before = std::mem::replace(&mut *lock(&self.presence), presence);
        if before != presence && presence == Presence::There {
            self.wipe();
        }
    }

    /// Reads registers, as everybody on the bus does.
    pub fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        let value = self.space.read(offset, width)?;
        Ok(if self.is_gone() { width.mask() } else { value })
    }

    /// Writes registers, as everybody on the bus does, with all that follows from it.
    pub fn write(
        &self,
        machine: &Machine,
        offset: u16,
        width: Width,
        value: u32,
    ) -> Result<(), AccessError> {
        if self.is_gone() {
            return Ok(());
        }
        let slept = self.is_asleep();
        let silent = self.command() & header::command::INTX_DISABLE != 0;
        self.space.write(offset, width, value)?;
        if slept && !self.is_asleep() && !self.keeps_its_state() {
            self.wipe();
        }
        self.send_pending(machine);
        if silent && self.command() & header::command::INTX_DISABLE == 0 {
            self.intx_allowed(machine);
        }
        Ok(())
    }

    /// Reads a register of the block at `base`.
    pub fn register(&self, base: u16, register: &Register) -> u16 {
        let offset = base.wrapping_add(register.offset);
        let [low, high, ..] = self
            .space
            .read(offset, register.width)
            .unwrap_or(0)
            .to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// Sets a register of the block at `base`, as the device itself does.
    pub fn set_register(&self, base: u16, register: &Register, value: u32) {
        self.space
            .set(base.wrapping_add(register.offset), register.width, value);
    }

    pub fn command(&self) -> u16 {
        self.register(0, &header::COMMAND)
    }

    fn power(&self) -> u16 {
        self.fixed
            .power
            .map_or(0, |base| self.register(base, &power_management::CONTROL))
    }

    /// In D3hot. The states between are not told apart.
    pub fn is_asleep(&self) -> bool {
        self.power() & power_management::control::POWER_STATE
            == power_management::control::POWER_STATE
    }

    fn keeps_its_state(&self) -> bool {
        self.power() & power_management::control::NO_SOFT_RESET != 0
    }

    /// All registers as after power-on, what lies behind the BARs too.
    pub fn wipe(&self) {
        for (offset, value) in (0u16..).step_by(4).zip(&self.power_on) {
            self.space.set(offset, Width::Four, *value);
        }
        *lock(&self.messages) = Messages::new(self.table_length());
        if let Some(model) = &mut *lock(&self.model) {
            model.reset();
        }
    }

    /// Length of the MSI-X table.
    pub fn table_length(&self) -> usize {
        self.fixed.msix.map_or(0, |base| {
            let control = self.register(base, &msix::CONTROL);
            usize::from(msix::vectors(control))
        })
    }

    /// A reset as the kernel does it: what it knows of the configuration is as before, interrupts
    /// and what only the device knows is gone. False when the device does not come back.
    pub fn reset(&self) -> bool {
        {
            let mut faults = lock(&self.faults);
            faults.resets = faults.resets.saturating_add(1);
            if faults.reset_fails {
                drop(faults);
                self.set_presence(Presence::Silent);
                return false;
            }
        }
        if self.is_gone() {
            return false;
        }
        self.wipe_and_restore();
        true
    }

    /// Power-on, and what the kernel knows of the configuration put back.
    pub fn wipe_and_restore(&self) {
        let saved: Vec<(&Register, u32)> = header::TYPE_0
            .registers
            .iter()
            .filter_map(|register| {
                Some((
                    *register,
                    self.space.read(register.offset, register.width).ok()?,
                ))
            })
            .filter(|(register, _)| register.rw != 0)
            .collect();
        let enabled = self.enabled_functions();
        self.wipe();
        for (register, value) in saved {
            // Through the masks, which are the device's own.
            let _ = self.space.write(register.offset, register.width, value);
        }
        if enabled > 0 {
            self.enable_functions(enabled);
        }
    }

    /// The ways in which the kernel resets it, best first.
    pub fn reset_methods(&self) -> Vec<String> {
        let chosen = lock(&self.kernel).reset_methods.clone();
        chosen.unwrap_or_else(|| self.fixed.reset_methods.clone())
    }

    /// As [`Function::reset`], with the time it takes. The kernel lets nobody at the configuration
    /// space meanwhile.
    pub fn reset_in_time(&self, method: &str) -> bool {
        *lock(&self.resetting) = true;
        let time = lock(&self.faults).reset_time;
        thread::sleep(time);
        lock(&self.faults).last_reset = Some(method.to_owned());
        if method == BUS {
            // Reaches a device that hears nothing else.
            lock(&self.faults).reset_fails = false;
            if *lock(&self.presence) == Presence::Silent {
                self.set_presence(Presence::There);
            }
        }
        let back = self.reset();
        *lock(&self.resetting) = false;
        self.reset_done.notify_all();
        back
    }

    pub fn reach(&self) -> Reach {
        lock(&self.faults).reach
    }

    /// Waits as the kernel makes everybody wait: for the end of a reset, and for a slow device.
    pub fn wait(&self) {
        let mut resetting = lock(&self.resetting);
        while *resetting {
            resetting = self
                .reset_done
                .wait(resetting)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(resetting);
        let time = lock(&self.faults).access_time;
        if !time.is_zero() {
            thread::sleep(time);
        }
    }

    /// The MSI control word, if the device has MSI.
    pub fn msi_control(&self) -> Option<(u16, u16)> {
        let base = self.fixed.msi?;
        Some((base, self.register(base, &msi::CONTROL)))
    }

    /// The MSI-X control word, if the device has MSI-X.
    pub fn msix_control(&self) -> Option<u16> {
        Some(self.register(self.fixed.msix?, &msix::CONTROL))
    }
}
