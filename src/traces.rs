//! Traces of single messages, by OTLP: from the sender's request through the log to the recipient's socket.
//!
//! A message is chosen by chance where it is accepted, and carries its [`TraceContext`] from there on: with its record on the log, with its
//! push, with its place in a stream's queue. Whatever meets one adds its step. What was not chosen carries nothing and costs nothing but a
//! look at whether traces are on. Steps have no ids, no addresses and no contents of messages: a trace says how long which part took, not whose
//! message it was.
//!
//! The SDK is used directly and not through `tracing` spans: a step begins on one thread and ends on another (the log's, a projector's batch), and
//! its parent comes off a record.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider};

use crate::clock::Random;
use crate::config::{Role, Tracing};
use crate::limits;
use crate::wire::event::TraceContext;
use crate::wire::stream::Code;

/// A step of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// At the edge: from the sender's request to its answer being known.
    Accept,
    /// In it: from handed to the log to durable.
    Append,
    /// At the projector: from the record's batch being met to its pushes being handed over.
    Apply,
    /// At the recipient's edge: from the push being met to its being written to the socket.
    Deliver,
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Append => "append",
            Self::Apply => "apply",
            Self::Deliver => "deliver",
        }
    }

    const fn kind(self) -> SpanKind {
        match self {
            Self::Accept => SpanKind::Server,
            Self::Append => SpanKind::Producer,
            Self::Apply => SpanKind::Consumer,
            Self::Deliver => SpanKind::Internal,
        }
    }
}

/// Why traces can't be sent. A retry never helps.
#[derive(Debug, thiserror::Error)]
#[error("traces can't be sent: {0}")]
pub struct TraceError(String);

struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// A message is traced if a random number is below this.
    threshold: u128,
}

static TRACES: OnceLock<Traces> = OnceLock::new();

/// Turns traces on, if there is an endpoint; once in a process, later calls change nothing. Needs a tokio runtime that outlives them.
pub fn install(config: &Tracing, role: Role) -> Result<(), TraceError> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(()) };
    let mut endpoint = endpoint.clone();
    if endpoint.path() == "/" {
        endpoint.set_path("/v1/traces");
    }
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client::new()?)
        .with_endpoint(endpoint.as_str())
        .with_timeout(Duration::from_millis(limits::TRACE_EXPORT_MS))
        .build()
        .map_err(|error| TraceError(error.to_string()))?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(limits::TRACE_QUEUE_STEPS)
        .with_max_export_batch_size(limits::TRACE_QUEUE_STEPS / 4)
        .with_scheduled_delay(Duration::from_millis(limits::TRACE_DELAY_MS));
    let role = match role {
        Role::All => "all",
        Role::Edge => "edge",
        Role::Projector => "projector",
    };
    let resource = Resource::builder_empty()
        .with_service_name("sealpost")
        .with_attributes([KeyValue::new("service.version", env!("CARGO_PKG_VERSION")), KeyValue::new("sealpost.role", role)]);
    let provider = SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches.build()).build())
        // Chosen where a message is accepted: what gets here is wanted.
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource.build())
        .build();
    let tracer = provider.tracer("sealpost");
    let traces = Traces { provider, tracer, threshold: (config.sample_ratio * (u64::MAX as f64 + 1.0)) as u128 };
    if TRACES.set(traces).is_ok() {
        tracing::info!(sample_ratio = config.sample_ratio, "messages are traced");
    }
    Ok(())
}

/// Sends what is waiting; before a process ends.
pub async fn flush() {
    if let Some(traces) = TRACES.get() {
        // It waits for the runtime, which must go on meanwhile.
        let provider = traces.provider.clone();
        let _ = tokio::task::spawn_blocking(move || provider.force_flush()).await;
    }
}

/// A step under way; in a box, so that who has none carries a word only. Dropped without [`Span::end`] it was given up, and says so.
#[derive(Debug)]
pub struct Span(Box<Inner>);

#[derive(Debug)]
struct Inner {
    span: opentelemetry_sdk::trace::Span,
    ended: bool,
}

impl Span {
    fn begin(traces: &Traces, step: Step, parent: &Context) -> Self {
        let span = traces.tracer.span_builder(step.name()).with_kind(step.kind()).start_with_context(&traces.tracer, parent);
        Self(Box::new(Inner { span, ended: false }))
    }

    /// What follows from it carries this.
    pub fn context(&self) -> TraceContext {
        let context = self.0.span.span_context();
        TraceContext { trace: context.trace_id().to_bytes(), span: context.span_id().to_bytes() }
    }

    /// It is done.
    pub fn end(mut self) {
        self.0.ended = true;
    }

    /// It is done, and came to this.
    pub fn end_with(mut self, code: Code) {
        if code != Code::Ok {
            self.0.span.set_status(Status::error(code.as_str_name()));
        }
        self.0.ended = true;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.ended {
            self.span.set_status(Status::error("given up"));
        }
    }
}

/// A message begins: none, unless traces are on and it is chosen.
pub fn accept(random: &dyn Random) -> Option<Span> {
    let traces = TRACES.get()?;
    let mut chance = [0; 8];
    random.fill(&mut chance);
    (u128::from(u64::from_le_bytes(chance)) < traces.threshold).then(|| Span::begin(traces, Step::Accept, &Context::new()))
}

/// The next step of a message that carries a context; none, if traces are off in this process: then the trace ends here.
pub fn follow(step: Step, from: &TraceContext) -> Option<Span> {
    let traces = TRACES.get()?;
    let parent =
        SpanContext::new(TraceId::from_bytes(from.trace), SpanId::from_bytes(from.span), TraceFlags::SAMPLED, true, TraceState::default());
    Some(Span::begin(traces, step, &Context::new().with_remote_span_context(parent)))
}

/// The SDK exports from a thread of its own, which has no runtime: requests run on the process's.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    runtime: tokio::runtime::Handle,
    started: Instant,
    /// When it was last said that nobody takes traces, in milliseconds since the start.
    complained: AtomicU64,
}

impl Client {
    fn new() -> Result<Self, TraceError> {
        // An error means that somebody installed one before, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(Duration::from_millis(limits::TRACE_EXPORT_MS))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("sealpost/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| TraceError(error.to_string()))?;
        let runtime = tokio::runtime::Handle::try_current().map_err(|error| TraceError(error.to_string()))?;
        Ok(Self { http, runtime, started: Instant::now(), complained: AtomicU64::new(0) })
    }

    /// Once a minute: a collector that is away is no reason to fill the log.
    fn complain(&self, error: &dyn std::fmt::Display) {
        let now = self.started.elapsed().as_millis() as u64 + limits::TRACE_COMPLAINT_MS;
        let last = self.complained.load(Ordering::Relaxed);
        if now - last >= limits::TRACE_COMPLAINT_MS
            && self.complained.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            tracing::warn!(%error, "the collector does not take traces; they are dropped");
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let call = self.http.request(head.method, head.uri.to_string()).headers(head.headers).body(body);
        let asking = self.runtime.spawn(async move {
            let answer = call.send().await?.error_for_status()?;
            let mut response = Response::builder().status(answer.status());
            if let Some(headers) = response.headers_mut() {
                *headers = answer.headers().clone();
            }
            Ok::<_, reqwest::Error>((response, answer.bytes().await?))
        });
        match asking.await? {
            Ok((response, body)) => Ok(response.body(body)?),
            Err(error) => {
                let error = error.without_url();
                self.complain(&error);
                Err(error.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;

    /// No test of the library turns them on.
    #[test]
    fn nothing_is_made_while_they_are_off() {
        install(&Tracing::default(), Role::All).expect("nothing to do");
        assert!(accept(&SeededRandom::new(1)).is_none());
        assert!(follow(Step::Apply, &TraceContext { trace: [1; 16], span: [2; 8] }).is_none());
        assert_eq!(std::mem::size_of::<Option<Span>>(), 8, "a queue's item grows by a word");
    }

    #[tokio::test]
    async fn a_collector_that_is_away_is_an_error_and_is_complained_of_once() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
        let client = Client::new().expect("a client");
        let mut complained = None;
        for _ in 0..3 {
            let request = Request::builder().uri(format!("http://{nobody}/v1/traces")).body(Bytes::new()).expect("a request");
            let error = client.send_bytes(request).await.expect_err("nobody is there");
            assert!(!error.to_string().contains("127.0.0.1"), "addresses stay out of the log: {error}");
            let at = client.complained.load(Ordering::Relaxed);
            assert!(at > 0 && *complained.get_or_insert(at) == at, "said once");
        }
    }
}
