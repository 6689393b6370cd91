//! What the fuzz targets run: each function takes any bytes and must neither panic nor find one of
//! its own assertions wrong.

use std::sync::atomic::{AtomicU8, Ordering};

use zerocopy::{FromBytes, IntoBytes};

use crate::pciif::{LocalPage, PciError, SharedInfo, SharedPage};
use crate::platform::PageMapping;
use crate::xenstore::wire::{Decoder, HEADER_SIZE, Message, PAYLOAD_MAX, WireError, strings};

/// A stream of xenstore messages: it must read the same however it is cut, and hold no more than a
/// message's worth of memory beyond what was fed at once.
pub fn wire_decoder(stream: &[u8]) {
    let whole = decode(stream.chunks(stream.len().max(1)));
    // The first byte says how long the pieces are.
    let length = stream.first().map_or(1, |byte| usize::from(*byte).max(1));
    assert_eq!(decode(stream.chunks(length)), whole);
    for message in whole.0 {
        assert!(message.payload.len() <= PAYLOAD_MAX);
        let text: usize = strings(&message.payload).map(<[u8]>::len).sum();
        assert!(text <= message.payload.len());
    }
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Message>, Option<WireError>) {
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
        assert!(decoder.held() < HEADER_SIZE.saturating_add(PAYLOAD_MAX));
    }
    (messages, None)
}

/// A page with this content as a guest left it: fetching takes it as it is, and an answer changes
/// nothing but the fields that are the backend's.
pub fn shared_page(content: &[u8]) {
    let mut before = [0; 4096];
    for (to, from) in before.iter_mut().zip(content) {
        *to = *from;
    }
    let page = LocalPage::new(before);
    let backend = SharedInfo::new(Box::new(page.clone()));
    let op = backend.fetch();
    assert!(backend.header_matches(&op));
    let answer = backend.take_aer_result();
    assert_eq!(answer.is_none(), backend.aer_pending());

    let vectors: Vec<u16> = content
        .iter()
        .map(|byte| u16::from(*byte) ^ 0xffff)
        .collect();
    backend.publish(
        PciError::OP_FAILED,
        !op.value,
        op.command().map(|_| vectors.as_slice()),
    );
    assert!(!backend.active());

    let Ok((mut expected, _)) = SharedPage::read_from_prefix(&before) else {
        return;
    };
    expected.flags &= !1;
    expected.op.err = PciError::OP_FAILED.0;
    expected.op.value = !op.value;
    if op.command().is_some() {
        for (entry, vector) in expected.op.msix_entries.iter_mut().zip(&vectors) {
            entry.vector = *vector;
        }
    }
    for (to, from) in before.iter_mut().zip(expected.as_bytes()) {
        *to = *from;
    }
    assert_eq!(read(&page), before);
}

fn read(page: &LocalPage) -> [u8; 4096] {
    std::array::from_fn(|offset| {
        // SAFETY: the offset is within the page, which lives as long as it is borrowed.
        unsafe { AtomicU8::from_ptr(page.base().as_ptr().add(offset)) }.load(Ordering::Relaxed)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::xenstore::wire::Header;

    /// Messages with short payloads and, now and then, a header that lies.
    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let len = prop_oneof![9 => 0..40u32, 1 => any::<u32>()];
        let header = (0..24u32, any::<u32>(), any::<u32>(), len);
        let message = (header, prop::collection::vec(any::<u8>(), 0..40));
        prop::collection::vec(message, 0..8).prop_map(|messages| {
            let bytes = messages
                .into_iter()
                .flat_map(|((kind, req_id, tx_id, len), payload)| {
                    let header = Header {
                        kind,
                        req_id,
                        tx_id,
                        len,
                    };
                    [header.as_bytes(), &payload].concat()
                });
            bytes.collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_decode_to_messages_or_to_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            messages in stream(),
        ) {
            wire_decoder(&bytes);
            wire_decoder(&messages);
        }

        #[test]
        fn any_page_is_fetched_and_answered(content in prop::collection::vec(any::<u8>(), 0..600)) {
            shared_page(&content);
        }
    }
}
