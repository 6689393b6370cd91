//! How many virtual functions a physical function is to have: by the rules of Linux's `sriov_numvfs`
//! (`drivers/pci/iov.c`).

use conf_space::Bdf;

use crate::Function;

/// A number of virtual functions that a device cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has no SR-IOV.
    #[error(
        "{device} has no SR-IOV, or it is switched off in the firmware's settings; 'pciback vf list' shows the devices that have it"
    )]
    Plain {
        /// The device.
        device: Bdf,
    },
    /// It is a virtual function.
    #[error("{device} is itself a virtual function; name its physical function, {physical}")]
    Virtual {
        /// The device.
        device: Bdf,
        /// Its physical function.
        physical: Bdf,
    },
    /// It cannot have so many.
    #[error("{device} can have {total} virtual functions, not {wanted}")]
    TooMany {
        /// The device.
        device: Bdf,
        /// How many it can have.
        total: u16,
        /// How many were asked for.
        wanted: u16,
    },
    /// It has another number of them, and the kernel changes that by way of 0 only.
    #[error(
        "{device} has {enabled} virtual functions, and their number changes only by way of none: pciback vf destroy {device}, then create {wanted}"
    )]
    HasOthers {
        /// The device.
        device: Bdf,
        /// How many it has.
        enabled: u16,
        /// How many were asked for.
        wanted: u16,
    },
    /// It is its driver that makes them, and it has none.
    #[error(
        "{device} has no driver in dom0, and it is the driver that makes virtual functions: bind it (a hidden device: pciback unhide {device})"
    )]
    NoDriver {
        /// The device.
        device: Bdf,
    },
}

/// Whether `device` must be told to have `wanted` virtual functions (0: none); `false` when it has
/// just so many. `driver` is dom0's driver for it.
///
/// # Errors
/// [`Refusal`].
pub fn must_change(
    device: Bdf,
    function: &Function,
    driver: Option<&str>,
    wanted: u16,
) -> Result<bool, Refusal> {
    let (enabled, total) = match *function {
        Function::Plain => return Err(Refusal::Plain { device }),
        Function::Virtual { physical, .. } => return Err(Refusal::Virtual { device, physical }),
        Function::Physical { enabled, total, .. } => (enabled, total),
    };
    if wanted > total {
        return Err(Refusal::TooMany {
            device,
            total,
            wanted,
        });
    }
    if wanted == enabled {
        return Ok(false);
    }
    if driver.is_none() {
        return Err(Refusal::NoDriver { device });
    }
    if wanted != 0 && enabled != 0 {
        return Err(Refusal::HasOthers {
            device,
            enabled,
            wanted,
        });
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Bdf = Bdf::from_devfn(0, 1, 0);

    fn change(enabled: u16, wanted: u16) -> Result<bool, Refusal> {
        let function = Function::Physical {
            enabled,
            total: 8,
            virtual_functions: Vec::new(),
        };
        must_change(DEVICE, &function, Some("igb"), wanted)
    }

    #[test]
    fn from_none_to_some_and_back() {
        assert_eq!(change(0, 1), Ok(true));
        assert_eq!(change(0, 8), Ok(true));
        assert_eq!(change(3, 0), Ok(true));
    }

    #[test]
    fn as_many_as_there_are_is_nothing_to_do_even_without_a_driver() {
        assert_eq!(change(0, 0), Ok(false));
        assert_eq!(change(4, 4), Ok(false));
        let function = Function::Physical {
            enabled: 2,
            total: 2,
            virtual_functions: Vec::new(),
        };
        assert_eq!(must_change(DEVICE, &function, None, 2), Ok(false));
    }

    #[test]
    fn another_number_goes_by_way_of_none() {
        let refusal = change(4, 2).unwrap_err();
        assert!(matches!(refusal, Refusal::HasOthers { enabled: 4, .. }));
        assert!(refusal.to_string().contains("vf destroy 0000:01:00.0"));
    }

    #[test]
    fn more_than_there_can_be_are_refused() {
        assert!(matches!(
            change(0, 9),
            Err(Refusal::TooMany { total: 8, .. })
        ));
        assert!(matches!(change(2, 9), Err(Refusal::TooMany { .. })));
    }

    #[test]
    fn without_its_driver_nothing_changes() {
        for (enabled, wanted) in [(0, 1), (2, 0)] {
            let function = Function::Physical {
                enabled,
                total: 8,
                virtual_functions: Vec::new(),
            };
            assert_eq!(
                must_change(DEVICE, &function, None, wanted),
                Err(Refusal::NoDriver { device: DEVICE })
            );
        }
    }

    #[test]
    fn a_device_of_another_kind_has_no_virtual_functions() {
        let plain = must_change(DEVICE, &Function::Plain, Some("e1000e"), 1);
        assert_eq!(plain, Err(Refusal::Plain { device: DEVICE }));
        let physical = Bdf::from_devfn(0, 2, 0);
        let function = Function::Virtual { physical, index: 0 };
        let refusal = must_change(DEVICE, &function, Some("igbvf"), 0).unwrap_err();
        assert!(refusal.to_string().contains("0000:02:00.0"));
    }
}
