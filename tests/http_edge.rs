//! The edge itself: TLS, caps, time-outs, rate limits, headers, health, metrics, drain.

#[path = "support/certificate.rs"]
mod certificate;
mod support;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use certificate::Certificate;
use futures_util::StreamExt as _;
use prost::Message as _;
use reqwest::{Method, StatusCode};
use sealpost::wire::stream::{ServerBatch, server_frame::Frame};
use serde_json::json;
use support::{Answer, TestBroker};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// Reads until the server closes; how long that took.
async fn until_closed(socket: &mut TcpStream) -> (Vec<u8>, Duration) {
    let started = Instant::now();
    let mut read = Vec::new();
    let outcome = tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut read)).await;
    assert!(outcome.is_ok(), "the server closes the connection");
    (read, started.elapsed())
}

async fn raw(address: SocketAddr, request: &str) -> (TcpStream, String) {
    let mut socket = TcpStream::connect(address).await.expect("connects");
    socket.write_all(request.as_bytes()).await.expect("writes");
    let mut buffer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(10), socket.read(&mut buffer)).await.expect("in time").unwrap_or(0);
    (socket, String::from_utf8_lossy(&buffer[..read]).into_owned())
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_where_it_is_configured() {
    let dir = Arc::new(tempfile::tempdir().expect("a folder"));
    let made = Certificate::for_localhost();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, &made.cert_pem).expect("writes");
    std::fs::write(&key, &made.key_pem).expect("writes");
    let config = format!("timeouts.tls_handshake_ms = 300\ntls = {{ cert = \"{}\", key = \"{}\" }}", cert.display(), key.display());
    let mut broker = TestBroker::in_folder(dir, &config).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.der.into()).expect("a root");
    let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    broker.http = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls.clone()).build().expect("a client");
    assert!(broker.broker.url().starts_with("https://"));
    let device = broker.register("alice@local").await;
    let answer = broker.get(&device, "/v1/account").await.expect(StatusCode::OK);
    assert_eq!(answer.headers["strict-transport-security"], "max-age=31536000");

    // The stream too.
    let mut request = broker.url("/v1/stream").replace("https://", "wss://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", device.credential).parse().expect("a value"));
    let connector = Some(tokio_tungstenite::Connector::Rustls(Arc::new(tls)));
    let opened = tokio_tungstenite::connect_async_tls_with_config(request, None, true, connector).await;
    let (mut stream, _) = opened.expect("the stream opens");
    let first = tokio::time::timeout(Duration::from_secs(10), stream.next()).await.expect("in time").expect("a message").expect("whole");
    let batch = ServerBatch::decode(first.into_data()).expect("a batch");
    assert!(matches!(batch.frames[0].frame, Some(Frame::Hello(_))), "{batch:?}");
    drop(stream);

    let (mut plain, text) = raw(broker.broker.address(), HEALTH).await;
    assert!(!text.starts_with("HTTP"), "no plain HTTP: {text}");
    until_closed(&mut plain).await;
    let mut silent = TcpStream::connect(broker.broker.address()).await.expect("connects");
    let (_, took) = until_closed(&mut silent).await;
    assert!(took < Duration::from_secs(3), "a handshake has its time: {took:?}");
    broker.stop().await;
}

#[tokio::test]
async fn wrong_certificates_are_named_at_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let cert = dir.path().join("cert.pem");
    std::fs::write(&cert, "no certificate").expect("writes");
    let text = format!("tls = {{ cert = \"{0}\", key = \"{0}\" }}", cert.display());
    let error = sealpost::server::Broker::start(support::config(dir.path(), &text)).await.err().expect("refused").to_string();
    assert!(error.contains("cert.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_and_idle_connections_are_closed() {
    let broker = TestBroker::with("timeouts.header_read_ms = 300").await;
    let mut slow = TcpStream::connect(broker.broker.address()).await.expect("connects");
    slow.write_all(b"GET /healthz HTTP/1.1\r\nhost:").await.expect("writes");
    assert!(until_closed(&mut slow).await.1 < Duration::from_secs(3));
    let (mut idle, text) = raw(broker.broker.address(), HEALTH).await;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(until_closed(&mut idle).await.1 < Duration::from_secs(3));
    let (_, text) = raw(broker.broker.address(), &format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(400_000))).await;
    assert!(text.starts_with("HTTP/1.1 431"), "a head has its size: {text}");
    broker.stop().await;
}

/// A head that promises a body, and a body that never comes.
#[tokio::test(flavor = "multi_thread")]
async fn slow_bodies_have_their_time() {
    let broker = TestBroker::with("timeouts.request_ms = 300").await;
    let started = Instant::now();
    let head = "POST /v1/devices HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{";
    let (mut slow, text) = raw(broker.broker.address(), head).await;
    assert!(text.starts_with("HTTP/1.1 504") && text.contains("outcome_unknown"), "{text}");
    until_closed(&mut slow).await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_capped_for_each_address_and_freed_when_closed() {
    let broker = TestBroker::with("limits.connections_per_ip = 2").await;
    let address = broker.broker.address();
    let (first, text) = raw(address, HEALTH).await;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let (second, _) = raw(address, HEALTH).await;
    let (_, text) = raw(address, HEALTH).await;
    assert_eq!(text, "", "one too many is not served");
    drop((first, second));
    let until = Instant::now() + Duration::from_secs(5);
    while !raw(address, HEALTH).await.1.starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < until, "a closed connection frees its place");
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_in_the_same_shape() {
    let broker = TestBroker::start().await;
    let device = broker.register("alice@local").await;
    broker.call(Method::GET, "/nowhere", None, None).await.refused(404, "not_found");
    let wrong = broker.call(Method::POST, "/v1/server", None, Some(json!({}))).await.refused(405, "bad_request");
    assert!(wrong.headers["allow"].to_str().is_ok_and(|methods| methods.contains("GET")), "{:?}", wrong.headers);
    broker.call(Method::PUT, "/v1/account", Some(&device.credential), Some(json!({}))).await.refused(405, "bad_request");
    let url = broker.url("/v1/keys");
    let form = broker.http.put(&url).bearer_auth(&device.credential).body("x=1").send().await.expect("an answer");
    Answer::of(form).await.refused(415, "bad_request");
    let broken = broker.http.put(&url).bearer_auth(&device.credential).header("content-type", "application/json").body("{");
    Answer::of(broken.send().await.expect("an answer")).await.refused(400, "bad_request");
    broker.put(&device, "/v1/keys", json!({ "padding": "x".repeat(600_000) })).await.refused(413, "too_large");
    broker.get(&device, "/v1/accounts/not-a-uuid").await.refused(400, "bad_request");
    broker.get(&device, "/v1/identities/nobody").await.refused(400, "bad_request");
    broker.get(&device, "/v1/stream").await.refused(400, "bad_request");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_carries_the_careful_headers_and_the_documentation_is_readable() {
    let broker = TestBroker::start().await;
    for path in ["/v1/server", "/nowhere", "/v1/account", "/docs/", "/openapi.json"] {
        let answer = broker.call(Method::GET, path, None, None).await;
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert!(answer.headers["content-security-policy"].to_str().is_ok_and(|policy| policy.contains("frame-ancestors 'none'")), "{path}");
    }
    let page = broker.call(Method::GET, "/docs/", None, None).await.expect(StatusCode::OK);
    assert!(page.text.contains("swagger-ui"), "{}", page.text);
    assert!(!page.text.contains("<script>"), "its policy allows no inline script");
    broker.call(Method::GET, "/docs/swagger-ui-bundle.js", None, None).await.expect(StatusCode::OK);
    let initializer = broker.call(Method::GET, "/docs/swagger-initializer.js", None, None).await.expect(StatusCode::OK);
    assert!(initializer.text.contains("/openapi.json"), "{}", initializer.text);
    let document = broker.call(Method::GET, "/openapi.json", None, None).await.expect(StatusCode::OK).body;
    assert_eq!(document["info"]["title"], "Sealpost");
    assert_eq!(document["components"]["securitySchemes"]["device"]["scheme"], "bearer");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn request_rates_are_limited_per_device_and_per_address() {
    let broker = TestBroker::with("[limits]\nrequests_per_device_per_s = 1").await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    for _ in 0..10 {
        broker.get(&alice, "/v1/blocks").await.expect(StatusCode::OK);
    }
    let limited = broker.get(&alice, "/v1/blocks").await.refused(429, "rate_limited");
    assert_eq!(limited.headers["retry-after"], "1");
    broker.get(&bob, "/v1/blocks").await.expect(StatusCode::OK);
    broker.stop().await;

    let broker = TestBroker::with("[limits]\nrequests_per_ip_per_s = 1\nregistrations_per_ip_per_h = 1").await;
    broker.register("alice@local").await;
    let token = broker.dev_token("bob@local").await;
    let body = support::Keys::new(0).registration(&[&token]);
    broker.call(Method::POST, "/v1/devices", None, Some(body)).await.refused(429, "rate_limited");
    for _ in 0..7 {
        broker.call(Method::GET, "/healthz", None, None).await;
    }
    broker.call(Method::GET, "/healthz", None, None).await.refused(429, "rate_limited");
    broker.stop().await;

    let broker = TestBroker::with("[limits]\nauth_failures_per_ip_per_min = 2").await;
    for _ in 0..2 {
        broker.call(Method::GET, "/v1/account", Some("guess"), None).await.refused(401, "unauthenticated");
    }
    broker.call(Method::GET, "/v1/account", Some("guess"), None).await.refused(429, "rate_limited");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_whom_they_are_for_and_name_nobody() {
    let broker = TestBroker::start().await;
    let device = broker.register("alice@local").await;
    broker.call(Method::GET, "/healthz", None, None).await.expect(StatusCode::OK);
    broker.call(Method::GET, "/readyz", None, None).await.expect(StatusCode::OK);
    let metrics = broker.call(Method::GET, "/metrics", None, None).await.expect(StatusCode::OK);
    assert!(metrics.text.contains("sealpost_http_requests_total{status=\"2xx\"}"), "{}", metrics.text);
    assert!(metrics.headers["content-type"].to_str().is_ok_and(|kind| kind.starts_with("text/plain; version=0.0.4")));
    for private in [&device.account, &device.credential, "alice"] {
        assert!(!metrics.text.contains(private), "{private}");
    }
    // Names and labels are a closed set: an id that sneaks in would make a new one.
    let names: HashSet<_> =
        metrics.text.lines().filter_map(|line| line.split(['{', ' ']).next()).filter(|name| !matches!(*name, "#" | "")).collect();
    assert!(names.iter().all(|name| name.starts_with("sealpost_")), "{names:?}");
    broker.stop().await;

    let broker = TestBroker::with("metrics.token = \"0123456789abcdef\"").await;
    broker.call(Method::GET, "/metrics", None, None).await.refused(404, "not_found");
    broker.call(Method::GET, "/metrics", Some("0123456789abcdeX"), None).await.refused(404, "not_found");
    broker.call(Method::GET, "/metrics", Some("0123456789abcdef"), None).await.expect(StatusCode::OK);
    broker.stop().await;
    let broker = TestBroker::with("metrics.expose = \"nobody\"").await;
    broker.call(Method::GET, "/metrics", None, None).await.refused(404, "not_found");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_requests_end_and_takes_no_more() {
    let broker = TestBroker::with("timeouts.drain_ms = 8000\ntimeouts.request_ms = 500").await;
    let device = broker.register("alice@local").await;
    let address = broker.broker.address();
    let (mut idle, _) = raw(address, HEALTH).await;
    // Longer than a request may take, since a long-poll's wait is not counted.
    let poll = broker.http.get(broker.url("/v1/inbox?wait_s=2")).bearer_auth(&device.credential).send();
    let poll = tokio::spawn(poll);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let started = Instant::now();
    let stopping = tokio::spawn(broker.stop());
    let answer = poll.await.expect("runs").expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    until_closed(&mut idle).await;
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    stopping.await.expect("stops");
    assert!(started.elapsed() < Duration::from_secs(6), "not longer than it takes: {:?}", started.elapsed());
}
