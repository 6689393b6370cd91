//! What the lab's guests run.
fn main() {}
