//! `machine.sock`: guests in other processes.
//!
//! A sequential-packet socket: each request and each reply is one packet, and descriptors travel with the replies. The protocol is
//! documented in `docs/embedded-platform.md`; what goes over the wire is in [`protocol`].

mod client;
mod connection;
mod protocol;
mod requests;
mod server;
mod toolstack;

#[cfg(test)]
mod tests;

pub use client::SocketGuest;
pub(super) use server::GuestServer;
pub use toolstack::SocketToolstack;
