//! The crate as a whole, against a device and a Xen that fail wherever a test wants.

mod machine;
mod rules;
mod sequences;
