//! What is wrong with this host, or with a device, and what to do about it: `pciback doctor`.
//!
//! Facts are gathered first, then judged. The judges ([`host::judge`], [`device::judge`]) are pure. The facts about the host come from its
//! files and from `xl`, gathered by the command line, which also works without a daemon. Those about devices come from the daemon if it
//! runs, since it knows who has which; else from the daemon's records.
//!
//! | module | holds |
//! |---|---|
//! | this one | what a finding is |
//! | [`host`], [`host_facts`] | Xen, IOMMU, the kernel, the facade |
//! | [`vfio`] | the same for a daemon without Xen |
//! | [`device`], [`device_facts`] | one device |
//! | [`offline`] | devices, when no daemon answers |
//! | [`modules`] | whether the kernel's own backend can come up |

pub mod device;
pub mod device_facts;
pub mod host;
pub mod host_facts;
pub mod modules;
pub mod offline;
pub mod vfio;

use conf_space::address::Bdf;
use serde::{Deserialize, Serialize};

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The question does not arise here, or cannot be answered.
    NotApplicable,
    /// As it should be.
    Ok,
    /// It works, but not in every case or not as well as it could.
    Warning,
    /// It does not work.
    Problem,
}

impl Verdict {
    /// The verdict in a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotApplicable => "-",
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// The answer to one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The device; `None`: the host.
    pub device: Option<Bdf>,
    /// What was looked at, in a word or two.
    pub check: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
}

/// Findings about one thing, as they come.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    device: Option<Bdf>,
    list: Vec<Finding>,
}

impl Findings {
    /// About a device.
    pub(crate) fn about(device: Bdf) -> Self {
        Self {
            device: Some(device),
            list: Vec::new(),
        }
    }

    fn add(&mut self, check: &str, verdict: Verdict, message: impl Into<String>) {
        self.list.push(Finding {
            device: self.device,
            check: check.to_owned(),
            verdict,
            message: message.into(),
            remedy: None,
        });
    }

    pub(crate) fn ok(&mut self, check: &str, message: impl Into<String>) {
        self.add(check, Verdict::Ok, message);
    }

    pub(crate) fn not_applicable(&mut self, check: &str, message: impl Into<String>) {
        self.add(check, Verdict::NotApplicable, message);
    }

    pub(crate) fn warning(
        &mut self,
        check: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(check, Verdict::Warning, message);
        self.remedy(remedy);
    }

    pub(crate) fn problem(
        &mut self,
        check: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(check, Verdict::Problem, message);
        self.remedy(remedy);
    }

    fn remedy(&mut self, remedy: impl Into<String>) {
        if let Some(last) = self.list.last_mut() {
            last.remedy = Some(remedy.into());
        }
    }

    pub(crate) fn into_list(self) -> Vec<Finding> {
        self.list
    }
}

/// A directory with these files, by path and content, in place of `/`.
#[cfg(test)]
fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}
