//! What tests share: a broker in this process, devices that speak the wire by hand, and faults.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::cli::load::keys::Keyset;
use crate::config::Config;
use crate::ids::{AccountId, DeviceAddr, DeviceId};
use crate::server;
use crate::wire::stream::{self, ClientBatch, ClientFrame, ServerBatch, client_frame, server_frame::Frame};

#[cfg(feature = "cluster")]
pub mod cluster;
pub mod faulty_store;
pub mod process;

/// How long a test waits for something that must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A whole broker in this process: real log, real store, real sockets on a free loopback port, a folder of its own.
pub struct Broker {
    running: Option<server::Broker>,
    config: Config,
    url: String,
    dir: Arc<TempDir>,
}

impl Broker {
    /// Starts one in development mode.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(|_| {}).await
    }

    /// Starts one with a changed configuration.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> anyhow::Result<Self> {
        let dir = Arc::new(tempfile::tempdir()?);
        let mut config = Config { data: dir.path().join("data"), listen: "127.0.0.1:0".parse()?, dev: Some(true), ..Config::default() };
        // Segments are zero-filled ahead of their use: small ones keep tests quick.
        config.log.segment_bytes = 4 << 20;
        config.timeouts.drain_ms = 2_000;
        #[cfg(feature = "cluster")]
        if let Some(cluster) = cluster::TestCluster::of_folder(dir.path()).await? {
            cluster.join(&mut config, crate::config::Role::All);
        }
        change(&mut config);
        let running = server::Broker::start(config.clone()).await?;
        let url = running.url();
        // After a restart its devices look for it where it was.
        config.listen = running.address();
        Ok(Self { running: Some(running), config, url, dir })
    }

    /// Its base URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The folder that holds everything.
    pub fn data(&self) -> &Path {
        &self.config.data
    }

    /// Its configuration, for tools that work on the folder while it is stopped.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// A folder for the test's own files, gone with the broker.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Stops it gracefully.
    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
    }

    /// Starts it again, on the same port and folder.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.stop().await;
        self.running = Some(server::Broker::start(self.config.clone()).await?);
        Ok(())
    }

    /// The same with another clock.
    pub async fn restart_by(&mut self, clock: Arc<dyn crate::clock::Clock>) -> anyhow::Result<()> {
        self.stop().await;
        self.running = Some(server::Broker::start_by(self.config.clone(), clock).await?);
        Ok(())
    }

    /// Registers a device of `user@realm` that speaks the wire by hand.
    pub async fn device(&self, identity: &str) -> anyhow::Result<RawDevice> {
        RawDevice::register(&self.url, identity).await
    }
}

/// A device without an SDK: HTTP and frames by hand, opaque contents.
#[derive(Clone)]
pub struct RawDevice {
    base: String,
    http: reqwest::Client,
    /// Its address.
    pub addr: DeviceAddr,
    /// Its bearer credential.
    pub credential: String,
    /// Its registration id.
    pub registration_id: u32,
    /// Where its client message ids begin.
    pub first_message_id: u64,
}

/// An HTTP answer: status and JSON (null if there is none).
pub type Answer = (StatusCode, Value);

/// A plain HTTP client for tests.
pub fn http() -> anyhow::Result<reqwest::Client> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(90)).build()?)
}

/// A development token.
pub async fn dev_token(base: &str, identity: &str) -> anyhow::Result<String> {
    let answer: Value = http()?
        .post(format!("{base}/v1/dev/token"))
        .json(&json!({ "identity": identity }))
        .send()
        .await?
        .error_for_status()?
        .json()
        .await?;
    answer["token"].as_str().map(str::to_owned).context("a token")
}

impl RawDevice {
    /// Registers one with a development token.
    pub async fn register(base: &str, identity: &str) -> anyhow::Result<Self> {
        let token = dev_token(base, identity).await?;
        let mut body = Keyset::generate()?.registration(3)?;
        body["tokens"] = json!([token]);
        let http = http()?;
        let response = http.post(format!("{base}/v1/devices")).json(&body).send().await?;
        let status = response.status();
        let answer: Value = response.json().await?;
        ensure!(status == StatusCode::CREATED, "registration answered {status}: {answer}");
        let account: AccountId = answer["account_id"].as_str().context("account_id")?.parse()?;
        let device = DeviceId::new(answer["device_id"].as_u64().context("device_id")? as u32)?;
        let credential = answer["credential"].as_str().context("credential")?.to_owned();
        let registration_id = body["registration_id"].as_u64().context("registration_id")? as u32;
        let first_message_id = answer["first_message_id"].as_u64().context("first_message_id")?;
        Ok(Self { base: base.to_owned(), http, addr: DeviceAddr { account, device }, credential, registration_id, first_message_id })
    }

    /// The same device, for a server that listens elsewhere.
    pub fn at(&self, base: &str) -> Self {
        Self { base: base.to_owned(), ..self.clone() }
    }

    /// The server that it speaks to.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// One authenticated request.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Answer> {
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.credential);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let status = response.status();
        Ok((status, serde_json::from_slice(&response.bytes().await?).unwrap_or(Value::Null)))
    }

    /// Sends one content to devices of one account by HTTP.
    pub async fn post(&self, to: &[&RawDevice], id: u64, content: &[u8]) -> anyhow::Result<Answer> {
        let account = to.first().context("a recipient")?.addr.account;
        let envelopes: Vec<Value> = to
            .iter()
            .map(|to| {
                json!({ "device_id": to.addr.device.get(), "registration_id": to.registration_id, "type": 2, "content": STANDARD.encode(content) })
            })
            .collect();
        let body = json!({ "client_message_id": id, "envelopes": envelopes });
        self.call(Method::POST, &format!("/v1/accounts/{account}/messages"), Some(body)).await
    }

    /// Opens its stream and reads Hello; what is said before that is passed over.
    pub async fn connect(&self) -> anyhow::Result<RawStream> {
        let mut stream = self.open().await?;
        stream.hello = stream
            .find(|frame| match frame {
                Frame::Hello(hello) => Some(hello),
                _ => None,
            })
            .await?;
        Ok(stream)
    }

    /// Opens its stream and reads nothing.
    pub async fn open(&self) -> anyhow::Result<RawStream> {
        let mut request = format!("{}/v1/stream", self.base.replacen("http", "ws", 1)).into_client_request()?;
        request.headers_mut().insert("authorization", format!("Bearer {}", self.credential).parse()?);
        let (socket, _) = tokio_tungstenite::connect_async(request).await?;
        Ok(RawStream { socket, waiting: Vec::new(), hello: stream::Hello::default(), pings: 0, closing: None })
    }
}

/// An open stream, frame by frame.
pub struct RawStream {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    waiting: Vec<Frame>,
    /// What it was told at first, once [`RawDevice::connect`] has read it.
    pub hello: stream::Hello,
    /// Pings so far; they are answered by reading on.
    pub pings: u32,
    /// The last frame, if the server said why it closed.
    pub closing: Option<stream::Closing>,
}

impl RawStream {
    /// The next frame of any kind.
    pub async fn next(&mut self) -> anyhow::Result<Frame> {
        tokio::time::timeout(PATIENCE, self.next_forever()).await.context("nothing came")?
    }

    async fn next_forever(&mut self) -> anyhow::Result<Frame> {
        loop {
            if let Some(frame) = self.waiting.pop() {
                return Ok(frame);
            }
            match self.socket.next().await.context("the stream ended")?? {
                Message::Binary(bytes) => {
                    self.waiting = ServerBatch::decode(bytes)?.frames.into_iter().rev().filter_map(|frame| frame.frame).collect();
                }
                Message::Ping(_) => self.pings += 1,
                Message::Close(frame) => bail!("closed: {frame:?}"),
                _ => {}
            }
        }
    }

    /// The next frame of any kind, however long it takes.
    pub async fn next_at_leisure(&mut self) -> anyhow::Result<Frame> {
        self.next_forever().await
    }

    /// Nothing comes for a while.
    pub async fn silent(&mut self, time: Duration) -> anyhow::Result<()> {
        match tokio::time::timeout(time, self.next_forever()).await {
            Err(_) => Ok(()),
            Ok(frame) => bail!("expected silence, got {frame:?}"),
        }
    }

    /// The next envelope; other frames but Gap are passed over.
    pub async fn envelope(&mut self) -> anyhow::Result<stream::Envelope> {
        loop {
            match self.next().await? {
                Frame::Envelope(envelope) => return Ok(envelope),
                Frame::Gap(gap) => bail!("a gap: {gap:?}"),
                _ => {}
            }
        }
    }

    /// Envelopes up to the next QueueEmpty.
    pub async fn backlog(&mut self) -> anyhow::Result<Vec<stream::Envelope>> {
        let mut envelopes = Vec::new();
        loop {
            match self.next().await? {
                Frame::Envelope(envelope) => envelopes.push(envelope),
                Frame::QueueEmpty(_) => return Ok(envelopes),
                Frame::Gap(gap) => bail!("a gap: {gap:?}"),
                _ => {}
            }
        }
    }

    /// The next frame that `pick` wants; others are passed over.
    pub async fn find<T>(&mut self, mut pick: impl FnMut(Frame) -> Option<T>) -> anyhow::Result<T> {
        loop {
            if let Some(found) = pick(self.next().await?) {
                return Ok(found);
            }
        }
    }

    /// The answer to a send.
    pub async fn result(&mut self, request_id: u64) -> anyhow::Result<stream::SendResult> {
        self.find(|frame| match frame {
            Frame::Result(result) if result.request_id == request_id => Some(result),
            _ => None,
        })
        .await
    }

    /// Sends frames as one batch.
    pub async fn frames(&mut self, frames: Vec<client_frame::Frame>) -> anyhow::Result<()> {
        let frames = frames.into_iter().map(|frame| ClientFrame { frame: Some(frame) }).collect();
        Ok(self.socket.send(Message::Binary(ClientBatch { frames }.encode_to_vec().into())).await?)
    }

    /// Sends one content to devices of one account, with the id as request id too.
    pub async fn send(&mut self, to: &[&RawDevice], id: u64, content: &[u8]) -> anyhow::Result<()> {
        self.frames(vec![client_frame::Frame::Send(send_frame(to, id, content))]).await
    }

    /// Acknowledges.
    pub async fn ack(&mut self, seq: u64) -> anyhow::Result<()> {
        self.frames(vec![client_frame::Frame::Ack(stream::Ack { seq })]).await
    }

    /// Any WebSocket message.
    pub async fn message(&mut self, message: Message) -> anyhow::Result<()> {
        Ok(self.socket.send(message).await?)
    }

    /// Reads until the server closes; why it said it does.
    pub async fn closed(&mut self) -> anyhow::Result<Option<stream::CloseReason>> {
        let mut reason = None;
        loop {
            match tokio::time::timeout(PATIENCE, self.next_forever()).await.context("it stays open")? {
                Ok(Frame::Closing(closing)) => {
                    reason = Some(closing.reason());
                    self.closing = Some(closing);
                }
                Ok(_) => {}
                Err(_) => return Ok(reason),
            }
        }
    }
}

/// A `Send` for devices of one account.
pub fn send_frame(to: &[&RawDevice], id: u64, content: &[u8]) -> stream::Send {
    stream::Send {
        request_id: id,
        recipient: to.first().map(|to| Bytes::copy_from_slice(to.addr.account.as_bytes())).unwrap_or_default(),
        client_message_id: id,
        urgent: false,
        ephemeral: false,
        envelopes: to
            .iter()
            .map(|to| stream::OutgoingEnvelope {
                device_id: to.addr.device.get().into(),
                registration_id: to.registration_id,
                r#type: 2,
                content: Bytes::copy_from_slice(content),
            })
            .collect(),
    }
}
