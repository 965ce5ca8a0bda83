//! A plain subscription that goes on where it was.
//!
//! ```text
//! event ──its position is kept──▶ handed out      connection lost ──▶ subscribe again after what was handed out
//! ```
//! On a durable topic nothing is missed and nothing comes twice. What an ephemeral one said meanwhile is gone, and a
//! gap stands in its place.
//!
//! The newest of each topic of a pattern cannot be asked for beside positions. Where that replay is cut off it is asked
//! for once more, for the topics that had brought nothing; then everything goes on from the positions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
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
                Ok(heard) => {
                    let was_catching_up = self.place.passed_over.is_some();
                    match self.place.hear(heard) {
                        Ok(incoming) => {
                            self.ready.extend(incoming);
                            if was_catching_up && self.place.passed_over.is_none() {
                                // What was passed over comes by another subscription.
                                self.live = None;
                            }
                            continue;
                        }
                        Err(error) => error,
                    }
                }
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
    /// The newest of each topic of a pattern were asked for, and not all of them have brought theirs.
    owed: bool,
    /// Those are asked for again: the topics of which nothing is taken meanwhile.
    passed_over: Option<BTreeSet<String>>,
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
        let owed = is_pattern(topic) && matches!(asked.from, Start::Last(_));
        let (began, topic) = (None, topic.into());
        Self { topic, asked, began, reached, replayed, resumed: false, owed, passed_over: None }
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
        let is_pattern = is_pattern(&self.topic);
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
        if self.owed {
            // The gap of what is ephemeral stands before all that comes after it.
            return (as_at_first.0, false);
        }
        if self.reached.is_empty() && !self.replayed {
            return as_at_first;
        }
        let others_from = match &self.asked.from {
            Start::Earliest => Timestamp::from_millis(0).to_string(),
            Start::Time(time) | Start::Resume { others_from: time, .. } => time.to_string(),
            Start::Latest | Start::After(_) | Start::Last(_) => began.ts.clone(),
        };
        (from(json!({ "positions": self.reached, "time": others_from })), has_ephemeral)
    }

    fn subscribed(&mut self, ack: &Heard) {
        // What is ephemeral goes on with what is said from now on.
        self.owed &= ack.lane.as_deref() != Some("ephemeral");
        match &mut self.began {
            Some(began) => {
                began.lane.clone_from(&ack.lane);
                self.resumed = true;
                self.passed_over = self.owed.then(|| self.reached.keys().cloned().collect());
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

    /// Whether an event goes on where its topic stands. While the newest are asked for again, a topic that was reached
    /// before goes on from its position later, and one whose newest begin after the subscription did goes on from that
    /// time: more of it may have come since than were asked for.
    fn goes_on(&mut self, heard: &Heard) -> bool {
        let (Some(passed_over), Some(began)) = (&mut self.passed_over, &self.began) else { return true };
        let (Some(topic), Some(_)) = (&heard.topic, &heard.position) else { return false };
        if passed_over.contains(topic) {
            return false;
        }
        let is_older = || {
            let [ts, began] = [&heard.ts, &began.ts].map(|ts| ts.parse::<Timestamp>().ok());
            ts < began
        };
        let goes_on = self.reached.contains_key(topic) || is_older();
        if !goes_on {
            passed_over.insert(topic.clone());
        }
        goes_on
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
                if !self.goes_on(&heard) {
                    return Ok(None);
                }
                if let (Some(topic), Some(position)) = (&heard.topic, &heard.position) {
                    self.reached.insert(topic.clone(), position.clone());
                }
                Ok(Event::read(heard).map(Incoming::Event))
            }
            "checkpoint" => {
                // Of events without a position this is what says where to go on.
                if let (Some(topic), Some(position)) = (heard.topic, heard.position) {
                    self.reached.insert(topic, position);
                }
                Ok(None)
            }
            "gap" => Ok(Some(Incoming::Gap {
                topic: heard.topic.unwrap_or_default(),
                dropped: heard.dropped,
                reason: heard.reason.unwrap_or_default(),
            })),
            "info" if heard.code.as_deref() == Some("REPLAY_DONE") => {
                self.owed = false;
                if self.passed_over.take().is_some() {
                    // What was passed over is still to come.
                    return Ok(None);
                }
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

fn is_pattern(topic: &str) -> bool {
    topic.split('.').any(|token| token == "*" || token == ">")
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
    }

    #[test]
    fn the_newest_of_a_pattern_are_asked_for_until_each_topic_has_brought_its_own() {
        const BEFORE: &str = "2025-12-31T23:59:59.999Z";
        let event = |topic: &str, position: &str, ts: &str| {
            heard(json!({ "type": "event", "topic": topic, "position": position, "lane": "durable",
                "subscription": "a.>", "message": { "payload": 1 }, "ts": ts }))
        };
        let mut place = begun("a.>", Start::Last(2), Some("durable"));
        handed(&mut place, "a.b", "1-2-3");
        for _ in 0..2 {
            assert_eq!(resumes(&place), (json!({ "last_n": 2 }), false));
            place.subscribed(&heard(
                json!({ "type": "ack", "lane": "durable", "ts": "2026-01-01T00:00:09.000Z" }),
            ));
            assert!(
                place.hear(event("a.b", "1-2-9", BEGAN)).unwrap().is_none(),
                "it goes on from its position"
            );
            assert!(
                place.hear(event("a.d", "3-2-7", BEGAN)).unwrap().is_none(),
                "it goes on from when all began"
            );
            assert!(place.hear(event("a.d", "3-2-8", BEGAN)).unwrap().is_none());
        }
        for (position, ts) in [("2-2-2", BEFORE), ("2-2-3", BEGAN)] {
            assert!(place.hear(event("a.c", position, ts)).unwrap().is_some(), "it had brought nothing");
        }
        assert!(!done(&mut place), "what was passed over is still to come");
        let positions = json!({ "a.b": "1-2-3", "a.c": "2-2-3" });
        assert_eq!(resumes(&place), (json!({ "from": { "positions": positions, "time": BEGAN } }), false));
        place.subscribed(&heard(json!({ "type": "ack", "lane": "durable", "ts": BEGAN })));
        assert!(place.hear(event("a.d", "3-2-7", BEGAN)).unwrap().is_some());
        assert!(done(&mut place));
    }

    #[test]
    fn an_ephemeral_topic_has_a_gap_and_its_history_does_not_come_twice() {
        let place = begun("a.b", Start::Last(5), Some("ephemeral"));
        assert_eq!(resumes(&place), (json!({}), true));
        let mut place = begun("a.*", Start::Last(5), Some("ephemeral"));
        assert_eq!(resumes(&place), (json!({}), true));
        place.subscribed(&heard(json!({ "type": "ack", "lane": "ephemeral", "ts": BEGAN })));
        let event = json!({ "type": "event", "topic": "a.b", "lane": "ephemeral",
            "message": { "payload": 1 }, "ts": BEGAN });
        assert!(place.hear(heard(event)).unwrap().is_some());
        let mut place = begun(">", Start::Latest, None);
        assert!(resumes(&place).1);
        place.subscribed(&heard(json!({ "type": "ack", "ts": BEGAN })));
        let event = json!({ "type": "event", "topic": "a", "lane": "ephemeral", "subscription": ">",
            "message": { "payload": 1 }, "ts": BEGAN });
        assert!(place.hear(heard(event)).unwrap().is_none());
    }
}
