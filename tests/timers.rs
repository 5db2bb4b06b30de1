//! What happens when nothing happens for a while, over real sockets. Tokio's clock is stopped once the sockets are open, and
//! jumps whenever all tasks sleep: minutes pass in milliseconds. So each test has a runtime of one thread.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use prost::Message as _;
use sealpost::clock::{Clock as _, ManualClock, SystemClock};
use sealpost::limits;
use sealpost::testing::{Broker, PATIENCE, RawDevice, RawStream};
use sealpost::wire::stream::{CloseReason, Code, GapReason, ReceiptKind, ServerBatch, server_frame::Frame};
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

type Test = anyhow::Result<()>;

async fn pair(broker: &Broker) -> anyhow::Result<(RawDevice, RawDevice)> {
    Ok((broker.device("alice@socialink").await?, broker.device("bob@vignette").await?))
}

/// Lets so many of the server's looks at its streams go by.
async fn ticks(count: u32) {
    for _ in 0..count {
        tokio::time::sleep(Duration::from_millis(limits::HEARTBEAT_TICK_MS)).await;
        // The other threads' time does not jump.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reads on, so that pings are answered; what the server said at the end.
fn read_on(mut stream: RawStream) -> JoinHandle<Option<CloseReason>> {
    tokio::spawn(async move {
        loop {
            match stream.next_at_leisure().await {
                Ok(Frame::Closing(closing)) => return Some(closing.reason()),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    })
}

/// A socket whose other end is gone without a word takes what the kernel buffers and never answers.
#[tokio::test]
async fn half_dead_streams_are_found_and_closed_and_silent_ones_that_answer_are_not() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    a.backlog().await?;
    b.backlog().await?;
    let alive = read_on(a);
    tokio::time::pause();
    // Nobody reads Bob's socket, so nobody answers.
    ticks(2 * limits::HEARTBEAT_TICKS + 2).await;
    tokio::time::resume();
    // What it was told is lost if it writes first: its answer to the ping meets a closed socket.
    b.closed().await?;
    assert!(b.pings > 0, "it was asked before");
    let figures = reqwest::get(format!("{}/metrics", broker.url())).await?.text().await?;
    // All brokers of this process count together.
    let idle = figures.lines().find_map(|line| line.strip_prefix("sealpost_stream_closed_total{reason=\"IDLE\"} "));
    assert!(idle.is_some_and(|count| count != "0"), "{figures}");
    assert!(!alive.is_finished(), "who answers pings stays");
    alive.abort();
    // Its inbox waits, and the device comes back.
    alice.post(&[&bob], 1, b"still there").await?;
    assert_eq!(bob.connect().await?.backlog().await?.len(), 1);
    Ok(())
}

/// A peer that stopped reading under a flow of large envelopes: the kernel's buffers are full, so that not even the reason to
/// close can be written. The stream goes without a word.
#[tokio::test]
async fn a_socket_that_takes_nothing_more_is_cut_within_its_ticks() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4 * 1024)?;
    let socket = socket.connect(broker.url().trim_start_matches("http://").parse()?).await?;
    let mut request = format!("{}/v1/stream", broker.url().replacen("http", "ws", 1)).into_client_request()?;
    request.headers_mut().insert("authorization", format!("Bearer {}", bob.credential).parse()?);
    let (mut socket, _) = tokio_tungstenite::client_async(request, socket).await?;
    let mut a = alice.connect().await?;
    a.backlog().await?;
    let content = vec![5; limits::ENVELOPE_BYTES];
    let total = (2 * limits::UNACKED_BYTES / content.len()) as u64;
    for id in 1..=total {
        a.send(&[&bob], id, &content).await?;
        assert_eq!(a.result(id).await?.code(), Code::Ok);
    }
    let alive = read_on(a);
    // So that what goes out has gone out, as far as it goes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    tokio::time::pause();
    // Silence is answered with a close after twice its ticks; that it can't be written shows with the second look behind that.
    ticks(2 * limits::HEARTBEAT_TICKS + 3).await;
    tokio::time::resume();
    // Reading on would let a stream that is only stuck say why it closes, or go on. Nothing of that comes, and it ends at once,
    // sooner than any further look.
    let rest = async {
        let mut frames = Vec::new();
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(bytes) = message {
                frames.extend(ServerBatch::decode(bytes)?.frames.into_iter().filter_map(|frame| frame.frame));
            }
        }
        anyhow::Ok(frames)
    };
    let frames = tokio::time::timeout(Duration::from_millis(limits::HEARTBEAT_TICK_MS / 2), rest).await.expect("it was cut before")?;
    assert!(matches!(frames.first(), Some(Frame::Hello(_))), "it was open");
    assert!(!frames.iter().any(|frame| matches!(frame, Frame::Closing(_))), "the reason could not be written");
    let came = frames.iter().filter(|frame| matches!(frame, Frame::Envelope(_))).count() as u64;
    assert!(came < (limits::UNACKED_BYTES / content.len()) as u64, "the buffers were full before flow control paused the feed: {came}");
    assert!(!alive.is_finished(), "nobody else was");
    alive.abort();
    // Its inbox waits, and the device comes back.
    let mut b = bob.connect().await?;
    for id in 1..=total {
        let envelope = b.envelope().await?;
        assert_eq!(envelope.client_message_id, id);
        b.ack(envelope.seq).await?;
    }
    Ok(())
}

/// Flow control has paused the feed, and the device answers pings but acknowledges nothing.
#[tokio::test]
async fn streams_that_never_acknowledge_are_closed_with_the_reason() -> Test {
    let broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    b.backlog().await?;
    let content = vec![3; 64 * 1024];
    let total = (2 * limits::UNACKED_BYTES / content.len()) as u64;
    for id in 1..=total {
        a.send(&[&bob], id, &content).await?;
        assert_eq!(a.result(id).await?.code(), Code::Ok);
    }
    let reader = read_on(b);
    tokio::time::sleep(Duration::from_millis(300)).await;
    tokio::time::pause();
    ticks(limits::STALLED_TICKS + 2).await;
    tokio::time::resume();
    assert_eq!(reader.await?, Some(CloseReason::TooSlow));
    assert_eq!(bob.connect().await?.envelope().await?.client_message_id, 1, "its backlog stays");
    Ok(())
}

/// Nobody fetched it for 30 days: the recipient is told what is missing, the sender that it was not delivered.
#[tokio::test]
async fn what_expires_is_said_as_a_gap_and_to_its_sender() -> Test {
    let mut broker = Broker::start().await?;
    let (alice, bob) = pair(&broker).await?;
    for id in 1..=3 {
        alice.post(&[&bob], id, b"too old").await?;
    }
    let clock = ManualClock::new(SystemClock.now().plus(limits::ENVELOPE_TTL_MS + 3_600_000));
    broker.restart_by(Arc::new(clock)).await?;
    alice.post(&[&bob], 4, b"fresh").await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A broker that has just started looks within a minute.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(61)).await;
    tokio::time::resume();
    let mut a = alice.connect().await?;
    let receipt = a.find(|frame| if let Frame::Receipt(receipt) = frame { Some(receipt) } else { None }).await?;
    let entry = &receipt.entries[0];
    assert_eq!((entry.kind(), entry.client_message_ids[0].first, entry.client_message_ids[0].last), (ReceiptKind::Expired, 1, 3));
    let mut b = bob.connect().await?;
    let gap = b.find(|frame| if let Frame::Gap(gap) = frame { Some(gap) } else { None }).await?;
    assert_eq!(gap.reason(), GapReason::GapExpired);
    let envelope = b.envelope().await?;
    assert_eq!((envelope.client_message_id, envelope.seq > gap.to, gap.from <= gap.to), (4, true, true));
    // By HTTP too, once it is written.
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let (_, page) = bob.call(reqwest::Method::GET, "/v1/inbox", None).await?;
        if page["items"][0]["gap"]["reason"] == "expired" {
            assert_eq!(page["items"][1]["envelope"]["client_message_id"], 4, "{page}");
            break;
        }
        assert!(tokio::time::Instant::now() < until, "{page}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    b.ack(envelope.seq).await?;
    drop(b);
    assert!(bob.connect().await?.backlog().await?.is_empty(), "said once, until it is acknowledged");
    Ok(())
}
