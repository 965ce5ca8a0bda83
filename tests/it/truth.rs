//! What bridges said of their lanes and routes, and whether it was so: 5 s after something broke they say it, and 5 s
//! after it was mended they say that.

use serde_json::Value;

use crate::checker::Moment;

/// How long a bridge may not know yet.
const WITHIN: Moment = 5000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Ephemeral,
    Durable,
    Routes,
}

pub const SUBJECTS: [Subject; 3] = [Subject::Ephemeral, Subject::Durable, Subject::Routes];

/// Whether each of the subjects is well, where this source tells.
pub type Said = [Option<bool>; 3];

#[derive(Debug, Clone)]
pub struct Statement {
    pub bridge: usize,
    /// When its process began.
    pub since: Moment,
    pub asked: Moment,
    pub answered: Moment,
    pub source: &'static str,
    /// `None` where it did not answer.
    pub said: Option<Said>,
}

/// Something was broken from one moment until another, between which and a third it was mended.
#[derive(Debug, Clone)]
pub struct Broken {
    pub subject: Subject,
    /// `None`: all of them.
    pub bridge: Option<usize>,
    /// Surely away. What is slow or comes and goes may be called either.
    pub is_away: bool,
    pub from: Moment,
    pub mending: Moment,
    pub mended: Moment,
}

/// `/health`, as clients see it.
pub fn of_health(body: &Value) -> Said {
    let lane = |lane: &str| body["lanes"][lane]["status"].as_str().map(|status| status != "down");
    [lane("ephemeral"), lane("durable"), None]
}

/// `/health` of the operators' listener.
pub fn of_checks(body: &Value) -> Said {
    let check = |name: &str| body["checks"][name][0]["status"].as_str();
    let lane = |name: &str| check(name).map(|status| status != "fail");
    [lane("ephemeral:lane"), lane("durable:lane"), check("config:reload").map(|status| status == "pass")]
}

/// `/metrics`.
pub fn of_metrics(text: &str) -> Said {
    let is_one = |line: &str| metric(text, line).map(|value| value == 1.0);
    [
        is_one(r#"twinspan_lane_up{lane="ephemeral"}"#),
        is_one(r#"twinspan_lane_up{lane="durable"}"#),
        is_one("twinspan_config_last_reload_success"),
    ]
}

pub fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Every statement that was not so.
pub fn lies(statements: &[Statement], broken: &[Broken]) -> Vec<String> {
    let mut lies = Vec::new();
    // A bridge that began just now may still be connecting.
    for statement in statements.iter().filter(|statement| statement.asked >= statement.since + WITHIN) {
        let Some(said) = &statement.said else {
            lies.push(format!("{} did not answer: {statement:?}", statement.source));
            continue;
        };
        for (subject, is_well) in SUBJECTS.into_iter().zip(said) {
            let of = || {
                broken.iter().filter(move |of| {
                    of.subject == subject && of.bridge.is_none_or(|bridge| bridge == statement.bridge)
                })
            };
            let is_away = of().any(|of| {
                of.is_away && statement.asked >= of.from + WITHIN && statement.answered <= of.mending
            });
            let may_be_away =
                of().any(|of| of.from <= statement.answered && statement.asked <= of.mended + WITHIN);
            let is_so = match is_well {
                Some(true) => !is_away,
                Some(false) => may_be_away,
                None => true,
            };
            if !is_so {
                lies.push(format!("{} of {subject:?}: {statement:?}", statement.source));
            }
        }
    }
    lies
}

#[test]
fn what_is_said_too_late_or_without_a_reason_is_a_lie() {
    let broken = [Broken {
        subject: Subject::Durable,
        bridge: None,
        is_away: true,
        from: 20_000,
        mending: 30_000,
        mended: 31_000,
    }];
    let lies = |asked: Moment, is_well: Option<bool>| {
        let said = Some([Some(true), is_well, Some(true)]);
        let statement =
            Statement { bridge: 0, since: 0, asked, answered: asked + 10, source: "/health", said };
        lies(&[statement], &broken).len()
    };
    for (asked, well, unwell) in [
        (1000, 0, 0),
        (10_000, 0, 1),
        (19_980, 0, 1),
        (21_000, 0, 0),
        (26_000, 1, 0),
        (29_980, 1, 0),
        (30_500, 0, 0),
        (35_000, 0, 0),
        (36_500, 0, 1),
    ] {
        assert_eq!((lies(asked, Some(true)), lies(asked, Some(false))), (well, unwell), "at {asked}");
        assert_eq!(lies(asked, None), 0);
    }
}
