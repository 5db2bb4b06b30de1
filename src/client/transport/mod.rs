//! The way to the server: HTTP by reqwest, the stream by tokio-tungstenite. TLS by rustls with ring.

mod ca;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use url::Url;

use super::core::api::{Http, HttpRequest, HttpResponse, Method, Unreachable};

pub use ca::{InvalidCa, PrivateCa};
pub(super) use stream::{ConnectError, Incoming, Outgoing, decode, message};

/// One request and its answer.
const REQUEST: Duration = Duration::from_secs(30);
/// TCP and TLS handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// The largest answer: KeyPackages of 1,500 accounts with ten devices each.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// A server's address is not one that can be used. Retrying never helps.
#[derive(Debug, Clone, thiserror::Error)]
#[error("not a server's address: {0}")]
pub struct InvalidServer(pub String);

/// HTTP to one server.
#[derive(Clone)]
pub(super) struct HttpTransport {
    client: reqwest::Client,
    base: Arc<Url>,
    ca: Option<PrivateCa>,
}

impl HttpTransport {
    /// To the server at `http://…` or `https://…`; with `ca` only to one that it vouches for.
    pub(super) fn new(server: &str, ca: Option<PrivateCa>) -> Result<Self, InvalidServer> {
        // Another part of the program may have chosen a provider already; then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut base = Url::parse(server).map_err(|error| InvalidServer(error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(InvalidServer("it must begin with http:// or https://".into()));
        }
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        let builder = reqwest::Client::builder();
        let builder = match &ca {
            Some(ca) => builder.tls_backend_preconfigured(rustls::ClientConfig::clone(&ca.config())),
            None => builder,
        };
        let client = builder
            .timeout(REQUEST)
            .connect_timeout(CONNECT)
            // As the stream, which knows no proxies: half a connection would be worse than none.
            .no_proxy()
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| InvalidServer(error.to_string()))?;
        Ok(Self { client, base: Arc::new(base), ca })
    }

    /// Opens the stream.
    pub(super) async fn connect(&self, credential: &str) -> Result<(Outgoing, Incoming), ConnectError> {
        let url = self.stream_url().map_err(|error| ConnectError::Transient(error.to_string()))?;
        stream::connect(&url, credential, self.ca.as_ref()).await
    }

    /// The stream's address.
    fn stream_url(&self) -> Result<Url, InvalidServer> {
        let mut url = self.join("/v1/stream").map_err(|error| InvalidServer(error.0))?;
        let scheme = if url.scheme() == "https" { "wss" } else { "ws" };
        url.set_scheme(scheme).map_err(|()| InvalidServer("its scheme can't be changed".into()))?;
        Ok(url)
    }

    fn join(&self, path: &str) -> Result<Url, Unreachable> {
        self.base.join(path.trim_start_matches('/')).map_err(|error| Unreachable(error.to_string()))
    }
}

#[async_trait]
impl Http for HttpTransport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, Unreachable> {
        let method = match request.method {
            Method::Get => reqwest::Method::GET,
            Method::Post => reqwest::Method::POST,
            Method::Put => reqwest::Method::PUT,
            Method::Patch => reqwest::Method::PATCH,
            Method::Delete => reqwest::Method::DELETE,
        };
        let mut builder = self.client.request(method, self.join(&request.path)?);
        if let Some(credential) = &request.credential {
            builder = builder.bearer_auth(credential.as_str());
        }
        if let Some(body) = request.body {
            builder = builder.header("content-type", "application/json").body(body);
        }
        let mut response = builder.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > ANSWER_BYTES {
                return Err(Unreachable("the answer is too large".into()));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(HttpResponse { status, body })
    }
}

/// Without the address: it names people.
fn unreachable(error: reqwest::Error) -> Unreachable {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Unreachable(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_kept() {
        for bad in ["", "example.org", "ftp://example.org", "http://"] {
            assert!(HttpTransport::new(bad, None).is_err(), "{bad:?}");
        }
        let url = |server: &str| HttpTransport::new(server, None).and_then(|http| http.stream_url()).map(String::from).unwrap_or_default();
        assert_eq!(url("http://127.0.0.1:8470"), "ws://127.0.0.1:8470/v1/stream");
        assert_eq!(url("https://example.org/chat"), "wss://example.org/chat/v1/stream");
    }
}
