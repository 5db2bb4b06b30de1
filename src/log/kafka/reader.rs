//! Look-ups without a group: bounds, and records from a position on. Everything here blocks.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;

use crate::ids::Offset;
use crate::limits;
use crate::log::kafka::batch::record;
use crate::log::kafka::names::{self, Names};
use crate::log::kafka::options::KafkaOptions;
use crate::log::kafka::producer::log_line;
use crate::log::{ReadError, Record, TopicPartition};

/// How long one question to the driver waits before the clock is looked at.
const STEP: Duration = Duration::from_millis(100);

/// After so many without a record a read ends with what it has.
const SILENT_STEPS: u32 = 5;

/// The first offset of a partition and the one that its next record gets.
pub(super) fn bounds<C: ClientContext>(client: &Client<C>, names: &Names, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
    let until = Instant::now() + Duration::from_millis(limits::KAFKA_CALL_MS);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match client.fetch_watermarks(names.of(of.topic), i32::from(of.partition.0), left.max(STEP)) {
            Ok((low, high)) => {
                let offset =
                    |number| names::offset(number).ok_or_else(|| ReadError::Unavailable("the broker does not know the bounds".to_owned()));
                return Ok((offset(low)?, offset(high)?));
            }
            // A new leader, most often.
            Err(error) if left > STEP && may_pass(&error) => std::thread::sleep(STEP),
            Err(error) => return Err(read_failed(&error)),
        }
    }
}

fn may_pass(error: &KafkaError) -> bool {
    !matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::Authentication
        )
    )
}

fn read_failed(error: &KafkaError) -> ReadError {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::UnknownPartition) => ReadError::NoSuchPartition,
        Some(RDKafkaErrorCode::BadMessage) => ReadError::Corrupt(error.to_string()),
        _ => ReadError::Unavailable(error.to_string()),
    }
}

pub(super) fn past_the_end(asked: Offset, end: Option<Offset>) -> ReadError {
    let end = end.map_or_else(String::new, |end| format!(", {}", end.0));
    ReadError::Corrupt(format!("position {} is past the end{end}: what refers to it is newer than this log", asked.0))
}

struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "Kafka reader");
    }
}

impl ConsumerContext for Quiet {}

/// Clients for reads; a few wait for the next one.
#[derive(Default)]
pub(super) struct Readers(Mutex<Vec<BaseConsumer<Quiet>>>);

impl Readers {
    pub fn read(
        &self,
        options: &KafkaOptions,
        names: &Names,
        of: TopicPartition,
        from: Offset,
        bytes_max: usize,
    ) -> Result<Vec<Record>, ReadError> {
        let idle = self.0.lock().pop();
        let reader = match idle {
            Some(reader) => reader,
            // The driver reads only in the name of a group; this one is never joined.
            None => BaseConsumer::from_config_and_context(&options.reader("reader"), Quiet).map_err(|error| read_failed(&error))?,
        };
        let records = read(&reader, names, of, from, bytes_max);
        if reader.unassign().is_ok() && records.is_ok() {
            let mut idle = self.0.lock();
            if idle.len() < limits::KAFKA_IDLE_READERS {
                idle.push(reader);
            }
        }
        records
    }

    /// Ends the clients that wait.
    pub fn clear(&self) {
        let idle = std::mem::take(&mut *self.0.lock());
        drop(idle);
    }
}

fn read(reader: &BaseConsumer<Quiet>, names: &Names, of: TopicPartition, from: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
    let (earliest, end) = bounds(reader.client(), names, of)?;
    if from < earliest {
        return Err(ReadError::Gone { asked: from, earliest });
    }
    if from > end {
        return Err(past_the_end(from, Some(end)));
    }
    let mut records = Vec::new();
    if from == end {
        return Ok(records);
    }
    reader.assign(&names.list([(of, Some(from))])).map_err(|error| read_failed(&error))?;
    let until = Instant::now() + Duration::from_millis(limits::KAFKA_CALL_MS);
    let (mut bytes, mut silent) = (0, 0);
    loop {
        match reader.poll(STEP) {
            Some(Ok(message)) => {
                let Some(offset) = names::offset(message.offset()) else { continue };
                if names.parse(message.topic(), message.partition()) != Some(of) || offset < from {
                    continue;
                }
                let record = record(offset, &message);
                silent = 0;
                bytes += record.payload.len();
                records.push(record);
                if bytes >= bytes_max.min(limits::LOG_BATCH_BYTES) || offset.next() >= end {
                    return Ok(records);
                }
            }
            Some(Err(error)) if !may_pass(&error) => return Err(read_failed(&error)),
            // The last offsets may be a hole.
            _ if !records.is_empty() && silent >= SILENT_STEPS => return Ok(records),
            _ if Instant::now() > until => return Err(ReadError::Unavailable("the broker does not answer".to_owned())),
            _ => silent += 1,
        }
    }
}
