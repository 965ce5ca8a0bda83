//! The oracle finds each kind of violation, and nothing where there is none.

use super::*;

const EVERY: [Promise; 6] =
    [Promise::Live, Promise::Queue, Promise::Stored, Promise::First, Promise::Shared, Promise::KeyShared];

fn name(n: u64) -> Name {
    Name { topic: "t".into(), publisher: 0, n }
}

fn to(promise: Promise) -> History {
    let subscriber = Subscriber { name: "s".into(), topic: "t".into(), promise, heard: Vec::new() };
    History { subscribers: vec![subscriber], ..History::default() }
}

impl History {
    /// Each a second after the one before.
    fn publish(mut self, n: u64, connection: usize, answer: Answer) -> Self {
        let sent = self.operations.len() as Moment * 1000;
        let key = Some("k".into());
        self.operations.push(Operation { name: name(n), key, connection, sent, answered: sent + 10, answer });
        self
    }

    fn ok(self, n: u64) -> Self {
        self.publish(n, 1, Answer::Ok)
    }

    fn hear(mut self, what: What) -> Self {
        let at = self.operations.len() as Moment * 1000 + self.subscribers[0].heard.len() as Moment;
        self.subscribers[0].heard.push(Heard { at, what });
        self
    }

    fn event(self, n: u64, position: &str) -> Self {
        self.hear(What::Event { name: name(n), position: Some(position.into()), late: false })
    }

    fn events<const N: usize>(self, numbers: [u64; N]) -> Self {
        numbers.into_iter().fold(self, |history, n| {
            let position = format!("{n}/{}", history.subscribers[0].heard.len());
            history.event(n, &position)
        })
    }

    fn broken(mut self, hurt: Hurt, from: Moment, to: Moment) -> Self {
        self.disturbances.push(Disturbance { hurt, from, to });
        self
    }

    fn rules(&self) -> Vec<Rule> {
        self.violations().iter().map(|violation| violation.rule).collect()
    }
}

fn refused() -> Answer {
    Answer::Refused("LANE_UNAVAILABLE".into())
}

fn unknown() -> Answer {
    Answer::Unknown("OUTCOME_UNKNOWN".into())
}

#[test]
fn everything_that_came_once_and_in_order_breaks_nothing() {
    for promise in EVERY {
        let history =
            to(promise).ok(0).publish(1, 1, refused()).publish(2, 1, unknown()).ok(3).events([0, 3]);
        assert_eq!(history.rules(), [], "{promise:?}");
        assert_eq!(history.event(2, "2/0").rules().len(), usize::from(promise.orders()), "{promise:?}");
    }
}

impl Promise {
    fn orders(self) -> bool {
        !matches!(self, Promise::Queue | Promise::Shared)
    }
}

#[test]
fn what_was_accepted_and_never_came_is_lost() {
    for promise in EVERY {
        for answer in [Answer::Ok, Answer::Spooled] {
            let history = to(promise).publish(0, 1, answer).ok(1).event(1, "1");
            assert_eq!(history.rules(), [Rule::Lost], "{promise:?}");
            assert_eq!(history.owed().len(), usize::from(promise.is_whole()), "{promise:?}");
        }
        // Refused at first, and accepted when it was tried again.
        let history = to(promise).publish(0, 1, refused()).ok(0);
        assert_eq!(history.rules(), [Rule::Lost], "{promise:?}");
    }
}

#[test]
fn what_was_refused_each_time_must_not_come() {
    for promise in EVERY {
        let history = to(promise).publish(0, 1, refused()).publish(0, 1, refused()).event(0, "0");
        assert_eq!(history.rules(), [Rule::RefusedAndDelivered], "{promise:?}");
    }
}

#[test]
fn what_nobody_published_must_not_come() {
    assert_eq!(to(Promise::Stored).event(0, "0").rules(), [Rule::NeverSent]);
}

#[test]
fn what_overtook_another_of_its_connection_is_out_of_order_unless_no_order_was_promised() {
    for promise in EVERY {
        let history = to(promise).ok(0).ok(1).ok(2).events([0, 2, 1]);
        let expected = if promise.orders() { vec![Rule::OutOfOrder] } else { Vec::new() };
        assert_eq!(history.rules(), expected, "{promise:?}");
        let history = to(promise).ok(0).publish(1, 2, Answer::Ok).events([1, 0]);
        assert_eq!(history.rules(), [], "{promise:?}: of two connections");
        let history = to(promise).publish(0, 1, refused()).ok(1).ok(0).events([1, 0]);
        assert_eq!(history.rules(), [], "{promise:?}: published again behind the other");
        let history = to(promise).publish(0, 1, unknown()).ok(0).ok(1).events([1, 0]);
        assert_eq!(history.rules(), expected, "{promise:?}: published again before the other");
    }
}

#[test]
fn what_is_late_is_in_no_order_and_what_is_not_late_is() {
    let late = |n| What::Event { name: name(n), position: None, late: true };
    let history = to(Promise::First).ok(0).ok(1).ok(2).event(0, "0").event(2, "2");
    assert_eq!(history.clone().hear(late(1)).rules(), []);
    assert_eq!(history.event(1, "1").rules(), [Rule::OutOfOrder]);
}

#[test]
fn a_second_copy_is_allowed_to_a_second_publish_whose_first_was_not_refused() {
    for promise in EVERY {
        let again = [0, 0];
        assert_eq!(to(promise).ok(0).events(again).rules(), [Rule::Repeated], "{promise:?}");
        let duplicate = to(promise).ok(0).publish(0, 1, Answer::Duplicate);
        assert_eq!(duplicate.events(again).rules(), [Rule::Repeated], "{promise:?}");
        let refused = to(promise).publish(0, 1, refused()).ok(0);
        assert_eq!(refused.events(again).rules(), [Rule::Repeated], "{promise:?}");
        let unknown = to(promise).publish(0, 1, unknown()).publish(0, 2, Answer::Spooled);
        assert_eq!(unknown.clone().events(again).rules(), [], "{promise:?}");
        assert_eq!(unknown.events([0, 0, 0]).rules(), [Rule::Repeated], "{promise:?}");
    }
}

#[test]
fn one_place_of_storage_comes_once() {
    let history = to(Promise::Stored).publish(0, 1, unknown()).publish(0, 2, Answer::Ok);
    assert_eq!(history.clone().event(0, "7").event(0, "8").rules(), []);
    assert_eq!(history.event(0, "7").event(0, "7").rules(), [Rule::Repeated]);
}

#[test]
fn what_a_member_held_comes_again_only_where_something_broke_meanwhile() {
    for promise in [Promise::Shared, Promise::KeyShared, Promise::First] {
        let history = to(promise).ok(0).event(0, "0").ok(1).event(1, "1").event(0, "0");
        assert_eq!(history.rules(), [Rule::Repeated], "{promise:?}");
        assert_eq!(history.clone().broken(Hurt::Bridge, 1500, 1600).rules(), [], "{promise:?}");
        let long_after = history.clone().broken(Hurt::Bridge, 90_000, 99_000);
        assert_eq!(long_after.rules(), [Rule::Repeated], "{promise:?}");
        assert_eq!(history.broken(Hurt::Nats, 1500, 1600).rules(), [Rule::Repeated], "{promise:?}");
    }
}

#[test]
fn a_connection_stores_an_id_once_and_calls_nothing_a_duplicate_of_what_is_not_there() {
    let promise = Promise::Stored;
    assert_eq!(to(promise).ok(0).ok(0).event(0, "0").rules(), [Rule::StoredTwice]);
    assert_eq!(to(promise).ok(0).publish(0, 2, Answer::Ok).event(0, "0").rules(), []);
    let nothing = to(promise).publish(0, 1, refused()).publish(0, 1, Answer::Duplicate).event(0, "0");
    assert_eq!(nothing.rules(), [Rule::DuplicateOfNothing]);
}

#[test]
fn an_ephemeral_hole_needs_a_gap_where_it_is() {
    let history = |first, second| {
        let mut history = to(Promise::Live).ok(0).ok(1).ok(2).ok(3).event(0, "");
        history = if first { history.hear(What::Gap(None)) } else { history };
        history = history.event(2, "");
        history = if second { history.hear(What::Gap(None)) } else { history };
        history.event(3, "")
    };
    assert_eq!(history(true, false).rules(), []);
    assert_eq!(history(false, false).rules(), [Rule::Lost]);
    assert_eq!(history(false, true).rules(), [Rule::Lost], "it is elsewhere");
    assert_eq!(to(Promise::Live).ok(0).ok(1).event(0, "").hear(What::Gap(None)).rules(), [], "at the end");
}

#[test]
fn a_gap_that_counts_adds_up() {
    let history = |dropped| {
        let history = to(Promise::Live).ok(0).ok(1).ok(2).ok(3);
        history.event(0, "").hear(What::Gap(Some(dropped))).event(3, "")
    };
    assert_eq!(history(2).rules(), []);
    assert_eq!(history(1).rules(), [Rule::Lost]);
    assert_eq!(history(3).rules(), [Rule::GapDoesNotAddUp]);
}

#[test]
fn what_a_killed_bridge_had_just_handed_over_may_be_lost_and_nothing_else_of_it() {
    let killed = |at| to(Promise::Live).ok(0).ok(1).ok(2).events([0, 2]).broken(Hurt::Bridge, at, at + 10);
    assert_eq!(killed(1500).rules(), []);
    assert_eq!(killed(500).rules(), [Rule::Lost], "it was sent after the kill");
    assert_eq!(killed(2500).rules(), [Rule::Lost], "it was sent long before");
    let stored = to(Promise::Stored).ok(0).broken(Hurt::Bridge, 5, 9);
    assert_eq!(stored.rules(), [Rule::Lost]);
}

#[test]
fn a_story_tells_what_was_asked_answered_and_delivered() {
    let history = to(Promise::Stored).publish(0, 1, unknown()).publish(0, 2, Answer::Ok).event(0, "7:1");
    let story = history.story(&name(0));
    for told in ["on connection 1", "OUTCOME_UNKNOWN", "on connection 2", "Ok", "came to s", "7:1"] {
        assert!(story.contains(told), "{told}: {story}");
    }
}
