//! How much of xenstored a guest may use.

/// xenstored's default quotas (Xen 4.17). They bind guests; dom0 has none.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Nodes that a domain may own.
    pub nodes: usize,
    /// Bytes that the record of a node may take: its value, its children's names, its permissions and 24 bytes of header.
    pub node_size: usize,
    /// Entries in a node's list of permissions.
    pub perms_per_node: usize,
    /// Watches of a connection.
    pub watches: usize,
    /// Transactions open at a time.
    pub transactions: usize,
    /// Nodes that a transaction may touch.
    pub nodes_per_transaction: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            nodes: 1000,
            node_size: 2048,
            perms_per_node: 5,
            watches: 128,
            transactions: 10,
            nodes_per_transaction: 1024,
        }
    }
}
