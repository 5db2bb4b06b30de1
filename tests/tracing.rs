//! One trace from the sender's request to the recipient's socket, as a collector gets it by OTLP.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::routing::post;
use futures_util::{SinkExt as _, StreamExt as _};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use parking_lot::Mutex;
use prost::Message as _;
use reqwest::StatusCode as Http;
use sealpost::wire::stream::{ClientBatch, ClientFrame, OutgoingEnvelope, Send, ServerBatch, client_frame, server_frame::Frame};
use support::{Device, TestBroker};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

type Stream = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Takes traces as a collector does.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collector {
    /// Listens; where.
    async fn start(&self) -> String {
        let app = axum::Router::new().route("/v1/traces", post(Self::take)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    }

    async fn take(State(Self(taken)): State<Self>, headers: HeaderMap, body: Bytes) -> ([(header::HeaderName, &'static str); 1], Vec<u8>) {
        assert_eq!(headers[header::CONTENT_TYPE], "application/x-protobuf");
        taken.lock().push(ExportTraceServiceRequest::decode(body).expect("an export"));
        ([(header::CONTENT_TYPE, "application/x-protobuf")], ExportTraceServiceResponse::default().encode_to_vec())
    }

    fn spans(&self) -> Vec<Span> {
        let taken = self.0.lock();
        let scopes = taken.iter().flat_map(|export| &export.resource_spans).flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// The steps of each of so many messages whose last step is `last`, once they are here.
    async fn traces(&self, last: &str, count: usize) -> Vec<Vec<Span>> {
        let arrive = async {
            loop {
                let spans = self.spans();
                let whole: BTreeSet<&[u8]> = spans.iter().filter(|span| span.name == last).map(|span| &span.trace_id[..]).collect();
                if whole.len() >= count {
                    let of = |id: &&[u8]| spans.iter().filter(|span| span.trace_id == **id).cloned().collect();
                    return whole.iter().map(of).collect();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), arrive).await.unwrap_or_else(|_| panic!("{:#?}", self.spans()))
    }
}

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

/// The steps in order, each within or behind the one that it follows from.
fn check(mut spans: Vec<Span>) {
    spans.sort_by_key(|span| ["accept", "append", "apply", "deliver"].iter().position(|name| *name == span.name));
    let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
    assert_eq!(names, ["accept", "append", "apply", "deliver"], "{spans:#?}");
    let [accept, append, apply, deliver] = &spans[..] else { unreachable!("four of them") };
    assert!(accept.parent_span_id.is_empty(), "the server begins the trace, not the client");
    assert_eq!(
        (&append.parent_span_id, &apply.parent_span_id, &deliver.parent_span_id),
        (&accept.span_id, &accept.span_id, &apply.span_id)
    );
    let kinds = [SpanKind::Server, SpanKind::Producer, SpanKind::Consumer, SpanKind::Internal].map(i32::from);
    assert_eq!(spans.iter().map(|span| span.kind).collect::<Vec<_>>(), kinds);
    assert!(spans.iter().all(|span| span.start_time_unix_nano <= span.end_time_unix_nano));
    assert!(accept.start_time_unix_nano <= append.start_time_unix_nano && append.end_time_unix_nano <= accept.end_time_unix_nano);
    assert!(append.start_time_unix_nano <= apply.start_time_unix_nano && apply.start_time_unix_nano <= deliver.start_time_unix_nano);
    assert!(spans.iter().all(|span| span.status.as_ref().is_none_or(|status| status.code() == StatusCode::Unset)), "{spans:#?}");
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
        let attributes = &resource.resource.as_ref().expect("a resource").attributes;
        let value = |key: &str| match attributes.iter().find(|one| one.key == key)?.value.as_ref()?.value.as_ref()? {
            Value::StringValue(text) => Some(text.clone()),
            other => Some(format!("{other:?}")),
        };
        assert_eq!((value("service.name").as_deref(), value("sealpost.role").as_deref()), (Some("sealpost"), Some("all")));
        assert_eq!(attributes.len(), 3, "nothing of the machine or the environment: {attributes:?}");
        for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
            assert!(span.attributes.is_empty() && span.events.is_empty() && span.links.is_empty(), "no ids, no payloads: {span:?}");
        }
    }
}
