//! A PCI function's BARs and configuration space, through sysfs.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr::NonNull;

/// Of a line of sysfs's `resource` (Linux `include/linux/ioport.h`): it is of ports.
const IS_PORTS: u64 = 0x100;

/// A function that no driver of the kernel's has.
pub struct Function {
    directory: PathBuf,
    pub config: File,
}

impl Function {
    pub fn open(bdf: &str) -> Result<Self, Box<dyn Error>> {
        let directory = PathBuf::from(format!("/sys/bus/pci/devices/{bdf}"));
        if directory.join("driver").exists() {
            return Err(format!("a driver of the kernel's has {bdf}").into());
        }
        let enable = directory.join("enable");
        fs::write(&enable, "1").map_err(|error| format!("{}: {error}", enable.display()))?;
        let config = read_write(&directory.join("config"))?;
        Ok(Self { directory, config })
    }

    /// The BAR of that number, and the address at which the guest has it.
    pub fn bar(&self, index: usize) -> Result<(Bar, u64), Box<dyn Error>> {
        let table = fs::read_to_string(self.directory.join("resource"))?;
        let line = table.lines().nth(index).ok_or("no such BAR")?;
        let mut numbers = line
            .split_whitespace()
            .map(|number| u64::from_str_radix(number.trim_start_matches("0x"), 16));
        let mut next = || {
            numbers
                .next()
                .ok_or("a line of three numbers")?
                .map_err(Box::<dyn Error>::from)
        };
        let (first, last, flags) = (next()?, next()?, next()?);
        let file = read_write(&self.directory.join(format!("resource{index}")))?;
        if flags & IS_PORTS != 0 {
            return Ok((Bar::Ports(file), first));
        }
        let length = usize::try_from(last.saturating_sub(first).saturating_add(1))?;
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that is in use.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let base = NonNull::new(base.cast()).ok_or("mapped at 0")?;
        Ok((Bar::Memory { base, length }, first))
    }
}

fn read_write(path: &PathBuf) -> Result<File, Box<dyn Error>> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| format!("{}: {error}", path.display()).into())
}

/// A door to a function's registers. Accesses have 1, 2 or 4 bytes.
pub enum Bar {
    Ports(File),
    /// Mapped as long as the program runs.
    Memory {
        base: NonNull<u8>,
        length: usize,
    },
}

impl Bar {
    pub fn read(&self, offset: usize, width: usize) -> Result<u32, Box<dyn Error>> {
        match self {
            Self::Ports(file) => {
                let mut bytes = [0; 4];
                let part = bytes.get_mut(..width).ok_or("too wide")?;
                file.read_exact_at(part, offset as u64)?;
                Ok(u32::from_le_bytes(bytes))
            }
            Self::Memory { .. } => {
                let place = self.place(offset, width)?;
                // SAFETY: within the mapping, as `place` has looked. Registers may be read at any time and hold any value.
                Ok(unsafe {
                    match width {
                        1 => place.read_volatile().into(),
                        2 => place.cast::<u16>().read_volatile().into(),
                        _ => place.cast::<u32>().read_volatile(),
                    }
                })
            }
        }
    }

    pub fn write(&self, offset: usize, width: usize, value: u32) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Ports(file) => {
                let bytes = value.to_le_bytes();
                let part = bytes.get(..width).ok_or("too wide")?;
                Ok(file.write_all_at(part, offset as u64)?)
            }
            Self::Memory { .. } => {
                let place = self.place(offset, width)?;
                // SAFETY: within the mapping, as `place` has looked, which is no memory of this program's.
                unsafe {
                    match width {
                        1 => place.write_volatile(value as u8),
                        2 => place.cast::<u16>().write_volatile(value as u16),
                        _ => place.cast::<u32>().write_volatile(value),
                    }
                }
                Ok(())
            }
        }
    }

    /// Where a register lies that is aligned to its width.
    fn place(&self, offset: usize, width: usize) -> Result<NonNull<u8>, Box<dyn Error>> {
        let Self::Memory { base, length } = self else {
            return Err("ports are not mapped".into());
        };
        let fits = matches!(width, 1 | 2 | 4)
            && offset.is_multiple_of(width)
            && offset.checked_add(width).is_some_and(|end| end <= *length);
        if !fits {
            return Err(format!("no register of {width} bytes at {offset:#x}").into());
        }
        // SAFETY: the offset lies within the mapping.
        Ok(unsafe { base.add(offset) })
    }
}
