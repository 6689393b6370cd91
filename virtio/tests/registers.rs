//! What a guest may do to the registers of a transport: anything. And what becomes of a device whose
//! reset takes its time.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Machine, Notes, Sink, ram};
use conf_space::Width::{self, Four, One, Two};
use proptest::prelude::*;
use virtio::Features;
use virtio::device::{Activation, Device, DeviceKind};
use virtio::ioreq::{Target, Window};
use virtio::memory::Memfd;
use virtio::pci::{Layout, Mode, Shape, VirtioFunction};
use virtio::queue::Queue;
use virtio::transport::mmio::{Board, MmioDevice, SLOT_BYTES, Version};

/// What a test sees of a device.
#[derive(Debug, Default)]
struct Life {
    /// Resets and queue resets do not end.
    busy: AtomicBool,
    activations: AtomicUsize,
    notifications: AtomicUsize,
    queues_enabled: AtomicUsize,
}

const QUEUE_SIZES: [u16; 2] = [16, 128];

/// A device with two queues that it never looks at, and 8 writable bytes of configuration.
struct Idle {
    config: [u8; 8],
    life: Arc<Life>,
    /// It has these queues.
    queues: [Option<Queue>; 2],
}

impl Idle {
    fn new(life: Arc<Life>) -> Self {
        Self {
            config: [0; 8],
            life,
            queues: [None, None],
        }
    }
}

impl Device for Idle {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> Features {
        Features::from_bits_retain(0b101)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let Some(place) = self.config.get_mut(at) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        let offered = self.features() | virtio::transport::RING_FEATURES;
        assert!(offered.contains(activation.features), "what is offered");
        self.life.activations.fetch_add(1, Ordering::SeqCst);
        for (index, queue) in activation.queues {
            let place = &mut self.queues[usize::from(index)];
            assert!(place.replace(queue).is_none(), "it was reset before");
        }
    }

    fn notify(&self, queue: u16) {
        assert!(self.queues[usize::from(queue)].is_some());
        self.life.notifications.fetch_add(1, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        self.queues = [None, None];
    }

    fn is_reset(&self) -> bool {
        !self.life.busy.load(Ordering::SeqCst)
    }

    fn reset_queue(&mut self, queue: u16) {
        let had = self.queues[usize::from(queue)].take();
        assert!(had.is_some(), "only what the device has is reset");
    }

    fn is_queue_reset(&self, _: u16) -> bool {
        !self.life.busy.load(Ordering::SeqCst)
    }

    fn enable_queue(&mut self, index: u16, queue: Queue) {
        self.life.queues_enabled.fetch_add(1, Ordering::SeqCst);
        let had = self.queues[usize::from(index)].replace(queue);
        assert!(had.is_none(), "it was reset before");
    }
}

/// One of the faces that a guest can have before it.
#[derive(Debug, Clone, Copy)]
enum Face {
    Pci(Shape),
    Mmio(Version),
}

fn face() -> impl Strategy<Value = Face> {
    let mode = prop::sample::select(vec![Mode::Legacy, Mode::Transitional, Mode::Modern]);
    let layout = prop::sample::select(vec![Layout::Qemu, Layout::Compact]);
    let version = prop::sample::select(vec![Version::One, Version::Two]);
    prop_oneof![
        3 => (mode, layout).prop_map(|(mode, layout)| Face::Pci(Shape {
            mode,
            layout,
            legacy_in_memory: true,
        })),
        1 => version.prop_map(Face::Mmio),
    ]
}

impl Face {
    fn target(self, pages: usize) -> (Box<dyn Target>, Arc<Life>) {
        let life = Arc::new(Life::default());
        let memory = Memfd::new(pages).unwrap();
        let target = self.restart(&Notes::default(), life.clone(), &memory);
        (target, life)
    }

    /// A device that goes on as these notes say.
    fn restart(self, notes: &Notes, life: Arc<Life>, memory: &Memfd) -> Box<dyn Target> {
        let parts = notes.parts(Idle::new(life), ram(memory), Arc::new(Sink::default()));
        match self {
            Self::Pci(shape) => Box::new(VirtioFunction::new(parts, &shape).unwrap()),
            Self::Mmio(version) => {
                let mut board = Board::new(0xfe70_0000, 2);
                board.plug(0, MmioDevice::new(parts, version)).unwrap();
                Box::new(board)
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Access {
    window: Window,
    offset: u64,
    width: Width,
    write: Option<u32>,
}

/// An access of any kind, though mostly where there are registers, and of values that mean something.
fn access() -> impl Strategy<Value = Access> {
    let window = prop_oneof![
        1 => Just(Window::Config),
        5 => prop::sample::select(vec![0u8, 2, 3, 4, 4, 4, 7]).prop_map(Window::Region),
    ];
    let offset = prop_oneof![
        8 => 0u64..0x140,
        1 => (0u64..8, 0u64..0x40).prop_map(|(page, offset)| page << 13 | offset),
        1 => (0u64..4, 0u64..0x40).prop_map(|(page, offset)| page << 12 | offset),
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        Just(0u32),
        0u32..0x20,
        prop::sample::select(vec![1, 3, 7, 0xb, 0xf, 0x8000, 0xffff, u32::MAX]),
        any::<u32>(),
    ];
    let width = prop::sample::select(vec![One, Two, Four]);
    (window, offset, width, prop::option::weighted(0.7, value)).prop_map(
        |(window, offset, width, write)| Access {
            window,
            offset,
            width,
            write: write.map(|value| value & width.mask()),
        },
    )
}

fn play(target: &mut dyn Target, access: Access) -> u32 {
    let Access {
        window,
        offset,
        width,
        write,
    } = access;
    match write {
        Some(value) => {
            target.write(window, offset, width, value);
            0
        }
        None => target.read(window, offset, width),
    }
}

/// The same in single bytes, lowest first.
fn play_in_bytes(target: &mut dyn Target, access: Access) -> u32 {
    let mut value = 0;
    for byte in 0..access.width.bytes() {
        let shift = 8 * u32::from(byte);
        let Some(offset) = access.offset.checked_add(byte.into()) else {
            break;
        };
        let write = access.write.map(|value| (value >> shift) & 0xff);
        let width = One;
        let part = Access {
            offset,
            width,
            write,
            ..access
        };
        value |= play(target, part) << shift;
    }
    value
}

/// The data register of the window in configuration space, accesses to which are accesses to
/// something else.
fn is_window_data(target: &mut dyn Target, access: &Access) -> bool {
    if access.window != Window::Config {
        return false;
    }
    let mut at = target.read(Window::Config, 0x34, One).into();
    while at != 0 {
        let [id, next, _, kind] = target.read(Window::Config, at, Four).to_le_bytes();
        if (id, kind) == (9, 5) {
            let end = access.offset.saturating_add(access.width.bytes().into());
            return end > at + 16 && access.offset < at + 20;
        }
        at = next.into();
    }
    false
}

/// Reading ISR status clears it, so it is not among what is compared.
const COMPARED: [(Window, std::ops::Range<u64>); 5] = [
    (Window::Config, 0..0x40),
    (Window::Region(0), 0..19),
    (Window::Region(0), 20..0x120),
    (Window::Region(1), 0..0x40),
    (Window::Region(4), 0..0x3c),
];

proptest! {
    #[test]
    fn no_access_of_any_kind_does_harm(
        face in face(), live: bool, accesses in prop::collection::vec(access(), 1..200),
    ) {
        let (mut target, _) = face.target(64);
        if live {
            set_up(&mut *target);
        }
        for access in accesses {
            let value = play(&mut *target, access);
            prop_assert_eq!(value & !access.width.mask(), 0);
            let mut claims = Vec::new();
            target.claims(&mut claims);
            for claim in claims {
                prop_assert!(claim.range.first <= claim.range.last);
            }
        }
    }

    #[test]
    fn an_access_in_bytes_is_the_same_as_the_whole(
        face in face(), accesses in prop::collection::vec(access(), 1..60),
    ) {
        // Without memory no queue ever starts: bytes of a page number would start it elsewhere.
        let ((mut whole, _), (mut bytes, _)) = (face.target(0), face.target(0));
        for access in accesses {
            if is_window_data(&mut *whole, &access) {
                continue;
            }
            let value = play(&mut *whole, access);
            prop_assert_eq!(value, play_in_bytes(&mut *bytes, access), "{:x?}", access);
            for (window, offsets) in COMPARED {
                for offset in offsets {
                    prop_assert_eq!(
                        whole.read(window, offset, One),
                        bytes.read(window, offset, One),
                        "{:x?}: {:?} {:#x}", access, window, offset
                    );
                }
            }
        }
    }
}

/// What is not noted is not compared: what a device has in its configuration, and what is said again
/// after a restart: ISR status, which also shows in the status register of the configuration space,
/// and the configuration generation.
const NOTED: [(Window, std::ops::Range<u64>); 7] = [
    (Window::Config, 0..6),
    (Window::Config, 8..0x100),
    (Window::Region(0), 0..19),
    (Window::Region(0), 0x24..0x60),
    (Window::Region(0), 0x64..0xfc),
    (Window::Region(4), 0..0x15),
    (Window::Region(4), 0x16..0x3c),
];

proptest! {
    #[test]
    fn what_a_driver_wrote_is_there_after_a_restart(
        face in face(), live: bool, accesses in prop::collection::vec(access(), 1..40),
    ) {
        let memory = Memfd::new(64).unwrap();
        let notes = Notes::default();
        let mut target = face.restart(&notes, Arc::default(), &memory);
        if live {
            set_up(&mut *target);
        }
        for access in accesses {
            play(&mut *target, access);
        }
        let look = |target: &mut dyn Target| -> Vec<u32> {
            NOTED
                .into_iter()
                .filter(|(window, _)| match face {
                    Face::Pci(_) => true,
                    Face::Mmio(_) => *window == Window::Region(0),
                })
                .flat_map(|(window, offsets)| offsets.map(move |offset| (window, offset)))
                .map(|(window, offset)| target.read(window, offset, One))
                .collect()
        };
        // Vector registers come and go with MSI-X, so legacy configuration moves; it is read at the
        // same places before and after.
        let before = look(&mut *target);
        drop(target);
        let mut target = face.restart(&notes, Arc::default(), &memory);
        prop_assert_eq!(before, look(&mut *target));
    }
}

const MODERN: Face = Face::Pci(Shape {
    mode: Mode::Transitional,
    layout: Layout::Compact,
    legacy_in_memory: false,
});
const COMMON: Window = Window::Region(4);
const LEGACY: Window = Window::Region(0);

/// Through the modern registers to DRIVER_OK, with the first queue.
fn go_live(target: &mut dyn Target) {
    set_up(target);
    assert_eq!(target.read(COMMON, 0x14, One), 0xf);
}

fn set_up(target: &mut dyn Target) {
    for (offset, width, value) in [
        (0x14, One, 0),
        (0x14, One, 3),
        (0x08, Four, 1),
        (0x0c, Four, 1 | 1 << 8),
        (0x14, One, 0xb),
        (0x16, Two, 0),
        (0x20, Four, 0x1000),
        (0x28, Four, 0x2000),
        (0x30, Four, 0x3000),
        (0x1c, Two, 1),
        (0x14, One, 0xf),
    ] {
        target.write(COMMON, offset, width, value);
    }
}

#[test]
fn a_device_is_activated_once_and_notified_of_its_queues_alone() {
    let (mut target, life) = MODERN.target(64);
    target.write(COMMON, 0x6000, Two, 0);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 0, "not live yet");
    go_live(&mut *target);
    target.write(COMMON, 0x14, One, 0xf);
    assert_eq!(life.activations.load(Ordering::SeqCst), 1);
    for queue in [0, 1, 2, 0x100] {
        target.write(COMMON, 0x6000 + 4 * queue, Two, queue as u32);
    }
    assert_eq!(life.notifications.load(Ordering::SeqCst), 1);
}

#[test]
fn the_status_of_a_modern_device_reads_as_before_until_its_reset_is_done() {
    let (mut target, life) = MODERN.target(64);
    go_live(&mut *target);
    life.busy.store(true, Ordering::SeqCst);
    target.write(COMMON, 0x14, One, 0);
    assert_eq!(target.read(COMMON, 0x14, One), 0xf);
    // Meanwhile nothing else is heard.
    target.write(COMMON, 0x14, One, 1);
    target.write(COMMON, 0x6000, Two, 0);
    target.write(COMMON, 0x4000, One, 0x55);
    assert_eq!(target.read(COMMON, 0x14, One), 0xf);
    life.busy.store(false, Ordering::SeqCst);
    assert_eq!(target.read(COMMON, 0x14, One), 0);
    assert_eq!(target.read(COMMON, 0x20, Four), 0);
    assert_eq!(target.read(COMMON, 0x4000, One), 0);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 0);
    go_live(&mut *target);
    assert_eq!(life.activations.load(Ordering::SeqCst), 2);
}

#[test]
fn a_legacy_driver_is_held_until_the_reset_is_done() {
    let (mut target, life) = MODERN.target(64);
    for (offset, width, value) in [(18, One, 3), (14, Two, 1), (8, Four, 1), (18, One, 7)] {
        target.write(LEGACY, offset, width, value);
    }
    assert_eq!(life.activations.load(Ordering::SeqCst), 1);
    life.busy.store(true, Ordering::SeqCst);
    let ends = std::thread::spawn({
        let life = life.clone();
        move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            life.busy.store(false, Ordering::SeqCst);
        }
    });
    target.write(LEGACY, 18, One, 0);
    assert!(target.holds(LEGACY, 18));
    while target.holds(LEGACY, 18) {
        std::thread::yield_now();
    }
    assert!(!life.busy.load(Ordering::SeqCst));
    assert_eq!(target.read(LEGACY, 18, One), 0);
    target.write(LEGACY, 14, Two, 1);
    assert_eq!(target.read(LEGACY, 8, Four), 0, "the queue is gone");
    ends.join().unwrap();
}

#[test]
fn a_legacy_driver_may_use_a_queue_before_driver_ok_and_set_one_up_after_it() {
    let (mut target, life) = MODERN.target(64);
    let write = |target: &mut dyn Target, writes: &[(u64, Width, u32)]| {
        for (offset, width, value) in writes {
            target.write(LEGACY, *offset, *width, *value);
        }
    };
    write(&mut *target, &[(18, One, 3), (8, Four, 1), (16, Two, 0)]);
    assert_eq!(life.activations.load(Ordering::SeqCst), 1);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 1);
    write(&mut *target, &[(18, One, 7)]);
    assert_eq!(life.activations.load(Ordering::SeqCst), 1);
    write(&mut *target, &[(14, Two, 1), (8, Four, 8), (16, Two, 1)]);
    assert_eq!(life.queues_enabled.load(Ordering::SeqCst), 1);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 2);
}

#[test]
fn a_queue_that_is_being_reset_says_so_and_takes_nothing() {
    let (mut target, life) = MODERN.target(64);
    go_live(&mut *target);
    life.busy.store(true, Ordering::SeqCst);
    target.write(COMMON, 0x3a, Two, 1);
    assert_eq!(target.read(COMMON, 0x3a, Two), 1);
    target.write(COMMON, 0x1c, Two, 1);
    target.write(COMMON, 0x6000, Two, 0);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 0);
    life.busy.store(false, Ordering::SeqCst);
    assert_eq!(target.read(COMMON, 0x3a, Two), 0);
    assert_eq!(target.read(COMMON, 0x1c, Two), 0);
    assert_eq!(life.queues_enabled.load(Ordering::SeqCst), 0);
}

#[test]
fn a_queue_that_was_never_enabled_stays_off_once_the_device_is_live() {
    let (mut target, life) = MODERN.target(64);
    go_live(&mut *target);
    target.write(COMMON, 0x16, Two, 1);
    target.write(COMMON, 0x1c, Two, 1);
    assert_eq!(target.read(COMMON, 0x1c, Two), 0);
    target.write(COMMON, 0x6004, Two, 1);
    assert_eq!(life.queues_enabled.load(Ordering::SeqCst), 0);
    assert_eq!(life.notifications.load(Ordering::SeqCst), 0);
}

#[test]
fn features_chosen_by_one_door_are_not_more_by_the_other() {
    let (mut target, life) = MODERN.target(64);
    // All features by the modern door, then live by the legacy one; `Idle` looks at them.
    for select in 0..2 {
        target.write(COMMON, 0x08, Four, select);
        target.write(COMMON, 0x0c, Four, u32::MAX);
    }
    for (offset, width, value) in [(18, One, 3), (8, Four, 1), (18, One, 7)] {
        target.write(LEGACY, offset, width, value);
    }
    assert_eq!(life.activations.load(Ordering::SeqCst), 1);
}

#[test]
fn the_legacy_registers_are_the_same_by_port_and_by_memory() {
    let face = Face::Pci(Shape {
        mode: Mode::Legacy,
        layout: Layout::Qemu,
        legacy_in_memory: true,
    });
    let (mut target, _) = face.target(64);
    let memory = Window::Region(3);
    for (offset, width, value) in [
        (4, Four, 5),
        (14, Two, 1),
        (8, Four, 0x1234),
        (18, One, 3),
        (20, Four, 0x5566_7788),
    ] {
        target.write(LEGACY, offset, width, value);
        assert_eq!(target.read(memory, offset, width), value);
        target.write(memory, offset, width, 0);
        target.write(memory, offset, width, value);
        assert_eq!(target.read(LEGACY, offset, width), value);
    }
    for offset in 0..0x80 {
        let both = [LEGACY, memory].map(|window| target.read(window, offset, One));
        assert_eq!(both[0], both[1], "{offset:#x}");
    }
}

#[test]
fn a_row_of_slots_answers_all_of_its_addresses_and_no_others() {
    let (target, _) = Face::Mmio(Version::Two).target(1);
    let mut claims = Vec::new();
    target.claims(&mut claims);
    let range = claims[0].range;
    assert_eq!(range.first, 0xfe70_0000);
    assert_eq!(range.last, 0xfe70_0000 + 2 * SLOT_BYTES - 1);
    let machine = Machine::new(Board::new(0, 1));
    assert_eq!(machine.claims().len(), 1);
}
