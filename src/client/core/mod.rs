//! The SDK without I/O: sessions, content, ordering, repair. Also builds for wasm32, so that a browser SDK can
//! follow: what touches the world (storage, HTTP, clock, randomness) is a trait.
//!
//! The rule that everything here serves: a message is shown once (G-ONCE). All state that deciding needs (the
//! ratchet, the cursor, the ids seen) is read through one [`state::StateTx`] and written by it, and its owner
//! commits those writes together with what it shows, or nothing at all.

pub mod api;
pub mod content;
pub mod group_api;
pub mod groups;
pub mod inbox;
pub mod keys;
pub mod ordering;
pub mod repair;
pub mod safety;
pub mod signal;
pub mod state;

#[cfg(test)]
mod tests;
