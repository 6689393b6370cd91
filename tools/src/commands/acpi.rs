//! `pciback acpi`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use tempfile::NamedTempFile;

use crate::outcome::{CommandError, Outcome};
use crate::{output, ssdt};

/// Where tables are, unless told otherwise.
const DIRECTORY: &str = "/var/lib/pciback/acpi";

const HELP: &str = "\
A guest cannot look for virtio-mmio devices: this table tells it where their slots are. It names all slots, used
or not, so it stays as it is whatever devices the guest gets. xl hands one file to a guest; where the guest has
another table already, put both into one file, one behind the other.

Examples:
  pciback acpi web
  pciback acpi web --output /etc/xen/web.aml";

/// What `pciback acpi` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Acpi {
    /// The guest's name
    #[arg(value_name = "GUEST", value_parser = guest_name)]
    pub guest: String,
    /// Where to write it [default: /var/lib/pciback/acpi/GUEST.aml]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// A name that can be a file's.
fn guest_name(name: &str) -> Result<String, &'static str> {
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Err("this cannot be a guest's name");
    }
    Ok(name.to_owned())
}

/// Writes the table.
pub fn run(arguments: &Acpi) -> Result<Outcome, CommandError> {
    let path = match &arguments.output {
        Some(path) => std::path::absolute(path),
        None => Ok(Path::new(DIRECTORY).join(format!("{}.aml", arguments.guest))),
    };
    let failed = |what: String| move |source| CommandError::Write { what, source };
    let path = path.map_err(failed("the table".to_owned()))?;
    let what = path.display().to_string();
    write(&path, &ssdt::build()).map_err(failed(what.clone()))?;
    // On its own on standard output, so that it can be appended.
    output::tell(&format!(
        "wrote {what}; the configuration of {} needs this line:",
        arguments.guest
    ));
    output::print(&format!("acpi_firmware=\"{what}\"\n"))?;
    Ok(Outcome::Done)
}

/// All of it or nothing: a guest may be starting.
fn write(path: &Path, table: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut file = NamedTempFile::new_in(directory)?;
    file.write_all(table)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_an_older_one_and_makes_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/web.aml");
        for table in [&b"older"[..], b"new"] {
            write(&path, table).unwrap();
            assert_eq!(fs::read(&path).unwrap(), table);
        }
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        assert_eq!(guest_name("web").unwrap(), "web");
        for name in ["", ".", "../x", "a/b"] {
            guest_name(name).unwrap_err();
        }
    }
}
