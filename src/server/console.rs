//! The console: one page for operators, embedded, so that it is there wherever the bridge is.
//!
//! It may run and load nothing but its own files, and speak with nobody but this bridge: the policy that goes with each
//! file says so to the browser.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::app::App;

struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! file {
    ($name:literal, $kind:expr) => {
        File {
            path: concat!("/console/", $name),
            kind: $kind,
            text: include_str!(concat!("console/", $name)),
        }
    };
}

static PAGE: File = File { path: "/", kind: HTML, text: include_str!("console/index.html") };

/// What the page asks for.
static FILES: [File; 12] = [
    file!("console.css", CSS),
    file!("console.js", SCRIPT),
    file!("charts.js", SCRIPT),
    file!("dom.js", SCRIPT),
    file!("explain.js", SCRIPT),
    file!("inspector.js", SCRIPT),
    file!("lanes.js", SCRIPT),
    file!("socket.js", SCRIPT),
    file!("tables.js", SCRIPT),
    file!("icon.svg", "image/svg+xml"),
    file!("vendor/uPlot.esm.js", SCRIPT),
    file!("vendor/uPlot.min.css", CSS),
];

pub fn routes() -> Router<Arc<App>> {
    FILES.iter().fold(Router::new(), |router, file| {
        let serve = async move |State(app): State<Arc<App>>, headers: HeaderMap| answer(&app, &headers, file);
        router.route(file.path, get(serve))
    })
}

/// Whether who asks would rather have a page than a line of text.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/html"))
}

pub fn page(app: &App, headers: &HeaderMap) -> Response {
    answer(app, headers, &PAGE)
}

fn answer(app: &App, headers: &HeaderMap, file: &File) -> Response {
    // A browser that has the file asks whether it is still the same: another version of the bridge brings another.
    let tag = format!("\"{:08x}\"", crc32c::crc32c(file.text.as_bytes()));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let about = [
        (header::CONTENT_TYPE, file.kind.to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy(app.listen, host)),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        (header::VARY, "accept".to_owned()),
        (header::ETAG, tag.clone()),
    ];
    if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        (StatusCode::NOT_MODIFIED, about).into_response()
    } else {
        (about, file.text).into_response()
    }
}

/// Besides its own origin the page speaks with the clients' listener: the inspector is a client.
fn policy(listen: SocketAddr, asked_host: &str) -> String {
    let clients = clients_at(listen, asked_host);
    format!(
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
         connect-src 'self' ws://{clients} wss://{clients}; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

/// Where a browser that asked for `asked_host` finds the clients' listener, as a policy can say it.
fn clients_at(listen: SocketAddr, asked_host: &str) -> String {
    let port = listen.port();
    match listen.ip() {
        IpAddr::V4(ip) if !ip.is_unspecified() => format!("{ip}:{port}"),
        ip if ip.is_unspecified() => {
            let asked = asked_host.parse::<Authority>();
            let host = asked.as_ref().map(Authority::host).unwrap_or_default();
            // What a name is made of, and nothing that would end the directive.
            let is_name = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
            if is_name && !host.is_empty() { format!("{host}:{port}") } else { format!("*:{port}") }
        }
        // A policy has no way to write an IPv6 address.
        _ => format!("*:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_names_the_clients_listener_as_the_browser_reaches_it() {
        for (listen, asked, clients) in [
            ("127.0.0.1:8090", "localhost:8091", "127.0.0.1:8090"),
            ("0.0.0.0:8090", "bridge-1.example:8091", "bridge-1.example:8090"),
            ("0.0.0.0:8090", "10.0.0.7:8091", "10.0.0.7:8090"),
            ("[::]:8090", "bridge:8091", "bridge:8090"),
            ("[::]:8090", "[fd00::7]:8091", "*:8090"),
            ("[::1]:8090", "localhost:8091", "*:8090"),
            ("0.0.0.0:8090", "", "*:8090"),
            ("0.0.0.0:8090", "x;script-src *", "*:8090"),
            ("0.0.0.0:8090", "x;script-src", "*:8090"),
        ] {
            assert_eq!(clients_at(listen.parse().unwrap(), asked), clients, "{listen} asked as {asked:?}");
        }
    }

    #[test]
    fn every_file_of_the_console_that_another_one_names_is_served() {
        for file in FILES.iter().chain([&PAGE]) {
            let folder = file.path.rsplit_once('/').unwrap().0;
            let named = file.text.split('"').filter_map(|text| text.strip_prefix('.'));
            for named in named.filter(|text| [".js", ".css", ".svg"].iter().any(|end| text.ends_with(end))) {
                let path = format!("{folder}{named}");
                assert!(FILES.iter().any(|file| file.path == path), "{} names {named}", file.path);
            }
        }
    }
}
