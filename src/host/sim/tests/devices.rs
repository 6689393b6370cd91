//! Registers, BARs, drivers and resets.

use super::*;

#[test]
fn the_example_devices_are_one_of_each_kind() {
    let host = host();
    let expected = [
        BRIDGE,
        BOOT_CONTROLLER,
        NIC,
        NIC_VF0,
        NIC_VF1,
        NVME,
        INTX_ONLY,
        MSI_ONLY,
        BROKEN,
    ];
    assert_eq!(host.bus.list().unwrap(), expected);
    let kinds: Vec<(Option<u8>, Option<u16>)> = [NIC, NIC_VF0, NVME, INTX_ONLY, MSI_ONLY]
        .map(|bdf| {
            let description = host.bus.describe(bdf).unwrap();
            let found =
                Interrupts::discover(&*host.config(bdf), &description.identity.resources).unwrap();
            (
                found.msi().map(|msi| msi.vectors),
                found.msix().map(|msix| msix.unwrap().vectors),
            )
        })
        .into();
    assert_eq!(
        kinds,
        [
            (Some(1), Some(10)),
            (None, Some(3)),
            (None, Some(4)),
            (None, None),
            (Some(4), None)
        ]
    );
    assert_eq!(host.bus.describe(BRIDGE).unwrap().class >> 16, 6);
    assert!(host.bus.needed_by_dom0(BOOT_CONTROLLER).unwrap().is_some());
    assert!(host.bus.needed_by_dom0(NVME).unwrap().is_none());
}

#[test]
fn the_broken_devices_list_loops_and_its_table_is_beyond_its_bar() {
    let host = host();
    let config = host.config(BROKEN);
    let found = Capabilities::walk(&*config, ConfigSize::Conventional).unwrap();
    assert_eq!(found.faults, [ListFault::Loop { pointer: 0x40 }]);
    let resources = host.bus.describe(BROKEN).unwrap().identity.resources;
    let found = Interrupts::discover(&*config, &resources).unwrap();
    assert!(matches!(
        found.msix(),
        Some(Err(BrokenMsiX::BeyondBar { .. }))
    ));
}

#[test]
fn a_virtual_functions_registers_say_nothing_and_the_kernel_knows() {
    let host = host();
    let config = host.config(NIC_VF1);
    assert_eq!(config.read(0x00, Width::Four).unwrap(), 0xffff_ffff);
    config.write(0x04, Width::Two, 0xffff).unwrap();
    assert_eq!(config.read(0x04, Width::Two).unwrap(), 0x0004);
    for bar in (0x10..0x28).step_by(4) {
        config.write(bar, Width::Four, 0xffff_ffff).unwrap();
        assert_eq!(config.read(bar, Width::Four).unwrap(), 0);
    }
    assert_eq!(
        config.read(0x2c, Width::Four).unwrap(),
        0x10c9_8086,
        "subsystem ids are real"
    );
    let description = host.bus.describe(NIC_VF1).unwrap();
    assert_eq!(
        description.function,
        Function::Virtual {
            physical: NIC,
            index: 1
        }
    );
    assert_eq!(
        (description.identity.vendor, description.identity.device),
        (0x8086, 0x10ca)
    );
    let first = host.bus.describe(NIC_VF0).unwrap().identity.resources[0];
    let second = description.identity.resources[0];
    assert!(first.start != 0 && second.start >= first.start + first.size);
    assert_eq!(
        (description.irq, description.identity.interrupt_line),
        (0, 0)
    );
}

#[test]
fn a_physical_function_says_how_many_virtual_functions_it_has() {
    let host = host();
    let config = host.config(NIC);
    let found = Capabilities::walk(&*config, ConfigSize::Extended).unwrap();
    let sriov = found.find_extended(ExtendedCapabilityId::SR_IOV).unwrap();
    assert_eq!(config.read(sriov + 0x0c, Width::Four).unwrap(), 0x0008_0008);
    assert_eq!(config.read(sriov + 0x10, Width::Two).unwrap(), 2);
    assert_eq!(config.read(sriov + 0x1a, Width::Two).unwrap(), 0x10ca);
    assert_eq!(
        host.bus.describe(NIC).unwrap().function,
        Function::Physical {
            enabled: 2,
            total: 8,
            virtual_functions: vec![(0, NIC_VF0), (1, NIC_VF1)]
        }
    );
}

#[test]
fn bars_are_sized_in_hardware() {
    let host = host();
    for (bdf, bar, size) in [
        (NIC, 0x10, 0xfffe_0000),
        (NIC, 0x18, 0xffff_ffe1),
        (NIC, 0x14, 0),
        (NIC, 0x30, 0xfffe_0001),
        (NVME, 0x10, 0xffff_c00c),
        (NVME, 0x14, 0xffff_ffff),
        (INTX_ONLY, 0x10, 0xffff_ff01),
        (INTX_ONLY, 0x14, 0xffff_ff00),
    ] {
        let config = host.config(bdf);
        let before = config.read(bar, Width::Four).unwrap();
        config.write(bar, Width::Four, 0xffff_ffff).unwrap();
        assert_eq!(
            config.read(bar, Width::Four).unwrap(),
            size,
            "{bdf} {bar:#x}"
        );
        config.write(bar, Width::Four, before).unwrap();
        assert_eq!(config.read(bar, Width::Four).unwrap(), before);
    }
    let (low, high) = (
        host.config(NVME).read(0x10, Width::Four).unwrap(),
        host.config(NVME).read(0x14, Width::Four).unwrap(),
    );
    assert_eq!(
        u64::from(high) << 32 | u64::from(low & !0xf),
        host.bar(NVME, 0)
    );
}

#[test]
fn every_bar_has_addresses_of_its_own() {
    let host = host();
    let mut ranges = Vec::new();
    for bdf in host.bus.list().unwrap() {
        for resource in host.bus.describe(bdf).unwrap().identity.resources {
            if resource.is_present() {
                assert_eq!(resource.start % resource.size, 0, "{bdf}");
                ranges.push((
                    resource.is_io(),
                    resource.start,
                    resource.start + resource.size,
                ));
            }
        }
    }
    ranges.sort_unstable();
    assert!(ranges.len() > 10);
    for pair in ranges.windows(2) {
        assert!(
            pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1,
            "{pair:x?}"
        );
    }
}

#[test]
fn a_driver_and_enabling_exclude_each_other() {
    let host = host();
    assert_eq!(
        host.bus.describe(NVME).unwrap().driver.as_deref(),
        Some("nvme")
    );
    assert_eq!(host.word(NVME, 0x04), 0x6);
    assert!(matches!(
        host.bus.enable(NVME, true),
        Err(HostError::Refused { .. })
    ));
    host.bus.unbind(NVME).unwrap();
    host.bus.unbind(NVME).unwrap();
    assert_eq!(
        host.word(NVME, 0x04),
        0x2,
        "decode stays, bus mastering goes"
    );
    host.bus.enable(NVME, true).unwrap();
    host.bus.enable(NVME, true).unwrap();
    assert_eq!(host.bus.enable_count(NVME), 2);
    host.bus.enable(NVME, false).unwrap();
    host.bus.enable(NVME, false).unwrap();
    assert!(host.bus.enable(NVME, false).is_err());
}

#[test]
fn a_reserved_device_is_left_alone_by_other_drivers() {
    let host = host();
    host.bus.unbind(NVME).unwrap();
    host.bus.set_driver_override(NVME, Some("pciback")).unwrap();
    host.bus.bind(NVME, None).unwrap();
    assert_eq!(host.bus.describe(NVME).unwrap().driver, None);
    assert!(host.bus.bind(NVME, Some("nvme")).is_err());
    host.bus.set_driver_override(NVME, None).unwrap();
    assert_eq!(host.bus.driver_override(NVME).unwrap(), None);
    assert!(host.bus.bind(NVME, Some("igb")).is_err());
    host.bus.bind(NVME, Some("nvme")).unwrap();
    assert_eq!(host.word(NVME, 0x04), 0x6);
    assert!(host.bus.bind(NVME, Some("nvme")).is_err(), "it has one");
    host.bus.bind(NVME, None).unwrap();
}

#[test]
fn a_driver_does_not_work_on_a_device_that_xen_has_given_away() {
    let host = host();
    host.bus.unbind(NVME).unwrap();
    host.machine.assign_device(DomId::IO, xen(NVME)).unwrap();
    assert!(host.bus.bind(NVME, Some("nvme")).is_err());
    host.machine.deassign_device(DomId::IO, xen(NVME)).unwrap();
    host.bus.bind(NVME, Some("nvme")).unwrap();
}

#[test]
fn a_reset_keeps_what_the_kernel_saves_and_loses_the_rest() {
    let host = host();
    let config = host.config(NVME);
    let bar = host.bar(NVME, 0);
    let msix = host.find(NVME, CapabilityId::MSI_X);
    host.bus.memory_write(bar + 0x14, 1);
    host.set_bits(NVME, msix + 2, 0x8000);
    let header: Vec<u32> = (0..0x40)
        .step_by(4)
        .map(|offset| config.read(offset, Width::Four).unwrap())
        .collect();
    host.bus.reset(NVME).unwrap();
    let after: Vec<u32> = (0..0x40)
        .step_by(4)
        .map(|offset| config.read(offset, Width::Four).unwrap())
        .collect();
    assert_eq!(header, after);
    assert_eq!(host.word(NVME, msix + 2), 3, "MSI-X is off");
    assert_eq!(host.bus.memory_read(bar + 0x1c), 0, "not ready any more");
    assert_eq!(host.bus.resets(NVME), 1);
    assert!(host.bus.reset(INTX_ONLY).is_err());
}

#[test]
fn the_configuration_space_is_closed_during_a_reset_and_others_are_not() {
    let host = host();
    host.bus.set_reset_time(NVME, Duration::from_millis(200));
    let start = Instant::now();
    let bus = Arc::clone(&host.bus);
    let reset = std::thread::spawn(move || bus.reset(NVME));
    while !*lock(&host.bus.get(NVME).unwrap().resetting) {
        std::thread::yield_now();
    }
    host.word(NIC, 0x00);
    assert!(start.elapsed() < Duration::from_millis(200));
    host.word(NVME, 0x00);
    assert!(start.elapsed() >= Duration::from_millis(200));
    reset.join().unwrap().unwrap();
}

#[test]
fn a_device_that_does_not_come_back_from_a_reset_reads_as_ones() {
    let host = host();
    host.bus.set_reset_fails(NVME, true);
    assert!(host.bus.reset(NVME).is_err());
    assert_eq!(host.word(NVME, 0x00), 0xffff);
    assert_eq!(host.bus.memory_read(host.bar(NVME, 0)), u32::MAX);
    assert!(host.bus.bind(NVME, Some("nvme")).is_err());
}

#[test]
fn a_device_can_vanish_come_back_or_be_pulled_out() {
    let host = host();
    let config = host.config(NVME);
    host.bus.vanish(NVME, true);
    assert_eq!(config.read(0x40, Width::One).unwrap(), 0xff);
    assert!(host.bus.describe(NVME).is_ok());
    host.bus.vanish(NVME, false);
    assert_eq!(config.read(0x00, Width::Two).unwrap(), 0x1b36);
    assert_eq!(
        config.read(0x10, Width::Four).unwrap(),
        0xc,
        "placed nowhere"
    );
    host.bus.remove(NVME);
    assert_eq!(config.read(0x00, Width::Two), Err(AccessError::Gone));
    assert!(matches!(
        host.bus.describe(NVME),
        Err(HostError::NoDevice { .. })
    ));
    assert!(!host.bus.list().unwrap().contains(&NVME));
}

#[test]
fn a_slow_device_is_slow() {
    let host = host();
    host.bus.set_access_time(NVME, Duration::from_millis(20));
    let start = Instant::now();
    host.word(NVME, 0x00);
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn waking_up_loses_the_configuration_unless_the_device_says_otherwise() {
    let host = host();
    for (bdf, kept) in [(NVME, false), (NIC, true)] {
        let power = host.find(bdf, CapabilityId::POWER_MANAGEMENT) + 4;
        let before = host.word(bdf, 0x04);
        host.set_bits(bdf, power, 3);
        host.config(bdf).write(power, Width::Two, 0).unwrap();
        assert_eq!(host.word(bdf, 0x04) == before, kept, "{bdf}");
    }
}

#[test]
fn memory_answers_only_where_a_device_decodes_it() {
    let host = host();
    let bar = host.bar(NVME, 0);
    assert_eq!(host.bus.memory_read(bar + 8), 0x0001_0400);
    assert_eq!(host.bus.memory_read(bar + 0x4000), u32::MAX);
    let config = host.config(NVME);
    config.write(0x04, Width::Two, 0).unwrap();
    assert_eq!(host.bus.memory_read(bar + 8), u32::MAX);
    config.write(0x04, Width::Two, 2).unwrap();
    config.write(0x10, Width::Four, 0x8000_0000).unwrap();
    config.write(0x14, Width::Four, 0).unwrap();
    assert_eq!(host.bus.memory_read(bar + 8), u32::MAX);
    assert_eq!(host.bus.memory_read(0x8000_0008), 0x0001_0400);
    // A virtual function by its physical function.
    let virtual_bar = host.bar(NIC_VF0, 0);
    assert_eq!(host.bus.memory_read(virtual_bar + 8), 0x83);
    host.config(NIC).write(0x04, Width::Two, 0).unwrap();
    assert_eq!(host.bus.memory_read(virtual_bar + 8), u32::MAX);
}

#[test]
fn an_nvme_drive_becomes_ready_when_enabled() {
    let host = host();
    let bar = host.bar(NVME, 0);
    assert_eq!(host.bus.memory_read(bar + 0x1c), 0);
    host.bus.memory_write(bar + 0x24, 0x001f_001f);
    host.bus.memory_write(bar + 0x14, 0x0046_0001);
    assert_eq!(host.bus.memory_read(bar + 0x1c), 1);
    assert_eq!(host.bus.memory_read(bar + 0x24), 0x001f_001f);
}

#[test]
fn tests_can_add_devices_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(directory.path()).unwrap();
    let bus = SimBus::new(&machine);
    assert!(bus.list().unwrap().is_empty());
    let bdf = Bdf::from_devfn(1, 0, 0);
    bus.add(FunctionBuilder::new(bdf, 0x1af4, 0x1000, 0x02_0000).memory_bar(2, 0x1000));
    assert_eq!(bus.list().unwrap(), [bdf]);
    assert_eq!(bus.describe(bdf).unwrap().driver, None);
    assert_eq!(machine.device_owner(xen(bdf)), Some(DomId::DOM0));
    drop(bus);
    assert_eq!(machine.device_owner(xen(bdf)), None, "the bus is gone");
}

fn virtual_functions(host: &Host) -> Vec<(u16, Bdf)> {
    match host.bus.describe(NIC).unwrap().function {
        Function::Physical {
            enabled,
            virtual_functions,
            ..
        } => {
            assert_eq!(usize::from(enabled), virtual_functions.len());
            virtual_functions
        }
        other => panic!("{other:?}"),
    }
}

fn errno(result: Result<(), HostError>) -> Option<i32> {
    match result {
        Err(HostError::Refused { source, .. }) => source.raw_os_error(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn virtual_functions_come_and_go_by_the_kernels_rules() {
    let host = host();
    let set = |count| host.bus.set_virtual_functions(NIC, count);
    assert_eq!(errno(set(3)), Some(libc::EBUSY), "by 0 only");
    assert_eq!(errno(set(9)), Some(libc::ERANGE));
    set(2).unwrap();
    let open = host.config(NIC_VF1);
    let before = host.bar(NIC_VF1, 0);
    host.machine.assign_device(DomId::IO, xen(NIC_VF1)).unwrap();
    set(0).unwrap();
    assert_eq!(virtual_functions(&host), []);
    assert_eq!(open.read(0x04, Width::Two), Err(AccessError::Gone));
    assert_eq!(host.bus.memory_read(before + 8), u32::MAX);

    host.bus.set_functions_probed(NIC, false).unwrap();
    set(8).unwrap();
    let all = virtual_functions(&host);
    assert_eq!(all.len(), 8);
    assert_eq!(all[1], (1, NIC_VF1));
    assert_eq!(host.bar(NIC_VF1, 0), before);
    let owner = host.machine.device_owner(xen(NIC_VF1));
    assert_eq!(owner, Some(DomId::DOM0), "a new device");
    assert_eq!(host.bus.describe(NIC_VF1).unwrap().driver, None);
    assert_eq!(
        open.read(0x04, Width::Two),
        Err(AccessError::Gone),
        "and not the old one"
    );
    assert_eq!(host.bus.memory_read(host.bar(all[7].1, 0) + 8), 0x83);

    host.bus.set_functions_probed(NIC, true).unwrap();
    host.bus.unbind(NIC).unwrap();
    assert_eq!(virtual_functions(&host), [], "they go with the driver");
    assert_eq!(errno(set(2)), Some(libc::ENOENT));
    assert_eq!(
        errno(host.bus.set_virtual_functions(NVME, 1)),
        Some(libc::ENOENT)
    );
    host.bus.bind(NIC, None).unwrap();
    set(1).unwrap();
    let driver = host.bus.describe(NIC_VF0).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("igbvf"));
}

#[test]
fn a_reset_of_the_physical_function_keeps_its_virtual_functions() {
    let host = host();
    host.bus.reset(NIC).unwrap();
    assert_eq!(virtual_functions(&host).len(), 2);
    assert_eq!(host.bus.memory_read(host.bar(NIC_VF0, 0) + 8), 0x83);
}
