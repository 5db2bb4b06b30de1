//! A consumer of a group, on Kafka's own groups with incremental (cooperative, sticky) rebalances.
//!
//! The driver fetches ahead in threads of its own and wakes the owner's task when its queue is no longer empty; [`Consumer::next`]
//! then takes everything that is there without waiting, so a wake-up is once a batch and nothing is lost if the future is dropped.
//!
//! A rebalance is two steps, and both are the owner's:
//!
//! ```text
//! driver: "assign P"  ──▶ next() = Assigned(P) ──▶ owner seeks ──▶ next(): only now P is taken up, at the sought offsets
//! driver: "revoke P"  ──▶ next() = Revoked(P)  ──▶ owner writes, commits ──▶ next(): only now P is given back
//! ```
//!
//! So nothing is fetched of a partition before its owner had the chance to seek, and nobody else gets it before its owner has come
//! back. While the driver waits for either step it holds back the other partitions too: an owner should not take long. Partitions
//! that were lost without asking (this process was silent for longer than the session) are given up at once and reported as revoked;
//! others may have them already, and the broker refuses late commits of them by their generation.
//!
//! An owner that does not call `next` for [`limits::KAFKA_OWNER_AWAY_MS`] loses its partitions: the driver leaves the group.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::ids::Offset;
use crate::limits;
use crate::log::kafka::batch::Batch;
use crate::log::kafka::names::{self, Names};
use crate::log::kafka::options::KafkaOptions;
use crate::log::kafka::producer::log_line;
use crate::log::kafka::reader;
use crate::log::{Consumed, Consumer, ReadError, Topic, TopicPartition};
use crate::metrics::{self, Moved};

/// The driver must be looked at now and then even if nothing comes, or it takes the owner for stuck.
const TICK: Duration = Duration::from_secs(1);

/// What the driver wants, in order. It waits for each to be done before it wants another.
enum Wish {
    Assign(Vec<(String, i32)>),
    Revoke { partitions: Vec<(String, i32)>, lost: bool },
}

/// Hears what the driver has to say; called only while the driver is polled.
#[derive(Default)]
struct Context {
    wishes: Mutex<VecDeque<Wish>>,
    /// How often anything was called: the driver's answer does not tell "nothing there" from "something that was no record".
    calls: AtomicU64,
    /// The consumer is going away: what is revoked is given back without asking.
    leaving: AtomicBool,
}

impl Context {
    fn called(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.called();
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.called();
        tracing::debug!(%error, reason, "Kafka consumer");
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.called();
        let partitions = list.elements().iter().map(|element| (element.topic().to_owned(), element.partition())).collect();
        let wish = match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Wish::Assign(partitions),
            _ => Wish::Revoke { partitions, lost: consumer.assignment_lost() },
        };
        if self.leaving.load(Ordering::Relaxed) {
            // Each is answered, or the driver waits for it, stays in the group and keeps what it has from everybody else.
            let answered = match wish {
                Wish::Revoke { .. } => consumer.incremental_unassign(list),
                Wish::Assign(_) => consumer.incremental_assign(&TopicPartitionList::new()),
            };
            if let Err(error) = answered {
                tracing::debug!(%error, "leaving a group");
            }
            return;
        }
        self.wishes.lock().push_back(wish);
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        self.called();
        // Not fatal: the store's own position decides. A rebalance in between is the usual reason.
        if let Err(error) = result {
            tracing::debug!(%error, "a position was not committed");
        }
    }
}

/// A partition as its owner has it.
#[derive(Default)]
struct Owned {
    /// What comes next; unknown until the first record if it starts at the committed position.
    next: Option<Offset>,
    /// What this consumer has committed.
    committed: Option<Offset>,
    /// It was taken from us: commits would be refused.
    lost: bool,
    /// Nothing of it is wanted until a seek.
    held: bool,
    /// Why it can't go on from `next`, until a seek.
    stuck: Option<ReadError>,
}

/// What the owner was told and is to answer by calling `next`.
enum Told {
    Nothing,
    Assigned(Vec<TopicPartition>),
    Revoked(Vec<TopicPartition>),
}

/// See the module.
pub(super) struct KafkaConsumer {
    /// Taken out only by `drop`.
    driver: Option<Arc<BaseConsumer<Context>>>,
    context: Arc<Context>,
    names: Arc<Names>,
    wake: Arc<Notify>,
    closed: CancellationToken,
    owned: BTreeMap<TopicPartition, Owned>,
    told: Told,
    /// Committed, and on its way with the next call of `next`: one request for all partitions.
    to_commit: BTreeMap<TopicPartition, Offset>,
    /// Polled and not delivered yet: what came before a hole must be looked at first.
    ready: Batch,
    /// Where offsets were left out, and from where: was something removed?
    holes: Vec<(TopicPartition, Offset)>,
}

impl KafkaConsumer {
    pub fn join(
        options: &KafkaOptions,
        names: &Arc<Names>,
        group: &str,
        client: &str,
        topic: Topic,
        closed: CancellationToken,
    ) -> Result<Self, ReadError> {
        let this = Self::new(options.consumer(group, topic).set("client.id", client), names, closed)?;
        this.driver()?.subscribe(&[names.of(topic)]).map_err(unavailable)?;
        Ok(this)
    }

    /// Reads from these positions on, outside of any group.
    pub fn follow(
        options: &KafkaOptions,
        names: &Arc<Names>,
        from: &[(TopicPartition, Offset)],
        closed: CancellationToken,
    ) -> Result<Self, ReadError> {
        // One reader of several topics asks as the first of them wants, and `inbox` is the first of all.
        let topic = from.iter().map(|(of, _)| of.topic).min().unwrap_or(Topic::Inbox);
        let mut this = Self::new(&options.follower("follower", topic), names, closed)?;
        this.owned = from.iter().map(|&(of, next)| (of, Owned { next: Some(next), ..Owned::default() })).collect();
        let list = names.list(from.iter().map(|&(of, next)| (of, Some(next))));
        this.driver()?.assign(&list).map_err(unavailable)?;
        Ok(this)
    }

    fn new(config: &ClientConfig, names: &Arc<Names>, closed: CancellationToken) -> Result<Self, ReadError> {
        let mut driver = BaseConsumer::from_config_and_context(config, Context::default()).map_err(unavailable)?;
        let wake = Arc::new(Notify::new());
        let waker = Arc::clone(&wake);
        driver.set_nonempty_callback(move || waker.notify_one());
        let context = Arc::clone(driver.context());
        Ok(Self {
            driver: Some(Arc::new(driver)),
            context,
            names: Arc::clone(names),
            wake,
            closed,
            owned: BTreeMap::new(),
            told: Told::Nothing,
            to_commit: BTreeMap::new(),
            ready: Batch::default(),
            holes: Vec::new(),
        })
    }

    fn driver(&self) -> Result<&Arc<BaseConsumer<Context>>, ReadError> {
        self.driver.as_ref().ok_or(ReadError::Closed)
    }

    /// The owner has come back: what it was told is done now.
    fn settle(&mut self) -> Result<(), ReadError> {
        self.send_commits()?;
        match std::mem::replace(&mut self.told, Told::Nothing) {
            Told::Nothing => {}
            Told::Assigned(partitions) => {
                self.take_up(&partitions)?;
                self.go_on(&partitions)?;
            }
            Told::Revoked(partitions) => {
                self.give_back(&partitions)?;
                self.go_on(&[])?;
            }
        }
        Ok(())
    }

    /// Gets the partitions that stay going again after a step of a rebalance. The driver had paused them and dropped what it had
    /// fetched; it resumes them by itself, but does not wake its fetching thread, which then sleeps for up to a second. A seek wakes it.
    fn go_on(&self, fresh: &[TopicPartition]) -> Result<(), ReadError> {
        let stay = self.owned.iter().filter(|(of, owned)| !owned.lost && !owned.held && owned.stuck.is_none() && !fresh.contains(of));
        for (of, next) in stay.filter_map(|(of, owned)| Some((of, owned.next?))) {
            let (topic, partition) = (self.names.of(of.topic), i32::from(of.partition.0));
            if let Err(error) = self.driver()?.seek(topic, partition, names::position(next), Duration::ZERO) {
                tracing::debug!(%error, "a partition goes on late");
            }
        }
        Ok(())
    }

    fn take_up(&mut self, partitions: &[TopicPartition]) -> Result<(), ReadError> {
        let list = self.names.list(partitions.iter().map(|&of| (of, self.owned.get(&of).and_then(|owned| owned.next))));
        if let Err(error) = self.driver()?.incremental_assign(&list) {
            // The group moved on without us: whoever has them now, it is not us.
            tracing::warn!(%error, "assigned partitions were gone before they were taken up");
            for of in partitions {
                if let Some(owned) = self.owned.get_mut(of) {
                    owned.lost = true;
                }
            }
            let gone = partitions.iter().map(|&of| (self.names.of(of.topic).to_owned(), i32::from(of.partition.0))).collect();
            self.context.wishes.lock().push_front(Wish::Revoke { partitions: gone, lost: true });
            return Ok(());
        }
        let held = partitions.iter().filter(|of| self.owned.get(of).is_some_and(|owned| owned.held));
        let list = self.names.list(held.map(|&of| (of, None)));
        if list.count() > 0 {
            self.driver()?.pause(&list).map_err(unavailable)?;
        }
        Ok(())
    }

    fn give_back(&mut self, partitions: &[TopicPartition]) -> Result<(), ReadError> {
        let kept = partitions.iter().filter(|of| self.owned.get(of).is_some_and(|owned| !owned.lost));
        let list = self.names.list(kept.map(|&of| (of, None)));
        for of in partitions {
            self.owned.remove(of);
            self.to_commit.remove(of);
        }
        if list.count() > 0 {
            self.unassign(&list)?;
        }
        Ok(())
    }

    fn unassign(&self, list: &TopicPartitionList) -> Result<(), ReadError> {
        // It fails if the session was lost meanwhile: then they are gone anyway.
        if let Err(error) = self.driver()?.incremental_unassign(list) {
            tracing::debug!(%error, "giving partitions back");
        }
        Ok(())
    }

    fn send_commits(&mut self) -> Result<(), ReadError> {
        if self.to_commit.is_empty() {
            return Ok(());
        }
        let list = self.names.list(std::mem::take(&mut self.to_commit).into_iter().map(|(of, offset)| (of, Some(offset))));
        // A hint, sent again with the next one.
        if let Err(error) = self.driver()?.commit(&list, CommitMode::Async) {
            tracing::debug!(%error, "positions were not committed");
        }
        Ok(())
    }

    /// Tells the owner what the driver wants, if it wants something of it.
    fn wish(&mut self) -> Result<Option<Consumed>, ReadError> {
        loop {
            let Some(wish) = self.context.wishes.lock().pop_front() else { return Ok(None) };
            match wish {
                Wish::Assign(partitions) => {
                    let partitions: Vec<_> = partitions.iter().filter_map(|(topic, number)| self.names.parse(topic, *number)).collect();
                    if partitions.is_empty() {
                        // It waits for an answer even if there is nothing to take.
                        if let Err(error) = self.driver()?.incremental_assign(&TopicPartitionList::new()) {
                            tracing::debug!(%error, "an empty assignment");
                        }
                        self.go_on(&[])?;
                        continue;
                    }
                    metrics::observe_log_moved(Moved::Assigned, partitions.len());
                    // The group may know of new partitions before this process has looked for them.
                    for of in partitions.iter().filter(|of| of.topic == Topic::Inbox) {
                        self.names.inbox_grew(of.partition.0 + 1);
                    }
                    self.owned.extend(partitions.iter().map(|&of| (of, Owned::default())));
                    self.told = Told::Assigned(partitions.clone());
                    return Ok(Some(Consumed::Assigned(partitions)));
                }
                Wish::Revoke { partitions, lost } => {
                    let partitions: Vec<_> = partitions.iter().filter_map(|(topic, number)| self.names.parse(topic, *number)).collect();
                    let held = partitions.iter().any(|of| self.owned.get(of).is_some_and(|owned| !owned.lost));
                    if lost || partitions.is_empty() {
                        if held || partitions.is_empty() {
                            self.unassign(&self.names.list(partitions.iter().map(|&of| (of, None))))?;
                        }
                        for of in &partitions {
                            if let Some(owned) = self.owned.get_mut(of) {
                                owned.lost = true;
                            }
                        }
                    }
                    let partitions: Vec<_> = partitions.into_iter().filter(|of| self.owned.contains_key(of)).collect();
                    if partitions.is_empty() {
                        self.go_on(&[])?;
                        continue;
                    }
                    if lost {
                        tracing::warn!(
                            count = partitions.len(),
                            "partitions were lost: this process was silent for longer than its session"
                        );
                    }
                    metrics::observe_log_moved(if lost { Moved::Lost } else { Moved::Revoked }, partitions.len());
                    self.told = Told::Revoked(partitions.clone());
                    return Ok(Some(Consumed::Revoked(partitions)));
                }
            }
        }
    }

    /// Takes what the driver has, without waiting.
    fn poll(&mut self) -> Result<(), ReadError> {
        let driver = Arc::clone(self.driver()?);
        while self.ready.bytes() < limits::KAFKA_CONSUMED_BYTES {
            let before = self.context.calls.load(Ordering::Relaxed);
            match driver.poll(Duration::ZERO) {
                Some(Ok(message)) => self.take(&message),
                Some(Err(error @ KafkaError::MessageConsumptionFatal(_))) => return Err(unavailable(error)),
                // The driver tries again by itself.
                Some(Err(error)) => tracing::debug!(%error, "Kafka consumer"),
                None if self.context.calls.load(Ordering::Relaxed) == before => break,
                // Records that were fetched before a rebalance come first.
                None if !self.context.wishes.lock().is_empty() => break,
                None => {}
            }
        }
        Ok(())
    }

    fn take(&mut self, message: &BorrowedMessage<'_>) {
        let (Some(of), Some(offset)) = (self.names.parse(message.topic(), message.partition()), names::offset(message.offset())) else {
            return;
        };
        let Some(owned) = self.owned.get_mut(&of).filter(|owned| !owned.lost && !owned.held && owned.stuck.is_none()) else {
            return;
        };
        match owned.next {
            Some(next) if offset < next => {
                // Asked for a position that the log does not have yet, the driver starts again from the earliest.
                owned.stuck = Some(reader::past_the_end(next, None));
                return;
            }
            Some(next) if offset > next => self.holes.push((of, next)),
            _ => {}
        }
        owned.next = Some(offset.next());
        self.ready.push(of, offset, message);
    }

    /// Whether what was left out was removed by retention: then a gap has to be said. Other holes are allowed.
    async fn look_at_holes(&mut self) -> Result<(), ReadError> {
        while let Some(&(of, asked)) = self.holes.last() {
            let (driver, names) = (Arc::clone(self.driver()?), Arc::clone(&self.names));
            let bounds = tokio::task::spawn_blocking(move || reader::bounds(driver.client(), &names, of)).await;
            let (earliest, _) = bounds.unwrap_or(Err(ReadError::Closed))?;
            self.holes.pop();
            if earliest > asked
                && let Some(owned) = self.owned.get_mut(&of)
            {
                self.ready.forget(of);
                owned.next = Some(asked);
                owned.stuck = Some(ReadError::Gone { asked, earliest });
            }
        }
        Ok(())
    }

    /// The partition, if the owner may work on it.
    fn mine(&mut self, of: TopicPartition) -> Result<&mut Owned, ReadError> {
        if self.closed.is_cancelled() {
            return Err(ReadError::Closed);
        }
        if !self.names.exists(of) {
            return Err(ReadError::NoSuchPartition);
        }
        self.owned.get_mut(&of).ok_or_else(|| ReadError::Unavailable("the partition is not this consumer's".to_owned()))
    }
}

#[async_trait]
impl Consumer for KafkaConsumer {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        loop {
            if self.closed.is_cancelled() {
                return Err(ReadError::Closed);
            }
            self.settle()?;
            if self.ready.is_empty() {
                if let Some(wish) = self.wish()? {
                    return Ok(wish);
                }
                self.poll()?;
            }
            self.look_at_holes().await?;
            if !self.ready.is_empty() {
                let (records, batches) = self.ready.take();
                metrics::observe_log_consumed(records);
                return Ok(Consumed::Records(batches));
            }
            if let Some(error) = self.owned.values().find_map(|owned| owned.stuck.clone()) {
                return Err(error);
            }
            if !self.context.wishes.lock().is_empty() {
                continue;
            }
            tokio::select! {
                // A wake-up between the look above and here leaves its permit.
                () = self.wake.notified() => {}
                () = self.closed.cancelled() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        self.mine(of)?.held = true;
        self.ready.forget(of);
        if matches!(&self.told, Told::Assigned(partitions) if partitions.contains(&of)) {
            // It is held from the moment that it is taken up.
            return Ok(());
        }
        self.driver()?.pause(&self.names.list([(of, None)])).map_err(unavailable)
    }

    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        let fresh = matches!(&self.told, Told::Assigned(partitions) if partitions.contains(&to));
        let owned = self.mine(to)?;
        owned.next = Some(offset);
        owned.stuck = None;
        let (lost, held) = (owned.lost, std::mem::take(&mut owned.held));
        self.ready.forget(to);
        self.holes.retain(|(of, _)| *of != to);
        if fresh || lost {
            // It is taken up at this offset by the next call of `next`, or never.
            return Ok(());
        }
        let (topic, partition) = (self.names.of(to.topic), i32::from(to.partition.0));
        // Without waiting: from here on the driver drops what it had fetched for the old position.
        self.driver()?.seek(topic, partition, names::position(offset), Duration::ZERO).map_err(unavailable)?;
        if held {
            self.driver()?.resume(&self.names.list([(to, None)])).map_err(unavailable)?;
        }
        Ok(())
    }

    async fn commit(&mut self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        let owned = self.mine(of)?;
        if !owned.lost {
            owned.committed = Some(offset);
            self.to_commit.insert(of, offset);
        }
        Ok(())
    }

    async fn committed(&self, of: TopicPartition) -> Result<Option<Offset>, ReadError> {
        if self.closed.is_cancelled() {
            return Err(ReadError::Closed);
        }
        if !self.names.exists(of) {
            return Err(ReadError::NoSuchPartition);
        }
        if let Some(offset) = self.owned.get(&of).and_then(|owned| owned.committed) {
            return Ok(Some(offset));
        }
        let (driver, list) = (Arc::clone(self.driver()?), self.names.list([(of, None)]));
        let ask = move || driver.committed_offsets(list, Duration::from_millis(limits::KAFKA_CALL_MS)).map_err(unavailable);
        let answer = tokio::task::spawn_blocking(ask).await.unwrap_or(Err(ReadError::Closed))?;
        Ok(answer.elements().first().and_then(|element| element.offset().to_raw()).and_then(names::offset))
    }
}

impl Drop for KafkaConsumer {
    /// Leaves the group; in a thread, since it takes a round trip to the broker.
    fn drop(&mut self) {
        let _ = self.send_commits();
        let told = std::mem::replace(&mut self.told, Told::Nothing);
        self.context.leaving.store(true, Ordering::Relaxed);
        let Some(driver) = self.driver.take() else { return };
        // The driver leaves only after it has had its answer.
        let empty = TopicPartitionList::new();
        let revoked = |list: &TopicPartitionList| driver.incremental_unassign(list);
        let answered = match told {
            Told::Assigned(_) => driver.incremental_assign(&empty),
            Told::Revoked(partitions) => revoked(&self.names.list(partitions.into_iter().map(|of| (of, None)))),
            Told::Nothing => Ok(()),
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "leaving a group");
        }
        for wish in self.context.wishes.lock().drain(..) {
            let answered = match wish {
                Wish::Assign(_) => driver.incremental_assign(&empty),
                Wish::Revoke { partitions, .. } => {
                    let partitions = partitions.iter().filter_map(|(topic, number)| self.names.parse(topic, *number));
                    revoked(&self.names.list(partitions.map(|of| (of, None))))
                }
            };
            if let Err(error) = answered {
                tracing::debug!(%error, "leaving a group");
            }
        }
        if let Err(error) = std::thread::Builder::new().name("log-leave".to_owned()).spawn(move || drop(driver)) {
            tracing::warn!(%error, "a consumer leaves its group without a thread of its own");
        }
    }
}

fn unavailable(error: KafkaError) -> ReadError {
    ReadError::Unavailable(error.to_string())
}
