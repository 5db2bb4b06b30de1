//! The client SDK: an account's device in one SQLite file, its encrypted conversations, and the way to the server.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use sealpost::client::{Client, Event};
//!
//! let token = "a token of the realm's identity provider".to_owned();
//! let alice = Client::register("https://messages.example.org", vec![token], "Pixel", "alice.db").await?;
//! alice.start();
//! alice.send_text("bob@vignette", "Hello!").await?;
//! let mut events = alice.events().await?;
//! while let Some((position, event)) = events.next().await? {
//!     if let Event::Message { message: Some(message), .. } = &event {
//!         println!("{}", message.body.as_deref().unwrap_or_default());
//!     }
//!     events.handled(position).await?;
//! }
//! # Ok(()) }
//! ```
//!
//! [`core`] is the part without I/O. Everything durable happens in one place, the store's thread, one transaction a step; the
//! network only moves what is in the store, and may stop and start at any time.

pub mod core;

#[cfg(feature = "client")]
mod engine;
#[cfg(feature = "client")]
mod sdk;
#[cfg(feature = "client")]
mod store;
#[cfg(feature = "client")]
mod transport;
#[cfg(feature = "client")]
mod types;

#[cfg(feature = "client")]
pub use sdk::{Client, Environment, Error, Events, IntoRecipient, Invited, dev_token, dev_token_with};
#[cfg(feature = "client")]
pub use store::Error as StoreError;
#[cfg(feature = "client")]
pub use transport::{InvalidCa, PrivateCa};
#[cfg(feature = "client")]
pub use types::{
    Connection, Conversation, ConversationId, Event, Failure, GroupMember, GroupRole, GroupState, GroupSummary, Live, Membership, Message,
    Recipient, SafetyNumber, Status, SyncStatus, Trust,
};
