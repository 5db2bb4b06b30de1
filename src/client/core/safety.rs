//! Safety numbers: 60 digits that two people compare to know that nobody sits between them. `docs/safety-numbers.md` says
//! exactly how they come about.

use sha2::{Digest as _, Sha512};

use crate::ids::AccountId;

/// Rounds of SHA-512 for each half: makes searching for keys with a similar number dear.
pub const ROUNDS: u32 = 5_200;
const DOMAIN: &[u8] = b"sealpost safety number v1";

/// The safety number of two accounts with these identity keys of their devices (in any order). Both sides get the same.
pub fn number(one: (AccountId, &[Vec<u8>]), other: (AccountId, &[Vec<u8>])) -> String {
    let mut halves = [half(one.0, one.1), half(other.0, other.1)];
    halves.sort_unstable();
    halves.concat()
}

/// For reading aloud: twelve groups of five digits.
pub fn grouped(number: &str) -> String {
    let groups: Vec<&str> = (0..number.len()).step_by(5).filter_map(|at| number.get(at..(at + 5).min(number.len()))).collect();
    groups.join(" ")
}

/// What a person verified: the identity keys of an account's devices, as one value to compare with later.
pub fn fingerprint(account: AccountId, keys: &[Vec<u8>]) -> String {
    half(account, keys)
}

/// 30 digits for one account.
fn half(account: AccountId, keys: &[Vec<u8>]) -> String {
    let mut sorted: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    sorted.sort_unstable();
    sorted.dedup();
    let keys = sorted.concat();
    let start = Sha512::new().chain_update(DOMAIN).chain_update(account.as_bytes()).chain_update([sorted.len() as u8]);
    let mut hash = start.chain_update(&keys).finalize();
    for _ in 1..ROUNDS {
        hash = Sha512::new().chain_update(hash).chain_update(&keys).finalize();
    }
    let digits =
        hash.chunks_exact(5).take(6).map(|chunk| chunk.iter().fold(0u64, |number, &byte| (number << 8) | u64::from(byte)) % 100_000);
    digits.map(|five| format!("{five:05}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: AccountId = AccountId::from_bytes([0xa1; 16]);
    const BOB: AccountId = AccountId::from_bytes([0xb0; 16]);

    fn key(byte: u8) -> Vec<u8> {
        let mut key = vec![byte; 33];
        key[0] = 5;
        key
    }

    #[test]
    fn both_sides_get_the_same_number() {
        let (alice, bob) = ([key(1)], [key(2), key(3)]);
        let bob_turned = [key(3), key(2)];
        let number = number((ALICE, &alice), (BOB, &bob));
        assert_eq!(number, super::number((BOB, &bob_turned), (ALICE, &alice)));
        assert!(number.len() == 60 && number.bytes().all(|b| b.is_ascii_digit()));
        assert_eq!(grouped(&number).split(' ').count(), 12);
    }

    #[test]
    fn any_other_key_account_or_device_changes_it() {
        let numbers = [
            number((ALICE, &[key(1)]), (BOB, &[key(2)])),
            number((ALICE, &[key(1)]), (BOB, &[key(4)])),
            number((ALICE, &[key(1)]), (BOB, &[key(2), key(4)])),
            number((ALICE, &[key(1)]), (AccountId::from_bytes([9; 16]), &[key(2)])),
            number((ALICE, &[key(2)]), (BOB, &[key(1)])),
        ];
        let distinct: std::collections::BTreeSet<&String> = numbers.iter().collect();
        assert_eq!(distinct.len(), numbers.len());
    }

    /// A golden vector for other implementations; it also stands in docs/safety-numbers.md.
    #[test]
    fn golden() {
        assert_eq!(number((ALICE, &[key(1)]), (BOB, &[key(2), key(3)])), GOLDEN);
    }
    const GOLDEN: &str = "059627618309372967230468789475410923546594157943848841108019";
}
