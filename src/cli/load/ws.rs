//! A WebSocket client's framing (RFC 6455), made for a load generator that shares its cores with the server it measures:
//! reads go into one buffer that all connections share, messages are handed out as slices of it, and what is
//! written is masked in place and leaves in one system call.

use super::wire::Malformed;

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A whole binary message.
    Binary(&'a [u8]),
    /// A ping that wants its bytes back.
    Ping(&'a [u8]),
    /// The server closes: its code, 1005 if it gave none.
    Close(u16),
}

const CONTINUATION: u8 = 0;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The largest frame that is taken; the server's own cap is below it.
const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;

struct Header {
    fin: bool,
    opcode: u8,
    header_len: usize,
    payload_len: usize,
}

fn header(bytes: &[u8]) -> Result<Option<Header>, Malformed> {
    let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
    if first & 0x70 != 0 || second & 0x80 != 0 {
        return Err(Malformed("a WebSocket frame with reserved bits, or masked by the server"));
    }
    let (header_len, payload_len) = match second & 0x7f {
        126 => match rest.first_chunk::<2>() {
            Some(len) => (4, u64::from(u16::from_be_bytes(*len))),
            None => return Ok(None),
        },
        127 => match rest.first_chunk::<8>() {
            Some(len) => (10, u64::from_be_bytes(*len)),
            None => return Ok(None),
        },
        len => (2, u64::from(len)),
    };
    let payload_len =
        usize::try_from(payload_len).ok().filter(|&len| len <= FRAME_BYTES_MAX).ok_or(Malformed("a WebSocket frame too large"))?;
    Ok(Some(Header { fin: first & 0x80 != 0, opcode: first & 0x0f, header_len, payload_len }))
}

/// What one connection keeps between two reads: the bytes of a frame that is not complete yet.
#[derive(Debug, Default)]
pub struct Decoder {
    partial: Vec<u8>,
    fragments: Vec<u8>,
}

impl Decoder {
    /// Forgets everything; for a new connection.
    pub fn reset(&mut self) {
        self.partial.clear();
        self.fragments.clear();
    }

    /// Puts the incomplete frame at the front of the shared buffer, makes room behind it, and tells where to read to.
    pub fn prepare(&mut self, scratch: &mut Vec<u8>) -> usize {
        let have = self.partial.len();
        let wanted = header(&self.partial).ok().flatten().map_or(0, |h| h.header_len + h.payload_len);
        let needed = (have + SCRATCH_BYTES / 2).max(wanted + SCRATCH_BYTES / 4).max(SCRATCH_BYTES);
        if scratch.len() < needed {
            scratch.resize(needed, 0);
        }
        scratch[..have].copy_from_slice(&self.partial);
        self.partial.clear();
        have
    }

    /// Takes the buffer's bytes apart and keeps what is incomplete.
    pub fn take(&mut self, mut bytes: &[u8], mut on: impl FnMut(Incoming<'_>) -> Result<(), Malformed>) -> Result<(), Malformed> {
        while let Some(head) = header(bytes)? {
            let Some(payload) = bytes.get(head.header_len..head.header_len + head.payload_len) else { break };
            match head.opcode {
                BINARY if head.fin => on(Incoming::Binary(payload))?,
                BINARY | CONTINUATION => {
                    if self.fragments.len() + payload.len() > FRAME_BYTES_MAX {
                        return Err(Malformed("a WebSocket message too large"));
                    }
                    self.fragments.extend_from_slice(payload);
                    if head.fin {
                        on(Incoming::Binary(&self.fragments))?;
                        self.fragments.clear();
                    }
                }
                PING => on(Incoming::Ping(payload))?,
                PONG => {}
                CLOSE => on(Incoming::Close(payload.first_chunk::<2>().map_or(1005, |code| u16::from_be_bytes(*code))))?,
                _ => return Err(Malformed("a WebSocket frame of an unknown kind")),
            }
            bytes = &bytes[head.header_len + head.payload_len..];
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }
}

/// Size of the shared read buffer: two of the server's frames.
pub const SCRATCH_BYTES: usize = 128 * 1024;

/// What waits to be written on one connection.
#[derive(Debug)]
pub struct Outbox {
    bytes: Vec<u8>,
    written: usize,
    mask: u64,
}

impl Outbox {
    /// Empty; the seed makes the masks.
    pub fn new(seed: u64) -> Self {
        Self { bytes: Vec::new(), written: 0, mask: seed | 1 }
    }

    /// Forgets everything; for a new connection.
    pub fn reset(&mut self) {
        self.bytes.clear();
        self.written = 0;
    }

    /// What is to be written.
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    /// Takes off what was written.
    pub fn advance(&mut self, count: usize) {
        self.written += count;
        if self.written == self.bytes.len() {
            self.reset();
            // A burst must not keep its memory for ever, with 20,000 connections.
            self.bytes.shrink_to(SCRATCH_BYTES);
        }
    }

    /// One binary message, whose payload the closure appends; nothing is sent if it appends nothing.
    pub fn message(&mut self, payload: impl FnOnce(&mut Vec<u8>)) {
        self.frame(BINARY, payload, false);
    }

    /// Gives a ping its bytes back.
    pub fn pong(&mut self, bytes: &[u8]) {
        self.frame(PONG, |out| out.extend_from_slice(bytes), true);
    }

    fn frame(&mut self, opcode: u8, payload: impl FnOnce(&mut Vec<u8>), also_empty: bool) {
        // Most messages have a header of 8 bytes (16-bit length); the others are moved.
        const USUAL: usize = 8;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; USUAL]);
        payload(&mut self.bytes);
        let len = self.bytes.len() - start - USUAL;
        if len == 0 && !also_empty {
            self.bytes.truncate(start);
            return;
        }
        let mut head = [0u8; 14];
        head[0] = 0x80 | opcode;
        let mut used = match len {
            0..126 => {
                head[1] = 0x80 | len as u8;
                2
            }
            126..=0xffff => {
                head[1] = 0x80 | 126;
                head[2..4].copy_from_slice(&(len as u16).to_be_bytes());
                4
            }
            _ => {
                head[1] = 0x80 | 127;
                head[2..10].copy_from_slice(&(len as u64).to_be_bytes());
                10
            }
        };
        let mask = self.next_mask();
        head[used..used + 4].copy_from_slice(&mask);
        used += 4;
        if used == USUAL {
            self.bytes[start..start + USUAL].copy_from_slice(&head[..USUAL]);
        } else {
            self.bytes.splice(start..start + USUAL, head[..used].iter().copied());
        }
        apply_mask(&mut self.bytes[start + used..], mask);
    }

    fn next_mask(&mut self) -> [u8; 4] {
        // xorshift64: masks exist to confuse proxies; against a server of ours they need not be a secret.
        self.mask ^= self.mask << 13;
        self.mask ^= self.mask >> 7;
        self.mask ^= self.mask << 17;
        ((self.mask >> 32) as u32).to_ne_bytes()
    }
}

fn apply_mask(bytes: &mut [u8], mask: [u8; 4]) {
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
    if let Some(tail) = rest.get_mut(4..) {
        for (byte, mask) in tail.iter_mut().zip(mask) {
            *byte ^= mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket};

    use super::*;

    fn by_tungstenite(bytes: Vec<u8>) -> Vec<Message> {
        struct Only(std::io::Cursor<Vec<u8>>);
        impl std::io::Read for Only {
            fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(out)
            }
        }
        impl std::io::Write for Only {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut socket = WebSocket::from_raw_socket(Only(std::io::Cursor::new(bytes)), Role::Server, None);
        std::iter::from_fn(|| socket.read().ok()).collect()
    }

    #[test]
    fn another_implementation_reads_what_is_written() {
        let mut outbox = Outbox::new(7);
        let sizes = [1, 4, 7, 125, 126, 127, 1_000, 65_535, 65_536, 200_001];
        for size in sizes {
            outbox.message(|out| out.extend((0..size).map(|i| i as u8)));
        }
        outbox.message(|_| {});
        let messages = by_tungstenite(outbox.pending().to_vec());
        assert_eq!(messages.len(), sizes.len(), "an empty message is not sent");
        for (message, size) in messages.into_iter().zip(sizes) {
            assert_eq!(message.into_data(), (0..size).map(|i| i as u8).collect::<Vec<_>>());
        }
    }

    fn server_frames(messages: &[Vec<u8>]) -> Vec<u8> {
        let mut socket = WebSocket::from_raw_socket(std::io::Cursor::new(Vec::new()), Role::Server, None);
        for message in messages {
            socket.write(Message::binary(message.clone())).unwrap();
        }
        socket.flush().unwrap();
        socket.get_ref().get_ref().clone()
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..8), cut in 1usize..300) {
            let bytes = server_frames(&messages);
            let (mut decoder, mut scratch, mut got) = (Decoder::default(), Vec::new(), Vec::new());
            for chunk in bytes.chunks(cut) {
                let at = decoder.prepare(&mut scratch);
                scratch[at..at + chunk.len()].copy_from_slice(chunk);
                decoder.take(&scratch[..at + chunk.len()], |incoming| {
                    if let Incoming::Binary(message) = incoming { got.push(message.to_vec()) }
                    Ok(())
                }).unwrap();
            }
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Decoder::default().take(&bytes, |_| Ok(()));
        }
    }

    #[test]
    fn pings_closes_and_fragments_are_understood() {
        let mut seen = Vec::new();
        let bytes = [0x89, 1, b'p', 0x02, 1, b'a', 0x80, 1, b'b', 0x88, 2, 0x0f, 0xa0];
        Decoder::default()
            .take(&bytes, |incoming| {
                seen.push(match incoming {
                    Incoming::Ping(bytes) => format!("ping {bytes:?}"),
                    Incoming::Binary(bytes) => format!("binary {bytes:?}"),
                    Incoming::Close(code) => format!("close {code}"),
                });
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, ["ping [112]", "binary [97, 98]", "close 4000"]);
        assert!(Decoder::default().take(&[0x82, 0x81, 0, 0], |_| Ok(())).is_err(), "a server must not mask");
        assert!(Decoder::default().take(&[0x82, 127, 0, 0, 0, 9, 0, 0, 0, 0], |_| Ok(())).is_err(), "too large");
    }
}
