//! What a guest sees and may change, rule by rule. Numbers like C-4 are those of the rules listed
//! in `src/overlay/mod.rs`.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod access;
mod bars;
mod build;
mod command;
mod device;
mod fields;
mod header;
mod interrupts;
mod policy;
mod power;
mod properties;
mod reference;
mod state;
mod virtual_function;

use conf_space::overlay::{Effect, Identity, OpError, Overlay, Permissive, Policy};
use conf_space::{ConfigSpace, Width};

const ORDINARY: Policy = Policy {
    permissive: Permissive::No,
    allow_interrupt_control: false,
};
const PERMISSIVE: Policy = Policy {
    permissive: Permissive::Yes,
    allow_interrupt_control: false,
};
const STUB_DOMAIN: Policy = Policy {
    permissive: Permissive::No,
    allow_interrupt_control: true,
};

/// A guest with one device.
struct Guest<S> {
    overlay: Overlay,
    device: device::Recorder<S>,
    policy: Policy,
}

impl<S: ConfigSpace> Guest<S> {
    fn of(identity: &Identity, space: S, policy: Policy) -> Self {
        let device = device::Recorder::new(space);
        let overlay = Overlay::new(identity, &device).unwrap();
        device.writes();
        device.reads();
        Self {
            overlay,
            device,
            policy,
        }
    }

    fn read(&self, offset: u16, size: i32) -> u32 {
        self.overlay
            .read(&self.device, i32::from(offset), size)
            .unwrap()
    }

    fn try_write(&mut self, offset: u16, size: i32, value: u32) -> Result<Effect, OpError> {
        self.overlay
            .write(&self.device, i32::from(offset), size, value, &self.policy)
    }

    fn write(&mut self, offset: u16, size: i32, value: u32) -> Effect {
        self.try_write(offset, size, value).unwrap()
    }

    /// What the hardware holds.
    fn hardware(&self, offset: u16, width: Width) -> u32 {
        self.device.space.read(offset, width).unwrap()
    }
}

fn guest(policy: Policy) -> Guest<conf_space::memory::MemorySpace> {
    Guest::of(&device::identity(), device::nic(), policy)
}
