//! What devices reach of a guest's memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::{Refused, is_whole_blocks};
use crate::platform::Xen;
use crate::sim::test_bus::{TestBus, address};
use crate::sim::{DmaMemory, DomainKind, Machine, MachineOptions, lock};
use crate::types::DomId;

struct Setup {
    machine: Machine,
    bus: Arc<TestBus>,
    guest: DomId,
    _run_dir: tempfile::TempDir,
}

fn setup() -> Setup {
    setup_with(MachineOptions::default())
}

fn setup_with(options: MachineOptions) -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::with_options(run_dir.path(), options).unwrap();
    let bus = TestBus::new();
    for number in 0..2 {
        bus.add(address(number));
    }
    machine.set_hardware(bus.clone());
    let guest = machine.create_domain("guest", DomainKind::Pv).unwrap();
    Setup {
        machine,
        bus,
        guest,
        _run_dir: run_dir,
    }
}

fn memfd(size: i64, seals: SealFlag) -> OwnedFd {
    let file = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    ftruncate(&file, size).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

/// Two huge pages of 2 MiB.
fn huge_pages() -> OwnedFd {
    let flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = memfd_create(c"huge", flags).unwrap();
    ftruncate(&file, 4 << 20).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file
}

/// A MiB of memory.
fn at(address: u64, size: u64) -> DmaMemory {
    DmaMemory {
        address,
        size,
        file: memfd(0x10_0000, SealFlag::F_SEAL_SHRINK),
        offset: 0,
    }
}

fn memory(setup: &Setup) -> Option<BTreeMap<u64, u64>> {
    setup.bus.reach(setup.guest).map(|reach| reach.memory)
}

#[test]
fn a_device_reaches_what_its_guest_has_given_whether_before_or_after() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.give_memory(guest, at(0x1000, 0x2000)).unwrap();
    assert_eq!(memory(&setup), None);
    machine.assign_device(guest, address(0)).unwrap();
    assert_eq!(memory(&setup), Some([(0x1000, 0x2000)].into()));
    machine.give_memory(guest, at(0x3000, 0x1000)).unwrap();
    machine.assign_device(guest, address(1)).unwrap();
    assert_eq!(
        memory(&setup),
        Some([(0x1000, 0x2000), (0x3000, 0x1000)].into())
    );
    machine.take_memory(guest, 0x1000).unwrap();
    assert_eq!(memory(&setup), Some([(0x3000, 0x1000)].into()));
    machine.deassign_device(guest, address(0)).unwrap();
    machine.deassign_device(guest, address(1)).unwrap();
    assert_eq!(setup.bus.reach(guest), None);
}

#[test]
fn nothing_reaches_the_memory_of_a_guest_that_was_destroyed() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.give_memory(guest, at(0, 0x1000)).unwrap();
    machine.assign_device(guest, address(0)).unwrap();
    machine.destroy_domain(guest).unwrap();
    assert_eq!(setup.bus.reach(guest), None);
    let refused = machine.give_memory(guest, at(0, 0x1000)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ESRCH));
}

#[test]
fn a_device_that_was_removed_is_its_guests_no_more_and_one_in_its_place_can_be() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.assign_device(guest, address(0)).unwrap();
    setup.bus.remove(address(0));
    machine.device_removed(address(0));
    assert_eq!(setup.bus.reach(guest), None);
    setup.bus.add(address(0));
    machine.assign_device(guest, address(0)).unwrap();
    assert!(setup.bus.reach(guest).is_some());
}

#[test]
fn a_device_whose_memory_cannot_be_mapped_stays_in_quarantine_and_memory_that_cannot_be_is_not_had()
{
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.assign_device(guest, address(0)).unwrap();
    setup.bus.full.store(true, Ordering::Relaxed);
    let refused = machine.assign_device(guest, address(1)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENOMEM));
    assert_eq!(machine.device_owner(address(1)), Some(DomId::IO));
    let refused = machine.give_memory(guest, at(0, 0x1000)).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::ENOMEM));
    setup.bus.full.store(false, Ordering::Relaxed);
    machine.assign_device(guest, address(1)).unwrap();
    machine.give_memory(guest, at(0, 0x1000)).unwrap();
    assert_eq!(memory(&setup), Some([(0, 0x1000)].into()));
}

#[test]
fn what_cannot_be_memory_is_refused() {
    let setup = setup();
    let given = |memory| {
        let result = setup.machine.give_memory(setup.guest, memory);
        result.map_err(|error| error.errno().unwrap())
    };
    given(at(0x1_0000, 0x1_0000)).unwrap();
    for (start, size) in [(0xf000, 0x1001), (0xf001, 0x1000), (0x2_0000, 0), (0, 0)] {
        assert_eq!(given(at(start, size)), Err(libc::EINVAL), "{start:#x}");
    }
    for (start, size) in [(0xf000, 0x2000), (0x1_0000, 0x1000), (0x1_f000, 0x1000)] {
        assert_eq!(given(at(start, size)), Err(libc::EEXIST), "{start:#x}");
    }
    // Beyond the end of the address space, and of the file.
    assert_eq!(given(at(u64::MAX - 0xfff, 0x1000)), Err(libc::EINVAL));
    assert_eq!(given(at(0x10_0000, 0x10_1000)), Err(libc::EINVAL));
    let beyond = DmaMemory {
        offset: u64::MAX - 0xfff,
        ..at(0x10_0000, 0x1000)
    };
    assert_eq!(given(beyond), Err(libc::EINVAL));
    // What can be cut off under the device, or is no memory.
    let shrinkable = memfd(0x1000, SealFlag::empty());
    let file = std::fs::File::open("/dev/null").unwrap();
    for file in [shrinkable, file.into()] {
        let memory = DmaMemory {
            file,
            ..at(0x10_0000, 0x1000)
        };
        assert_eq!(given(memory), Err(libc::EINVAL));
    }
    given(at(0xf000, 0x1000)).unwrap();
    given(at(0x2_0000, 0x1000)).unwrap();
    let taken = setup
        .machine
        .take_memory(setup.guest, 0x1_1000)
        .unwrap_err();
    assert_eq!(taken.errno(), Some(libc::EINVAL));
}

#[test]
fn a_guest_has_a_bounded_number_of_parts() {
    let setup = setup();
    let part = |index: u64| {
        setup
            .machine
            .give_memory(setup.guest, at(index * 0x1000, 0x1000))
    };
    for index in 0..64 {
        part(index).unwrap();
    }
    assert_eq!(part(64).unwrap_err().errno(), Some(libc::ENOSPC));
    setup.machine.take_memory(setup.guest, 0).unwrap();
    part(64).unwrap();
}

#[test]
fn a_guest_gives_no_more_memory_than_it_may_whatever_it_has_behind_it() {
    let setup = setup_with(MachineOptions {
        guest_memory: 0x10_0000,
        ..MachineOptions::default()
    });
    let (machine, guest) = (&setup.machine, setup.guest);
    let given = |memory| {
        let result = machine.give_memory(guest, memory);
        result.map_err(|error| error.errno().unwrap())
    };
    // Sparse: nothing of it is in use.
    let sparse = |address, size| DmaMemory {
        file: memfd(1 << 40, SealFlag::F_SEAL_SHRINK),
        ..at(address, size)
    };
    assert_eq!(given(sparse(0, 1 << 40)), Err(libc::ENOMEM));
    given(at(0, 0xf_f000)).unwrap();
    assert_eq!(given(at(0x20_0000, 0x2000)), Err(libc::ENOMEM));
    given(at(0x20_0000, 0x1000)).unwrap();
    assert_eq!(given(at(0x30_0000, 0x1000)), Err(libc::ENOMEM));
    // Another guest's is its own.
    let other = machine.create_domain("other", DomainKind::Pv).unwrap();
    machine.give_memory(other, at(0, 0x10_0000)).unwrap();
    // And what was taken back may be given again.
    machine.take_memory(guest, 0).unwrap();
    given(at(0x30_0000, 0xf_f000)).unwrap();
}

#[test]
fn all_guests_together_give_no_more_memory_than_they_may() {
    let setup = setup_with(MachineOptions {
        all_guests_memory: 0x4000,
        ..MachineOptions::default()
    });
    let (machine, one) = (&setup.machine, setup.guest);
    let other = machine.create_domain("other", DomainKind::Pv).unwrap();
    let given = |guest, memory| {
        let result = machine.give_memory(guest, memory);
        result.map_err(|error| error.errno().unwrap())
    };
    given(one, at(0, 0x3000)).unwrap();
    assert_eq!(given(other, at(0, 0x2000)), Err(libc::ENOMEM));
    assert_eq!(given(one, at(0x1_0000, 0x2000)), Err(libc::ENOMEM));
    given(other, at(0, 0x1000)).unwrap();
    // What is refused for another reason does not count.
    machine.assign_device(other, address(0)).unwrap();
    machine.take_memory(one, 0).unwrap();
    setup.bus.full.store(true, Ordering::Relaxed);
    given(other, at(0x1_0000, 0x1000)).unwrap_err();
    setup.bus.full.store(false, Ordering::Relaxed);
    given(one, at(0, 0x3000)).unwrap();
    assert_eq!(given(one, at(0x1_0000, 0x1000)), Err(libc::ENOMEM));
    // Nor does that of a guest that is no more.
    machine.destroy_domain(one).unwrap();
    given(other, at(0x1_0000, 0x3000)).unwrap();
    assert_eq!(
        given(other, at(0x2_0000, u64::MAX - 0x2_ffff)),
        Err(libc::EINVAL)
    );
}

#[test]
fn a_refusal_that_takes_words_names_the_limit_or_the_size_of_a_page() {
    let text = Refused::TooMuch {
        given: 4096,
        limit: 1 << 20,
    }
    .to_string();
    for part in ["4096", "1048576", "--guest-memory"] {
        assert!(text.contains(part), "{text}");
    }
    let (given, limit) = (4096, 1 << 20);
    let text = Refused::TooMuchTogether { given, limit }.to_string();
    for part in ["4096", "1048576", "--all-guests-memory"] {
        assert!(text.contains(part), "{text}");
    }
    let text = Refused::HugePages { block: 2 << 20 }.to_string();
    assert!(text.contains("2097152"), "{text}");
}

#[test]
fn memory_in_huge_pages_is_given_in_whole_ones() {
    const HUGE: u64 = 2 << 20;
    assert!(is_whole_blocks(HUGE, HUGE, 4 * HUGE));
    assert!(!is_whole_blocks(HUGE, 4096, 0));
    assert!(!is_whole_blocks(HUGE, HUGE, 4096));
    assert!(!is_whole_blocks(0, HUGE, 0));
    let setup = setup();
    let file = huge_pages();
    let given = |address, size, offset| {
        let memory = DmaMemory {
            address,
            size,
            offset,
            file: file.try_clone().unwrap(),
        };
        let result = setup.machine.give_memory(setup.guest, memory);
        result.map_err(|error| error.errno().unwrap())
    };
    assert_eq!(given(0, 0x1000, 0), Err(libc::EINVAL));
    assert_eq!(given(0, HUGE, 0x1000), Err(libc::EINVAL));
    // Where devices see it is another matter.
    given(0x1000, HUGE, HUGE).unwrap();
}

#[test]
fn memory_that_devices_reach_still_is_not_said_to_be_taken_back() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.assign_device(guest, address(0)).unwrap();
    machine.give_memory(guest, at(0x1000, 0x1000)).unwrap();
    setup.bus.stuck.store(true, Ordering::Relaxed);
    let refused = machine.take_memory(guest, 0x1000).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EIO));
    let again = machine.give_memory(guest, at(0x1000, 0x1000)).unwrap_err();
    assert_eq!(again.errno(), Some(libc::EEXIST));
    setup.bus.stuck.store(false, Ordering::Relaxed);
    machine.take_memory(guest, 0x1000).unwrap();
    assert_eq!(memory(&setup), Some([].into()));
}

#[test]
fn a_device_that_was_removed_is_nobodys_whoever_xen_thinks_has_it() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    machine.assign_device(guest, address(0)).unwrap();
    // As when dom0 and a guest's end come between a look and the next.
    lock(&machine.inner.hypervisor).devices.remove(&address(0));
    machine.device_removed(address(0));
    assert_eq!(setup.bus.reach(guest), None);
}

#[test]
fn a_device_is_cut_off_while_the_memory_of_another_guest_is_being_mapped() {
    let setup = setup();
    let (machine, guest) = (&setup.machine, setup.guest);
    let other = machine.create_domain("other", DomainKind::Pv).unwrap();
    machine.assign_device(guest, address(0)).unwrap();
    machine.assign_device(other, address(1)).unwrap();
    let pause = Arc::new(Barrier::new(2));
    *lock(&setup.bus.pause) = Some(Arc::clone(&pause));
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| machine.give_memory(other, at(0, 0x1000)).unwrap());
        pause.wait();
        scope.spawn(move || {
            machine.device_removed(address(0));
            done.send(()).unwrap();
        });
        let cut_off = is_done.recv_timeout(Duration::from_secs(10));
        pause.wait();
        assert_eq!(cut_off, Ok(()));
    });
    assert_eq!(setup.bus.reach(guest), None);
    let reach = setup.bus.reach(other).unwrap();
    assert_eq!(reach.memory, [(0, 0x1000)].into());
}

thread_local! {
    /// What was logged at warning level on this thread.
    static WARNINGS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Collector;

impl log::Log for Collector {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            WARNINGS.with_borrow_mut(|warnings| warnings.push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

#[test]
fn each_reason_for_a_refusal_is_told_once_for_each_guest() {
    log::set_logger(&Collector).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let setup = setup_with(MachineOptions {
        guest_memory: 0x1000,
        ..MachineOptions::default()
    });
    let machine = &setup.machine;
    let other = machine.create_domain("other", DomainKind::Pv).unwrap();
    for guest in [setup.guest, other] {
        for _ in 0..3 {
            let part = DmaMemory {
                file: huge_pages(),
                ..at(0, 0x1000)
            };
            machine.give_memory(guest, part).unwrap_err();
            machine.give_memory(guest, at(0, 0x2000)).unwrap_err();
            machine.give_memory(guest, at(1, 0x1000)).unwrap_err();
        }
        let told = WARNINGS.take();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("huge pages"), "{told:?}");
        assert!(told[1].contains("--guest-memory"), "{told:?}");
    }
}
