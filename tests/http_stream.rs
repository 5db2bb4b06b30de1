//! The stream's entrance, and what HTTP calls make it say: low prekeys, account changes, revocation.

mod support;

use std::time::Duration;

use futures_util::StreamExt as _;
use prost::Message as _;
use reqwest::StatusCode;
use sealpost::wire::stream::{CloseReason, ServerBatch, server_frame::Frame};
use serde_json::json;
use support::{Device, TestBroker};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

type Stream = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(broker: &TestBroker, device: &Device) -> Stream {
    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", device.credential).parse().expect("a value"));
    tokio_tungstenite::connect_async(request).await.expect("opens").0
}

/// The next frame that `wanted` takes; others are passed over.
async fn next<T>(stream: &mut Stream, wanted: impl Fn(&Frame) -> Option<T>) -> T {
    let search = async {
        loop {
            let message = stream.next().await.expect("the stream goes on").expect("a message");
            if let Message::Binary(bytes) = message {
                let batch = ServerBatch::decode(bytes).expect("a batch");
                if let Some(found) = batch.frames.iter().filter_map(|frame| frame.frame.as_ref()).find_map(&wanted) {
                    return found;
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), search).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_tells_of_low_prekeys_and_of_the_own_account() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register_with("alice@local", 0).await, broker.register_with("bob@local", 21).await);
    let mut stream = open(&broker, &bob).await;
    next(&mut stream, |frame| matches!(frame, Frame::QueueEmpty(_)).then_some(())).await;
    for _ in 0..2 {
        broker.get(&alice, &format!("/v1/accounts/{}/keys", bob.account)).await.expect(StatusCode::OK);
    }
    let left =
        next(&mut stream, |frame| if let Frame::PrekeysLow(low) = frame { Some((low.ec_remaining, low.pq_remaining)) } else { None });
    assert_eq!(left.await, (19, 19), "the first fetch leaves 20, which is enough");

    let token = broker.dev_token("bob@vignette").await;
    broker.post(&bob, "/v1/account/identities", json!({ "token": token })).await.expect(StatusCode::OK);
    next(&mut stream, |frame| matches!(frame, Frame::AccountChanged(_)).then_some(())).await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_devices_stream_ends_and_does_not_open_again() {
    let broker = TestBroker::start().await;
    let (phone, tablet) = (broker.register_with("bob@local", 0).await, broker.register_with("bob@local", 0).await);
    let mut stream = open(&broker, &tablet).await;
    next(&mut stream, |frame| matches!(frame, Frame::QueueEmpty(_)).then_some(())).await;
    broker.delete(&phone, &format!("/v1/devices/{}", tablet.id)).await.expect(StatusCode::NO_CONTENT);
    let reason = next(&mut stream, |frame| if let Frame::Closing(closing) = frame { Some(closing.reason()) } else { None }).await;
    assert_eq!(reason, CloseReason::Revoked);
    let close = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            match stream.next().await {
                Some(Ok(Message::Close(Some(frame)))) => return u16::from(frame.code),
                Some(Ok(_)) => {}
                other => panic!("closes with a code: {other:?}"),
            }
        }
    });
    assert_eq!(close.await.expect("in time"), 4001);

    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", tablet.credential).parse().expect("a value"));
    match tokio_tungstenite::connect_async(request).await {
        Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => assert_eq!(answer.status().as_u16(), 401),
        other => panic!("refused: {:?}", other.map(|_| ())),
    }
    broker.stop().await;
}

/// An upgraded connection counts until it is closed.
#[tokio::test(flavor = "multi_thread")]
async fn open_streams_count_as_connections() {
    let broker = TestBroker::with("limits.connections_per_ip = 4").await;
    let bob = broker.register_with("bob@local", 0).await;
    let devices = [broker.register_with("bob@local", 0).await, broker.register_with("bob@local", 0).await];
    let mut streams = Vec::new();
    for device in &devices {
        streams.push(open(&broker, device).await);
    }
    // Two streams and the one that the HTTP client keeps alive; the fourth is the last.
    let _fourth = TcpStream::connect(broker.broker.address()).await.expect("connects");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", bob.credential).parse().expect("a value"));
    assert!(tokio_tungstenite::connect_async(request.clone()).await.is_err(), "one too many");
    drop(streams);
    let opened = tokio::time::timeout(Duration::from_secs(10), async {
        while tokio_tungstenite::connect_async(request.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    opened.await.expect("closed streams free their places");
    broker.stop().await;
}
