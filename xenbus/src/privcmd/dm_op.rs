//! `DMOP_*`: what a device model asks about its guest (Xen `dm_op.h`, a stable interface).

use std::io;

use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::Privcmd;
use crate::device::{ioctl, ioctl_number};
use crate::device_model::{IntxPin, IoRange, IoreqServerId};
use crate::platform::XenError;
use crate::types::DomId;

const CREATE_IOREQ_SERVER: u32 = 1;
const MAP_IO_RANGE: u32 = 3;
const UNMAP_IO_RANGE: u32 = 4;
const SET_IOREQ_SERVER_STATE: u32 = 5;
const DESTROY_IOREQ_SERVER: u32 = 6;
const SET_PCI_INTX_LEVEL: u32 = 8;
const SET_ISA_IRQ_LEVEL: u32 = 9;
const INJECT_MSI: u32 = 14;
const NR_VCPUS: u32 = 20;

/// `struct xen_dm_op`: 8 bytes and a union, of which 24 are needed here.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct DmOp {
    op: u32,
    pad: u32,
    payload: Payload,
}

type Payload = [u64; 3];

/// `struct xen_dm_op_create_ioreq_server`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct CreateIoreqServer {
    /// 0: no buffered page.
    handle_bufioreq: u8,
    pad: [u8; 3],
    /// Out.
    id: u16,
    rest: [u16; 9],
}

/// `struct xen_dm_op_ioreq_server_range`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct ServerRange {
    id: u16,
    pad: u16,
    kind: u32,
    start: u64,
    /// The last address.
    end: u64,
}

/// `struct xen_dm_op_set_ioreq_server_state`, and `destroy_ioreq_server`, which has no `enabled`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct ServerState {
    id: u16,
    enabled: u8,
    pad: u8,
    rest: [u32; 5],
}

/// `struct xen_dm_op_set_pci_intx_level`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct SetPciIntxLevel {
    /// PCI segment: 0.
    domain: u16,
    bus: u8,
    device: u8,
    intx: u8,
    level: u8,
    pad: u16,
    rest: [u64; 2],
}

/// `struct xen_dm_op_set_isa_irq_level`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct SetIsaIrqLevel {
    isa_irq: u8,
    level: u8,
    rest: [u16; 11],
}

/// `struct xen_dm_op_inject_msi`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct InjectMsi {
    data: u32,
    pad: u32,
    addr: u64,
    rest: u64,
}

/// `struct xen_dm_op_nr_vcpus`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct NrVcpus {
    /// Out.
    vcpus: u32,
    rest: [u32; 5],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<DmOp>() == 32 && offset_of!(DmOp, payload) == 8);
    assert!(offset_of!(CreateIoreqServer, id) == 4);
    assert!(offset_of!(ServerRange, kind) == 4 && offset_of!(ServerRange, end) == 16);
    assert!(offset_of!(ServerState, enabled) == 2);
    assert!(offset_of!(SetPciIntxLevel, intx) == 4 && offset_of!(InjectMsi, addr) == 8);
};

/// `struct privcmd_dm_op_buf`.
#[repr(C)]
struct Buffer {
    address: u64,
    size: usize,
}

/// `struct privcmd_dm_op`.
#[repr(C)]
struct PrivcmdDmOp {
    domain: u16,
    buffers: u16,
    address: u64,
}

const DM_OP: libc::Ioctl = ioctl_number(b'P', 5, 16);

const _: () = {
    assert!(size_of::<Buffer>() == 16 && size_of::<PrivcmdDmOp>() == 16);
    assert!(DM_OP == 0x105005);
};

/// `DMOP_*` with a payload, which it gives back as Xen left it. The kernel has the memory stay
/// where it is during the call.
fn dm_op(privcmd: &Privcmd, domain: DomId, op: u32, payload: Payload) -> io::Result<Payload> {
    let mut argument = DmOp {
        op,
        pad: 0,
        payload,
    };
    let mut buffer = Buffer {
        address: (&raw mut argument).expose_provenance() as u64,
        size: size_of::<DmOp>(),
    };
    let mut call = PrivcmdDmOp {
        domain: domain.0,
        buffers: 1,
        address: (&raw mut buffer).expose_provenance() as u64,
    };
    // SAFETY: DM_OP takes a `struct privcmd_dm_op` that points to as many buffers as it says. Both
    // the one buffer and the argument that it points to live until the call has returned, and are
    // as long as they say; nobody else refers to them.
    unsafe { ioctl(&privcmd.privcmd, DM_OP, &mut call) }?;
    Ok(argument.payload)
}

impl Privcmd {
    fn dm_op(
        &self,
        domain: DomId,
        op: u32,
        payload: Payload,
        operation: impl FnOnce() -> String,
    ) -> Result<Payload, XenError> {
        dm_op(self, domain, op, payload).map_err(|source| XenError::Failed {
            operation: operation(),
            source,
        })
    }

    pub(crate) fn create_ioreq_server(&self, domain: DomId) -> Result<IoreqServerId, XenError> {
        let what = || format!("making an IOREQ server for domain {domain}");
        let answer = self.dm_op(domain, CREATE_IOREQ_SERVER, Payload::default(), what)?;
        let created: CreateIoreqServer = transmute!(answer);
        Ok(IoreqServerId(created.id))
    }

    pub(crate) fn destroy_ioreq_server(
        &self,
        domain: DomId,
        server: IoreqServerId,
    ) -> Result<(), XenError> {
        let what = || format!("destroying IOREQ server {server} of domain {domain}");
        let state = ServerState::new(server, false);
        self.dm_op(domain, DESTROY_IOREQ_SERVER, transmute!(state), what)
            .map(drop)
    }

    pub(crate) fn set_ioreq_server_state(
        &self,
        domain: DomId,
        server: IoreqServerId,
        enabled: bool,
    ) -> Result<(), XenError> {
        let verb = if enabled { "enabling" } else { "disabling" };
        let what = || format!("{verb} IOREQ server {server} of domain {domain}");
        let state = ServerState::new(server, enabled);
        self.dm_op(domain, SET_IOREQ_SERVER_STATE, transmute!(state), what)
            .map(drop)
    }

    pub(crate) fn map_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let what = || format!("claiming {range} of domain {domain} for IOREQ server {server}");
        let range = ServerRange::new(server, range);
        self.dm_op(domain, MAP_IO_RANGE, transmute!(range), what)
            .map(drop)
    }

    pub(crate) fn unmap_io_range(
        &self,
        domain: DomId,
        server: IoreqServerId,
        range: IoRange,
    ) -> Result<(), XenError> {
        let what = || format!("taking {range} of domain {domain} from IOREQ server {server}");
        let range = ServerRange::new(server, range);
        self.dm_op(domain, UNMAP_IO_RANGE, transmute!(range), what)
            .map(drop)
    }

    pub(crate) fn set_pci_intx_level(
        &self,
        domain: DomId,
        pin: IntxPin,
        level: bool,
    ) -> Result<(), XenError> {
        let IntxPin { device, pin: intx } = pin;
        let what = || format!("setting INTx pin {intx} of slot {device:#x} of domain {domain}");
        let payload = SetPciIntxLevel {
            domain: 0,
            bus: 0,
            device,
            intx,
            level: level.into(),
            pad: 0,
            rest: [0; 2],
        };
        self.dm_op(domain, SET_PCI_INTX_LEVEL, transmute!(payload), what)
            .map(drop)
    }

    pub(crate) fn set_isa_irq_level(
        &self,
        domain: DomId,
        irq: u8,
        level: bool,
    ) -> Result<(), XenError> {
        let what = || format!("setting ISA interrupt {irq} of domain {domain}");
        let payload = SetIsaIrqLevel {
            isa_irq: irq,
            level: level.into(),
            rest: [0; 11],
        };
        self.dm_op(domain, SET_ISA_IRQ_LEVEL, transmute!(payload), what)
            .map(drop)
    }

    pub(crate) fn inject_msi(
        &self,
        domain: DomId,
        address: u64,
        data: u32,
    ) -> Result<(), XenError> {
        let what = || format!("injecting message {data:#x} at {address:#x} into domain {domain}");
        let payload = InjectMsi {
            data,
            pad: 0,
            addr: address,
            rest: 0,
        };
        self.dm_op(domain, INJECT_MSI, transmute!(payload), what)
            .map(drop)
    }

    pub(crate) fn vcpu_count(&self, domain: DomId) -> Result<u32, XenError> {
        let what = || format!("asking for the number of CPUs of domain {domain}");
        let answer = self.dm_op(domain, NR_VCPUS, Payload::default(), what)?;
        let answer: NrVcpus = transmute!(answer);
        Ok(answer.vcpus)
    }
}

impl ServerState {
    fn new(server: IoreqServerId, enabled: bool) -> Self {
        Self {
            id: server.0,
            enabled: enabled.into(),
            pad: 0,
            rest: [0; 5],
        }
    }
}

impl ServerRange {
    fn new(server: IoreqServerId, range: IoRange) -> Self {
        Self {
            id: server.0,
            pad: 0,
            kind: range.space as u32,
            start: range.first,
            end: range.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device_model::IoSpace;
    use crate::types::PciDevice;

    #[test]
    fn a_range_of_configuration_is_one_function_by_its_sbdf() {
        let function = PciDevice {
            segment: 0,
            bus: 0,
            devfn: 0xf8,
        };
        let range = ServerRange::new(IoreqServerId(2), IoRange::config(function));
        let bytes: [u8; 24] = transmute!(range);
        let expected = [
            2, 0, 0, 0, 2, 0, 0, 0, 0xf8, 0, 0, 0, 0, 0, 0, 0, 0xf8, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn the_end_of_a_range_is_its_last_address() {
        let memory = IoRange {
            space: IoSpace::Memory,
            first: 0xf000_0000,
            last: 0xf000_0fff,
        };
        let range = ServerRange::new(IoreqServerId(0), memory);
        assert_eq!(
            (range.kind, range.start, range.end),
            (1, memory.first, memory.last)
        );
    }
}
