//! The session's xenstore nodes, as libxl lays them out and pcifront reads them.
//!
//! Below `/local/domain/0/backend/pci/<domid>/<devid>`. Numbers without a prefix are decimal; N counts from 0 to `num_devs` - 1, and libxl
//! renumbers when it takes a device away, so a device is known by its address and never by its N.
//!
//! | node | by | value |
//! |---|---|---|
//! | `state`, `online`, `frontend`, `frontend-id`, `num_devs`, `domain` | toolstack | |
//! | `dev-N` | toolstack | address on the host |
//! | `vdevfn-N` | toolstack | wished device and function in the guest, hexadecimal; may be missing |
//! | `state-N` | both | 1: to be exported, 3: exported, 5: to be taken away, 6: could not be exported |
//! | `error-N` | us | why not |
//! | `vdev-N` | us | address in the guest |
//! | `root_num`, `root-N` | us | buses that the guest scans, `segment:bus` |

use conf_space::address::Bdf;
use xenbus::xenstore::{Client, Error, Store};
use xenbus::{DomId, XenbusState};

/// The backends' directory.
pub const BACKENDS: &str = "/local/domain/0/backend/pci";

/// Where errors are told, a directory for each guest.
pub const ERRORS: &str = "/local/domain/0/error/backend/pci";

/// More devices than a guest can have: what is beyond is not looked at.
const MAX_DEVICES: u32 = 256;

/// Where a session's nodes are.
#[derive(Debug, Clone)]
pub struct Paths {
    /// `/local/domain/0/backend/pci/<domid>/<devid>`.
    pub backend: String,
    /// The frontend's directory, as the backend's node names it.
    pub frontend: String,
    /// Where errors are told: `/local/domain/0/error/backend/pci/<domid>/<devid>/error`.
    pub error: String,
}

impl Paths {
    /// The backend's directory for a guest's device; libxl's number of it is always 0.
    pub fn backend(domain: DomId, device: u32) -> String {
        format!("{BACKENDS}/{domain}/{device}")
    }

    /// Where errors of it are told.
    pub fn error(domain: DomId, device: u32) -> String {
        format!("{ERRORS}/{domain}/{device}/error")
    }

    /// Finds a session's nodes. The frontend's directory is where the toolstack says, or else where it always is.
    ///
    /// # Errors
    /// xenstore's.
    pub fn find(store: &mut Client, domain: DomId) -> Result<Self, Error> {
        let backend = Self::backend(domain, 0);
        let told = optional(store.read_string(&format!("{backend}/frontend")))?
            .filter(|path| !path.is_empty());
        Ok(Self {
            frontend: told.unwrap_or_else(|| format!("/local/domain/{domain}/device/pci/0")),
            error: Self::error(domain, 0),
            backend,
        })
    }

    /// A node of the backend's.
    pub fn own(&self, node: &str) -> String {
        format!("{}/{node}", self.backend)
    }

    /// A node of the backend's for the device of index `n`.
    pub fn indexed(&self, node: &str, n: u32) -> String {
        format!("{}/{node}-{n}", self.backend)
    }

    /// A node of the frontend's.
    pub fn theirs(&self, node: &str) -> String {
        format!("{}/{node}", self.frontend)
    }
}

/// A missing node is `None`.
///
/// # Errors
/// All others of xenstore's.
pub fn optional<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The guest that `domain` is the stub domain of. The toolstack says so at both: the guests themselves cannot write there.
///
/// # Errors
/// xenstore's.
pub fn target_of(store: &mut Client, domain: DomId) -> Result<Option<DomId>, Error> {
    let mut number = |path: String| -> Result<Option<DomId>, Error> {
        Ok(optional(store.read_string(&path))?.and_then(|text| text.parse().ok()))
    };
    let Some(target) = number(format!("/local/domain/{domain}/target"))? else {
        return Ok(None);
    };
    let stub_domain = number(format!("/local/domain/{target}/image/device-model-domid"))?;
    Ok(Some(target).filter(|_| stub_domain == Some(domain)))
}

/// What the nodes say of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Its index, as long as the toolstack does not renumber.
    pub n: u32,
    /// `dev-N`; the text when it is no address.
    pub address: Result<Bdf, String>,
    /// `state-N`.
    pub state: XenbusState,
    /// `vdevfn-N`: device in bits 7:3, function in bits 2:0. libxl's own xenstore form is hexadecimal.
    pub wished: Option<u8>,
}

fn address(text: String) -> Result<Bdf, String> {
    text.parse().map_err(|_| text)
}

/// Reads the nodes of all devices. A missing or unreadable `num_devs` is no devices; libxl writes it together with the first.
///
/// # Errors
/// xenstore's.
pub fn devices(store: &mut impl Store, paths: &Paths) -> Result<Vec<DeviceNode>, Error> {
    let count = match store.read_u32(&paths.own("num_devs")) {
        Ok(count) => count.min(MAX_DEVICES),
        Err(Error::NotFound(_)) => 0,
        Err(error @ Error::Malformed { .. }) => {
            log::error!("{}", crate::text::chain(&error));
            0
        }
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for n in 0..count {
        let Some(text) = optional(store.read_string(&paths.indexed("dev", n)))? else {
            continue;
        };
        found.push(DeviceNode {
            n,
            address: address(text),
            state: store.read_state(&paths.indexed("state", n))?,
            wished: optional(store.read_string(&paths.indexed("vdevfn", n)))?
                .and_then(|text| u8::from_str_radix(&text, 16).ok()),
        });
    }
    Ok(found)
}

/// The indices of the `error-N` that are there.
///
/// # Errors
/// xenstore's.
pub fn errors(store: &mut Client, paths: &Paths) -> Result<Vec<u32>, Error> {
    let names = optional(store.directory(&paths.backend))?.unwrap_or_default();
    let index = |name: &String| name.strip_prefix("error-")?.parse().ok();
    Ok(names.iter().filter_map(index).collect())
}

/// Removes a node, and those above it that nothing is left in, up to `/local/domain/0/backend` and its like.
///
/// # Errors
/// xenstore's.
pub fn remove(store: &mut Client, path: &str) -> Result<(), Error> {
    /// Slashes in `/local/domain/0/backend`.
    const KEPT: usize = 4;
    store.transaction(|transaction| {
        optional(transaction.rm(path))?;
        let mut parent = path;
        while let Some((above, _)) = parent
            .rsplit_once('/')
            .filter(|(above, _)| above.matches('/').count() > KEPT)
        {
            let idle = match optional(transaction.read(above))? {
                Some(value) => value.is_empty() && transaction.directory(above)?.is_empty(),
                None => false,
            };
            if !idle {
                break;
            }
            transaction.rm(above)?;
            parent = above;
        }
        Ok(())
    })
}

/// Writes nodes of one device, `NAME-N`, as long as index N is still its own.
///
/// # Errors
/// xenstore's.
pub fn write_device(
    store: &mut Client,
    paths: &Paths,
    node: &DeviceNode,
    values: &[(&str, &str)],
) -> Result<(), Error> {
    store.transaction(|transaction| {
        let now = optional(transaction.read_string(&paths.indexed("dev", node.n)))?;
        if now.map(address) != Some(node.address.clone()) {
            return Ok(());
        }
        for (name, value) in values {
            transaction.write(&paths.indexed(name, node.n), value)?;
        }
        Ok(())
    })
}

/// Makes sure that the guest will scan a bus. Roots are only ever added: a guest may be using them. A backend that the toolstack has removed
/// stays removed.
///
/// # Errors
/// xenstore's.
pub fn publish_root(store: &mut Client, paths: &Paths, segment: u16, bus: u8) -> Result<(), Error> {
    let root = format!("{segment:04x}:{bus:02x}");
    store.transaction(|transaction| {
        if !transaction.exists(&paths.own("state"))? {
            return Ok(());
        }
        let count = match transaction.read_u32(&paths.own("root_num")) {
            Ok(count) => count.min(MAX_DEVICES),
            Err(Error::NotFound(_) | Error::Malformed { .. }) => 0,
            Err(error) => return Err(error),
        };
        for n in 0..count {
            let there = optional(transaction.read_string(&paths.indexed("root", n)))?;
            if there.as_deref() == Some(&root) {
                return Ok(());
            }
        }
        transaction.write(&paths.indexed("root", count), &root)?;
        transaction.write(&paths.own("root_num"), count.saturating_add(1).to_string())
    })
}
