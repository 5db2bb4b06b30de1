//! One trace from the sender's request to the recipient's socket, as a collector gets it by OTLP.

#[path = "support/collector.rs"]
mod collector;
mod support;

use std::time::Duration;

use collector::{Collector, attribute, check};
use futures_util::{SinkExt as _, StreamExt as _};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use reqwest::StatusCode as Http;
use sealpost::wire::stream::{ClientBatch, ClientFrame, OutgoingEnvelope, Send, ServerBatch, client_frame, server_frame::Frame};
use support::{Device, TestBroker};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

type Stream = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(broker: &TestBroker, device: &Device) -> Stream {
    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", device.credential).parse().expect("a value"));
    let mut stream = tokio_tungstenite::connect_async(request).await.expect("opens").0;
    until(&mut stream, |frame| matches!(frame, Frame::QueueEmpty(_))).await;
    stream
}

async fn until(stream: &mut Stream, wanted: impl Fn(&Frame) -> bool) {
    let search = async {
        loop {
            if let Message::Binary(bytes) = stream.next().await.expect("the stream goes on").expect("a message") {
                let batch = ServerBatch::decode(bytes).expect("a batch");
                if batch.frames.iter().filter_map(|frame| frame.frame.as_ref()).any(&wanted) {
                    return;
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), search).await.expect("in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_one_trace_from_request_to_socket() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let broker = TestBroker::with(&format!("tracing = {{ otlp_endpoint = \"{endpoint}\", sample_ratio = 1.0 }}")).await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    let mut receiving = open(&broker, &bob).await;

    // By HTTP.
    broker.send(&alice, &[&bob], 1, b"a plaintext nobody shall see").await.expect(Http::OK);
    until(&mut receiving, |frame| matches!(frame, Frame::Envelope(_))).await;
    // By stream.
    let mut sending = open(&broker, &alice).await;
    let envelope = OutgoingEnvelope {
        device_id: bob.id,
        registration_id: bob.keys.registration_id,
        r#type: 2,
        content: b"a plaintext nobody shall see"[..].into(),
    };
    let recipient: uuid::Uuid = bob.account.parse().expect("an account");
    let send = Send {
        request_id: 7,
        recipient: recipient.as_bytes()[..].to_vec().into(),
        client_message_id: 2,
        envelopes: vec![envelope],
        ..Send::default()
    };
    let batch = ClientBatch { frames: vec![ClientFrame { frame: Some(client_frame::Frame::Send(send)) }] };
    sending.send(Message::Binary(batch.encode_to_vec().into())).await.expect("sends");
    until(&mut receiving, |frame| matches!(frame, Frame::Envelope(_))).await;
    until(&mut sending, |frame| matches!(frame, Frame::Result(result) if result.code == 0)).await;
    for trace in collector.traces("deliver", 2).await {
        check(trace);
    }

    // What is refused ends where it was refused, and says why.
    broker.send(&alice, &[&alice], 3, b"to the own device").await.refused(409, "device_mismatch");
    let refused = |span: &Span| span.status.as_ref().is_some_and(|status| status.message == "DEVICE_MISMATCH");
    let arrive = async {
        while !collector.spans().iter().any(refused) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), arrive).await.expect("arrives");
    drop((receiving, sending));
    broker.stop().await;

    let taken = collector.0.lock();
    for resource in taken.iter().flat_map(|export| &export.resource_spans) {
        let process = resource.resource.as_ref().expect("a resource");
        let names = ["service.name", "sealpost.role"].map(|key| attribute(process, key).expect("named"));
        assert_eq!(names, ["sealpost", "all"]);
        assert_eq!(process.attributes.len(), 3, "nothing of the machine or the environment: {process:?}");
        for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
            assert!(span.attributes.is_empty() && span.events.is_empty() && span.links.is_empty(), "no ids, no payloads: {span:?}");
        }
    }
}
