//! Accounts under a keyed hash whose key changes with time. The derivation is in `schemas/metadata.proto`.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use ring::hmac;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, GroupId};
use crate::limits;

const DAY_MS: u64 = 24 * 3600 * 1000;

/// What all pseudonyms are derived from. Never printed.
#[derive(Clone)]
pub struct SecretKey(Arc<hmac::Key>);

impl SecretKey {
    /// From random bytes, 32 or more.
    pub fn new(secret: &[u8]) -> Self {
        Self(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, secret)))
    }
}

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretKey(…)")
    }
}

/// What a projector needs to make pseudonyms.
#[derive(Debug, Clone)]
pub struct Keys {
    /// The same for all projectors of a broker.
    pub secret: SecretKey,
    /// How long a period is.
    pub rotate_days: u32,
}

impl Keys {
    /// With nothing remembered yet.
    pub fn pseudonyms(&self) -> Pseudonyms {
        Pseudonyms::new(self.secret.clone(), self.rotate_days)
    }
}

/// An account in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// Which key.
    pub key_id: [u8; 8],
    /// The account under it.
    pub pseudonym: [u8; 16],
}

struct Period {
    start: u64,
    id: [u8; 8],
    key: hmac::Key,
    /// A hash costs four times what a look-up does, and the same few people write all the time.
    known: HashMap<AccountId, [u8; 16]>,
    groups: HashMap<GroupId, [u8; 16]>,
}

/// Hides accounts, and remembers those it hid lately.
pub struct Pseudonyms {
    secret: SecretKey,
    rotate_ms: u64,
    /// The two that are in use around a change; the one used last stands first.
    periods: Vec<Period>,
}

impl std::fmt::Debug for Pseudonyms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pseudonyms").field("rotate_ms", &self.rotate_ms).finish_non_exhaustive()
    }
}

/// Periods whose keys are at hand: the present one, and that of messages that were under way when it began.
const PERIODS: usize = 2;

impl Pseudonyms {
    /// With a new key every `rotate_days`.
    pub fn new(secret: SecretKey, rotate_days: u32) -> Self {
        Self { secret, rotate_ms: u64::from(rotate_days.max(1)) * DAY_MS, periods: Vec::new() }
    }

    /// The account as it is called in the period of this time.
    pub fn of(&mut self, account: &AccountId, time: UnixMillis) -> Hidden {
        let period = self.period(time);
        Hidden { key_id: period.id, pseudonym: period.of(account) }
    }

    /// The group as it is called then.
    pub fn of_group(&mut self, group: &GroupId, time: UnixMillis) -> [u8; 16] {
        self.period(time).of_group(group)
    }

    fn period(&mut self, time: UnixMillis) -> &mut Period {
        let start = time.0 - time.0 % self.rotate_ms;
        match self.periods.iter().position(|period| period.start == start) {
            Some(0) => {}
            Some(at) => self.periods.swap(0, at),
            None => {
                self.periods.truncate(PERIODS - 1);
                self.periods.insert(0, Period::new(&self.secret, start));
            }
        }
        &mut self.periods[0]
    }
}

impl Period {
    fn new(secret: &SecretKey, start: u64) -> Self {
        let mut context = hmac::Context::with_key(&secret.0);
        context.update(b"sealpost metadata");
        context.update(&start.to_be_bytes());
        let key = hmac::Key::new(hmac::HMAC_SHA256, context.sign().as_ref());
        let id = first(&hmac::sign(&key, b"key id"));
        Self { start, id, key, known: HashMap::new(), groups: HashMap::new() }
    }

    fn of(&mut self, account: &AccountId) -> [u8; 16] {
        remembered(&mut self.known, account, || hmac::sign(&self.key, account.as_bytes()))
    }

    fn of_group(&mut self, group: &GroupId) -> [u8; 16] {
        remembered(&mut self.groups, group, || {
            let mut context = hmac::Context::with_key(&self.key);
            context.update(b"group");
            context.update(group.as_bytes());
            context.sign()
        })
    }
}

/// What was made of an id before, or is made now.
fn remembered<K: Eq + Hash + Copy>(known: &mut HashMap<K, [u8; 16]>, id: &K, make: impl FnOnce() -> hmac::Tag) -> [u8; 16] {
    if let Some(known) = known.get(id) {
        return *known;
    }
    if known.len() >= limits::METADATA_PSEUDONYMS {
        known.clear();
    }
    let pseudonym = first(&make());
    known.insert(*id, pseudonym);
    pseudonym
}

fn first<const N: usize>(tag: &hmac::Tag) -> [u8; N] {
    tag.as_ref()[..N].try_into().expect("a tag of SHA-256 has 32 bytes, and N is less")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::hex;

    fn some() -> Pseudonyms {
        Pseudonyms::new(SecretKey::new(&[1; 32]), 30)
    }

    /// Made by Python's hmac: `topology/analytics/test_land.py` checks the same numbers.
    #[test]
    fn pseudonyms_are_what_the_schema_says() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../topology/analytics/golden.json")).expect("the vectors are JSON");
        for vector in golden["pseudonyms"].as_array().expect("a list") {
            let account: AccountId = vector["account"].as_str().expect("a text").parse().expect("an account");
            let hidden = some().of(&account, UnixMillis(vector["time_ms"].as_u64().expect("a number")));
            assert_eq!(hex(&hidden.key_id), vector["key_id"], "{vector}");
            assert_eq!(hex(&hidden.pseudonym), vector["pseudonym"], "{vector}");
            let group = GroupId::from_bytes(*account.as_bytes());
            let group = some().of_group(&group, UnixMillis(vector["time_ms"].as_u64().expect("a number")));
            assert_eq!(hex(&group), vector["group"], "the same id, of a group: {vector}");
        }
    }

    #[test]
    fn a_pseudonym_holds_for_its_period_and_no_longer() {
        let mut pseudonyms = some();
        let account = AccountId::from_bytes([9; 16]);
        let start = UnixMillis(600 * 30 * DAY_MS);
        let first = pseudonyms.of(&account, start);
        assert_eq!(pseudonyms.of(&account, UnixMillis(start.0 + 30 * DAY_MS - 1)), first);
        let next = pseudonyms.of(&account, UnixMillis(start.0 + 30 * DAY_MS));
        assert!(next.key_id != first.key_id && next.pseudonym != first.pseudonym);
        assert_eq!(pseudonyms.of(&account, start), first, "messages under way keep theirs");
        assert_ne!(pseudonyms.of(&AccountId::from_bytes([8; 16]), start).pseudonym, first.pseudonym);
        let mut other = Pseudonyms::new(SecretKey::new(&[2; 32]), 30);
        assert_ne!(other.of(&account, start).key_id, first.key_id, "another secret is another key");
    }

    #[test]
    fn what_is_remembered_has_a_cap() {
        let mut pseudonyms = some();
        for number in 0..=limits::METADATA_PSEUDONYMS as u128 {
            pseudonyms.of(&AccountId::from_bytes(number.to_be_bytes()), UnixMillis(1));
        }
        assert_eq!(pseudonyms.periods[0].known.len(), 1);
        for period in 0..10 {
            pseudonyms.of(&AccountId::from_bytes([1; 16]), UnixMillis(period * 30 * DAY_MS));
        }
        assert_eq!(pseudonyms.periods.len(), PERIODS);
    }
}
