//! Memory that a device can be told the address of: a large page, which lies as one piece in the guest's memory, too.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Bytes of the memory.
pub const SIZE: u64 = 2 << 20;

/// Of an entry of `/proc/self/pagemap` (Linux `Documentation/admin-guide/mm/pagemap.rst`): the page is there, and its number.
const PRESENT: u64 = 1 << 63;
const NUMBER: u64 = (1 << 55) - 1;
/// Of an entry of `/proc/kpageflags`: the page is logically offline, as those are that the balloon has.
const OFFLINE: u64 = 1 << 23;

const PATIENCE: Duration = Duration::from_secs(30);

/// See the module. Stays as long as the program runs.
pub struct Memory {
    base: NonNull<u8>,
    physical: u64,
}

impl Memory {
    pub fn new() -> Result<Self, Box<dyn Error>> {
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
        Ok(Self { base, physical })
    }

    /// What a device calls the byte at `offset`.
    pub fn physical(&self, offset: u64) -> u64 {
        self.physical.saturating_add(offset)
    }

    /// Where a value of `T` lies, if there is one there.
    fn place<T>(&self, offset: u64) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>() as u64)?;
        let fits = end <= SIZE && offset.is_multiple_of(align_of::<T>() as u64);
        // SAFETY: it lies in the mapping, which stays, and is aligned. A device changes it at any time, which is why only atomics are asked for, all
        // of whose values are valid.
        fits.then(|| unsafe { self.base.add(offset as usize).cast::<T>().as_ref() })
    }

    pub fn get16(&self, offset: u64) -> u16 {
        let place = self.place::<AtomicU16>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set16(&self, offset: u64, value: u16) {
        if let Some(place) = self.place::<AtomicU16>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn set32(&self, offset: u64, value: u32) {
        if let Some(place) = self.place::<AtomicU32>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn set64(&self, offset: u64, value: u64) {
        if let Some(place) = self.place::<AtomicU64>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    pub fn get8(&self, offset: u64) -> u8 {
        let place = self.place::<AtomicU8>(offset);
        place.map_or(0, |place| place.load(Ordering::SeqCst))
    }

    pub fn set8(&self, offset: u64, value: u8) {
        if let Some(place) = self.place::<AtomicU8>(offset) {
            place.store(value, Ordering::SeqCst);
        }
    }

    /// So many bytes.
    pub fn bytes(&self, offset: u64, count: u64) -> Vec<u8> {
        let places = offset..offset.saturating_add(count);
        places.map(|place| self.get8(place)).collect()
    }
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
