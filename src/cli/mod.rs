//! One file a subcommand.

pub mod child;
pub mod load;
pub mod token;
