//! What the facade consists of: the made nodes and the real ones, in one tree.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, OpenAccMode};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::attribute::Attribute;
use super::driver::Driver;
use super::real::RealDrivers;
use super::stat::{Made, kind_in_directory, made, real};
use super::tree::{Node, PCIBACK, Tree, in_pciback};

/// The tree as it is at this moment; nothing of it is kept but the numbers of its nodes.
pub(super) struct View {
    pub driver: Arc<dyn Driver>,
    pub real: RealDrivers,
    tree: Mutex<Tree>,
    mounted: SystemTime,
}

/// What an open file or directory refers to.
pub(super) enum Open {
    /// Its names, as they were when reading it began.
    Directory(Mutex<Vec<Listed>>),
    /// Its text, as it was when reading it began.
    Attribute(Attribute, Mutex<Vec<u8>>),
    Real(File),
    /// Another driver's `unbind`.
    Unbind(File),
}

/// A name in a directory.
pub(super) struct Listed {
    pub name: OsString,
    pub kind: FileType,
    pub number: u64,
}

impl View {
    pub fn new(driver: Arc<dyn Driver>, real: RealDrivers) -> Self {
        Self {
            driver,
            real,
            tree: Mutex::new(Tree::new()),
            mounted: SystemTime::now(),
        }
    }

    fn node(&self, number: INodeNo) -> Result<Node, Errno> {
        lock(&self.tree).node(number.0).ok_or(Errno::ESTALE)
    }

    /// The attributes of a node.
    pub fn attributes(&self, number: INodeNo) -> Result<FileAttr, Errno> {
        self.attributes_of(number, &self.node(number)?)
    }

    fn attributes_of(&self, number: INodeNo, node: &Node) -> Result<FileAttr, Errno> {
        match node {
            Node::Root => real(number, &self.real.stat(Path::new(""))?),
            Node::Real(path) => real(number, &self.real.stat(path)?),
            Node::Pciback => Ok(made(number, Made::Directory, self.mounted)),
            Node::Attribute(attribute) => {
                Ok(made(number, Made::File(attribute.mode()), self.mounted))
            }
            Node::Device(device) if self.driver.seized().contains(device) => {
                Ok(made(number, Made::Link, self.mounted))
            }
            Node::Device(_) => Err(Errno::ENOENT),
        }
    }

    /// Looks a name up in a directory. The kernel is to be told the number, and will forget it at some time.
    pub fn find(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let path = match self.node(parent)? {
            Node::Root if name == PCIBACK => return self.made_child(Node::Pciback),
            Node::Root => PathBuf::from(name),
            Node::Pciback => return self.made_child(in_pciback(name).ok_or(Errno::ENOENT)?),
            Node::Real(path) => path.join(name),
            Node::Attribute(_) | Node::Device(_) => return Err(Errno::ENOTDIR),
        };
        let mut attributes = real(INodeNo::ROOT, &self.real.stat(&path)?)?;
        attributes.ino = INodeNo(lock(&self.tree).look_up(&path));
        Ok(attributes)
    }

    fn made_child(&self, node: Node) -> Result<FileAttr, Errno> {
        let number = Tree::number(&node).ok_or(Errno::ENOENT)?;
        self.attributes_of(INodeNo(number), &node)
    }

    /// What a link says.
    pub fn link(&self, number: INodeNo) -> Result<OsString, Errno> {
        match self.node(number)? {
            Node::Real(path) => self.real.read_link(&path),
            // one level deeper than the link under /sys/bus/pci/devices
            Node::Device(device) => Ok(Path::new("..")
                .join(self.real.device_link(device)?)
                .into_os_string()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The names in a directory.
    pub fn list(&self, number: INodeNo) -> Result<Vec<Listed>, Errno> {
        let listed = |name: &str, kind, number| Listed {
            name: name.into(),
            kind,
            number,
        };
        let made = |node: &Node, name: &str, kind| Some(listed(name, kind, Tree::number(node)?));
        let mut list = vec![
            listed(".", FileType::Directory, number.0),
            listed("..", FileType::Directory, INodeNo::ROOT.0),
        ];
        let path = match self.node(number)? {
            Node::Pciback => {
                let files = Attribute::ALL.iter();
                list.extend(files.filter_map(|file| {
                    made(&Node::Attribute(*file), file.name(), FileType::RegularFile)
                }));
                let devices = self.driver.seized().into_iter();
                list.extend(devices.filter_map(|device| {
                    made(
                        &Node::Device(device),
                        &device.to_string(),
                        FileType::Symlink,
                    )
                }));
                return Ok(list);
            }
            Node::Root => {
                list.extend(made(&Node::Pciback, PCIBACK, FileType::Directory));
                Path::new("").into()
            }
            Node::Real(path) => path,
            Node::Attribute(_) | Node::Device(_) => return Err(Errno::ENOTDIR),
        };
        let shadowed = |name: &OsStr| path.as_os_str().is_empty() && name == PCIBACK;
        for entry in self
            .real
            .list(&path)?
            .into_iter()
            .filter(|entry| !shadowed(&entry.name))
        {
            list.push(Listed {
                name: entry.name,
                kind: kind_in_directory(entry.kind),
                number: entry.inode,
            });
        }
        Ok(list)
    }

    /// Opens a file.
    pub fn open(&self, number: INodeNo, mode: OpenAccMode) -> Result<Open, Errno> {
        match self.node(number)? {
            Node::Real(path) => {
                let flags = match mode {
                    OpenAccMode::O_RDONLY => OFlag::O_RDONLY,
                    OpenAccMode::O_WRONLY => OFlag::O_WRONLY,
                    OpenAccMode::O_RDWR => OFlag::O_RDWR,
                };
                let file = self.real.open_file(&path, flags)?;
                let unbinds = path.file_name() == Some(OsStr::new("unbind"));
                Ok(if unbinds {
                    Open::Unbind(file)
                } else {
                    Open::Real(file)
                })
            }
            Node::Attribute(attribute) => {
                // in sysfs not even root opens a file for what it cannot do
                let (reads, writes) =
                    (mode != OpenAccMode::O_WRONLY, mode != OpenAccMode::O_RDONLY);
                if reads && !attribute.is_readable() || writes && !attribute.is_writable() {
                    return Err(Errno::EACCES);
                }
                Ok(Open::Attribute(attribute, Mutex::default()))
            }
            Node::Root | Node::Pciback => Err(Errno::EISDIR),
            Node::Device(_) => Err(Errno::ELOOP),
        }
    }

    /// The kernel forgets a node as often as it has looked it up.
    pub fn forget(&self, number: INodeNo, lookups: u64) {
        lock(&self.tree).forget(number.0, lookups);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
