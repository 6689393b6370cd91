//! What is asked of guests' virtio devices.

use super::service::DaemonService;
use crate::config::VirtioDevice;
use crate::control::protocol::Response;
use crate::text::chain;
use crate::virtual_devices::VirtioError;

impl DaemonService {
    pub(super) fn virtio(&self, guest: Option<&str>) -> Response {
        let guests = self.virtual_guests.report(guest);
        guests.map_or_else(failed, |guests| Response::Virtio { guests })
    }

    pub(super) fn add_virtio(&self, guest: &str, device: &VirtioDevice) -> Response {
        let placed = self.virtual_guests.add_device(guest, device);
        placed.map_or_else(failed, |place| Response::Placed {
            places: vec![place],
        })
    }

    pub(super) fn await_virtio(&self, guest: &str) -> Response {
        let ready = self.virtual_guests.wait_until_ready(guest);
        ready.map_or_else(failed, |places| Response::Placed { places })
    }
}

fn failed(error: VirtioError) -> Response {
    Response::Failed {
        message: chain(&error),
    }
}
