//! How a device is to be reset: what the operator wants against what the kernel offers.

use crate::config::ResetChoice;

/// A reset of the bus by VFIO, for who has all that is on it. The kernel's own, `bus`, is for a device that is alone there.
pub const VFIO_BUS: &str = "vfio_bus";

/// How to reset a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way<'a> {
    /// As the kernel thinks best.
    Kernels,
    /// By this method of those offered, and no other.
    By(&'a str),
    /// Not at all.
    Not,
}

/// The kernel does not offer what is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no reset by {}: the kernel offers {}", wanted.name(), names(offered))]
pub struct Missing {
    /// What is wanted.
    pub wanted: ResetChoice,
    /// What there is, best first: names as in [`Description`](super::Description).
    pub offered: Vec<String>,
}

/// Chooses a way among the methods that the kernel offers.
///
/// # Errors
/// [`Missing`].
pub fn way(wanted: ResetChoice, offered: &[String]) -> Result<Way<'_>, Missing> {
    // As Linux names them (`pci_reset_fn_methods`). `af_flr` is FLR of conventional PCI, `cxl_bus` a bus reset below a CXL port.
    let names: &[&str] = match wanted {
        ResetChoice::Auto => return Ok(Way::Kernels),
        ResetChoice::None => return Ok(Way::Not),
        ResetChoice::Flr => &["flr", "af_flr"],
        ResetChoice::Pm => &["pm"],
        ResetChoice::Bus => &["bus", "cxl_bus", VFIO_BUS],
    };
    offered
        .iter()
        .find(|method| names.contains(&method.as_str()))
        .map(|method| Way::By(method))
        .ok_or_else(|| Missing {
            wanted,
            offered: offered.to_vec(),
        })
}

/// Methods as a list in words.
pub fn names(methods: &[String]) -> String {
    if methods.is_empty() {
        "none".to_owned()
    } else {
        methods.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_wanted_method_goes_by_the_kernels_name_for_it() {
        let all = offered(&["device_specific", "af_flr", "pm", "cxl_bus", "bus"]);
        for (wanted, way_) in [
            (ResetChoice::Auto, Way::Kernels),
            (ResetChoice::Flr, Way::By("af_flr")),
            (ResetChoice::Pm, Way::By("pm")),
            (ResetChoice::Bus, Way::By("cxl_bus")),
            (ResetChoice::None, Way::Not),
        ] {
            assert_eq!(way(wanted, &all), Ok(way_));
        }
    }

    #[test]
    fn the_bus_is_reset_by_vfio_where_the_kernel_itself_would_not() {
        let all = offered(&["flr", VFIO_BUS]);
        assert_eq!(way(ResetChoice::Bus, &all), Ok(Way::By(VFIO_BUS)));
    }

    #[test]
    fn a_method_that_is_missing_is_told_with_those_that_are_there() {
        let message = |there: &[&str]| {
            way(ResetChoice::Bus, &offered(there))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            message(&["flr", "pm"]),
            "no reset by bus: the kernel offers flr, pm"
        );
        assert_eq!(message(&[]), "no reset by bus: the kernel offers none");
    }
}
