//! Configuration space in a file: sysfs's `config`, or a part of VFIO's descriptor of a device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use conf_space::{AccessError, ConfigSpace, Width};

/// An open file that configuration space is in. One system call per access; it waits while a reset of the device runs.
#[derive(Debug)]
pub(super) struct ConfigFile {
    file: File,
    /// Where in the file it begins.
    start: u64,
}

impl ConfigFile {
    /// It is all of the file.
    pub(super) fn new(file: File) -> Self {
        Self::at(file, 0)
    }

    /// It begins there.
    pub(super) fn at(file: File, start: u64) -> Self {
        Self { file, start }
    }

    fn place(&self, offset: u16) -> u64 {
        self.start.saturating_add(u64::from(offset))
    }
}

fn error(source: &io::Error) -> AccessError {
    match source.raw_os_error() {
        Some(libc::ENODEV | libc::ENXIO | libc::ENOENT) => AccessError::Gone,
        Some(libc::EPERM | libc::EACCES) => AccessError::Denied,
        errno => AccessError::Failed {
            errno: errno.unwrap_or(libc::EIO),
        },
    }
}

/// A short transfer: the register lies beyond what the kernel lets us see.
const SHORT: AccessError = AccessError::Failed {
    errno: libc::EINVAL,
};

impl ConfigSpace for ConfigFile {
    fn read(&self, offset: u16, width: Width) -> Result<u32, AccessError> {
        let mut bytes = [0; 4];
        let part = bytes.get_mut(..usize::from(width.bytes())).ok_or(SHORT)?;
        match self.file.read_at(part, self.place(offset)) {
            Ok(length) if length == usize::from(width.bytes()) => Ok(u32::from_le_bytes(bytes)),
            Ok(_) => Err(SHORT),
            Err(source) => Err(error(&source)),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), AccessError> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..usize::from(width.bytes())).ok_or(SHORT)?;
        match self.file.write_at(part, self.place(offset)) {
            Ok(length) if length == usize::from(width.bytes()) => Ok(()),
            Ok(_) => Err(SHORT),
            Err(source) => Err(error(&source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_moves_just_the_bytes_of_its_width() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0x86, 0x80, 0xd3, 0x10, 0x07, 0x04], 0)
            .unwrap();
        let config = ConfigFile::new(file);
        assert_eq!(config.read(0, Width::Four).unwrap(), 0x10d3_8086);
        assert_eq!(config.read(3, Width::One).unwrap(), 0x10);
        config.write(4, Width::Two, 0xffff_0147).unwrap();
        assert_eq!(config.read(4, Width::Two).unwrap(), 0x0147);
        assert_eq!(config.read(4, Width::Four), Err(SHORT));
    }
}
