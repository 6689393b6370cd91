//! Transactions: a private copy of each node that was looked at, and a check at the end that nobody else has changed any of them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use nix::errno::Errno;

use super::limits::Limits;
use super::tree::{Change, Node, Tree};
use crate::types::DomId;

/// A node that the transaction has looked at or changed.
#[derive(Debug)]
struct Touched {
    /// Its generation in the tree when it was first looked at; `None` when it did not exist.
    seen: Option<u64>,
    /// As the transaction sees it now; `None` when it does not exist.
    now: Option<Node>,
    changed: bool,
}

/// An open transaction.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    touched: BTreeMap<String, Touched>,
    /// What the watches are to be told after the commit.
    pub changes: Vec<Change>,
}

impl Transaction {
    fn touch(&mut self, tree: &Tree, path: &str) -> &mut Touched {
        match self.touched.entry(path.to_owned()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let now = tree.get(path).cloned();
                entry.insert(Touched {
                    seen: now.as_ref().map(|node| node.generation),
                    now,
                    changed: false,
                })
            }
        }
    }

    /// Looks at a node. More than `limit` different ones are refused with ENOSPC.
    pub fn get(&mut self, tree: &Tree, path: &str, limit: usize) -> Result<Option<&Node>, Errno> {
        if self.touched.len() >= limit && !self.touched.contains_key(path) {
            return Err(Errno::ENOSPC);
        }
        Ok(self.touch(tree, path).now.as_ref())
    }

    pub fn put(&mut self, tree: &Tree, path: &str, node: Node) {
        let touched = self.touch(tree, path);
        touched.now = Some(node);
        touched.changed = true;
    }

    pub fn remove(&mut self, tree: &Tree, path: &str) {
        let touched = self.touch(tree, path);
        touched.now = None;
        touched.changed = true;
    }

    /// How many nodes it will add.
    pub fn created(&self) -> usize {
        self.touched
            .values()
            .filter(|touched| touched.seen.is_none() && touched.now.is_some())
            .count()
    }

    /// Makes its changes in the tree, all or none.
    ///
    /// # Errors
    /// EAGAIN: somebody changed a node that it has looked at. ENOSPC: `domain` would own more nodes than it may.
    pub fn commit(
        self,
        tree: &mut Tree,
        domain: DomId,
        limits: &Limits,
    ) -> Result<Vec<Change>, Errno> {
        for (path, touched) in &self.touched {
            if tree.get(path).map(|node| node.generation) != touched.seen {
                return Err(Errno::EAGAIN);
            }
        }
        let own = |node: Option<&Node>| node.is_some_and(|node| node.owner() == domain);
        let gained = self
            .touched
            .values()
            .filter(|touched| own(touched.now.as_ref()))
            .count();
        let lost = self
            .touched
            .keys()
            .filter(|path| own(tree.get(path)))
            .count();
        let total = tree
            .owned_by(domain)
            .saturating_add(gained)
            .saturating_sub(lost);
        if domain != DomId::DOM0 && gained > lost && total > limits.nodes {
            return Err(Errno::ENOSPC);
        }
        for (path, touched) in self.touched {
            match touched.now {
                Some(node) if touched.changed => tree.put(&path, node),
                None if touched.changed => tree.remove(&path),
                _ => {}
            }
        }
        Ok(self.changes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::View;
    use super::*;

    struct Store {
        tree: Tree,
        limits: Limits,
    }

    impl Store {
        fn new() -> Self {
            Self {
                tree: Tree::new(),
                limits: Limits::default(),
            }
        }

        fn outside(&mut self) -> View<'_> {
            View {
                tree: &mut self.tree,
                transaction: None,
                domain: DomId::DOM0,
                limits: &self.limits,
                changes: Vec::new(),
            }
        }

        fn inside<'a>(&'a mut self, transaction: &'a mut Transaction) -> View<'a> {
            let transaction = Some(transaction);
            View {
                tree: &mut self.tree,
                transaction,
                domain: DomId::DOM0,
                limits: &self.limits,
                changes: Vec::new(),
            }
        }

        fn commit(&mut self, transaction: Transaction) -> Result<(), Errno> {
            transaction
                .commit(&mut self.tree, DomId::DOM0, &self.limits)
                .map(drop)
        }
    }

    #[test]
    fn changes_are_seen_inside_at_once_and_outside_after_the_commit() {
        let mut store = Store::new();
        let mut transaction = Transaction::default();
        store.inside(&mut transaction).write("/a/b", b"1").unwrap();
        assert_eq!(store.inside(&mut transaction).read("/a/b").unwrap(), b"1");
        assert_eq!(store.outside().read("/a/b"), Err(Errno::ENOENT));
        store.commit(transaction).unwrap();
        assert_eq!(store.outside().read("/a/b").unwrap(), b"1");
        assert_eq!(store.outside().directory("/a").unwrap().1, ["b"]);
    }

    #[test]
    fn a_node_that_another_changed_meanwhile_makes_it_fail_with_nothing_done() {
        let mut store = Store::new();
        store.outside().write("/count", b"1").unwrap();
        let mut transaction = Transaction::default();
        store.inside(&mut transaction).read("/count").unwrap();
        store
            .inside(&mut transaction)
            .write("/other", b"x")
            .unwrap();
        store.outside().write("/count", b"2").unwrap();
        assert_eq!(store.commit(transaction), Err(Errno::EAGAIN));
        assert_eq!(store.outside().read("/other"), Err(Errno::ENOENT));
    }

    #[test]
    fn a_node_that_was_removed_and_made_again_is_another_node() {
        let mut store = Store::new();
        store.outside().write("/a", b"1").unwrap();
        let mut transaction = Transaction::default();
        store.inside(&mut transaction).read("/a").unwrap();
        store.outside().rm("/a").unwrap();
        store.outside().write("/a", b"1").unwrap();
        assert_eq!(store.commit(transaction), Err(Errno::EAGAIN));
    }

    #[test]
    fn that_a_node_was_missing_counts_as_looking_at_it() {
        let mut store = Store::new();
        let mut transaction = Transaction::default();
        assert_eq!(
            store.inside(&mut transaction).read("/a"),
            Err(Errno::ENOENT)
        );
        store.outside().write("/a", b"1").unwrap();
        assert_eq!(store.commit(transaction), Err(Errno::EAGAIN));
    }

    #[test]
    fn changes_elsewhere_do_not_disturb() {
        let mut store = Store::new();
        store.outside().write("/a", b"1").unwrap();
        store.outside().write("/b/c", b"1").unwrap();
        let mut transaction = Transaction::default();
        store.inside(&mut transaction).write("/a", b"2").unwrap();
        store.outside().write("/b/c", b"2").unwrap();
        store.commit(transaction).unwrap();
        assert_eq!(store.outside().read("/a").unwrap(), b"2");
    }

    #[test]
    fn several_transactions_together_cannot_pass_the_quota() {
        let mut store = Store::new();
        let guest = DomId(5);
        store.outside().mkdir("/g").unwrap();
        let perms = vec![crate::xenstore::Perm {
            domain: guest,
            access: crate::xenstore::Access::None,
        }];
        store.outside().set_perms("/g", perms).unwrap();
        store.outside().mkdir("/g/1").unwrap();
        store.outside().mkdir("/g/2").unwrap();
        store.limits.nodes = 4;
        let mut first = Transaction::default();
        let mut second = Transaction::default();
        for (transaction, path) in [(&mut first, "/g/1/x"), (&mut second, "/g/2/x")] {
            let limits = store.limits.clone();
            let mut view = View {
                tree: &mut store.tree,
                transaction: Some(transaction),
                domain: guest,
                limits: &limits,
                changes: Vec::new(),
            };
            view.write(path, b"").unwrap();
        }
        let limits = store.limits.clone();
        first.commit(&mut store.tree, guest, &limits).unwrap();
        assert_eq!(
            second.commit(&mut store.tree, guest, &limits).map(drop),
            Err(Errno::ENOSPC)
        );
    }
}
