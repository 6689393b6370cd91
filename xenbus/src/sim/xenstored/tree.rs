//! The nodes, and who may touch them.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::DomId;
use crate::xenstore::{Access, Perm};

/// One node.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Vec<u8>,
    /// The owner's entry first; never empty.
    pub perms: Vec<Perm>,
    pub children: BTreeSet<String>,
    /// Grows with every change of this node, and differs when it was removed and made again.
    pub generation: u64,
}

impl Node {
    pub fn owner(&self) -> DomId {
        owner(&self.perms)
    }

    /// Bytes that xenstored's record of the node takes: it is what the quota on a node's size counts.
    pub fn record_size(&self) -> usize {
        let children = self.children.iter().fold(0usize, |sum, name| {
            sum.saturating_add(name.len()).saturating_add(1)
        });
        let perms = self.perms.len().saturating_mul(8);
        [24, perms, self.value.len(), children]
            .into_iter()
            .fold(0, usize::saturating_add)
    }
}

pub(super) fn owner(perms: &[Perm]) -> DomId {
    perms.first().map_or(DomId::DOM0, |perm| perm.domain)
}

/// What a domain needs to be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Read,
    Write,
    Own,
}

/// Whether `domain` is allowed what it needs of a node with these permissions.
pub(super) fn allows(perms: &[Perm], domain: DomId, need: Need) -> bool {
    if domain == DomId::DOM0 || domain == owner(perms) {
        return true;
    }
    let own_entry = perms.iter().skip(1).find(|perm| perm.domain == domain);
    let access = own_entry
        .or(perms.first())
        .map_or(Access::None, |perm| perm.access);
    match need {
        Need::Read => matches!(access, Access::Read | Access::Both),
        Need::Write => matches!(access, Access::Write | Access::Both),
        Need::Own => false,
    }
}

/// A node that changed, for those who watch it.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub path: String,
    /// Only watches on this very node are told: it went away together with an ancestor, whose own change tells the others.
    pub exact: bool,
    /// Who may know: those who may read the node, or the one above it.
    pub perms: Vec<Perm>,
    pub parent_perms: Vec<Perm>,
}

/// All nodes.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    generation: u64,
    owned: BTreeMap<DomId, usize>,
}

impl Tree {
    /// A tree with nothing but its root, which is dom0's.
    pub fn new() -> Self {
        let mut tree = Self {
            nodes: BTreeMap::new(),
            generation: 0,
            owned: BTreeMap::new(),
        };
        let perms = vec![Perm {
            domain: DomId::DOM0,
            access: Access::None,
        }];
        tree.put(
            "/",
            Node {
                value: Vec::new(),
                perms,
                children: BTreeSet::new(),
                generation: 0,
            },
        );
        tree
    }

    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    pub fn put(&mut self, path: &str, mut node: Node) {
        self.generation = self.generation.saturating_add(1);
        node.generation = self.generation;
        let count = self.owned.entry(node.owner()).or_default();
        *count = count.saturating_add(1);
        let replaced = self.nodes.insert(path.to_owned(), node);
        self.disown(replaced);
    }

    pub fn remove(&mut self, path: &str) {
        let removed = self.nodes.remove(path);
        self.disown(removed);
    }

    fn disown(&mut self, node: Option<Node>) {
        if let Some(count) = node.and_then(|node| self.owned.get_mut(&node.owner())) {
            *count = count.saturating_sub(1);
        }
    }

    /// How many nodes a domain owns.
    pub fn owned_by(&self, domain: DomId) -> usize {
        self.owned.get(&domain).copied().unwrap_or_default()
    }

    /// Every path with its value.
    pub fn values(&self) -> BTreeMap<String, Vec<u8>> {
        self.nodes
            .iter()
            .map(|(path, node)| (path.clone(), node.value.clone()))
            .collect()
    }
}
