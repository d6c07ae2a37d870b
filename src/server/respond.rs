//! The one place that turns what went wrong into what a visitor sees.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use crate::headers::Refusal;
use crate::metrics::Failure;
use crate::mux::{OpenError, Reason};

/// Names the kind of failure, for whoever debugs from outside.
static X_SILO_ERROR: HeaderName = HeaderName::from_static("x-silo-error");

/// Why a visitor gets an answer of the server's own instead of his service's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// No agent is behind the port now.
    AgentOffline,
    /// The tunnel was lost before the answer's head came.
    TunnelLost,
    /// The local service refused the connection.
    UpstreamRefused,
    /// The local service broke its answer, or answered with something that isn't HTTP.
    UpstreamError,
    /// The local service didn't answer in time.
    UpstreamTimeout,
    /// Too much is in flight.
    Overloaded,
    /// The request line is too long.
    RequestLineTooLong,
    /// The head is too large, or has too many lines.
    HeadTooLarge,
    /// The body is larger than allowed.
    BodyTooLarge,
    /// The body broke the rules of its framing.
    BodyMalformed,
    /// The body broke off: the visitor has left, or at least sends nothing more.
    BodyIncomplete,
    /// The head says something it must not.
    Refused(Refusal),
}

impl From<OpenError> for Fault {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Overloaded => Self::Overloaded,
            OpenError::Draining => Self::AgentOffline,
            // Seen between the tunnel's end and the registry's notice of it.
            OpenError::TunnelLost => Self::TunnelLost,
        }
    }
}

impl From<Reason> for Fault {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::TunnelLost => Self::TunnelLost,
            Reason::Draining => Self::AgentOffline,
            Reason::UpstreamRefused => Self::UpstreamRefused,
            Reason::UpstreamTimeout => Self::UpstreamTimeout,
            Reason::Overloaded => Self::Overloaded,
            Reason::BodyIncomplete => Self::BodyIncomplete,
            Reason::UpstreamError | Reason::Cancelled | Reason::Unknown(_) => Self::UpstreamError,
        }
    }
}

impl Fault {
    /// What it counts as.
    pub(super) fn failure(self) -> Failure {
        match self {
            Self::AgentOffline => Failure::AgentOffline,
            Self::TunnelLost => Failure::TunnelLost,
            Self::UpstreamRefused => Failure::UpstreamRefused,
            Self::UpstreamError => Failure::UpstreamError,
            Self::UpstreamTimeout => Failure::UpstreamTimeout,
            Self::Overloaded => Failure::Overloaded,
            Self::RequestLineTooLong | Self::HeadTooLarge => Failure::HeadTooLarge,
            Self::BodyTooLarge => Failure::BodyTooLarge,
            Self::BodyIncomplete => Failure::VisitorLeft,
            Self::BodyMalformed | Self::Refused(_) => Failure::BadRequest,
        }
    }

    /// The answer's status.
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::AgentOffline | Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Self::TunnelLost | Self::UpstreamRefused | Self::UpstreamError => {
                StatusCode::BAD_GATEWAY
            }
            Self::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::RequestLineTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Refused(Refusal::Connect) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Refused(Refusal::Version) => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::BodyMalformed | Self::BodyIncomplete | Self::Refused(_) => {
                StatusCode::BAD_REQUEST
            }
        }
    }

    /// For people; it names no address and nothing of the inside.
    fn detail(self) -> String {
        match self {
            Self::AgentOffline => "No agent is connected behind this port now.".into(),
            Self::TunnelLost => "The connection to the agent was lost.".into(),
            Self::UpstreamRefused => "The service behind the agent refused the connection.".into(),
            Self::UpstreamError => "The service behind the agent broke its answer off.".into(),
            Self::UpstreamTimeout => "The service behind the agent did not answer in time.".into(),
            Self::Overloaded => "Too many requests are in flight to this agent.".into(),
            Self::RequestLineTooLong => "The request line is too long.".into(),
            Self::HeadTooLarge => "The request's header section is too large.".into(),
            Self::BodyTooLarge => "The request's body is too large.".into(),
            Self::BodyMalformed => "The request's body is malformed.".into(),
            Self::BodyIncomplete => "The request's body is incomplete.".into(),
            Self::Refused(refusal) => {
                let mut text = refusal.to_string();
                if let Some(first) = text.get_mut(..1) {
                    first.make_ascii_uppercase();
                }
                text + "."
            }
        }
    }

    /// When another try may succeed, in seconds.
    fn retry_after(self) -> Option<HeaderValue> {
        match self {
            // An agent's first attempts to come back are within a second.
            Self::AgentOffline | Self::Overloaded => Some(HeaderValue::from_static("1")),
            _ => None,
        }
    }

    /// Whether the connection can't be used again: what follows on it may not be a request.
    pub(super) fn closes(self) -> bool {
        match self {
            Self::RequestLineTooLong
            | Self::HeadTooLarge
            | Self::BodyTooLarge
            | Self::BodyMalformed
            | Self::BodyIncomplete
            | Self::Refused(_) => true,
            Self::AgentOffline
            | Self::TunnelLost
            | Self::UpstreamRefused
            | Self::UpstreamError
            | Self::UpstreamTimeout
            | Self::Overloaded => false,
        }
    }

    /// The answer: problem details as in RFC 9457.
    pub(super) fn respond(self) -> Response<Bytes> {
        let status = self.status();
        let body = serde_json::json!({
            "type": "about:blank",
            "title": status.canonical_reason().unwrap_or_default(),
            "status": status.as_u16(),
            "detail": self.detail(),
            "error": self.failure().as_str(),
        })
        .to_string();
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = status;
        let length = response.body().len().into();
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(CONTENT_LENGTH, length);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(
            X_SILO_ERROR.clone(),
            HeaderValue::from_static(self.failure().as_str()),
        );
        if let Some(retry_after) = self.retry_after() {
            headers.insert(RETRY_AFTER, retry_after);
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            // RFC 9110, section 15.5.6: what is allowed. Everything else goes to the service.
            headers.insert(
                http::header::ALLOW,
                HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
            );
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_failures() {
        for (fault, status, kind) in [
            (Fault::AgentOffline, 503, "agent_offline"),
            (Fault::TunnelLost, 502, "tunnel_lost"),
            (Fault::UpstreamRefused, 502, "upstream_refused"),
            (Fault::UpstreamError, 502, "upstream_error"),
            (Fault::UpstreamTimeout, 504, "upstream_timeout"),
            (Fault::Overloaded, 503, "overloaded"),
            (Fault::RequestLineTooLong, 414, "head_too_large"),
            (Fault::HeadTooLarge, 431, "head_too_large"),
            (Fault::BodyTooLarge, 413, "body_too_large"),
            (Fault::BodyMalformed, 400, "bad_request"),
            (Fault::BodyIncomplete, 400, "visitor_left"),
            (Fault::Refused(Refusal::Target), 400, "bad_request"),
            (Fault::Refused(Refusal::Connect), 405, "bad_request"),
        ] {
            let response = fault.respond();
            assert_eq!(response.status().as_u16(), status, "{fault:?}");
            assert_eq!(response.headers()["x-silo-error"], kind);
            assert_eq!(
                response.headers()["content-type"],
                "application/problem+json"
            );
            assert_eq!(
                response.headers().contains_key("retry-after"),
                status == 503
            );
            let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
            assert_eq!(body["status"], status);
            assert_eq!(body["error"], kind);
        }
    }
}
