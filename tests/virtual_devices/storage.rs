//! Storage of the tests' own, which stops answering when it is told to: a file system with one file.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    IoctlFlags, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyIoctl, ReplyOpen,
    Request, Session, SessionACL,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// The file's number; the directory has the one before.
const DISK: INodeNo = INodeNo(2);
const BYTES: u64 = 1 << 20;
/// Nothing is asked twice.
const TTL: Duration = Duration::from_secs(1000);

/// Calls that nobody answers for now.
#[derive(Default)]
struct State {
    stalls_opens: bool,
    stalls_reads: bool,
    stalls_ioctls: bool,
    ioctls: Vec<ReplyIoctl>,
    opens: Vec<ReplyOpen>,
    reads: Vec<(ReplyData, usize)>,
    /// Reads that have come.
    count: usize,
}

type Shared = Arc<Mutex<State>>;

struct Disk(Shared);

fn attributes(number: INodeNo) -> FileAttr {
    let is_disk = number == DISK;
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: number,
        size: if is_disk { BYTES } else { 0 },
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: if is_disk {
            FileType::RegularFile
        } else {
            FileType::Directory
        },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&TTL, &attributes(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(number));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let mut state = self.0.lock().unwrap();
        if state.stalls_opens {
            state.opens.push(reply);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.0.lock().unwrap();
        state.count += 1;
        let size = size as usize;
        if state.stalls_reads {
            state.reads.push((reply, size));
        } else {
            reply.data(&vec![0x5a; size]);
        }
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let mut state = self.0.lock().unwrap();
        if state.stalls_ioctls {
            state.ioctls.push(reply);
        } else {
            reply.ioctl(0, &[]);
        }
    }
}

/// What this thread, and those that it starts from now on, mount is theirs alone. False where that may not be done.
pub fn has_own_mounts() -> bool {
    let private = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
    });
    private.is_ok()
}

/// The file system, mounted. Dropping it fails what it has not answered.
pub struct Storage {
    directory: TempDir,
    state: Shared,
    server: Option<JoinHandle<()>>,
}

impl Storage {
    /// For this thread and those that it starts from now on, which it is to be called before. `None` where that may not be done.
    pub fn mount() -> Option<Self> {
        let fuse = File::options().read(true).write(true).open("/dev/fuse");
        let (Ok(fuse), true) = (fuse, has_own_mounts()) else {
            eprintln!("SKIPPED: no FUSE, or no mount namespace here; run as root");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            fuse.as_raw_fd()
        );
        mount(
            Some("test"),
            directory.path(),
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        let state = Shared::default();
        let disk = Disk(Arc::clone(&state));
        let server = thread::spawn(move || {
            let mut config = Config::default();
            config.n_threads = Some(1);
            let session = Session::from_fd(disk, fuse.into(), SessionACL::Owner, config);
            let _ = session.unwrap().run();
        });
        Some(Self {
            directory,
            state,
            server: Some(server),
        })
    }

    /// The image.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Nobody who opens the image is answered from now on.
    pub fn stall_opens(&self) {
        self.state.lock().unwrap().stalls_opens = true;
    }

    /// Nobody who reads it is.
    pub fn stall_reads(&self) {
        self.state.lock().unwrap().stalls_reads = true;
    }

    /// Nobody who has something set is.
    pub fn stall_ioctls(&self) {
        self.state.lock().unwrap().stalls_ioctls = true;
    }

    /// How many wait for it.
    pub fn waiting(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.opens.len() + state.reads.len() + state.ioctls.len()
    }

    /// How many reads have come.
    pub fn reads(&self) -> usize {
        self.state.lock().unwrap().count
    }

    /// It answers again.
    pub fn go_on(&self) {
        let mut state = self.state.lock().unwrap();
        (state.stalls_opens, state.stalls_reads, state.stalls_ioctls) = (false, false, false);
        for reply in state.opens.drain(..) {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        }
        for reply in state.ioctls.drain(..) {
            reply.ioctl(0, &[]);
        }
        for (reply, size) in state.reads.drain(..) {
            reply.data(&vec![0x5a; size]);
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.go_on();
        let _ = umount2(
            self.directory.path(),
            MntFlags::MNT_DETACH | MntFlags::MNT_FORCE,
        );
        if let Some(server) = self.server.take()
            && !thread::panicking()
        {
            server.join().unwrap();
        }
    }
}
