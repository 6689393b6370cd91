//! Capabilities in the kernel's answers: what did not fit into a structure, in a list behind it. Pure.

/// What the kernel says makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "what the kernel says of it is broken at byte {at:#x}, so pcibackd does each access for the guest, which is slow: try another kernel"
)]
pub(super) struct Broken {
    at: usize,
}

/// The pairs of numbers in the capability `id` of an answer, in which `first` is the offset of the first capability (0: none). `None`: there
/// is no such capability.
///
/// # Errors
/// [`Broken`].
pub(super) fn pairs(
    answer: &[u32],
    first: u32,
    id: u32,
) -> Result<Option<Vec<(u64, u64)>>, Broken> {
    let bytes: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut at = usize::try_from(first).unwrap_or(usize::MAX);
    while at != 0 {
        let (found, next) = header(&bytes, at)?;
        if u32::from(found) == id {
            return pairs_at(&bytes, at).map(Some);
        }
        // Capabilities follow each other: what leads back is a loop.
        if next != 0 && next <= at {
            return Err(Broken { at });
        }
        at = next;
    }
    Ok(None)
}

fn part<const N: usize>(bytes: &[u8], at: usize, offset: usize) -> Result<[u8; N], Broken> {
    let from = at.saturating_add(offset);
    bytes
        .get(from..from.saturating_add(N))
        .and_then(|part| part.try_into().ok())
        .ok_or(Broken { at })
}

/// Of a capability: what it is, and where the next one begins.
fn header(bytes: &[u8], at: usize) -> Result<(u16, usize), Broken> {
    let id = u16::from_ne_bytes(part(bytes, at, 0)?);
    let next = u32::from_ne_bytes(part(bytes, at, 4)?);
    Ok((id, usize::try_from(next).map_err(|_| Broken { at })?))
}

fn pairs_at(bytes: &[u8], at: usize) -> Result<Vec<(u64, u64)>, Broken> {
    const COUNT: usize = 8;
    const FIRST: usize = 16;
    const EACH: usize = 16;
    let count = u32::from_ne_bytes(part(bytes, at, COUNT)?);
    let mut found = Vec::new();
    for index in 0..usize::try_from(count).map_err(|_| Broken { at })? {
        let offset = index
            .checked_mul(EACH)
            .and_then(|offset| offset.checked_add(FIRST))
            .ok_or(Broken { at })?;
        let one = u64::from_ne_bytes(part(bytes, at, offset)?);
        let other = u64::from_ne_bytes(part(bytes, at, offset.saturating_add(8))?);
        found.push((one, other));
    }
    Ok(found)
}
