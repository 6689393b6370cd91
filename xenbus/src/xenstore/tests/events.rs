use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::server::connect;
use crate::xenstore::wire::MessageType;
use crate::xenstore::{Client, EVENTS_KEPT, Store, WatchEvent};

fn event(path: &str, token: &str) -> WatchEvent {
    WatchEvent {
        path: path.to_owned(),
        token: token.to_owned(),
    }
}

fn take(client: &mut Client) -> Vec<WatchEvent> {
    std::iter::from_fn(|| client.next_event().unwrap()).collect()
}

#[test]
fn events_come_with_path_and_token() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Watch, 0, "backend/pci\0pci\0", "OK\0");
        server.event("backend/pci", "pci");
        server.event("backend/pci/5/0/state", "pci");
        assert!(server.next().is_none());
    });
    client.watch("backend/pci", "pci").unwrap();
    let mut events = take(&mut client);
    while events.len() < 2 {
        // Only when there was nothing left to take: the first may have come with the reply.
        let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1));
        events.extend(take(&mut client));
    }
    assert_eq!(
        events,
        [
            event("backend/pci", "pci"),
            event("backend/pci/5/0/state", "pci")
        ]
    );
    assert_eq!(client.next_event().unwrap(), None);
    drop(client);
    server.join().unwrap();
}

#[test]
fn events_that_come_before_a_reply_are_kept() {
    let (mut client, server) = connect(|mut server| {
        let request = server.next().unwrap();
        server.event("/a", "one");
        server.event("/a", "two");
        server.event("/a", "one");
        server.reply(&request, b"value");
        server.event("/b", "one");
        server.serve(MessageType::Read, 0, "/y\0", "");
    });
    assert_eq!(client.read("/x").unwrap(), b"value");
    client.read("/y").unwrap();
    server.join().unwrap();
    let mut events = vec![];
    while let Ok(Some(event)) = client.next_event() {
        events.push(event);
    }
    assert_eq!(
        events,
        [event("/a", "one"), event("/a", "two"), event("/b", "one")]
    );
}

#[test]
fn a_storm_costs_no_memory_and_hides_nothing() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Watch, 0, "/guest\0stormy\0", "OK\0");
        server.serve(MessageType::Watch, 0, "/other\0quiet\0", "OK\0");
        let request = server.next().unwrap();
        for number in 0..20_000 {
            server.event(&format!("/guest/{number}"), "stormy");
        }
        server.event("/other/x", "quiet");
        server.event("/elsewhere", "nobody's");
        server.ok(&request);
        assert!(server.next().is_none());
    });
    client.watch("/guest", "stormy").unwrap();
    client.watch("/other", "quiet").unwrap();
    client.write("/x", "").unwrap();
    let events = take(&mut client);
    assert_eq!(events.len(), EVENTS_KEPT + 2);
    assert_eq!(
        events[EVENTS_KEPT - 1],
        event(&format!("/guest/{}", EVENTS_KEPT - 1), "stormy")
    );
    assert_eq!(
        events[EVENTS_KEPT..],
        [event("/guest", "stormy"), event("/other", "quiet")]
    );
    drop(client);
    server.join().unwrap();
}

#[test]
fn after_unwatch_nothing_comes_any_more() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Watch, 0, "/a\0a\0", "OK\0");
        server.serve(MessageType::Watch, 0, "/b\0b\0", "OK\0");
        let request = server.expect(MessageType::Unwatch, 0, "/a\0a\0");
        server.event("/a/x", "a");
        server.event("/b/x", "b");
        server.ok(&request);
        assert!(server.next().is_none());
    });
    client.watch("/a", "a").unwrap();
    client.watch("/b", "b").unwrap();
    client.unwatch("/a", "a").unwrap();
    assert_eq!(take(&mut client), [event("/b/x", "b")]);
    drop(client);
    server.join().unwrap();
}

#[test]
fn watches_that_share_a_token_keep_its_events_until_the_last_one_ends() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Watch, 0, "/a\0t\0", "OK\0");
        server.serve(MessageType::Watch, 0, "/b\0t\0", "OK\0");
        let request = server.expect(MessageType::Unwatch, 0, "/a\0t\0");
        server.event("/b/x", "t");
        server.ok(&request);
        assert!(server.next().is_none());
    });
    client.watch("/a", "t").unwrap();
    client.watch("/b", "t").unwrap();
    client.unwatch("/a", "t").unwrap();
    assert_eq!(take(&mut client), [event("/b/x", "t")]);
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_watchs_first_event_is_not_lost_in_a_full_queue() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Watch, 0, "/old\0old\0", "OK\0");
        let request = server.expect(MessageType::Watch, 0, "/new\0new\0");
        for number in 0..EVENTS_KEPT {
            server.event(&format!("/old/{number}"), "old");
        }
        server.event("/new", "new");
        server.ok(&request);
        server.refuse(MessageType::Watch, 0, "/bad\0bad\0", "EINVAL");
        let request = server.expect(MessageType::Read, 0, "/x\0");
        server.event("/bad", "bad");
        server.ok(&request);
        assert!(server.next().is_none());
    });
    client.watch("/old", "old").unwrap();
    client.watch("/new", "new").unwrap();
    client.watch("/bad", "bad").unwrap_err();
    client.read("/x").unwrap();
    let events = take(&mut client);
    assert_eq!(events.len(), EVENTS_KEPT + 1);
    assert_eq!(events.last(), Some(&event("/new", "new")));
    drop(client);
    server.join().unwrap();
}
