//! Turns the log into the view of what is pending, and tells the edges.

pub mod apply;
pub mod behind;
pub mod directory;
pub mod groups;
pub mod lag;
#[cfg(test)]
mod model;
pub mod push;
pub mod push_topic;
mod recording;
pub mod shadow;
pub mod worker;
