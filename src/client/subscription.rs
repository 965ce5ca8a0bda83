//! A plain subscription that goes on where it was.
//!
//! ```text
//! event ──its position is kept──▶ handed out      connection lost ──▶ subscribe again after what was handed out
//! ```
//! On a durable topic nothing is missed and nothing comes twice. What an ephemeral one said meanwhile is gone, and a
//! gap stands in its place.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::connection::{ClientError, Sender};
use super::dial::{Dial, Live};
use super::event::{Event, Incoming};
use crate::message::{Start, Timestamp};
use crate::wire::json::heard::Heard;

/// What is subscribed to, besides the topic.
#[derive(Debug, Clone, Default)]
pub struct Subscribe {
    pub from: Start,
    /// Only what this expression holds for.
    pub filter: Option<String>,
    /// Shares an ephemeral topic with the other members. A group on a durable one is for `consume`.
    pub group: Option<String>,
}

pub struct Subscription {
    dial: Dial,
    live: Option<Live>,
    place: Place,
    ready: VecDeque<Incoming>,
}

impl Subscription {
    pub(super) async fn open(
        mut dial: Dial,
        within: Duration,
        topic: &str,
        asked: Subscribe,
    ) -> Result<Self, ClientError> {
        let mut place = Place::new(topic, asked);
        let (live, ack) = dial.subscribe_within(within, topic, place.options().0).await?;
        place.subscribed(&ack);
        Ok(Self { dial, live: Some(live), place, ready: VecDeque::new() })
    }

    /// The next thing to know. An error ends the subscription: it is one that trying again does not mend.
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Incoming, ClientError> {
        loop {
            if let Some(incoming) = self.ready.pop_front() {
                return Ok(incoming);
            }
            let Some(live) = &mut self.live else {
                self.resume().await?;
                continue;
            };
            let error = match live.next().await {
                Ok(heard) => match self.place.hear(heard) {
                    Ok(incoming) => {
                        self.ready.extend(incoming);
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if let Some(live) = self.live.take() {
                self.dial.lost(live, error).await?;
            }
        }
    }

    /// Speaks on the connection that brought the last event: a reply has to.
    pub fn sender(&self) -> Option<Sender> {
        self.live.as_ref().map(Live::sender)
    }

    /// The lane that was taken, where it is one.
    pub fn lane(&self) -> Option<&str> {
        self.place.began.as_ref()?.lane.as_deref()
    }

    async fn resume(&mut self) -> Result<(), ClientError> {
        let (options, gap) = self.place.options();
        match self.dial.subscribe(&self.place.topic, options, false).await {
            Ok((live, ack)) => {
                self.live = Some(live);
                self.place.subscribed(&ack);
                if gap {
                    let topic = self.place.topic.clone();
                    self.ready.push_back(Incoming::Gap { topic, dropped: None, reason: "outage".into() });
                }
            }
            // The route was changed meanwhile: the topic has no positions any more.
            Err(ClientError::Refused(error)) if error.code == "LANE_MISMATCH" && !gap => {
                self.place.moved_to_ephemeral();
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Where a subscription stands.
struct Place {
    topic: String,
    asked: Subscribe,
    began: Option<Began>,
    /// The last that was handed out of each topic.
    reached: BTreeMap<String, String>,
    /// Whether all that was asked for from storage has come.
    replayed: bool,
    resumed: bool,
}

struct Began {
    ts: String,
    position: Option<String>,
    lane: Option<String>,
}

impl Place {
    fn new(topic: &str, asked: Subscribe) -> Self {
        let reached = match &asked.from {
            Start::Resume { positions, .. } => {
                positions.iter().map(|(topic, at)| (topic.to_string(), at.to_string())).collect()
            }
            _ => BTreeMap::new(),
        };
        let replayed = asked.from == Start::Latest;
        Self { topic: topic.into(), asked, began: None, reached, replayed, resumed: false }
    }

    /// What to subscribe with now, and whether something is missing before what that brings.
    fn options(&self) -> (Value, bool) {
        let (mut options, gap) = self.start();
        options.insert("filter".into(), json!(self.asked.filter));
        options.insert("group".into(), json!(self.asked.group));
        (Value::Object(options), gap)
    }

    fn start(&self) -> (Map<String, Value>, bool) {
        let Some(began) = &self.began else { return (start_fields(&self.asked.from), false) };
        if began.lane.as_deref() == Some("ephemeral") {
            return (Map::new(), true);
        }
        let is_pattern = self.topic.split('.').any(|token| token == "*" || token == ">");
        let has_ephemeral = is_pattern && began.lane.is_none();
        let as_at_first = (start_fields(&self.asked.from), has_ephemeral);
        if !is_pattern {
            let asked_position = began.position.as_ref().filter(|_| self.replayed);
            return match self.reached.get(&self.topic).or(asked_position) {
                Some(position) => (from(json!({ "position": position })), false),
                None if self.replayed => (from(json!({ "time": began.ts })), false),
                None => as_at_first,
            };
        }
        if self.reached.is_empty() && !self.replayed {
            return as_at_first;
        }
        let others_from = match &self.asked.from {
            Start::Earliest => Timestamp::from_millis(0).to_string(),
            Start::Time(time) | Start::Resume { others_from: time, .. } => time.to_string(),
            Start::Latest | Start::After(_) | Start::Last(_) => began.ts.clone(),
        };
        // The newest of a topic that had not brought any of them yet cannot be asked for beside positions.
        let is_cut_short = !self.replayed && matches!(self.asked.from, Start::Last(_));
        let resume = from(json!({ "positions": self.reached, "time": others_from }));
        (resume, has_ephemeral || is_cut_short)
    }

    fn subscribed(&mut self, ack: &Heard) {
        match &mut self.began {
            Some(began) => {
                began.lane.clone_from(&ack.lane);
                self.resumed = true;
            }
            None => {
                self.began = Some(Began {
                    ts: ack.ts.clone(),
                    position: ack.position.clone(),
                    lane: ack.lane.clone(),
                });
            }
        }
    }

    fn moved_to_ephemeral(&mut self) {
        self.reached.clear();
        if let Some(began) = &mut self.began {
            began.lane = Some("ephemeral".into());
        }
    }

    /// What is to be handed out, or why the subscription has to be made again.
    fn hear(&mut self, heard: Heard) -> Result<Option<Incoming>, ClientError> {
        match heard.kind.as_str() {
            "event" => {
                let is_replayed = heard.subscription.is_some();
                if self.resumed && is_replayed && heard.lane.as_deref() == Some("ephemeral") {
                    // The bridge's history, of which part was handed out before. The gap stands for the rest.
                    return Ok(None);
                }
                if let (Some(topic), Some(position)) = (&heard.topic, &heard.position) {
                    self.reached.insert(topic.clone(), position.clone());
                }
                Ok(Event::read(heard).map(Incoming::Event))
            }
            "gap" => Ok(Some(Incoming::Gap {
                topic: heard.topic.unwrap_or_default(),
                dropped: heard.dropped,
                reason: heard.reason.unwrap_or_default(),
            })),
            "info" if heard.code.as_deref() == Some("REPLAY_DONE") => {
                let is_first = !std::mem::replace(&mut self.replayed, true);
                Ok(is_first.then_some(Incoming::Info(heard)))
            }
            "info" => Ok(Some(Incoming::Info(heard))),
            "error" => match heard.error {
                // A defect belongs to one message, which would meet it again.
                Some(error) if error.retryable && error.code != "INTERNAL" => {
                    Err(ClientError::Refused(error))
                }
                error => Ok(error.map(Incoming::Error)),
            },
            _ => Ok(None),
        }
    }
}

/// Where a subscription begins, as fields of its frame.
pub fn start_fields(start: &Start) -> Map<String, Value> {
    match start {
        Start::Latest => Map::new(),
        Start::Earliest => from(json!("earliest")),
        Start::Time(time) => from(json!({ "time": time.to_string() })),
        Start::After(position) => from(json!({ "position": position.to_string() })),
        Start::Last(n) => Map::from_iter([("last_n".into(), json!(n))]),
        Start::Resume { positions, others_from } => {
            let positions: BTreeMap<_, _> =
                positions.iter().map(|(topic, at)| (topic.as_str(), at.to_string())).collect();
            from(json!({ "positions": positions, "time": others_from.to_string() }))
        }
    }
}

fn from(value: Value) -> Map<String, Value> {
    Map::from_iter([("from".into(), value)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGAN: &str = "2026-01-01T00:00:00.000Z";

    fn heard(frame: Value) -> Heard {
        Heard::parse(&frame.to_string()).unwrap()
    }

    fn begun(topic: &str, from: Start, lane: Option<&str>) -> Place {
        let mut place = Place::new(topic, Subscribe { from, ..Subscribe::default() });
        place.subscribed(&heard(json!({ "type": "ack", "lane": lane, "position": "@7", "ts": BEGAN })));
        place
    }

    fn handed(place: &mut Place, topic: &str, position: &str) {
        let event = json!({ "type": "event", "topic": topic, "position": position, "lane": "durable",
            "message": { "payload": 1 }, "ts": BEGAN });
        assert!(place.hear(heard(event)).unwrap().is_some());
    }

    fn done(place: &mut Place) -> bool {
        let info = json!({ "type": "info", "code": "REPLAY_DONE", "ts": BEGAN });
        place.hear(heard(info)).unwrap().is_some()
    }

    fn resumes(place: &Place) -> (Value, bool) {
        let (fields, gap) = place.start();
        (Value::Object(fields), gap)
    }

    #[test]
    fn a_topic_goes_on_after_what_was_handed_out_else_where_it_began() {
        let mut place = begun("a.b", Start::Latest, Some("durable"));
        assert_eq!(resumes(&place), (json!({ "from": { "position": "@7" } }), false));
        handed(&mut place, "a.b", "1-2-3");
        assert_eq!(resumes(&place), (json!({ "from": { "position": "1-2-3" } }), false));
        // Nothing came of a replay: it is asked for again, and until it is through its ack says nothing.
        let mut place = begun("a.b", Start::Last(5), Some("durable"));
        assert_eq!(resumes(&place), (json!({ "last_n": 5 }), false));
        assert!(done(&mut place) && !done(&mut place), "told once");
        assert_eq!(resumes(&place), (json!({ "from": { "position": "@7" } }), false));
    }

    #[test]
    fn a_pattern_names_what_was_handed_out_and_a_time_for_the_rest() {
        let mut place = begun("a.>", Start::Earliest, Some("durable"));
        assert_eq!(resumes(&place), (json!({ "from": "earliest" }), false));
        handed(&mut place, "a.b", "1-2-3");
        let from = json!({ "from": { "positions": { "a.b": "1-2-3" }, "time": "1970-01-01T00:00:00.000Z" } });
        assert_eq!(resumes(&place), (from, false));
        let place = begun("a.>", Start::Latest, Some("durable"));
        assert_eq!(resumes(&place), (json!({ "from": { "positions": {}, "time": BEGAN } }), false));
        let mut place = begun("a.>", Start::Last(2), Some("durable"));
        handed(&mut place, "a.b", "1-2-3");
        assert!(resumes(&place).1, "the newest of the other topics may be missing");
        done(&mut place);
        assert!(!resumes(&place).1);
    }

    #[test]
    fn an_ephemeral_topic_has_a_gap_and_its_history_does_not_come_twice() {
        let place = begun("a.b", Start::Last(5), Some("ephemeral"));
        assert_eq!(resumes(&place), (json!({}), true));
        let mut place = begun(">", Start::Latest, None);
        assert!(resumes(&place).1);
        place.subscribed(&heard(json!({ "type": "ack", "ts": BEGAN })));
        let event = json!({ "type": "event", "topic": "a", "lane": "ephemeral", "subscription": ">",
            "message": { "payload": 1 }, "ts": BEGAN });
        assert!(place.hear(heard(event)).unwrap().is_none());
    }
}
