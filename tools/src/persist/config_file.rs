//! The configuration file, edited as an operator would: only the list `hide` changes, comments and order stay.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use conf_space::selector::{self, Selector};
use nix::fcntl::{Flock, FlockArg};
use pcibackd::config::Config;
use toml_edit::{Array, DocumentMut, Item, Value};

use super::{PersistError, replace};

/// The open file. Nobody else of us edits it meanwhile.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
    document: DocumentMut,
    _lock: Flock<File>,
}

impl ConfigFile {
    /// Opens the configuration at this path. One that is missing is made.
    ///
    /// # Errors
    /// [`PersistError`]: also when it is not valid as it is.
    pub fn open(path: &Path) -> Result<Self, PersistError> {
        // A link stays a link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let failed = |source: io::Error| PersistError::Write {
            path: path.clone(),
            source,
        };
        let directory = match path.parent() {
            Some(directory) if directory != Path::new("") => directory,
            _ => Path::new("."),
        };
        fs::create_dir_all(directory).map_err(failed)?;
        let lock = Flock::lock(
            File::open(directory).map_err(failed)?,
            FlockArg::LockExclusive,
        )
        .map_err(|(_, errno)| failed(errno.into()))?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => {
                Config::load(Some(&path))?;
                text
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(failed(error)),
        };
        let document = text
            .parse()
            .map_err(|error: toml_edit::TomlError| PersistError::Edit {
                path: path.clone(),
                problem: error.to_string(),
            })?;
        Ok(Self {
            path,
            document,
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in `hide` now, but for what names nothing.
    ///
    /// # Errors
    /// [`PersistError::Edit`] if `hide` is no list.
    pub fn entries(&mut self) -> Result<Vec<Selector>, PersistError> {
        let list = self.list()?;
        let texts = list
            .iter()
            .flat_map(|list| list.iter())
            .filter_map(Value::as_str);
        Ok(texts.flat_map(selector::parse).flatten().collect())
    }

    /// Adds an entry to `hide`. `false`: it was there.
    ///
    /// # Errors
    /// [`PersistError::Edit`] if `hide` is no list.
    pub fn add(&mut self, entry: &Selector) -> Result<bool, PersistError> {
        if self.entries()?.contains(entry) {
            return Ok(false);
        }
        if self.list()?.is_none() {
            self.begin_list();
        }
        if let Some(list) = self.list()? {
            push(list, &entry.to_string());
        }
        Ok(true)
    }

    /// Takes an entry out of `hide`. `false`: it was not there.
    ///
    /// # Errors
    /// [`PersistError::Edit`] if `hide` is no list.
    pub fn remove(&mut self, entry: &Selector) -> Result<bool, PersistError> {
        let Some(list) = self.list()? else {
            return Ok(false);
        };
        let mut any = false;
        let mut emptied = Vec::new();
        for (index, value) in list.iter_mut().enumerate() {
            let Some(text) = value.as_str() else { continue };
            let (mut kept, mut taken) = (Vec::new(), false);
            for old in selector::parse(text) {
                match old {
                    Ok(old) if old == *entry => taken = true,
                    Ok(old) => kept.push(old.to_string()),
                    Err(error) => kept.push(error.entry),
                }
            }
            if !taken {
                continue;
            }
            any = true;
            if kept.is_empty() {
                emptied.push(index);
            } else {
                let decor = value.decor().clone();
                *value = Value::from(kept.join(", "));
                *value.decor_mut() = decor;
            }
        }
        for index in emptied.into_iter().rev() {
            list.remove(index);
        }
        Ok(any)
    }

    /// Writes what was changed. What pcibackd would refuse is not written.
    ///
    /// # Errors
    /// [`PersistError`].
    pub fn save(&self) -> Result<(), PersistError> {
        let text = self.document.to_string();
        let failed = |source| PersistError::Write {
            path: self.path.clone(),
            source,
        };
        let mut trial = tempfile::NamedTempFile::new().map_err(failed)?;
        trial.write_all(text.as_bytes()).map_err(failed)?;
        Config::load(Some(trial.path()))?;
        replace(&self.path, &text).map_err(failed)
    }

    fn list(&mut self) -> Result<Option<&mut Array>, PersistError> {
        let Some(item) = self.document.get_mut("hide") else {
            return Ok(None);
        };
        match item.as_array_mut() {
            Some(list) => Ok(Some(list)),
            None => Err(PersistError::Edit {
                path: self.path.clone(),
                problem: "its 'hide' is not a list, hide = [\"...\"]".into(),
            }),
        }
    }

    /// In a file of comments alone the list goes below them.
    fn begin_list(&mut self) {
        let above = self.document.is_empty().then(|| {
            self.document
                .trailing()
                .as_str()
                .unwrap_or_default()
                .to_owned()
        });
        self.document
            .insert("hide", Item::Value(Value::Array(Array::new())));
        if let Some(above) = above.filter(|above| !above.is_empty())
            && let Some(mut key) = self.document.key_mut("hide")
        {
            key.leaf_decor_mut().set_prefix(above);
            self.document.set_trailing("");
        }
    }
}

/// Whether both mean a device. That a kind or a place means the device at an address, nobody can tell without looking.
pub fn overlap(one: &Selector, other: &Selector) -> bool {
    let (Selector::Address(one), Selector::Address(other)) = (one, other) else {
        return false;
    };
    let ((a, b), (c, d)) = (one.ends(), other.ends());
    a <= d && c <= b
}

/// Adds a text at the end of a list, on a line of its own if the others are. A comment behind the last one stays there.
fn push(list: &mut Array, text: &str) {
    let text_of = |raw: Option<&toml_edit::RawString>| {
        raw.and_then(toml_edit::RawString::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let trailing = text_of(Some(list.trailing()));
    let Some((last, indent)) = list.iter_mut().last().and_then(|last| {
        let (_, indent) = last.decor().prefix()?.as_str()?.rsplit_once('\n')?;
        let indent = indent.to_owned();
        Some((last, indent))
    }) else {
        list.push(text);
        return;
    };
    let comment = text_of(last.decor().suffix()) + &trailing;
    last.decor_mut().set_suffix("");
    let prefix = format!("{}\n{indent}", comment.trim_end());
    list.push_formatted(Value::from(text).decorated(prefix, ""));
    list.set_trailing("\n");
    list.set_trailing_comma(true);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a file, and what is said about each entry.
    fn edit(
        text: &str,
        change: impl Fn(&mut ConfigFile, &Selector) -> Result<bool, PersistError>,
        entries: &[&str],
    ) -> (String, Vec<bool>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pcibackd.toml");
        fs::write(&path, text).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        let changes = entries
            .iter()
            .map(|entry| change(&mut file, &entry.parse().unwrap()).unwrap())
            .collect();
        file.save().unwrap();
        (fs::read_to_string(&path).unwrap(), changes)
    }

    fn added(text: &str, entries: &[&str]) -> String {
        edit(text, ConfigFile::add, entries).0
    }

    fn removed(text: &str, entries: &[&str]) -> String {
        edit(text, ConfigFile::remove, entries).0
    }

    #[test]
    fn a_list_is_begun_below_the_comments() {
        assert_eq!(
            added("# mine\n#hide = []\n", &["03:00.0"]),
            "# mine\n#hide = []\nhide = [\"0000:03:00.0\"]\n"
        );
        assert_eq!(
            added("", &["03:00.0", "4:0.*"]),
            "hide = [\"0000:03:00.0\", \"0000:04:00.*\"]\n"
        );
    }

    #[test]
    fn a_list_is_begun_before_the_tables() {
        assert_eq!(
            added(
                "facade = \"off\" # why\n\n# a guest\n[guest.\"a\"]\ntopology = \"vpci\"\n",
                &["03:00.0"]
            ),
            "facade = \"off\" # why\nhide = [\"0000:03:00.0\"]\n\n# a guest\n[guest.\"a\"]\ntopology = \"vpci\"\n"
        );
    }

    #[test]
    fn a_list_over_several_lines_goes_on_so() {
        for comma in ["", ","] {
            let text = format!(
                "hide = [\n  \"03:00.0\", # the card\n  \"04:00.0\"{comma} # the disk\n]\n"
            );
            assert_eq!(
                added(&text, &["05:00.0"]),
                "hide = [\n  \"03:00.0\", # the card\n  \"04:00.0\", # the disk\n  \"0000:05:00.0\",\n]\n"
            );
        }
    }

    #[test]
    fn what_is_there_in_whatever_form_is_not_added_again() {
        let (text, changes) = edit(
            "hide = [\"3:0.0,04:00.*\"]\n",
            ConfigFile::add,
            &["03:00.0"],
        );
        assert_eq!(text, "hide = [\"3:0.0,04:00.*\"]\n");
        assert_eq!(changes, [false]);
    }

    #[test]
    fn an_entry_is_taken_out_and_the_others_stay() {
        assert_eq!(
            removed(
                "# why\nhide = [\"03:00.0\", \"(04:00.0)(05:00.0) typo\"] # so\n",
                &["03:00.0", "05:00.0"]
            ),
            "# why\nhide = [ \"0000:04:00.0, typo\"] # so\n"
        );
    }

    #[test]
    fn an_entry_that_is_not_there_changes_nothing() {
        let text = "hide = [\"04:00.*\"]\n";
        let (left, changes) = edit(text, ConfigFile::remove, &["04:00.1", "06:00.0"]);
        assert_eq!(left, text);
        assert_eq!(changes, [false, false]);
    }

    #[test]
    fn a_file_that_pcibackd_refuses_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pcibackd.toml");
        fs::write(&path, "hdie = []\n").unwrap();
        assert!(matches!(
            ConfigFile::open(&path),
            Err(PersistError::Config(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "hdie = []\n");
    }
}
