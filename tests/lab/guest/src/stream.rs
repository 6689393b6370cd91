//! How fast a network card is with one TCP connection, once that has gathered speed.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// As much as a segment may have that the card is to cut up, so that it gets such ones.
const PIECE: usize = 64 << 10;

/// Sends to `address` for so long, and as long before; prints how many MiB a second arrived.
pub fn send(address: &str, time: Duration) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    let piece = vec![0x5a; PIECE];
    let mut sent = 0usize;
    measure(time, || {
        stream.write_all(&piece)?;
        sent = sent.saturating_add(PIECE);
        Ok(sent.saturating_sub(waiting(&stream)?))
    })
}

/// Takes what `address` sends, for so long, and as long before; prints how many MiB a second that was.
pub fn receive(address: &str, time: Duration) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    let mut piece = vec![0; PIECE];
    let mut received = 0usize;
    measure(time, || {
        let bytes = stream.read(&mut piece)?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        received = received.saturating_add(bytes);
        Ok(received)
    })
}

/// `step` goes on with the transfer, and says how many bytes have arrived.
fn measure(
    time: Duration,
    mut step: impl FnMut() -> io::Result<usize>,
) -> Result<(), Box<dyn Error>> {
    let mut for_so_long = || {
        let begun = Instant::now();
        loop {
            let arrived = step()?;
            let elapsed = begun.elapsed();
            if elapsed >= time {
                return io::Result::Ok((arrived, elapsed));
            }
        }
    };
    let (before, _) = for_so_long()?;
    let (after, elapsed) = for_so_long()?;
    let mib = after.saturating_sub(before) as f64 / f64::from(1 << 20);
    println!("{:.2}", mib / elapsed.as_secs_f64());
    Ok(())
}

/// Bytes that the other end has not acknowledged (tcp(7), SIOCOUTQ).
fn waiting(stream: &TcpStream) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes an int.
    if unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}
