//! The device stream as a WebSocket (RFC 6455): carries a [`Session`]'s messages, and nothing else.

use std::sync::Arc;

use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::{IntoResponse as _, Response};
use futures_util::{SinkExt as _, StreamExt as _};

use crate::auth::KnownDevice;
use crate::clock::Clock;
use crate::delivery::hub::Hub;
use crate::delivery::session::{Output, Session};
use crate::edge::EdgeState;
use crate::edge::auth::AuthSender;
use crate::edge::error::ApiError;
use crate::limits;
use crate::wire::stream::{CloseReason, Code};

/// Upgrades an authenticated request to the device's stream.
pub async fn upgrade(State(state): State<EdgeState>, AuthSender(device): AuthSender, upgrade: WebSocketUpgrade) -> Response {
    let hub = Arc::clone(&state.hub);
    let clock = Arc::clone(&state.clock);
    if hub.is_draining() {
        return ApiError::new(Code::Unavailable, "the server is about to stop; reconnect").into_response();
    }
    upgrade
        .read_buffer_size(limits::WS_READ_BUFFER_BYTES)
        .write_buffer_size(limits::WS_WRITE_BUFFER_BYTES)
        .max_write_buffer_size(limits::WS_WRITE_BUFFER_BYTES + 2 * limits::FRAME_BYTES)
        .max_message_size(limits::FRAME_BYTES)
        .max_frame_size(limits::FRAME_BYTES)
        .on_upgrade(move |socket| carry(socket, hub, device, clock))
}

/// The WebSocket close code of a reason; see `CloseReason` in `stream.proto`.
const fn close_code(reason: CloseReason) -> u16 {
    match reason {
        CloseReason::Replaced => 4000,
        CloseReason::Revoked => 4001,
        CloseReason::TooSlow => 4002,
        CloseReason::Idle => 4003,
        CloseReason::Draining => 1001,
        CloseReason::ProtocolError => 1007,
        CloseReason::ServerFault | CloseReason::Unspecified => 1011,
    }
}

async fn carry(socket: WebSocket, hub: Arc<Hub>, device: KnownDevice, clock: Arc<dyn Clock>) {
    let session = Session::open(hub, device);
    let handle = session.handle();
    let (mut sink, mut stream) = socket.split();
    let (mut reader, mut writer) = session.halves(clock.as_ref());
    // Reading and writing share one task, but neither waits for the other: a client that writes a lot before it reads
    // can't lock both sides up.
    let read = async {
        while let Some(Ok(message)) = stream.next().await {
            let read = match message {
                Message::Binary(bytes) => reader.receive(bytes).await,
                Message::Text(_) => Err(CloseReason::ProtocolError),
                Message::Ping(_) | Message::Pong(_) => {
                    reader.heard();
                    Ok(())
                }
                Message::Close(_) => return,
            };
            if let Err(reason) = read {
                handle.close(reason);
                // The writer says why, and ends the stream.
                std::future::pending::<()>().await;
            }
        }
    };
    let write = async {
        loop {
            let sent = match writer.next().await {
                Output::Frames(bytes) => sink.send(Message::Binary(bytes)).await,
                Output::Ping => sink.send(Message::Ping(bytes::Bytes::new())).await,
                Output::Close(bytes, reason) => {
                    let close = CloseFrame { code: close_code(reason), reason: reason.as_str_name().into() };
                    if sink.feed(Message::Binary(bytes)).await.is_ok() {
                        let _ = sink.send(Message::Close(Some(close))).await;
                    }
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
        // The socket takes nothing more, not even the reason to close it.
        () = handle.aborted() => {}
    }
}
