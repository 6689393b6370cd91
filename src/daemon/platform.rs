//! What the daemon stands on: real Xen and the machine's own devices, or the embedded Xen and simulated ones, or those of the machine.

use std::path::Path;
use std::sync::Arc;

use xenbus::Xen;
use xenbus::sim::{Machine, MachineOptions};

use super::DaemonError;
use crate::facade::RealDrivers;
use crate::host::Bus;
use crate::host::sim::SimBus;
use crate::host::sysfs::Sysfs;
use crate::host::vfio::{self, VfioBus};

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// The Xen that this dom0 runs on.
    Xen,
    /// Xen embedded in the process, with simulated devices.
    Sim,
    /// Xen embedded in the process, with this machine's devices through VFIO.
    Vfio,
}

impl Kind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xen => "xen",
            Self::Sim => "sim",
            Self::Vfio => "vfio",
        }
    }
}

/// A platform.
#[derive(Debug)]
pub struct Platform {
    /// Xen.
    pub xen: Arc<dyn Xen>,
    /// The host's devices.
    pub bus: Arc<dyn Bus>,
    /// Linux's PCI drivers; `None` where there are none.
    pub drivers: Option<RealDrivers>,
}

/// There while the kernel's own backend is registered with xenbus.
const KERNEL_BACKEND: &str = "/sys/bus/xen-backend/drivers/xen-pciback";

impl Platform {
    /// Opens the real platform, or starts the embedded one with its sockets in `run_dir`.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn start(kind: Kind, run_dir: &Path, machine: MachineOptions) -> Result<Self, DaemonError> {
        match kind {
            Kind::Xen => {
                if Path::new(KERNEL_BACKEND).exists() {
                    return Err(DaemonError::KernelBackend);
                }
                let xen = Arc::new(xenbus::host::Host::new().map_err(DaemonError::Xen)?);
                let drivers = RealDrivers::open()?;
                let bus = Arc::new(Sysfs::new("/sys", drivers.clone()));
                Ok(Self {
                    xen,
                    bus,
                    drivers: Some(drivers),
                })
            }
            Kind::Sim => {
                let machine = Machine::with_options(run_dir, machine).map_err(DaemonError::Sim)?;
                let bus = SimBus::with_example_devices(&machine);
                Ok(Self::embedded(&machine, bus))
            }
            Kind::Vfio => {
                let options = MachineOptions {
                    gsis: vfio::LINES,
                    ..machine
                };
                let machine = Machine::with_options(run_dir, options).map_err(DaemonError::Sim)?;
                let sysfs = Sysfs::new("/sys", RealDrivers::open()?);
                let bus = VfioBus::new(sysfs, &machine).map_err(|source| DaemonError::System {
                    action: "serve this machine's devices",
                    source,
                })?;
                Ok(Self::embedded(&machine, bus))
            }
        }
    }

    /// An embedded machine with a bus plugged into it.
    pub fn embedded(machine: &Machine, bus: Arc<dyn Bus>) -> Self {
        Self {
            xen: Arc::new(machine.clone()),
            bus,
            drivers: None,
        }
    }
}
