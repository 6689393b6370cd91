//! From a device to a guest's event channel.

use super::*;

#[test]
fn msix_reaches_the_guest_when_enabled_programmed_and_master_of_the_bus() {
    let host = host();
    let domain = host.assign(NVME);
    let table_base = host.bar(NVME, 0);
    let entry = |entry| MsiRequest::MsiX { entry, table_base };
    let (_, first) = host.map(domain, NVME, entry(0));
    let (pirq, third) = host.map(domain, NVME, entry(2));
    let control = host.find(NVME, CapabilityId::MSI_X) + 2;
    assert!(!host.bus.raise_interrupt(NVME, 0), "not enabled");
    host.set_bits(NVME, control, 0x8000);
    assert!(!host.bus.raise_interrupt(NVME, 0), "not a bus master");
    host.set_bits(NVME, 0x04, 0x4);
    assert!(host.bus.raise_interrupt(NVME, 0));
    assert!(first.take().unwrap() && !third.take().unwrap());
    assert!(host.bus.raise_interrupt(NVME, 2));
    assert!(third.take().unwrap());
    for vector in [1, 3, 4, u16::MAX] {
        assert!(!host.bus.raise_interrupt(NVME, vector), "not programmed");
    }
    // By the device's own doing: the submission doorbell of its queue 2.
    host.bus.memory_write(table_base + 0x14, 1);
    host.bus.memory_write(table_base + 0x1010, 1);
    assert!(third.take().unwrap());
    host.machine.unmap_pirq(domain, pirq).unwrap();
    assert!(!host.bus.raise_interrupt(NVME, 2));
}

#[test]
fn the_table_shows_what_xen_wrote_and_takes_nothing_from_others() {
    let host = host();
    let domain = host.assign(NVME);
    let table_base = host.bar(NVME, 0);
    let table = table_base + 0x2000;
    assert_eq!(host.bus.memory_read(table + 12), 1, "masked");
    host.map(
        domain,
        NVME,
        MsiRequest::MsiX {
            entry: 0,
            table_base,
        },
    );
    assert_eq!(host.bus.memory_read(table) & 0xfff0_0000, 0xfee0_0000);
    assert_eq!(host.bus.memory_read(table + 12), 0);
    let address = host.bus.memory_read(table);
    host.bus.memory_write(table, 0xdead_0000);
    assert_eq!(host.bus.memory_read(table), address);
}

#[test]
fn what_is_masked_is_sent_when_the_mask_goes() {
    let host = host();
    let domain = host.assign(NVME);
    let table_base = host.bar(NVME, 0);
    let (_, port) = host.map(
        domain,
        NVME,
        MsiRequest::MsiX {
            entry: 1,
            table_base,
        },
    );
    let control = host.find(NVME, CapabilityId::MSI_X) + 2;
    host.set_bits(NVME, 0x04, 0x4);
    host.set_bits(NVME, control, 0xc000);
    assert!(!host.bus.raise_interrupt(NVME, 1));
    assert!(!port.take().unwrap());
    host.config(NVME)
        .write(control, Width::Two, 0x8000)
        .unwrap();
    assert!(port.take().unwrap());
    host.config(NVME)
        .write(control, Width::Two, 0x8000)
        .unwrap();
    assert!(!port.take().unwrap(), "once");
}

#[test]
fn several_msi_vectors_count_in_the_data() {
    let host = host();
    let domain = host.assign(MSI_ONLY);
    let request = MsiRequest::MultiMsi { count: 4 };
    let pirq = host
        .machine
        .map_msi(domain, xen(MSI_ONLY), request)
        .unwrap();
    let ports: Vec<GuestPort> = (0..4)
        .map(|next| {
            let pirq = xenbus::Pirq(pirq.0 + next);
            host.machine.guest(domain).bind_pirq(pirq).unwrap()
        })
        .collect();
    let msi = host.find(MSI_ONLY, CapabilityId::MSI);
    host.set_bits(MSI_ONLY, 0x04, 0x4);
    host.set_bits(MSI_ONLY, msi + 2, 1);
    for vector in 0..4 {
        assert!(host.bus.raise_interrupt(MSI_ONLY, vector));
        for (number, port) in (0..).zip(&ports) {
            assert_eq!(port.take().unwrap(), number == vector);
        }
    }
    // Masked by its bit.
    host.config(MSI_ONLY)
        .write(msi + 0x10, Width::Four, 0x4)
        .unwrap();
    assert!(!host.bus.raise_interrupt(MSI_ONLY, 2));
    assert!(host.bus.raise_interrupt(MSI_ONLY, 1));
}

#[test]
fn a_line_is_raised_unless_intx_is_disabled() {
    let host = host();
    let domain = host.assign(INTX_ONLY);
    let port = host
        .machine
        .guest(domain)
        .bind_pirq(xenbus::Pirq(19))
        .unwrap();
    assert!(host.bus.raise_interrupt(INTX_ONLY, 0));
    assert!(port.take().unwrap());
    assert_eq!(host.word(INTX_ONLY, 0x06) & 0x8, 0x8, "interrupt status");
    host.bus.lower_interrupt(INTX_ONLY);
    assert_eq!(host.word(INTX_ONLY, 0x06) & 0x8, 0);
    host.set_bits(INTX_ONLY, 0x04, 0x400);
    assert!(!host.bus.raise_interrupt(INTX_ONLY, 0));
    assert!(!port.take().unwrap());
    // Still raised when INTx is allowed again.
    host.config(INTX_ONLY).write(0x04, Width::Two, 3).unwrap();
    assert!(port.take().unwrap());
}

#[test]
fn xen_restores_into_a_device_that_was_reset() {
    let host = host();
    let domain = host.assign(NVME);
    let table_base = host.bar(NVME, 0);
    let (_, port) = host.map(
        domain,
        NVME,
        MsiRequest::MsiX {
            entry: 0,
            table_base,
        },
    );
    let control = host.find(NVME, CapabilityId::MSI_X) + 2;
    host.set_bits(NVME, 0x04, 0x4);
    host.set_bits(NVME, control, 0x8000);
    host.bus.reset(NVME).unwrap();
    assert!(!host.bus.raise_interrupt(NVME, 0));
    host.machine.restore_msi(xen(NVME)).unwrap();
    host.set_bits(NVME, control, 0x8000);
    assert!(host.bus.raise_interrupt(NVME, 0));
    assert!(port.take().unwrap());
}

#[test]
fn a_virtual_function_can_be_assigned_and_interrupts() {
    let host = host();
    let domain = host.assign(NIC_VF0);
    let table_base = host.bar(NIC_VF0, 3);
    let (_, port) = host.map(
        domain,
        NIC_VF0,
        MsiRequest::MsiX {
            entry: 1,
            table_base,
        },
    );
    let control = host.find(NIC_VF0, CapabilityId::MSI_X) + 2;
    host.set_bits(NIC_VF0, 0x04, 0x4);
    host.set_bits(NIC_VF0, control, 0x8000);
    host.bus.memory_write(host.bar(NIC_VF0, 0) + 0x1520, 0x2);
    assert!(port.take().unwrap());
    assert_eq!(host.bus.memory_read(host.bar(NIC_VF0, 0) + 0x1580), 2);
    assert_eq!(host.bus.memory_read(host.bar(NIC_VF0, 0) + 0x1580), 0);
}
