//! pcibackd: the daemon as a library.
