//! What the client library tells, which is the only place where some failures show. Called from its one event task,
//! behind a queue that drops what it cannot hold, so nothing here waits.

use std::sync::Arc;

use async_nats::{ClientError, Event, ServerError};
use tracing::{info, warn};

use super::inbox::Waiters;
use super::refusals::{Refusal, Refused, may_not_publish};
use super::state::State;
use super::upstreams::Upstreams;
use crate::lane::contract::LaneError;

/// What the server says where an account or a connection has all the subscriptions it may have.
const TOO_MANY_SUBSCRIPTIONS: &str = "maximum subscriptions exceeded";

pub struct Events {
    pub state: Arc<State>,
    pub waiters: Arc<Waiters>,
    pub refused: Arc<Refused>,
    pub upstreams: Arc<Upstreams>,
}

impl Events {
    pub fn handle(&self, event: Event) {
        match event {
            Event::Connected => {
                self.state.take_complaint();
                self.state.wake();
            }
            Event::Disconnected => {
                self.state.lost();
                self.state.wake();
            }
            Event::LameDuckMode => {
                info!("The NATS server is about to leave.");
                self.state.note_lame_duck();
            }
            Event::SlowConsumer(_) => {
                self.upstreams.overflowed();
                self.state.note_overflow();
            }
            Event::ServerError(ServerError::Other(text)) => self.told(&text),
            Event::ServerError(error) => self.state.complain(error.to_string()),
            // The other failures to connect are told by the pool, in more words.
            Event::ClientError(ClientError::Other(text)) if text.starts_with("DNS") => {
                self.state.down(format!("the name of a NATS server is not known ({text}); trying again"));
            }
            Event::ClientError(_) | Event::Draining | Event::Closed => {}
        }
    }

    fn told(&self, text: &str) {
        match Refusal::parse(text) {
            Some(Refusal::Publish { subject } | Refusal::Subscription { subject, .. })
                if self.waiters.owns(subject) =>
            {
                self.waiters.refuse(subject, &may_not_publish(subject));
                self.state.complain(
                    "its user may not use `_INBOX.>`, which twinspan needs to publish and to subscribe"
                        .into(),
                );
            }
            Some(Refusal::Publish { subject }) => {
                if self.refused.note(subject) {
                    warn!(%subject, "The NATS user of this bridge may not publish: messages were dropped.");
                }
                self.upstreams.refused_publish(subject);
                self.waiters.refuse(subject, &may_not_publish(subject));
            }
            Some(Refusal::Subscription { subject, group }) => {
                self.upstreams.refused_subscription(subject, group);
            }
            None if text.eq_ignore_ascii_case(TOO_MANY_SUBSCRIPTIONS) => {
                warn!("The NATS server grants this bridge no more subscriptions.");
                let why = format!("the NATS server refuses the subscription: {text}");
                self.upstreams.refused_subscriptions(&LaneError::Forbidden(why));
            }
            None => {
                warn!(%text, "The NATS server reported an error.");
                self.state.complain(text.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;
    use crate::policy::table::RouteTable;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn a_message_that_the_client_library_dropped_is_counted_and_the_keeper_is_told() {
        let metrics = Arc::new(Metrics::new());
        let events = Events {
            state: Arc::new(State::new(&["nats://a".into()])),
            waiters: Arc::new(Waiters::new()),
            refused: Arc::default(),
            upstreams: Arc::new(Upstreams::new(Policy::new(RouteTable::default()), 1, metrics.clone())),
        };
        for _ in 0..3 {
            events.handle(Event::SlowConsumer(7));
        }
        assert!(events.state.take_overflow() && !events.state.take_overflow());
        let counted = "twinspan_dropped_total{lane=\"ephemeral\",reason=\"overflow\",route=\"-\"} 3";
        assert!(metrics.render().contains(counted), "{}", metrics.render());
    }
}
