//! The client against a server that each test plays itself.

mod events;
mod requests;
mod server;
mod transactions;
#[cfg(feature = "xenstore-rs")]
mod xs;
