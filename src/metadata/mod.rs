//! The topic `metadata`: what analysts may know. `schemas/metadata.proto` is its contract.
//!
//! ```text
//! event at a position ──▶ steps (`step`, pure) ──▶ records, ids hidden (`record`, `pseudonym`) ──▶ batches (`recorder`) ──▶ log
//! ```
//!
//! Everything in a record follows from the event, its position and the secret: whoever applies the same log again
//! makes the same records with the same event ids.

use std::path::Path;

use crate::clock::Random;
use crate::secret_file;

pub mod pseudonym;
pub mod record;
pub mod recorder;
pub mod step;
pub mod tail;

pub use pseudonym::{Keys, Pseudonyms, SecretKey};
pub use recorder::Recorder;
pub use step::Step;

pub use crate::secret_file::{SecretError, hex};

/// The embedded profile's own secret, in the data folder.
pub const SECRET_FILE: &str = "metadata.secret";
/// The secret in the data folder; made if there is none. It is read by nobody but the server's own user.
pub fn secret_of_folder(data: &Path, random: &dyn Random) -> Result<SecretKey, SecretError> {
    Ok(SecretKey::new(&secret_file::read_or_make(data, SECRET_FILE, random)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;
    use crate::clock::UnixMillis;
    use crate::ids::AccountId;

    #[test]
    fn a_folder_keeps_its_secret_and_nobody_else_reads_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().expect("a folder");
        let account = AccountId::from_bytes([7; 16]);
        let pseudonym = |seed| {
            let secret = secret_of_folder(dir.path(), &SeededRandom::new(seed)).expect("a secret");
            Pseudonyms::new(secret, 30).of(&account, UnixMillis(5)).pseudonym
        };
        let first = pseudonym(1);
        assert_eq!(pseudonym(2), first, "the second start reads it");
        let path = dir.path().join(SECRET_FILE);
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "0123").expect("writes");
        assert!(matches!(secret_of_folder(dir.path(), &SeededRandom::new(1)), Err(SecretError::Damaged(_))));
        std::fs::remove_file(&path).expect("removes");
        assert_ne!(pseudonym(3), first, "a new secret, other pseudonyms");
    }
}
