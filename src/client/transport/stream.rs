//! The device stream: a WebSocket whose binary messages are batches of frames.

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{SplitSink, SplitStream};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header::AUTHORIZATION};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream};
use url::Url;

use super::{CONNECT, PrivateCa};
use crate::limits;
use crate::wire::stream::{ClientBatch, ClientFrame, ServerBatch};

/// The reading half.
pub(in crate::client) type Incoming = SplitStream<WebSocketStream<MaybeTlsStream<TcpStream>>>;
/// The writing half.
pub(in crate::client) type Outgoing = SplitSink<WebSocketStream<MaybeTlsStream<TcpStream>>, Message>;

/// Why there is no stream.
#[derive(Debug)]
pub(in crate::client) enum ConnectError {
    /// The server does not know the credential.
    SignedOut,
    /// Try again later.
    Transient(String),
}

/// Opens the stream.
pub(in crate::client) async fn connect(url: &Url, credential: &str, ca: Option<&PrivateCa>) -> Result<(Outgoing, Incoming), ConnectError> {
    let transient = |error: &dyn std::fmt::Display| ConnectError::Transient(error.to_string());
    let mut request = url.as_str().into_client_request().map_err(|error| transient(&error))?;
    let mut bearer = HeaderValue::try_from(format!("Bearer {credential}")).map_err(|_| ConnectError::SignedOut)?;
    bearer.set_sensitive(true);
    request.headers_mut().insert(AUTHORIZATION, bearer);
    let config = WebSocketConfig::default().max_message_size(Some(limits::FRAME_BYTES)).max_frame_size(Some(limits::FRAME_BYTES));
    let connector = ca.map(|ca| Connector::Rustls(ca.config()));
    let connecting = tokio_tungstenite::connect_async_tls_with_config(request, Some(config), true, connector);
    match tokio::time::timeout(CONNECT, connecting).await {
        Ok(Ok((socket, _))) => Ok(socket.split()),
        Ok(Err(tungstenite::Error::Http(response))) if response.status().as_u16() == 401 => Err(ConnectError::SignedOut),
        Ok(Err(error)) => Err(transient(&error)),
        Err(_) => Err(ConnectError::Transient("connecting took too long".into())),
    }
}

/// The WebSocket message of these frames.
pub(in crate::client) fn message(frames: Vec<ClientFrame>) -> Message {
    Message::Binary(ClientBatch { frames }.encode_to_vec().into())
}

/// The frames of a WebSocket message.
pub(in crate::client) fn decode(bytes: Bytes) -> Result<ServerBatch, String> {
    ServerBatch::decode(bytes).map_err(|error| error.to_string())
}
