//! xenstored as its clients see it, through the real client.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::Xenstored;
use crate::types::DomId;
use crate::xenstore::wire::MessageType;
use crate::xenstore::{Access, Client, Error, Perm, Store, WatchEvent};

struct Setup {
    xenstored: Xenstored,
    dom0: Client,
    directory: tempfile::TempDir,
}

const GUEST: DomId = DomId(5);

/// A xenstored in which domain 5 has its directory.
fn setup() -> Setup {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("xenstored.sock");
    let xenstored = Xenstored::start(UnixListener::bind(&socket).unwrap(), &socket).unwrap();
    let mut dom0 = Client::connect_to(&socket).unwrap();
    dom0.mkdir("/local/domain/5").unwrap();
    dom0.set_perms(
        "/local/domain/5",
        &[Perm {
            domain: GUEST,
            access: Access::None,
        }],
    )
    .unwrap();
    Setup {
        xenstored,
        dom0,
        directory,
    }
}

impl Setup {
    fn guest(&self) -> Client {
        Client::from_stream(self.xenstored.connect_as(GUEST).unwrap()).unwrap()
    }
}

/// Waits for the next event.
fn next(client: &mut Client) -> WatchEvent {
    let start = Instant::now();
    loop {
        if let Some(event) = client.next_event().unwrap() {
            return event;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "no event came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All events that have come by the time a request is answered.
fn pending(client: &mut Client) -> Vec<String> {
    client.exists("none").unwrap();
    std::iter::from_fn(|| client.next_event().unwrap())
        .map(|event| event.path)
        .collect()
}

#[test]
fn a_value_of_any_bytes_survives() {
    let mut setup = setup();
    setup.dom0.write("/a/b", b"\0\xff\n").unwrap();
    assert_eq!(setup.dom0.read("/a/b").unwrap(), b"\0\xff\n");
    setup.dom0.write("/a/b", b"").unwrap();
    assert_eq!(setup.dom0.read("/a/b").unwrap(), b"");
    assert!(setup.dom0.read("/a/c").unwrap_err().is_not_found());
}

#[test]
fn a_directory_of_any_length_can_be_listed() {
    let mut setup = setup();
    let mut names: Vec<_> = (0..600)
        .map(|number| format!("a-rather-long-name-{number}"))
        .collect();
    for name in &names {
        setup.dom0.mkdir(&format!("/big/{name}")).unwrap();
    }
    names.sort_unstable();
    assert_eq!(setup.dom0.directory("/big").unwrap(), names);
    assert!(matches!(
        setup.dom0.request(MessageType::Directory, "/big", &[]),
        Err(Error::TooBig(_))
    ));
    assert_eq!(setup.dom0.directory("/").unwrap(), ["big", "local"]);
    assert!(setup.dom0.directory("/local/domain/5").unwrap().is_empty());
}

#[test]
fn a_relative_watch_tells_relative_paths_and_fires_at_once() {
    let mut setup = setup();
    let mut guest = setup.guest();
    guest.watch("device", "token").unwrap();
    assert_eq!(
        next(&mut guest),
        WatchEvent {
            path: "device".into(),
            token: "token".into()
        }
    );
    setup
        .dom0
        .write("/local/domain/5/device/pci/0/state", "1")
        .unwrap();
    assert_eq!(next(&mut guest).path, "device/pci/0/state");
    setup.dom0.rm("/local/domain/5/device").unwrap();
    assert_eq!(next(&mut guest).path, "device");
}

#[test]
fn a_watch_on_a_node_hears_when_an_ancestor_goes() {
    let mut setup = setup();
    setup.dom0.write("/a/b/c", "").unwrap();
    setup.dom0.watch("/a/b/c", "t").unwrap();
    setup.dom0.watch("/elsewhere", "t").unwrap();
    assert_eq!(pending(&mut setup.dom0), ["/a/b/c", "/elsewhere"]);
    setup.dom0.rm("/a").unwrap();
    assert_eq!(pending(&mut setup.dom0), ["/a/b/c"]);
    setup.dom0.unwatch("/a/b/c", "t").unwrap();
    setup.dom0.write("/a/b/c", "").unwrap();
    assert!(pending(&mut setup.dom0).is_empty());
    assert!(
        setup
            .dom0
            .unwatch("/a/b/c", "t")
            .unwrap_err()
            .is_not_found()
    );
}

#[test]
fn watches_fire_after_the_commit_and_not_before() {
    let mut setup = setup();
    let mut watcher = Client::connect_to(setup.directory.path().join("xenstored.sock")).unwrap();
    watcher.watch("/t", "t").unwrap();
    assert_eq!(pending(&mut watcher), ["/t"]);
    setup
        .dom0
        .transaction(|transaction| {
            transaction.write("/t/a", "1")?;
            assert!(pending(&mut watcher).is_empty());
            Ok(())
        })
        .unwrap();
    assert_eq!(pending(&mut watcher), ["/t/a"]);
}

#[test]
fn a_transaction_that_lost_against_another_client_is_tried_again() {
    let mut setup = setup();
    let mut other = Client::connect_to(setup.directory.path().join("xenstored.sock")).unwrap();
    setup.dom0.write("/count", "1").unwrap();
    let mut tries = 0;
    setup
        .dom0
        .transaction(|transaction| {
            let count = transaction.read_u32("/count")?;
            tries += 1;
            if tries == 1 {
                other.write("/count", "10").unwrap();
            }
            transaction.write("/count", (count + 1).to_string())
        })
        .unwrap();
    assert_eq!(tries, 2);
    assert_eq!(setup.dom0.read("/count").unwrap(), b"11");
}

#[test]
fn a_guest_hears_of_nothing_that_it_may_not_read() {
    let mut setup = setup();
    let mut guest = setup.guest();
    guest.watch("/local/domain/0", "t").unwrap();
    guest.watch("@releaseDomain", "t").unwrap();
    assert_eq!(pending(&mut guest), ["/local/domain/0", "@releaseDomain"]);
    setup.dom0.write("/local/domain/0/secret", "x").unwrap();
    setup.xenstored.domain_released();
    assert!(pending(&mut guest).is_empty());
    assert!(matches!(
        guest.read("/local/domain/0/secret"),
        Err(Error::Denied(_))
    ));
}

#[test]
fn domains_come_and_go() {
    let mut setup = setup();
    setup.dom0.watch("@introduceDomain", "in").unwrap();
    setup.dom0.watch("@releaseDomain", "out").unwrap();
    assert_eq!(pending(&mut setup.dom0).len(), 2);
    setup
        .dom0
        .request(MessageType::Introduce, "5", &[b"0\0", b"1\0"])
        .unwrap();
    assert_eq!(pending(&mut setup.dom0), ["@introduceDomain"]);
    assert_eq!(
        setup
            .dom0
            .request(MessageType::IsDomainIntroduced, "5", &[])
            .unwrap(),
        b"T\0"
    );
    assert_eq!(
        setup
            .dom0
            .request(MessageType::GetDomainPath, "5", &[])
            .unwrap(),
        b"/local/domain/5\0"
    );
    setup.dom0.request(MessageType::Release, "5", &[]).unwrap();
    assert_eq!(pending(&mut setup.dom0), ["@releaseDomain"]);
    assert_eq!(
        setup
            .dom0
            .request(MessageType::IsDomainIntroduced, "5", &[])
            .unwrap(),
        b"F\0"
    );
    assert!(matches!(
        setup
            .guest()
            .request(MessageType::Introduce, "6", &[b"0\0", b"1\0"]),
        Err(Error::Denied(_))
    ));
}

#[test]
fn a_guests_watches_and_transactions_are_counted() {
    let setup = setup();
    let mut guest = setup.guest();
    for number in 0..128 {
        guest.watch("device", &number.to_string()).unwrap();
    }
    assert!(matches!(
        guest.watch("device", "one more"),
        Err(Error::TooBig(_))
    ));
    assert!(matches!(guest.watch("device", "0"), Err(Error::Exists(_))));
    guest.unwatch("device", "0").unwrap();
    guest.watch("device", "one more").unwrap();
    guest.request(MessageType::ResetWatches, "-", &[]).unwrap();
    assert!(guest.unwatch("device", "1").unwrap_err().is_not_found());
    for _ in 0..10 {
        start_transaction(&mut guest).unwrap();
    }
    assert!(matches!(
        start_transaction(&mut guest),
        Err(Error::NoSpace(_))
    ));
}

fn start_transaction(client: &mut Client) -> Result<Vec<u8>, Error> {
    client.request(MessageType::TransactionStart, "-", &[])
}

#[test]
fn a_destroyed_domains_connections_end() {
    let setup = setup();
    let mut guest = setup.guest();
    guest.write("data", "x").unwrap();
    setup.xenstored.domain_destroyed(GUEST);
    assert!(guest.read("data").unwrap_err().is_fatal());
}
