//! A group as bytes that stand on the log ([`GroupEventBody::State`](crate::wire::group_event::GroupEventBody::State)): all that a view needs to
//! go on from there without what was before.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version, 1 |
//! | 4, n | length, little endian, and the head as the store keeps it |
//! | 4, n | the same of the roster, the senders' marks, whether the epoch's tree is kept, and the commit's digest, in bincode |
//! | 4, n | the same of the GroupInfo |
//! | rest | the public state, as [`State`](super::saved::State) saves it |

use bytes::Bytes;

use crate::ids::DeviceAddr;
use crate::store::groups::{GroupHead, GroupRoster};
use crate::store::{Mark, StoreError, keyspace};

const VERSION: u8 = 1;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    /// The group, open.
    pub head: GroupHead,
    /// The rest that is small.
    pub members: Members,
    /// The GroupInfo of its epoch.
    pub info: Bytes,
    /// The public state and the epoch's proposals.
    pub snapshot: Bytes,
}

/// What is known of its members.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Members {
    /// Who they are.
    pub roster: GroupRoster,
    /// Which messages of each were seen.
    pub marks: Vec<(DeviceAddr, Mark)>,
    /// Somebody joined in this epoch, who needs its tree.
    pub has_tree: bool,
    /// The digest of the commit that began the epoch.
    pub begun_by: Option<[u8; 32]>,
}

impl Carried {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (head, members) = (keyspace::encode_group_head(&self.head), keyspace::encode(&self.members));
        let mut bytes = Vec::with_capacity(13 + head.len() + members.len() + self.info.len() + self.snapshot.len());
        bytes.push(VERSION);
        for part in [&head[..], &members, &self.info] {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&self.snapshot);
        bytes
    }

    /// From its bytes; what is large shares them.
    pub fn decode(bytes: &Bytes) -> Result<Self, StoreError> {
        let damaged = || StoreError::Corrupt("a group's state on the log is not what was written".to_owned());
        let (&[VERSION], mut rest) = bytes.split_first_chunk().ok_or_else(damaged)? else { return Err(damaged()) };
        let mut part = || -> Result<&[u8], StoreError> {
            let (length, tail) = rest.split_first_chunk().ok_or_else(damaged)?;
            let (part, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(damaged)?;
            rest = tail;
            Ok(part)
        };
        let head = keyspace::decode_group_head(part()?)?;
        let members = keyspace::decode(part()?, "members of a group")?;
        let info = bytes.slice_ref(part()?);
        Ok(Self { head, members, info, snapshot: bytes.slice_ref(rest) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::UnixMillis;
    use crate::ids::{AccountId, DeviceId, Seq};

    fn carried(info: Vec<u8>, snapshot: Vec<u8>) -> Carried {
        let device = DeviceAddr { account: AccountId::from_bytes([3; 16]), device: DeviceId::new(4).expect("valid") };
        let head = GroupHead {
            created: UnixMillis(1),
            epoch: 2,
            head: Seq(3),
            expired_to: Seq(0),
            closed: false,
            gone: vec![],
            edges: vec![],
            snapshot_epoch: 2,
            snapshot_at: Seq(4),
            applied: Seq(5),
            stated: UnixMillis(6),
            stated_at: Seq(7),
        };
        let roster = GroupRoster { epoch: 2, owner: None, admins: vec![], devices: vec![device] };
        let marks = vec![(device, Mark { high: 8, seen: 1, applied: Seq(5) })];
        let members = Members { roster, marks, has_tree: true, begun_by: Some([9; 32]) };
        Carried { head, members, info: info.into(), snapshot: snapshot.into() }
    }

    /// Golden vector: what is on the log must stay readable.
    #[test]
    fn bytes_are_stable() {
        let device = [&[3; 16][..], &[4]].concat();
        let members = [&[1, 2, 0, 0, 1][..], &device, &[1], &device, &[8, 1, 5, 1, 1], &[9; 32]].concat();
        let head = [2, 1, 2, 3, 0, 0, 0, 0, 2, 4, 5, 6, 7];
        let want = [&[1, 13, 0, 0, 0][..], &head, &[members.len() as u8, 0, 0, 0], &members, &[1, 0, 0, 0, b'i'], b"snap"].concat();
        assert_eq!(carried(b"i".to_vec(), b"snap".to_vec()).encode(), want);
    }

    proptest! {
        #[test]
        fn states_survive_the_round_trip(info: Vec<u8>, snapshot: Vec<u8>, cut in 0usize..100) {
            let carried = carried(info, snapshot);
            let bytes = carried.encode();
            let _ = Carried::decode(&Bytes::copy_from_slice(&bytes[..cut.min(bytes.len())]));
            prop_assert_eq!(Carried::decode(&bytes.into()).expect("well formed"), carried);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Carried::decode(&bytes.into());
        }
    }
}
