//! The filters of all subscribers: one of each expression, and one evaluation of each for a message.
//!
//! ```text
//! text ──▶ known already? ──▶ the one filter that all who wrote it share
//! message ──▶ in the envelope already? ──no──▶ evaluated ──▶ kept in the envelope
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::Value;

use crate::filter::{Filter, FilterError, Subject, Verdict};
use crate::message::Envelope;
use crate::telemetry::metrics::Metrics;

pub struct Filters {
    known: Mutex<Known>,
    /// The payload that was parsed last: a message meets the filters that want it one right after the other. Kept for
    /// one message only, because a parsed payload takes many times the memory of its bytes.
    parsed: Mutex<Option<(Weak<Envelope>, Arc<Value>)>>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Known {
    filters: HashMap<String, Weak<Filter>>,
    /// At so many those that nobody holds any more are forgotten.
    sweep_at: usize,
}

impl Filters {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { known: Mutex::default(), parsed: Mutex::default(), metrics }
    }

    /// The filter of this text. It may have to be parsed, which blocks for milliseconds.
    pub fn get(&self, text: &str) -> Result<Arc<Filter>, FilterError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(filter) = known().filters.get(text).and_then(Weak::upgrade) {
            return Ok(filter);
        }
        let parsed = Arc::new(Filter::parse(text)?);
        let mut known = known();
        // Another may have been as quick.
        if let Some(filter) = known.filters.get(text).and_then(Weak::upgrade) {
            return Ok(filter);
        }
        if known.filters.len() >= known.sweep_at {
            known.filters.retain(|_, filter| filter.strong_count() > 0);
            known.sweep_at = (2 * known.filters.len()).max(64);
        }
        known.filters.insert(text.to_owned(), Arc::downgrade(&parsed));
        Ok(parsed)
    }

    /// Whether the message is what the filter wants; found out once.
    pub fn matches(&self, filter: &Filter, envelope: &Arc<Envelope>) -> bool {
        envelope.verdict(filter.no, || {
            let payload = if filter.wants_payload { self.payload(envelope) } else { Arc::default() };
            let message = &envelope.message;
            let verdict = filter.evaluate(Subject {
                topic: envelope.topic.as_str(),
                key: message.key.as_deref(),
                headers: &message.headers,
                payload: &payload,
            });
            self.metrics.evaluated(verdict);
            verdict == Verdict::Matches
        })
    }

    /// `null` for what is not JSON.
    fn payload(&self, envelope: &Arc<Envelope>) -> Arc<Value> {
        let parsed = || self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, value)) = &*parsed()
            && std::ptr::eq(of.as_ptr(), Arc::as_ptr(envelope))
        {
            return value.clone();
        }
        let value: Arc<Value> =
            Arc::new(serde_json::from_slice(&envelope.message.payload).unwrap_or_default());
        let before = parsed().replace((Arc::downgrade(envelope), value.clone()));
        // A large one takes its time to go; nobody waits for the lock meanwhile.
        drop(before);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Draft;
    use crate::topic::Topic;

    fn envelope(payload: &'static str) -> Arc<Envelope> {
        let draft = Draft { payload: payload.into(), ..Draft::default() };
        let topic = Topic::parse("a").unwrap();
        Arc::new(Envelope::ephemeral(topic, draft.accept(), None))
    }

    #[test]
    fn an_expression_is_one_filter_for_all_and_is_evaluated_once_for_a_message() {
        let metrics = Arc::new(Metrics::new());
        let filters = Filters::new(metrics.clone());
        let (one, same) = (filters.get("payload.n > 1").unwrap(), filters.get("payload.n > 1").unwrap());
        assert!(Arc::ptr_eq(&one, &same));
        let other = filters.get("payload.n > 2").unwrap();
        let message = envelope(r#"{"n":2}"#);
        for _ in 0..1000 {
            assert!(filters.matches(&one, &message) && filters.matches(&same, &message));
            assert!(!filters.matches(&other, &message));
        }
        assert!(!filters.matches(&one, &envelope("not JSON")));
        let text = metrics.render();
        for (outcome, count) in [("matches", 1), ("does_not", 1), ("failed", 1)] {
            let line = format!("twinspan_filter_evaluations_total{{outcome=\"{outcome}\"}} {count}\n");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn what_nobody_holds_is_forgotten() {
        let filters = Filters::new(Arc::new(Metrics::new()));
        let first = filters.get("true").unwrap().no;
        assert_ne!(filters.get("true").unwrap().no, first);
        for n in 0..200 {
            filters.get(&format!("payload.n == {n}")).unwrap();
        }
        assert!(filters.known.lock().unwrap().filters.len() <= 64);
        assert!(filters.get("payload.n ==").is_err());
    }
}
