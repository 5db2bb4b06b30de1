//! One envelope from the server becomes at most one content for the application.

use zeroize::Zeroize as _;

use super::content::{self, Content, Kind};
use super::signal;
use super::state::{IdentityNews, StateKey, StateRead, StateTx, StorageError, Writes};
use crate::clock::Random;
use crate::ids::{ClientMessageId, DeviceAddr, Seq};

/// An envelope as it arrives.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'e> {
    /// Its position; 0 if ephemeral.
    pub seq: Seq,
    /// The device that sent it, as the server says. The session proves it.
    pub from: DeviceAddr,
    /// Its sender's id for it.
    pub client_message_id: ClientMessageId,
    /// 2 or 3: what [`signal::decrypt`] knows.
    pub kind: u8,
    /// The ciphertext.
    pub content: &'e [u8],
}

/// What became of an envelope.
#[derive(Debug, Clone, PartialEq)]
pub enum Received {
    /// It, or a copy of its message, was processed before. Show nothing.
    Again,
    /// A content to show.
    Content(Box<Content>),
    /// It can't be decrypted: repair.
    Undecryptable(String),
    /// It was decrypted, but is not a content. Repeating it would not help.
    Malformed(String),
}

/// What to commit after an envelope, in one transaction with whatever the application shows of it.
#[derive(Debug)]
pub struct Step {
    /// What became of it.
    pub received: Received,
    /// The state to write.
    pub writes: Writes,
    /// Identity keys that are new or changed.
    pub news: Vec<IdentityNews>,
}

/// Processes an envelope over this state. Commits nothing itself. An error is the storage's: nothing happened, try again.
pub fn receive(storage: &dyn StateRead, incoming: Incoming<'_>, random: &dyn Random) -> Result<Step, StorageError> {
    let stored = incoming.seq != Seq::ZERO;
    if stored && !super::ordering::is_new(cursor(storage)?, incoming.seq) {
        return Ok(Step { received: Received::Again, writes: Writes::new(), news: Vec::new() });
    }
    let tx = StateTx::new(storage);
    let received = match signal::decrypt(&tx, incoming.from, incoming.kind, incoming.content, random) {
        Ok(mut plaintext) => {
            let content = content::decode(&plaintext);
            plaintext.zeroize();
            match content {
                Ok(content) => first_time(&tx, incoming.from, content)?,
                Err(invalid) => Received::Malformed(invalid.to_string()),
            }
        }
        Err(signal::Error::Storage(error)) => return Err(error),
        Err(error) => {
            // Whatever libsignal wrote until it failed must not be committed.
            let received =
                if matches!(error, signal::Error::Duplicate) { Received::Again } else { Received::Undecryptable(error.to_string()) };
            return Ok(finish(StateTx::new(storage), incoming.seq, received));
        }
    };
    Ok(finish(tx, incoming.seq, received))
}

/// Moves the cursor past something that is not an envelope (a receipt, a gap).
pub fn pass(storage: &dyn StateRead, seq: Seq) -> Result<Writes, StorageError> {
    let tx = StateTx::new(storage);
    if super::ordering::is_new(cursor(storage)?, seq) {
        tx.put(StateKey::Cursor, seq.0.to_be_bytes().to_vec());
    }
    Ok(tx.finish().0)
}

/// The highest seq that was processed.
pub fn cursor(storage: &dyn StateRead) -> Result<Seq, StorageError> {
    let Some(bytes) = storage.get(&StateKey::Cursor)? else { return Ok(Seq::ZERO) };
    let bytes = bytes.as_slice().try_into().map_err(|_| StorageError("the stored cursor is damaged".into()))?;
    Ok(Seq(u64::from_be_bytes(bytes)))
}

fn first_time(tx: &StateTx<'_>, from: DeviceAddr, content: Content) -> Result<Received, StorageError> {
    // Nothing of these is kept, so there is nothing to remember either.
    if matches!(content.kind, Some(Kind::Typing(_))) {
        return Ok(Received::Content(Box::new(content)));
    }
    let Ok(id) = content::id_of(&content) else { return Ok(Received::Malformed("no message id".into())) };
    let seen = StateKey::Seen { author: from.account, message_id: id.0 };
    if tx.get(&seen)?.is_some() {
        return Ok(Received::Again);
    }
    tx.put(seen, Vec::new());
    Ok(Received::Content(Box::new(content)))
}

fn finish(tx: StateTx<'_>, seq: Seq, received: Received) -> Step {
    if seq != Seq::ZERO {
        tx.put(StateKey::Cursor, seq.0.to_be_bytes().to_vec());
    }
    let (writes, news) = tx.finish();
    Step { received, writes, news }
}
