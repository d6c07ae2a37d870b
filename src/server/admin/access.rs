//! Who may read the admin port.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};

use super::{AdminState, problem};
use crate::id::Secret;

pub(super) async fn check_key(
    State(state): State<Arc<AdminState>>,
    request: Request,
    next: Next,
) -> Response {
    match &state.api_key {
        Some(key) if !shows_key(request.headers(), key) => {
            let detail = "this server asks for its API key, as X-API-Key or Authorization: Bearer";
            let mut answer = problem(StatusCode::UNAUTHORIZED, detail);
            answer.headers_mut().insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"silo-proxy\""),
            );
            answer
        }
        _ => next.run(request).await,
    }
}

fn shows_key(headers: &HeaderMap, key: &Secret) -> bool {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
    });
    let plain = headers.get("x-api-key").map(HeaderValue::as_bytes);
    [bearer, plain]
        .into_iter()
        .flatten()
        .any(|candidate| key.matches(candidate))
}
