//! The projector of groups: checks what is submitted to groups in log order, keeps their public state and items, and tells edges.
//!
//! It has a thread and a consumer group of its own: checking a commit of a big group takes a fifth of a second, which 1:1 must not wait for.

pub mod apply;
pub mod carried;
pub(in crate::projector) mod gone;
pub mod saved;
mod stating;
pub mod worker;
