//! Paths of nodes: `/a/b`, `a/b` below the domain's own directory, or `@special`.

use nix::errno::Errno;

use crate::types::DomId;
use crate::xenstore::wire::{ABSOLUTE_PATH_MAX, RELATIVE_PATH_MAX};

/// The directory that a domain's relative paths start from.
pub(super) fn home(domain: DomId) -> String {
    format!("/local/domain/{domain}")
}

/// Turns what a domain sent into an absolute path, or a special one (`@introduceDomain`).
///
/// # Errors
/// EINVAL: empty, too long, other characters than letters, digits and `-/_@`, `//` in it or `/` at its end.
pub(super) fn canonical(raw: &[u8], domain: DomId) -> Result<String, Errno> {
    let text = std::str::from_utf8(raw).map_err(|_| Errno::EINVAL)?;
    let absolute = text.starts_with('/');
    let limit = if absolute {
        ABSOLUTE_PATH_MAX
    } else {
        RELATIVE_PATH_MAX
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '/' | '_' | '@');
    let well_formed =
        !text.is_empty() && text.len() <= limit && text.chars().all(plain) && !text.contains("//");
    if !well_formed || (text.ends_with('/') && text != "/") {
        return Err(Errno::EINVAL);
    }
    if absolute || is_special(text) {
        Ok(text.to_owned())
    } else {
        Ok(format!("{}/{text}", home(domain)))
    }
}

/// Whether this names an event of xenstored's own instead of a node.
pub(super) fn is_special(path: &str) -> bool {
    path.starts_with('@')
}

/// The node above; `None` for the root.
pub(super) fn parent(path: &str) -> Option<&str> {
    if path == "/" {
        return None;
    }
    match path.rsplit_once('/') {
        Some(("", _)) => Some("/"),
        Some((parent, _)) => Some(parent),
        None => None,
    }
}

/// The last part of a path.
pub(super) fn leaf(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, leaf)| leaf)
}

/// The path of a child.
pub(super) fn child(parent: &str, name: &str) -> String {
    if parent == "/" {
        format!("/{name}")
    } else {
        format!("{parent}/{name}")
    }
}

/// Whether `path` is `ancestor` or below it.
pub(super) fn is_at_or_below(path: &str, ancestor: &str) -> bool {
    if ancestor == "/" {
        return !is_special(path);
    }
    match path.strip_prefix(ancestor) {
        Some(rest) => rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_start_at_the_domains_directory() {
        assert_eq!(
            canonical(b"device/pci/0", DomId(7)).unwrap(),
            "/local/domain/7/device/pci/0"
        );
        assert_eq!(canonical(b"/a", DomId(7)).unwrap(), "/a");
        assert_eq!(
            canonical(b"@releaseDomain", DomId(7)).unwrap(),
            "@releaseDomain"
        );
    }

    #[test]
    fn what_is_no_path_is_refused() {
        let long = [b'a'; 2049];
        for raw in [
            &b""[..],
            b"a//b",
            b"a/",
            b"/a/",
            b"a b",
            b"a\0b",
            b"a.b",
            b"\xff",
            &long,
        ] {
            assert_eq!(
                canonical(raw, DomId(1)),
                Err(Errno::EINVAL),
                "{}",
                raw.escape_ascii()
            );
        }
    }

    #[test]
    fn a_node_is_below_its_ancestors_only() {
        assert!(is_at_or_below("/a/b", "/a"));
        assert!(is_at_or_below("/a", "/a"));
        assert!(is_at_or_below("/a", "/"));
        assert!(!is_at_or_below("/ab", "/a"));
        assert!(!is_at_or_below("@releaseDomain", "/"));
        assert_eq!(parent("/a"), Some("/"));
        assert_eq!(parent("/"), None);
    }
}
