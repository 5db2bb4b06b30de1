//! Takes connections: caps, optional TLS, time-outs, graceful drain. One small task a connection, which ends when the
//! connection is upgraded, so that an idle stream does not keep the HTTP machinery alive.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

use crate::config::{Config, Tls};
use crate::limits;
use crate::metrics::{self, Refusal};
use crate::rate::Address;

/// Why the edge can't listen. The operator must act.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or not ours.
    #[error("can't listen on {address}: {source}")]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Certificate or key can't be used.
    #[error("tls: {path}: {problem}")]
    Tls {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// A bound address, ready to serve.
pub struct Listener {
    tcp: TcpListener,
    tls: Option<TlsAcceptor>,
    address: SocketAddr,
}

impl Listener {
    /// Binds the configured address, and reads certificate and key.
    pub async fn bind(config: &Config) -> Result<Self, ServeError> {
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        let failed = |source| ServeError::Bind { address: config.listen, source };
        let tcp = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = tcp.local_addr().map_err(failed)?;
        Ok(Self { tcp, tls, address })
    }

    /// Where it listens; tells the port if 0 was asked for.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http` or `https`.
    pub const fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, ServeError> {
    let wrong = |path: &Path, problem: String| ServeError::Tls { path: path.into(), problem };
    let chain: Vec<_> = CertificateDer::pem_file_iter(&tls.cert)
        .and_then(Iterator::collect)
        .map_err(|e| wrong(&tls.cert, format!("not a PEM certificate chain: {e}")))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|e| wrong(&tls.key, format!("not a PEM private key: {e}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| wrong(&tls.cert, e.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Who is at the other end of the connection; an extension of every request.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// Caps and time-outs of connections.
#[derive(Debug, Clone)]
pub struct Options {
    /// Open connections in all.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_ip: usize,
    /// For a request's head, and between two requests.
    pub header_read: Duration,
    /// For a TLS handshake.
    pub tls_handshake: Duration,
    /// How long a drain waits.
    pub drain: Duration,
    /// Proxies, which carry the connections of many addresses.
    pub trusted_proxies: Vec<IpAddr>,
}

impl From<&Config> for Options {
    fn from(config: &Config) -> Self {
        Self {
            connections: config.limits.connections,
            connections_per_ip: config.connections_per_ip(),
            header_read: Duration::from_millis(config.timeouts.header_read_ms),
            tls_handshake: Duration::from_millis(config.timeouts.tls_handshake_ms),
            drain: Duration::from_millis(config.timeouts.drain_ms),
            trusted_proxies: config.limits.trusted_proxies.iter().map(IpAddr::to_canonical).collect(),
        }
    }
}

/// Open connections, counted, streams included.
#[derive(Default)]
struct Connections {
    open: AtomicUsize,
    per_ip: Mutex<HashMap<Address, usize>>,
    none: Notify,
}

impl Connections {
    fn admit(self: &Arc<Self>, peer: SocketAddr, options: &Options) -> Result<Admitted, Refusal> {
        let address = Address::from(peer.ip());
        // Only the accept loop adds, so check and add need no common lock.
        if self.open.load(Ordering::Acquire) >= options.connections {
            return Err(Refusal::Full);
        }
        let mut per_ip = self.per_ip.lock();
        let count = per_ip.entry(address).or_default();
        if *count >= options.connections_per_ip && !options.trusted_proxies.contains(&peer.ip().to_canonical()) {
            return Err(Refusal::PerIp);
        }
        *count += 1;
        self.open.fetch_add(1, Ordering::AcqRel);
        metrics::observe_connection_opened();
        Ok(Admitted { connections: self.clone(), address })
    }

    async fn wait_for_none(&self) {
        loop {
            let mut notified = std::pin::pin!(self.none.notified());
            notified.as_mut().enable();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One counted connection; lives in its socket, so that an upgraded one counts until it is closed.
struct Admitted {
    connections: Arc<Connections>,
    address: Address,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut per_ip = self.connections.per_ip.lock();
        if let Some(count) = per_ip.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                per_ip.remove(&self.address);
            }
        }
        drop(per_ip);
        metrics::observe_connection_closed();
        if self.connections.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.connections.none.notify_waiters();
        }
    }
}

/// A socket with its count.
struct Counted<T> {
    io: T,
    _admitted: Admitted,
}

impl<T: Read + Unpin> Read for Counted<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<T: Write + Unpin> Write for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }
}

/// What every connection's task shares.
struct Shared {
    app: Router,
    http: http1::Builder,
    options: Options,
    drain: CancellationToken,
    /// After the drain's time: whatever is left goes.
    end: CancellationToken,
}

/// Serves until `drain` is cancelled; then takes no more, lets requests and streams (which watch the same token) end,
/// and returns after at most [`Options::drain`].
pub async fn serve(listener: Listener, app: Router, options: Options, drain: CancellationToken) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(options.header_read)
        .max_buf_size(limits::HTTP_BUFFER_BYTES)
        .max_headers(limits::HTTP_HEADERS)
        .half_close(false);
    let end = CancellationToken::new();
    let shared = Arc::new(Shared { app, http, options, drain: drain.clone(), end: end.clone() });
    let options = &shared.options;
    let connections = Arc::new(Connections::default());
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = drain.cancelled() => break,
            accepted = listener.tcp.accept() => accepted,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of files, most likely: those that are open must end first.
                tracing::warn!(%error, "can't take a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        match connections.admit(peer, options) {
            Ok(admitted) => drop(tasks.spawn(connection(socket, peer, admitted, listener.tls.clone(), shared.clone()))),
            Err(why) => metrics::observe_connection_refused(why),
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(options.drain, connections.wait_for_none()).await.is_err() {
        tracing::warn!(open = connections.open.load(Ordering::Relaxed), "connections outlived the drain and are cut");
    }
    end.cancel();
    tasks.wait().await;
}

async fn connection(socket: TcpStream, peer: SocketAddr, admitted: Admitted, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    // Frames are written in batches already; waiting for more only adds latency.
    let _ = socket.set_nodelay(true);
    match tls {
        None => http(Counted { io: TokioIo::new(socket), _admitted: admitted }, peer, shared).await,
        Some(tls) => {
            // Boxed, so that a plain connection's task does not have the size of a handshake.
            let handshake = Box::pin(tokio::time::timeout(shared.options.tls_handshake, tls.accept(socket)));
            match handshake.await {
                Ok(Ok(stream)) => http(Counted { io: TokioIo::new(stream), _admitted: admitted }, peer, shared).await,
                _ => metrics::observe_connection_refused(Refusal::Tls),
            }
        }
    }
}

async fn http<T: Read + Write + Unpin + Send + 'static>(io: Counted<T>, peer: SocketAddr, shared: Arc<Shared>) {
    let app = shared.app.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        // A router is always ready.
        app.clone().call(request)
    });
    let mut connection = std::pin::pin!(shared.http.serve_connection(io, service).with_upgrades());
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = shared.drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                outcome = connection.as_mut() => outcome,
                () = shared.end.cancelled() => return,
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended early");
    }
}
