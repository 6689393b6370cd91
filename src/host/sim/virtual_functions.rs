//! SR-IOV: a physical function's capability, and its virtual functions, which come and go as dom0's kernel has it (Linux `sriov_numvfs`).

use std::sync::Arc;

use conf_space::capabilities::ExtendedCapabilityId;
use conf_space::registers::capability;
use conf_space::registers::msix::ENTRY_BYTES;
use conf_space::selector::SlotPath;
use conf_space::{Bdf, ConfigSpace, Resource, Width};

use super::assembly::Placement;
use super::builder::{FunctionBuilder, PAGE, VirtualFunctions};
use super::dom0::refused;
use super::function::Function;
use super::sriov_capability as sriov;
use super::{SimBus, lock};
use crate::host::HostError;

/// BAR that holds the MSI-X table of a virtual function.
const TABLE_BAR: u8 = 3;

/// What virtual functions a physical function can have.
#[derive(Debug)]
pub(super) struct Sriov {
    all: VirtualFunctions,
    vendor: u16,
    class: u32,
    subsystem: (u16, u16),
    /// The physical function's.
    path: SlotPath,
    /// The BARs of the first one. Those of the others follow, each a BAR's size further (PCIe 9.3.3.14).
    bars: [Resource; 7],
}

impl Sriov {
    /// Keeps room for the BARs of as many as there can be.
    pub(super) fn new(
        physical: &FunctionBuilder,
        all: VirtualFunctions,
        placement: &mut Placement,
    ) -> Self {
        let mut sriov = Self {
            all,
            vendor: physical.vendor,
            class: physical.class,
            subsystem: physical.subsystem,
            path: physical.path.clone(),
            bars: [Resource::ABSENT; 7],
        };
        let first = sriov.describe(Bdf::from_devfn(0, 0, 0));
        sriov.bars = first.resources;
        for bar in &mut sriov.bars {
            let mut room = Resource {
                size: bar.size.saturating_mul(u64::from(sriov.all.total)),
                ..*bar
            };
            placement.place(&mut room);
            bar.start = room.start;
        }
        sriov
    }

    /// Where the virtual function of that index is.
    fn address(&self, physical: Bdf, index: u16) -> Bdf {
        let id = u16::from_be_bytes([physical.bus(), physical.devfn()])
            .wrapping_add(self.all.first_offset)
            .wrapping_add(self.all.stride.wrapping_mul(index));
        let [bus, devfn] = id.to_be_bytes();
        Bdf::from_devfn(physical.segment(), bus, devfn)
    }

    /// A virtual function, with its BARs nowhere.
    fn describe(&self, bdf: Bdf) -> FunctionBuilder {
        let table_size = u32::from(self.all.vectors)
            .saturating_mul(ENTRY_BYTES.into())
            .next_multiple_of(PAGE)
            .saturating_add(PAGE)
            .next_power_of_two();
        let mut function = FunctionBuilder::new(bdf, self.vendor, self.all.device, self.class)
            .memory_bar(0, self.all.bar_size)
            .memory_bar(TABLE_BAR, table_size)
            .express()
            .msix(self.all.vectors, TABLE_BAR, 0)
            .driver(self.all.driver)
            .model((self.all.model)());
        function.subsystem = self.subsystem;
        function
    }

    fn build(&self, physical: Bdf, index: u16) -> Function {
        let mut function = self.describe(self.address(physical, index));
        function.path = self.path.clone().virtual_function(index);
        for (resource, first) in function.resources.iter_mut().zip(&self.bars) {
            resource.start = first
                .start
                .saturating_add(first.size.saturating_mul(u64::from(index)));
        }
        function.assemble(Some((physical, index)))
    }
}

impl Function {
    /// Gives a physical function its SR-IOV capability, the first and only extended one.
    pub(super) fn add_sriov(&mut self, sriov: Sriov) {
        let all = &sriov.all;
        let header = u32::from(ExtendedCapabilityId::SR_IOV.0) | sriov::VERSION << 16;
        for (register, value) in [
            (&capability::EXTENDED_HEADER, header),
            (&sriov::INITIAL_VFS, u32::from(all.total)),
            (&sriov::TOTAL_VFS, u32::from(all.total)),
            (&sriov::FIRST_VF_OFFSET, u32::from(all.first_offset)),
            (&sriov::VF_STRIDE, u32::from(all.stride)),
            (&sriov::VF_DEVICE_ID, u32::from(all.device)),
        ] {
            self.set_register(sriov::OFFSET, register, value);
        }
        let end = sriov::OFFSET.saturating_add(sriov::VF_DEVICE_ID.end());
        for offset in (sriov::OFFSET..end).step_by(4) {
            let value = self.space.read(offset, Width::Four).unwrap_or(0);
            if let Some(slot) = self.power_on.get_mut(usize::from(offset >> 2)) {
                *slot = value;
            }
        }
        self.fixed.sriov = Some(sriov);
    }

    /// How many virtual functions a physical one has now.
    pub(super) fn enabled_functions(&self) -> u16 {
        match self.fixed.sriov {
            Some(_) => self.register(sriov::OFFSET, &sriov::NUM_VFS),
            None => 0,
        }
    }

    pub(super) fn enable_functions(&self, count: u16) {
        let control = match count {
            0 => 0,
            _ => sriov::VF_ENABLE | sriov::VF_MEMORY_ENABLE,
        };
        self.set_register(sriov::OFFSET, &sriov::NUM_VFS, u32::from(count));
        self.set_register(sriov::OFFSET, &sriov::CONTROL, control);
    }
}

impl SimBus {
    /// What a function is to SR-IOV, as sysfs tells it.
    pub(super) fn sriov_function(&self, function: &Function) -> crate::host::Function {
        if let Some((physical, index)) = function.fixed.virtual_of {
            return crate::host::Function::Virtual { physical, index };
        }
        let Some(sriov) = &function.fixed.sriov else {
            return crate::host::Function::Plain;
        };
        crate::host::Function::Physical {
            enabled: function.enabled_functions(),
            total: sriov.all.total,
            virtual_functions: self.virtual_functions(function.bdf()),
        }
    }

    fn virtual_functions(&self, physical: Bdf) -> Vec<(u16, Bdf)> {
        let mut found: Vec<_> = self
            .all()
            .iter()
            .filter_map(|function| match function.fixed.virtual_of {
                Some((of, index)) if of == physical => Some((index, function.bdf())),
                _ => None,
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// Makes the first so many virtual functions of a device that has none.
    pub(super) fn make_virtual_functions(&self, physical: Bdf, count: u16) {
        let Some(function) = self.get(physical) else {
            return;
        };
        let Some(sriov) = &function.fixed.sriov else {
            return;
        };
        let alone = lock(&function.kernel).leaves_functions_alone;
        function.enable_functions(count);
        for index in 0..count {
            let mut made = sriov.build(physical, index);
            if !alone {
                made.probe_first();
            }
            lock(&self.functions).insert(made.bdf(), Arc::new(made));
        }
    }

    /// Takes all virtual functions of a device away.
    pub(super) fn take_virtual_functions(&self, physical: &Function) {
        for (_, bdf) in self.virtual_functions(physical.bdf()) {
            self.remove(bdf);
        }
        if physical.fixed.sriov.is_some() {
            physical.enable_functions(0);
        }
    }

    /// `sriov_numvfs` is written (Linux `drivers/pci/iov.c`).
    pub(super) fn change_virtual_functions(
        &self,
        physical: Bdf,
        count: u16,
    ) -> Result<(), HostError> {
        let function = self.known(physical)?;
        let no = |remedy, errno| {
            let action = format!("make its driver have {count} virtual functions");
            Err(refused(physical, action, remedy, errno))
        };
        let Some(sriov) = &function.fixed.sriov else {
            return no("it has no SR-IOV", libc::ENOENT);
        };
        if lock(&function.kernel).kept {
            return no("the file is read-only", libc::EROFS);
        }
        let enabled = function.enabled_functions();
        if count > sriov.all.total {
            return no("it cannot have so many", libc::ERANGE);
        }
        if count == enabled {
            return Ok(());
        }
        if lock(&function.kernel).driver.is_none() {
            return no("it has no driver", libc::ENOENT);
        }
        if count == 0 {
            self.take_virtual_functions(&function);
            return Ok(());
        }
        if enabled != 0 {
            return no("it has some already", libc::EBUSY);
        }
        self.make_virtual_functions(physical, count);
        Ok(())
    }
}
