//! The block device, from its queues down to its image.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod rings;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use proptest::prelude::*;
use rings::{BUFFERS, Driver, Guest, Live, Part, readable, writable};
use tempfile::NamedTempFile;
use virtio::Features;
use virtio::blk::{Blk, Image, ImageError, Options, feature};
use virtio::device::{Device, DeviceKind};
use virtio::memory::Words;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SECTORS: u64 = 256;

/// On storage, not in memory, if that is where this is built.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let data: Vec<u8> = (0..SECTORS * 512)
        .map(|byte| (byte / 512 + byte % 251) as u8)
        .collect();
    file.as_file().write_all_at(&data, 0).unwrap();
    file
}

/// A disk and its driver.
struct Disk {
    guest: Guest,
    driver: Driver,
    device: Live<Blk>,
}

fn all() -> Features {
    Features::EVENT_IDX | feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES
}

/// Disks are to work alike whether the kernel works on their requests meanwhile or threads do.
const BOTH: [bool; 2] = [true, false];

fn blk(path: &Path, read_only: bool, io_uring: bool) -> Blk {
    let options = Options {
        serial: "a serial number that is long".into(),
        io_uring,
        ..Options::default()
    };
    Blk::new(Image::open(path, read_only, false).unwrap(), &options)
}

impl Disk {
    fn new(path: &Path, read_only: bool, features: Features) -> Self {
        Self::served(path, read_only, features, true)
    }

    fn served(path: &Path, read_only: bool, features: Features, io_uring: bool) -> Self {
        let guest = Guest::default();
        let driver = Driver::new(0, 64, features);
        let device = Live::new(blk(path, read_only, io_uring), &guest, &[&driver]);
        Self {
            guest,
            driver,
            device,
        }
    }

    fn submit(&mut self, kind: u32, sector: u64, parts: &[Part], slot: u64) -> Option<u16> {
        let header = BUFFERS + slot * 0x100;
        self.guest.write(header, &kind.to_le_bytes());
        self.guest.write(header + 8, &sector.to_le_bytes());
        self.guest.write(header + 0x20, &[0xff]);
        let mut all = vec![readable(header, 16)];
        all.extend(parts);
        all.push(writable(header + 0x20, 1));
        self.driver.offer(&self.guest, &all, None)
    }

    fn request(&mut self, kind: u32, sector: u64, parts: &[Part]) -> u8 {
        let head = self.submit(kind, sector, parts, 0).unwrap();
        self.device.notify(0);
        let (used, len) = self.device.used(&mut self.driver, &self.guest);
        assert_eq!(used, head);
        let room: u32 = parts
            .iter()
            .filter(|part| part.write)
            .map(|part| part.len)
            .sum();
        let status = self.guest.read(BUFFERS + 0x20, 1)[0];
        let written = match (kind, status) {
            (IN, OK) => room,
            (GET_ID, OK) => 20,
            _ => 0,
        };
        // The status is the last byte, behind what was perhaps not written.
        assert_eq!(len, written + u32::from(written == room));
        status
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.guest.write(BUFFERS + 0x1_0000, data);
        self.request(
            OUT,
            sector,
            &[readable(BUFFERS + 0x1_0000, data.len() as u32)],
        )
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let at = BUFFERS + 0x8_0000;
        self.guest.write(at, &vec![0xee; len as usize]);
        let status = self.request(IN, sector, &[writable(at, len)]);
        (status, self.guest.read(at, len as usize))
    }

    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.guest.write(BUFFERS + 0x1_0000, &bytes);
        self.request(kind, 0, &[readable(BUFFERS + 0x1_0000, bytes.len() as u32)])
    }
}

fn on_disk(file: &File, sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, sector * 512).unwrap();
    bytes
}

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    let formats = [Features::empty(), Features::RING_PACKED];
    for (format, io_uring) in formats
        .into_iter()
        .flat_map(|format| BOTH.map(|io_uring| (format, io_uring)))
    {
        let image = image();
        let mut disk = Disk::served(image.path(), false, all() | format, io_uring);
        let data: Vec<u8> = (0..4096u32).map(|byte| (byte * 7) as u8).collect();
        assert_eq!(disk.write(5, &data), OK);
        assert_eq!(on_disk(image.as_file(), 5, 4096), data);
        assert_eq!(disk.read(5, 4096), (OK, data));
        assert_eq!(
            disk.read(200, 512),
            (OK, on_disk(image.as_file(), 200, 512))
        );
        assert_eq!(disk.request(FLUSH, 0, &[]), OK);
    }
}

#[test]
fn the_borders_of_buffers_mean_nothing() {
    let image = image();
    let mut disk = Disk::new(image.path(), false, all());
    let expected = on_disk(image.as_file(), 3, 1024);
    let at = BUFFERS + 0x2_0000;
    // The header in two parts, the data in three, the last of which has the status too.
    disk.guest.write(at, &IN.to_le_bytes());
    disk.guest.write(at + 8, &3u64.to_le_bytes());
    let parts = [
        readable(at, 5),
        readable(at + 5, 11),
        writable(at + 0x1001, 100),
        writable(at + 0x2003, 900),
        writable(at + 0x3005, 25),
    ];
    disk.driver.offer(&disk.guest, &parts, None).unwrap();
    disk.device.notify(0);
    assert_eq!(disk.device.used(&mut disk.driver, &disk.guest).1, 1025);
    let mut data = disk.guest.read(at + 0x1001, 100);
    data.extend(disk.guest.read(at + 0x2003, 900));
    data.extend(disk.guest.read(at + 0x3005, 24));
    assert_eq!(data, expected);
    assert_eq!(disk.guest.read(at + 0x3005 + 24, 1), [OK]);
}

#[test]
fn requests_beyond_the_end_or_of_no_whole_sectors_fail_and_leave_the_image_alone() {
    let image = image();
    let before = on_disk(image.as_file(), 0, SECTORS as usize * 512);
    let mut disk = Disk::new(image.path(), false, all());
    for sector in [
        SECTORS,
        SECTORS - 1,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        u64::MAX,
    ] {
        assert_eq!(disk.write(sector, &[1; 1024]), IO_ERROR, "{sector}");
        assert_eq!(disk.read(sector, 1024).0, IO_ERROR);
    }
    assert_eq!(disk.write(0, &[1; 100]), IO_ERROR);
    assert_eq!(disk.request(IN, 0, &[]), IO_ERROR);
    assert_eq!(disk.request(0x1234, 0, &[]), UNSUPPORTED);
    assert_eq!(on_disk(image.as_file(), 0, SECTORS as usize * 512), before);
    assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn the_serial_number_is_cut_to_its_length() {
    let image = image();
    let mut disk = Disk::new(image.path(), false, all());
    let at = BUFFERS + 0x1_0000;
    assert_eq!(disk.request(GET_ID, 0, &[writable(at, 20)]), OK);
    assert_eq!(disk.guest.read(at, 20), b"a serial number that");
    disk.submit(GET_ID, 0, &[writable(at, 30)], 0).unwrap();
    disk.device.notify(0);
    assert_eq!(disk.device.used(&mut disk.driver, &disk.guest).1, 20);
    assert_eq!(disk.request(GET_ID, 0, &[writable(at, 19)]), IO_ERROR);
}

#[test]
fn nothing_is_written_to_a_disk_that_is_read_only() {
    let image = image();
    let before = on_disk(image.as_file(), 0, SECTORS as usize * 512);
    let mut disk = Disk::new(image.path(), true, all());
    assert!(disk.device.device.features().contains(feature::RO));
    assert_eq!(disk.write(0, &[1; 512]), IO_ERROR);
    assert_eq!(disk.segments(DISCARD, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(disk.segments(WRITE_ZEROES, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(disk.read(0, 512), (OK, before[..512].to_vec()));
    assert_eq!(on_disk(image.as_file(), 0, SECTORS as usize * 512), before);
}

#[test]
fn discarded_and_zeroed_sectors_are_zeroes_and_those_around_them_are_not() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let image = image();
        let before = on_disk(image.as_file(), 0, SECTORS as usize * 512);
        let mut disk = Disk::new(image.path(), false, all());
        assert_eq!(disk.segments(kind, &[(9, 20, flags), (100, 1, flags)]), OK);
        let mut expected = before;
        expected[9 * 512..29 * 512].fill(0);
        expected[100 * 512..101 * 512].fill(0);
        assert_eq!(
            on_disk(image.as_file(), 0, SECTORS as usize * 512),
            expected
        );
        assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}

#[test]
fn segments_that_are_wrong_are_refused() {
    let image = image();
    let mut disk = Disk::new(image.path(), false, all());
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(disk.request(kind, 0, &[]), IO_ERROR);
        assert_eq!(disk.segments(kind, &[(SECTORS, 1, 0)]), IO_ERROR);
        assert_eq!(disk.segments(kind, &[(0, 0, 0)]), IO_ERROR);
        assert_eq!(disk.segments(kind, &[(0, u32::MAX, 0)]), IO_ERROR);
        assert_eq!(disk.segments(kind, &[(0, 1, 2)]), UNSUPPORTED);
        assert_eq!(disk.segments(kind, &[(0, 1, 0); 33]), IO_ERROR);
    }
    assert_eq!(disk.segments(DISCARD, &[(0, 1, 1)]), UNSUPPORTED);
    disk.device.reset();
    drop(disk);
    let mut plain = Disk::new(image.path(), false, Features::EVENT_IDX);
    assert_eq!(plain.segments(DISCARD, &[(0, 1, 0)]), UNSUPPORTED);
    assert_eq!(plain.segments(WRITE_ZEROES, &[(0, 1, 0)]), UNSUPPORTED);
}

#[test]
fn a_request_that_is_too_short_to_answer_needs_a_reset() {
    for parts in [
        vec![readable(BUFFERS, 15), writable(BUFFERS, 1)],
        vec![readable(BUFFERS, 16)],
        vec![writable(BUFFERS, 17)],
    ] {
        let image = image();
        let mut disk = Disk::new(image.path(), false, all());
        disk.driver.offer(&disk.guest, &parts, None).unwrap();
        disk.device.notify(0);
        assert_eq!(disk.device.broken(), "the request is too short");
        disk.device.reset();
        disk.driver = Driver::again(&disk.guest, 0, 64, all());
        disk.device.activate(&disk.guest, &[&disk.driver]);
        assert_eq!(disk.read(0, 512).0, OK);
    }
}

const WRITEBACK: usize = 32;

fn writeback(device: &Blk) -> u8 {
    let mut value = [0xff];
    device.read_config(WRITEBACK, &mut value);
    value[0]
}

#[test]
fn what_the_driver_has_set_of_the_cache_outlives_a_restart_and_not_a_reset() {
    let image = image();
    let words = Words::volatile(3).unwrap();
    let restarted = || {
        let mut device = blk(image.path(), false, true);
        device.keep(words.clone());
        device
    };
    for value in [0, 1, 0] {
        restarted().write_config(WRITEBACK, &[value]);
        assert_eq!(writeback(&restarted()), value);
    }
    restarted().reset();
    assert_eq!(writeback(&restarted()), 1);
}

#[test]
fn a_driver_that_cannot_flush_finds_no_cache_until_it_asks_for_one() {
    let image = image();
    let mut device = blk(image.path(), false, true);
    assert_eq!(writeback(&device), 1);
    device.agree(feature::CONFIG_WCE);
    assert_eq!(writeback(&device), 0);
    device.write_config(WRITEBACK, &[1]);
    assert_eq!(writeback(&device), 1);
    device.reset();
    device.agree(feature::CONFIG_WCE | feature::FLUSH);
    assert_eq!(writeback(&device), 1);
}

#[test]
fn many_requests_at_a_time_on_several_queues_are_each_answered_once() {
    BOTH.into_iter().for_each(many_requests);
}

fn many_requests(io_uring: bool) {
    let image = image();
    let guest = Guest::default();
    let options = Options {
        queues: 3,
        io_uring,
        ..Options::default()
    };
    let device = Blk::new(Image::open(image.path(), false, false).unwrap(), &options);
    assert!(device.features().contains(feature::MQ));
    assert_eq!(device.queue_sizes(), [256; 3]);
    let mut drivers: Vec<Driver> = (0..3).map(|queue| Driver::new(queue, 64, all())).collect();
    let live = Live::new(device, &guest, &drivers.iter().collect::<Vec<_>>());
    for round in 0..20u64 {
        let mut open = std::collections::HashMap::new();
        for (queue, driver) in drivers.iter_mut().enumerate() {
            for number in 0..16 {
                let slot = queue as u64 * 16 + number;
                let (header, data) = (BUFFERS + slot * 0x40, BUFFERS + 0x1_0000 + slot * 512);
                let sector = slot * 4 + round % 4;
                guest.write(header, &IN.to_le_bytes());
                guest.write(header + 8, &sector.to_le_bytes());
                guest.write(header + 16, &[0xff]);
                let parts = [
                    readable(header, 16),
                    writable(data, 512),
                    writable(header + 16, 1),
                ];
                let head = driver.offer(&guest, &parts, None).unwrap();
                open.insert((queue, head), (sector, header, data));
            }
            live.notify(queue as u16);
        }
        for (queue, driver) in drivers.iter_mut().enumerate() {
            for _ in 0..16 {
                let (head, len) = live.used(driver, &guest);
                let (sector, header, data) = open.remove(&(queue, head)).unwrap();
                assert_eq!((len, guest.read(header + 16, 1)), (513, vec![OK]));
                assert_eq!(guest.read(data, 512), on_disk(image.as_file(), sector, 512));
            }
        }
        assert!(open.is_empty());
    }
    assert!(
        live.interrupts() < 3 * 16 * 20,
        "some were answered together"
    );
}

#[test]
fn a_reset_ends_when_nothing_touches_the_guest_any_more_and_the_device_lives_again() {
    BOTH.into_iter().for_each(resets);
}

fn resets(io_uring: bool) {
    let image = image();
    let mut disk = Disk::served(image.path(), false, all(), io_uring);
    for round in 0..30 {
        for slot in 0..16 {
            let data = BUFFERS + 0x1_0000 + slot * 0x1000;
            disk.submit(IN, slot, &[writable(data, 4096)], slot)
                .unwrap();
        }
        disk.device.notify(0);
        if round % 2 == 0 {
            disk.device.device.reset_queue(0);
            while !disk.device.device.is_queue_reset(0) {
                std::thread::yield_now();
            }
        }
        disk.device.reset();
        let quiet = disk.guest.read(BUFFERS, 0x3_0000);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(disk.guest.read(BUFFERS, 0x3_0000) == quiet);
        disk.driver = Driver::again(&disk.guest, 0, 64, all());
        disk.device.activate(&disk.guest, &[&disk.driver]);
    }
    assert_eq!(disk.read(0, 512).0, OK);
}

#[test]
fn requests_in_flight_when_the_device_dies_are_answered_by_the_next_one() {
    BOTH.into_iter().for_each(dies_in_flight);
}

fn dies_in_flight(io_uring: bool) {
    let image = image();
    let guest = Guest::default();
    let driver = Driver::new(0, 64, all());
    let mut queue = driver.queue(&guest);
    let mut disk = Disk {
        guest,
        driver,
        device: Live::new(
            Blk::new(
                Image::open(self::image().path(), true, false).unwrap(),
                &Options::default(),
            ),
            &Guest::default(),
            &[&Driver::new(0, 8, all())],
        ),
    };
    for slot in 0..3 {
        disk.submit(
            IN,
            slot,
            &[writable(BUFFERS + 0x1_0000 + slot * 512, 512)],
            slot,
        )
        .unwrap();
    }
    // A device that takes two and is heard of no more.
    let mut chain = virtio::queue::Chain::default();
    assert!(queue.pop(&disk.guest.view(), &mut chain).unwrap());
    assert!(queue.pop(&disk.guest.view(), &mut chain).unwrap());
    drop(queue);
    disk.device = Live::new(
        blk(image.path(), false, io_uring),
        &disk.guest,
        &[&disk.driver],
    );
    for _ in 0..3 {
        disk.device.used(&mut disk.driver, &disk.guest);
    }
    assert!(disk.driver.used(&disk.guest).is_none());
    let data = disk.guest.read(BUFFERS + 0x1_0000, 3 * 512);
    assert_eq!(data, on_disk(image.as_file(), 0, 3 * 512));
}

#[test]
fn a_file_that_has_become_shorter_gives_errors_and_the_disk_goes_on() {
    for io_uring in BOTH {
        let image = image();
        let mut disk = Disk::served(image.path(), false, all(), io_uring);
        image.as_file().set_len(100 * 512 + 17).unwrap();
        assert_eq!(disk.read(98, 4096).0, IO_ERROR, "half of it is there");
        assert_eq!(disk.read(200, 512).0, IO_ERROR);
        assert_eq!(disk.read(99, 512).0, OK);
        assert_eq!(disk.write(200, &[7; 512]), OK);
        assert_eq!(disk.read(200, 512), (OK, vec![7; 512]));
    }
}

#[test]
fn a_request_of_a_thousand_pieces_is_done() {
    for io_uring in BOTH {
        let image = image();
        let mut disk = Disk::served(
            image.path(),
            false,
            all() | Features::INDIRECT_DESC,
            io_uring,
        );
        let header = BUFFERS;
        disk.guest.write(header, &OUT.to_le_bytes());
        disk.guest.write(header + 8, &0u64.to_le_bytes());
        let at = BUFFERS + 0x1_0000;
        let data: Vec<u8> = (0..1020u32 * 2).map(|byte| (byte % 253) as u8).collect();
        let mut parts = vec![readable(header, 16)];
        for piece in 0..1020u64 {
            let bytes = &data[piece as usize * 2..][..2];
            disk.guest.write(at + piece * 4, bytes);
            parts.push(readable(at + piece * 4, 2));
        }
        // Whole sectors
        disk.guest.write(at + 0x8000, &[9; 8]);
        parts.push(readable(at + 0x8000, 8));
        parts.push(writable(header + 0x20, 1));
        assert!(parts.len() <= 1024);
        disk.driver
            .offer(&disk.guest, &parts, Some(BUFFERS + 0x4_0000))
            .unwrap();
        disk.device.notify(0);
        disk.device.used(&mut disk.driver, &disk.guest);
        assert_eq!(disk.guest.read(header + 0x20, 1), [OK]);
        let mut expected = data;
        expected.extend([9; 8]);
        assert_eq!(on_disk(image.as_file(), 0, 2048), expected);
    }
}

#[test]
fn the_configuration_says_what_the_disk_is_like() {
    let image = image();
    let mut device = blk(image.path(), false, true);
    assert_eq!(device.kind(), DeviceKind::Block);
    let word = |device: &Blk, offset| {
        let mut bytes = [0; 4];
        device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!((word(&device, 0), word(&device, 4)), (SECTORS as u32, 0));
    assert_eq!(word(&device, 12), 254, "segments of a request");
    assert_eq!(word(&device, 20), 512, "block size");
    assert_eq!(word(&device, 34) & 0xffff, 1, "queues");
    assert_eq!(word(&device, 58), 0);
    for offset in [60, 1000, usize::MAX] {
        let mut bytes = [0xff; 3];
        device.read_config(offset, &mut bytes);
        assert_eq!(bytes, [0; 3]);
    }
    assert_eq!(word(&device, 32) & 0xff, 1, "writing back");
    device.write_config(32, &[0]);
    assert_eq!(word(&device, 32) & 0xff, 0);
    device.write_config(0, &[0xff; 8]);
    device.write_config(usize::MAX, &[0xff; 8]);
    assert_eq!(word(&device, 0), SECTORS as u32);
}

#[test]
fn images_that_make_no_disk_are_refused_with_the_reason() {
    let open = |path: &Path, read_only| Image::open(path, read_only, false);
    let missing = open(Path::new("/nowhere/at/all"), false).unwrap_err();
    assert!(matches!(missing, ImageError::Open { .. }), "{missing}");
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        open(directory.path(), true),
        Err(ImageError::Kind { .. })
    ));
    let empty = NamedTempFile::new().unwrap();
    empty.as_file().set_len(511).unwrap();
    assert!(matches!(
        open(empty.path(), false),
        Err(ImageError::Empty { .. })
    ));

    let image = image();
    let held = open(image.path(), false).unwrap();
    assert!(matches!(
        open(image.path(), false),
        Err(ImageError::Locked { .. })
    ));
    assert!(matches!(
        open(image.path(), true),
        Err(ImageError::Locked { .. })
    ));
    drop(held);
    let _reader = open(image.path(), true).unwrap();
    let _another = open(image.path(), true).unwrap();
    assert!(matches!(
        open(image.path(), false),
        Err(ImageError::Locked { .. })
    ));
}

/// Whether the host's cache has the image's bytes at `offset`.
fn is_cached(image: &File, offset: i64) -> bool {
    let mut byte = 0u8;
    let iovec = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: the kernel fills one byte, which is ours.
    let read = unsafe { libc::preadv2(image.as_raw_fd(), &iovec, 1, offset, libc::RWF_NOWAIT) };
    read == 1
}

#[test]
fn past_the_cache_buffers_need_no_alignment_and_nothing_stays_in_it() {
    // Not in /tmp, which may be a file system that knows no direct access.
    let image = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().write_all(&[3; 1 << 20]).unwrap();
    image.as_file().sync_all().unwrap();
    posix_fadvise(
        image.as_file(),
        0,
        0,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )
    .unwrap();
    let opened = match Image::open(image.path(), false, true) {
        Ok(opened) => opened,
        Err(ImageError::Direct { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let guest = Guest::default();
    let driver = Driver::new(0, 64, all());
    let device = Live::new(Blk::new(opened, &Options::default()), &guest, &[&driver]);
    let mut disk = Disk {
        guest,
        driver,
        device,
    };
    // The last one is longer than what goes in one call.
    for (at, fill, len) in [
        (0x1_0000, 1, 4096),
        (0x2_0123, 2, 4096),
        (0x3_0321, 4, 0x5_0000),
    ] {
        let (from, to) = (BUFFERS + at, BUFFERS + at + 0x6_0000);
        disk.guest.write(from, &vec![fill; len]);
        let len = len as u32;
        assert_eq!(disk.request(IN, 8, &[writable(to, len)]), OK);
        assert_eq!(disk.request(OUT, 8, &[readable(from, len)]), OK);
        assert_eq!(disk.request(IN, 8, &[writable(to, len)]), OK);
        assert!(disk.guest.read(to, len as usize) == vec![fill; len as usize]);
        assert!(!is_cached(image.as_file(), 4096));
    }
    assert_eq!(disk.write(8, &[5; 512]), OK);
    let (status, data) = disk.read(8, 1024);
    assert_eq!(status, OK);
    assert!(data == [[5; 512], [4; 512]].concat());
    let mut end = [0; 8];
    image
        .as_file()
        .read_exact_at(&mut end, 4096 + 0x5_0000)
        .unwrap();
    assert_eq!(end, [3; 8]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_request_gets_an_answer_and_stays_within_the_disk(
        requests in prop::collection::vec(
            (0..16u32, prop_oneof![0..SECTORS + 8, any::<u64>()], prop::collection::vec((1..2000u32, any::<bool>()), 0..4), any::<[u8; 32]>()),
            1..12,
        ),
        io_uring in any::<bool>(),
    ) {
        let image = image();
        let mut disk = Disk::served(image.path(), false, all(), io_uring);
        for (kind, sector, mut parts, bytes) in requests {
            parts.sort_by_key(|(_, write)| *write);
            disk.guest.write(BUFFERS + 0x1_0000, &bytes);
            let parts: Vec<Part> = parts
                .iter()
                .enumerate()
                .map(|(index, (len, write))| Part {
                    address: BUFFERS + 0x1_0000 + index as u64 * 0x1000,
                    len: *len,
                    write: *write,
                })
                .collect();
            let status = disk.request(kind, sector, &parts);
            prop_assert!(status <= UNSUPPORTED);
        }
        prop_assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}
