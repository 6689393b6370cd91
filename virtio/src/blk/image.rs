//! What holds the disk's contents: a file or a block device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use super::{SECTOR, direct};
use crate::memory::{Reader, Ring, Writer};

/// What a disk is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// Of 512 bytes.
    pub sectors: u64,
    /// The unit in which it is best accessed, in bytes.
    pub block_size: u32,
    pub read_only: bool,
}

/// A disk image that is open, and locked against others.
#[derive(Debug)]
pub struct Image {
    file: File,
    /// Also open past the host's cache.
    direct: Option<File>,
    /// The kernel can do requests for the file while we do not wait.
    without_waiting: bool,
    read_only: bool,
    sectors: u64,
    block_size: u32,
}

/// An image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is missing, or access to it is denied.
    #[error("cannot open the disk image {path}: check that it exists and may be accessed")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another program has it open as a disk.
    #[error(
        "the disk image {path} is in use: stop the guest or program that has it, or give it to both read-only"
    )]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// A directory, a pipe or suchlike.
    #[error("{path} is neither a file nor a block device, so it cannot be a disk")]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// Not one sector.
    #[error("the disk image {path} has less than one sector of 512 bytes: make it longer")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// The file system knows no direct access.
    #[error(
        "the disk image {path} cannot be accessed past the cache: leave out the option for direct access"
    )]
    Direct {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Image {
    /// Opens and locks the image. `direct` is to go past the host's cache (O_DIRECT).
    ///
    /// # Errors
    /// It is missing, locked, empty or no disk.
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Open {
            path: path.into(),
            source,
        };
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!read_only)
                // A pipe without another end would keep us waiting.
                .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | flags)
                .open(path)
        };
        let mut file = open(0).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let is_block = metadata.file_type().is_block_device();
        if !is_block && !metadata.is_file() {
            return Err(ImageError::Kind { path: path.into() });
        }
        lock(&file, read_only).map_err(|error| match error {
            nix::Error::EAGAIN | nix::Error::EACCES => ImageError::Locked { path: path.into() },
            error => failed(error.into()),
        })?;
        let sectors = file.seek(SeekFrom::End(0)).map_err(failed)? / SECTOR;
        if sectors == 0 {
            return Err(ImageError::Empty { path: path.into() });
        }
        let direct = direct
            .then(|| open(libc::O_DIRECT))
            .transpose()
            .map_err(|source| ImageError::Direct {
                path: path.into(),
                source,
            })?;
        let block_size = if is_block {
            logical_block_size(metadata.rdev())
        } else {
            None
        };
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|error| failed(error.into()))?;
        Ok(Self {
            without_waiting: direct.is_none() && Ring::suits(&file),
            file,
            direct,
            read_only,
            sectors,
            block_size: block_size.unwrap_or(SECTOR as u32),
        })
    }

    /// One that is nowhere but in memory.
    pub(super) fn in_memory(sectors: u64) -> Option<Self> {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(c"disk", flags).ok()?);
        file.set_len(sectors.checked_mul(SECTOR)?).ok()?;
        Some(Self {
            file,
            direct: None,
            without_waiting: false,
            read_only: false,
            sectors,
            block_size: SECTOR as u32,
        })
    }

    /// The file, if the kernel can do requests for it while we do not wait. Not past the cache: what
    /// has to go through it then nevertheless would hold up the others.
    pub(super) fn file_without_waiting(&self) -> Option<&File> {
        self.without_waiting.then_some(&self.file)
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            block_size: self.block_size,
            read_only: self.read_only,
        }
    }

    /// Nothing may be written to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where `len` bytes from `sector` on begin, if they are all within the disk.
    pub(super) fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        (end <= self.sectors.checked_mul(SECTOR)?).then_some(start)
    }

    /// Fills `data` from `offset` on.
    pub(super) fn read(&self, mut data: Writer<'_>, offset: u64) -> io::Result<()> {
        let len = data.len();
        let read = self.past_cache(|file| direct::read(file, data, offset));
        whole(
            read.unwrap_or_else(|| data.read_from(&self.file, offset))?,
            len,
        )
    }

    /// Writes all of `data` at `offset`.
    pub(super) fn write(&self, mut data: Reader<'_>, offset: u64) -> io::Result<()> {
        let len = data.len();
        let written = self.past_cache(|file| direct::write(file, data, offset));
        whole(
            written.unwrap_or_else(|| data.write_to(&self.file, offset))?,
            len,
        )
    }

    /// `None`: not wished for, or not possible for a part of a block. That goes through the cache, which the kernel keeps coherent.
    fn past_cache(
        &self,
        access: impl FnOnce(&File) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let done = access(self.direct.as_ref()?);
        let unfit = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
        (!done.as_ref().is_err_and(unfit)).then_some(done)
    }

    /// What was written so far is on stable storage when this returns.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The bytes are of no use any more. They read as anything from now on, as zeroes in fact.
    ///
    /// # Errors
    /// Unsupported: the host's storage knows no holes.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    /// Makes zeroes of the bytes, with a hole if that is allowed.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let flag = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        match self.allocate(flag, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            done => return done,
        }
        let zeroes = [0; 4096];
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(zeroes.len() as u64) as usize;
            let part = zeroes.get(..part).unwrap_or_default();
            self.file.write_all_at(part, offset.saturating_add(done))?;
            done = done.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn allocate(&self, flag: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let flags = flag | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(fallocate(&self.file, flags, offset, len)?)
    }
}

fn whole(done: usize, wanted: usize) -> io::Result<()> {
    if done == wanted {
        Ok(())
    } else {
        // Somebody has made the file shorter.
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Locks all of the file, for as long as it is open: exclusively, or together with other readers.
/// Such locks and those of QEMU exclude each other.
fn lock(file: &File, read_only: bool) -> nix::Result<()> {
    let kind = if read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// What the kernel says of a block device, or of the one that a partition is part of.
fn logical_block_size(device: u64) -> Option<u32> {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ["queue", "../queue"].iter().find_map(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/logical_block_size");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    })
}
