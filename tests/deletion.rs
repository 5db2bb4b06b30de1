//! What is left on a broker's disk of an account that was deleted: its envelopes, since the log keeps them for its retention, and nothing
//! that opens them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use reqwest::{Method, StatusCode};
use sealpost::ids::{DeviceAddr, Offset, Partition};
use sealpost::log::embedded::{EmbeddedLog, Options, PartitionCounts};
use sealpost::log::{EventLog as _, Topic, TopicPartition};
use sealpost::store::seal::{Context, SealKey, Sealer};
use sealpost::testing::{Broker, RawDevice};
use sealpost::wire::event::{self, InboxEvent};

const TEXT: &[u8] = b"what the sender's client encrypted";

/// An envelope as it rests.
struct Sealed {
    context: Context,
    bytes: Vec<u8>,
}

impl Sealed {
    fn opens(&self, key: [u8; 32]) -> bool {
        let mut out = BytesMut::new();
        Sealer::new(&SealKey::from_bytes(key)).open(&self.context, &self.bytes, &mut out).is_ok_and(|()| out == TEXT)
    }

    /// Whether any 32 bytes of these, wherever they begin, are its key.
    fn opens_with_any_of(&self, haystack: &[u8]) -> bool {
        let candidates: HashSet<[u8; 32]> = haystack.windows(32).map(|window| window.try_into().expect("32 bytes")).collect();
        candidates.into_iter().any(|key| self.opens(key))
    }
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { files(&path, found)? } else { found.push(path) }
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Everything on the log that is sealed for the device.
async fn on_the_log(broker: &Broker, device: DeviceAddr) -> anyhow::Result<Vec<Sealed>> {
    let mut options = Options::new(broker.data().join("log"));
    let partitions = &broker.config().partitions;
    options.partitions = PartitionCounts { inbox: partitions.inbox, directory: partitions.directory, ..PartitionCounts::default() };
    options.segment_bytes = broker.config().log.segment_bytes;
    let log = EmbeddedLog::open(options)?;
    let tp = TopicPartition { topic: Topic::Inbox, partition: Partition::of(&device.account, log.partitions(Topic::Inbox)) };
    let (mut from, end): (Offset, Offset) = log.bounds(tp).await?;
    let mut found = Vec::new();
    while from < end {
        for record in log.read(tp, from, 1 << 20).await? {
            from = record.offset.next();
            let InboxEvent::EnvelopesAccepted(accepted) = event::decode(&record.payload)? else { continue };
            for envelope in accepted.envelopes.iter().filter(|one| accepted.recipient == device.account && one.device == device.device) {
                let context = Context { recipient: device, sender: accepted.sender, client_message_id: accepted.client_message_id };
                found.push(Sealed { context, bytes: envelope.sealed.to_vec() });
            }
        }
    }
    log.close().await;
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_log_keeps_of_a_deleted_account_opens_with_nothing_on_the_disk() -> anyhow::Result<()> {
    let mut broker = Broker::start().await?;
    let alice = broker.device("alice@socialink").await?;
    let (bob, carol): (RawDevice, RawDevice) = (broker.device("bob@vignette").await?, broker.device("carol@local").await?);
    for to in [&bob, &carol] {
        for id in 1..=3 {
            assert_eq!(alice.post(&[to], id, TEXT).await?.0, StatusCode::OK);
        }
    }
    // Written to the store as well, and read from there: all that a running broker does with them.
    broker.restart().await?;
    assert_eq!(bob.connect().await?.backlog().await?.len(), 3);
    let seal_keys = broker.data().join("store").join("seal.keys");
    let before = std::fs::read(&seal_keys)?;
    assert_eq!(bob.call(Method::DELETE, "/v1/account", None).await?.0, StatusCode::NO_CONTENT);
    // At once, not with the next stop.
    let after = std::fs::read(&seal_keys)?;
    broker.stop().await;

    let (bobs, carols) = (on_the_log(&broker, bob.addr).await?, on_the_log(&broker, carol.addr).await?);
    assert_eq!((bobs.len(), carols.len()), (3, 3), "retention keeps them");
    let mut paths = Vec::new();
    files(broker.data(), &mut paths)?;
    let log: Vec<Vec<u8>> =
        paths.iter().filter(|path| path.starts_with(broker.data().join("log"))).map(std::fs::read).collect::<Result<_, _>>()?;
    for sealed in &bobs {
        assert!(log.iter().any(|file| contains(file, &sealed.bytes)), "byte for byte on the disk");
        assert!(sealed.opens_with_any_of(&before), "with the key there was, it opened: this finds keys");
        assert!(!sealed.opens_with_any_of(&after), "the slot was overwritten by the time the deletion was answered");
    }
    for sealed in &carols {
        assert!(sealed.opens_with_any_of(&std::fs::read(&seal_keys)?), "everybody else's open");
    }
    // The key lies nowhere else either: not in the store's files, its journals, or the log.
    for path in paths {
        assert!(!bobs[0].opens_with_any_of(&std::fs::read(&path)?), "{}", path.display());
    }
    Ok(())
}
