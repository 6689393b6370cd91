//! What the operator allows a guest with one device, as the settings are now.

use std::sync::Arc;

use conf_space::overlay::{Overlay, Policy};
use conf_space::selector::DeviceNames;

use crate::config::Live;
use crate::host::devices::Device;
use crate::host::record::Record;

/// A guest's policy for one device. It is derived anew when the configuration file was read again, or something was set at run time; in
/// between, asking for it costs two loads.
#[derive(Debug)]
pub struct CurrentPolicy {
    config: Arc<Live>,
    names: DeviceNames,
    /// The guest is another's stub domain.
    stub_domain: bool,
    /// Versions of the configuration and of the run-time settings that `policy` is of.
    derived_from: Option<(u32, u32)>,
    policy: Policy,
}

impl CurrentPolicy {
    /// Of a guest that gets this device.
    pub fn new(config: Arc<Live>, device: &Device, stub_domain: bool) -> Self {
        Self {
            config,
            names: device.description.names(),
            stub_domain,
            derived_from: None,
            policy: Policy::default(),
        }
    }

    /// What holds now. The quirks go into the overlay.
    pub fn get(&mut self, record: &Record, overlay: &mut Overlay) -> Policy {
        let config_version = self.config.version();
        if self.derived_from != Some((config_version, record.settings_version()))
            // While they are being changed, what held before holds.
            && let Some((version, run_time)) = record.try_settings()
        {
            let mut settings = self.config.get().settings_for(&self.names);
            run_time.apply_to(&mut settings);
            self.policy = Policy {
                permissive: settings.permissive,
                allow_interrupt_control: settings.allow_interrupt_control.allows(self.stub_domain),
            };
            overlay.set_quirks(&settings.quirks);
            self.derived_from = Some((config_version, version));
        }
        self.policy
    }
}
