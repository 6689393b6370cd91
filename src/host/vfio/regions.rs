//! Which parts of a device's memory may be mapped, and which only we access. Pure.
//!
//! An MSI-X table in a guest's hands would let it choose what is written where with each interrupt; the pending bits beside it are real
//! only while the kernel does not mask. So the pages of both are kept, and all else that the kernel lets be mapped is.

use conf_space::Resource;
use conf_space::registers::msix;
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_MMAP};

use super::info::{self, Broken};
use super::ioctl::RegionInfo;

/// Bytes of a page, as guests map them.
pub(super) const PAGE: u64 = 4096;

/// A part of a region, in bytes from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span {
    pub start: u64,
    /// The first byte behind it.
    pub end: u64,
}

impl Span {
    fn of_size(start: u64, size: u64) -> Option<Self> {
        let end = start.checked_add(size)?;
        Some(Self { start, end })
    }

    pub fn size(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// What of it is left and right of another.
    fn without(self, other: Self) -> [Self; 2] {
        [
            Self {
                start: self.start,
                end: self.end.min(other.start),
            },
            Self {
                start: self.start.max(other.end),
                end: self.end,
            },
        ]
    }

    /// The pages that lie in it as a whole.
    fn whole_pages(self) -> Option<Self> {
        let start = self.start.checked_next_multiple_of(PAGE)?;
        let end = self.end & !PAGE.wrapping_sub(1);
        (start < end).then_some(Self { start, end })
    }

    /// All pages that have a part in it.
    fn touched_pages(self) -> Self {
        Self {
            start: self.start & !PAGE.wrapping_sub(1),
            end: self.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX),
        }
    }
}

/// Where in its BAR a device's MSI-X table or array of pending bits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kept {
    pub bar: u8,
    pub span: Span,
}

impl From<msix::Place> for Kept {
    fn from(place: msix::Place) -> Self {
        let end = place.start.saturating_add(place.size);
        Self {
            bar: place.bar,
            span: Span {
                start: place.start,
                end,
            },
        }
    }
}

/// Bytes of an entry of an MSI-X table.
pub(super) const ENTRY: usize = msix::ENTRY_BYTES as usize;
/// Of an entry's control: it is masked.
pub(super) const MASKED: u32 = 1 << 0;

/// What an access at `offset` reads of an MSI-X table, whose entries are `entry`; `bytes` that are not the table's stay as they are.
pub(super) fn read_table(
    table: Span,
    offset: u64,
    bytes: &mut [u8],
    entry: impl Fn(u16) -> [u8; ENTRY],
) {
    for (byte, at) in bytes.iter_mut().zip(offset..table.end) {
        let within = at.checked_sub(table.start);
        let Some(within) = within.and_then(|within| usize::try_from(within).ok()) else {
            continue;
        };
        let (number, place) = (within / ENTRY, within % ENTRY);
        if let Ok(number) = u16::try_from(number)
            && let Some(value) = entry(number).get(place)
        {
            *byte = *value;
        }
    }
}

/// The parts of a BAR that may be mapped, in order, each of whole pages.
///
/// # Errors
/// [`Broken`]: nothing of it is to be mapped then.
pub(super) fn mappable(info: &RegionInfo, bar: u8, kept: &[Kept]) -> Result<Vec<Span>, Broken> {
    if info.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Ok(Vec::new());
    }
    let whole = Span {
        start: 0,
        end: info.size,
    };
    let mut spans = sparse_areas(info)?.unwrap_or_else(|| vec![whole]);
    for kept in kept.iter().filter(|kept| kept.bar == bar) {
        let pages = kept.span.touched_pages();
        spans = spans
            .into_iter()
            .flat_map(|span| span.without(pages))
            .collect();
    }
    let mut spans: Vec<Span> = spans.into_iter().filter_map(Span::whole_pages).collect();
    spans.sort();
    Ok(spans)
}

/// The areas that the kernel names, if it does: nothing else of the region may be mapped then.
fn sparse_areas(info: &RegionInfo) -> Result<Option<Vec<Span>>, Broken> {
    let named = info::pairs(
        &info.words,
        info.capabilities,
        VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    )?;
    let areas = named.map(|named| {
        let areas = named.into_iter();
        // What reaches beyond the region is none of it.
        let areas = areas.filter_map(|(start, size)| Span::of_size(start, size));
        areas.filter(|area| area.end <= info.size).collect()
    });
    Ok(areas)
}

/// Whether an access of `width` bytes lies within what a BAR decodes, and is aligned.
pub(super) fn is_within(resource: &Resource, offset: u64, width: u8) -> bool {
    let width = u64::from(width);
    let end = offset.checked_add(width);
    offset.checked_rem(width) == Some(0) && end.is_some_and(|end| end <= resource.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u64, capabilities: &[u8]) -> RegionInfo {
        let mut bytes = vec![0u8; 32];
        bytes.extend_from_slice(capabilities);
        RegionInfo {
            flags: VFIO_REGION_INFO_FLAG_MMAP,
            size,
            offset: 0,
            words: bytes
                .chunks_exact(4)
                .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
                .collect(),
            capabilities: if capabilities.is_empty() { 0 } else { 32 },
        }
    }

    fn capability(id: u16, next: u32, body: &[u64]) -> Vec<u8> {
        let mut bytes = id.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&1u16.to_ne_bytes());
        bytes.extend_from_slice(&next.to_ne_bytes());
        bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    fn span(start: u64, end: u64) -> Span {
        Span { start, end }
    }

    fn kept(bar: u8, start: u64, end: u64) -> Kept {
        let span = span(start, end);
        Kept { bar, span }
    }

    #[test]
    fn a_bar_without_msix_is_mapped_as_a_whole() {
        assert_eq!(
            mappable(&region(0x10_0000, &[]), 0, &[]),
            Ok(vec![span(0, 0x10_0000)])
        );
        let other = [kept(3, 0, 0x50)];
        assert_eq!(
            mappable(&region(0x4000, &[]), 0, &other),
            Ok(vec![span(0, 0x4000)])
        );
    }

    #[test]
    fn a_bar_is_split_around_the_pages_of_its_msix_table_and_pending_bits() {
        let kept = [kept(0, 0x2000, 0x2050), kept(0, 0x3800, 0x3808)];
        assert_eq!(
            mappable(&region(0x8000, &[]), 0, &kept),
            Ok(vec![span(0, 0x2000), span(0x4000, 0x8000)])
        );
    }

    #[test]
    fn what_the_kernel_does_not_let_be_mapped_is_not() {
        let mut closed = region(0x4000, &[]);
        closed.flags = 0;
        assert_eq!(mappable(&closed, 0, &[]), Ok(vec![]));
        // Less than a page: another device may be in the rest.
        assert_eq!(mappable(&region(0x100, &[]), 0, &[]), Ok(vec![]));
    }

    #[test]
    fn areas_that_the_kernel_names_are_all_that_is_mapped() {
        let sparse = capability(1, 0, &[2, 0, 0x1000, 0x3000, 0x2000]);
        let mut first = capability(3, 40, &[]);
        first.extend_from_slice(&sparse);
        for capabilities in [sparse, first] {
            assert_eq!(
                mappable(
                    &region(0x8000, &capabilities),
                    0,
                    &[kept(0, 0x3000, 0x3010)]
                ),
                Ok(vec![span(0, 0x1000), span(0x4000, 0x5000)])
            );
        }
    }

    #[test]
    fn a_broken_description_maps_nothing_and_does_not_hang() {
        let too_many = capability(1, 0, &[1000, 0, 0x1000]);
        let to_itself = capability(3, 32, &[]);
        let outside = capability(3, 0x1000, &[]);
        for capabilities in [too_many, to_itself, outside] {
            let region = region(0x8000, &capabilities);
            assert!(mappable(&region, 0, &[]).is_err(), "{capabilities:x?}");
        }
        let told = mappable(&region(0x8000, &capability(3, 32, &[])), 0, &[]);
        let told = told.unwrap_err().to_string();
        assert!(
            told.contains("slow") && told.contains("another kernel"),
            "{told}"
        );
        let beyond = capability(1, 0, &[2, 0x1000, 0x8000, u64::MAX, 0x1000]);
        assert_eq!(mappable(&region(0x8000, &beyond), 0, &[]), Ok(vec![]));
    }

    #[test]
    fn an_access_reads_the_entries_of_the_table_and_leaves_what_is_beside_it() {
        // Each byte says in which entry it is, and where in it.
        let entry = |number: u16| {
            let number = u8::try_from(number).unwrap() << 4;
            std::array::from_fn(|place| number | u8::try_from(place).unwrap())
        };
        let read = |offset, width| {
            let mut bytes = [0xee; 8];
            read_table(span(0x1000, 0x1020), offset, &mut bytes[..width], entry);
            u64::from_be_bytes(bytes)
        };
        assert_eq!(read(0x1000, 8), 0x0001_0203_0405_0607);
        assert_eq!(read(0x101c, 4), 0x1c1d_1e1f_eeee_eeee);
        assert_eq!(read(0x1011, 1), 0x11ee_eeee_eeee_eeee);
        for offset in [0xff8, 0x1020, u64::MAX - 7] {
            assert_eq!(read(offset, 8), 0xeeee_eeee_eeee_eeee);
        }
    }

    #[test]
    fn accesses_stay_within_their_bar() {
        let bar = Resource {
            size: 0x100,
            ..Resource::ABSENT
        };
        assert!(is_within(&bar, 0xf8, 8));
        assert!(!is_within(&bar, 0xfc, 8));
        assert!(!is_within(&bar, 2, 4));
        assert!(!is_within(&bar, u64::MAX, 1));
        assert!(!is_within(&bar, 0, 0));
    }
}
