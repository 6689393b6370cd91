//! How fast a disk is: requests of one size, so many at a time, past the guest's own cache. By Linux's asynchronous I/O, as it needs no threads: the
//! guest has one CPU.

use std::error::Error;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::time::{Duration, Instant};

use crate::random::Random;

/// `struct iocb` (Linux `include/uapi/linux/aio_abi.h`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Done>() == 32);

/// `IOCB_CMD_PREAD`, `IOCB_CMD_PWRITE`.
const READ: u16 = 0;
const WRITE: u16 = 1;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pattern {
    RandomRead,
    Read,
    Write,
}

impl Pattern {
    fn of(name: &str) -> Result<Self, Box<dyn Error>> {
        match name {
            "randread" => Ok(Self::RandomRead),
            "read" => Ok(Self::Read),
            "write" => Ok(Self::Write),
            _ => Err(format!("no pattern {name}").into()),
        }
    }
}

/// Memory for one request each, aligned as a disk needs it.
struct Buffers {
    base: *mut libc::c_void,
    bytes: usize,
}

impl Buffers {
    fn new(bytes: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is that long, and writable. Not zeroes, which storage may treat as a hole.
        unsafe { ptr::write_bytes(base.cast::<u8>(), 0x5a, bytes) };
        Ok(Self { base, bytes })
    }

    fn address(&self, index: usize, size: usize) -> u64 {
        (self.base as u64).saturating_add(index.saturating_mul(size) as u64)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: this is what `new` mapped. No request is under way any more: see `Context`.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

/// An `aio_context_t`. Dropping it waits for its requests.
struct Context(libc::c_ulong);

impl Context {
    fn new(depth: usize) -> io::Result<Self> {
        let mut context = 0;
        // SAFETY: io_setup(2) writes the context's number.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
        Ok(Self(context))
    }

    fn submit(&self, requests: &mut [*mut Request]) -> io::Result<()> {
        // SAFETY: each pointer is to a request that io_submit(2) copies; its buffer lives longer than the context.
        let taken = checked(unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.0,
                requests.len(),
                requests.as_mut_ptr(),
            )
        })?;
        if taken == requests.len() {
            Ok(())
        } else {
            Err(io::Error::other("not all requests were taken"))
        }
    }

    /// Waits for one at least.
    fn wait(&self, done: &mut [Done]) -> io::Result<usize> {
        let (least, most) = (1usize, done.len());
        // SAFETY: io_getevents(2) writes at most so many.
        checked(unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                least,
                most,
                done.as_mut_ptr(),
                0usize,
            )
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: io_destroy(2) takes a number.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn checked(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Prints how many requests of `size` bytes a second the disk does when it has `depth` of them at any time. Those that are done together are
/// followed together.
pub fn bench(
    path: &str,
    pattern: &str,
    size: usize,
    depth: usize,
    time: Duration,
) -> Result<(), Box<dyn Error>> {
    let pattern = Pattern::of(pattern)?;
    let file = OpenOptions::new()
        .read(true)
        .write(pattern == Pattern::Write)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|error| format!("{path}: {error}"))?;
    let places = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?
        .checked_div(size as u64)
        .filter(|places| *places > 0)
        .ok_or("the disk is smaller than a request")?;
    let buffers = Buffers::new(size.saturating_mul(depth))?;
    let context = Context::new(depth)?;
    let mut requests: Vec<Request> = (0..depth)
        .map(|index| Request {
            data: index as u64,
            opcode: if pattern == Pattern::Write {
                WRITE
            } else {
                READ
            },
            fd: file.as_raw_fd().cast_unsigned(),
            buffer: buffers.address(index, size),
            bytes: size as u64,
            ..Request::default()
        })
        .collect();
    let (mut random, mut next, mut count) = (Random::new(), 0u64, 0u64);
    let mut done: Vec<Done> = (0..depth as u64)
        .map(|data| Done {
            data,
            ..Done::default()
        })
        .collect();
    let mut follow: Vec<*mut Request> = Vec::with_capacity(depth);
    let (mut ready, begin) = (depth, Instant::now());
    loop {
        follow.clear();
        for done in done.iter().take(ready) {
            let request = requests
                .get_mut(done.data as usize)
                .ok_or("an answer to no request")?;
            let place = if pattern == Pattern::RandomRead {
                u64::from(random.word())
            } else {
                next = next.wrapping_add(1);
                next
            };
            let place = place.checked_rem(places).unwrap_or(0);
            request.offset = i64::try_from(place.saturating_mul(size as u64))?;
            follow.push(ptr::from_mut(request));
        }
        context.submit(&mut follow)?;
        ready = context.wait(&mut done)?;
        for done in done.iter().take(ready) {
            if usize::try_from(done.result) != Ok(size) {
                return Err(format!("a request came back with {}", done.result).into());
            }
        }
        count = count.saturating_add(ready as u64);
        let elapsed = begin.elapsed();
        if elapsed >= time {
            println!("{:.2}", count as f64 / elapsed.as_secs_f64());
            return Ok(());
        }
    }
}
