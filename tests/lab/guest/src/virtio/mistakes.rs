//! What a driver can do wrong when it tells a device of its ring, and in the chains of descriptors. A buffer never lies in memory that is not this
//! program's: it is to harm the backend, not the guest that it runs in.

use super::disk::{Queue, RING_SIZE};
use super::ring::{DATA, Descriptor, INDIRECT, NEXT, RING, Ring, SCRATCH, WRITE};

type Setup = fn(&mut Queue);
type SetupElsewhere = fn(&mut Queue, u64);
type Chain = fn(&mut Ring<'_>);
type ChainElsewhere = fn(&mut Ring<'_>, u64);

/// Mistakes in how the ring is told to the device.
pub const SETUPS: [(&str, Setup); 3] = [
    ("a ring of 3", |queue| queue.size = 3),
    ("a ring of 32768", |queue| queue.size = 32768),
    ("a table that is not aligned", |queue| {
        change(queue, 0, |address| address | 1)
    }),
];

/// The same, with an address where no memory is.
pub const SETUPS_ELSEWHERE: [(&str, SetupElsewhere); 3] = [
    ("descriptors elsewhere", |queue, address| {
        change(queue, 0, |_| address)
    }),
    ("an available ring elsewhere", |queue, address| {
        change(queue, 1, |_| address)
    }),
    ("a used ring elsewhere", |queue, address| {
        change(queue, 2, |_| address)
    }),
];

/// Mistakes in a chain of descriptors.
pub const CHAINS: [(&str, Chain); 12] = [
    ("a chain that begins beyond the ring", |ring| {
        ring.offer(RING_SIZE)
    }),
    ("more chains than there is room for", |ring| {
        ring.set_available(RING_SIZE.saturating_add(1))
    }),
    ("a chain that leads beyond the ring", |ring| {
        offer(ring, &[(DATA, 16, NEXT, u16::MAX)])
    }),
    ("a loop", |ring| {
        offer(ring, &[(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)])
    }),
    ("a buffer without bytes", |ring| {
        offer(ring, &[(DATA, 0, 0, 0)])
    }),
    ("a buffer of 4 GiB", |ring| {
        offer(ring, &[(DATA, u32::MAX, WRITE, 0)])
    }),
    ("reading behind writing", |ring| {
        offer(ring, &[(DATA, 16, NEXT | WRITE, 1), (DATA, 16, 0, 0)])
    }),
    ("a table of half a descriptor", |ring| {
        offer(ring, &[(SCRATCH, 24, INDIRECT, 0)])
    }),
    ("a table in a table", |ring| {
        put(ring, SCRATCH, 0, (SCRATCH, 16, INDIRECT, 0));
        offer(ring, &[(SCRATCH, 16, INDIRECT, 0)]);
    }),
    ("a loop in a table", |ring| {
        put(ring, SCRATCH, 0, (DATA, 16, NEXT, 0));
        offer(ring, &[(SCRATCH, 16, INDIRECT, 0)]);
    }),
    ("a request without a place for its status", |ring| {
        offer(ring, &[(DATA, 16, 0, 0)])
    }),
    ("a request shorter than its header", |ring| {
        offer(ring, &[(DATA, 1, NEXT, 1), (DATA, 1, WRITE, 0)])
    }),
];

/// The same, with an address where no memory is.
pub const CHAINS_ELSEWHERE: [(&str, ChainElsewhere); 2] = [
    ("a buffer elsewhere", |ring, address| {
        elsewhere(ring, address, WRITE)
    }),
    ("a table elsewhere", |ring, address| {
        elsewhere(ring, address, INDIRECT)
    }),
];

fn change(queue: &mut Queue, part: usize, change: impl Fn(u64) -> u64) {
    if let Some(address) = queue.addresses.get_mut(part) {
        *address = change(*address);
    }
}

/// A descriptor whose buffer is at an offset in this program's memory: that, its length, its flags, the next one.
type Part = (u64, u32, u16, u16);

fn put(ring: &Ring<'_>, table: u64, index: u16, (offset, len, flags, next): Part) {
    let address = ring.memory.physical(offset);
    let descriptor = Descriptor {
        address,
        len,
        flags,
        next,
    };
    descriptor.put(ring.memory, table, index);
}

fn offer(ring: &mut Ring<'_>, parts: &[Part]) {
    for (index, part) in (0..).zip(parts) {
        put(ring, RING, index, *part);
    }
    ring.offer(0);
}

fn elsewhere(ring: &mut Ring<'_>, address: u64, flags: u16) {
    let descriptor = Descriptor {
        address,
        len: 512,
        flags,
        next: 0,
    };
    descriptor.put(ring.memory, RING, 0);
    ring.offer(0);
}
