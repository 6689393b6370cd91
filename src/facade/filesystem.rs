//! The FUSE file system: answers the kernel's questions about the [`View`], and brings reads and writes where they belong.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen, ReplyPoll,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;

use super::attribute::Attribute;
use super::driver::Driver;
use super::handles::Handles;
use super::pool::Pool;
use super::real::{RealDrivers, errno};
use super::view::{Open, View, lock};

/// Nothing is cached by the kernel: drivers and devices come and go.
const TTL: Duration = Duration::ZERO;
/// Bytes in one read or write. A sysfs file holds no more than a page.
const PAGE: u32 = 4096;
/// How many requests that may take long run side by side, and how long their threads stay when there is nothing to do.
const SLOW_REQUESTS: usize = 16;
const REST: Duration = Duration::from_secs(2);

pub(super) struct Filesystem {
    view: Arc<View>,
    pool: Pool,
    open: Handles,
}

impl Filesystem {
    pub fn new(driver: Arc<dyn Driver>, real: RealDrivers) -> Self {
        Self {
            view: Arc::new(View::new(driver, real)),
            pool: Pool::new(SLOW_REQUESTS, REST),
            open: Handles::default(),
        }
    }

    fn read_attribute(
        &self,
        attribute: Attribute,
        text: &Mutex<Vec<u8>>,
        offset: u64,
        size: u32,
        reply: ReplyData,
    ) {
        let mut text = lock(text);
        if offset == 0 {
            match attribute.read(&*self.view.driver) {
                Ok(now) => *text = now.into_bytes(),
                Err(error) => return reply.error(fuse(error)),
            }
        }
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| text.get(offset..))
            .unwrap_or_default();
        let part = usize::try_from(size)
            .ok()
            .and_then(|size| rest.get(..size))
            .unwrap_or(rest);
        reply.data(part);
    }

    fn write_attribute(&self, attribute: Attribute, data: &[u8], reply: ReplyWrite) {
        let (data, view) = (data.to_vec(), self.view.clone());
        self.pool.run(move || {
            let existing = || view.real.all_devices();
            match attribute.write(&*view.driver, &data, existing) {
                Ok(()) => reply.written(length(&data)),
                Err(error) => reply.error(fuse(error)),
            }
        });
    }
}

fn fuse(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error as i32)
}

fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

impl fuser::Filesystem for Filesystem {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // a request then fits into two pages of the session's buffer, whose 16 MiB are never touched
        let _ = config.set_max_write(PAGE);
        let _ = config.set_max_readahead(PAGE);
        // older kernels do without
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.view.find(parent, name) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn forget(&self, _req: &Request, number: INodeNo, lookups: u64) {
        self.view.forget(number, lookups);
    }

    fn getattr(
        &self,
        _req: &Request,
        number: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.view.attributes(number) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // a shell's `>` truncates, which means nothing in sysfs
        if size.is_none() || mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(fuser::Errno::EPERM);
        }
        match self.view.attributes(number) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn readlink(&self, _req: &Request, number: INodeNo, reply: ReplyData) {
        match self.view.link(number) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn opendir(&self, req: &Request, _number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.open.keep(Open::Directory(Mutex::default()), req.uid()) {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let open = match self.open.get(handle) {
            Ok(open) => open,
            Err(error) => return reply.error(fuse(error)),
        };
        let Open::Directory(names) = &*open else {
            return reply.error(fuser::Errno::ENOTDIR);
        };
        let mut names = lock(names);
        if offset == 0 {
            match self.view.list(number) {
                Ok(now) => *names = now,
                Err(error) => return reply.error(fuse(error)),
            }
        }
        // an entry's offset is that of the next one
        for (next, listed) in (1u64..)
            .zip(names.iter())
            .skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            if reply.add(INodeNo(listed.number), next, listed.kind, &listed.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.open.remove(handle);
        reply.ok();
    }

    fn open(&self, req: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        // every read and write is to arrive here, at once and with its own errno
        let direct = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_NOFLUSH
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let opened = self.view.open(number, flags.acc_mode());
        match opened.and_then(|open| self.open.keep(open, req.uid())) {
            Ok(handle) => reply.opened(handle, direct),
            Err(error) => reply.error(fuse(error)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let open = match self.open.get(handle) {
            Ok(open) => open,
            Err(error) => return reply.error(fuse(error)),
        };
        match &*open {
            Open::Directory(_) => reply.error(fuser::Errno::EISDIR),
            Open::Attribute(attribute, text) => {
                self.read_attribute(*attribute, text, offset, size, reply)
            }
            Open::Real(_) | Open::Unbind(_) => self.pool.run(move || {
                let (Open::Real(file) | Open::Unbind(file)) = &*open else {
                    return;
                };
                let mut buffer = vec![0; usize::try_from(size.min(PAGE)).unwrap_or_default()];
                match file.read_at(&mut buffer, offset) {
                    Ok(count) => reply.data(buffer.get(..count).unwrap_or_default()),
                    Err(error) => reply.error(fuse(errno(&error))),
                }
            }),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let open = match self.open.get(handle) {
            Ok(open) => open,
            Err(error) => return reply.error(fuse(error)),
        };
        match &*open {
            Open::Directory(_) => reply.error(fuser::Errno::EISDIR),
            Open::Attribute(attribute, _) => self.write_attribute(*attribute, data, reply),
            Open::Real(_) | Open::Unbind(_) => {
                let (data, view) = (data.to_vec(), self.view.clone());
                self.pool.run(move || {
                    let file = match &*open {
                        Open::Real(file) => file,
                        Open::Unbind(file) => {
                            // What names no device the kernel refuses.
                            let device = std::str::from_utf8(&data)
                                .ok()
                                .and_then(|text| text.trim_ascii().parse().ok());
                            if let Some(device) = device
                                && let Err(error) = view.driver.may_unbind_other(device)
                            {
                                return reply.error(fuse(error));
                            }
                            file
                        }
                        Open::Directory(_) | Open::Attribute(..) => return,
                    };
                    match file.write_at(&data, offset) {
                        Ok(count) => reply.written(u32::try_from(count).unwrap_or(u32::MAX)),
                        Err(error) => reply.error(fuse(errno(&error))),
                    }
                });
            }
        }
    }

    fn release(
        &self,
        _req: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.open.remove(handle);
        reply.ok();
    }

    // What sysfs refuses, with sysfs's errno. (ENOSYS in some: not asked again, and the kernel does what it does without.)

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(fuser::Errno::EACCES);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn link(
        &self,
        _req: &Request,
        _number: INodeNo,
        _parent: INodeNo,
        _name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EPERM);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EPERM);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn flush(
        &self,
        _req: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn getxattr(
        &self,
        _req: &Request,
        _number: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _number: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _number: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn poll(
        &self,
        _req: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
