//! Memory that a device can be told the address of: a large page, which lies as one piece in the guest's memory, too.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::memory::Memory;

const PAGE: u64 = 4096;
/// Bytes of the memory.
const SIZE: u64 = 2 << 20;

/// Of an entry of `/proc/self/pagemap` (Linux `Documentation/admin-guide/mm/pagemap.rst`): the page is there, and its number.
const PRESENT: u64 = 1 << 63;
const NUMBER: u64 = (1 << 55) - 1;
/// Of an entry of `/proc/kpageflags`: the page is logically offline, as those are that the balloon has.
const OFFLINE: u64 = 1 << 23;

const PATIENCE: Duration = Duration::from_secs(30);

/// A large page.
pub fn large_page() -> Result<Memory, Box<dyn Error>> {
    fs::write("/proc/sys/vm/nr_hugepages", "2")?;
    // SAFETY: a new mapping at an address of the kernel's choice changes no memory that is in use.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    let base: NonNull<u8> = NonNull::new(base.cast()).ok_or("mapped at 0")?;
    let entry = entry("/proc/self/pagemap", base.addr().get() as u64 / PAGE)?;
    if entry & PRESENT == 0 || entry & NUMBER == 0 {
        return Err("the kernel does not say where the memory is".into());
    }
    let physical = (entry & NUMBER).saturating_mul(PAGE);
    // SAFETY: a mapping of this size, which nobody else knows, and which is never unmapped.
    Ok(unsafe { Memory::new(base, SIZE, physical) })
}

/// The address of a page that the guest has given back to Xen, which it was told to do a moment ago.
pub fn ballooned() -> Result<u64, Box<dyn Error>> {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        let flags = fs::read("/proc/kpageflags")?;
        let mut pages = flags.as_chunks().0.iter();
        let is_offline = |flags: &[u8; 8]| u64::from_ne_bytes(*flags) & OFFLINE != 0;
        if let Some(page) = pages.position(is_offline) {
            return Ok((page as u64).saturating_mul(PAGE));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err("the guest has given no page back: lower its memory".into())
}

fn entry(path: &str, index: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open(path)?.read_exact_at(&mut bytes, index.saturating_mul(8))?;
    Ok(u64::from_ne_bytes(bytes))
}
