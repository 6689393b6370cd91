//! The facade's nodes and their numbers.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use conf_space::address::Bdf;

use super::attribute::Attribute;

/// The directory that stands for us among the drivers.
pub(super) const PCIBACK: &str = "pciback";

/// Something in the facade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// The directory of the drivers.
    Root,
    /// `pciback`.
    Pciback,
    /// A file in `pciback`.
    Attribute(Attribute),
    /// The link of a seized device in `pciback`.
    Device(Bdf),
    /// Whatever the kernel has under this path, relative to the directory of the drivers.
    Real(Arc<Path>),
}

const ROOT: u64 = 1;
const PCIBACK_NUMBER: u64 = 2;
const FIRST_ATTRIBUTE: u64 = 16;
/// Plus segment in bits 31:16, bus in 15:8, device and function in 7:0.
const FIRST_DEVICE: u64 = 1 << 32;
const FIRST_REAL: u64 = 1 << 33;

/// The numbers of nodes. The made ones have fixed numbers; a real path gets one when the kernel looks it up, and keeps it until the kernel forgets it.
/// Numbers are never given twice.
#[derive(Debug)]
pub(super) struct Tree {
    paths: HashMap<u64, Known>,
    numbers: HashMap<Arc<Path>, u64>,
    next: u64,
}

#[derive(Debug)]
struct Known {
    path: Arc<Path>,
    /// How often the kernel was told this number.
    lookups: u64,
}

impl Tree {
    pub fn new() -> Self {
        Self {
            paths: HashMap::new(),
            numbers: HashMap::new(),
            next: FIRST_REAL,
        }
    }

    /// The node that the kernel means by a number.
    pub fn node(&self, number: u64) -> Option<Node> {
        match number {
            ROOT => Some(Node::Root),
            PCIBACK_NUMBER => Some(Node::Pciback),
            _ if number >= FIRST_REAL => self
                .paths
                .get(&number)
                .map(|known| Node::Real(known.path.clone())),
            _ if number >= FIRST_DEVICE => {
                let [.., segment_high, segment_low, bus, devfn] = number.to_be_bytes();
                Some(Node::Device(Bdf::from_devfn(
                    u16::from_be_bytes([segment_high, segment_low]),
                    bus,
                    devfn,
                )))
            }
            _ => {
                let index = usize::try_from(number.checked_sub(FIRST_ATTRIBUTE)?).ok()?;
                Attribute::ALL.get(index).copied().map(Node::Attribute)
            }
        }
    }

    /// The number of a node that is not real.
    pub fn number(node: &Node) -> Option<u64> {
        match node {
            Node::Root => Some(ROOT),
            Node::Pciback => Some(PCIBACK_NUMBER),
            Node::Attribute(attribute) => {
                let index = Attribute::ALL.iter().position(|other| other == attribute)?;
                FIRST_ATTRIBUTE.checked_add(u64::try_from(index).ok()?)
            }
            Node::Device(device) => {
                let [high, low] = device.segment().to_be_bytes();
                Some(
                    FIRST_DEVICE
                        | u64::from(u32::from_be_bytes([
                            high,
                            low,
                            device.bus(),
                            device.devfn(),
                        ])),
                )
            }
            Node::Real(_) => None,
        }
    }

    /// The number of a real path, which the kernel is about to be told once more.
    pub fn look_up(&mut self, path: &Path) -> u64 {
        if let Some(number) = self.numbers.get(path)
            && let Some(known) = self.paths.get_mut(number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return *number;
        }
        let (number, path) = (self.next, Arc::<Path>::from(path));
        self.next = self.next.saturating_add(1);
        self.numbers.insert(path.clone(), number);
        self.paths.insert(number, Known { path, lookups: 1 });
        number
    }

    /// The kernel forgets a number as often as it was told.
    pub fn forget(&mut self, number: u64, lookups: u64) {
        let Some(known) = self.paths.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = self.paths.remove(&number)
        {
            self.numbers.remove(&known.path);
        }
    }
}

/// What a name in `pciback` can stand for, whether or not it is there.
pub(super) fn in_pciback(name: &OsStr) -> Option<Node> {
    let name = name.to_str()?;
    if let Some(attribute) = Attribute::ALL
        .into_iter()
        .find(|attribute| attribute.name() == name)
    {
        return Some(Node::Attribute(attribute));
    }
    // a directory has one name for each device: the form that `ls` shows
    let device: Bdf = name.parse().ok()?;
    (device.to_string() == name).then_some(Node::Device(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_nodes_keep_their_numbers() {
        let tree = Tree::new();
        let device = Node::Device("ffff:ff:1f.7".parse().unwrap());
        let mut nodes = vec![
            Node::Root,
            Node::Pciback,
            device,
            Node::Device("0000:00:00.0".parse().unwrap()),
        ];
        nodes.extend(Attribute::ALL.map(Node::Attribute));
        let mut numbers = Vec::new();
        for node in nodes {
            let number = Tree::number(&node).unwrap();
            assert_eq!(tree.node(number), Some(node));
            numbers.push(number);
        }
        numbers.sort();
        numbers.dedup();
        assert_eq!(numbers.len(), Attribute::ALL.len() + 4);
    }

    #[test]
    fn numbers_that_nobody_was_told_are_no_nodes() {
        let tree = Tree::new();
        for number in [
            0,
            3,
            15,
            FIRST_ATTRIBUTE + Attribute::ALL.len() as u64,
            FIRST_DEVICE - 1,
            FIRST_REAL,
            u64::MAX,
        ] {
            assert_eq!(tree.node(number), None, "{number}");
        }
    }

    #[test]
    fn a_real_path_keeps_its_number_until_the_kernel_forgets_it() {
        let mut tree = Tree::new();
        let number = tree.look_up(Path::new("e1000e"));
        assert_eq!(tree.look_up(Path::new("e1000e")), number);
        assert_ne!(tree.look_up(Path::new("e1000e/bind")), number);
        tree.forget(number, 1);
        assert_eq!(
            tree.node(number),
            Some(Node::Real(Path::new("e1000e").into()))
        );
        tree.forget(number, 1);
        assert_eq!(tree.node(number), None);
        assert_ne!(
            tree.look_up(Path::new("e1000e")),
            number,
            "a number is given once"
        );
        tree.forget(number, 5);
        assert_eq!(tree.paths.len(), 2);
        assert_eq!(tree.numbers.len(), 2);
    }

    #[test]
    fn only_the_canonical_name_of_a_device_is_a_name() {
        let device: Bdf = "0000:00:05.0".parse().unwrap();
        assert_eq!(
            in_pciback(OsStr::new("0000:00:05.0")),
            Some(Node::Device(device))
        );
        for name in ["00:05.0", "0:0:5.0", "0000:00:05.00", "new_id", "", "Slots"] {
            assert_eq!(in_pciback(OsStr::new(name)), None, "{name:?}");
        }
        assert_eq!(
            in_pciback(OsStr::new("slots")),
            Some(Node::Attribute(Attribute::Slots))
        );
    }
}
