//! (under construction)

pub mod process;
