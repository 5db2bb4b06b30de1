//! Looks for known plaintexts and keys in everything that a broker keeps and says (G-BLIND).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

/// The shortest thing that can be looked for: chance hits of shorter ones would say nothing.
pub const NEEDLE_BYTES_MIN: usize = 8;

/// Things that must be found nowhere, each as it is and as hex, base64 and UTF-16.
#[derive(Debug, Default)]
pub struct Canary {
    needles: Vec<Vec<u8>>,
    by_start: HashMap<u64, Vec<usize>>,
    /// Low 16 bits of the starts: skips almost every position at the cost of one look.
    starts: Vec<bool>,
}

/// What was looked through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Searched {
    /// Files and other sources.
    pub sources: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How often something was found.
    pub found: u64,
}

impl Canary {
    /// Looks for nothing yet.
    pub fn new() -> Self {
        Self { starts: vec![false; 1 << 16], ..Self::default() }
    }

    /// Adds a secret; one that is too short is refused.
    pub fn add(&mut self, secret: &[u8]) -> bool {
        use base64::Engine as _;
        use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
        if secret.len() < NEEDLE_BYTES_MIN {
            return false;
        }
        self.add_as_is(secret.to_vec());
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        self.add_as_is(hex.to_uppercase().into_bytes());
        self.add_as_is(hex.into_bytes());
        // Base64 of a part of a longer text begins at any of three phases; the first and last characters mix with neighbours.
        for skip in 0..3 {
            let whole = &secret[skip..];
            let whole = &whole[..whole.len() / 3 * 3];
            for text in [STANDARD_NO_PAD.encode(whole), URL_SAFE_NO_PAD.encode(whole)] {
                self.add_as_is(text.into_bytes());
            }
        }
        if let Ok(text) = std::str::from_utf8(secret) {
            self.add_as_is(text.encode_utf16().flat_map(u16::to_le_bytes).collect());
        }
        true
    }

    fn add_as_is(&mut self, needle: Vec<u8>) {
        let Some(start) = needle.first_chunk::<NEEDLE_BYTES_MIN>().map(|start| u64::from_be_bytes(*start)) else { return };
        if self.needles.contains(&needle) {
            return;
        }
        self.starts[(start & 0xffff) as usize] = true;
        self.by_start.entry(start).or_default().push(self.needles.len());
        self.needles.push(needle);
    }

    /// How often anything is in these bytes.
    pub fn count(&self, bytes: &[u8]) -> u64 {
        let (mut found, mut window) = (0, 0u64);
        for (at, &byte) in bytes.iter().enumerate() {
            window = window << 8 | u64::from(byte);
            if at + 1 < NEEDLE_BYTES_MIN || !self.starts[(window & 0xffff) as usize] {
                continue;
            }
            let Some(candidates) = self.by_start.get(&window) else { continue };
            let rest = &bytes[at + 1 - NEEDLE_BYTES_MIN..];
            found += candidates.iter().filter(|&&needle| rest.starts_with(&self.needles[needle])).count() as u64;
        }
        found
    }

    /// Looks through one source.
    pub fn search(&self, bytes: &[u8], searched: &mut Searched) {
        searched.sources += 1;
        searched.bytes += bytes.len() as u64;
        searched.found += self.count(bytes);
    }

    /// Looks through every file below a folder, names of files included.
    pub fn search_folder(&self, folder: &Path, searched: &mut Searched) -> io::Result<()> {
        let entries = match fs::read_dir(folder) {
            // A running store may have just removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            searched.found += self.count(path.as_os_str().as_encoded_bytes());
            if path.is_dir() {
                self.search_folder(&path, searched)?;
            } else if path.is_file() {
                match fs::read(&path) {
                    Ok(bytes) => self.search(&bytes, searched),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    #[test]
    fn secrets_are_found_in_every_coat() {
        let secret = b"meet me at the old mill at nine";
        let mut canary = Canary::new();
        assert!(canary.add(secret) && !canary.add(b"short"));
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let wide: Vec<u8> = "x meet me at the old mill at nine".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut coats = vec![secret.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes(), wide];
        for before in ["", "a", "ab", "abc"] {
            coats.push(STANDARD.encode([before.as_bytes(), secret, b"tail"].concat()).into_bytes());
        }
        for coat in coats {
            assert_eq!(canary.count(&[&[0; 100][..], &coat, b"..."].concat()), 1, "{}", String::from_utf8_lossy(&coat));
        }
        assert_eq!(canary.count(b"meet me at the old mill at ten, or eleven"), 0);
    }

    #[test]
    fn folders_are_walked() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("a/b/c"), b"....the secret word....").unwrap();
        fs::write(folder.path().join("a/d"), b"nothing").unwrap();
        let mut canary = Canary::new();
        canary.add(b"the secret word");
        let mut searched = Searched::default();
        canary.search_folder(folder.path(), &mut searched).unwrap();
        assert_eq!(searched, Searched { sources: 2, bytes: 30, found: 1 });
    }
}
