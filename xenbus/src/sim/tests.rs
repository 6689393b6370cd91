//! The machine's hypercalls, as dom0 and guests make them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::evtchn::take;
use super::test_bus::{MSI, MSIX, TestBus, address};
use super::{DomainKind, Machine, MachineError, MachineOptions};
use crate::platform::{MsiRequest, Xen, XenError};
use crate::types::{DomId, GrantRef, Gsi, Pirq, Port};

struct Setup {
    machine: Machine,
    bus: Arc<TestBus>,
    _run_dir: tempfile::TempDir,
}

/// A machine with devices 3:00.0 and 3:01.0.
fn setup_with(options: MachineOptions) -> Setup {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::with_options(run_dir.path(), options).unwrap();
    let bus = TestBus::new();
    bus.add(address(0));
    bus.add(address(1));
    machine.set_hardware(bus.clone());
    Setup {
        machine,
        bus,
        _run_dir: run_dir,
    }
}

fn setup() -> Setup {
    setup_with(MachineOptions::default())
}

impl Setup {
    fn guest(&self) -> DomId {
        super::lock(&self.machine.inner.hypervisor)
            .create(DomainKind::Pv)
            .unwrap()
    }

    fn destroy(&self, guest: DomId) {
        self.machine.destroy(guest).unwrap();
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, XenError>) -> i32 {
    result.unwrap_err().errno().unwrap()
}

fn msix(entry: u16) -> MsiRequest {
    MsiRequest::MsiX {
        entry,
        table_base: 0xfe00_0000,
    }
}

#[test]
fn two_machines_do_not_share_a_run_directory_but_one_may_follow_the_other() {
    let run_dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(run_dir.path()).unwrap();
    assert!(matches!(
        Machine::new(run_dir.path()),
        Err(MachineError::InUse(_))
    ));
    drop(machine);
    Machine::new(run_dir.path())
        .unwrap()
        .connect_xenstore()
        .unwrap();
}

#[test]
fn a_granted_page_is_the_same_memory_on_both_sides() {
    let setup = setup();
    let guest = setup.guest();
    let (reference, page) = setup.machine.grant_page(guest, DomId::DOM0).unwrap();
    let guests = super::MappedPage::new(&page).unwrap();
    let ours = setup.machine.map_page(guest, reference).unwrap();
    // SAFETY: both are live mappings of 4096 bytes, and no other thread uses them.
    unsafe {
        guests.base().add(4095).write_volatile(0x5a);
        assert_eq!(ours.base().add(4095).read_volatile(), 0x5a);
    }
}

#[test]
fn only_what_was_granted_to_dom0_can_be_mapped() {
    let setup = setup();
    let (guest, other) = (setup.guest(), setup.guest());
    let (reference, _page) = setup.machine.grant_page(guest, other).unwrap();
    for (domain, reference) in [
        (guest, reference),
        (guest, GrantRef(9999)),
        (other, GrantRef(8)),
        (DomId(77), GrantRef(8)),
    ] {
        assert_eq!(
            errno(setup.machine.map_page(domain, reference)),
            libc::EINVAL
        );
    }
}

#[test]
fn a_mapping_is_counted_and_keeps_a_dead_domain_known() {
    let setup = setup();
    let guest = setup.guest();
    let (reference, _page) = setup.machine.grant_page(guest, DomId::DOM0).unwrap();
    let mapping = setup.machine.map_page(guest, reference).unwrap();
    assert_eq!(setup.machine.mapped_grants(guest), 1);
    assert_eq!(
        errno(setup.machine.end_grant(guest, reference)),
        libc::EBUSY
    );
    setup.destroy(guest);
    assert!(setup.machine.domain_info(guest).unwrap().unwrap().gone);
    assert_eq!(setup.machine.mapped_grants(guest), 1);
    drop(mapping);
    assert_eq!(setup.machine.mapped_grants(guest), 0);
    assert_eq!(setup.machine.domain_info(guest).unwrap(), None);
}

#[test]
fn a_page_cannot_be_shrunk_by_who_holds_its_descriptor() {
    let setup = setup();
    let (_, page) = setup
        .machine
        .grant_page(setup.guest(), DomId::DOM0)
        .unwrap();
    assert!(nix::unistd::ftruncate(&page, 0).is_err());
}

#[test]
fn an_event_channel_needs_a_port_that_is_for_dom0() {
    let setup = setup();
    let guest = setup.guest();
    assert_eq!(
        errno(setup.machine.bind_interdomain(guest, Port(1))),
        libc::EINVAL
    );
    assert_eq!(
        errno(setup.machine.bind_interdomain(DomId(77), Port(1))),
        libc::ESRCH
    );
    let end = setup.machine.alloc_unbound(guest, DomId::DOM0).unwrap();
    let mut port = setup.machine.bind_interdomain(guest, end.port).unwrap();
    assert!(port.take().unwrap());
    port.notify().unwrap();
    assert!(take(&end.event).unwrap());
    setup.machine.close_port(guest, end.port).unwrap();
    assert_eq!(
        errno(setup.machine.close_port(guest, end.port)),
        libc::EINVAL
    );
    port.notify().unwrap();
}

#[test]
fn a_device_goes_from_dom0_to_quarantine_to_a_guest_and_back() {
    let setup = setup();
    let (guest, other) = (setup.guest(), setup.guest());
    let (xen, device) = (&setup.machine, address(0));
    assert_eq!(xen.device_owner(device), Some(DomId::DOM0));
    assert_eq!(errno(xen.deassign_device(DomId::IO, device)), libc::ENODEV);
    xen.assign_device(DomId::IO, device).unwrap();
    xen.assign_device(guest, device).unwrap();
    assert_eq!(errno(xen.assign_device(other, device)), libc::EBUSY);
    assert_eq!(errno(xen.deassign_device(other, device)), libc::ENODEV);
    xen.deassign_device(guest, device).unwrap();
    assert_eq!(xen.device_owner(device), Some(DomId::IO));
    xen.deassign_device(DomId::IO, device).unwrap();
    assert_eq!(xen.device_owner(device), Some(DomId::DOM0));
    assert_eq!(errno(xen.assign_device(DomId::DOM0, device)), libc::EINVAL);
    assert_eq!(errno(xen.assign_device(DomId(77), device)), libc::ESRCH);
    assert_eq!(errno(xen.assign_device(guest, address(9))), libc::ENODEV);
}

#[test]
fn a_dead_guests_devices_go_to_quarantine_and_its_interrupts_end() {
    let setup = setup();
    let guest = setup.guest();
    setup.machine.assign_device(guest, address(0)).unwrap();
    setup
        .machine
        .map_msi(guest, address(0), MsiRequest::Msi)
        .unwrap();
    setup.destroy(guest);
    assert_eq!(setup.machine.device_owner(address(0)), Some(DomId::IO));
    assert!(
        setup
            .bus
            .with(address(0), |device| device.messages.is_empty())
    );
}

#[test]
fn without_an_iommu_nothing_is_assigned() {
    let setup = setup_with(MachineOptions {
        iommu: false,
        ..MachineOptions::default()
    });
    assert_eq!(
        errno(setup.machine.assign_device(DomId::IO, address(0))),
        libc::EOPNOTSUPP
    );
}

#[test]
fn an_msi_reaches_the_guest_that_bound_its_pirq() {
    let setup = setup();
    let guest = setup.guest();
    setup.machine.assign_device(guest, address(0)).unwrap();
    let pirq = setup
        .machine
        .map_msi(guest, address(0), MsiRequest::Msi)
        .unwrap();
    assert_eq!(pirq, Pirq(24 + 32 - 1));
    let (address_, data) = setup.bus.with(address(0), |device| device.messages[&None]);
    assert!(!setup.machine.deliver_msi(address_, data));
    let irq = setup.machine.bind_pirq(guest, pirq).unwrap();
    assert_eq!(errno(setup.machine.bind_pirq(guest, pirq)), libc::EEXIST);
    assert!(setup.machine.deliver_msi(address_, data));
    assert!(take(&irq.event).unwrap());
    assert!(!take(&irq.event).unwrap());
    setup.machine.close_port(guest, irq.port).unwrap();
    assert!(!setup.machine.deliver_msi(address_, data));
    assert_eq!(
        errno(setup.machine.bind_pirq(guest, Pirq(30))),
        libc::EINVAL
    );
}

#[test]
fn msi_is_mapped_for_the_devices_domain_only() {
    let setup = setup();
    let guest = setup.guest();
    assert_eq!(
        errno(setup.machine.map_msi(guest, address(0), MsiRequest::Msi)),
        libc::ENODEV
    );
    assert_eq!(
        errno(
            setup
                .machine
                .map_msi(DomId(77), address(0), MsiRequest::Msi)
        ),
        libc::ESRCH
    );
    setup.machine.assign_device(guest, address(0)).unwrap();
    setup.bus.with(address(0), |device| device.config[0x34] = 0);
    assert_eq!(
        errno(setup.machine.map_msi(guest, address(0), MsiRequest::Msi)),
        libc::ENODEV
    );
}

#[test]
fn msix_needs_its_table_recorded_and_memory_decode() {
    let setup = setup();
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    assert_eq!(errno(xen.map_msi(guest, device, msix(0))), libc::ENODATA);
    setup.bus.with(device, |device| device.config[4] = 0);
    assert_eq!(errno(xen.prepare_msix(device)), libc::ENXIO);
    assert_eq!(errno(xen.map_msi(guest, device, msix(0))), libc::ENXIO);
    setup.bus.with(device, |device| device.config[4] = 2);
    xen.prepare_msix(device).unwrap();
    xen.prepare_msix(device).unwrap();
    assert_eq!(errno(xen.map_msi(guest, device, msix(8))), libc::EINVAL);
    let pirq = xen.map_msi(guest, device, msix(7)).unwrap();
    assert!(
        setup
            .bus
            .with(device, |device| device.messages.contains_key(&Some(7)))
    );
    assert_eq!(errno(xen.release_msix(device)), libc::EBUSY);
    xen.unmap_pirq(guest, pirq).unwrap();
    xen.release_msix(device).unwrap();
    assert_eq!(errno(xen.release_msix(device)), libc::EBUSY);
}

#[test]
fn for_a_virtual_function_its_physical_functions_memory_decode_counts() {
    let setup = setup();
    setup.bus.with(address(1), |device| {
        device.config[4] = 0;
        device.physical_function = Some(address(0));
    });
    setup.machine.prepare_msix(address(1)).unwrap();
}

#[test]
fn pirqs_run_out_and_come_back() {
    let setup = setup_with(MachineOptions {
        extra_pirqs: 3,
        ..MachineOptions::default()
    });
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    xen.prepare_msix(device).unwrap();
    let pirqs: Vec<_> = (0..3)
        .map(|entry| xen.map_msi(guest, device, msix(entry)).unwrap())
        .collect();
    assert_eq!(pirqs, [Pirq(26), Pirq(25), Pirq(24)]);
    assert_eq!(errno(xen.map_msi(guest, device, msix(3))), libc::ENOSPC);
    xen.unmap_pirq(guest, Pirq(25)).unwrap();
    assert_eq!(errno(xen.unmap_pirq(guest, Pirq(25))), libc::EINVAL);
    assert_eq!(xen.map_msi(guest, device, msix(3)).unwrap(), Pirq(25));
    assert_eq!(errno(xen.unmap_pirq(DomId(77), Pirq(25))), libc::ESRCH);
}

#[test]
fn multiple_msi_vectors_are_a_block_that_comes_and_goes_as_one() {
    let setup = setup();
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    assert_eq!(
        errno(xen.map_msi(guest, device, MsiRequest::MultiMsi { count: 8 })),
        libc::ENFILE
    );
    assert_eq!(
        errno(xen.map_msi(guest, device, MsiRequest::MultiMsi { count: 0 })),
        libc::EDOM
    );
    let first = xen
        .map_msi(guest, device, MsiRequest::MultiMsi { count: 3 })
        .unwrap();
    assert_eq!(first, Pirq(52));
    assert_eq!(
        setup.bus.with(device, |device| device.config[MSI + 2]) >> 4 & 7,
        2
    );
    let irq = xen.bind_pirq(guest, Pirq(54)).unwrap();
    let (address, data) = setup.bus.with(device, |device| device.messages[&None]);
    assert!(xen.deliver_msi(address, data | 2));
    assert!(take(&irq.event).unwrap());
    assert_eq!(errno(xen.unmap_pirq(guest, Pirq(54))), libc::EBUSY);
    xen.unmap_pirq(guest, first).unwrap();
    assert!(xen.mapped_pirqs(guest).is_empty());
    assert!(!xen.deliver_msi(address, data | 2));
}

#[test]
fn a_block_whose_device_was_removed_goes_as_one() {
    let setup = setup();
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    let first = xen
        .map_msi(guest, device, MsiRequest::MultiMsi { count: 4 })
        .unwrap();
    xen.bind_pirq(guest, Pirq(54)).unwrap();
    assert_eq!(xen.device_removed(device), 4);
    xen.unmap_pirq(guest, first).unwrap();
    assert!(xen.mapped_pirqs(guest).is_empty());
    // Nobody's port is in the way of the next one's.
    assert_eq!(errno(xen.bind_pirq(guest, Pirq(54))), libc::EINVAL);
}

#[test]
fn after_a_reset_xen_programs_again_what_it_knows_and_enables_it() {
    let setup = setup();
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    xen.prepare_msix(device).unwrap();
    xen.map_msi(guest, device, msix(2)).unwrap();
    let before = setup
        .bus
        .with(device, |device| std::mem::take(&mut device.messages));
    xen.restore_msi(device).unwrap();
    assert_eq!(
        setup.bus.with(device, |device| device.messages.clone()),
        before
    );
    assert_eq!(
        setup.bus.with(device, |device| device.config[MSIX + 3]) & 0x80,
        0x80
    );
    assert_eq!(errno(xen.restore_msi(address(9))), libc::ENODEV);
}

#[test]
fn a_line_interrupts_every_guest_that_it_is_mapped_for() {
    let setup = setup();
    let (first, second) = (setup.guest(), setup.guest());
    let irqs: Vec<_> = [first, second]
        .into_iter()
        .map(|guest| {
            let pirq = super::lock(&setup.machine.inner.hypervisor)
                .map_line(guest, Gsi(17))
                .unwrap();
            assert_eq!(pirq, Pirq(17));
            setup.machine.bind_pirq(guest, pirq).unwrap()
        })
        .collect();
    assert_eq!(setup.machine.raise_gsi(Gsi(17)), 2);
    assert_eq!(setup.machine.raise_gsi(Gsi(16)), 0);
    assert!(irqs.iter().all(|irq| take(&irq.event).unwrap()));
    setup.machine.unmap_pirq(first, Pirq(17)).unwrap();
    assert_eq!(setup.machine.raise_gsi(Gsi(17)), 1);
    let mut hypervisor = super::lock(&setup.machine.inner.hypervisor);
    assert!(hypervisor.map_line(first, Gsi(24)).is_err());
}

#[test]
fn a_device_that_was_removed_is_gone_for_xen_too() {
    let setup = setup();
    let guest = setup.guest();
    setup.machine.assign_device(guest, address(0)).unwrap();
    setup.bus.remove(address(0));
    assert_eq!(setup.machine.device_owner(address(0)), None);
    assert_eq!(
        errno(setup.machine.map_msi(guest, address(0), MsiRequest::Msi)),
        libc::ENODEV
    );
}

#[test]
fn an_interrupt_that_the_device_cannot_be_programmed_for_is_not_mapped() {
    let setup = setup();
    let guest = setup.guest();
    let (xen, device) = (&setup.machine, address(0));
    xen.assign_device(guest, device).unwrap();
    xen.prepare_msix(device).unwrap();
    let first = xen.map_msi(guest, device, msix(0)).unwrap();
    setup.bus.out_of_vectors.store(true, Ordering::Relaxed);
    for _ in 0..1000 {
        assert_eq!(errno(xen.map_msi(guest, device, msix(1))), libc::ENOSPC);
    }
    assert_eq!(xen.mapped_pirqs(guest), [first]);
    assert_eq!(errno(xen.restore_msi(device)), libc::ENOSPC);
    setup.bus.out_of_vectors.store(false, Ordering::Relaxed);
    xen.map_msi(guest, device, msix(1)).unwrap();
    xen.restore_msi(device).unwrap();
}
