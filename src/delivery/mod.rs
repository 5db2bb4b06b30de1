//! One device's session: catch-up, follow, acknowledge; free of any transport.

pub mod api;
pub mod frames;
