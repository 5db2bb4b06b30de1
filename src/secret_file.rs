//! Secrets that the embedded profile makes for itself: files of hexadecimal digits in the data folder, read by nobody but the server's own user.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::clock::Random;

/// Bytes of a secret.
pub const SECRET_BYTES: usize = 32;

/// Why a secret can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file system refused.
    #[error("the secret {path} can't be {doing}: {source}")]
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
        "{0} is not a secret of 64 hexadecimal digits. Remove it and start again: a new one is made, which takes the old one's place from then on"
    )]
    Damaged(PathBuf),
}

/// The secret in this file of the data folder; made if there is none.
pub fn read_or_make(data: &Path, file: &str, random: &dyn Random) -> Result<Zeroizing<Vec<u8>>, SecretError> {
    let path = data.join(file);
    let io = |doing| {
        let path = path.clone();
        move |source| SecretError::Io { doing, path, source }
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let bytes = from_hex(Zeroizing::new(text).trim()).filter(|bytes| bytes.len() == SECRET_BYTES);
            return bytes.ok_or(SecretError::Damaged(path));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read")(error)),
    }
    let mut secret = Zeroizing::new(vec![0; SECRET_BYTES]);
    random.fill(&mut secret);
    write_new(&path, Zeroizing::new(hex(&secret)).as_bytes()).map_err(io("written"))?;
    Ok(secret)
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

fn from_hex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect::<Option<Vec<u8>>>().map(Zeroizing::new)
}
