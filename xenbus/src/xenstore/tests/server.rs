//! The other end of a connection, played by a test line by line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::xenstore::wire::{self, Decoder, Message, MessageType};
use crate::xenstore::{Client, Error};

pub struct Server {
    pub stream: UnixStream,
    decoder: Decoder,
}

/// Connects a client to `script`, which runs on a thread of its own.
pub fn connect(script: impl FnOnce(Server) + Send + 'static) -> (Client, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(theirs);
    let mut client = Client::from_stream(ours).unwrap();
    client.set_timeout(Duration::from_secs(10));
    (client, thread::spawn(move || script(server)))
}

impl Server {
    pub fn new(stream: UnixStream) -> Self {
        let decoder = Decoder::default();
        Self { stream, decoder }
    }

    /// The next request, or `None` when the client has closed.
    pub fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            let mut buffer = [0; 100];
            match self.stream.read(&mut buffer).unwrap() {
                0 => return None,
                count => self.decoder.feed(&buffer[..count]),
            }
        }
    }

    /// The next request, which has to be this one.
    pub fn expect(&mut self, kind: MessageType, tx_id: u32, payload: &str) -> Message {
        let message = self.next().unwrap();
        let text = String::from_utf8_lossy(&message.payload).into_owned();
        assert_eq!((message.kind(), text.as_str()), (Some(kind), payload));
        assert_eq!(message.header.tx_id, tx_id);
        message
    }

    pub fn send(&mut self, kind: MessageType, req_id: u32, payload: &[u8]) {
        let bytes = wire::encode(kind, req_id, 0, &[payload]).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    pub fn reply(&mut self, request: &Message, payload: &[u8]) {
        self.send(request.kind().unwrap(), request.header.req_id, payload);
    }

    pub fn ok(&mut self, request: &Message) {
        self.reply(request, b"OK\0");
    }

    pub fn error(&mut self, request: &Message, code: &str) {
        let payload = format!("{code}\0");
        self.send(
            MessageType::Error,
            request.header.req_id,
            payload.as_bytes(),
        );
    }

    pub fn event(&mut self, path: &str, token: &str) {
        let payload = format!("{path}\0{token}\0");
        self.send(MessageType::WatchEvent, 0, payload.as_bytes());
    }

    /// Expects a request and answers it.
    pub fn serve(&mut self, kind: MessageType, tx_id: u32, payload: &str, answer: &str) {
        let request = self.expect(kind, tx_id, payload);
        self.reply(&request, answer.as_bytes());
    }

    /// Expects a request and refuses it.
    pub fn refuse(&mut self, kind: MessageType, tx_id: u32, payload: &str, code: &str) {
        let request = self.expect(kind, tx_id, payload);
        self.error(&request, code);
    }
}

/// An error's name, for comparisons.
pub fn name<T: std::fmt::Debug>(result: &Result<T, Error>) -> String {
    let text = format!("{:?}", result.as_ref().unwrap_err());
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap()
        .to_owned()
}
