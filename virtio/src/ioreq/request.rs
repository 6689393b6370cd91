//! What a guest's CPU asks for: a copy of its request, checked.

use xenbus::device_model::IoSpace;
use xenbus::ioreq::{Flags, Ioreq, Kind};

/// Elements that a string instruction has at most. Xen splits longer ones.
const MOST_ELEMENTS: u32 = 4096;
/// The last register that a function can have.
const LAST_REGISTER: u64 = 0xfff;
/// The last port.
const LAST_PORT: u64 = 0xffff;

/// A request that Xen never makes. It is answered all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// No known type.
    #[error("a request of the unknown type {0}")]
    Kind(u8),
    /// Not 1, 2, 4 or 8 bytes.
    #[error("an access of {0} bytes")]
    Size(u32),
    /// More elements than an instruction can have.
    #[error("an access to {0} elements at once")]
    Count(u32),
    /// Beyond the last port or register, or the end of memory.
    #[error("an access to an address that does not exist, {0:#x}")]
    Address(u64),
}

/// Which way data go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Read,
    /// To the device.
    Write,
}

/// Bytes of one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementSize {
    /// 1.
    One,
    /// 2.
    Two,
    /// 4.
    Four,
    /// 8.
    Eight,
}

impl ElementSize {
    /// That many bytes; `None` unless 1, 2, 4 or 8.
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            4 => Some(Self::Four),
            8 => Some(Self::Eight),
            _ => None,
        }
    }

    /// How many bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }
}

/// Where the guest's side of the data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// In the request: this value is written, or the value that was read goes into the answer.
    Value(u64),
    /// In the guest's memory, from this address on.
    Memory(u64),
}

/// One access, or the elements of a string instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// What kind of address.
    pub space: IoSpace,
    /// The address of the first element. In configuration space function in bits 63:32 and register
    /// in bits 31:0.
    pub address: u64,
    /// Which way.
    pub direction: Direction,
    /// Bytes of an element.
    pub size: ElementSize,
    /// How many elements.
    pub count: u32,
    /// Addresses go down.
    pub descending: bool,
    /// The guest's side.
    pub operand: Operand,
}

/// What a CPU asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// An access.
    Access(Access),
    /// Told to all servers: the guest has set its clock. Nothing to do for devices without one.
    TimeOffset,
    /// Told to all servers: the guest's memory is not where it was.
    Invalidate,
}

impl Request {
    /// Checks a copy of a request.
    ///
    /// # Errors
    /// [`BadRequest`].
    pub fn decode(ioreq: &Ioreq) -> Result<Self, BadRequest> {
        let space = match Kind::from_wire(ioreq.kind).ok_or(BadRequest::Kind(ioreq.kind))? {
            Kind::Port => IoSpace::Port,
            Kind::Memory => IoSpace::Memory,
            Kind::Config => IoSpace::Config,
            Kind::TimeOffset => return Ok(Self::TimeOffset),
            Kind::Invalidate => return Ok(Self::Invalidate),
        };
        let flags = ioreq.flags();
        let access = Access {
            space,
            address: ioreq.addr,
            direction: if flags.contains(Flags::READ) {
                Direction::Read
            } else {
                Direction::Write
            },
            size: ElementSize::from_bytes(ioreq.size).ok_or(BadRequest::Size(ioreq.size))?,
            count: ioreq.count,
            descending: flags.contains(Flags::DESCENDING),
            operand: if flags.contains(Flags::DATA_IS_PTR) {
                Operand::Memory(ioreq.data)
            } else {
                Operand::Value(ioreq.data)
            },
        };
        if access.count > MOST_ELEMENTS {
            return Err(BadRequest::Count(access.count));
        }
        if !access.is_somewhere() {
            return Err(BadRequest::Address(access.address));
        }
        Ok(Self::Access(access))
    }
}

impl Access {
    /// Where an element is. All elements of an instruction on ports are at one.
    pub fn element(&self, index: u32) -> Option<u64> {
        match self.space {
            IoSpace::Port | IoSpace::Config => Some(self.address),
            IoSpace::Memory => self.step(self.address, index),
        }
    }

    /// Where an element is in the guest's memory; `None` where it is not in memory, too.
    pub fn element_in_memory(&self, index: u32) -> Option<u64> {
        match self.operand {
            Operand::Value(_) => None,
            Operand::Memory(address) => self.step(address, index),
        }
    }

    fn step(&self, address: u64, index: u32) -> Option<u64> {
        let distance = u64::from(index).checked_mul(self.size.bytes())?;
        if self.descending {
            address.checked_sub(distance)
        } else {
            address.checked_add(distance)
        }
    }

    /// Whether there are such addresses.
    fn is_somewhere(&self) -> bool {
        let last_byte = self.size.bytes().saturating_sub(1);
        match self.space {
            IoSpace::Port => self.address <= LAST_PORT.saturating_sub(last_byte),
            IoSpace::Config => {
                u64::from(self.address as u32) <= LAST_REGISTER.saturating_sub(last_byte)
            }
            IoSpace::Memory => {
                let last = self.count.saturating_sub(1);
                let ends = [self.element(0), self.element(last)];
                ends.into_iter()
                    .all(|end| end.and_then(|end| end.checked_add(last_byte)).is_some())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(kind: Kind, addr: u64, size: u32) -> Ioreq {
        Ioreq {
            addr,
            size,
            count: 1,
            flags: Flags::READ.bits(),
            kind: kind as u8,
            ..Ioreq::default()
        }
    }

    #[test]
    fn an_access_is_what_xen_says_it_is() {
        let request = Request::decode(&read(Kind::Config, 0xf8_0000_0004, 2));
        let Ok(Request::Access(access)) = request else {
            panic!("{request:?}");
        };
        assert_eq!(
            (access.space, access.address),
            (IoSpace::Config, 0xf8_0000_0004)
        );
        assert_eq!((access.direction, access.count), (Direction::Read, 1));
        assert_eq!(access.operand, Operand::Value(0));
    }

    #[test]
    fn broadcasts_have_neither_size_nor_count() {
        for (kind, expected) in [
            (Kind::TimeOffset, Request::TimeOffset),
            (Kind::Invalidate, Request::Invalidate),
        ] {
            let ioreq = Ioreq {
                kind: kind as u8,
                ..Ioreq::default()
            };
            assert_eq!(Request::decode(&ioreq), Ok(expected));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (ioreq, why) in [
            (read(Kind::Port, 0, 3), BadRequest::Size(3)),
            (read(Kind::Port, 0, 0), BadRequest::Size(0)),
            (read(Kind::Port, 0xffff, 2), BadRequest::Address(0xffff)),
            (read(Kind::Config, 0xffe, 4), BadRequest::Address(0xffe)),
            (
                read(Kind::Config, 0x8000_0000, 1),
                BadRequest::Address(0x8000_0000),
            ),
            (
                read(Kind::Memory, u64::MAX, 2),
                BadRequest::Address(u64::MAX),
            ),
            (
                Ioreq {
                    kind: 3,
                    ..Ioreq::default()
                },
                BadRequest::Kind(3),
            ),
            (
                Ioreq {
                    count: 4097,
                    ..read(Kind::Memory, 0, 1)
                },
                BadRequest::Count(4097),
            ),
        ] {
            assert_eq!(Request::decode(&ioreq), Err(why));
        }
        assert!(Request::decode(&read(Kind::Port, 0xffff, 1)).is_ok());
        assert!(Request::decode(&read(Kind::Config, 0xff8, 8)).is_ok());
    }

    #[test]
    fn strings_go_up_and_down_in_memory_and_stay_at_a_port() {
        let string = |kind, flags: Flags| {
            let ioreq = Ioreq {
                addr: 0x1000,
                data: 0x8000,
                count: 3,
                size: 4,
                flags: (flags | Flags::DATA_IS_PTR).bits(),
                kind: kind as u8,
                ..Ioreq::default()
            };
            match Request::decode(&ioreq) {
                Ok(Request::Access(access)) => (access.element(2), access.element_in_memory(2)),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            string(Kind::Memory, Flags::empty()),
            (Some(0x1008), Some(0x8008))
        );
        assert_eq!(
            string(Kind::Memory, Flags::DESCENDING),
            (Some(0xff8), Some(0x7ff8))
        );
        assert_eq!(
            string(Kind::Port, Flags::empty()),
            (Some(0x1000), Some(0x8008))
        );
        assert_eq!(
            string(Kind::Port, Flags::DESCENDING),
            (Some(0x1000), Some(0x7ff8))
        );
    }

    proptest! {
        #[test]
        fn all_elements_of_what_is_accepted_are_somewhere(
            addr in prop_oneof![any::<u64>(), 0..0x1_0000u64, (u64::MAX - 0x8000)..=u64::MAX],
            (data, count) in (any::<u64>(), prop_oneof![0..20u32, any::<u32>()]),
            (size, flags, kind) in (prop_oneof![0..10u32, any::<u32>()], any::<u8>(), 0..10u8),
        ) {
            let ioreq = Ioreq { addr, data, count, size, flags, kind, ..Ioreq::default() };
            if let Ok(Request::Access(access)) = Request::decode(&ioreq) {
                for index in 0..access.count {
                    let last_byte = access.element(index)
                        .and_then(|at| at.checked_add(access.size.bytes() - 1));
                    prop_assert!(last_byte.is_some());
                }
            }
        }
    }
}
