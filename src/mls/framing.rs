//! Where parts of MLS messages stand (RFC 9420, sections 6, 7.2, 7.6, 12.4 and 12.4.3), for what openmls does not show. Nothing is copied, and
//! nothing here says that a message is valid.

use crate::ids::GroupId;

/// `mls10`, then the wire format of a PublicMessage.
const PUBLIC_MESSAGE: [u8; 4] = [0, 1, 0, 1];
/// The same of a PrivateMessage.
const PRIVATE_MESSAGE: [u8; 4] = [0, 1, 0, 2];
/// The same of a GroupInfo.
const GROUP_INFO: [u8; 4] = [0, 1, 0, 4];
/// ContentType application and commit.
const APPLICATION: u8 = 1;
const COMMIT: u8 = 3;

/// Bytes that do not have the form that they should have. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an MLS message is malformed")]
pub struct Malformed;

/// Reads a message's parts one after the other.
#[derive(Debug, Clone, Copy)]
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    /// Of a message whose first bytes are these.
    fn of(message: &'b [u8], header: [u8; 4]) -> Result<Self, Malformed> {
        message.strip_prefix(&header).map(Self).ok_or(Malformed)
    }

    fn take(&mut self, length: usize) -> Result<&'b [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(*self.take(8)?.first_chunk().ok_or(Malformed)?))
    }

    /// A vector's content. Its length has 1, 2 or 4 bytes, as its first two bits say (section 2.1.2).
    fn vector(&mut self) -> Result<&'b [u8], Malformed> {
        let first = self.byte()?;
        let more = match first >> 6 {
            0 => 0,
            1 => 1,
            2 => 3,
            _ => return Err(Malformed),
        };
        let length = self.take(more)?.iter().fold(usize::from(first & 0x3f), |length, &byte| (length << 8) | usize::from(byte));
        self.take(length)
    }

    fn vectors(&mut self, count: usize) -> Result<(), Malformed> {
        (0..count).try_for_each(|_| self.vector().map(drop))
    }

    fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed) }
    }

    /// What was read since `start`.
    fn since(self, start: Self) -> &'b [u8] {
        &start.0[..start.0.len() - self.0.len()]
    }
}

/// Appends a vector.
pub fn put_vector(into: &mut Vec<u8>, bytes: &[u8]) {
    match bytes.len() {
        length @ 0..0x40 => into.push(length as u8),
        length @ 0x40..0x4000 => into.extend_from_slice(&(length as u16 | 0x4000).to_be_bytes()),
        length => into.extend_from_slice(&(length as u32 | 0x8000_0000).to_be_bytes()),
    }
    into.extend_from_slice(bytes);
}

/// Whether these bytes are a PrivateMessage with something that a member of this group wrote in this epoch, as far as its head says: the rest
/// is encrypted.
pub fn is_written_in(message: &[u8], group: GroupId, epoch: u64) -> bool {
    let head = || {
        let mut reader = Reader::of(message, PRIVATE_MESSAGE)?;
        let head = (reader.vector()?, reader.take(8)?, reader.byte()?);
        // Authenticated data, encrypted sender data, ciphertext.
        reader.vectors(3)?;
        reader.end()?;
        Ok::<_, Malformed>(head)
    };
    head() == Ok((group.as_bytes(), &epoch.to_be_bytes(), APPLICATION))
}

/// Parts of a commit in a PublicMessage.
#[derive(Debug)]
pub struct CommitParts<'b> {
    /// Keys that others will encrypt to, from its path: the leaf's, then those of the nodes above it. None: it has no path.
    pub path_keys: Vec<&'b [u8]>,
    /// What proves to members that its sender came to the same secrets.
    pub confirmation_tag: &'b [u8],
}

/// Of a commit (an MLSMessage with a PublicMessage).
pub fn commit(message: &[u8]) -> Result<CommitParts<'_>, Malformed> {
    let mut reader = Reader::of(message, PUBLIC_MESSAGE)?;
    reader.vector()?; // group id
    reader.take(8)?; // epoch
    let is_member = match reader.byte()? {
        1 => reader.take(4).map(|_| true)?,
        4 => false,
        _ => return Err(Malformed),
    };
    reader.vector()?; // authenticated data
    if reader.byte()? != COMMIT {
        return Err(Malformed);
    }
    reader.vector()?; // proposals
    let path_keys = match reader.byte()? {
        0 => Vec::new(),
        1 => path_keys(&mut reader)?,
        _ => return Err(Malformed),
    };
    reader.vector()?; // signature
    let confirmation_tag = reader.vector()?;
    if is_member {
        reader.vector()?; // membership tag
    }
    reader.end()?;
    Ok(CommitParts { path_keys, confirmation_tag })
}

/// The keys in an UpdatePath.
fn path_keys<'b>(reader: &mut Reader<'b>) -> Result<Vec<&'b [u8]>, Malformed> {
    let mut keys = vec![leaf(reader)?.key];
    let mut nodes = Reader(reader.vector()?);
    while !nodes.0.is_empty() {
        keys.push(nodes.vector()?);
        nodes.vector()?; // the path secret, encrypted for each of those below
    }
    Ok(keys)
}

/// Parts of a LeafNode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leaf<'b> {
    /// What others encrypt to.
    pub key: &'b [u8],
    /// From and until when it is valid, in seconds since 1970, if it is a KeyPackage's.
    pub lifetime: Option<(u64, u64)>,
}

impl<'b> Leaf<'b> {
    /// Of a LeafNode by itself.
    pub fn parse(bytes: &'b [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let leaf = leaf(&mut reader)?;
        reader.end()?;
        Ok(leaf)
    }
}

fn leaf<'b>(reader: &mut Reader<'b>) -> Result<Leaf<'b>, Malformed> {
    let key = reader.vector()?;
    reader.vector()?; // signature key
    reader.take(2)?; // kind of credential
    reader.vector()?; // credential
    reader.vectors(5)?; // capabilities
    let mut lifetime = None;
    match reader.byte()? {
        // From a KeyPackage.
        1 => lifetime = Some((reader.number()?, reader.number()?)),
        // From an Update.
        2 => {}
        // From a commit: parent hash.
        3 => reader.vectors(1)?,
        _ => return Err(Malformed),
    }
    reader.vectors(2)?; // extensions, signature
    Ok(Leaf { key, lifetime })
}

/// A GroupInfo's parts.
#[derive(Debug, Clone, Copy)]
pub struct GroupInfo<'b> {
    /// The GroupContext.
    pub context: &'b [u8],
    /// The content of its vector of extensions.
    extensions: &'b [u8],
    /// The confirmation tag and the signer, as they stand there.
    tail: &'b [u8],
    /// The confirmation tag of the epoch.
    pub confirmation_tag: &'b [u8],
    /// The leaf that signed it.
    pub signer: u32,
}

impl<'b> GroupInfo<'b> {
    /// Of an MLSMessage.
    pub fn parse(message: &'b [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::of(message, GROUP_INFO)?;
        let start = reader;
        reader.take(2 + 2)?; // version and suite
        reader.vector()?; // group id
        reader.take(8)?; // epoch
        reader.vectors(3)?; // tree hash, transcript hash, extensions of the GroupContext
        let context = reader.since(start);
        let extensions = reader.vector()?;
        let before = reader;
        let confirmation_tag = reader.vector()?;
        let signer = u32::from_be_bytes(*reader.take(4)?.first_chunk().ok_or(Malformed)?);
        let tail = reader.since(before);
        reader.vector()?; // signature
        reader.end()?;
        Ok(Self { context, extensions, tail, confirmation_tag, signer })
    }

    /// The same without an extension, signed with what `sign` makes of the bytes to sign.
    pub fn without<E: From<Malformed>>(&self, extension: u16, sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
        let (mut all, mut kept) = (Reader(self.extensions), Vec::new());
        while !all.0.is_empty() {
            let (kind, data) = (all.take(2)?, all.vector()?);
            if kind != extension.to_be_bytes() {
                kept.extend_from_slice(kind);
                put_vector(&mut kept, data);
            }
        }
        let mut to_sign = self.context.to_vec();
        put_vector(&mut to_sign, &kept);
        to_sign.extend_from_slice(self.tail);
        let mut labelled = Vec::new();
        put_vector(&mut labelled, b"MLS 1.0 GroupInfoTBS");
        put_vector(&mut labelled, &to_sign);
        let signature = sign(&labelled)?;
        let mut out = GROUP_INFO.to_vec();
        out.extend_from_slice(&to_sign);
        put_vector(&mut out, &signature);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GROUP: GroupId = GroupId::from_bytes([7; 16]);

    fn written(group: &[u8], epoch: u64, content_type: u8) -> Vec<u8> {
        let mut message = PRIVATE_MESSAGE.to_vec();
        put_vector(&mut message, group);
        message.extend_from_slice(&epoch.to_be_bytes());
        message.push(content_type);
        for length in [0, 28, 300] {
            put_vector(&mut message, &vec![9; length]);
        }
        message
    }

    #[test]
    fn a_messages_head_says_where_it_belongs() {
        let good = written(&[7; 16], 5, APPLICATION);
        assert!(is_written_in(&good, GROUP, 5));
        assert!(!is_written_in(&good, GROUP, 4));
        assert!(!is_written_in(&good, GroupId::from_bytes([8; 16]), 5));
        assert!(!is_written_in(&written(&[7; 16], 5, COMMIT), GROUP, 5));
        assert!(!is_written_in(&written(&[7; 17], 5, APPLICATION), GROUP, 5));
        assert!(!is_written_in(&good[..good.len() - 1], GROUP, 5));
        assert!(!is_written_in(&[&good[..], &[0]].concat(), GROUP, 5));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 1..5u8) {
            let headed = [&[0, 1, 0, kind][..], &bytes].concat();
            let _ = (is_written_in(&headed, GROUP, 0), commit(&headed).is_ok(), GroupInfo::parse(&headed).is_ok());
        }
    }
}
