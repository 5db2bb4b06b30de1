//! Accepting a `Send`: checks, sealing, and the append that makes it durable. Used by every transport.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use quick_cache::sync::Cache;

use crate::auth::KnownDevice;
use crate::clock::{Clock, Random};
use crate::delivery::api::{OutgoingEnvelope, SendError, SendRequest, Sending};
use crate::directory::{AccountView, Directory};
use crate::ids::{AccountId, DeviceAddr, DeviceId, Offset};
use crate::limits;
use crate::log::{AppendError, AppendSink, EventLog, TopicPartition};
use crate::metrics;
use crate::rate::Keyed;
use crate::store::seal::{self, Sealer};
use crate::store::{DeliveryStore, MarkKey, StoreError};
use crate::traces::{self, Span, Step};
use crate::wire::event::{self, EnvelopesAccepted, flags};
use crate::wire::stream::{Code, EnvelopeType};

/// How long a refused sender should wait where nothing better is known, in milliseconds.
const RETRY_AFTER_MS: u32 = 1_000;
/// How long a sender to a full inbox should wait, in milliseconds.
const INBOX_FULL_RETRY_MS: u32 = 60_000;

/// A send that passed every check: what the log takes.
#[derive(Debug)]
pub struct Checked {
    to: TopicPartition,
    payload: Bytes,
}

/// The one place where messages are accepted.
pub struct Acceptor {
    log: Arc<dyn EventLog>,
    directory: Arc<Directory>,
    delivery: Arc<dyn DeliveryStore>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    rate: Keyed<DeviceAddr>,
    /// The highest client message id of each pair that passed here or, as far as the store said, was applied before: decides what is too old.
    highest: Cache<MarkKey, Arc<AtomicU64>>,
    /// Recipients all of whose marks were read (those not in `highest` did not exist, or were evicted: then the projector refuses what
    /// is too old), and those who have too many for that.
    whole: Cache<AccountId, bool>,
    full: RwLock<HashSet<DeviceAddr>>,
    any_full: AtomicBool,
    behind: AtomicBool,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor(…)")
    }
}

impl Acceptor {
    /// `rate`: messages a second of one device, with a burst of as many; 0 for no limit.
    pub fn new(
        log: Arc<dyn EventLog>,
        directory: Arc<Directory>,
        delivery: Arc<dyn DeliveryStore>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        rate: u32,
    ) -> Self {
        Self {
            log,
            directory,
            delivery,
            clock,
            random,
            rate: Keyed::new(rate, Duration::from_secs(1), rate),
            highest: Cache::new(limits::CACHED_MARKS),
            whole: Cache::new(limits::WHOLE_RECIPIENTS),
            full: RwLock::default(),
            any_full: AtomicBool::new(false),
            behind: AtomicBool::new(false),
        }
    }

    /// The projector says that an inbox is at its cap, or no more.
    pub fn set_full(&self, device: DeviceAddr, full: bool) {
        let mut all = self.full.write();
        if full {
            all.insert(device);
        } else {
            all.remove(&device);
        }
        self.any_full.store(!all.is_empty(), Ordering::Relaxed);
    }

    /// Delivery is too far behind acceptance for more to be taken, or no more.
    pub fn set_behind(&self, behind: bool) {
        self.behind.store(behind, Ordering::Relaxed);
    }

    /// Forgets devices whose rate has recovered; called now and then.
    pub fn tidy(&self) {
        self.rate.tidy();
    }

    /// The recipient's view without waiting, if it is cached.
    pub fn cached(&self, sender: DeviceAddr, request: &SendRequest) -> Option<(Arc<AccountView>, Arc<AtomicU64>)> {
        let view = self.directory.get_cached(&request.recipient)?;
        let highest = self.highest.get(&MarkKey { recipient: request.recipient, sender })?;
        Some((view, highest))
    }

    /// The same from the stores.
    pub async fn load(&self, sender: DeviceAddr, request: &SendRequest) -> Result<(Arc<AccountView>, Arc<AtomicU64>), SendError> {
        let view = self.directory.get(request.recipient).await.map_err(store_failed)?.ok_or(SendError::NotFound)?;
        let key = MarkKey { recipient: request.recipient, sender };
        let highest = match self.highest.get(&key) {
            Some(highest) => highest,
            None => {
                // Nothing depends on it: it only lets an id that is too old be refused at once. Without it the projector, which has every
                // mark, drops what it has seen, and tells the sender by a REJECTED receipt of what is too old to say. So acceptance waits
                // for the log alone.
                let asked = tokio::time::timeout(Duration::from_millis(limits::MARK_WAIT_MS), self.stored_highest(key));
                let stored = match asked.await {
                    Ok(Ok(stored)) => stored,
                    Ok(Err(StoreError::Unavailable(_))) | Err(_) => 0,
                    Ok(Err(error)) => return Err(store_failed(error)),
                };
                self.remember(key, stored)
            }
        };
        Ok((view, highest))
    }

    /// The highest id of a pair that was applied. A recipient's first message reads those of all who wrote to it, so that the next new
    /// sender costs no read.
    async fn stored_highest(&self, key: MarkKey) -> Result<u64, StoreError> {
        let whole = match self.whole.get(&key.recipient) {
            Some(whole) => whole,
            None => {
                let marks = self.delivery.marks_of(key.recipient, limits::WHOLE_MARKS).await?;
                let few = marks.is_some();
                self.whole.insert(key.recipient, few);
                let mut stored = 0;
                for (of, mark) in marks.into_iter().flatten() {
                    self.remember(of, mark.high);
                    stored = if of == key { mark.high } else { stored };
                }
                if few {
                    return Ok(stored);
                }
                false
            }
        };
        if whole {
            return Ok(0);
        }
        let marks = self.delivery.marks(vec![key]).await?;
        Ok(marks.first().copied().flatten().unwrap_or_default().high)
    }

    /// Two loads may race; the first one in wins, so that nobody counts on a copy of his own.
    fn remember(&self, key: MarkKey, stored: u64) -> Arc<AtomicU64> {
        let fresh = || Ok::<_, std::convert::Infallible>(Arc::new(AtomicU64::new(stored)));
        match self.highest.get_or_insert_with(&key, fresh) {
            Ok(highest) => highest,
            Err(never) => match never {},
        }
    }

    /// A message begins; none, unless it is traced.
    pub fn trace(&self) -> Option<Span> {
        traces::accept(self.random.as_ref())
    }

    /// Every check, then the sealed event, which carries the trace if there is one.
    pub fn check(
        &self,
        known: KnownDevice,
        request: &SendRequest,
        view: &AccountView,
        highest: &AtomicU64,
        trace: Option<&Span>,
    ) -> Result<Checked, SendError> {
        let sender = known.addr;
        if self.behind.load(Ordering::Relaxed) {
            return Err(SendError::Unavailable { retry_after_ms: RETRY_AFTER_MS });
        }
        self.rate.check(&sender).map_err(|retry_after_ms| {
            metrics::observe_rate_limited(metrics::RateScope::Messages);
            SendError::RateLimited { retry_after_ms }
        })?;
        let sealer = allowed(sender, request, view)?;
        sizes(request)?;
        if request.client_message_id < known.first_message_id {
            // An earlier device of this number may have used it: what is taken for a repeat is answered OK and dropped.
            return Err(SendError::BadRequest("client_message_id is lower than the first_message_id of the device's registration"));
        }
        devices(sender, request, view)?;
        if self.any_full.load(Ordering::Relaxed) && !request.ephemeral {
            let full = self.full.read();
            if request.envelopes.iter().any(|e| full.contains(&DeviceAddr { account: request.recipient, device: e.device })) {
                return Err(SendError::InboxFull { retry_after_ms: INBOX_FULL_RETRY_MS });
            }
        }
        let id = request.client_message_id.0;
        if id + limits::MESSAGE_ID_WINDOW <= highest.fetch_max(id, Ordering::Relaxed) {
            return Err(SendError::StaleMessageId);
        }
        let to = self.log.route(&request.recipient).map_err(|_| SendError::Unavailable { retry_after_ms: RETRY_AFTER_MS })?;
        Ok(Checked { to, payload: self.event(sender, request, sealer, trace) })
    }

    fn event(&self, sender: DeviceAddr, request: &SendRequest, sealer: &Sealer, trace: Option<&Span>) -> Bytes {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let head = EnvelopesAccepted {
            recipient: request.recipient,
            sender,
            client_message_id: request.client_message_id,
            accepted: self.clock.now(),
            flags: bit(request.urgent, flags::URGENT) | bit(request.ephemeral, flags::EPHEMERAL),
            envelopes: Vec::new(),
        };
        event::encode_accepted(
            trace.map(Span::context).as_ref(),
            &head,
            &request.envelopes,
            |envelope| envelope.content.len() + seal::OVERHEAD,
            |envelope| (envelope.device, envelope.kind),
            |envelope, out| {
                let recipient = DeviceAddr { account: request.recipient, device: envelope.device };
                let context = seal::Context { recipient, sender, client_message_id: request.client_message_id };
                sealer.seal(&context, &envelope.content, self.random.as_ref(), out);
            },
        )
    }

    /// Hands a checked send to the log; its outcome goes to the sink.
    pub fn submit(&self, checked: Checked, sink: &Arc<dyn AppendSink>, token: u64, trace: Option<Span>) -> Result<(), SendError> {
        let traced = trace.map(|accept| -> Arc<dyn AppendSink> {
            let append = traces::follow(Step::Append, &accept.context());
            let steps = append.into_iter().chain([accept]).collect();
            Arc::new(TracedSink { sink: Arc::clone(sink), steps: Mutex::new(steps) })
        });
        let sink = traced.as_ref().unwrap_or(sink);
        self.log.submit(checked.to, checked.payload, sink, token).map_err(|error| append_failed(&error))
    }
}

/// Ends the steps of one traced message when its outcome is known.
struct TracedSink {
    sink: Arc<dyn AppendSink>,
    steps: Mutex<Vec<Span>>,
}

impl AppendSink for TracedSink {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        let code = outcome.as_ref().map_or_else(|error| append_failed(error).code(), |_| Code::Ok);
        self.sink.done(token, outcome);
        self.steps.lock().drain(..).for_each(|step| step.end_with(code));
    }

    fn flush(&self) {
        self.sink.flush();
    }
}

#[async_trait]
impl Sending for Acceptor {
    async fn send(&self, sender: KnownDevice, request: SendRequest) -> Result<(), SendError> {
        let trace = self.trace();
        let accepted = async {
            let (view, highest) = match self.cached(sender.addr, &request) {
                Some(cached) => cached,
                None => self.load(sender.addr, &request).await?,
            };
            let checked = self.check(sender, &request, &view, &highest, trace.as_ref())?;
            let append = trace.as_ref().and_then(|accept| traces::follow(Step::Append, &accept.context()));
            let outcome = self.log.append(checked.to, checked.payload).await.map(|_| ()).map_err(|error| append_failed(&error));
            if let Some(append) = append {
                append.end_with(code(&outcome));
            }
            outcome
        };
        let outcome = accepted.await;
        metrics::observe_sends(code(&outcome), 1);
        if let Some(trace) = trace {
            trace.end_with(code(&outcome));
        }
        outcome
    }
}

fn code(outcome: &Result<(), SendError>) -> Code {
    outcome.as_ref().map_or_else(SendError::code, |()| Code::Ok)
}

/// What a failed append means to the sender.
pub fn append_failed(error: &AppendError) -> SendError {
    match error {
        AppendError::Unknown(_) | AppendError::Poisoned(_) | AppendError::Closed => SendError::OutcomeUnknown,
        AppendError::Full | AppendError::Unavailable(_) => SendError::Unavailable { retry_after_ms: RETRY_AFTER_MS },
        AppendError::TooLarge => SendError::TooLarge("the request is larger than the log takes"),
        AppendError::NoSuchPartition => SendError::Internal,
    }
}

fn store_failed(error: StoreError) -> SendError {
    match error {
        StoreError::Unavailable(_) => SendError::Unavailable { retry_after_ms: RETRY_AFTER_MS },
        _ => {
            tracing::error!(%error, "a recipient could not be looked up");
            SendError::Internal
        }
    }
}

fn allowed<'a>(sender: DeviceAddr, request: &SendRequest, view: &'a AccountView) -> Result<&'a Sealer, SendError> {
    let sealer = view.sealer().filter(|_| !view.deleted).ok_or(SendError::AccountDeleted)?;
    if request.recipient != sender.account && view.blocked.binary_search(&sender.account).is_ok() {
        return Err(SendError::Blocked);
    }
    Ok(sealer)
}

fn sizes(request: &SendRequest) -> Result<(), SendError> {
    if request.client_message_id.0 == 0 || request.client_message_id.0 > i64::MAX as u64 {
        return Err(SendError::BadRequest("client_message_id must be from 1 to 2^63-1"));
    }
    if request.envelopes.is_empty() || request.envelopes.len() > limits::DEVICES_PER_ACCOUNT {
        return Err(SendError::BadRequest("a request carries 1 to 10 envelopes"));
    }
    for OutgoingEnvelope { kind, content, .. } in &request.envelopes {
        if !matches!(EnvelopeType::try_from(i32::from(*kind)), Ok(EnvelopeType::Whisper | EnvelopeType::Prekey | EnvelopeType::Mls)) {
            return Err(SendError::BadRequest("unknown envelope type"));
        }
        if content.is_empty() {
            return Err(SendError::BadRequest("an envelope is empty"));
        }
        if content.len() > limits::ENVELOPE_BYTES {
            return Err(SendError::TooLarge("an envelope's content is larger than 262144 bytes"));
        }
    }
    Ok(())
}

/// All devices of the recipient, each exactly once, each the installation that the sender knows.
fn devices(sender: DeviceAddr, request: &SendRequest, view: &AccountView) -> Result<(), SendError> {
    let own = request.recipient == sender.account;
    let wanted = |device: DeviceId| !(own && device == sender.device);
    let has = |device: DeviceId| request.envelopes.iter().filter(|e| e.device == device).count();
    let mut missing = Vec::new();
    let mut stale = Vec::new();
    for device in view.devices.iter().filter(|device| wanted(device.id)) {
        match request.envelopes.iter().find(|e| e.device == device.id) {
            None => missing.push(device.id),
            Some(envelope) if envelope.registration_id != device.registration_id => stale.push(device.id),
            Some(_) => {}
        }
    }
    let mut extra = Vec::new();
    for envelope in &request.envelopes {
        if !wanted(envelope.device) || !view.devices.iter().any(|device| device.id == envelope.device) {
            extra.push(envelope.device);
        } else if has(envelope.device) > 1 {
            return Err(SendError::BadRequest("two envelopes for one device"));
        }
    }
    if !missing.is_empty() || !extra.is_empty() {
        return Err(SendError::Mismatch { missing, extra });
    }
    if stale.is_empty() { Ok(()) } else { Err(SendError::Stale { devices: stale }) }
}

/// A `Send` frame as a request.
pub fn parse(send: crate::wire::stream::Send) -> Result<SendRequest, SendError> {
    let bad = |_| SendError::BadRequest("an id is out of its range");
    let envelopes = send
        .envelopes
        .into_iter()
        .map(|envelope| {
            Ok(OutgoingEnvelope {
                device: DeviceId::new(envelope.device_id).map_err(bad)?,
                registration_id: crate::ids::RegistrationId::new(envelope.registration_id).map_err(bad)?,
                kind: u8::try_from(envelope.r#type).map_err(|_| SendError::BadRequest("unknown envelope type"))?,
                content: envelope.content,
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(SendRequest {
        recipient: AccountId::from_slice(&send.recipient).map_err(bad)?,
        client_message_id: crate::ids::ClientMessageId(send.client_message_id),
        urgent: send.urgent,
        ephemeral: send.ephemeral,
        envelopes,
    })
}
