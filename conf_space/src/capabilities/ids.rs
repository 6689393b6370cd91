//! Numbers and names of the capabilities (PCI Code and ID Assignment Specification 1.15, sections 2
//! and 3).

use std::fmt;

/// Number of a standard capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CapabilityId(pub u8);

/// Number of an extended capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtendedCapabilityId(pub u16);

/// Declares the known numbers with their names.
macro_rules! ids {
    ($type:ident { $($constant:ident = $value:literal, $name:literal;)* }) => {
        impl $type {
            $(#[doc = $name] pub const $constant: Self = Self($value);)*

            /// Its name; `None` if the number is not assigned, as far as this program knows.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$constant => Some($name),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "capability {:#04x}", self.0),
                }
            }
        }
    };
}

ids! { CapabilityId {
    NULL = 0x00, "Null";
    POWER_MANAGEMENT = 0x01, "Power Management";
    AGP = 0x02, "AGP";
    VPD = 0x03, "Vital Product Data";
    SLOT_ID = 0x04, "Slot Identification";
    MSI = 0x05, "MSI";
    HOT_SWAP = 0x06, "CompactPCI Hot Swap";
    PCI_X = 0x07, "PCI-X";
    HYPER_TRANSPORT = 0x08, "HyperTransport";
    VENDOR_SPECIFIC = 0x09, "Vendor-Specific";
    DEBUG_PORT = 0x0a, "Debug Port";
    RESOURCE_CONTROL = 0x0b, "CompactPCI Resource Control";
    HOT_PLUG = 0x0c, "Hot-Plug";
    BRIDGE_SUBSYSTEM = 0x0d, "Bridge Subsystem Vendor ID";
    AGP_8X = 0x0e, "AGP 8x";
    SECURE_DEVICE = 0x0f, "Secure Device";
    PCI_EXPRESS = 0x10, "PCI Express";
    MSI_X = 0x11, "MSI-X";
    SATA = 0x12, "SATA Configuration";
    ADVANCED_FEATURES = 0x13, "Advanced Features";
    ENHANCED_ALLOCATION = 0x14, "Enhanced Allocation";
    FLATTENING_PORTAL_BRIDGE = 0x15, "Flattening Portal Bridge";
} }

ids! { ExtendedCapabilityId {
    NULL = 0x0000, "Null";
    AER = 0x0001, "Advanced Error Reporting";
    VIRTUAL_CHANNEL = 0x0002, "Virtual Channel";
    SERIAL_NUMBER = 0x0003, "Device Serial Number";
    POWER_BUDGETING = 0x0004, "Power Budgeting";
    ROOT_COMPLEX_LINK = 0x0005, "Root Complex Link Declaration";
    VENDOR_SPECIFIC = 0x000b, "Vendor-Specific Extended";
    ACS = 0x000d, "Access Control Services";
    ARI = 0x000e, "Alternative Routing-ID Interpretation";
    ATS = 0x000f, "Address Translation Services";
    SR_IOV = 0x0010, "SR-IOV";
    MULTICAST = 0x0012, "Multicast";
    PAGE_REQUEST = 0x0013, "Page Request Interface";
    RESIZABLE_BAR = 0x0015, "Resizable BAR";
    DYNAMIC_POWER_ALLOCATION = 0x0016, "Dynamic Power Allocation";
    TPH_REQUESTER = 0x0017, "TPH Requester";
    LATENCY_TOLERANCE = 0x0018, "Latency Tolerance Reporting";
    SECONDARY_PCI_EXPRESS = 0x0019, "Secondary PCI Express";
    PASID = 0x001b, "PASID";
    DOWNSTREAM_PORT_CONTAINMENT = 0x001d, "Downstream Port Containment";
    L1_PM_SUBSTATES = 0x001e, "L1 PM Substates";
    PRECISION_TIME = 0x001f, "Precision Time Measurement";
    READINESS_TIME = 0x0022, "Readiness Time Reporting";
    DESIGNATED_VENDOR_SPECIFIC = 0x0023, "Designated Vendor-Specific";
    VF_RESIZABLE_BAR = 0x0024, "VF Resizable BAR";
    DATA_LINK_FEATURE = 0x0025, "Data Link Feature";
    PHYSICAL_LAYER_16GT = 0x0026, "Physical Layer 16.0 GT/s";
    LANE_MARGINING = 0x0027, "Lane Margining at the Receiver";
    PHYSICAL_LAYER_32GT = 0x002a, "Physical Layer 32.0 GT/s";
    DATA_OBJECT_EXCHANGE = 0x002e, "Data Object Exchange";
} }
