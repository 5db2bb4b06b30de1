//! The HTTP and WebSocket edge: the only place that knows Axum.
//!
//! | file | holds |
//! |---|---|
//! | `serve` | the accept loop: caps, TLS, time-outs, drain |
//! | `router` | every route, and the layers around them |
//! | `auth` | the device credential of a request; routes are private unless they say otherwise |
//! | `error` | the one error answer and the one mapping of codes to statuses |
//! | `operations` | what every process shows its operators |
//! | `http` | the routes, one file a feature |
//! | `ws` | the device stream |

pub mod accounts;
pub mod auth;
pub mod error;
pub mod extract;
pub mod http;
pub mod limits;
pub mod operations;
pub mod router;
pub mod serve;
pub mod state;
pub mod ws;

pub use operations::Operations;
pub use state::{EdgeState, Health, Parts};
