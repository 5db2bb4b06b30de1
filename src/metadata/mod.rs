//! The topic `metadata`: what analysts may know. `schemas/metadata.proto` is its contract.
//!
//! ```text
//! event at a position ──▶ steps (`step`, pure) ──▶ records, ids hidden (`record`, `pseudonym`) ──▶ batches (`recorder`) ──▶ log
//! ```
//!
//! Everything in a record follows from the event, its position and the secret: whoever applies the same log again
//! makes the same records with the same event ids.

use std::path::{Path, PathBuf};

use crate::clock::Random;

pub mod pseudonym;
pub mod record;
pub mod recorder;
pub mod step;
pub mod tail;

pub use pseudonym::{Keys, Pseudonyms, SecretKey};
pub use recorder::Recorder;
pub use step::Step;

/// The embedded profile's own secret, in the data folder.
pub const SECRET_FILE: &str = "metadata.secret";
const SECRET_BYTES: usize = 32;

/// Why the secret of the pseudonyms can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file system refused.
    #[error("the secret of the metadata pseudonyms, {path}, can't be {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not what this writes.
    #[error(
        "{0} is not a secret of 64 hexadecimal digits. Remove it and start again: a new one is made, and accounts get new pseudonyms from then on"
    )]
    Damaged(PathBuf),
}

/// The secret in the data folder; made if there is none. It is read by nobody but the server's own user.
pub fn secret_of_folder(data: &Path, random: &dyn Random) -> Result<SecretKey, SecretError> {
    let path = data.join(SECRET_FILE);
    let io = |doing| {
        let path = path.clone();
        move |source| SecretError::Io { doing, path, source }
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let bytes = from_hex(text.trim()).filter(|bytes| bytes.len() == SECRET_BYTES);
            return bytes.map(|bytes| SecretKey::new(&bytes)).ok_or(SecretError::Damaged(path));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read")(error)),
    }
    let mut secret = zeroize::Zeroizing::new([0; SECRET_BYTES]);
    random.fill(&mut *secret);
    write_new(&path, zeroize::Zeroizing::new(hex(&*secret)).as_bytes()).map_err(io("written"))?;
    Ok(SecretKey::new(&*secret))
}

/// Whole or not at all, whatever crashes: half a secret would be taken for damage at the next start.
fn write_new(path: &Path, text: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let new = path.with_extension("tmp");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]).map(char::from).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
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
