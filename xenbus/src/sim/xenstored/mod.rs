//! A xenstored that lives in this process and speaks the real wire protocol: permissions, transactions, watches and quotas included.
//!
//! [`core`] decides, without a file descriptor; [`server`] moves the bytes. Left out is what nobody asks an embedded xenstored for: control
//! commands, live update, RESUME and SET_TARGET (all answered by ENOSYS), and permissions on the special watches.

mod core;
mod limits;
mod path;
mod server;
mod transaction;
mod tree;
mod view;
mod watch;

#[cfg(test)]
mod tests;

pub(super) use server::Xenstored;
