//! The load tool against a broker that cheats: an audit is worth something only if it finds what is wrong.
//! The broker here keeps everything in memory and loses, doubles or hangs up when it is told to.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use bytes::Bytes;
use clap::Parser as _;
use prost::Message as _;
use sealpost::cli::load::{Args, Plan, Progress, Report, on_own_thread, traffic};
use sealpost::ids::AccountId;
use sealpost::wire::stream::{self, client_frame, server_frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// What the broker does wrong; 0 is never.
#[derive(Clone, Copy, Default)]
struct Faults {
    lose_every: u64,
    double_every: u64,
    hang_up_every: u64,
    unknown_every: u64,
}

#[derive(Default)]
struct Inbox {
    items: Vec<(u64, server_frame::Frame)>,
    cursor: u64,
    seen: HashSet<(Bytes, u64)>,
    live: Option<mpsc::UnboundedSender<server_frame::Frame>>,
}

#[derive(Default)]
struct Inner {
    inboxes: HashMap<Bytes, Inbox>,
    seq: u64,
    sends: u64,
    batches: u64,
}

#[derive(Clone)]
struct Fake {
    inner: Arc<Mutex<Inner>>,
    faults: Faults,
}

fn each(every: u64, nth: u64) -> bool {
    every > 0 && nth.is_multiple_of(every)
}

fn account_of(headers: &HeaderMap) -> Bytes {
    let credential = headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    Bytes::copy_from_slice(credential.parse::<AccountId>().unwrap().as_bytes())
}

impl Fake {
    fn deliver(&self, inbox: &mut Inbox, seq: u64, frame: server_frame::Frame) {
        inbox.items.push((seq, frame.clone()));
        if let Some(live) = &inbox.live {
            let _ = live.send(frame);
        }
    }

    fn send(&self, sender: &Bytes, recipient: Bytes, id: u64, content: Bytes) -> stream::Code {
        let mut inner = self.inner.lock().unwrap();
        inner.sends += 1;
        inner.seq += 2;
        let (nth, seq) = (inner.sends, inner.seq);
        let Some(inbox) = inner.inboxes.get_mut(&recipient) else { return stream::Code::NotFound };
        let fresh = inbox.seen.insert((sender.clone(), id));
        let envelope = |seq| {
            server_frame::Frame::Envelope(stream::Envelope {
                seq,
                sender_account: sender.clone(),
                sender_device: 1,
                client_message_id: id,
                r#type: 2,
                content: content.clone(),
                ..Default::default()
            })
        };
        if fresh && !each(self.faults.lose_every, nth) {
            self.deliver(inbox, seq, envelope(seq));
            if each(self.faults.double_every, nth) {
                self.deliver(inbox, seq + 1, envelope(seq + 1));
            }
        }
        if each(self.faults.unknown_every, nth) { stream::Code::OutcomeUnknown } else { stream::Code::Ok }
    }

    fn acked(&self, account: &Bytes, seq: u64) {
        let inner = &mut *self.inner.lock().unwrap();
        let inbox = inner.inboxes.get_mut(account).unwrap();
        inbox.cursor = inbox.cursor.max(seq);
        // Tell the senders of what was kept.
        let kept: Vec<_> = inbox.items.extract_if(.., |(at, _)| *at <= seq).collect();
        for (_, frame) in kept {
            let server_frame::Frame::Envelope(envelope) = frame else { continue };
            inner.seq += 2;
            let seq = inner.seq;
            let entry = stream::ReceiptEntry {
                account: account.clone(),
                device: 1,
                kind: stream::ReceiptKind::Delivered as i32,
                client_message_ids: vec![stream::IdRange { first: envelope.client_message_id, last: envelope.client_message_id }],
            };
            let receipt = server_frame::Frame::Receipt(stream::Receipt { seq, entries: vec![entry] });
            let sender = inner.inboxes.get_mut(&envelope.sender_account).unwrap();
            self.deliver(sender, seq, receipt);
        }
    }

    async fn serve(self, mut socket: WebSocket, account: Bytes) -> Option<()> {
        let (live, mut feed) = mpsc::unbounded_channel();
        let mut first = vec![server_frame::Frame::Hello(stream::Hello::default())];
        {
            let mut inner = self.inner.lock().unwrap();
            let inbox = inner.inboxes.get_mut(&account).unwrap();
            first.extend(inbox.items.iter().filter(|(seq, _)| *seq > inbox.cursor).map(|(_, frame)| frame.clone()));
            first.push(server_frame::Frame::QueueEmpty(stream::QueueEmpty::default()));
            inbox.live = Some(live);
        }
        tell(&mut socket, first).await?;
        loop {
            tokio::select! {
                frame = feed.recv() => {
                    let mut frames = vec![frame?];
                    while let Ok(more) = feed.try_recv() {
                        frames.push(more);
                    }
                    tell(&mut socket, frames).await?;
                }
                message = socket.recv() => {
                    let Message::Binary(bytes) = message?.ok()? else { continue };
                    let mut answers = Vec::new();
                    for frame in stream::ClientBatch::decode(bytes).unwrap().frames {
                        match frame.frame.unwrap() {
                            client_frame::Frame::Ack(ack) => self.acked(&account, ack.seq),
                            client_frame::Frame::Send(send) => {
                                let code = self.send(&account, send.recipient, send.client_message_id, send.envelopes[0].content.clone());
                                let result = stream::SendResult { request_id: send.request_id, code: code as i32, ..Default::default() };
                                answers.push(server_frame::Frame::Result(result));
                            }
                            other => panic!("the load tool does not send {other:?}"),
                        }
                    }
                    let batches = { let mut inner = self.inner.lock().unwrap(); inner.batches += 1; inner.batches };
                    if each(self.faults.hang_up_every, batches) {
                        return None;
                    }
                    tell(&mut socket, answers).await?;
                }
            }
        }
    }
}

async fn tell(socket: &mut WebSocket, frames: Vec<server_frame::Frame>) -> Option<()> {
    let frames = frames.into_iter().map(|frame| stream::ServerFrame { frame: Some(frame) }).collect();
    socket.send(Message::Binary(stream::ServerBatch { frames }.encode_to_vec().into())).await.ok()
}

async fn fake(faults: Faults) -> url::Url {
    let fake = Fake { inner: Arc::default(), faults };
    let register = async |State(fake): State<Fake>, Json(body): Json<Value>| {
        assert_eq!(body["tokens"].as_array().unwrap().len(), 1);
        let account = AccountId::random(&sealpost::clock::SystemRandom);
        fake.inner.lock().unwrap().inboxes.insert(Bytes::copy_from_slice(account.as_bytes()), Inbox::default());
        (
            StatusCode::CREATED,
            Json(json!({"account_id": account.to_string(), "device_id": 1, "credential": account.to_string(), "identities": []})),
        )
    };
    let messages = async |State(fake): State<Fake>, Path(account): Path<AccountId>, headers: HeaderMap, Json(body): Json<Value>| {
        let content = base64::engine::general_purpose::STANDARD.decode(body["envelopes"][0]["content"].as_str().unwrap()).unwrap();
        let id = body["client_message_id"].as_u64().unwrap();
        match fake.send(&account_of(&headers), Bytes::copy_from_slice(account.as_bytes()), id, content.into()) {
            stream::Code::Ok => (StatusCode::OK, Json(json!({"accepted": true}))),
            _ => (StatusCode::GATEWAY_TIMEOUT, Json(json!({"code": "outcome_unknown", "retry_after_ms": 1}))),
        }
    };
    let stream = async |State(fake): State<Fake>, headers: HeaderMap, upgrade: WebSocketUpgrade| {
        let account = account_of(&headers);
        upgrade.on_upgrade(async move |socket| {
            let _ = fake.serve(socket, account).await;
        })
    };
    let app = Router::new()
        .route("/v1/server", get(async || Json(json!({"dev": true}))))
        .route("/v1/dev/token", post(async || Json(json!({"token": "t"}))))
        .route("/v1/devices", post(register))
        .route("/v1/accounts/{account}/messages", post(messages))
        .route("/v1/stream", get(stream))
        .route("/metrics", get(async || "sealpost_process_cpu_seconds 1.5\nsealpost_process_resident_bytes 1048576\n"))
        .with_state(fake);
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

fn small(server: url::Url) -> Plan {
    let mut plan = Plan::new(server);
    (plan.senders, plan.recipients, plan.peers, plan.window, plan.payload) = (4, 3, 3, 8, 64);
    (plan.length, plan.grace) = (Duration::from_millis(700), Duration::from_millis(1_500));
    plan
}

async fn run(plan: Plan) -> Report {
    on_own_thread(move || traffic::run(plan, Progress::quiet())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_honest_broker_passes() {
    let report = run(small(fake(Faults::default()).await)).await;
    assert!(report.clean() && report.accepted > 100, "{report:?}");
    assert_eq!(
        (report.delivered, report.receipts, report.unanswered, report.reconnects),
        (report.accepted, report.accepted, 0, 0),
        "{report:?}"
    );
    assert_eq!((report.server_rss_bytes, report.server_cpu_us_per_message), (Some(1_048_576), Some(0.0)));
    assert!(report.p50_ms.unwrap() > 0.0 && report.p50_ms <= report.p999_ms);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losses_are_found() {
    let report = run(small(fake(Faults { lose_every: 50, ..Faults::default() }).await)).await;
    assert!(!report.clean() && report.duplicates == 0, "{report:?}");
    assert_eq!(report.lost, report.accepted / 50, "{report:?}");
    assert_eq!(report.lost_examples.len(), 5.min(report.lost as usize));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicates_are_found() {
    let report = run(small(fake(Faults { double_every: 50, ..Faults::default() }).await)).await;
    assert!(!report.clean() && report.lost == 0, "{report:?}");
    assert_eq!(report.duplicates, report.accepted / 50, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_streams_and_unknown_outcomes_are_ridden_through() {
    let report = run(small(fake(Faults { hang_up_every: 40, unknown_every: 30, ..Faults::default() }).await)).await;
    assert!(report.clean() && report.accepted > 20, "{report:?}");
    assert!(report.reconnects > 0 && report.repeated > 0, "{report:?}");
    assert_eq!((report.delivered, report.unanswered), (report.accepted, 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_loop_keeps_its_rate() {
    for http in [false, true] {
        let mut plan = small(fake(Faults { unknown_every: 97, ..Faults::default() }).await);
        (plan.rate, plan.length, plan.http) = (Some(500.0), Duration::from_secs(1), http);
        let report = run(plan).await;
        assert!(report.clean() && (480..=520).contains(&report.accepted), "http {http}: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_sends_are_audited_too() {
    let mut plan = small(fake(Faults { lose_every: 20, ..Faults::default() }).await);
    plan.http = true;
    let report = run(plan).await;
    assert!(report.accepted > 20 && report.lost == report.accepted / 20 && report.duplicates == 0, "{report:?}");
}

#[derive(Debug, clap::Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_and_backlog_run_to_their_end() {
    let server = fake(Faults::default()).await;
    let load = async |line: &str| {
        let line = format!("load {line} --server {server} --json");
        sealpost::cli::load::run(Command::try_parse_from(line.split_whitespace()).unwrap().args).await
    };
    load("idle --devices 40 --settle 0.1").await.unwrap();
    load("backlog --pending 300").await.unwrap();
}
