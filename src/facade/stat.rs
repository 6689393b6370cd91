//! File attributes in FUSE's terms.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::dir::Type;
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};

/// What size a file of sysfs shows, whatever it holds.
const PAGE: u64 = 4096;

/// Kinds of nodes that the facade makes up.
#[derive(Debug, Clone, Copy)]
pub(super) enum Made {
    /// A directory that everybody may read.
    Directory,
    /// A file with these permission bits.
    File(u16),
    /// A symbolic link.
    Link,
}

/// Attributes of a made node, as sysfs would show it.
pub(super) fn made(number: INodeNo, what: Made, time: SystemTime) -> FileAttr {
    let (kind, perm, size, nlink) = match what {
        Made::Directory => (FileType::Directory, 0o755, 0, 2),
        Made::File(mode) => (FileType::RegularFile, mode, PAGE, 1),
        Made::Link => (FileType::Symlink, 0o777, 0, 1),
    };
    FileAttr {
        ino: number,
        size,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The real attributes, but for the node's number.
///
/// # Errors
/// EIO for what no file system has.
pub(super) fn real(number: INodeNo, stat: &FileStat) -> Result<FileAttr, Errno> {
    let bits = SFlag::from_bits_truncate(stat.st_mode);
    let kind = match bits & SFlag::S_IFMT {
        SFlag::S_IFDIR => FileType::Directory,
        SFlag::S_IFREG => FileType::RegularFile,
        SFlag::S_IFLNK => FileType::Symlink,
        SFlag::S_IFCHR => FileType::CharDevice,
        SFlag::S_IFBLK => FileType::BlockDevice,
        SFlag::S_IFIFO => FileType::NamedPipe,
        SFlag::S_IFSOCK => FileType::Socket,
        _ => return Err(Errno::EIO),
    };
    Ok(FileAttr {
        ino: number,
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        blocks: u64::try_from(stat.st_blocks).unwrap_or_default(),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind,
        perm: u16::try_from(stat.st_mode & 0o7777).unwrap_or_default(),
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: u32::try_from(stat.st_rdev).unwrap_or_default(),
        blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
        flags: 0,
    })
}

/// A time after 1970; before that, 1970.
fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let seconds = u64::try_from(seconds).unwrap_or_default();
    let nanoseconds = u64::try_from(nanoseconds).unwrap_or_default();
    let since = Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanoseconds));
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
}

/// What a directory says that a name stands for.
pub(super) fn kind_in_directory(kind: Option<Type>) -> FileType {
    match kind {
        Some(Type::Directory) => FileType::Directory,
        Some(Type::Symlink) => FileType::Symlink,
        Some(Type::CharacterDevice) => FileType::CharDevice,
        Some(Type::BlockDevice) => FileType::BlockDevice,
        Some(Type::Fifo) => FileType::NamedPipe,
        Some(Type::Socket) => FileType::Socket,
        Some(Type::File) | None => FileType::RegularFile,
    }
}
