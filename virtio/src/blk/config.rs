//! The device configuration (virtio 1.3, section 5.2.4).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::image::Geometry;
use super::request::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZERO_SECTORS};

/// `struct virtio_blk_config`, as far as features offered here use it.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Config {
    /// In sectors of 512 bytes.
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    /// log2 of how many logical blocks are a physical one.
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    /// 1: writes stay in the cache. 0: they go through.
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = {
    assert!(size_of::<Config>() == 60);
    assert!(offset_of!(Config, blk_size) == 20);
    assert!(offset_of!(Config, writeback) == 32);
    assert!(offset_of!(Config, max_discard_sectors) == 36);
    assert!(offset_of!(Config, write_zeroes_may_unmap) == 56);
};

/// A page of the host's, in which it caches and frees.
const PHYSICAL_BLOCK: u32 = 4096;

impl Config {
    /// Where the byte is that the driver may write.
    pub const WRITEBACK: usize = offset_of!(Config, writeback);

    pub fn new(disk: &Geometry, queue_size: u16, queues: u16, writeback: bool) -> Self {
        let block = disk.block_size;
        Self {
            capacity: disk.sectors.into(),
            size_max: 0.into(),
            // Without a table, header and status take a descriptor each.
            seg_max: u32::from(queue_size.saturating_sub(2)).max(1).into(),
            geometry: [0; 4],
            blk_size: block.into(),
            physical_block_exp: PHYSICAL_BLOCK
                .checked_div(block)
                .and_then(u32::checked_ilog2)
                .unwrap_or(0) as u8,
            alignment_offset: 0,
            min_io_size: 1.into(),
            opt_io_size: 0.into(),
            writeback: writeback.into(),
            unused0: 0,
            num_queues: queues.into(),
            max_discard_sectors: MAX_DISCARD_SECTORS.into(),
            max_discard_seg: MAX_DISCARD_SEGMENTS.into(),
            discard_sector_alignment: (PHYSICAL_BLOCK / 512).into(),
            max_write_zeroes_sectors: MAX_ZERO_SECTORS.into(),
            max_write_zeroes_seg: MAX_DISCARD_SEGMENTS.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        }
    }
}
