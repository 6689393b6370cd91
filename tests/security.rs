//! The security advisories that concern PCI backends, each as a test that a naive backend fails. `docs/security.md` has the table.
//!
//! "Fails when" names a change of the code under which the test was seen failing.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

// Shared with tests/embedded, which uses the rest of them.
#[allow(dead_code)]
#[path = "embedded/house.rs"]
mod house;
#[allow(dead_code)]
#[path = "embedded/mortal.rs"]
mod mortal;

#[path = "security/config_space.rs"]
mod config_space;
#[path = "security/dom0.rs"]
mod dom0;
#[path = "security/floods.rs"]
mod floods;
#[path = "security/guest.rs"]
mod guest;
#[path = "security/interrupts.rs"]
mod interrupts;
#[path = "security/ownership.rs"]
mod ownership;
#[path = "security/shared_page.rs"]
mod shared_page;
