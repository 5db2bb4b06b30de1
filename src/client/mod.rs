//! The client SDK.

pub mod core;
