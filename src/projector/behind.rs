//! Writes behind the projector: one task that does a worker's store writes in the order in which they were queued, so that
//! applying goes on while the disk works. Whoever reads the store waits for the queue to be empty first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::ids::{DeviceAddr, Offset};
use crate::log::{AppendError, TopicPartition};
use crate::metrics;
use crate::projector::push::{Push, PushBus};
use crate::projector::worker::WorkerError;
use crate::store::{DeliveryStore, DeliveryWrite, StoreError};

/// Writes that may wait; the projector waits past that.
const QUEUE: usize = 4;

/// One write and what belongs to it.
#[derive(Default)]
pub struct Job {
    /// The write.
    pub write: DeliveryWrite,
    /// Appends that must be durable before the write: receipts stand before the position that covers their cause.
    pub after: Vec<JoinHandle<Result<(), AppendError>>>,
    /// Pushes that must be safe before the write, likewise.
    pub pushed: Option<BoxFuture<'static, Result<(), AppendError>>>,
    /// Polls of these devices are woken once their items can be read.
    pub waiting: Vec<DeviceAddr>,
    /// Once written, everything before these positions is done.
    pub positions: Vec<(TopicPartition, Offset)>,
}

/// What became of the jobs so far.
#[derive(Debug, Clone, Default)]
struct Done {
    jobs: u64,
    positions: Vec<(TopicPartition, Offset)>,
    failed: Option<Failure>,
}

#[derive(Debug, Clone)]
enum Failure {
    Store(StoreError),
    Append(AppendError),
}

impl From<Failure> for WorkerError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => Self::Store(error),
            Failure::Append(error) => Self::Append(error),
        }
    }
}

/// The queue of a worker. Ends with it.
pub struct Behind {
    jobs: mpsc::Sender<Job>,
    done: watch::Receiver<Done>,
    queued: u64,
    /// What was forgotten from memory may stand only in jobs up to this one.
    forgotten: u64,
    task: JoinHandle<()>,
}

impl Drop for Behind {
    fn drop(&mut self) {
        // What was not written is applied again from the stored position.
        self.task.abort();
    }
}

impl Behind {
    /// Starts the task.
    pub fn start(store: Arc<dyn DeliveryStore>, bus: Arc<dyn PushBus>) -> Self {
        let (jobs, receiver) = mpsc::channel(QUEUE);
        let (done, watcher) = watch::channel(Done::default());
        Self { jobs, done: watcher, queued: 0, forgotten: 0, task: tokio::spawn(run(store, bus, receiver, done)) }
    }

    /// Queues a job; waits while the queue is full.
    pub async fn queue(&mut self, job: Job) -> Result<(), WorkerError> {
        self.check()?;
        self.queued += 1;
        metrics::observe_queued_writes(self.queued - self.done.borrow().jobs);
        if !job.write.remove_accounts.is_empty() || !job.write.remove_devices.is_empty() {
            self.forgot();
        }
        if self.jobs.send(job).await.is_err() {
            self.check()?;
            return Err(WorkerError::Store(StoreError::Unavailable("the writer ended".to_owned())));
        }
        Ok(())
    }

    /// Waits until everything queued is in the store.
    pub async fn settle(&mut self) -> Result<(), WorkerError> {
        self.settle_to(self.queued).await
    }

    /// Notes that rows of the jobs so far may not be in the projector's memory any more. Removals are noted by themselves.
    pub const fn forgot(&mut self) {
        self.forgotten = self.queued;
    }

    /// Waits until what is not in memory can be read from the store. That is at once unless something was forgotten lately: the
    /// first message between two people must not wait for the flush of everybody else's.
    pub async fn settle_forgotten(&mut self) -> Result<(), WorkerError> {
        self.settle_to(self.forgotten).await
    }

    async fn settle_to(&mut self, job: u64) -> Result<(), WorkerError> {
        let waited = self.done.wait_for(|done| done.jobs >= job || done.failed.is_some()).await.map(drop);
        self.check()?;
        waited.map_err(|_| WorkerError::Store(StoreError::Unavailable("the writer ended".to_owned())))
    }

    /// Positions that are covered by the store since the last call.
    pub fn covered(&mut self) -> Vec<(TopicPartition, Offset)> {
        if self.done.has_changed().unwrap_or(false) { self.done.borrow_and_update().positions.clone() } else { Vec::new() }
    }

    fn check(&self) -> Result<(), WorkerError> {
        match &self.done.borrow().failed {
            Some(failure) => Err(failure.clone().into()),
            None => Ok(()),
        }
    }
}

async fn run(store: Arc<dyn DeliveryStore>, bus: Arc<dyn PushBus>, mut jobs: mpsc::Receiver<Job>, done: watch::Sender<Done>) {
    while let Some(job) = jobs.recv().await {
        let Job { write, after, pushed, waiting, positions } = job;
        let outcome = async {
            for append in after {
                append.await.unwrap_or(Err(AppendError::Closed)).map_err(Failure::Append)?;
            }
            if let Some(pushed) = pushed {
                pushed.await.map_err(Failure::Append)?;
            }
            let (items, started) = (write.put.len() as u64, Instant::now());
            retry(|| store.write(write.clone())).await.map_err(Failure::Store)?;
            metrics::observe_flush(items, started.elapsed());
            Ok(())
        };
        let failed = outcome.await.err();
        if failed.is_none() && !waiting.is_empty() {
            bus.broadcast(waiting.into_iter().map(|device| Push::Waiting { device }).collect()).await;
        }
        let stop = failed.is_some();
        done.send_modify(|done| {
            done.jobs += 1;
            done.failed = failed;
            if !positions.is_empty() {
                done.positions = positions;
            }
        });
        if stop {
            return;
        }
    }
}

/// Tries a store call until it works: a store that is slow or away slows the projector down, and loses nothing.
pub async fn retry<T, F: Future<Output = Result<T, StoreError>>>(mut call: impl FnMut() -> F) -> Result<T, StoreError> {
    let mut pause = Duration::from_millis(10);
    loop {
        match call().await {
            Err(StoreError::Unavailable(reason)) => {
                tracing::warn!(%reason, "the store does not answer; the projector waits and tries again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
            other => return other,
        }
    }
}
