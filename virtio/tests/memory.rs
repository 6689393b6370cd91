//! Guest memory: pages that come and go, and what is left of them for requests under way.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::sync::Arc;

use virtio::memory::{Buffer, CHUNK_PAGES, Direction, GuestRam, Memfd, MemoryError, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

const PAGE: u64 = PAGE_SIZE as u64;
const CHUNK: u64 = (PAGE_SIZE * CHUNK_PAGES) as u64;

fn guest(pages: usize, chunks: usize) -> (Memfd, GuestRam) {
    let memory = Memfd::new(pages).unwrap();
    let ram = GuestRam::new(Arc::new(memory.clone()), chunks);
    (memory, ram)
}

#[test]
fn what_is_written_across_a_boundary_of_mappings_is_read_back() {
    let (memory, ram) = guest(2 * CHUNK_PAGES, 8);
    let view = ram.view();
    assert_eq!(
        memory.mappings(),
        0,
        "nothing is mapped before it is touched"
    );
    let data: Vec<u8> = (0..=255).collect();
    let at = GuestAddress(CHUNK - 100);
    view.write_slice(&data, at).unwrap();
    let mut back = vec![0; 256];
    view.read_slice(&mut back, at).unwrap();
    assert_eq!(back, data);
    assert_eq!(memory.mappings(), 2);
}

#[test]
fn a_page_that_is_not_there_is_an_error_and_the_pages_around_it_are_not() {
    let (memory, ram) = guest(CHUNK_PAGES, 8);
    memory.set_page(5, false);
    let view = ram.view();
    assert!(view.check_range(GuestAddress(4 * PAGE), PAGE_SIZE, Permissions::Write));
    assert!(!view.check_range(GuestAddress(4 * PAGE), PAGE_SIZE + 1, Permissions::Write));
    assert!(!view.check_range(GuestAddress(6 * PAGE - 1), 2, Permissions::Write));
    assert!(view.check_range(GuestAddress(6 * PAGE), PAGE_SIZE, Permissions::Write));
    let hole = view.run(4 * PAGE, 3 * PAGE_SIZE).unwrap_err();
    assert!(matches!(hole, MemoryError::NotThere { address } if address == 5 * PAGE));
}

#[test]
fn a_hole_that_the_guest_has_filled_is_there_when_it_is_touched_next() {
    let (memory, ram) = guest(CHUNK_PAGES, 8);
    memory.set_page(7, false);
    let view = ram.view();
    assert!(view.write_slice(&[1], GuestAddress(7 * PAGE)).is_err());
    memory.set_page(7, true);
    view.write_slice(&[1], GuestAddress(7 * PAGE)).unwrap();
}

#[test]
fn a_request_keeps_its_pages_when_the_guests_memory_changes_under_it() {
    let (memory, ram) = guest(CHUNK_PAGES, 8);
    let mut buffer = Buffer::default();
    buffer.restart(&ram.view());
    buffer
        .push(Direction::Writable, 3 * PAGE, PAGE_SIZE)
        .unwrap();
    memory.set_page(3, false);
    ram.invalidate();
    assert!(
        !ram.view()
            .check_range(GuestAddress(3 * PAGE), 1, Permissions::Read)
    );
    assert_eq!(buffer.writer().write(&[7; PAGE_SIZE]), PAGE_SIZE);
    assert_eq!(memory.mappings(), 2);
    buffer.clear();
    assert_eq!(
        memory.mappings(),
        1,
        "the old one goes with the last request"
    );
}

#[test]
fn no_address_is_too_wild() {
    let (memory, ram) = guest(16, 8);
    let view = ram.view();
    for address in [
        16 * PAGE,
        CHUNK,
        1 << 39,
        (1 << 40) - 1,
        1 << 40,
        u64::MAX - 1,
        u64::MAX,
    ] {
        for len in [1, 2, PAGE_SIZE, usize::MAX] {
            assert!(
                !view.check_range(GuestAddress(address), len, Permissions::Read),
                "{address:#x}"
            );
        }
        assert!(view.run(address, 1).is_err());
    }
    assert!(!view.check_range(GuestAddress(0), usize::MAX, Permissions::Read));
    assert!(memory.mappings() <= 1, "what holds nothing is not kept");
}

#[test]
fn a_guest_that_scatters_its_pages_gets_no_more_mappings_than_its_share() {
    let (memory, ram) = guest(4 * CHUNK_PAGES, 2);
    let view = ram.view();
    view.run(0, 1).unwrap();
    view.run(3 * CHUNK, 1).unwrap();
    assert!(matches!(
        view.run(CHUNK, 1),
        Err(MemoryError::Scattered { limit: 2 })
    ));
    view.run(5, 1).unwrap();
    assert_eq!(memory.mappings(), 2);
}

#[test]
fn all_that_is_mapped_of_a_guest_counts_and_not_only_the_last_view() {
    let (memory, ram) = guest(4 * CHUNK_PAGES, 2);
    // A request that is under way while the guest gives pages back.
    let before = ram.view();
    before.run(0, 1).unwrap();
    ram.invalidate();
    ram.view().run(0, 1).unwrap();
    assert!(matches!(
        ram.view().run(CHUNK, 1),
        Err(MemoryError::Scattered { limit: 2 })
    ));
    drop(before);
    ram.view().run(CHUNK, 1).unwrap();
    assert_eq!(memory.mappings(), 2);
}

#[test]
fn readers_and_writers_walk_over_pieces() {
    let (_memory, ram) = guest(CHUNK_PAGES, 8);
    let mut buffer = Buffer::default();
    buffer.restart(&ram.view());
    for (address, len) in [(0x100, 3), (0x2000, 1), (0x3000, 6)] {
        buffer.push(Direction::Writable, address, len).unwrap();
        buffer.push(Direction::Readable, address, len).unwrap();
    }
    let mut writer = buffer.writer();
    assert_eq!(writer.len(), 10);
    let mut head = writer.take(5);
    assert_eq!((head.len(), writer.len()), (5, 5));
    head.write_all(b"abcde").unwrap();
    assert!(head.write_all(b"x").is_err());
    assert_eq!(writer.write(b"fghijkl"), 5);
    let mut reader = buffer.reader();
    let mut two = [0; 2];
    reader.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"ab");
    let mut middle = reader.take(3);
    let mut rest = [0; 9];
    assert_eq!(middle.read(&mut rest), 3);
    assert_eq!(&rest[..3], b"cde");
    assert_eq!(reader.read(&mut rest), 5);
    assert_eq!(&rest[..5], b"fghij");
    assert!(reader.is_empty());
    assert!(reader.read_exact(&mut two).is_err());
}

#[test]
fn files_are_read_and_written_over_more_pieces_than_one_call_takes() {
    let (_memory, ram) = guest(CHUNK_PAGES, 8);
    let mut buffer = Buffer::default();
    buffer.restart(&ram.view());
    for piece in 0..300 {
        buffer.push(Direction::Writable, piece * PAGE, 7).unwrap();
        buffer.push(Direction::Readable, piece * PAGE, 7).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..2100u32).map(|byte| (byte % 251) as u8).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 50).unwrap();
    assert_eq!(buffer.writer().read_from(&file, 50).unwrap(), 2100);
    assert_eq!(buffer.reader().write_to(&file, 5000).unwrap(), 2100);
    let mut back = vec![0; 2100];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 5000).unwrap();
    assert_eq!(back, data);
    assert_eq!(
        buffer.writer().read_from(&file, 7000).unwrap(),
        100,
        "the file ends"
    );
}
