//! Edges and projectors in processes of their own, on a real Kafka and a real CQL store: what a device sees is what it sees of one binary.

use anyhow::{Result, ensure};
use sealpost::config::{Config, Role};
use sealpost::log::kafka::describe_topics;
use sealpost::server::{cql_options, kafka_options};
use sealpost::store::cql::CqlStore;
use sealpost::testing::cluster::TestCluster;
use sealpost::testing::{Broker, RawDevice};
use sealpost::wire::stream::{CloseReason, Code, Envelope, server_frame::Frame};

struct Processes {
    edges: Vec<Broker>,
    projectors: Vec<Broker>,
    /// Goes last, with its topics and keyspaces.
    cluster: TestCluster,
}

impl Processes {
    async fn start(test: &str, edges: usize, projectors: usize) -> Result<Option<Self>> {
        let Some(cluster) = TestCluster::new(test).await? else { return Ok(None) };
        let mut processes = Self { cluster, edges: vec![], projectors: vec![] };
        for _ in 0..projectors {
            processes.projectors.push(processes.process(Role::Projector, |_| {}).await?);
        }
        for _ in 0..edges {
            // Development tokens are signed by a key in the data folder, which all edges share.
            let data = processes.edges.first().map(|first| first.data().to_owned());
            let share = |config: &mut Config| config.data = data.unwrap_or_else(|| config.data.clone());
            processes.edges.push(processes.process(Role::Edge, share).await?);
        }
        Ok(Some(processes))
    }

    async fn process(&self, role: Role, change: impl FnOnce(&mut Config)) -> Result<Broker> {
        Broker::start_with(|config| {
            self.cluster.join(config, role);
            change(config);
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_over_two_edges_and_two_projectors() -> Result<()> {
    let Some(cluster) = Processes::start("a_conversation_over_two_edges_and_two_projectors", 2, 2).await? else { return Ok(()) };
    let (one, two) = (cluster.edges[0].url(), cluster.edges[1].url());
    let alice = RawDevice::register(one, "alice@socialink").await?;
    let bob = RawDevice::register(two, "bob@vignette").await?;

    // Offline: what is sent on one edge waits for a stream on the other.
    for id in 1..=20 {
        accepted(&alice, &bob, id).await?;
    }
    let mut stream = bob.connect().await?;
    let backlog = stream.backlog().await?;
    assert_eq!(ids(&backlog), (1..=20).collect::<Vec<_>>());
    stream.ack(backlog[19].seq).await?;

    // Live: the projector's push reaches the edge that holds the socket.
    let mut live = Vec::new();
    for id in 21..=40 {
        accepted(&alice, &bob, id).await?;
    }
    while live.len() < 20 {
        live.push(stream.envelope().await?);
    }
    assert_eq!(ids(&live), (21..=40).collect::<Vec<_>>());
    stream.ack(live[19].seq).await?;

    // The device moves to the other edge: its newer stream wins there, and the older is told.
    let moved = bob.at(one);
    let mut there = moved.connect().await?;
    // Acknowledgements are gathered for a moment: the last one may still be under way on the first edge, and then is sent again.
    assert!(there.backlog().await?.iter().all(|envelope| envelope.seq > backlog[19].seq));
    assert_eq!(stream.closed().await?, Some(CloseReason::Replaced));
    accepted(&alice, &bob, 41).await?;
    let last = there.envelope().await?;
    assert_eq!(last.client_message_id, 41);
    Ok(())
}

/// Acceptance needs no projector, on streams neither: what was taken meanwhile comes once one lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_takes_messages_while_no_projector_lives() -> Result<()> {
    let Some(mut cluster) = Processes::start("an_edge_takes_messages_while_no_projector_lives", 1, 1).await? else { return Ok(()) };
    let edge = cluster.edges[0].url().to_owned();
    let alice = RawDevice::register(&edge, "alice@socialink").await?;
    let bob = RawDevice::register(&edge, "bob@vignette").await?;
    cluster.projectors.clear();

    let mut stream = alice.open().await?;
    for id in 1..=10 {
        stream.send(&[&bob], id, b"while nobody projects").await?;
        ensure!(stream.result(id).await?.code() == Code::Ok);
    }
    cluster.projectors.push(cluster.process(Role::Projector, |_| {}).await?);
    let mut there = bob.connect().await?;
    assert_eq!(ids(&there.backlog().await?), (1..=10).collect::<Vec<_>>());
    stream.find(|frame| matches!(frame, Frame::Hello(_)).then_some(())).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_test_leaves_neither_topics_nor_keyspaces() -> Result<()> {
    let Some(cluster) = TestCluster::new("a_test_leaves_neither_topics_nor_keyspaces").await? else { return Ok(()) };
    let (kafka, cql) = (kafka_options(&cluster.kafka), cql_options(&cluster.cql));
    let here = async || anyhow::Ok((describe_topics(&kafka).await?.topics.len(), CqlStore::open(cql.clone()).await.is_ok()));
    ensure!(here().await? == (6, true));
    drop(cluster.clone());
    ensure!(here().await? == (6, true), "somebody holds it");
    drop(cluster);
    ensure!(here().await? == (0, false));
    Ok(())
}

async fn accepted(from: &RawDevice, to: &RawDevice, id: u64) -> Result<()> {
    let (status, answer) = from.post(&[to], id, format!("message {id}").as_bytes()).await?;
    ensure!(status.is_success(), "{status}: {answer}");
    Ok(())
}

fn ids(envelopes: &[Envelope]) -> Vec<u64> {
    envelopes.iter().map(|envelope| envelope.client_message_id).collect()
}
