//! A disk that libxl has described in xenstore, for somebody beside it to serve:
//! `disk = [ "...,vdev=xvde,backendtype=standalone,specification=virtio" ]` (Xen 4.17 and later).
//!
//! Below `/local/domain/0/backend/virtio_disk/<domid>/<devid>`:
//!
//! | node | value |
//! |---|---|
//! | `state` | 1: to be served; 2, by us: it is, which libxl waits for before it lets the guest run; 5: to be let go of; 6, by us: it is |
//! | `online` | 0: to be let go of |
//! | `params` | the image's path |
//! | `dev` | its name among the guest's disks, `xvde` |
//! | `mode` | `r` or `w` |
//! | `device-type` | `disk` or `cdrom` |
//! | `type`, `specification`, `transport` | `standalone`, `virtio`, `mmio` |
//! | `base`, `irq` | 0 on x86: ours to choose |
//! | `grant_usage` | 1: to be reached by grants (4.19 and later) |

use xenbus::XenbusState;
use xenbus::xenstore::{Client, Error as StoreError, Store};

use crate::config::{HostPath, VirtioDevice, XlDisk};
use crate::session::nodes::optional;
use crate::text::printable;

/// Where they are.
pub(super) const BACKENDS: &str = "/local/domain/0/backend/virtio_disk";

/// What there is of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Nodes {
    pub dev: String,
    params: String,
    mode: String,
    device_type: String,
    transport: String,
    grant_usage: String,
}

/// A disk that cannot be had as it is described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    #[error(
        "its path '{path}' is not a whole one: write it in the disk's line with a / at its beginning"
    )]
    Path { path: String },
    #[error("its transport is '{0}': of disks that xl describes, those with mmio are served")]
    Transport(String),
    #[error("it is a CD drive, which virtio has none of: leave 'cdrom' out and say 'ro'")]
    Cdrom,
    #[error(
        "it is to be reached by grants, which no x86 guest of this kind needs: say grant_usage=0"
    )]
    Grants,
}

/// What is to be done about a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Give it to its guest, and go to state 2.
    Attach,
    /// Take it away, and go to state 6.
    Detach,
    /// Nothing.
    Stay,
}

/// From what the backend's nodes show.
pub(super) fn step(state: XenbusState, online: bool) -> Step {
    match (state, online) {
        (XenbusState::Unknown | XenbusState::Closed, _) => Step::Stay,
        (XenbusState::Closing, _) | (_, false) => Step::Detach,
        (XenbusState::Initialising, true) => Step::Attach,
        (_, true) => Step::Stay,
    }
}

impl Nodes {
    /// Reads them.
    ///
    /// # Errors
    /// xenstore's.
    pub fn read(store: &mut Client, directory: &str) -> Result<Self, StoreError> {
        let mut text = |node| -> Result<String, StoreError> {
            let text = optional(store.read_string(&format!("{directory}/{node}")))?;
            Ok(text.unwrap_or_default())
        };
        Ok(Self {
            dev: text("dev")?,
            params: text("params")?,
            mode: text("mode")?,
            device_type: text("device-type")?,
            transport: text("transport")?,
            grant_usage: text("grant_usage")?,
        })
    }

    /// The device that it describes, with what is set for it here.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn device(&self, settings: &XlDisk) -> Result<VirtioDevice, Unfit> {
        if self.transport != "mmio" {
            return Err(Unfit::Transport(printable(&self.transport).to_string()));
        }
        if self.device_type == "cdrom" {
            return Err(Unfit::Cdrom);
        }
        if self.grant_usage == "1" {
            return Err(Unfit::Grants);
        }
        let path = HostPath::try_from(std::path::PathBuf::from(&self.params));
        let path = path.map_err(|_| Unfit::Path {
            path: printable(&self.params).to_string(),
        })?;
        // What does not say that it may be written may not.
        Ok(settings.device(path, self.mode != "w"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Model, Place};

    fn nodes() -> Nodes {
        Nodes {
            dev: "xvde".into(),
            params: "/disk.img".into(),
            mode: "w".into(),
            device_type: "disk".into(),
            transport: "mmio".into(),
            grant_usage: String::new(),
        }
    }

    #[test]
    fn a_disk_is_what_libxl_says_and_the_settings_for_it() {
        let settings = XlDisk {
            direct: true,
            packed: true,
            ..XlDisk::default()
        };
        let device = nodes().device(&settings).unwrap();
        assert!(matches!(device.place, Place::Mmio { slot: None, .. }));
        assert!(device.packed);
        let Model::Blk(disk) = device.model else {
            panic!("{:?}", device.model)
        };
        assert_eq!(disk.path.to_str(), Some("/disk.img"));
        assert!(disk.direct && !disk.read_only);
        for mode in ["r", "", "x"] {
            let mode = mode.to_owned();
            let device = Nodes { mode, ..nodes() }.device(&settings).unwrap();
            assert!(matches!(device.model, Model::Blk(disk) if disk.read_only));
        }
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        let refusal = |nodes: Nodes| nodes.device(&XlDisk::default()).unwrap_err();
        let mut pci = nodes();
        pci.transport = "pci".into();
        assert_eq!(refusal(pci), Unfit::Transport("pci".into()));
        let mut cdrom = nodes();
        cdrom.device_type = "cdrom".into();
        assert_eq!(refusal(cdrom), Unfit::Cdrom);
        let mut grants = nodes();
        grants.grant_usage = "1".into();
        assert_eq!(refusal(grants), Unfit::Grants);
        let mut relative = nodes();
        relative.params = "disk.img".into();
        let path = "disk.img".into();
        assert_eq!(refusal(relative), Unfit::Path { path });
    }

    #[test]
    fn a_disk_is_served_from_state_1_on_and_let_go_of_when_the_toolstack_says_so() {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialising, Unknown};
        for (state, online, expected) in [
            (Initialising, true, Step::Attach),
            (InitWait, true, Step::Stay),
            (Connected, true, Step::Stay),
            (InitWait, false, Step::Detach),
            (Initialising, false, Step::Detach),
            (Closing, true, Step::Detach),
            (Closing, false, Step::Detach),
            (Closed, false, Step::Stay),
            (Unknown, false, Step::Stay),
        ] {
            assert_eq!(step(state, online), expected, "{state} {online}");
        }
    }
}
