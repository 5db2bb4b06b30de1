//! What the server sends becomes state, messages and events, in one transaction with the cursor.

use rusqlite::{OptionalExtension as _, params};

use super::outgoing::Sending;
use super::{Db, Error, sql};
use crate::client::core::content::{self, Content, Kind, proto};
use crate::client::core::inbox::{self, Incoming, Received};
use crate::client::core::repair::{self, Asked};
use crate::client::core::{ordering, signal};
use crate::client::types::{Event, Live, Status};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, Seq};
use crate::wire::stream::{Envelope, EnvelopeType, Gap, GapReason, Receipt, ReceiptKind, ServerFrame, server_frame::Frame};

/// What a batch of frames led to, beyond what is in the database.
#[derive(Default)]
pub(in crate::client) struct Processed {
    /// Everything up to here is committed: acknowledge it.
    pub cursor: Seq,
    /// To show now.
    pub live: Vec<Live>,
}

impl Db {
    /// Processes frames in order. An error undoes all of them; the server sends them again.
    pub(in crate::client) fn process(&self, frames: &[ServerFrame]) -> Result<Processed, Error> {
        let mut processed = Processed::default();
        for frame in frames {
            match &frame.frame {
                Some(Frame::Envelope(envelope)) => processed.live.extend(self.envelope(envelope)?),
                Some(Frame::Receipt(receipt)) => self.receipts(receipt)?,
                Some(Frame::Gap(gap)) => self.gap(gap)?,
                Some(Frame::Hello(hello)) => {
                    if let Some(gap) = ordering::hello(self.cursor()?, Seq(hello.cursor)) {
                        self.tell(&Event::Gap { expired: false })?;
                        self.look_for_groups()?;
                        self.pass(gap.to)?;
                    }
                }
                Some(Frame::GroupItem(item)) => self.group_item(item)?,
                Some(Frame::GroupHead(head)) => self.group_followed(head)?,
                // The connection's own business.
                Some(
                    Frame::Result(_)
                    | Frame::QueueEmpty(_)
                    | Frame::PrekeysLow(_)
                    | Frame::KeyPackagesLow(_)
                    | Frame::Closing(_)
                    | Frame::AccountChanged(_),
                )
                | None => {}
            }
        }
        processed.cursor = self.cursor()?;
        Ok(processed)
    }

    fn pass(&self, seq: Seq) -> Result<(), Error> {
        let writes = inbox::pass(&super::state::SqlState(&self.connection), seq)?;
        Ok(super::state::apply(&self.connection, writes, self.now())?)
    }

    fn gap(&self, gap: &Gap) -> Result<(), Error> {
        if ordering::gap(self.cursor()?, Seq(gap.from), Seq(gap.to)).is_some() {
            self.tell(&Event::Gap { expired: gap.reason() == GapReason::GapExpired })?;
            self.look_for_groups()?;
            self.pass(Seq(gap.to))?;
        }
        Ok(())
    }

    fn receipts(&self, receipt: &Receipt) -> Result<(), Error> {
        if !ordering::is_new(self.cursor()?, Seq(receipt.seq)) {
            return Ok(());
        }
        for entry in &receipt.entries {
            let Ok(account) = AccountId::from_slice(&entry.account) else { continue };
            let what = match entry.kind() {
                ReceiptKind::Delivered => Some(Status::Delivered),
                ReceiptKind::Expired => Some(Status::Failed),
                ReceiptKind::Rejected => None,
                ReceiptKind::Unspecified => continue,
            };
            for range in &entry.client_message_ids {
                self.receipt(account, range.first, range.last, what)?;
            }
        }
        self.pass(Seq(receipt.seq))
    }

    fn envelope(&self, envelope: &Envelope) -> Result<Option<Live>, Error> {
        let seq = Seq(envelope.seq);
        let sender = AccountId::from_slice(&envelope.sender_account).ok().zip(DeviceId::new(envelope.sender_device).ok());
        let Some((account, device)) = sender else {
            tracing::warn!("an envelope without a valid sender is dropped");
            return self.pass(seq).map(|()| None);
        };
        let from = DeviceAddr { account, device };
        if envelope.r#type() == EnvelopeType::Mls {
            if ordering::is_new(self.cursor()?, seq) {
                self.invitation(DeviceAddr { account, device }, envelope)?;
                self.pass(seq)?;
            }
            return Ok(None);
        }
        let id = ClientMessageId(envelope.client_message_id);
        let kind = u8::try_from(envelope.r#type).unwrap_or_default();
        let incoming = Incoming { seq, from, client_message_id: id, kind, content: &envelope.content };
        let step = inbox::receive(&super::state::SqlState(&self.connection), incoming, &*self.random)?;
        super::state::apply(&self.connection, step.writes, self.now())?;
        self.identity_news(&step.news)?;
        match step.received {
            Received::Again => Ok(None),
            Received::Content(content) => {
                self.add_device(from)?;
                self.received(from, &content)
            }
            Received::Malformed(reason) => {
                tracing::warn!(reason, "a message that is no content is dropped");
                Ok(None)
            }
            Received::Undecryptable(reason) => {
                tracing::warn!(reason, "a message can't be decrypted");
                let repairable = matches!(envelope.r#type(), EnvelopeType::Whisper | EnvelopeType::Prekey) && !envelope.ephemeral;
                self.undecryptable(from, id, repairable).map(|()| None)
            }
        }
    }

    fn received(&self, from: DeviceAddr, content: &Content) -> Result<Option<Live>, Error> {
        let own = self.own()?;
        if !content.from_identity.is_empty() {
            self.claim(&content.from_identity, from.account)?;
        }
        match &content.kind {
            Some(Kind::Retry(retry)) => {
                if retry.device == u32::from(own.device.get()) {
                    self.repeat(from.account, ClientMessageId(retry.client_message_id))?;
                }
                Ok(None)
            }
            // Only one's own devices are believed about what oneself did, and nothing else of them is.
            Some(Kind::Sent(sent)) if from.account == own.account => self.transcript(own.account, sent).map(|()| None),
            Some(Kind::Sent(_)) => Ok(None),
            _ if from.account == own.account => Ok(None),
            Some(Kind::Typing(typing)) => Ok(Some(Live::Typing { account: from.account, started: typing.started })),
            _ => self.apply(from.account.into(), from.account, content, Status::Delivered).map(|()| None),
        }
    }

    fn transcript(&self, own: AccountId, sent: &proto::SentTranscript) -> Result<(), Error> {
        let destination = content::account(&sent.destination)?;
        if !sent.destination_identity.is_empty() {
            self.claim(&sent.destination_identity, destination)?;
        }
        let Some(inner) = &sent.content else { return Ok(()) };
        self.apply(destination.into(), own, inner, Status::Sent)
    }

    /// Begins anew with the device, and asks it to repeat; both go with the next message to its account.
    fn undecryptable(&self, from: DeviceAddr, id: ClientMessageId, repairable: bool) -> Result<(), Error> {
        let now = self.now();
        let mut select = self.connection.prepare_cached("SELECT since_ms, count FROM asked WHERE account = ?1 AND device = ?2")?;
        let asked = select
            .query_row(params![from.account, from.device], |row| {
                Ok(Asked { since: UnixMillis(sql::uint(row.get(0)?)), count: row.get(1)? })
            })
            .optional()?;
        let again = repair::ask_again(asked.unwrap_or_default(), now).filter(|_| repairable);
        self.tell(&Event::Undecryptable { account: from.account, device: from.device, asked_again: again.is_some() })?;
        let Some(asked) = again else { return Ok(()) };
        let mut upsert = self.connection.prepare_cached("INSERT OR REPLACE INTO asked VALUES (?1, ?2, ?3, ?4)")?;
        upsert.execute(params![from.account, from.device, sql::int(asked.since.0), asked.count])?;
        self.add_device(from)?;
        self.core(|tx| signal::archive_session(tx, from))?;
        let request = content::new(content::retry_request(from.device, id), now, None, &*self.random);
        self.enqueue(from.account, &request, Sending::default()).map(|_| ())
    }
}
