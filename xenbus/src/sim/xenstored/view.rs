//! What can be done with the nodes, inside a transaction or outside one.

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::limits::Limits;
use super::path;
use super::transaction::Transaction;
use super::tree::{Change, Need, Node, Tree, allows, owner};
use crate::types::DomId;
use crate::xenstore::Perm;

/// The tree as one domain sees it, through its transaction if it is in one.
pub(super) struct View<'a> {
    pub tree: &'a mut Tree,
    pub transaction: Option<&'a mut Transaction>,
    pub domain: DomId,
    pub limits: &'a Limits,
    /// What was changed, for the watches.
    pub changes: Vec<Change>,
}

impl View<'_> {
    fn privileged(&self) -> bool {
        self.domain == DomId::DOM0
    }

    fn find(&mut self, path: &str) -> Result<Option<&Node>, Errno> {
        let limit = if self.privileged() {
            usize::MAX
        } else {
            self.limits.nodes_per_transaction
        };
        match &mut self.transaction {
            Some(transaction) => transaction.get(self.tree, path, limit),
            None => Ok(self.tree.get(path)),
        }
    }

    fn put(&mut self, path: &str, node: Node) -> Result<(), Errno> {
        self.check_size(&node)?;
        match &mut self.transaction {
            Some(transaction) => transaction.put(self.tree, path, node),
            None => self.tree.put(path, node),
        }
        Ok(())
    }

    fn delete(&mut self, path: &str) {
        match &mut self.transaction {
            Some(transaction) => transaction.remove(self.tree, path),
            None => self.tree.remove(path),
        }
    }

    /// The node, if the domain is allowed what it needs of it. For a missing node the nearest existing one above decides whether the
    /// domain learns that it is missing.
    fn node(&mut self, path: &str, need: Need) -> Result<Node, Errno> {
        let domain = self.domain;
        if let Some(node) = self.find(path)? {
            return if allows(&node.perms, domain, need) {
                Ok(node.clone())
            } else {
                Err(Errno::EACCES)
            };
        }
        let mut above = path;
        while let Some(parent) = path::parent(above) {
            if let Some(node) = self.find(parent)? {
                return Err(if allows(&node.perms, domain, need) {
                    Errno::ENOENT
                } else {
                    Errno::EACCES
                });
            }
            above = parent;
        }
        Err(Errno::ENOENT)
    }

    fn changed(&mut self, path: &str, exact: bool, perms: Vec<Perm>) -> Result<(), Errno> {
        let parent_perms = match path::parent(path) {
            Some(parent) => self
                .find(parent)?
                .map(|node| node.perms.clone())
                .unwrap_or_default(),
            None => Vec::new(),
        };
        self.changes.push(Change {
            path: path.to_owned(),
            exact,
            perms,
            parent_perms,
        });
        Ok(())
    }

    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.node(path, Need::Read).map(|node| node.value)
    }

    /// The node's generation and its children's names.
    pub fn directory(&mut self, path: &str) -> Result<(u64, Vec<String>), Errno> {
        let node = self.node(path, Need::Read)?;
        Ok((node.generation, node.children.into_iter().collect()))
    }

    pub fn perms(&mut self, path: &str) -> Result<Vec<Perm>, Errno> {
        self.node(path, Need::Read).map(|node| node.perms)
    }

    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno> {
        let node = match self.node(path, Need::Write) {
            Ok(mut node) => {
                node.value = value.to_vec();
                self.put(path, node.clone())?;
                node
            }
            Err(Errno::ENOENT) => self.create(path, value)?,
            Err(errno) => return Err(errno),
        };
        self.changed(path, false, node.perms)
    }

    pub fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        match self.node(path, Need::Write) {
            Ok(_) => Ok(()),
            Err(Errno::ENOENT) => {
                let node = self.create(path, &[])?;
                self.changed(path, false, node.perms)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Makes a node and all that are missing above it. They inherit the permissions of the one above, but belong to whoever makes them.
    fn create(&mut self, path: &str, value: &[u8]) -> Result<Node, Errno> {
        let mut missing = vec![path];
        let mut above = path::parent(path).ok_or(Errno::EINVAL)?;
        let mut parent = loop {
            match self.find(above)? {
                Some(node) => break node.clone(),
                None => missing.push(above),
            }
            above = path::parent(above).ok_or(Errno::EINVAL)?;
        };
        if !self.privileged() {
            let counted = self
                .transaction
                .as_ref()
                .map_or(0, |transaction| transaction.created());
            let total = [self.tree.owned_by(self.domain), counted, missing.len()]
                .into_iter()
                .fold(0, usize::saturating_add);
            if total > self.limits.nodes {
                return Err(Errno::ENOSPC);
            }
        }
        let mut perms = parent.perms.clone();
        if let (false, Some(first)) = (self.privileged(), perms.first_mut()) {
            first.domain = self.domain;
        }
        // All are made before any is stored: one that is too big leaves nothing behind.
        let empty = Node {
            value: Vec::new(),
            perms,
            children: BTreeSet::new(),
            generation: 0,
        };
        let mut made = Vec::with_capacity(missing.len().saturating_add(1));
        let mut node = Node {
            value: value.to_vec(),
            ..empty.clone()
        };
        let created = node.clone();
        for new in missing {
            self.check_size(&node)?;
            made.push((new, node));
            node = empty.clone();
            node.children.insert(path::leaf(new).to_owned());
        }
        parent.children.append(&mut node.children);
        self.check_size(&parent)?;
        made.push((above, parent));
        for (path, node) in made {
            self.put(path, node)?;
        }
        Ok(created)
    }

    fn check_size(&self, node: &Node) -> Result<(), Errno> {
        if !self.privileged() && node.record_size() >= self.limits.node_size {
            Err(Errno::ENOSPC)
        } else {
            Ok(())
        }
    }

    pub fn rm(&mut self, path: &str) -> Result<(), Errno> {
        let Some(parent) = path::parent(path) else {
            return Err(Errno::EINVAL);
        };
        let node = match self.node(path, Need::Write) {
            Ok(node) => node,
            // A missing node is as good as a removed one, as long as it could exist.
            Err(Errno::ENOENT) if self.find(parent)?.is_some() => return Ok(()),
            Err(errno) => return Err(errno),
        };
        self.changed(path, false, node.perms.clone())?;
        self.remove_below(path, &node)?;
        self.delete(path);
        if let Some(mut above) = self.find(parent)?.cloned() {
            above.children.remove(path::leaf(path));
            self.put(parent, above)?;
        }
        Ok(())
    }

    fn remove_below(&mut self, path: &str, node: &Node) -> Result<(), Errno> {
        // By hand instead of by recursion: a guest chooses the depth.
        let mut left: Vec<String> = node
            .children
            .iter()
            .map(|name| path::child(path, name))
            .collect();
        while let Some(path) = left.pop() {
            let Some(node) = self.find(&path)?.cloned() else {
                continue;
            };
            left.extend(node.children.iter().map(|name| path::child(&path, name)));
            self.changed(&path, true, node.perms)?;
            self.delete(&path);
        }
        Ok(())
    }

    pub fn set_perms(&mut self, path: &str, perms: Vec<Perm>) -> Result<(), Errno> {
        let mut node = self.node(path, Need::Own)?;
        if !self.privileged() {
            if perms.len() > self.limits.perms_per_node {
                return Err(Errno::ENOSPC);
            }
            if owner(&perms) != node.owner() {
                return Err(Errno::EPERM);
            }
        }
        node.perms.clone_from(&perms);
        self.put(path, node)?;
        self.changed(path, false, perms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xenstore::Access;

    const GUEST: DomId = DomId(5);

    struct Store {
        tree: Tree,
        limits: Limits,
    }

    impl Store {
        /// A tree in which /local/domain/5/device is the guest's.
        fn new() -> Self {
            let mut store = Self {
                tree: Tree::new(),
                limits: Limits::default(),
            };
            store
                .as_domain(DomId::DOM0)
                .mkdir("/local/domain/5/device")
                .unwrap();
            let perms = vec![Perm {
                domain: GUEST,
                access: Access::None,
            }];
            store
                .as_domain(DomId::DOM0)
                .set_perms("/local/domain/5/device", perms)
                .unwrap();
            store
        }

        fn as_domain(&mut self, domain: DomId) -> View<'_> {
            View {
                tree: &mut self.tree,
                transaction: None,
                domain,
                limits: &self.limits,
                changes: Vec::new(),
            }
        }
    }

    #[test]
    fn writing_makes_the_nodes_above_and_they_belong_to_the_writer() {
        let mut store = Store::new();
        store
            .as_domain(GUEST)
            .write("/local/domain/5/device/pci/0/state", b"3")
            .unwrap();
        let mut guest = store.as_domain(GUEST);
        assert_eq!(
            guest.read("/local/domain/5/device/pci/0/state").unwrap(),
            b"3"
        );
        assert_eq!(guest.read("/local/domain/5/device/pci").unwrap(), b"");
        assert_eq!(
            guest.perms("/local/domain/5/device/pci").unwrap(),
            [Perm {
                domain: GUEST,
                access: Access::None
            }]
        );
        assert_eq!(store.tree.owned_by(GUEST), 4);
    }

    #[test]
    fn a_stranger_may_do_what_the_permissions_say_and_no_more() {
        let mut store = Store::new();
        store
            .as_domain(GUEST)
            .write("/local/domain/5/device/x", b"1")
            .unwrap();
        let stranger = DomId(6);
        assert_eq!(
            store.as_domain(stranger).read("/local/domain/5/device/x"),
            Err(Errno::EACCES)
        );
        assert_eq!(
            store
                .as_domain(stranger)
                .read("/local/domain/5/device/missing"),
            Err(Errno::EACCES)
        );
        assert_eq!(
            store
                .as_domain(stranger)
                .write("/local/domain/5/device/y", b""),
            Err(Errno::EACCES)
        );
        let perms = vec![
            Perm {
                domain: GUEST,
                access: Access::None,
            },
            Perm {
                domain: stranger,
                access: Access::Read,
            },
        ];
        store
            .as_domain(GUEST)
            .set_perms("/local/domain/5/device/x", perms.clone())
            .unwrap();
        assert_eq!(
            store
                .as_domain(stranger)
                .read("/local/domain/5/device/x")
                .unwrap(),
            b"1"
        );
        assert_eq!(
            store
                .as_domain(stranger)
                .write("/local/domain/5/device/x", b"2"),
            Err(Errno::EACCES)
        );
        assert_eq!(
            store
                .as_domain(stranger)
                .set_perms("/local/domain/5/device/x", perms),
            Err(Errno::EACCES)
        );
    }

    #[test]
    fn a_guest_cannot_give_a_node_away() {
        let mut store = Store::new();
        let perms = vec![Perm {
            domain: DomId(6),
            access: Access::None,
        }];
        assert_eq!(
            store
                .as_domain(GUEST)
                .set_perms("/local/domain/5/device", perms),
            Err(Errno::EPERM)
        );
    }

    #[test]
    fn removing_takes_all_below_and_tells_of_each_once() {
        let mut store = Store::new();
        let mut dom0 = store.as_domain(DomId::DOM0);
        dom0.write("/a/b/c", b"").unwrap();
        dom0.changes.clear();
        dom0.rm("/a").unwrap();
        let mut told: Vec<_> = dom0
            .changes
            .iter()
            .map(|change| (change.path.as_str(), change.exact))
            .collect();
        told.sort_unstable();
        assert_eq!(told, [("/a", false), ("/a/b", true), ("/a/b/c", true)]);
        assert_eq!(dom0.read("/a/b/c"), Err(Errno::ENOENT));
        assert_eq!(dom0.directory("/").unwrap().1, ["local"]);
        assert_eq!(dom0.rm("/a"), Ok(()));
        assert_eq!(dom0.rm("/a/b"), Err(Errno::ENOENT));
        assert_eq!(dom0.rm("/"), Err(Errno::EINVAL));
    }

    #[test]
    fn quotas_bind_guests_and_not_dom0() {
        let mut store = Store::new();
        store.limits.nodes = 4;
        store
            .as_domain(GUEST)
            .write("/local/domain/5/device/a/b", b"")
            .unwrap();
        store
            .as_domain(GUEST)
            .write("/local/domain/5/device/c", b"")
            .unwrap();
        assert_eq!(
            store
                .as_domain(GUEST)
                .write("/local/domain/5/device/d", b""),
            Err(Errno::ENOSPC)
        );
        store
            .as_domain(GUEST)
            .rm("/local/domain/5/device/a")
            .unwrap();
        store
            .as_domain(GUEST)
            .write("/local/domain/5/device/d", b"")
            .unwrap();
        assert_eq!(
            store
                .as_domain(GUEST)
                .write("/local/domain/5/device/d", &[b'x'; 2048]),
            Err(Errno::ENOSPC)
        );
        assert_eq!(
            store
                .as_domain(GUEST)
                .read("/local/domain/5/device/d")
                .unwrap(),
            b""
        );
        store
            .as_domain(DomId::DOM0)
            .write("/local/domain/5/device/d", &[b'x'; 2048])
            .unwrap();
        let many = vec![
            Perm {
                domain: GUEST,
                access: Access::None
            };
            6
        ];
        assert_eq!(
            store
                .as_domain(GUEST)
                .set_perms("/local/domain/5/device/d", many),
            Err(Errno::ENOSPC)
        );
    }
}
