use super::server::{Server, connect, name};
use crate::state::XenbusState;
use crate::xenstore::wire::MessageType;
use crate::xenstore::{Error, Store, Switched, TRANSACTION_TRIES};

fn start(server: &mut Server, id: u32) {
    server.serve(MessageType::TransactionStart, 0, "\0", &format!("{id}\0"));
}

fn commit(server: &mut Server, id: u32) {
    server.serve(MessageType::TransactionEnd, id, "T\0", "OK\0");
}

fn abort(server: &mut Server, id: u32) {
    server.serve(MessageType::TransactionEnd, id, "F\0", "OK\0");
}

#[test]
fn requests_in_a_transaction_carry_its_number() {
    let (mut client, server) = connect(|mut server| {
        start(&mut server, 77);
        server.serve(MessageType::Read, 77, "/n\0", "4");
        server.serve(MessageType::Write, 77, "/n\x005", "OK\0");
        commit(&mut server, 77);
        server.serve(MessageType::Read, 0, "/n\0", "5");
    });
    let before = client.transaction(|transaction| {
        let number = transaction.read_u32("/n")?;
        transaction.write("/n", (number + 1).to_string())?;
        Ok(number)
    });
    assert_eq!(before.unwrap(), 4);
    assert_eq!(client.read_u32("/n").unwrap(), 5);
    server.join().unwrap();
}

#[test]
fn a_transaction_that_others_disturbed_runs_again() {
    let (mut client, server) = connect(|mut server| {
        for (id, value) in [(1, "10"), (2, "20")] {
            start(&mut server, id);
            server.serve(MessageType::Read, id, "/n\0", value);
            if id == 1 {
                server.refuse(MessageType::TransactionEnd, id, "T\0", "EAGAIN");
            } else {
                commit(&mut server, id);
            }
        }
    });
    assert_eq!(
        client
            .transaction(|transaction| transaction.read_u32("/n"))
            .unwrap(),
        20
    );
    server.join().unwrap();
}

#[test]
fn a_transaction_is_not_tried_for_ever() {
    let (mut client, server) = connect(|mut server| {
        for id in 1.. {
            let Some(request) = server.next() else { break };
            server.reply(&request, format!("{id}\0").as_bytes());
            server.refuse(MessageType::TransactionEnd, id, "T\0", "EAGAIN");
        }
    });
    let mut tries = 0;
    let result = client.transaction(|_| {
        tries += 1;
        Ok(())
    });
    assert_eq!(
        (name(&result).as_str(), tries),
        ("Again", TRANSACTION_TRIES)
    );
    drop(client);
    server.join().unwrap();
}

#[test]
fn an_error_aborts_and_is_given_back() {
    let (mut client, server) = connect(|mut server| {
        start(&mut server, 3);
        server.serve(MessageType::Write, 3, "/a\0x", "OK\0");
        server.refuse(MessageType::Read, 3, "/b\0", "ENOENT");
        abort(&mut server, 3);
    });
    let result = client.transaction(|transaction| {
        transaction.write("/a", "x")?;
        transaction.read("/b")
    });
    assert!(matches!(result, Err(Error::NotFound(request)) if request.path == "/b"));
    server.join().unwrap();
}

#[test]
fn a_transaction_without_a_number_is_no_transaction() {
    for answer in ["0\0", "x\0", ""] {
        let (mut client, server) = connect(move |mut server| {
            server.serve(MessageType::TransactionStart, 0, "\0", answer);
        });
        assert_eq!(name(&client.transaction(|_| Ok(()))), "Protocol");
        server.join().unwrap();
    }
}

/// What `switch_state` from Connected to Closing does when the node holds `stored`.
fn switch(stored: Option<&'static str>, written: bool) -> Switched {
    let (mut client, server) = connect(move |mut server| {
        start(&mut server, 9);
        match stored {
            Some(value) => server.serve(MessageType::Read, 9, "/be/state\0", value),
            None => server.refuse(MessageType::Read, 9, "/be/state\0", "ENOENT"),
        }
        if written {
            server.serve(MessageType::Write, 9, "/be/state\x005", "OK\0");
        }
        commit(&mut server, 9);
    });
    let (from, to) = (XenbusState::Connected, XenbusState::Closing);
    let switched = client.switch_state("/be", from, to).unwrap();
    server.join().unwrap();
    switched
}

#[test]
fn a_state_is_written_over_the_one_that_it_follows() {
    assert_eq!(switch(Some("4"), true), Switched::Written);
}

#[test]
fn a_state_that_is_there_already_is_not_written() {
    assert_eq!(switch(Some("5"), false), Switched::Already);
}

#[test]
fn a_removed_device_does_not_come_back() {
    assert_eq!(switch(None, false), Switched::Vanished);
}

#[test]
fn what_somebody_else_has_written_since_is_left_alone() {
    assert_eq!(switch(Some("1"), false), Switched::Overtaken);
    assert_eq!(switch(Some("7"), false), Switched::Overtaken);
    assert_eq!(switch(Some(""), false), Switched::Overtaken);
}
