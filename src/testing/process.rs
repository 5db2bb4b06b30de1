//! The broker as a real process that tests kill.

#[cfg(feature = "cli")]
pub use crate::cli::child::BrokerProcess;
