//! What was sent, and what each device's application was shown: the story's own audit.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::client::core::content::MessageId;
use crate::client::{Client, Event, Status};

/// One text.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its text.
    pub body: String,
    /// The devices that must show it.
    expected: Vec<&'static str>,
    sent: Instant,
    /// Whether its way is worth timing: everybody was there.
    live: bool,
    shown: BTreeMap<&'static str, (u32, Duration)>,
    status: Option<Status>,
}

#[derive(Default)]
struct Pages {
    entries: HashMap<MessageId, Entry>,
    order: Vec<MessageId>,
    /// Shown before `send_text` returned, or by nobody we know.
    early: Vec<(MessageId, &'static str, Instant)>,
    troubles: Vec<String>,
}

/// Shared by everyone in the story.
#[derive(Clone, Default)]
pub struct Book(Arc<Mutex<Pages>>);

/// The sums.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sums {
    /// Texts sent.
    pub sent: u64,
    /// Showings that there must be: one for each other device of the conversation.
    pub expected: u64,
    /// Of these, those that were.
    pub delivered: u64,
    /// Showings too many.
    pub duplicated: u64,
    /// Showings that never were.
    pub lost: u64,
}

impl Book {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A text was sent just now.
    pub fn sent(&self, id: MessageId, body: &str, sent: Instant, expected: &[&'static str], live: bool) {
        let mut pages = self.pages();
        let entry = Entry { body: body.to_owned(), expected: expected.to_vec(), sent, live, shown: BTreeMap::new(), status: None };
        pages.entries.insert(id, entry);
        pages.order.push(id);
        let early = std::mem::take(&mut pages.early);
        for (early_id, device, at) in early {
            pages.show(early_id, device, at);
        }
    }

    /// Writes down what a device's application is shown, until its client closes.
    pub async fn watch(self, client: Arc<Client>, device: &'static str) -> anyhow::Result<()> {
        let mut events = client.events().await?;
        while let Some((position, event)) = events.next().await? {
            self.saw(device, event);
            events.handled(position).await?;
        }
        Ok(())
    }

    fn saw(&self, device: &'static str, event: Event) {
        let mut pages = self.pages();
        match event {
            Event::Message { message_id, .. } => pages.show(message_id, device, Instant::now()),
            Event::Tick { message_id, status, .. } => {
                if let Some(entry) = pages.entries.get_mut(&message_id) {
                    entry.status = entry.status.max(Some(status));
                }
            }
            Event::Failed { reason, .. } => pages.troubles.push(format!("{device}: a text failed: {reason:?}")),
            Event::Undecryptable { .. } => pages.troubles.push(format!("{device}: an envelope could not be decrypted")),
            Event::Gap { .. } => pages.troubles.push(format!("{device}: something was lost on the way")),
            Event::IdentityChanged { .. } => pages.troubles.push(format!("{device}: an identity key changed")),
            _ => {}
        }
    }

    /// What went wrong, in words.
    pub fn troubles(&self) -> Vec<String> {
        let pages = self.pages();
        let strangers = (!pages.early.is_empty()).then(|| format!("{} texts that nobody sent", pages.early.len()));
        pages.troubles.iter().cloned().chain(strangers).collect()
    }

    /// How many of the texts that this device must show it has not shown.
    pub fn missing_at(&self, device: &str) -> usize {
        self.pages().entries.values().filter(|entry| entry.expected.contains(&device) && !entry.shown.contains_key(device)).count()
    }

    /// How many texts have not come this far.
    pub fn below(&self, status: Status) -> usize {
        self.pages().entries.values().filter(|entry| entry.status < Some(status)).count()
    }

    /// The texts that a device was shown, in the order in which they were sent.
    pub fn bodies(&self) -> Vec<String> {
        let pages = self.pages();
        pages.order.iter().filter_map(|id| Some(pages.entries.get(id)?.body.clone())).collect()
    }

    /// Waits until something holds.
    pub async fn wait(&self, what: &str, patience: Duration, holds: impl Fn(&Self) -> bool) -> anyhow::Result<Duration> {
        let began = Instant::now();
        while !holds(self) {
            if began.elapsed() > patience {
                bail!("{what}: not within {patience:?}. {}", self.troubles().join("; "));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(began.elapsed())
    }

    /// The sums so far.
    pub fn sums(&self) -> Sums {
        let pages = self.pages();
        let mut sums = Sums { sent: pages.entries.len() as u64, ..Sums::default() };
        for entry in pages.entries.values() {
            sums.expected += entry.expected.len() as u64;
            for device in &entry.expected {
                match entry.shown.get(device) {
                    Some(_) => sums.delivered += 1,
                    None => sums.lost += 1,
                }
            }
            for (device, (times, _)) in &entry.shown {
                sums.duplicated += u64::from(if entry.expected.contains(device) { times - 1 } else { *times });
            }
        }
        sums
    }

    /// From sent to shown at the devices that were there, fastest first.
    pub fn latencies(&self) -> Vec<Duration> {
        let pages = self.pages();
        let live = pages.entries.values().filter(|entry| entry.live);
        let mut all: Vec<Duration> = live.flat_map(|entry| entry.shown.values().map(|(_, took)| *took).min()).collect();
        all.sort_unstable();
        all
    }
}

impl Pages {
    fn show(&mut self, id: MessageId, device: &'static str, at: Instant) {
        match self.entries.get_mut(&id) {
            Some(entry) => {
                let took = at.saturating_duration_since(entry.sent);
                entry.shown.entry(device).or_insert((0, took)).0 += 1;
            }
            None => self.early.push((id, device, at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: u8) -> Event {
        let account = crate::ids::AccountId::from_bytes([7; 16]);
        Event::Message { conversation: account.into(), author: account, message_id: MessageId([id; 16]), message: None }
    }

    #[test]
    fn losses_and_duplicates_show_in_the_sums() {
        let book = Book::default();
        book.saw("phone", message(1));
        assert_eq!(book.troubles().len(), 1, "nobody sent it, so far");
        for id in 1..=3 {
            book.sent(MessageId([id; 16]), "hi", Instant::now(), &["phone", "laptop"], true);
        }
        for (device, id) in [("laptop", 1), ("phone", 2), ("phone", 2), ("laptop", 2), ("phone", 3)] {
            book.saw(device, message(id));
        }
        let sums = book.sums();
        assert_eq!((sums.sent, sums.expected, sums.delivered, sums.duplicated, sums.lost), (3, 6, 5, 1, 1));
        assert_eq!((book.missing_at("laptop"), book.missing_at("phone"), book.latencies().len()), (1, 0, 3));
        assert!(book.troubles().is_empty());
    }
}
