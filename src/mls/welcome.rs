//! A Welcome (RFC 9420, section 12.4.3.1) cut into one for each device that it invites: each needs its own secret only, and all secrets of
//! a big group are hundreds of kilobytes.
//!
//! ```text
//! MLSMessage:             version 2, wire format 2, Welcome
//! Welcome:                cipher suite 2, EncryptedGroupSecrets<V>, encrypted_group_info<V>
//! EncryptedGroupSecrets:  new_member<V>, kem_output<V>, ciphertext<V>
//! ```
//!
//! A length `<V>` has 1, 2 or 4 bytes, as its first two bits say (section 2.1.2).

use std::collections::BTreeMap;

use crate::limits;

const VERSION: u16 = 1;
const WELCOME: u16 = 3;

/// Not an MLSMessage with a Welcome, larger than one may be, or with two secrets for one KeyPackage. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an MLS message with a Welcome")]
pub struct Invalid;

/// A Welcome and where its parts are; see [`split`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split<'a> {
    /// Version, wire format, cipher suite.
    header: &'a [u8],
    /// Each EncryptedGroupSecrets, by its KeyPackageRef.
    secrets: BTreeMap<&'a [u8], &'a [u8]>,
    /// With its length before it.
    group_info: &'a [u8],
}

/// Finds the parts of a Welcome, without a copy of any.
pub fn split(welcome: &[u8]) -> Result<Split<'_>, Invalid> {
    if welcome.len() > limits::COMMIT_BYTES {
        return Err(Invalid);
    }
    let (header, mut rest) = welcome.split_at_checked(6).ok_or(Invalid)?;
    if header[..2] != VERSION.to_be_bytes() || header[2..4] != WELCOME.to_be_bytes() {
        return Err(Invalid);
    }
    let mut all = vector(&mut rest)?;
    let group_info = rest;
    vector(&mut rest)?;
    if !rest.is_empty() {
        return Err(Invalid);
    }
    let mut secrets = BTreeMap::new();
    while !all.is_empty() {
        let from = all;
        let new_member = vector(&mut all)?;
        // kem_output and ciphertext.
        vector(&mut all)?;
        vector(&mut all)?;
        if secrets.insert(new_member, &from[..from.len() - all.len()]).is_some() {
            return Err(Invalid);
        }
    }
    Ok(Split { header, secrets, group_info })
}

impl Split<'_> {
    /// The KeyPackageRefs of those whom it invites, ascending.
    pub fn refs(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.secrets.keys().copied()
    }

    /// The Welcome for one of them: an MLSMessage.
    pub fn for_ref(&self, key_package_ref: &[u8]) -> Option<Vec<u8>> {
        let secret = self.secrets.get(key_package_ref)?;
        let mut welcome = Vec::with_capacity(self.header.len() + 4 + secret.len() + self.group_info.len());
        welcome.extend_from_slice(self.header);
        put_length(secret.len(), &mut welcome);
        welcome.extend_from_slice(secret);
        welcome.extend_from_slice(self.group_info);
        Some(welcome)
    }
}

/// The next vector's content; `bytes` goes on behind it. A length in more bytes than it needs is refused, as the RFC says.
fn vector<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Invalid> {
    let (first, rest) = bytes.split_first().ok_or(Invalid)?;
    let more = match first >> 6 {
        0 => 0,
        1 => 1,
        2 => 3,
        _ => return Err(Invalid),
    };
    let (low, rest) = rest.split_at_checked(more).ok_or(Invalid)?;
    let length = low.iter().fold(usize::from(first & 0x3f), |length, byte| length << 8 | usize::from(*byte));
    if more != extra_bytes(length) {
        return Err(Invalid);
    }
    let (content, rest) = rest.split_at_checked(length).ok_or(Invalid)?;
    *bytes = rest;
    Ok(content)
}

/// Bytes of a length behind its first one.
const fn extra_bytes(length: usize) -> usize {
    match length {
        0..0x40 => 0,
        0x40..0x4000 => 1,
        _ => 3,
    }
}

/// Lengths here are below those of a commit, so that four bytes are always enough.
fn put_length(length: usize, into: &mut Vec<u8>) {
    let bytes = (length as u32).to_be_bytes();
    let extra = extra_bytes(length);
    let at = into.len();
    into.extend_from_slice(&bytes[3 - extra..]);
    into[at] |= [0x00, 0x40, 0x80, 0x80][extra];
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put_vector(content: &[u8], into: &mut Vec<u8>) {
        put_length(content.len(), into);
        into.extend_from_slice(content);
    }

    /// Of these refs, each with a kem_output and a ciphertext.
    fn welcome(secrets: &[(Vec<u8>, Vec<u8>)], group_info: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        for (new_member, secret) in secrets {
            for part in [new_member, &secret[..secret.len() / 2].to_vec(), &secret[secret.len() / 2..].to_vec()] {
                put_vector(part, &mut all);
            }
        }
        let mut bytes = vec![0, 1, 0, 3, 0, 1];
        put_vector(&all, &mut bytes);
        put_vector(group_info, &mut bytes);
        bytes
    }

    #[test]
    fn the_parts_are_where_the_rfc_puts_them() {
        let bytes = [&[0, 1, 0, 3, 0, 1, 9][..], &[1, 7, 0, 2, 8, 8, 1, 9, 0][..8], &[0, 3, 5, 5, 5]].concat();
        assert_eq!(split(&bytes), Err(Invalid), "a byte too many among the secrets");
        let bytes = [0, 1, 0, 3, 0, 1, 12, 1, 7, 0, 2, 8, 8, 1, 6, 1, 9, 1, 9, 3, 5, 5, 5];
        let parts = split(&bytes).expect("two secrets");
        assert_eq!(parts.refs().collect::<Vec<_>>(), [[6], [7]]);
        assert_eq!(parts.for_ref(&[7]), Some(vec![0, 1, 0, 3, 0, 1, 6, 1, 7, 0, 2, 8, 8, 3, 5, 5, 5]));
        assert_eq!(parts.for_ref(&[6]), Some(vec![0, 1, 0, 3, 0, 1, 6, 1, 6, 1, 9, 1, 9, 3, 5, 5, 5]));
        assert_eq!((parts.for_ref(&[8]), parts.for_ref(&[])), (None, None));
    }

    #[test]
    fn what_is_refused() {
        let good = welcome(&[(vec![1; 32], vec![2; 100]), (vec![3; 32], vec![4; 100])], &[5; 200]);
        assert!(split(&good).is_ok());
        for end in 0..good.len() {
            assert_eq!(split(&good[..end]), Err(Invalid), "cut at {end}");
        }
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            split(&bytes).map(drop)
        };
        assert_eq!(with(&|bytes| bytes.push(0)), Err(Invalid), "a byte too many");
        assert_eq!(with(&|bytes| bytes[1] = 2), Err(Invalid), "another version");
        assert_eq!(with(&|bytes| bytes[3] = 1), Err(Invalid), "another kind of message");
        assert_eq!(with(&|bytes| bytes[6] |= 0xc0), Err(Invalid), "no such length");
        let twice = welcome(&[(vec![1; 32], vec![2; 9]), (vec![1; 32], vec![4; 9])], &[5; 200]);
        assert_eq!(split(&twice), Err(Invalid), "two secrets for one");
        assert_eq!(split(&[0, 1, 0, 3, 0, 1, 0x40, 0, 0]), Err(Invalid), "a length in more bytes than it needs");
        assert_eq!(split(&[0, 1, 0, 3, 0, 1, 0, 0]).map(|parts| parts.refs().len()), Ok(0));
        let mut large = welcome(&[], &vec![5; limits::COMMIT_BYTES - 11]);
        assert_eq!(large.len(), limits::COMMIT_BYTES);
        assert!(split(&large).is_ok());
        large.push(0);
        assert_eq!(split(&large), Err(Invalid));
    }

    proptest! {
        #[test]
        fn each_part_is_a_welcome_with_one_secret(
            secrets in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 0..80), prop::collection::vec(any::<u8>(), 0..400), 0..60),
            group_info in prop::collection::vec(any::<u8>(), 0..20_000),
        ) {
            let secrets: Vec<(Vec<u8>, Vec<u8>)> = secrets.into_iter().collect();
            let bytes = welcome(&secrets, &group_info);
            let parts = split(&bytes).expect("well formed");
            prop_assert!(parts.refs().eq(secrets.iter().map(|(new_member, _)| new_member.as_slice())));
            for one in &secrets {
                let part = parts.for_ref(&one.0).expect("it is there");
                prop_assert_eq!(&part, &welcome(std::slice::from_ref(one), &group_info));
                prop_assert_eq!(split(&part).expect("well formed").for_ref(&one.0), Some(part.clone()));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(rest: Vec<u8>) {
            let bytes = [&[0, 1, 0, 3, 0, 1][..], &rest].concat();
            for bytes in [&rest, &bytes] {
                if let Ok(parts) = split(bytes) {
                    let again: Vec<Vec<u8>> = parts.refs().filter_map(|one| parts.for_ref(one)).collect();
                    prop_assert_eq!(again.len(), parts.refs().len());
                    prop_assert!(again.iter().all(|part| split(part).is_ok()));
                }
            }
        }
    }
}
