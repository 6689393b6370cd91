//! The machine's own PCI bus, through Linux's sysfs.
//!
//! A hidden device has no driver: `driver_override` reserves it for a driver that does not exist, so that no other takes it, and the
//! kernel lets user space switch it on (`enable` refuses while a driver is bound).

mod dom0_needs;
mod kept;
mod resource;
mod uevents;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use conf_space::ConfigSize;
use conf_space::address::Bdf;
use conf_space::overlay::Identity;
use conf_space::selector::SlotPath;

use super::config_file::ConfigFile;
use super::errors::ErrorReports;
use super::errors::counters::{self, Counters};
use super::errors::tracepoint::Tracepoint;
use super::group::{self, Group, Member};
use super::sharing::Occupancy;
use super::{Backend, Bus, Config, Description, Function, HostError, is_bridge};
use crate::facade::RealDrivers;
use crate::text::chain;

/// sysfs under a root of one's choice: `/sys`, or a tree that a test made.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
    /// None for those who only look.
    drivers: Option<RealDrivers>,
}

impl Sysfs {
    /// The bus below `root`. Drivers are reached through `drivers` only: a path through `bus/pci/drivers` would lead into our own facade.
    pub fn new(root: impl Into<PathBuf>, drivers: RealDrivers) -> Self {
        Self {
            root: root.into(),
            drivers: Some(drivers),
        }
    }

    /// The bus below `root` for those who only look, and leave drivers alone: a daemon may be serving them.
    pub fn to_look_at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            drivers: None,
        }
    }

    fn write_driver(&self, driver: &str, attribute: &str, bdf: Bdf) -> io::Result<()> {
        self.tell_driver(driver, attribute, &bdf.to_string())
    }

    /// Writes a driver's attribute.
    pub(super) fn tell_driver(&self, driver: &str, attribute: &str, text: &str) -> io::Result<()> {
        let drivers = self.drivers.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        drivers
            .write_attribute(driver, attribute, text.as_bytes())
            .map_err(io::Error::from)
    }

    /// Whether the kernel has a driver of this name.
    pub(super) fn has_driver(&self, driver: &str) -> bool {
        self.drivers
            .as_ref()
            .is_some_and(|drivers| drivers.exists(driver))
    }

    /// A device's directory.
    pub(super) fn device(&self, bdf: Bdf) -> PathBuf {
        self.root.join("bus/pci/devices").join(bdf.to_string())
    }

    fn attribute(&self, bdf: Bdf, name: &str) -> Result<String, HostError> {
        let path = self.device(bdf).join(name);
        fs::read_to_string(&path)
            .map(|text| text.trim_end().to_owned())
            .map_err(|source| {
                if source.kind() == io::ErrorKind::NotFound && !self.device(bdf).exists() {
                    return HostError::NoDevice { bdf };
                }
                HostError::Refused {
                    bdf,
                    action: format!("read {}", path.display()),
                    remedy: "see the kernel's log (dmesg)",
                    source,
                }
            })
    }

    fn number<T: TryFrom<u64>>(&self, bdf: Bdf, name: &str) -> Result<T, HostError> {
        let text = self.attribute(bdf, name)?;
        let parsed = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => u64::from_str(&text),
        };
        parsed
            .ok()
            .and_then(|value| T::try_from(value).ok())
            .ok_or_else(|| HostError::Malformed {
                bdf,
                what: format!("the kernel's {name} is '{text}', which is no number that fits"),
            })
    }

    fn set(
        &self,
        bdf: Bdf,
        name: &str,
        value: &str,
        action: &str,
        remedy: &'static str,
    ) -> Result<(), HostError> {
        write_attribute(&self.device(bdf).join(name), value.as_bytes()).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound && !self.device(bdf).exists() {
                return HostError::NoDevice { bdf };
            }
            HostError::Refused {
                bdf,
                action: action.to_owned(),
                remedy,
                source,
            }
        })
    }

    /// The directory of a device is in that of its bridge, and so on up to the root bus.
    fn path(&self, bdf: Bdf, function: &Function) -> Option<SlotPath> {
        if let Function::Virtual { physical, index } = *function {
            return Some(
                self.path(physical, &Function::Plain)?
                    .virtual_function(index),
            );
        }
        let real = fs::canonicalize(self.device(bdf)).ok()?;
        let steps = real
            .components()
            .filter_map(|step| step.as_os_str().to_str()?.parse().ok());
        // A device behind a controller that has a segment of its own is named within that segment.
        SlotPath::of(steps.filter(|step: &Bdf| step.segment() == bdf.segment()))
    }

    fn function(&self, bdf: Bdf) -> Result<Function, HostError> {
        let directory = self.device(bdf);
        Function::read(&directory).map_err(|error| {
            if directory.exists() {
                HostError::Malformed {
                    bdf,
                    what: chain(&error),
                }
            } else {
                HostError::NoDevice { bdf }
            }
        })
    }
}

/// One `write` of the whole value, as sysfs wants it.
fn write_attribute(path: &Path, value: &[u8]) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value)
}

/// Whether a directory below `/sys/devices` is a PCI function's, and not a host bridge's (`pci0000:00`).
fn is_function(directory: &Path) -> bool {
    directory
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.parse::<Bdf>().is_ok())
}

fn link_name(path: &Path) -> Option<String> {
    fs::read_link(path)
        .ok()?
        .file_name()?
        .to_str()
        .map(str::to_owned)
}

const AUTOPROBE: &str = "sriov_drivers_autoprobe";
/// Cleared, it keeps the bridges above from being suspended (Linux `pci_bridge_d3_update`).
const D3COLD: &str = "d3cold_allowed";
const NO_OTHER: &str = "see the kernel's log (dmesg)";

impl Bus for Sysfs {
    fn backend(&self) -> Backend {
        Backend::Sysfs
    }

    fn list(&self) -> Result<Vec<Bdf>, HostError> {
        let path = self.root.join("bus/pci/devices");
        let entries = fs::read_dir(&path).map_err(|source| HostError::NoBus { path, source })?;
        let mut found: Vec<Bdf> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        found.sort();
        Ok(found)
    }

    fn changes(&self) -> io::Result<OwnedFd> {
        uevents::listen()
    }

    fn describe(&self, bdf: Bdf) -> Result<Description, HostError> {
        let function = self.function(bdf)?;
        let irq: u32 = self.number(bdf, "irq")?;
        let config_size = fs::metadata(self.device(bdf).join("config"))
            .map_err(|source| HostError::Refused {
                bdf,
                action: "look at its configuration space".into(),
                remedy: NO_OTHER,
                source,
            })?
            .len();
        let identity = Identity {
            bdf,
            vendor: self.number(bdf, "vendor")?,
            device: self.number(bdf, "device")?,
            is_virtual_function: matches!(function, Function::Virtual { .. }),
            // The register is one byte, and so is what every frontend reads.
            interrupt_line: irq.to_le_bytes()[0],
            resources: resource::parse(&self.attribute(bdf, "resource")?)
                .map_err(|what| HostError::Malformed { bdf, what })?,
            config_size: if config_size >= 4096 {
                ConfigSize::Extended
            } else {
                ConfigSize::Conventional
            },
        };
        let reset_methods = match self.attribute(bdf, "reset_method") {
            Ok(text) => text.split_whitespace().map(str::to_owned).collect(),
            Err(_) => Vec::new(),
        };
        Ok(Description {
            identity,
            subsystem: (
                self.number(bdf, "subsystem_vendor")?,
                self.number(bdf, "subsystem_device")?,
            ),
            path: self.path(bdf, &function),
            class: self.number(bdf, "class")?,
            function,
            irq,
            driver: link_name(&self.device(bdf).join("driver")),
            reset_methods,
        })
    }

    fn survey(&self) -> Result<Vec<Occupancy>, HostError> {
        let look = |bdf| {
            let driver = link_name(&self.device(bdf).join("driver"));
            let resources = resource::parse(&self.attribute(bdf, "resource").ok()?).ok()?;
            // With MSI on, `irq` may be the first message's number.
            let messages = fs::read_dir(self.device(bdf).join("msi_irqs"))
                .is_ok_and(|mut entries| entries.next().is_some());
            Some(Occupancy {
                bdf,
                irq: self.number(bdf, "irq").unwrap_or(0),
                uses_line: driver.is_some() && !messages,
                driver,
                resources,
            })
        };
        Ok(self.list()?.into_iter().filter_map(look).collect())
    }

    fn open(&self, bdf: Bdf) -> Result<Config, HostError> {
        let path = self.device(bdf).join("config");
        let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(|source| HostError::Refused {
            bdf,
            action: "open its configuration space".into(),
            remedy: "this must run as root in dom0, and the kernel must not be locked down (Secure Boot: /sys/kernel/security/lockdown)",
            source,
        })?;
        Ok(Arc::new(ConfigFile::new(file)))
    }

    fn unbind(&self, bdf: Bdf) -> Result<(), HostError> {
        let Some(driver) = link_name(&self.device(bdf).join("driver")) else {
            return Ok(());
        };
        self.write_driver(&driver, "unbind", bdf)
            .map_err(|source| HostError::Refused {
                bdf,
                action: format!("unbind its driver {driver}"),
                remedy: NO_OTHER,
                source,
            })
    }

    fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        // A line feed alone clears it; an empty write never reaches the kernel.
        self.set(
            bdf,
            "driver_override",
            driver.unwrap_or("\n"),
            "reserve it for pciback",
            NO_OTHER,
        )
    }

    fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        Ok(Some(self.attribute(bdf, "driver_override")?)
            .filter(|name| !name.is_empty() && name != "(null)"))
    }

    fn bind(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), HostError> {
        let refused = |action: String| {
            move |source| HostError::Refused {
                bdf,
                action,
                remedy: "the device is dom0's again, without a driver; bind one by hand",
                source,
            }
        };
        match driver {
            Some(driver) => self
                .write_driver(driver, "bind", bdf)
                .map_err(refused(format!("bind its former driver {driver}"))),
            None => write_attribute(
                &self.root.join("bus/pci/drivers_probe"),
                bdf.to_string().as_bytes(),
            )
            .map_err(refused("look for a driver for it".into())),
        }
    }

    fn enable(&self, bdf: Bdf, on: bool) -> Result<(), HostError> {
        let action = if on { "switch it on" } else { "switch it off" };
        self.set(
            bdf,
            "enable",
            if on { "1" } else { "0" },
            action,
            "a driver may still be bound to it; see the kernel's log (dmesg)",
        )
    }

    fn may_lose_power(&self, bdf: Bdf) -> Result<bool, HostError> {
        // A kernel without ACPI or power management has no such file.
        let there = self.device(bdf).join(D3COLD).exists();
        Ok(there && self.attribute(bdf, D3COLD)? != "0")
    }

    fn set_may_lose_power(&self, bdf: Bdf, may: bool) -> Result<(), HostError> {
        self.set(
            bdf,
            D3COLD,
            if may { "1" } else { "0" },
            "say whether it may lose its power (d3cold_allowed)",
            NO_OTHER,
        )
    }

    fn reset(&self, bdf: Bdf) -> Result<(), HostError> {
        self.set(bdf, "reset", "1", "reset it", "the kernel offers no working way to reset this device: see its 'reset_method' in sysfs")
    }

    fn set_virtual_functions(&self, physical: Bdf, count: u16) -> Result<(), HostError> {
        self.set(
            physical,
            "sriov_numvfs",
            &count.to_string(),
            &format!("make its driver have {count} virtual functions"),
            "the driver may not know SR-IOV, or refuse that number; see the kernel's log (dmesg)",
        )
    }

    fn are_functions_probed(&self, physical: Bdf) -> Result<bool, HostError> {
        Ok(self.attribute(physical, AUTOPROBE)? != "0")
    }

    fn set_functions_probed(&self, physical: Bdf, probed: bool) -> Result<(), HostError> {
        self.set(
            physical,
            AUTOPROBE,
            if probed { "1" } else { "0" },
            "say whether drivers take its virtual functions",
            NO_OTHER,
        )
    }

    fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<(), HostError> {
        let methods = if methods.is_empty() {
            "default".to_owned()
        } else {
            methods.join(" ")
        };
        self.set(
            bdf,
            "reset_method",
            &methods,
            &format!("choose how it is reset ({methods})"),
            "choosing needs Linux 5.15; for the device's methods see its 'reset_method' in sysfs",
        )
    }

    fn beside(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        let directory =
            fs::canonicalize(self.device(bdf)).map_err(|_| HostError::NoDevice { bdf })?;
        let bridge = directory.parent().filter(|parent| is_function(parent));
        let entries = bridge.and_then(|bridge| fs::read_dir(bridge).ok());
        let mut found: Vec<Bdf> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|other| *other != bdf)
            .collect();
        found.sort();
        Ok(found)
    }

    fn ports_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, HostError> {
        // The kernel's tree of devices is that of the bridges: .../pci0000:00/0000:00:09.0/0000:01:00.0.
        let path = fs::canonicalize(self.device(bdf)).map_err(|_| HostError::NoDevice { bdf })?;
        let parts = path.components();
        let mut ports: Vec<Bdf> = parts
            .filter_map(|part| part.as_os_str().to_str()?.parse().ok())
            .collect();
        ports.pop();
        Ok(ports)
    }

    fn error_reports(&self) -> Result<Box<dyn ErrorReports>, HostError> {
        match Tracepoint::open(&self.root.join("kernel/tracing")) {
            Ok(tracepoint) => Ok(Box::new(tracepoint)),
            Err(error) => {
                log::warn!(
                    "errors of devices are looked for in their counters once a second, since {}",
                    chain(&error)
                );
                let counters = Counters::new(self.root.join("bus/pci/devices"))
                    .map_err(|source| HostError::NoErrors { source })?;
                Ok(Box::new(counters))
            }
        }
    }

    fn correctable_errors(&self, bdf: Bdf) -> Option<u64> {
        counters::correctable(&self.root.join("bus/pci/devices"), bdf)
    }

    fn keep_virtual_functions(&self, physical: Bdf, keep: bool) -> Result<(), HostError> {
        let file = self.device(physical).join("sriov_numvfs");
        kept::keep(&file, keep).map_err(|source| HostError::Refused {
            bdf: physical,
            action: if keep {
                "keep others from taking its virtual functions away".into()
            } else {
                "let its number of virtual functions be changed again".into()
            },
            remedy: "the file sriov_numvfs in its sysfs directory is mounted over itself, read-only, while guests have virtual functions",
            source,
        })
    }

    fn group(&self, bdf: Bdf) -> Option<Group> {
        let number = group::number_of(&self.device(bdf))?;
        let found = group::devices_of(&self.root, number);
        let members = found.into_iter().filter_map(|bdf| {
            let description = self.describe(bdf).ok()?;
            Some(Member {
                bdf,
                is_bridge: is_bridge(description.class),
                driver: description.driver,
            })
        });
        Some(Group {
            number,
            members: members.collect(),
        })
    }

    fn needed_by_dom0(&self, bdf: Bdf) -> Result<Option<String>, HostError> {
        Ok(dom0_needs::reason(
            &self.root,
            Path::new("/"),
            &self.device(bdf),
        ))
    }
}

#[cfg(test)]
mod tests;
