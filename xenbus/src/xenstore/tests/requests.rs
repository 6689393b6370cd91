use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use zerocopy::IntoBytes;

use super::server::{Server, connect, name};
use crate::state::XenbusState;
use crate::types::DomId;
use crate::xenstore::wire::{Header, MessageType};
use crate::xenstore::{Access, Client, Error, Perm, Store};

#[test]
fn values_are_any_bytes() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Write, 0, "/a\0\0\u{1}\n", "OK\0");
        let read = server.expect(MessageType::Read, 0, "/a\0");
        server.reply(&read, &[0, 0xff, 0]);
    });
    client.write("/a", [0, 1, b'\n']).unwrap();
    assert_eq!(client.read("/a").unwrap(), [0, 0xff, 0]);
    server.join().unwrap();
}

#[test]
fn each_request_is_written_as_the_protocol_has_it() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Mkdir, 0, "/a\0", "OK\0");
        server.serve(MessageType::Rm, 0, "/a\0", "OK\0");
        server.serve(MessageType::Directory, 0, "/a\0", "x\0y\0");
        server.serve(MessageType::Directory, 0, "/b\0", "");
        server.serve(MessageType::GetPerms, 0, "/a\0", "n0\0b17\0");
        server.serve(MessageType::SetPerms, 0, "/a\0n0\0r5\0", "OK\0");
    });
    client.mkdir("/a").unwrap();
    client.rm("/a").unwrap();
    assert_eq!(client.directory("/a").unwrap(), ["x", "y"]);
    assert!(client.directory("/b").unwrap().is_empty());
    let perm = |domain, access| Perm {
        domain: DomId(domain),
        access,
    };
    let perms = client.get_perms("/a").unwrap();
    assert_eq!(perms, [perm(0, Access::None), perm(17, Access::Both)]);
    client
        .set_perms("/a", &[perm(0, Access::None), perm(5, Access::Read)])
        .unwrap();
    server.join().unwrap();
}

#[test]
fn a_refusal_says_what_and_where() {
    let codes = [
        ("ENOENT", "NotFound"),
        ("EACCES", "Denied"),
        ("EPERM", "Denied"),
        ("EROFS", "Denied"),
        ("EAGAIN", "Again"),
        ("EEXIST", "Exists"),
        ("EINVAL", "Invalid"),
        ("ENOSPC", "NoSpace"),
        ("E2BIG", "TooBig"),
        ("EBUSY", "Refused"),
        ("\u{1b}[31m", "Refused"),
    ];
    let (mut client, server) = connect(move |mut server| {
        for (code, _) in codes {
            server.refuse(MessageType::Read, 0, "/some/node\0", code);
        }
    });
    for (code, variant) in codes {
        let result = client.read("/some/node");
        assert_eq!(name(&result), variant, "{code}");
        let text = result.unwrap_err().to_string();
        assert!(text.contains("READ /some/node"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
    server.join().unwrap();
}

#[test]
fn what_cannot_be_sent_is_refused_here() {
    let (mut client, server) = connect(|mut server| assert!(server.next().is_none()));
    let long = format!("/{}", "x".repeat(3072));
    for path in ["", "/a\0b", &long, &long[1..2050]] {
        assert_eq!(name(&client.read(path)), "Invalid");
    }
    assert_eq!(name(&client.watch("/a", "to\0ken")), "Invalid");
    assert_eq!(name(&client.write("/a", vec![0; 4094])), "TooBig");
    drop(client);
    server.join().unwrap();
}

#[test]
fn numbers_and_states_are_read_strictly() {
    let values = ["42", "+42", "42\n", "", "65536", "\u{1b}"];
    let (mut client, server) = connect(move |mut server| {
        for value in values {
            server.serve(MessageType::Read, 0, "/n\0", value);
        }
        server.serve(MessageType::Read, 0, "/n\0", "65535");
        server.serve(MessageType::Read, 0, "/s\0", "4");
        server.serve(MessageType::Read, 0, "/s\0", "four");
        server.refuse(MessageType::Read, 0, "/s\0", "ENOENT");
        server.refuse(MessageType::Read, 0, "/s\0", "EACCES");
    });
    assert_eq!(client.read_u32("/n").unwrap(), 42);
    for _ in 1..4 {
        assert_eq!(name(&client.read_u32("/n")), "Malformed");
    }
    assert_eq!(name(&client.read_number::<DomId>("/n")), "Malformed");
    let error = client.read_u32("/n").unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, r#""\u{1b}" is not a number"#);
    assert_eq!(client.read_number::<DomId>("/n").unwrap(), DomId(65535));
    assert_eq!(client.read_state("/s").unwrap(), XenbusState::Connected);
    assert_eq!(client.read_state("/s").unwrap(), XenbusState::Unknown);
    assert_eq!(client.read_state("/s").unwrap(), XenbusState::Unknown);
    assert_eq!(name(&client.read_state("/s")), "Denied");
    server.join().unwrap();
}

#[test]
fn a_node_exists_when_it_can_be_read() {
    let (mut client, server) = connect(|mut server| {
        server.serve(MessageType::Read, 0, "/a\0", "");
        server.refuse(MessageType::Read, 0, "/a\0", "ENOENT");
    });
    assert!(client.exists("/a").unwrap());
    assert!(!client.exists("/a").unwrap());
    server.join().unwrap();
}

#[test]
fn a_long_directory_is_read_in_parts() {
    let (mut client, server) = connect(|mut server| {
        server.refuse(MessageType::Directory, 0, "/d\0", "E2BIG");
        server.serve(MessageType::DirectoryPart, 0, "/d\x000\0", "7\0a\0bc\0");
        server.serve(MessageType::DirectoryPart, 0, "/d\x005\0", "7\0d\0\0");
    });
    assert_eq!(client.directory("/d").unwrap(), ["a", "bc", "d"]);
    server.join().unwrap();
}

#[test]
fn a_directory_that_changes_meanwhile_is_read_anew() {
    let (mut client, server) = connect(|mut server| {
        server.refuse(MessageType::Directory, 0, "/d\0", "E2BIG");
        server.serve(MessageType::DirectoryPart, 0, "/d\x000\0", "7\0a\0b\0");
        server.serve(MessageType::DirectoryPart, 0, "/d\x004\0", "8\0c\0\0");
        server.serve(MessageType::DirectoryPart, 0, "/d\x000\0", "8\0a\0");
        server.serve(MessageType::DirectoryPart, 0, "/d\x002\0", "8\0\0");
    });
    assert_eq!(client.directory("/d").unwrap(), ["a"]);
    server.join().unwrap();
}

#[test]
fn a_directory_that_never_stands_still_is_given_up() {
    let (mut client, server) = connect(|mut server| {
        server.refuse(MessageType::Directory, 0, "/d\0", "E2BIG");
        let mut generation = 0;
        while let Some(request) = server.next() {
            generation += 1;
            server.reply(&request, format!("{generation}\0a\0").as_bytes());
        }
    });
    assert_eq!(name(&client.directory("/d")), "Again");
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_part_that_makes_no_sense_is_refused() {
    for part in ["", "7", "7\0", "7\0ab"] {
        let (mut client, server) = connect(move |mut server| {
            server.refuse(MessageType::Directory, 0, "/d\0", "E2BIG");
            server.serve(MessageType::DirectoryPart, 0, "/d\x000\0", part);
        });
        assert_eq!(name(&client.directory("/d")), "Refused", "{part:?}");
        server.join().unwrap();
    }
}

#[test]
fn a_reply_may_come_in_single_bytes() {
    let (mut client, server) = connect(|mut server| {
        let request = server.next().unwrap();
        let header = Header {
            len: 3,
            ..request.header
        };
        for byte in header.as_bytes().iter().chain(b"abc") {
            server.stream.write_all(&[*byte]).unwrap();
            std::thread::yield_now();
        }
    });
    assert_eq!(client.read("/a").unwrap(), b"abc");
    server.join().unwrap();
}

#[test]
fn a_reply_that_comes_too_late_answers_nothing_else() {
    let (mut client, server) = connect(|mut server| {
        let first = server.expect(MessageType::Read, 0, "/slow\0");
        let second = server.expect(MessageType::Read, 0, "/next\0");
        server.reply(&first, b"slow");
        server.reply(&second, b"next");
    });
    client.set_timeout(Duration::from_millis(10));
    let result = client.read("/slow");
    assert_eq!(name(&result), "TimedOut");
    client.set_timeout(Duration::from_secs(10));
    assert_eq!(client.read("/next").unwrap(), b"next");
    server.join().unwrap();
}

#[test]
fn waiting_has_an_end() {
    let (mut client, server) = connect(|mut server| while server.next().is_some() {});
    client.set_timeout(Duration::from_millis(30));
    let begin = Instant::now();
    assert_eq!(name(&client.read("/a")), "TimedOut");
    let waited = begin.elapsed();
    assert!(
        waited >= Duration::from_millis(30) && waited < Duration::from_secs(5),
        "{waited:?}"
    );
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_peer_that_speaks_something_else_is_left() {
    type Answer = fn(&mut Server, &Header);
    let answers: [Answer; 5] = [
        |server, request| server.send(MessageType::Write, request.req_id, b"OK\0"),
        |server, request| server.send(MessageType::Read, request.req_id + 1, b""),
        |server, _| server.send(MessageType::Read, 0, b""),
        |server, _| server.send(MessageType::WatchEvent, 0, b"only a path\0"),
        |server, request| {
            let header = Header {
                len: u32::MAX,
                ..*request
            };
            server.stream.write_all(header.as_bytes()).unwrap();
        },
    ];
    for answer in answers {
        let (mut client, server) = connect(move |mut server| {
            let request = server.next().unwrap();
            answer(&mut server, &request.header);
            assert!(server.next().is_none());
        });
        let result = client.read("/a");
        assert_eq!(name(&result), "Protocol");
        assert!(result.unwrap_err().is_fatal());
        assert_eq!(
            name(&client.read("/a")),
            "Gone",
            "nothing can be sent any more"
        );
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn xenstored_going_away_is_told_with_what_to_do() {
    let (mut client, server) = connect(|mut server| drop(server.next()));
    let error = client.read("/a").unwrap_err();
    assert!(matches!(error, Error::Gone { .. }) && error.is_fatal());
    assert!(
        error
            .to_string()
            .contains("running guests keep their devices"),
        "{error}"
    );
    assert_eq!(name(&client.read("/a")), "Gone");
    assert_eq!(name(&client.next_event()), "Gone");
    server.join().unwrap();
}

#[test]
fn xenstored_going_away_is_noticed_without_a_request() {
    let (mut client, server) = connect(drop);
    server.join().unwrap();
    assert_eq!(name(&client.next_event()), "Gone");
}

#[test]
fn a_missing_xenstored_is_told_with_where_we_looked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let error = Client::connect_to(&path).unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    std::fs::write(&path, "").unwrap();
    assert_eq!(name(&Client::connect_to(&path)), "Unreachable");
}

#[test]
fn a_socket_is_connected_to_by_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut server = Server::new(listener.accept().unwrap().0);
        server.serve(MessageType::Read, 0, "name\0", "Domain-0");
    });
    let mut client = Client::connect_to(&path).unwrap();
    assert_eq!(client.read_string("name").unwrap(), "Domain-0");
    server.join().unwrap();
}

/// A client whose socket is so full with a request that nobody read that a long one only fits in
/// part.
fn with_full_buffer() -> (Client, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    setsockopt(&ours, sockopt::SndBuf, &1).unwrap();
    let mut client = Client::from_stream(ours).unwrap();
    client.set_timeout(Duration::from_millis(1));
    assert_eq!(name(&client.read("/unread")), "TimedOut");
    (client, theirs)
}

#[test]
fn a_request_gets_through_while_xenstored_waits_for_us_to_read() {
    let (mut client, theirs) = with_full_buffer();
    client.set_timeout(Duration::from_secs(10));
    let server = std::thread::spawn(move || {
        let mut server = Server::new(theirs);
        // More than its socket holds: it cannot read until we do.
        for number in 0..10_000 {
            server.event(&format!("/a/{number}"), "token");
        }
        server.expect(MessageType::Read, 0, "/unread\0");
        let request = server.next().unwrap();
        server.ok(&request);
    });
    client.write("/a", [0; 4000]).unwrap();
    server.join().unwrap();
}

#[test]
fn a_request_that_is_cut_off_ends_the_connection() {
    let (mut client, _theirs) = with_full_buffer();
    assert_eq!(name(&client.write("/a", [0; 4000])), "TimedOut");
    assert_eq!(name(&client.read("/a")), "Gone");
}
