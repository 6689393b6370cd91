//! Requests as no client of ours would send them.

use proptest::prelude::*;

use super::*;

const GUEST: DomId = DomId(5);

fn send(core: &mut Core, id: ConnectionId, kind: u32, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    let len = payload.len().try_into().unwrap();
    let header = Header {
        kind,
        req_id: 1,
        tx_id,
        len,
    };
    core.handle(
        id,
        &Message {
            header,
            payload: payload.to_vec(),
        },
    );
    std::mem::take(core.outbox(id).unwrap())
}

/// A store in which domain 5 has its directory, and dom0 a secret.
fn store() -> (Core, ConnectionId) {
    let mut core = Core::new();
    let dom0 = core.connect(DomId::DOM0);
    let write = MessageType::Write as u32;
    send(
        &mut core,
        dom0,
        write,
        0,
        b"/local/domain/0/backend/pci/5/0/state\x004",
    );
    send(
        &mut core,
        dom0,
        MessageType::Mkdir as u32,
        0,
        b"/local/domain/5\0",
    );
    send(
        &mut core,
        dom0,
        MessageType::SetPerms as u32,
        0,
        b"/local/domain/5\0n5\0",
    );
    let guest = core.connect(GUEST);
    (core, guest)
}

/// Payloads that have a chance to mean something.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let path = prop::sample::select(vec![
        "/local/domain/0/backend/pci/5/0/state",
        "/local/domain/5",
        "/local/domain/5/a",
        "a/b",
        "a",
        "/",
        "/local",
        "@releaseDomain",
        "T",
        "5",
    ]);
    let rest = prop::sample::select(vec!["", "x\0", "x", "b5\0", "n0\0b5\0", "0\0", "0\x001\0"]);
    prop_oneof![
        8 => (path, rest).prop_map(|(path, rest)| [path, "\0", rest].concat().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_sends_it_is_answered_and_what_is_not_its_own_stays(
        requests in prop::collection::vec((0u32..24, 0u32..4, payload()), 0..100)
    ) {
        let (mut core, guest) = store();
        let others = |core: &Core| {
            let own = |path: &String| path::is_at_or_below(path, "/local/domain/5");
            core.values().into_iter().filter(|(path, _)| !own(path)).collect::<Vec<_>>()
        };
        let before = others(&core);
        for (kind, tx_id, payload) in requests {
            prop_assert!(!send(&mut core, guest, kind, tx_id, &payload).is_empty());
        }
        prop_assert_eq!(others(&core), before);
    }
}
