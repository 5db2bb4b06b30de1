//! A device of a run that is online: its socket, and what it has had of its group.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::Waker;

use super::reading::Reader;
use crate::cli::load::api::Registered;
use crate::cli::load::socket::Socket;
use crate::cli::load::wire;
use crate::cli::load::ws::{Decoder, Outbox};
use crate::ids::GroupId;

/// A message that was sent and not answered.
pub struct Sent {
    pub number: u64,
    pub at_us: u64,
    pub tried_us: u64,
    pub body: Body,
}

pub enum Body {
    Opaque,
    /// It is being encrypted.
    Awaited,
    /// Its epoch and ciphertext, sent again as they are.
    Real(u64, Vec<u8>),
}

/// Positions of a group that a member was in: behind the first, up to the second.
pub struct Span {
    pub from: u64,
    pub to: Option<u64>,
}

/// One socket's side.
pub struct Feed {
    pub decoder: Decoder,
    pub outbox: Outbox,
    pub hello: bool,
    /// Its device is in the group, as far as it knows.
    pub inside: bool,
    /// The server said that items come by themselves.
    pub follows: bool,
    /// It asked to follow and was told to ask later.
    pub asks: bool,
    /// Items up to here were had, each once.
    pub cursor: u64,
    /// The newest item that came on this stream.
    pub streamed: u64,
    /// The newest item that is known of.
    pub head: u64,
    /// Items that were had.
    pub had: u64,
    pub spans: Vec<Span>,
    pub fetching: bool,
    pub inbox: u64,
    pub acked: u64,
    pub next: u64,
    pub sent: BTreeMap<u64, Sent>,
}

impl Feed {
    pub fn new(key: u64) -> Self {
        Self {
            decoder: Decoder::default(),
            outbox: Outbox::new(key),
            hello: false,
            inside: false,
            follows: false,
            asks: false,
            cursor: 0,
            streamed: 0,
            head: 0,
            had: 0,
            spans: Vec::new(),
            fetching: false,
            inbox: 0,
            acked: 0,
            next: 1,
            sent: BTreeMap::new(),
        }
    }

    pub fn behind(&self, head: u64) -> bool {
        self.inside && self.cursor < head
    }

    /// It was taken out, by the item at this position.
    pub fn leave(&mut self, at: u64) {
        (self.inside, self.follows) = (false, false);
        if let Some(span) = self.spans.last_mut() {
            span.to.get_or_insert(at);
        }
    }

    /// It is in the group from this position on, and follows.
    pub fn enter(&mut self, group: GroupId, seq: u64) {
        self.leave(self.cursor);
        self.inside = true;
        self.spans.push(Span { from: seq, to: None });
        (self.cursor, self.head) = (seq, self.head.max(seq));
        if self.hello {
            self.outbox.message(|out| wire::put_follow(out, group.as_bytes()));
        }
    }
}

/// A device that is online.
pub struct Seat {
    pub registered: Registered,
    pub group: usize,
    /// Its keys, if it reads.
    pub reader: Option<Arc<Reader>>,
    pub source: Option<IpAddr>,
    pub sampled: bool,
    pub feed: RefCell<Feed>,
    pub socket: RefCell<Option<Socket>>,
    pub waker: RefCell<Option<Waker>>,
}
