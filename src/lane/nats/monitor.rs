//! What a nats-server tells of itself, by its monitoring port. It says nothing of the lane: a port that is closed leaves
//! the report empty and no more.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::Client;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::connect::OpenError;
use crate::lane::contract::BrokerReport;

const TIMEOUT: Duration = Duration::from_secs(1);

pub struct Monitor {
    url: String,
    client: Client,
    /// What had gone in and out when it was asked last.
    last: Mutex<Option<(Instant, u64, u64)>>,
}

#[derive(Deserialize)]
struct Varz {
    version: String,
    in_msgs: u64,
    out_msgs: u64,
    slow_consumers: u64,
}

#[derive(Deserialize)]
struct Connz {
    /// Of which it lists as many as it is asked for.
    total: u64,
}

#[derive(Deserialize)]
struct Subsz {
    num_subscriptions: u64,
}

#[derive(Deserialize)]
struct Healthz {
    status: String,
    #[serde(default)]
    error: String,
}

impl Monitor {
    pub fn new(url: &str) -> Result<Self, OpenError> {
        crate::lane::install_crypto();
        // The lane's own connection takes no proxy either.
        let client = Client::builder().timeout(TIMEOUT).no_proxy().build();
        let client = client.map_err(|error| OpenError::Client(error.to_string()))?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), client, last: Mutex::default() })
    }

    pub async fn report(&self) -> BrokerReport {
        let asked = tokio::try_join!(
            self.get::<Varz>("varz"),
            self.get::<Connz>("connz?limit=1"),
            self.get::<Subsz>("subsz"),
            self.get::<Healthz>("healthz"),
        );
        let (varz, connz, subsz, healthz) = match asked {
            Ok(told) => told,
            Err(error) => {
                let problem = format!("the monitoring port of NATS does not answer at {}: {error}", self.url);
                return BrokerReport { problem: Some(problem), ..BrokerReport::default() };
            }
        };
        let (in_rate, out_rate) = self.rates(Instant::now(), varz.in_msgs, varz.out_msgs).unzip();
        BrokerReport {
            version: Some(varz.version),
            connections: Some(connz.total),
            subscriptions: Some(subsz.num_subscriptions),
            slow_consumers: Some(varz.slow_consumers),
            in_rate,
            out_rate,
            problem: (healthz.status != "ok").then(|| format!("NATS is not well: {}", healthz.error)),
        }
    }

    /// Since it was asked last; none where that was never, or another server counts from zero.
    fn rates(&self, now: Instant, received: u64, sent: u64) -> Option<(f64, f64)> {
        let before = self.last.lock().unwrap_or_else(PoisonError::into_inner).replace((now, received, sent));
        let (then, received_then, sent_then) = before?;
        let seconds = (now - then).as_secs_f64();
        let rate = |now: u64, then: u64| Some(now.checked_sub(then)? as f64 / seconds);
        rate(received, received_then).zip(rate(sent, sent_then)).filter(|_| seconds > 0.0)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, reqwest::Error> {
        // A server that is not well says so with a status of its own, and a body.
        self.client.get(format!("{}/{path}", self.url)).send().await?.json().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_since_it_was_asked_last_and_none_across_a_restart_of_the_server() {
        let monitor = Monitor::new("http://127.0.0.1:1/").unwrap();
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(monitor.rates(begun, 100, 10), None);
        assert_eq!(monitor.rates(after(2), 300, 12), Some((100.0, 1.0)));
        assert_eq!(monitor.rates(after(3), 5, 0), None);
        assert_eq!(monitor.rates(after(4), 6, 2), Some((1.0, 2.0)));
    }
}
