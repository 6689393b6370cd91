//! Reading a device's directory in sysfs.

use std::fs;
use std::io;
use std::path::Path;

use conf_space::Bdf;

use crate::{Error, Function};

impl Function {
    /// Reads what the device with this directory is, for instance
    /// `/sys/bus/pci/devices/0000:03:00.0`.
    ///
    /// # Errors
    /// When what is there cannot be read or understood, a directory that does not exist included.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        fs::metadata(directory).map_err(|source| Error::Read {
            path: directory.to_owned(),
            source,
        })?;
        if let Some(physical) = link(directory, "physfn")? {
            let own = own_address(directory)?;
            let siblings = virtual_functions(&directory.join("physfn"))?;
            let (index, _) = siblings
                .into_iter()
                .find(|(_, bdf)| *bdf == own)
                .ok_or_else(|| Error::Unlisted {
                    physical,
                    directory: directory.to_owned(),
                })?;
            return Ok(Self::Virtual { physical, index });
        }
        // Only physical functions have this file.
        if !directory.join("sriov_totalvfs").exists() {
            return Ok(Self::Plain);
        }
        Ok(Self::Physical {
            enabled: read(
                directory,
                "sriov_numvfs",
                parse_count,
                "a number of virtual functions",
            )?,
            total: read(
                directory,
                "sriov_totalvfs",
                parse_count,
                "a number of virtual functions",
            )?,
            virtual_functions: virtual_functions(directory)?,
        })
    }
}

/// The address in the name of the directory itself; `/sys/bus/pci/devices` holds links, so the name
/// of what they lead to.
fn own_address(directory: &Path) -> Result<Bdf, Error> {
    let path = fs::canonicalize(directory).map_err(|source| Error::Read {
        path: directory.to_owned(),
        source,
    })?;
    address_in(&path).ok_or_else(|| Error::Malformed {
        path: directory.to_owned(),
        found: path.display().to_string(),
        expected: "the directory of a PCI device",
    })
}

fn virtual_functions(physical: &Path) -> Result<Vec<(u16, Bdf)>, Error> {
    let error = |source| Error::Read {
        path: physical.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(physical).map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        let Some((name, index)) = name
            .to_str()
            .and_then(|name| Some((name, parse_index(name)?)))
        else {
            continue;
        };
        // A link that has gone since the directory was read is a function that has gone.
        if let Some(bdf) = link(physical, name)? {
            found.push((index, bdf));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The number in `virtfnN`.
fn parse_index(name: &str) -> Option<u16> {
    parse_count(name.strip_prefix("virtfn")?)
}

/// Where a link leads; `None` when there is no such link.
fn link(directory: &Path, name: &str) -> Result<Option<Bdf>, Error> {
    let path = directory.join(name);
    let target = match fs::read_link(&path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path, source }),
    };
    match address_in(&target) {
        Some(bdf) => Ok(Some(bdf)),
        None => Err(Error::Malformed {
            path,
            found: target.display().to_string(),
            expected: "a link to a PCI device",
        }),
    }
}

fn address_in(path: &Path) -> Option<Bdf> {
    path.file_name()?.to_str()?.parse().ok()
}

fn read<T>(
    directory: &Path,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
    expected: &'static str,
) -> Result<T, Error> {
    let path = directory.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => parse(text.trim_end()).ok_or_else(|| Error::Malformed {
            path,
            found: text.trim_end().to_owned(),
            expected,
        }),
        Err(source) => Err(Error::Read { path, source }),
    }
}

fn parse_count(text: &str) -> Option<u16> {
    // `from_str` alone would take a sign.
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// A tree as sysfs has it: the devices below a host bridge, and links to them in one directory.
    struct Tree {
        root: tempfile::TempDir,
    }

    impl Tree {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("bus/pci/devices")).unwrap();
            Self { root }
        }

        fn device(&self, bdf: &str) -> PathBuf {
            let directory = self.root.path().join("devices/pci0000:00").join(bdf);
            fs::create_dir_all(&directory).unwrap();
            let link = self.root.path().join("bus/pci/devices").join(bdf);
            if !link.exists() {
                symlink(format!("../../../devices/pci0000:00/{bdf}"), &link).unwrap();
            }
            link
        }

        fn physical(&self, bdf: &str, enabled: &str, total: &str) -> PathBuf {
            let directory = self.device(bdf);
            fs::write(directory.join("sriov_numvfs"), enabled).unwrap();
            fs::write(directory.join("sriov_totalvfs"), total).unwrap();
            directory
        }

        fn virtual_of(&self, physical: &str, index: u16, bdf: &str) -> PathBuf {
            let directory = self.device(bdf);
            symlink(format!("../{physical}"), directory.join("physfn")).unwrap();
            symlink(
                format!("../{bdf}"),
                self.device(physical).join(format!("virtfn{index}")),
            )
            .unwrap();
            directory
        }
    }

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    #[test]
    fn a_device_without_sriov_is_plain() {
        let tree = Tree::new();
        assert_eq!(
            Function::read(&tree.device("0000:00:05.0")).unwrap(),
            Function::Plain
        );
    }

    #[test]
    fn a_physical_function_knows_its_virtual_functions_in_the_order_of_their_index() {
        let tree = Tree::new();
        let directory = tree.physical("0000:01:00.0", "11\n", "63\n");
        let addresses: Vec<String> = (0..11)
            .map(|index| format!("0000:01:{:02x}.{}", 0x10 + index / 4, index % 4 * 2))
            .collect();
        for (index, address) in addresses.iter().enumerate().rev() {
            tree.virtual_of("0000:01:00.0", u16::try_from(index).unwrap(), address);
        }
        // Names that only look alike.
        fs::write(directory.join("virtfn"), "").unwrap();
        fs::write(directory.join("virtfn_count"), "").unwrap();
        let Function::Physical {
            enabled,
            total,
            virtual_functions,
        } = Function::read(&directory).unwrap()
        else {
            panic!("no physical function")
        };
        assert_eq!((enabled, total), (11, 63));
        let expected: Vec<(u16, Bdf)> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| (u16::try_from(index).unwrap(), bdf(address)))
            .collect();
        assert_eq!(virtual_functions, expected);
    }

    #[test]
    fn a_physical_function_may_have_none_enabled() {
        let tree = Tree::new();
        let directory = tree.physical("0000:01:00.0", "0\n", "8\n");
        assert_eq!(
            Function::read(&directory).unwrap(),
            Function::Physical {
                enabled: 0,
                total: 8,
                virtual_functions: Vec::new()
            }
        );
    }

    #[test]
    fn a_virtual_function_knows_its_physical_function_and_its_index() {
        let tree = Tree::new();
        tree.physical("0000:01:00.0", "2\n", "8\n");
        tree.virtual_of("0000:01:00.0", 0, "0000:01:10.0");
        let directory = tree.virtual_of("0000:01:00.0", 1, "0000:01:10.2");
        assert_eq!(
            Function::read(&directory).unwrap(),
            Function::Virtual {
                physical: bdf("0000:01:00.0"),
                index: 1
            }
        );
    }

    #[test]
    fn a_virtual_function_that_is_being_removed_is_an_error_that_says_so() {
        let tree = Tree::new();
        let physical = tree.physical("0000:01:00.0", "1\n", "8\n");
        let directory = tree.virtual_of("0000:01:00.0", 0, "0000:01:10.0");
        fs::remove_file(physical.join("virtfn0")).unwrap();
        assert!(matches!(
            Function::read(&directory),
            Err(Error::Unlisted { .. })
        ));
    }

    #[test]
    fn what_is_not_as_the_kernel_writes_it_is_named_with_its_path() {
        let tree = Tree::new();
        for text in ["", "-1", "+1", "65536", "two"] {
            let directory = tree.physical("0000:02:00.0", text, "8");
            let error = Function::read(&directory).unwrap_err().to_string();
            assert!(
                error.contains("sriov_numvfs") && error.contains(&format!("'{text}'")),
                "{error}"
            );
        }
        let directory = tree.device("0000:03:00.0");
        symlink("../somewhere", directory.join("physfn")).unwrap();
        assert!(
            Function::read(&directory)
                .unwrap_err()
                .to_string()
                .contains("somewhere")
        );
        assert!(matches!(
            Function::read(&tree.root.path().join("bus/pci/devices/0000:09:00.0")),
            Err(Error::Read { .. })
        ));
    }
}
