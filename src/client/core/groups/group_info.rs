//! Taking an extension out of a GroupInfo. openmls makes one list of extensions for the GroupInfo inside a Welcome, which only joiners
//! read, and the one for everybody; the name key belongs into the first alone.

use openmls_traits::signatures::Signer;

use super::Error;

/// `mls10`, then the wire format of a GroupInfo.
const HEADER: [u8; 4] = [0, 1, 0, 4];
const LABEL: &[u8] = b"MLS 1.0 GroupInfoTBS";

/// Reads the structures of RFC 9420 as far as they are needed here.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, length: usize) -> Result<&'b [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(|| Error::invalid("a GroupInfo ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    /// A vector with its length as QUIC writes it, at most 2^30.
    fn vector(&mut self) -> Result<&'b [u8], Error> {
        let first = self.take(1)?[0];
        let more = match first >> 6 {
            0 => 0,
            1 => 1,
            2 => 3,
            _ => return Err(Error::invalid("a GroupInfo has a length that MLS does not know")),
        };
        let length = self.take(more)?.iter().fold(usize::from(first & 0x3f), |length, &byte| (length << 8) | usize::from(byte));
        self.take(length)
    }
}

fn put_vector(into: &mut Vec<u8>, bytes: &[u8]) {
    match bytes.len() {
        length @ 0..0x40 => into.push(length as u8),
        length @ 0x40..0x4000 => into.extend_from_slice(&(length as u16 | 0x4000).to_be_bytes()),
        length => into.extend_from_slice(&(length as u32 | 0x8000_0000).to_be_bytes()),
    }
    into.extend_from_slice(bytes);
}

/// The same GroupInfo (an MLSMessage) without an extension, signed again.
pub(super) fn without(extension: u16, message: &[u8], signer: &impl Signer) -> Result<Vec<u8>, Error> {
    let mut reader = Reader(message);
    if reader.take(4)? != HEADER {
        return Err(Error::invalid("not a GroupInfo"));
    }
    let start = reader.0;
    reader.take(2 + 2)?; // version and suite
    reader.vector()?; // group id
    reader.take(8)?; // epoch
    for _ in 0..3 {
        reader.vector()?; // tree hash, transcript hash, extensions of the GroupContext
    }
    let context = &start[..start.len() - reader.0.len()];
    let (mut all, mut kept) = (Reader(reader.vector()?), Vec::new());
    while !all.0.is_empty() {
        let (kind, data) = (all.take(2)?, all.vector()?);
        if kind != extension.to_be_bytes() {
            kept.extend_from_slice(kind);
            put_vector(&mut kept, data);
        }
    }
    let tag_and_signer = reader.0;
    reader.vector()?;
    reader.take(4)?;
    let tag_and_signer = &tag_and_signer[..tag_and_signer.len() - reader.0.len()];
    let mut to_sign = context.to_vec();
    put_vector(&mut to_sign, &kept);
    to_sign.extend_from_slice(tag_and_signer);
    let mut labelled = Vec::new();
    put_vector(&mut labelled, LABEL);
    put_vector(&mut labelled, &to_sign);
    let signature = signer.sign(&labelled).map_err(|error| Error::Invalid(format!("signing: {error:?}")))?;
    let mut out = HEADER.to_vec();
    out.extend_from_slice(&to_sign);
    put_vector(&mut out, &signature);
    Ok(out)
}
