//! Every route, and the layers around them.

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;

use super::auth::require_device;
use super::error::ApiError;
use super::http::{account, blocks, devices, group_reads, groups, inbox, key_packages, keys, messages, ops, server, stream};
use super::serve::Peer;
use super::{EdgeState, Operations, limits::Client};
use crate::limits;
use crate::metrics;
use crate::wire::stream::Code;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Sealpost",
        description = include_str!("http/openapi.md"),
        license(name = "AGPL-3.0-only", identifier = "AGPL-3.0-only")
    ),
    modifiers(&Scheme),
    tags(
        (name = "devices", description = "Registering, renaming and revoking devices"),
        (name = "account", description = "The device's own account"),
        (name = "blocks", description = "Accounts whose messages are refused"),
        (name = "keys", description = "Publishing key_packages, keys, and fetching those of others"),
        (name = "messages", description = "Sending"),
        (name = "inbox", description = "Receiving without a stream"),
        (name = "groups", description = "Groups with MLS (RFC 9420)"),
        (name = "stream", description = "Receiving and sending on one WebSocket"),
        (name = "server", description = "What the server is"),
        (name = "operations", description = "For operators")
    )
)]
struct Document;

struct Scheme;

impl Modify for Scheme {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("sp1_ and base64url of account, device and secret")
            .description(Some("The credential that the device got when it registered"))
            .build();
        document.components.get_or_insert_default().add_security_scheme("device", SecurityScheme::Http(scheme));
    }
}

/// The routes that need a device's credential, then those that need none. A new private route goes here, where it can't
/// forget its credential.
fn private() -> OpenApiRouter<EdgeState> {
    let send = OpenApiRouter::new().routes(routes!(messages::send)).layer(DefaultBodyLimit::max(limits::SEND_BODY_BYTES));
    let group_changes = OpenApiRouter::new()
        .routes(routes!(groups::create, group_reads::list))
        .routes(routes!(groups::commit))
        .layer(DefaultBodyLimit::max(limits::GROUP_BODY_BYTES));
    OpenApiRouter::new()
        .routes(routes!(account::get, account::delete))
        .routes(routes!(account::link))
        .routes(routes!(account::unlink))
        .routes(routes!(devices::rename, devices::revoke))
        .routes(routes!(blocks::list))
        .routes(routes!(blocks::add, blocks::remove))
        .routes(routes!(keys::publish, keys::counts))
        .routes(routes!(keys::resolve))
        .routes(routes!(keys::devices))
        .routes(routes!(keys::bundles))
        .routes(routes!(key_packages::publish, key_packages::counts))
        .routes(routes!(key_packages::fetch))
        .routes(routes!(group_reads::details, groups::close))
        .routes(routes!(groups::propose))
        .routes(routes!(groups::send))
        .routes(routes!(group_reads::items))
        .routes(routes!(group_reads::info))
        .routes(routes!(group_reads::tree))
        .routes(routes!(inbox::page))
        .routes(routes!(inbox::ack))
        .routes(routes!(stream::open))
        .layer(DefaultBodyLimit::max(limits::BODY_BYTES))
        .merge(send)
        .merge(group_changes)
}

fn public() -> OpenApiRouter<EdgeState> {
    OpenApiRouter::new()
        .routes(routes!(devices::register))
        .routes(routes!(server::get))
        .routes(routes!(server::dev_token))
        .routes(routes!(ops::alive))
        .routes(routes!(ops::ready))
        .routes(routes!(ops::metrics))
        .layer(DefaultBodyLimit::max(limits::BODY_BYTES))
}

/// The whole edge.
pub fn router(state: EdgeState) -> Router {
    let private = private().route_layer(middleware::from_fn_with_state(state.clone(), require_device));
    let (routes, document) = OpenApiRouter::with_openapi(Document::openapi()).merge(private).merge(public()).split_for_parts();
    routes
        .merge(SwaggerUi::new("/docs").url("/openapi.json", document))
        .fallback(|| async { ApiError::not_found("there is no such page") })
        .method_not_allowed_fallback(|| async {
            ApiError::bad_request("the page does not take this method").with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .layer(middleware::from_fn_with_state(state.operations.clone(), around))
        .with_state(state)
}

/// What a process without an edge serves: the pages for operators.
pub fn operations(operations: Operations) -> Router {
    Router::new()
        .route("/healthz", get(ops::alive))
        .route("/readyz", get(ops::ready))
        .route("/metrics", get(ops::metrics))
        .fallback(|| async { ApiError::not_found("this process serves no devices: it is a projector") })
        .layer(middleware::from_fn_with_state(operations.clone(), around))
        .with_state(operations)
}

/// The API's description.
pub fn document() -> utoipa::openapi::OpenApi {
    OpenApiRouter::with_openapi(Document::openapi()).merge(private()).merge(public()).into_openapi()
}

/// Around every request: whose it is, its address's rate, its time, the headers of its answer.
async fn around(State(operations): State<Operations>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let page = request.uri().path().starts_with("/docs");
    let long_poll = request.uri().path() == "/v1/inbox";
    // Without a peer it did not come through `serve`; then it counts as nobody's.
    let peer = request.extensions().get::<Peer>().map_or(std::net::IpAddr::from([0; 4]), |peer| peer.0.ip());
    let client: Client = operations.rate_limits().client(peer, request.headers());
    request.extensions_mut().insert(client);
    let mut response = match operations.rate_limits().request_from(client) {
        Err(limited) => limited.into_response(),
        Ok(()) => {
            let patience =
                operations.config().request_timeout() + if long_poll { Duration::from_secs(limits::LONG_POLL_S) } else { Duration::ZERO };
            match tokio::time::timeout(patience, next.run(request)).await {
                Ok(response) => response,
                Err(_) => ApiError::new(Code::OutcomeUnknown, "the request took too long; what it asked for may or may not be done")
                    .into_response(),
            }
        }
    };
    harden(&mut response, page, operations.config().tls.is_some());
    metrics::observe_request(response.status().as_u16(), started.elapsed());
    response
}

/// Headers that tell browsers to be careful.
fn harden(response: &mut Response, page: bool, tls: bool) {
    let policy = if page {
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
    } else {
        "default-src 'none'; frame-ancestors 'none'"
    };
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(header::CONTENT_SECURITY_POLICY, policy);
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::REFERRER_POLICY, "no-referrer");
    if !page {
        set(header::CACHE_CONTROL, "no-store");
    }
    if tls {
        set(header::STRICT_TRANSPORT_SECURITY, "max-age=31536000");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_private_route_says_so_and_every_route_is_described() {
        let document = serde_json::to_value(document()).expect("serializes");
        let public = ["/v1/server", "/v1/dev/token", "/healthz", "/readyz", "/metrics"];
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                let open = public.contains(&path.as_str()) || (path == "/v1/devices" && method == "post");
                assert_eq!(operation["security"].is_array(), !open, "{method} {path}");
                assert!(operation["summary"].is_string(), "{method} {path}");
            }
        }
        let schemas = document["components"]["schemas"].as_object().expect("schemas");
        assert!(schemas.contains_key("ErrorBody") && schemas.contains_key("DeviceBundle"), "{:?}", schemas.keys());
    }

    /// The description names every code, so that a client needs nothing else.
    #[test]
    fn every_error_code_is_described() {
        let text = include_str!("http/openapi.md");
        for number in 1..=17 {
            let name = super::super::error::name(Code::try_from(number).expect("a code"));
            assert!(text.contains(&format!("`{name}`")), "{name}");
        }
    }
}
