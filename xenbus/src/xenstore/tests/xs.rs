use std::io::ErrorKind;

use xenstore_rs::Xs;

use super::server::connect;
use crate::xenstore::wire::MessageType;
use crate::xenstore::{Store, XsClient};

/// A program that knows nothing but the trait.
fn rename(store: &impl Xs, from: &str, to: &str) -> std::io::Result<()> {
    store.write(to, &store.read(from)?)?;
    store.rm(from)
}

#[test]
fn a_program_written_for_the_trait_runs_on_our_client() {
    let (client, server) = connect(|mut server| {
        server.serve(MessageType::Read, 0, "/a\0", "value");
        server.serve(MessageType::Write, 0, "/b\0value", "OK\0");
        server.serve(MessageType::Rm, 0, "/a\0", "OK\0");
        server.serve(MessageType::Directory, 0, "/\0", "b\0c\0");
        server.refuse(MessageType::Read, 0, "/a\0", "ENOENT");
        let read = server.expect(MessageType::Read, 0, "/c\0");
        server.reply(&read, b"\xff");
        server.serve(MessageType::Mkdir, 0, "/d\0", "OK\0");
    });
    let store = XsClient::new(client);
    rename(&store, "/a", "/b").unwrap();
    assert_eq!(store.directory("/").unwrap(), ["b".into(), "c".into()]);
    assert_eq!(store.read("/a").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.read("/c").unwrap_err().kind(), ErrorKind::InvalidData);
    store.into_inner().mkdir("/d").unwrap();
    server.join().unwrap();
}
