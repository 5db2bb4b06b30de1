//! The routes, one file a feature. A handler reads its input, calls a service, and shapes the answer; no more.

pub mod account;
pub mod blocks;
pub mod devices;
pub mod group_reads;
pub mod groups;
pub mod inbox;
pub mod key_packages;
pub mod keys;
pub mod messages;
pub mod model;
pub mod ops;
pub mod server;
pub mod stream;
