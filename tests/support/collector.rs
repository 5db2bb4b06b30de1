//! A collector of traces that speaks OTLP (HTTP, protobuf), and what a whole trace looks like.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use parking_lot::Mutex;
use prost::Message as _;

/// What happens to a message, in this order.
const STEPS: [&str; 4] = ["accept", "append", "apply", "deliver"];

/// Takes traces as a collector does.
#[derive(Clone, Default)]
pub struct Collector(pub Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collector {
    /// Listens; where.
    pub async fn start(&self) -> String {
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

    pub fn spans(&self) -> Vec<Span> {
        let taken = self.0.lock();
        let scopes = taken.iter().flat_map(|export| &export.resource_spans).flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// The steps of each of so many messages whose last step is `last`, once they are here. Processes export each when it likes.
    pub async fn traces(&self, last: &str, count: usize) -> Vec<Vec<Span>> {
        let arrive = async {
            loop {
                let spans = self.spans();
                let mut whole: BTreeSet<&[u8]> = spans.iter().filter(|span| span.name == last).map(|span| &span.trace_id[..]).collect();
                let before = STEPS.iter().take_while(|step| **step != last);
                for step in before {
                    whole.retain(|id| spans.iter().any(|span| span.trace_id == *id && span.name == *step));
                }
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

/// An attribute of a process.
pub fn attribute(resource: &Resource, key: &str) -> Option<String> {
    match resource.attributes.iter().find(|one| one.key == key)?.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        other => Some(format!("{other:?}")),
    }
}

/// The steps in order, each within or behind the one that it follows from.
pub fn check(mut spans: Vec<Span>) {
    spans.sort_by_key(|span| STEPS.iter().position(|name| *name == span.name));
    let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
    assert_eq!(names, STEPS, "{spans:#?}");
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
