//! Sealpost: end-to-end encrypted messaging for social platforms.
//!
//! ```text
//! device ──HTTP/WebSocket──▶ edge ──append──▶ log (partitioned by recipient)
//!                             ▲                 │ consumed in order, per partition
//!                             │ push            ▼
//!                             └──────────── projector ──▶ store (what is still pending)
//! ```
//!
//! The tree follows the data. Who may import whom is checked by `tests/layering.rs`:
//!
//! - [`ids`], [`limits`], [`clock`], [`wire`]: words shared by everyone; no I/O.
//! - `mls`: what server and members share of RFC 9420.
//! - `log`, `store`: the two seams where bytes rest; each a trait, a conformance suite and an
//!   embedded implementation. They never import each other.
//! - `projector`: turns log records into the view of what is pending.
//! - `metadata`: what analysts may know of it, ids hidden.
//! - `delivery`: one device's session, free of any transport.
//! - `auth`, `directory`, `keys`: who somebody is, and which keys they publish.
//! - `edge`: Axum only. `server`: the composition root.
//! - `topology`: the topics as an operator wants them, and how a cluster differs.
//! - `traces`: the steps of single messages, by OTLP; off unless a collector is configured.
//! - `client`: the SDK; its `core` does no I/O and also builds for wasm32.

pub mod clock;
pub mod ids;
pub mod limits;
#[cfg(feature = "mls")]
pub mod mls;
pub mod wire;

#[cfg(feature = "server")]
pub mod auth;
#[cfg(feature = "server")]
mod background;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "client-core")]
pub mod client;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod delivery;
#[cfg(feature = "server")]
pub mod directory;
#[cfg(feature = "server")]
pub mod edge;
#[cfg(feature = "server")]
pub mod keys;
#[cfg(feature = "server")]
pub mod log;
#[cfg(feature = "server")]
pub mod metadata;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod projector;
#[cfg(feature = "server")]
pub mod rate;
#[cfg(feature = "server")]
pub mod secret_file;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
pub mod store;
#[cfg(all(feature = "test-util", feature = "cli"))]
pub mod testing;
#[cfg(feature = "cluster")]
pub mod topology;
#[cfg(feature = "server")]
pub mod traces;
#[cfg(feature = "server")]
pub mod waiters;
