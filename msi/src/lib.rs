//! MSI and MSI-X: what a device has, when it may be enabled, and the PIRQs it holds.
