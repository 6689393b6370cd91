//! The machine's PCI devices, as Xen touches them.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;

use crate::types::{DomId, Gsi, PciDevice};

/// One message-signalled interrupt, as it is programmed into a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiTarget {
    /// Whose it is.
    pub domain: DomId,
    /// The MSI-X table entry; `None` for the MSI capability.
    pub entry: Option<u16>,
    /// Message address.
    pub address: u64,
    /// Message data. A device with several MSI vectors puts the vector's number into the lowest bits, which are 0 here.
    pub data: u32,
}

/// A part of a guest's memory, for the DMA of the devices that it has: the guest's own memfd, sealed against shrinking.
#[derive(Debug)]
pub struct DmaMemory {
    /// Guest-physical address, which is the one that the devices use; a multiple of 4096, as offset and size are.
    pub address: u64,
    /// Bytes; not 0.
    pub size: u64,
    /// The memory itself, to be mapped shared.
    pub file: OwnedFd,
    /// Where in the file it begins.
    pub offset: u64,
}

/// Which addresses a BAR decodes. The numbers are those of `machine.sock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum BarSpace {
    /// Memory.
    Memory = 0,
    /// I/O ports.
    Io = 1,
}

impl BarSpace {
    /// Bytes that an access to it may have.
    pub const fn widths(self) -> &'static [u8] {
        match self {
            Self::Memory => &[1, 2, 4, 8],
            // What `in` and `out` take.
            Self::Io => &[1, 2, 4],
        }
    }
}

/// What a BAR, or the expansion ROM, decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// 0 to 5: the BAR, of a 64-bit one the first register; 6: the expansion ROM.
    pub bar: u8,
    /// What it is an address of.
    pub space: BarSpace,
    /// Host address or port, as guests read it from the register.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// A part of a window, of memory, that a guest may map and access without anybody's help.
#[derive(Debug)]
pub struct WindowArea {
    /// Where in the window it begins; a multiple of 4096, as the other two numbers are.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What to map, shared.
    pub file: OwnedFd,
    /// Where in the file the area begins.
    pub offset: u64,
}

/// The machine's PCI bus. Xen embedded in the process reads and programs it as Xen does the real one.
///
/// Configuration and interrupts ([`Hardware::config_read`] to [`Hardware::physical_function`]) are called with the machine's lock held, so they
/// are to be quick. The rest may take its time: of the machine's locks, only one that is the guest's own is held. All of them may call
/// [`super::Machine::deliver_msi`] and [`super::Machine::raise_gsi`] of the machine, ask it for the eventfds behind them, and nothing else.
///
/// Where a method fails, the error's errno is what the guest or the toolstack gets; EIO if it has none.
pub trait Hardware: Send + Sync + Debug {
    /// Reads `width` (1, 2 or 4) bytes of configuration space. All ones where there is no device.
    fn config_read(&self, device: PciDevice, offset: u16, width: u8) -> u32;

    /// Writes `width` (1, 2 or 4) bytes of configuration space. Xen itself writes the control words of MSI and MSI-X only.
    fn config_write(&self, device: PciDevice, offset: u16, width: u8, value: u32);

    /// Programs address and data of an interrupt: into the MSI capability, or into the MSI-X table (unmasking the entry). Does not enable
    /// MSI or MSI-X.
    ///
    /// # Errors
    /// The interrupt will never come.
    fn program_msi(&self, device: PciDevice, target: MsiTarget) -> io::Result<()>;

    /// Masks an MSI-X entry, or (`None`) forgets the MSI capability's address and data.
    fn clear_msi(&self, device: PciDevice, entry: Option<u16>);

    /// The physical function of a virtual one; `None` for any other device. Its memory decode is the one that counts.
    fn physical_function(&self, _device: PciDevice) -> Option<PciDevice> {
        None
    }

    /// Resets the device, as libxl does through sysfs before it gives a device to a guest and when it takes it back.
    fn reset(&self, _device: PciDevice) {}

    /// A guest gets a device: its DMA goes to the guest's memory from now on, and nowhere else. `memory` is all that the guest has; what comes and
    /// goes later, [`Hardware::map_dma`] and [`Hardware::unmap_dma`] say. A guest's devices all see the same memory.
    ///
    /// # Errors
    /// The device stays what it was: nobody's.
    fn assign(&self, _domain: DomId, _device: PciDevice, _memory: &[DmaMemory]) -> io::Result<()> {
        Ok(())
    }

    /// The guest has the device no more, because it was taken, has gone, or the guest has. Its DMA goes nowhere from now on. With the last of a
    /// guest's devices, the memory that was mapped for it is forgotten. Its interrupts may be cleared before or after that.
    fn deassign(&self, _domain: DomId, _device: PciDevice) {}

    /// A guest that has devices gets more memory. It overlaps none that it has.
    ///
    /// # Errors
    /// Nothing of it is mapped.
    fn map_dma(&self, _domain: DomId, _memory: &DmaMemory) -> io::Result<()> {
        Ok(())
    }

    /// A guest that has devices loses memory, a whole part of it as it was mapped. When this returns, no device reaches it.
    ///
    /// # Errors
    /// Devices reach it still.
    fn unmap_dma(&self, _domain: DomId, _address: u64) -> io::Result<()> {
        Ok(())
    }

    /// A guest has served its line ([`super::Machine::raise_gsi`]): those of its devices that still want attention raise it again. A device that
    /// does not lower its line by itself is kept quiet until then.
    fn end_of_interrupt(&self, _domain: DomId, _gsi: Gsi) {}

    /// An eventfd that a guest may write to instead of saying so: to write to it is [`Hardware::end_of_interrupt`] for the one device that it has on
    /// this line, and does nothing once the device is the guest's no more.
    ///
    /// # Errors
    /// EOPNOTSUPP when the hardware does not offer that; what it says.
    fn end_event(&self, _domain: DomId, _gsi: Gsi) -> io::Result<OwnedFd> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// What the device's BARs decode now.
    fn windows(&self, _device: PciDevice) -> Vec<Window> {
        Vec::new()
    }

    /// Which parts of a window a guest may map; never any of I/O ports. Whether the device is that guest's is to be looked up so that it cannot change until the
    /// descriptors are made. Everything else, an MSI-X table for one, is reached through [`Hardware::window_read`] and
    /// [`Hardware::window_write`] alone, which reach all of it.
    ///
    /// # Errors
    /// EPERM when it is not the guest's; the device does not let go of a descriptor.
    fn areas(&self, _domain: DomId, _device: PciDevice, _bar: u8) -> io::Result<Vec<WindowArea>> {
        Ok(Vec::new())
    }

    /// Reads `width` bytes, of [`BarSpace::widths`] and aligned, within a window, for a guest, by one access of the device. Whether the device is that
    /// guest's is to be looked up so that it cannot change until the access is done.
    ///
    /// # Errors
    /// EPERM when it is not; nobody answers.
    fn window_read(
        &self,
        _domain: DomId,
        _device: PciDevice,
        _bar: u8,
        _offset: u64,
        _width: u8,
    ) -> io::Result<u64> {
        Err(io::Error::from_raw_os_error(libc::ENXIO))
    }

    /// Writes within a window, as [`Hardware::window_read`] reads. Nobody but [`Hardware::program_msi`] changes an MSI-X table.
    ///
    /// # Errors
    /// As [`Hardware::window_read`].
    fn window_write(
        &self,
        _domain: DomId,
        _device: PciDevice,
        _bar: u8,
        _offset: u64,
        _width: u8,
        _value: u64,
    ) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENXIO))
    }
}

/// A machine without devices.
#[derive(Debug)]
pub(super) struct NoHardware;

impl Hardware for NoHardware {
    fn config_read(&self, _device: PciDevice, _offset: u16, _width: u8) -> u32 {
        u32::MAX
    }

    fn config_write(&self, _device: PciDevice, _offset: u16, _width: u8, _value: u32) {}

    fn program_msi(&self, _device: PciDevice, _target: MsiTarget) -> io::Result<()> {
        Ok(())
    }

    fn clear_msi(&self, _device: PciDevice, _entry: Option<u16>) {}
}

/// Offset of the vendor id (PCI 3.0, 6.2.1).
const VENDOR_ID: u16 = 0x00;
/// Offset of the command register, and its memory decode bit.
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u32 = 1 << 1;
/// Offset of the status register, and its bit that says that there are capabilities.
const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u32 = 1 << 4;
/// Offset of the pointer to the first capability.
const CAPABILITIES: u16 = 0x34;
/// Offsets of the interrupt line and pin.
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

/// Capability ids of MSI and MSI-X (PCI 3.0, appendix H).
pub(super) const CAPABILITY_MSI: u8 = 0x05;
pub(super) const CAPABILITY_MSIX: u8 = 0x11;

/// More capabilities than fit into configuration space are a loop.
const MOST_CAPABILITIES: usize = 48;

/// What Xen asks of a device, in terms of configuration reads.
pub(super) struct Registers<'a> {
    pub hardware: &'a dyn Hardware,
    pub device: PciDevice,
}

impl Registers<'_> {
    fn read(&self, offset: u16, width: u8) -> u32 {
        self.hardware.config_read(self.device, offset, width)
    }

    /// Whether there is such a device.
    pub fn present(&self) -> bool {
        self.read(VENDOR_ID, 2) & 0xffff != 0xffff
    }

    /// Whether the device answers memory accesses.
    pub fn memory_decoded(&self) -> bool {
        let decoder = self
            .hardware
            .physical_function(self.device)
            .unwrap_or(self.device);
        self.hardware.config_read(decoder, COMMAND, 2) & COMMAND_MEMORY != 0
    }

    /// Offset of a capability.
    pub fn capability(&self, id: u8) -> Option<u16> {
        if self.read(STATUS, 2) & STATUS_CAPABILITIES == 0 {
            return None;
        }
        let mut next = self.read(CAPABILITIES, 1);
        for _ in 0..MOST_CAPABILITIES {
            let offset = u16::try_from(next & 0xfc)
                .ok()
                .filter(|offset| *offset >= 0x40)?;
            match self.read(offset, 1) {
                0xff => return None,
                found if found == u32::from(id) => return Some(offset),
                _ => next = self.read(offset.saturating_add(1), 1),
            }
        }
        None
    }

    /// The control word of a capability at `offset`.
    pub fn control(&self, offset: u16) -> u32 {
        self.read(offset.saturating_add(2), 2)
    }

    /// Writes the control word of a capability at `offset`.
    pub fn set_control(&self, offset: u16, value: u32) {
        self.hardware
            .config_write(self.device, offset.saturating_add(2), 2, value & 0xffff);
    }

    /// The line that the firmware wired the device's interrupt pin to, if it has a pin.
    pub fn interrupt_line(&self) -> Option<u32> {
        let pin = self.read(INTERRUPT_PIN, 1) & 0xff;
        let line = self.read(INTERRUPT_LINE, 1) & 0xff;
        (pin != 0 && pin != 0xff && line != 0 && line != 0xff).then_some(line)
    }
}
