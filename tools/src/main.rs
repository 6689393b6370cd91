//! pciback: the command line.
fn main() {}
