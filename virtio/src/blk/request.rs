//! Requests (virtio 1.3, section 5.2.6): what they ask for, and the doing of it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::Image;
use super::{Negotiated, Options, SECTOR, feature};
use crate::memory::{Reader, TooShort, Transfer, Writer};
use crate::queue::Chain;
use crate::worker::Handler;

/// The most sectors in one segment of a discard request: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors in one segment of a write-zeroes request: 16 MiB, as the zeroes may have to be
/// written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 15;
/// The most segments in one request of either type.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 32;

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Bytes of the answer to GET_ID.
const ID_LEN: usize = 20;

/// In a write-zeroes segment: the sectors may be given back to the storage.
const UNMAP: u32 = 1;

/// The first part of every request.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// What a discard or write-zeroes request has any number of.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    sector: U64,
    sectors: U32,
    flags: U32,
}

const SEGMENT: usize = size_of::<Segment>();
const _: () = assert!(size_of::<Header>() == 16 && SEGMENT == 16);

/// What the last byte of a request becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<io::Result<()>> for Status {
    fn from(result: io::Result<()>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Self::Unsupported,
            Err(_) => Self::IoError,
        }
    }
}

/// Does what requests say.
pub(super) struct Executor {
    image: Arc<Image>,
    negotiated: Arc<Negotiated>,
    id: [u8; ID_LEN],
    io_uring: bool,
}

impl Executor {
    pub fn new(image: Arc<Image>, negotiated: Arc<Negotiated>, options: &Options) -> Self {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        Self {
            image,
            negotiated,
            id,
            io_uring: options.io_uring,
        }
    }

    /// Also tells how many bytes of `output` were written from its beginning on.
    fn execute(&self, header: &Header, input: Reader<'_>, output: Writer<'_>) -> (Status, usize) {
        let sector = header.sector.get();
        let status = match header.kind.get() {
            IN => self.read(sector, output),
            OUT => self.write(sector, input),
            FLUSH => self.image.flush().into(),
            GET_ID => self.id(output),
            DISCARD if self.negotiated.has(feature::DISCARD) => {
                self.each_segment(input, MAX_DISCARD_SECTORS, 0, |offset, len, _| {
                    self.image.discard(offset, len)
                })
            }
            WRITE_ZEROES if self.negotiated.has(feature::WRITE_ZEROES) => {
                self.each_segment(input, MAX_ZERO_SECTORS, UNMAP, |offset, len, flags| {
                    self.image.write_zeroes(offset, len, flags & UNMAP != 0)
                })
            }
            _ => Status::Unsupported,
        };
        let written = match (header.kind.get(), status) {
            (IN, Status::Ok) => output.len(),
            (GET_ID, Status::Ok) => ID_LEN,
            _ => 0,
        };
        (status, written)
    }

    fn read(&self, sector: u64, output: Writer<'_>) -> Status {
        match self.range(sector, output.len()) {
            Some(offset) => self.image.read(output, offset).into(),
            None => Status::IoError,
        }
    }

    fn write(&self, sector: u64, input: Reader<'_>) -> Status {
        if self.image.is_read_only() {
            return Status::IoError;
        }
        match self.range(sector, input.len()) {
            Some(offset) => self
                .image
                .write(input, offset)
                .and_then(|()| self.write_through())
                .into(),
            None => Status::IoError,
        }
    }

    fn id(&self, mut output: Writer<'_>) -> Status {
        match output.write_all(&self.id) {
            Ok(()) => Status::Ok,
            Err(TooShort) => Status::IoError,
        }
    }

    fn each_segment(
        &self,
        mut input: Reader<'_>,
        max_sectors: u32,
        flags: u32,
        apply: impl Fn(u64, u64, u32) -> io::Result<()>,
    ) -> Status {
        if self.image.is_read_only()
            || input.is_empty()
            || !input.len().is_multiple_of(SEGMENT)
            || input.len() / SEGMENT > MAX_DISCARD_SEGMENTS as usize
        {
            return Status::IoError;
        }
        let mut bytes = [0; SEGMENT];
        while input.read_exact(&mut bytes).is_ok() {
            let segment: Segment = zerocopy::transmute!(bytes);
            let sectors = segment.sectors.get();
            if segment.flags.get() & !flags != 0 {
                return Status::Unsupported;
            }
            let len = u64::from(sectors).saturating_mul(SECTOR);
            let Some(offset) = self.image.range(segment.sector.get(), len) else {
                return Status::IoError;
            };
            if sectors == 0 || sectors > max_sectors {
                return Status::IoError;
            }
            match apply(offset, len, segment.flags.get()).into() {
                Status::Ok => {}
                failed => return failed,
            }
        }
        self.write_through().into()
    }

    /// Where so many bytes begin, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: usize) -> Option<u64> {
        let len = len as u64;
        (len.is_multiple_of(SECTOR) && len > 0).then_some(())?;
        self.image.range(sector, len)
    }

    fn write_through(&self) -> io::Result<()> {
        if self.negotiated.is_writeback() {
            Ok(())
        } else {
            self.image.flush()
        }
    }
}

/// The parts of a request.
struct Request<'a> {
    header: Header,
    input: Reader<'a>,
    output: Writer<'a>,
    /// The last byte, wherever the buffers' borders are.
    status: Writer<'a>,
}

impl<'a> Request<'a> {
    fn of(chain: &'a Chain) -> Result<Self, TooShort> {
        let mut input = chain.reader();
        let mut header = [0; size_of::<Header>()];
        input.read_exact(&mut header)?;
        let mut status = chain.writer();
        let output = status.take(status.len().saturating_sub(1));
        Ok(Self {
            header: zerocopy::transmute!(header),
            input,
            output,
            status,
        })
    }

    /// Tells the driver. `written` bytes of the output were written from its beginning on.
    fn end(mut self, answer: Status, written: usize) -> Result<u32, TooShort> {
        self.status.write_all(&[answer as u8])?;
        // The status counts only where everything before it was written (section 2.7.8.2).
        let status = usize::from(written == self.output.len());
        Ok(u32::try_from(written.saturating_add(status)).unwrap_or(u32::MAX))
    }
}

impl Handler for Executor {
    fn handle(&self, chain: &Chain) -> Result<u32, TooShort> {
        let request = Request::of(chain)?;
        let (answer, written) = self.execute(&request.header, request.input, request.output);
        request.end(answer, written)
    }

    /// What makes the storage write, and wait for that.
    fn takes_long(&self, chain: &Chain) -> bool {
        let Ok(request) = Request::of(chain) else {
            return false;
        };
        match request.header.kind.get() {
            FLUSH | DISCARD | WRITE_ZEROES => true,
            OUT => !self.negotiated.is_writeback(),
            _ => false,
        }
    }

    fn file(&self) -> Option<&File> {
        self.image.file_without_waiting().filter(|_| self.io_uring)
    }

    fn transfer(&self, chain: &Chain) -> Option<Transfer> {
        let request = Request::of(chain).ok()?;
        let sector = request.header.sector.get();
        match request.header.kind.get() {
            IN => {
                let len = request.output.len();
                let offset = self.range(sector, len)?;
                Some(Transfer::Read { len, offset })
            }
            OUT if !self.image.is_read_only() => Some(Transfer::Write {
                skip: size_of::<Header>(),
                offset: self.range(sector, request.input.len())?,
                durable: !self.negotiated.is_writeback(),
            }),
            FLUSH => Some(Transfer::Flush),
            _ => None,
        }
    }

    fn finish(&self, chain: &Chain, transfer: Transfer) -> Result<u32, TooShort> {
        let written = match transfer {
            Transfer::Read { len, .. } => len,
            Transfer::Write { .. } | Transfer::Flush => 0,
        };
        Request::of(chain)?.end(Status::Ok, written)
    }

    fn fail(&self, chain: &Chain) -> Result<u32, TooShort> {
        Request::of(chain)?.end(Status::IoError, 0)
    }
}
