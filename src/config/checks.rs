//! What settings have to be together: each value is right by itself, and these are the rules between them and with
//! the machine.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;

use reqwest::Url;

use super::settings::Settings;
use crate::lane::settings::{Secret, Tls};
use crate::origin::Problem;
use crate::telemetry::trace::NOT_BUILT;

/// Everything that is wrong between the settings.
pub fn check(settings: &Settings) -> Vec<Problem> {
    let mut checks = Checks { settings, problems: Vec::new() };
    checks.listeners();
    checks.positive();
    checks.session();
    checks.ephemeral();
    checks.durable();
    checks.trace(NOT_BUILT);
    checks.problems
}

struct Checks<'a> {
    settings: &'a Settings,
    problems: Vec<Problem>,
}

impl Checks<'_> {
    fn problem(&mut self, key: &str, why: impl std::fmt::Display) {
        self.problems.push(Problem::of_key(self.settings.origin(key), key, why));
    }

    fn listeners(&mut self) {
        let server = &self.settings.server;
        let is_local = |address: SocketAddr| address.ip().to_canonical().is_loopback();
        for (key, address) in [("server.listen", server.listen), ("server.admin", server.admin)] {
            if !is_local(address) && !server.allow_anonymous {
                self.problem(
                    key,
                    format_args!(
                        "{address} can be reached from other machines, and no authentication is configured: listen \
                         on 127.0.0.1, or say server.allow_anonymous = true"
                    ),
                );
            }
        }
        if server.listen == server.admin && server.listen.port() != 0 {
            let why = format!(
                "{} is server.listen ({}) as well",
                server.admin,
                self.settings.origin("server.listen")
            );
            self.problem("server.admin", why);
        }
    }

    fn positive(&mut self) {
        let session = &self.settings.session;
        let zero = [
            ("session.max_message", session.max_message == 0),
            ("session.queue_messages", session.queue_messages == 0),
            ("session.queue_bytes", session.queue_bytes == 0),
            ("session.ping_interval", session.ping_interval.is_zero()),
            ("session.pong_timeout", session.pong_timeout.is_zero()),
            ("session.handshake_timeout", session.handshake_timeout.is_zero()),
            ("session.max_subscriptions", session.max_subscriptions == 0),
            ("session.max_inflight", session.max_inflight == 0),
            ("lanes.durable.spool_max", self.settings.lanes.durable.spool_max == 0),
            ("lanes.durable.publish_timeout", self.settings.lanes.durable.publish_timeout.is_zero()),
        ];
        for (key, _) in zero.into_iter().filter(|(_, zero)| *zero) {
            self.problem(key, "it cannot be zero: nothing would get through");
        }
    }

    fn session(&mut self) {
        let session = &self.settings.session;
        if session.pong_timeout <= session.ping_interval && !session.pong_timeout.is_zero() {
            let why = format!(
                "it must be longer than session.ping_interval ({}), or clients that are well are closed between two pings",
                self.settings.origin("session.ping_interval")
            );
            self.problem("session.pong_timeout", why);
        }
    }

    fn ephemeral(&mut self) {
        let lane = &self.settings.lanes.ephemeral;
        self.urls("lanes.ephemeral.url", &lane.url, &["nats", "tls"]);
        self.urls("lanes.ephemeral.monitor_url", std::slice::from_ref(&lane.monitor_url), &["http", "https"]);
        match (&lane.user, &lane.password) {
            (Some(_), None) => self.problem("lanes.ephemeral.user", "it needs lanes.ephemeral.password"),
            (None, Some(_)) => self.problem("lanes.ephemeral.password", "it needs lanes.ephemeral.user"),
            _ => {}
        }
        let ways = [
            ("lanes.ephemeral.token", lane.token.is_some()),
            ("lanes.ephemeral.user", lane.user.is_some()),
            ("lanes.ephemeral.credentials", lane.credentials.is_some()),
        ];
        let given: Vec<_> = ways.into_iter().filter(|(_, given)| *given).map(|(key, _)| key).collect();
        if let [first, others @ ..] = &given[..] {
            for other in others {
                let why =
                    format!("{first} ({}) is there as well: leave one out", self.settings.origin(first));
                self.problem(other, why);
            }
        }
        self.secret("lanes.ephemeral.token", lane.token.as_ref());
        self.secret("lanes.ephemeral.password", lane.password.as_ref());
        self.readable("lanes.ephemeral.credentials", lane.credentials.as_deref());
        self.tls("lanes.ephemeral.tls", lane.tls.as_ref());
    }

    fn durable(&mut self) {
        let lane = &self.settings.lanes.durable;
        self.urls("lanes.durable.url", &lane.url, &["pulsar", "pulsar+ssl"]);
        self.urls("lanes.durable.admin_url", std::slice::from_ref(&lane.admin_url), &["http", "https"]);
        self.secret("lanes.durable.token", lane.token.as_ref());
        self.tls("lanes.durable.tls", lane.tls.as_ref());
    }

    /// `not_built` is why this build cannot do it.
    fn trace(&mut self, not_built: Option<&str>) {
        let Some(otlp) = &self.settings.trace.otlp else { return };
        match (Url::parse(otlp), not_built) {
            (_, Some(why)) => self.problem("trace.otlp", why),
            (Ok(url), _) if url.password().is_some() || !url.username().is_empty() => self.problem(
                "trace.otlp",
                "a user or password does not stand in a URL: OTEL_EXPORTER_OTLP_HEADERS is for them",
            ),
            (Ok(url), _) if ["http", "https"].contains(&url.scheme()) && url.query().is_none() => {}
            // Not repeated: it may hold a token.
            _ => self.problem("trace.otlp", "it is no URL of a collector, such as http://127.0.0.1:4318"),
        }
    }

    fn urls(&mut self, key: &str, urls: &[String], schemes: &[&str]) {
        if urls.is_empty() {
            self.problem(key, "the list is empty: name one server at least");
        }
        for text in urls {
            match Url::parse(text) {
                // Settings are shown by `explain`, secrets never: the URL is not repeated here either.
                Ok(url) if url.password().is_some() || !url.username().is_empty() => {
                    self.problem(
                        key,
                        "a user or password does not stand in a URL: there are settings for them",
                    );
                }
                Ok(url) if schemes.contains(&url.scheme()) && url.has_host() => {}
                _ => self.problem(
                    key,
                    format_args!(
                        "{text:?} is no URL of this broker: it begins with {}://",
                        schemes.join(":// or ")
                    ),
                ),
            }
        }
    }

    fn secret(&mut self, key: &str, secret: Option<&Secret>) {
        if let Some(Err(error)) = secret.map(Secret::read) {
            self.problem(key, error);
        }
    }

    fn tls(&mut self, key: &str, tls: Option<&Tls>) {
        let Some(tls) = tls else { return };
        for (name, path) in [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)] {
            self.readable(&format!("{key}.{name}"), path.as_deref());
        }
        match (&tls.cert, &tls.key) {
            (Some(_), None) => {
                self.problem(&format!("{key}.cert"), format_args!("it needs its key: set {key}.key"))
            }
            (None, Some(_)) => {
                self.problem(&format!("{key}.key"), format_args!("it needs its certificate: set {key}.cert"))
            }
            _ => {}
        }
    }

    fn readable(&mut self, key: &str, path: Option<&Path>) {
        if let Some(path) = path
            && let Err(error) = File::open(path)
        {
            self.problem(key, format_args!("cannot read {}: {error}", path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests run with every feature, so no build of theirs refuses it.
    #[test]
    fn a_collector_is_refused_by_name_where_the_build_cannot_export() {
        let mut settings = Settings::default();
        let found = |settings: &Settings| {
            let mut checks = Checks { settings, problems: Vec::new() };
            checks.trace(Some("build it with"));
            checks.problems.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(found(&settings).is_empty());
        settings.trace.otlp = Some("http://127.0.0.1:4318".into());
        assert_eq!(found(&settings), ["trace.otlp: build it with"]);
    }
}
