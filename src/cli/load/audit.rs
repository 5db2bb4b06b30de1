//! The independent audit: every message that the server said it accepted must reach its recipient exactly once.

/// A growing set of numbers, a bit each.
#[derive(Debug, Default, Clone)]
pub struct Bits(Vec<u64>);

impl Bits {
    /// Adds a number; whether it is new.
    pub fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let fresh = self.0[word] & bit == 0;
        self.0[word] |= bit;
        fresh
    }

    /// Whether it is in.
    pub fn contains(&self, number: u64) -> bool {
        self.0.get((number / 64) as usize).is_some_and(|word| word & 1 << (number % 64) != 0)
    }

    /// How many are in here and not in `other`.
    pub fn without(&self, other: &Self) -> u64 {
        self.0.iter().enumerate().map(|(at, word)| u64::from((word & !other.0.get(at).unwrap_or(&0)).count_ones())).sum()
    }
}

/// Which recipient a sender's messages go to: its own few peers in turn, so that a message's number says everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routes {
    /// Receiving accounts.
    pub recipients: u64,
    /// How many of them each sender writes to.
    pub peers: u64,
    /// Devices of each recipient; each of them gets every message.
    pub devices: u64,
}

impl Routes {
    /// The recipient of a sender's message with this number (from 1).
    pub const fn recipient(&self, sender: u64, number: u64) -> u64 {
        (sender + (number - 1) % self.peers) % self.recipients
    }

    /// Its client message id: grows by one for each pair of sender and recipient, from 1.
    pub const fn message_id(&self, number: u64) -> u64 {
        1 + (number - 1) / self.peers
    }

    /// How far a sender's numbers may run ahead of its oldest unanswered one, so that no pair leaves the server's window of ids.
    pub const fn spread_max(&self) -> u64 {
        (crate::limits::MESSAGE_ID_WINDOW - 2) * self.peers
    }
}

/// What became of every message of a run.
#[derive(Debug)]
pub struct Audit {
    routes: Routes,
    accepted_ids: Vec<Bits>,
    /// Of each sender, one for each device of a recipient.
    received_ids: Vec<Bits>,
    /// Accepted by the server, each message once.
    pub accepted: u64,
    /// Handed to the application of a recipient, each of its devices counted.
    pub delivered: u64,
    /// Handed to it a second time.
    pub duplicates: u64,
    /// Arrived at a device that they were not for, or with other bytes than were sent.
    pub corrupt: u64,
}

impl Audit {
    /// For this many senders.
    pub fn new(senders: usize, routes: Routes) -> Self {
        let (accepted_ids, received_ids) = (vec![Bits::default(); senders], vec![Bits::default(); senders * routes.devices as usize]);
        Self { routes, accepted_ids, received_ids, accepted: 0, delivered: 0, duplicates: 0, corrupt: 0 }
    }

    /// The server said that it is accepted. Answers to repeats count once.
    pub fn accept(&mut self, sender: u64, number: u64) {
        self.accepted += u64::from(self.accepted_ids[sender as usize].insert(number));
    }

    /// The application on a receiving device was handed a message; whether that was right. Devices are counted account by account.
    pub fn receive(&mut self, device: u64, sender: u64, number: u64) -> bool {
        let (recipient, copy) = (device / self.routes.devices, device % self.routes.devices);
        if sender >= self.accepted_ids.len() as u64 || number == 0 || self.routes.recipient(sender, number) != recipient {
            self.corrupt += 1;
            return false;
        }
        let fresh = self.received_ids[(sender * self.routes.devices + copy) as usize].insert(number);
        if fresh {
            self.delivered += 1;
        } else {
            self.duplicates += 1;
        }
        fresh
    }

    /// What of a sender's messages each device of their recipients has received.
    fn received(&self, sender: u64) -> &[Bits] {
        &self.received_ids[(sender * self.routes.devices) as usize..][..self.routes.devices as usize]
    }

    /// Whether a message has arrived at all devices of its recipient.
    pub fn has_received(&self, sender: u64, number: u64) -> bool {
        self.received(sender).iter().all(|received| received.contains(number))
    }

    /// Accepted and not (yet) received, each device counted.
    pub fn missing(&self) -> u64 {
        let of =
            |(sender, accepted): (u64, &Bits)| -> u64 { self.received(sender).iter().map(|received| accepted.without(received)).sum() };
        (0..).zip(&self.accepted_ids).map(of).sum()
    }

    /// The first few that are accepted and not received: sender, recipient, client message id.
    pub fn missing_examples(&self, limit: usize) -> Vec<(u64, u64, u64)> {
        let mut out = Vec::new();
        for (sender, accepted) in (0..).zip(&self.accepted_ids) {
            let numbers = (0..accepted.0.len() as u64 * 64).filter(|&n| accepted.contains(n) && !self.has_received(sender, n));
            for number in numbers {
                if out.len() == limit {
                    return out;
                }
                out.push((sender, self.routes.recipient(sender, number), self.routes.message_id(number)));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const ROUTES: Routes = Routes { recipients: 5, peers: 3, devices: 1 };

    #[test]
    fn ids_of_a_pair_grow_by_one_from_one() {
        let mut last: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for sender in 0..7 {
            for number in 1..=100 {
                let mark = last.entry((sender, ROUTES.recipient(sender, number))).or_default();
                assert_eq!(ROUTES.message_id(number), *mark + 1);
                *mark += 1;
            }
        }
        assert_eq!(last.len(), 7 * 3);
    }

    #[test]
    fn a_pair_stays_within_the_servers_window() {
        for peers in [1, 3, 64] {
            let routes = Routes { recipients: 64, peers, devices: 1 };
            for oldest in 1..=peers {
                let newest = oldest + routes.spread_max();
                assert!(routes.message_id(newest) - routes.message_id(oldest) < crate::limits::MESSAGE_ID_WINDOW - 1);
            }
        }
    }

    #[test]
    fn losses_duplicates_and_strays_are_found() {
        let mut audit = Audit::new(2, ROUTES);
        for number in 1..=200 {
            audit.accept(0, number);
            audit.accept(0, number);
            if number != 150 {
                assert!(audit.receive(ROUTES.recipient(0, number), 0, number));
            }
        }
        assert!(!audit.receive(ROUTES.recipient(0, 7), 0, 7), "twice");
        assert!(!audit.receive(ROUTES.recipient(0, 201) + 1, 0, 201), "at the wrong device");
        assert!(!audit.receive(0, 2, 1), "from nobody");
        // Received before the answer came, and one whose answer never came: neither is lost.
        assert!(audit.receive(ROUTES.recipient(1, 1), 1, 1) && audit.receive(ROUTES.recipient(1, 2), 1, 2));
        audit.accept(1, 1);
        assert_eq!((audit.accepted, audit.delivered, audit.duplicates, audit.corrupt, audit.missing()), (201, 201, 1, 2, 1));
        assert_eq!(audit.missing_examples(10), [(0, ROUTES.recipient(0, 150), ROUTES.message_id(150))]);
    }

    #[test]
    fn a_message_must_reach_every_device_of_its_account_once() {
        let mut audit = Audit::new(1, Routes { recipients: 1, peers: 1, devices: 2 });
        audit.accept(0, 1);
        assert!(audit.receive(0, 0, 1) && !audit.has_received(0, 1));
        assert_eq!((audit.missing(), audit.missing_examples(9)), (1, vec![(0, 0, 1)]));
        assert!(!audit.receive(0, 0, 1) && audit.receive(1, 0, 1));
        assert_eq!((audit.delivered, audit.duplicates, audit.missing()), (2, 1, 0));
    }
}
