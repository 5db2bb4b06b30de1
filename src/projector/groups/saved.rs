//! A group's public state as bytes: what a projector goes on from that meets the group again.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version, 1 |
//! | 4 | length of the saved epoch, little endian, and the epoch as [`Public`] saves it |
//! | each | a proposal of the epoch: the position of its item (8), its length (4), both little endian, and its bytes |

use crate::clock::Random;
use crate::ids::{GroupId, Seq};
use crate::mls::public::{Public, Refused};

const VERSION: u8 = 1;

/// A group's public state at its epoch.
pub struct State {
    /// The state.
    pub public: Public,
    /// The epoch's beginning, saved.
    saved: Vec<u8>,
    /// Proposals since, where their items stand, and the leaf that each wants removed.
    pub proposals: Vec<(Seq, u32, Vec<u8>)>,
}

impl State {
    /// At the beginning of an epoch.
    pub const fn new(public: Public, saved: Vec<u8>) -> Self {
        Self { public, saved, proposals: Vec::new() }
    }

    /// About how many bytes it costs to hold: the tree as it is used takes about as much again as the saved one.
    pub fn cost(&self) -> usize {
        2 * self.saved.len() + self.proposals.iter().map(|(_, _, bytes)| 64 + bytes.len()).sum::<usize>()
    }

    /// The state's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes =
            Vec::with_capacity(5 + self.saved.len() + self.proposals.iter().map(|(_, _, bytes)| 12 + bytes.len()).sum::<usize>());
        bytes.push(VERSION);
        bytes.extend_from_slice(&(self.saved.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.saved);
        for (at, _, proposal) in &self.proposals {
            bytes.extend_from_slice(&at.0.to_le_bytes());
            bytes.extend_from_slice(&(proposal.len() as u32).to_le_bytes());
            bytes.extend_from_slice(proposal);
        }
        bytes
    }

    /// From its bytes, with the proposals up to `applied`: a crash may have left it ahead of the group's head.
    pub fn decode(id: GroupId, bytes: &[u8], applied: Seq, random: &dyn Random) -> Result<Self, Refused> {
        let damaged = || Refused::Invalid("a saved group is damaged".to_owned());
        let (&[VERSION], rest) = bytes.split_first_chunk().ok_or_else(damaged)? else { return Err(damaged()) };
        let (length, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
        let (saved, mut rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(damaged)?;
        let mut state = Self::new(Public::restore(id, saved)?, saved.to_vec());
        while !rest.is_empty() {
            let (at, tail) = rest.split_first_chunk().ok_or_else(damaged)?;
            let (length, tail) = tail.split_first_chunk().ok_or_else(damaged)?;
            let (proposal, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(damaged)?;
            let at = Seq(u64::from_le_bytes(*at));
            if at <= applied {
                state.propose(at, proposal, random)?;
            }
            rest = tail;
        }
        Ok(state)
    }

    /// Keeps a proposal that was checked before.
    pub fn propose(&mut self, at: Seq, proposal: &[u8], random: &dyn Random) -> Result<(), Refused> {
        let checked = self.public.check_proposal(proposal, random)?;
        let leaf = checked.leaf;
        self.public.keep(checked)?;
        self.proposals.push((at, leaf, proposal.to_vec()));
        Ok(())
    }

    /// Where the removal of a leaf was proposed in this epoch.
    pub fn proposed(&self, leaf: u32) -> Option<Seq> {
        self.proposals.iter().find(|(_, proposed, _)| *proposed == leaf).map(|(at, ..)| *at)
    }
}
