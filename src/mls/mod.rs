//! What both sides need of MLS (RFC 9420): its cryptography, who a leaf belongs to, and the rules of groups. No I/O, and nothing
//! here holds a private key: the server validates with it, members decide with it.

pub mod credential;
pub mod crypto;
pub mod framing;
pub mod key_package;
pub mod profile;
pub mod public;
pub mod rules;
pub mod sender;
pub mod storage;
pub mod welcome;
