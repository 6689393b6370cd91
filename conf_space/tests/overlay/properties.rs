//! What holds for every sequence of accesses.

use conf_space::memory::MemorySpace;
use conf_space::overlay::{Identity, OpError, Overlay, OverlayState, Policy};
use conf_space::registers::header::command::{
    INTX_DISABLE, IO, MEMORY, PARITY_ERROR_RESPONSE, SERR,
};
use conf_space::{ConfigSize, ConfigSpace, Resource, ResourceFlags, Width};
use proptest::prelude::*;

use crate::device;

/// One access as a guest asks for it: mostly sensible, sometimes anything.
#[derive(Debug, Clone, Copy)]
struct Request {
    offset: i32,
    size: i32,
    value: u32,
    write: bool,
}

fn request() -> impl Strategy<Value = Request> {
    let offset = prop_oneof![
        8 => 0..256i32,
        2 => 0..4096i32,
        1 => any::<i32>(),
    ];
    let size = prop_oneof![9 => prop::sample::select(vec![1, 2, 4]), 1 => any::<i32>()];
    let ones = prop_oneof![Just(u32::MAX), Just(0xffff_f800), Just(0)];
    let value = prop_oneof![2 => any::<u32>(), 1 => ones];
    (offset, size, value, any::<bool>()).prop_map(|(offset, size, value, write)| Request {
        offset,
        size,
        value,
        write,
    })
}

/// Requests at sensible places only: aligned, of a sensible size.
fn valid_request() -> impl Strategy<Value = Request> {
    request().prop_filter_map("an access", |request| {
        let size = [1, 2, 4].into_iter().find(|size| *size == request.size)?;
        let offset = request.offset & !(size - 1);
        (0..4096)
            .contains(&offset)
            .then_some(Request { offset, ..request })
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    (any::<bool>(), any::<bool>()).prop_map(|(permissive, allow_interrupt_control)| Policy {
        permissive: permissive.into(),
        allow_interrupt_control,
    })
}

fn resource() -> impl Strategy<Value = Resource> {
    (any::<u64>(), any::<u64>(), any::<u8>()).prop_map(|(start, size, flags)| Resource {
        start,
        size,
        flags: ResourceFlags::from_bits_truncate(flags),
    })
}

fn identity() -> impl Strategy<Value = Identity> {
    (
        prop::array::uniform7(resource()),
        any::<bool>(),
        any::<bool>(),
        any::<u8>(),
    )
        .prop_map(
            |(resources, is_virtual_function, conventional, interrupt_line)| Identity {
                resources,
                is_virtual_function,
                interrupt_line,
                config_size: match conventional {
                    true => ConfigSize::Conventional,
                    false => ConfigSize::Extended,
                },
                ..device::identity()
            },
        )
}

/// A device with random contents, all of it writable, that has at least a type 0 header.
fn any_device(image: &[u8]) -> MemorySpace {
    let mut space = MemorySpace::new(ConfigSize::Extended);
    for (offset, byte) in (0u16..).zip(image) {
        space.make_writable(offset, Width::One, 0xff);
        space.set(offset, Width::One, u32::from(*byte));
    }
    space.set(0x0e, Width::One, 0);
    space
}

fn run(overlay: &mut Overlay, space: &MemorySpace, request: Request, policy: &Policy) {
    let Request {
        offset,
        size,
        value,
        write,
    } = request;
    let result = if write {
        overlay.write(space, offset, size, value, policy).map(|_| 0)
    } else {
        overlay.read(space, offset, size)
    };
    if let Ok(value) = result {
        assert!(
            u64::from(value) < 1 << (8 * size),
            "{request:?} gave {value:#x}"
        );
    }
}

proptest! {
    // A device that fails has much to shrink.
    #![proptest_config(ProptestConfig { max_shrink_time: 5000, ..ProptestConfig::default() })]

    #[test]
    fn no_access_panics_whatever_the_device_holds(
        image in prop::collection::vec(any::<u8>(), 4096),
        identity in identity(),
        requests in prop::collection::vec(request(), 1..64),
        policy in policy(),
        state in any::<u64>(),
    ) {
        let space = any_device(&image);
        let mut overlay = Overlay::new(&identity, &space).unwrap();
        overlay.set_state(OverlayState::from_bits(state));
        for request in requests {
            run(&mut overlay, &space, request, &policy);
        }
        let covered: u16 = overlay.fields().map(|field| field.length).sum();
        prop_assert_eq!(covered, identity.config_size.bytes());
    }

    #[test]
    fn no_policy_lets_a_guest_change_decode_or_error_reporting(
        requests in prop::collection::vec(request(), 1..64),
        policy in policy(),
        before in any::<u16>(),
    ) {
        let mut space = device::nic();
        space.make_writable(0x04, Width::Two, 0xffff);
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        let mut protected = PARITY_ERROR_RESPONSE | SERR;
        if !policy.allow_interrupt_control {
            protected |= INTX_DISABLE;
        }
        space.set(0x04, Width::Two, u32::from(before | IO | MEMORY));
        for request in requests {
            run(&mut overlay, &space, request, &policy);
            let command = space.read(0x04, Width::Two).unwrap() as u16;
            prop_assert_eq!(command & (IO | MEMORY), IO | MEMORY);
            prop_assert_eq!(command & protected, before & protected);
        }
    }

    #[test]
    fn without_the_permission_no_guest_changes_an_interrupt_control_word(
        requests in prop::collection::vec(request(), 1..64),
        permissive in any::<bool>(),
    ) {
        let space = device::nic();
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        let policy = Policy { permissive: permissive.into(), allow_interrupt_control: false };
        for request in requests {
            run(&mut overlay, &space, request, &policy);
        }
        prop_assert_eq!(space.read(device::MSI + 2, Width::Two), Ok(0x0080));
        prop_assert_eq!(space.read(device::MSIX + 2, Width::Two), Ok(0x0004));
    }

    /// The merge, checked byte by byte: any access reads what its bytes read alone.
    #[test]
    fn c3_every_read_is_made_of_what_its_bytes_read(
        writes in prop::collection::vec(valid_request(), 0..16),
        read in valid_request(),
    ) {
        let space = device::nic();
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        for request in writes {
            run(&mut overlay, &space, Request { write: true, ..request }, &crate::PERMISSIVE);
        }
        let whole = overlay.read(&space, read.offset, read.size).unwrap();
        let bytes: Vec<u8> = (0..read.size)
            .map(|byte| overlay.read(&space, read.offset + byte, 1).unwrap() as u8)
            .collect();
        prop_assert_eq!(&whole.to_le_bytes()[..bytes.len()], &bytes[..]);
    }

    /// A write of part of a register does what a write of the whole with the other bytes as the
    /// guest reads them does; bytes that clear bits are written as zero.
    #[test]
    fn c4_a_partial_write_is_a_whole_write_with_the_other_bytes_kept(
        prepare in prop::collection::vec(valid_request(), 0..8),
        offset in 0i32..256,
        value in any::<u32>(),
        policy in policy(),
    ) {
        let build = || {
            let space = device::nic();
            let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
            for request in &prepare {
                run(&mut overlay, &space, Request { write: true, ..*request }, &policy);
            }
            (space, overlay)
        };
        let (space, mut overlay) = build();
        let register = overlay
            .fields()
            .find(|field| (field.offset..field.offset + field.length).contains(&(offset as u16)))
            .unwrap();
        let whole = |overlay: &Overlay, space: &MemorySpace| {
            let (start, length) = (i32::from(register.offset), i32::from(register.length));
            let current = overlay.read(space, start, length).ok()?;
            let kept = if register.offset == device::PM + 4 { current & !0x8000 } else { current };
            let shift = 8 * (offset - start);
            Some((start, length, kept & !(0xff << shift) | (value & 0xff) << shift))
        };
        let Some((start, length, merged)) = whole(&overlay, &space) else { return Ok(()) };
        if register.treatment == conf_space::overlay::Treatment::Dropped {
            return Ok(());
        }
        let partial = overlay.write(&space, offset, 1, value, &policy);
        let (other_space, mut other) = build();
        let entire = other.write(&other_space, start, length, merged, &policy);
        prop_assert_eq!(partial, entire);
        prop_assert_eq!(overlay.state(), other.state());
        for dword in (0..4096).step_by(4) {
            prop_assert_eq!(space.read(dword, Width::Four), other_space.read(dword, Width::Four));
        }
    }

    #[test]
    fn c5_without_permission_a_guest_changes_only_registers_with_a_rule(
        requests in prop::collection::vec(request(), 1..64),
    ) {
        let space = any_device(&image_of(&device::nic()));
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        let before = image_of(&space);
        for request in requests {
            run(&mut overlay, &space, request, &crate::ORDINARY);
        }
        let after = image_of(&space);
        for field in overlay.fields() {
            use conf_space::overlay::Treatment::{Dropped, Hidden, ReadOnly};
            if matches!(field.treatment, Dropped | Hidden | ReadOnly) {
                let bytes = usize::from(field.offset)..usize::from(field.offset + field.length);
                prop_assert_eq!(&before[bytes.clone()], &after[bytes], "{:?}", field);
            }
        }
    }

    #[test]
    fn a_restart_at_any_moment_goes_unnoticed(
        before in prop::collection::vec(request(), 0..32),
        after in prop::collection::vec(request(), 0..32),
        policy in policy(),
    ) {
        let (space, other_space) = (device::nic(), device::nic());
        let mut overlay = Overlay::new(&device::identity(), &space).unwrap();
        let mut other = Overlay::new(&device::identity(), &other_space).unwrap();
        for request in before {
            run(&mut overlay, &space, request, &policy);
            run(&mut other, &other_space, request, &policy);
        }
        let stored = OverlayState::from_bits(other.state().to_bits());
        let mut other = Overlay::new(&device::identity(), &other_space).unwrap();
        other.set_state(stored);
        for Request { offset, size, value, write } in after {
            if write {
                prop_assert_eq!(
                    overlay.write(&space, offset, size, value, &policy),
                    other.write(&other_space, offset, size, value, &policy)
                );
            } else {
                prop_assert_eq!(
                    overlay.read(&space, offset, size),
                    other.read(&other_space, offset, size)
                );
            }
        }
    }

    #[test]
    fn only_aligned_accesses_within_the_space_are_carried_out(request in request()) {
        let space = device::nic();
        let overlay = Overlay::new(&device::identity(), &space).unwrap();
        let (offset, size) = (i64::from(request.offset), i64::from(request.size));
        let valid = [1, 2, 4].contains(&size) && offset >= 0 && offset % size == 0
            && offset + size <= 4096;
        let result = overlay.read(&space, request.offset, request.size);
        prop_assert_eq!(result == Err(OpError::InvalidOffset), !valid);
    }
}

fn image_of(space: &MemorySpace) -> Vec<u8> {
    (0..4096)
        .map(|offset| space.read(offset, Width::One).unwrap() as u8)
        .collect()
}
