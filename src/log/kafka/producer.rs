//! Appends: an idempotent producer, a thread that hears its acknowledgements, a task that passes them on.
//!
//! ```text
//! submit ──▶ driver's queue ──▶ broker ──▶ log-acks thread ──▶ outcomes ──▶ dispatcher task: done …, flush
//! ```
//!
//! The thread only collects: it is woken by the driver for each answer of a broker, and wakes the dispatcher once. The
//! dispatcher calls `done` for everything that has gathered and `flush` once for each sink; it is the only caller, so the order
//! within a partition is that of the acknowledgements. It runs on the runtime, where waking tasks is cheap.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::ids::Offset;
use crate::limits;
use crate::log::kafka::names::{self, Names};
use crate::log::kafka::options::KafkaOptions;
use crate::log::{AppendError, AppendSink, TopicPartition};
use crate::metrics;

/// How long the thread waits for an answer before it looks whether it should end.
const POLL: Duration = Duration::from_millis(100);
/// How long a log that is dropped without close waits for the driver to give its records back.
const ABANDON: Duration = Duration::from_secs(2);

/// What travels with a record through the driver.
pub(super) struct Delivery {
    sink: Arc<dyn AppendSink>,
    token: u64,
    bytes: usize,
    at: Instant,
}

struct Outcome {
    delivery: Box<Delivery>,
    result: Result<Offset, AppendError>,
}

const RUNNING: u8 = 0;
const ENDING: u8 = 1;
const ABANDONED: u8 = 2;
const ENDED: u8 = 3;

/// What the driver's callbacks, the thread and the dispatcher share.
#[derive(Default)]
pub(super) struct Shared {
    outcomes: Mutex<Vec<Outcome>>,
    wake: Notify,
    /// Bytes of records that were submitted and whose outcome was not passed on yet.
    queued: AtomicUsize,
    closed: AtomicBool,
    phase: AtomicU8,
    /// Notified whenever `queued` falls to zero.
    idle: Notify,
    fatal: Mutex<Option<String>>,
    /// The last thing that went wrong with a connection: why opening fails.
    pub trouble: Mutex<Option<(RDKafkaErrorCode, String)>>,
}

/// Hears what the driver has to say.
pub(super) struct Context(Arc<Shared>);

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let Some(code) = error.rdkafka_error_code() else { return };
        if code == RDKafkaErrorCode::Fatal {
            let mut fatal = self.0.fatal.lock();
            if fatal.is_none() {
                tracing::error!(reason, "the Kafka producer failed for good");
                metrics::observe_log_failure();
                *fatal = Some(reason.to_owned());
            }
            return;
        }
        tracing::debug!(?code, reason, "Kafka");
        // "All brokers down" only says that the reasons before it were many.
        let mut trouble = self.0.trouble.lock();
        if trouble.is_none() || code != RDKafkaErrorCode::AllBrokersDown {
            *trouble = Some((code, reason.to_owned()));
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Delivery>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivery: Box<Delivery>) {
        let result = match result {
            // A retry that the broker recognised without knowing any more where the first one went.
            Ok(message) => {
                names::offset(message.offset()).ok_or_else(|| AppendError::Unknown("it is on the log, but not known where".to_owned()))
            }
            Err((error, _)) => Err(failed(error, &self.0)),
        };
        let mut outcomes = self.0.outcomes.lock();
        outcomes.push(Outcome { delivery, result });
        if outcomes.len() == 1 {
            drop(outcomes);
            self.0.wake.notify_one();
        }
    }
}

/// The driver's log lines are for who looks for a fault: what matters of them comes as an error as well.
pub(super) fn log_line(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => tracing::error!(facility, "Kafka driver: {message}"),
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => tracing::info!(facility, "Kafka driver: {message}"),
        _ => tracing::debug!(facility, "Kafka driver: {message}"),
    }
}

/// Why a record that the driver had taken was not acknowledged.
fn failed(error: &KafkaError, shared: &Shared) -> AppendError {
    let text = error.to_string();
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize | RDKafkaErrorCode::MessageBatchTooLarge) => {
            AppendError::TooLarge
        }
        Some(RDKafkaErrorCode::UnknownPartition) => AppendError::NoSuchPartition,
        // The broker answered, and refused.
        Some(
            RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::PolicyViolation
            | RDKafkaErrorCode::InvalidTimestamp
            | RDKafkaErrorCode::NotEnoughReplicas,
        ) => AppendError::Unavailable(text),
        // Taken back before it was sent: only when the log is dropped.
        Some(RDKafkaErrorCode::PurgeQueue) => AppendError::Closed,
        _ => match shared.fatal.lock().clone() {
            Some(reason) => AppendError::Poisoned(reason),
            None => AppendError::Unknown(text),
        },
    }
}

/// Why the driver did not take a record; nothing was appended.
fn refused(error: &KafkaError, shared: &Shared) -> AppendError {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => AppendError::Full,
        Some(RDKafkaErrorCode::MessageSizeTooLarge) => AppendError::TooLarge,
        Some(RDKafkaErrorCode::UnknownPartition) => AppendError::NoSuchPartition,
        Some(RDKafkaErrorCode::Fatal) => AppendError::Poisoned(shared.fatal.lock().clone().unwrap_or_else(|| error.to_string())),
        _ => AppendError::Unavailable(error.to_string()),
    }
}

/// The producer and what it needs to hand records to the driver.
pub(super) struct Producer {
    pub driver: BaseProducer<Context>,
    pub shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
}

impl Producer {
    pub fn new(options: &KafkaOptions) -> Result<Self, KafkaError> {
        let shared = Arc::new(Shared::default());
        let driver = BaseProducer::from_config_and_context(&options.producer(), Context(Arc::clone(&shared)))?;
        Ok(Self { driver, shared, clock: Arc::clone(&options.clock) })
    }

    /// Hands a record to the driver, which copies it.
    pub fn submit(
        &self,
        to: TopicPartition,
        names: &Names,
        payload: &Bytes,
        sink: &Arc<dyn AppendSink>,
        token: u64,
    ) -> Result<(), AppendError> {
        if payload.len() > limits::RECORD_BYTES {
            return Err(AppendError::TooLarge);
        }
        if !names.exists(to) {
            return Err(AppendError::NoSuchPartition);
        }
        let shared = &self.shared;
        let bytes = payload.len() + limits::KAFKA_RECORD_OVERHEAD_BYTES;
        let room = |queued| (queued + bytes <= limits::LOG_QUEUE_BYTES).then_some(queued + bytes);
        // Counted before `closed` is looked at, so that `drained` can't miss it.
        if shared.queued.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room).is_err() {
            return Err(if shared.closed.load(Ordering::SeqCst) { AppendError::Closed } else { AppendError::Full });
        }
        let sent = if shared.closed.load(Ordering::SeqCst) {
            Err(AppendError::Closed)
        } else {
            let delivery = Box::new(Delivery { sink: Arc::clone(sink), token, bytes, at: Instant::now() });
            let record = BaseRecord::<(), [u8], Box<Delivery>>::with_opaque_to(names.of(to.topic), delivery)
                .partition(i32::from(to.partition.0))
                .payload(payload)
                .timestamp(i64::try_from(self.clock.now().0).unwrap_or(i64::MAX));
            self.driver.send(record).map_err(|(error, _)| refused(&error, shared))
        };
        if sent.is_err() {
            shared.release(bytes);
        }
        sent
    }

    pub fn health(&self) -> Result<(), AppendError> {
        if self.shared.closed.load(Ordering::SeqCst) {
            return Err(AppendError::Closed);
        }
        self.shared.fatal.lock().clone().map_or(Ok(()), |reason| Err(AppendError::Poisoned(reason)))
    }

    /// The thread: hears acknowledgements until told to end.
    pub fn run(&self) {
        loop {
            self.driver.poll(POLL);
            match self.shared.phase.load(Ordering::SeqCst) {
                RUNNING => {}
                ABANDONED => {
                    self.driver.purge(PurgeConfig::default().queue().inflight());
                    let until = Instant::now() + ABANDON;
                    while self.driver.in_flight_count() > 0 && Instant::now() < until {
                        self.driver.poll(Duration::from_millis(10));
                    }
                    break;
                }
                _ => break,
            }
        }
        self.shared.phase.store(ENDED, Ordering::SeqCst);
        self.shared.wake.notify_one();
    }
}

impl Shared {
    /// Refuses what comes from now on.
    pub fn refuse(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Ends the thread and with it the dispatcher; `abandon` gives back what is still queued as failed.
    pub fn end(&self, abandon: bool) {
        let phase = if abandon { ABANDONED } else { ENDING };
        let _ = self.phase.compare_exchange(RUNNING, phase, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Waits until every submitted record has had its outcome.
    pub async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            if self.queued.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }

    fn release(&self, bytes: usize) {
        if self.queued.fetch_sub(bytes, Ordering::SeqCst) == bytes {
            self.idle.notify_waiters();
        }
    }

    /// The dispatcher: passes outcomes on until the thread has ended.
    pub async fn dispatch(self: Arc<Self>) {
        let mut batch = Vec::new();
        let mut sinks: Vec<Arc<dyn AppendSink>> = Vec::new();
        loop {
            let ended = self.phase.load(Ordering::SeqCst) == ENDED;
            std::mem::swap(&mut *self.outcomes.lock(), &mut batch);
            if batch.is_empty() {
                if ended {
                    return;
                }
                self.wake.notified().await;
                continue;
            }
            self.pass_on(&mut batch, &mut sinks);
            // A burst must not keep the worker from the tasks that were just woken.
            tokio::task::yield_now().await;
        }
    }

    fn pass_on(&self, batch: &mut Vec<Outcome>, sinks: &mut Vec<Arc<dyn AppendSink>>) {
        let address = |sink: &Arc<dyn AppendSink>| Arc::as_ptr(sink).cast::<()>() as usize;
        let (mut records, mut bytes, mut released, mut unknown) = (0, 0, 0, false);
        let oldest = batch.first().map(|outcome| outcome.delivery.at);
        for Outcome { delivery, result } in batch.drain(..) {
            let Delivery { sink, token, bytes: size, .. } = *delivery;
            released += size;
            match &result {
                Ok(_) => (records, bytes) = (records + 1, bytes + size - limits::KAFKA_RECORD_OVERHEAD_BYTES),
                Err(AppendError::Unknown(reason)) => {
                    // Once a batch: in an outage they come by the thousand.
                    if !std::mem::replace(&mut unknown, true) {
                        tracing::warn!(reason, "the outcome of appends is unknown");
                    }
                    metrics::observe_log_unknown();
                }
                Err(_) => metrics::observe_log_failure(),
            }
            sink.done(token, result);
            if sinks.last().is_none_or(|last| address(last) != address(&sink)) {
                sinks.push(sink);
            }
        }
        self.release(released);
        sinks.sort_unstable_by_key(address);
        sinks.dedup_by_key(|sink| address(sink));
        for sink in sinks.drain(..) {
            sink.flush();
        }
        if let Some(oldest) = oldest {
            metrics::observe_log_commit(records, bytes as u64, oldest.elapsed());
        }
        metrics::observe_log_queued(self.queued.load(Ordering::Relaxed));
    }
}
