//! A device and a Xen that fail, and kill the daemon, at a step of one's choice.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::AtomicU32;

use conf_space::memory::MemorySpace;
use conf_space::registers::{header, msi, msix, power_management};
use conf_space::{AccessError, ConfigSize, ConfigSpace, Resource, ResourceFlags, Width};
use xenbus::pciif::MsixEntry;
use xenbus::{MsiRequest, Pirq, XenError};

use crate::ledger::WORDS;
use crate::{Held, Interrupts, Ledger, Operations, Pirqs, Refusal, memory_decode};

pub const MSI: u16 = 0x50;
pub const MSIX: u16 = 0x70;
pub const POWER: u16 = 0x40;
pub const TABLE_BASE: u64 = 0xfe00_0000;
pub const TABLE_LENGTH: u16 = 6;
/// The domain's PIRQs are those below.
pub const NR_PIRQS: u32 = 48;
/// The legacy interrupt, which the toolstack has mapped: not ours to touch.
pub const GSI: Pirq = Pirq(19);
const NR_GSIS: u32 = 24;

const EPERM: i32 = 1;
const ENXIO: i32 = 6;
const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;

/// The daemon was killed.
struct Killed;

pub struct Machine {
    pub space: MemorySpace,
    pub interrupts: Interrupts,
    words: [AtomicU32; WORDS],
    /// First PIRQ and length of each mapping.
    mapped: RefCell<BTreeMap<u32, u32>>,
    requests: RefCell<Vec<MsiRequest>>,
    step: Cell<usize>,
    kill_at: Cell<Option<usize>>,
    fail_at: RefCell<Vec<usize>>,
    pub offset: Cell<u32>,
}

impl Machine {
    pub fn new() -> Self {
        let mut space = MemorySpace::new(ConfigSize::Conventional);
        for register in header::TYPE_0.registers {
            space.add_register(0, register);
        }
        space.set(0x06, Width::Two, 0x10);
        space.set(0x34, Width::One, u32::from(POWER));
        for (block, offset, id, next) in [
            (&power_management::BLOCK, POWER, 0x01, MSI),
            (msi::block(0x4), MSI, 0x05, MSIX),
            (&msix::BLOCK, MSIX, 0x11, 0),
        ] {
            for register in block.registers {
                space.add_register(offset, register);
            }
            space.set(offset, Width::Two, u32::from(next) << 8 | id);
        }
        space.set(MSI + 2, Width::Two, 0x4);
        space.set(MSIX + 2, Width::Two, u32::from(TABLE_LENGTH - 1));
        space.set(0x04, Width::Two, 0x6);
        let bar = Resource {
            start: TABLE_BASE,
            size: 0x1000,
            flags: ResourceFlags::MEMORY,
        };
        Self {
            interrupts: Interrupts::discover(&space, &[bar]).unwrap(),
            space,
            words: [const { AtomicU32::new(0) }; WORDS],
            mapped: RefCell::new(BTreeMap::from([(GSI.0, 1)])),
            requests: RefCell::default(),
            step: Cell::new(0),
            kill_at: Cell::new(None),
            fail_at: RefCell::default(),
            offset: Cell::new(0),
        }
    }

    pub fn operate<T>(&self, action: impl FnOnce(Operations<'_>) -> T) -> T {
        action(self.interrupts.operate(self, self, self))
    }

    /// Does `action` and is killed at the step of that number, counted from now. Returns whether it
    /// came to that.
    pub fn killed_at(&self, step: usize, action: impl FnOnce()) -> bool {
        self.kill_at.set(Some(self.step.get() + step));
        let result = catch_unwind(AssertUnwindSafe(action));
        self.kill_at.set(None);
        match result {
            Ok(()) => false,
            Err(killed) if killed.is::<Killed>() => true,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The steps of these numbers, counted from now, fail.
    pub fn fail_at(&self, steps: &[usize]) {
        *self.fail_at.borrow_mut() = steps.iter().map(|step| step + self.step.get()).collect();
    }

    pub fn steps(&self) -> usize {
        self.step.get()
    }

    pub fn requests(&self) -> Vec<MsiRequest> {
        self.requests.take()
    }

    /// PIRQs that Xen has mapped, the GSI left out.
    pub fn mapped(&self) -> Vec<u32> {
        self.mapped
            .borrow()
            .iter()
            .flat_map(|(first, length)| *first..first + length)
            .filter(|pirq| *pirq != GSI.0)
            .collect()
    }

    pub fn gsi_is_mapped(&self) -> bool {
        self.mapped.borrow().contains_key(&GSI.0)
    }

    /// PIRQs that the ledger names, in order.
    pub fn held(&self) -> Vec<u32> {
        let mut held: Vec<u32> = Held::pirqs(self).map(|pirq| pirq.0).collect();
        held.sort_unstable();
        held
    }

    pub fn control(&self, capability: u16) -> u32 {
        self.space.read(capability + 2, Width::Two).unwrap()
    }

    pub fn msi_is_on(&self) -> bool {
        self.control(MSI) & 1 != 0
    }

    pub fn msix_is_on(&self) -> bool {
        self.control(MSIX) & 0x8000 != 0
    }

    pub fn intx_is_disabled(&self) -> bool {
        self.space.read(0x04, Width::Two).unwrap() & 0x400 != 0
    }

    pub fn enable_msix(&self, entries: &[u16]) -> Result<Vec<u16>, Refusal> {
        let entries: Vec<MsixEntry> = entries
            .iter()
            .map(|entry| MsixEntry {
                vector: 0xdead,
                entry: *entry,
            })
            .collect();
        let count = u32::try_from(entries.len()).unwrap();
        self.operate(|operations| {
            operations
                .enable_msix(&entries, count, || memory_decode(self))
                .map(|vectors| vectors.as_slice().to_vec())
        })
    }

    /// Next step: whether it is to fail.
    fn advance(&self) -> bool {
        let step = self.step.get();
        self.step.set(step + 1);
        if self.kill_at.get() == Some(step) {
            resume_unwind(Box::new(Killed));
        }
        self.fail_at.borrow().contains(&step)
    }
}

impl ConfigSpace for Machine {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        if self.advance() {
            return Err(AccessError::Failed { errno: 5 });
        }
        self.space.read(offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        // What Xen lets dom0 write of a device whose messages it has programmed.
        assert_eq!(width, Width::Two);
        assert!([0x04, MSI + 2, MSIX + 2].contains(&offset), "{offset:#x}");
        if self.advance() {
            return Err(AccessError::Failed { errno: 5 });
        }
        self.space.write(offset, width, value)
    }
}

impl Ledger for Machine {
    fn load(&self, word: usize) -> u32 {
        self.words.load(word)
    }

    fn store(&self, word: usize, value: u32) {
        self.advance();
        self.words.store(word, value);
    }
}

impl Pirqs for Machine {
    fn map(&self, request: MsiRequest) -> Result<Pirq, XenError> {
        if self.advance() {
            return Err(XenError::from_errno("map", ENOSPC));
        }
        let length = match request {
            MsiRequest::Msi => 1,
            MsiRequest::MultiMsi { count } => {
                assert!(count.is_power_of_two() && count > 1);
                u32::from(count)
            }
            MsiRequest::MsiX { entry, table_base } => {
                assert!(entry < TABLE_LENGTH);
                assert_eq!(table_base, TABLE_BASE);
                if self.space.read(0x04, Width::Two).unwrap() & 0x2 == 0 {
                    return Err(XenError::from_errno("map", ENXIO));
                }
                1
            }
        };
        assert!(
            !self.msi_is_on() && !self.msix_is_on(),
            "programmed while on"
        );
        let mut mapped = self.mapped.borrow_mut();
        let first = (NR_GSIS..=NR_PIRQS - length)
            .rev()
            .find(|first| {
                mapped
                    .iter()
                    .all(|(other, others)| first + length <= *other || other + others <= *first)
            })
            .ok_or(XenError::from_errno("map", ENOSPC))?;
        mapped.insert(first, length);
        self.requests.borrow_mut().push(request);
        Ok(Pirq(first + self.offset.get()))
    }

    fn unmap(&self, pirq: Pirq) -> Result<(), XenError> {
        if self.advance() {
            return Err(XenError::from_errno("unmap", EPERM));
        }
        self.mapped
            .borrow_mut()
            .remove(&pirq.0.wrapping_sub(self.offset.get()))
            .map(drop)
            .ok_or(XenError::from_errno("unmap", EINVAL))
    }
}
