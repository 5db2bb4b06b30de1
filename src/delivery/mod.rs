//! One device's session: catch-up, follow, acknowledge; free of any transport.

pub mod api;
pub mod frames;
pub mod groups;
pub mod hub;
pub mod inbox;
pub mod outbox;
pub mod sending;
pub mod session;
