//! Virtio devices as PCI functions (virtio 1.3, section 4.1).
//!
//! | module | holds |
//! |---|---|
//! | `capability` | the capabilities that lead to the register blocks, as tables of registers |
//! | `identity` | what a function says that it is |
//! | `layout` | where the register blocks are |

mod capability;
mod identity;
mod layout;

pub use capability::Kind;
pub use layout::{Layout, Mode, Shape};

use conf_space::Width;
use conf_space::capabilities::CapabilityId;
use conf_space::emulated::{self, BuildError, Builder, Effects, Function};
use conf_space::registers::Register;
use xenbus::device_model::{IoRange, IoSpace};

use self::layout::{Content, Plan, Region};
use crate::device::DeviceKind;
use crate::inspect::DeviceView;
use crate::ioreq::{Claim, Target, Window};
use crate::transport::core::{Core, Parts};
use crate::transport::{common, config, legacy, notify};

/// A virtio device as a PCI function. Where on the bus it is, is not its business: whoever routes
/// accesses claims its configuration space.
#[derive(Debug)]
pub struct VirtioFunction {
    core: Core,
    space: Function,
    regions: Vec<Region>,
    /// Of the capability that shows the BARs in configuration space.
    window: Option<u16>,
}

impl VirtioFunction {
    /// A device that was just reset, or goes on from before a restart, with a vector for each queue
    /// and one for its configuration.
    ///
    /// # Errors
    /// The device has more queues than fit.
    pub fn new(parts: Parts, shape: &Shape) -> Result<Self, BuildError> {
        let queues = u16::try_from(parts.device.queue_sizes().len()).unwrap_or(u16::MAX);
        let vectors = queues.saturating_add(1);
        let plan = Plan::new(shape, queues, vectors);
        let identity = identity::of(parts.device.kind(), shape.mode);
        let mut builder = Builder::new(&identity).interrupt();
        for (index, bar) in &plan.bars {
            builder = builder.bar((*index).into(), *bar)?;
        }
        builder = builder.msix(vectors, plan.msix_table, plan.msix_pending)?;
        for region in &plan.regions {
            builder = add_capability(builder, region)?;
        }
        let mut window = None;
        if shape.mode.has_modern() {
            let values = header(Kind::Window, &capability::WINDOW_DATA);
            let id = CapabilityId::VENDOR_SPECIFIC;
            let (built, offset) = builder.capability(id, &capability::WINDOW, &values)?;
            builder = built;
            window = Some(offset);
        }
        let mut function = Self {
            core: Core::new(parts, Some(vectors)),
            space: builder.build(),
            regions: plan.regions,
            window,
        };
        function.resume();
        Ok(function)
    }

    /// Goes on from before a restart, if there was one.
    fn resume(&mut self) {
        let words = self.core.config_space_words();
        if self.core.is_restart() {
            let words = (0..words.count()).map(|index| words.get(index));
            let effects = self.space.restore(&dwords(words));
            self.follow(effects);
        }
        self.core.resume();
    }

    /// Notes what the driver has written into the configuration space.
    fn save(&self) {
        let words = self.core.config_space_words();
        let registers = self.space.registers();
        for (index, pair) in registers.chunks_exact(2).enumerate() {
            if let [low, high] = *pair {
                words.set(index, u64::from(low) | u64::from(high) << 32);
            }
        }
    }

    /// Does what a write to the configuration space asks for beyond it.
    fn follow(&self, effects: Effects) {
        let signals = self.core.signals();
        if effects.contains(Effects::MSIX) {
            signals.set_msix_control(self.space.msix_control());
        }
        if effects.contains(Effects::INTX) {
            signals.set_line_disabled(self.space.intx_disabled());
        }
    }

    /// Its type.
    pub fn kind(&self) -> DeviceKind {
        self.core.kind()
    }

    fn read_config(&mut self, offset: u64, width: Width) -> u32 {
        let Ok(offset) = u16::try_from(offset) else {
            return width.mask();
        };
        self.space
            .set_interrupt_status(self.core.signals().is_line_wanted());
        if let Some(shown) = self.shown(offset, width) {
            let value = self.read_bar(shown.bar, shown.offset, shown.width);
            self.space.set(&shown.data, value);
        }
        let mut data = [0; 4];
        if let Some(part) = data.get_mut(..usize::from(width.bytes())) {
            self.space.read(offset, part);
        }
        u32::from_le_bytes(data)
    }

    fn write_config(&mut self, offset: u64, width: Width, value: u32) {
        let Ok(offset) = u16::try_from(offset) else {
            return;
        };
        let data = value.to_le_bytes();
        let written = data.get(..usize::from(width.bytes())).unwrap_or_default();
        let effects = self.space.write(offset, written);
        if let Some(shown) = self.shown(offset, width) {
            let value = self.space.get(&shown.data) & shown.width.mask();
            self.write_bar(shown.bar, shown.offset, shown.width, value);
        }
        self.follow(effects);
        self.save();
        self.core.save();
    }

    /// What an access to configuration space means beyond it: an access to what the window shows
    /// (virtio 1.3, section 4.1.4.9). Nothing, if the driver has not set it up rightly.
    fn shown(&self, offset: u16, width: Width) -> Option<Shown> {
        let window = self.window?;
        let data = capability::WINDOW_DATA.at(window);
        let end = offset.saturating_add(width.bytes());
        if end <= data.offset || offset >= data.end() {
            return None;
        }
        let get = |register: &Register| self.space.get(&register.at(window));
        Some(Shown {
            bar: u8::try_from(get(&capability::WINDOW_BAR)).ok()?,
            offset: get(&capability::WINDOW_OFFSET).into(),
            width: Width::from_bytes(get(&capability::WINDOW_LENGTH))?,
            data,
        })
    }

    /// The region that an address of a BAR lies in, and where in it.
    fn region(&self, bar: u8, offset: u64) -> Option<(Content, u64)> {
        self.regions
            .iter()
            .filter(|region| region.bar == bar)
            .find_map(|region| {
                let within = offset.checked_sub(region.offset.into())?;
                (within < region.length.into()).then_some((region.content, within))
            })
    }

    fn read_bar(&mut self, bar: u8, offset: u64, width: Width) -> u32 {
        let Some((content, offset)) = self.region(bar, offset) else {
            return 0;
        };
        let core = &mut self.core;
        match content {
            Content::Legacy => legacy::read(core, offset, width),
            Content::Common => common::read(core, offset, width),
            Content::Isr => core.signals().take_isr().bits().into(),
            Content::Device => config::read(core, 0, offset, width),
            Content::Notify { .. } => 0,
            Content::MsixTable | Content::MsixPending => {
                let mut data = [0; 4];
                if let Some(part) = data.get_mut(..usize::from(width.bytes())) {
                    match content {
                        Content::MsixTable => core.signals().read_msix_table(offset, part),
                        _ => core.signals().read_msix_pending(offset, part),
                    }
                }
                u32::from_le_bytes(data)
            }
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, width: Width, value: u32) {
        let Some((content, offset)) = self.region(bar, offset) else {
            return;
        };
        let core = &mut self.core;
        match content {
            Content::Legacy => legacy::write(core, offset, width, value),
            Content::Common => common::write(core, offset, width, value),
            Content::Device => config::write(core, 0, offset, width, value),
            Content::Notify { multiplier } => notify::write(core, multiplier, offset, value),
            Content::MsixTable => {
                let data = value.to_le_bytes();
                let written = data.get(..usize::from(width.bytes())).unwrap_or_default();
                core.signals().write_msix_table(offset, written);
            }
            Content::Isr | Content::MsixPending => {}
        }
    }
}

impl Target for VirtioFunction {
    fn read(&mut self, window: Window, offset: u64, width: Width) -> u32 {
        match window {
            Window::Config => self.read_config(offset, width),
            Window::Region(bar) => self.read_bar(bar, offset, width),
        }
    }

    fn write(&mut self, window: Window, offset: u64, width: Width, value: u32) {
        match window {
            Window::Config => self.write_config(offset, width, value),
            Window::Region(bar) => self.write_bar(bar, offset, width, value),
        }
    }

    fn holds(&mut self, _: Window, _: u64) -> bool {
        self.core.holds()
    }

    fn halt(&mut self) -> bool {
        self.core.halt()
    }

    fn inspect(&self) -> Vec<DeviceView> {
        vec![self.core.inspect()]
    }

    fn claims(&self, claims: &mut Vec<Claim>) {
        for (bar, decoded) in (0u8..).zip(self.space.decoded()) {
            let Some(decoded) = decoded else { continue };
            let space = if decoded.is_io() {
                IoSpace::Port
            } else {
                IoSpace::Memory
            };
            let last = decoded.size.saturating_sub(1);
            claims.push(Claim {
                range: IoRange {
                    space,
                    first: decoded.start,
                    last: decoded.start.saturating_add(last),
                },
                window: Window::Region(bar),
            });
        }
    }
}

/// The registers of a configuration space from the words in which they are noted.
fn dwords(words: impl Iterator<Item = u64>) -> emulated::Registers {
    let mut registers: emulated::Registers = [0; emulated::DWORDS];
    let halves = words.flat_map(|word| [(word & 0xffff_ffff) as u32, (word >> 32) as u32]);
    for (place, half) in registers.iter_mut().zip(halves) {
        *place = half;
    }
    registers
}

/// What the window shows.
struct Shown {
    bar: u8,
    offset: u64,
    width: Width,
    /// The register of the window that holds it.
    data: Register,
}

/// The beginning of a capability whose last register is `last`.
fn header(kind: Kind, last: &Register) -> [(&'static Register, u32); 2] {
    [
        (&capability::LENGTH, last.end().into()),
        (&capability::KIND, kind as u32),
    ]
}

fn add_capability(builder: Builder, region: &Region) -> Result<Builder, emulated::BuildError> {
    let Some(kind) = region.content.kind() else {
        return Ok(builder);
    };
    let (block, last, multiplier) = match region.content {
        Content::Notify { multiplier } => {
            (&capability::NOTIFY, &capability::MULTIPLIER, multiplier)
        }
        _ => (&capability::BLOCK, &capability::BLOCK_LENGTH, 0),
    };
    let mut values = header(kind, last).to_vec();
    values.extend([
        (&capability::BAR, region.bar.into()),
        (&capability::OFFSET, region.offset),
        (&capability::BLOCK_LENGTH, region.length),
    ]);
    if kind == Kind::Notify {
        values.push((&capability::MULTIPLIER, multiplier));
    }
    let id = CapabilityId::VENDOR_SPECIFIC;
    Ok(builder.capability(id, block, &values)?.0)
}
