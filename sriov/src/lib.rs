//! Physical and virtual functions of SR-IOV devices.
