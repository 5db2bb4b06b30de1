//! The HTTP and WebSocket edge: the only place that knows Axum.

pub mod error;
pub mod serve;
