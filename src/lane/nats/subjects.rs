//! Between topics and NATS subjects, by the templates of the routes. Functions of their arguments.

use std::sync::Arc;

use crate::message::Lane;
use crate::policy::table::{Route, RouteTable, Template};
use crate::topic::{Pattern, Topic, TopicError};

/// The different templates of the ephemeral routes that may hold topics of a pattern, or of all of them.
pub fn templates(table: &RouteTable, pattern: Option<&Pattern>) -> Vec<Template> {
    let mut templates: Vec<Template> = Vec::new();
    for route in table.routes() {
        let reaches = pattern.is_none_or(|pattern| match pattern.topic() {
            Some(topic) => table.route_for(&topic).is_some_and(|winner| Arc::ptr_eq(winner, route)),
            None => route.pattern.overlaps(pattern),
        });
        if reaches && route.lane.takes(Lane::Ephemeral) && !templates.contains(&route.nats) {
            templates.push(route.nats.clone());
        }
    }
    templates
}

/// The narrowest subject that brings all topics of a pattern. NATS knows wildcards as whole tokens only, and `>` at
/// the end only, so where the template has text beside them this brings more than was asked for.
pub fn subject(template: &Template, pattern: &Pattern) -> String {
    let applied = template.apply(pattern.as_str());
    let mut tokens = Vec::new();
    for token in applied.split('.') {
        if token.contains('>') {
            tokens.push(">");
            break;
        }
        tokens.push(if token.contains('*') { "*" } else { token });
    }
    tokens.join(".")
}

/// What a subject is to us.
pub enum Resolved<'a> {
    /// A topic of an ephemeral route, by the template of that route.
    Ours(Arc<Route>, Topic, &'a Template),
    /// A topic of another lane, or of no route, or a subject of NATS itself or of a client's inbox.
    NotOurs,
    /// No topic at all: nobody could subscribe to it here.
    Foreign,
}

pub fn resolve<'a>(table: &RouteTable, templates: &'a [Template], subject: &str) -> Resolved<'a> {
    let mut foreign = false;
    for template in templates {
        let Some(name) = template.unapply(subject) else { continue };
        match Topic::parse(name) {
            Ok(topic) => {
                let route = table.route_for(&topic);
                if let Some(route) = route.filter(|r| r.lane.takes(Lane::Ephemeral) && r.nats == *template) {
                    return Resolved::Ours(route.clone(), topic, template);
                }
            }
            Err(TopicError::Reserved(_)) => {}
            Err(_) => foreign = true,
        }
    }
    if foreign { Resolved::Foreign } else { Resolved::NotOurs }
}

/// Whether some subject is matched by both.
pub fn overlap(one: &str, other: &str) -> bool {
    let (mut ones, mut others) = (one.split('.'), other.split('.'));
    loop {
        match (ones.next(), others.next()) {
            (Some(">"), Some(_)) | (Some(_), Some(">")) | (None, None) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether a reply can be sent there: NATS delivers a wildcard in a subject as it stands, to nobody in particular.
pub fn is_literal(subject: &str) -> bool {
    subject.split('.').all(|token| !token.is_empty() && token != "*" && token != ">")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::testing::ephemeral;

    fn template(text: &str) -> Template {
        Template::parse(text).unwrap()
    }

    #[test]
    fn a_pattern_becomes_the_narrowest_subject_that_nats_can_express() {
        let table = [
            ("{topic}", "a.*.>", "a.*.>"),
            ("x.{topic}", "a.*", "x.a.*"),
            ("x.{topic}.v1", "a.b", "x.a.b.v1"),
            ("{topic}.v1", "a.*", "a.*.v1"),
            ("{topic}.v1", "a.>", "a.>"),
            ("{topic}-x", "a.*", "a.*"),
            ("x-{topic}", "*.b", "*.b"),
            ("x-{topic}", ">", ">"),
        ];
        for (text, pattern, expected) in table {
            assert_eq!(
                subject(&template(text), &Pattern::parse(pattern).unwrap()),
                expected,
                "{text} {pattern}"
            );
        }
    }

    #[test]
    fn subjects_overlap_as_patterns_do() {
        for (a, b) in
            [("a.*.c", "a.b.*"), ("a.>", "*.b"), ("a.b.>", "a.*"), ("a", "a"), ("a", "a.b"), (">", "x.y")]
        {
            let expected = Pattern::parse(a).unwrap().overlaps(&Pattern::parse(b).unwrap());
            assert_eq!((overlap(a, b), overlap(b, a)), (expected, expected), "{a} {b}");
        }
    }

    #[test]
    fn a_subject_is_a_topic_by_the_template_of_its_route_and_no_other() {
        let moved = Route { nats: template("v2.{topic}"), ..ephemeral("orders.>") };
        let stored = Route { lane: crate::message::Lanes::DURABLE, ..ephemeral("log.>") };
        let table = RouteTable::new([ephemeral(">"), moved, stored]);
        let all = templates(&table, None);
        let resolved = |subject: &str| match resolve(&table, &all, subject) {
            Resolved::Ours(route, topic, _) => format!("{} of {}", topic, route.name),
            Resolved::NotOurs => "not ours".into(),
            Resolved::Foreign => "foreign".into(),
        };
        assert_eq!(resolved("a.b"), "a.b of >");
        assert_eq!(resolved("v2.orders.eu"), "orders.eu of orders.>");
        assert_eq!(resolved("orders.eu"), "not ours");
        assert_eq!(resolved("log.x"), "not ours");
        assert_eq!(resolved("_INBOX.x"), "not ours");
        assert_eq!(resolved("a b"), "foreign");
        assert_eq!(resolved("a..b"), "foreign");

        let named = |pattern: &str| {
            let pattern = Pattern::parse(pattern).unwrap();
            templates(&table, Some(&pattern)).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(named("orders.eu"), ["v2.{topic}"]);
        assert_eq!(named("orders.*"), ["v2.{topic}", "{topic}"]);
        assert_eq!(named("log.x"), [] as [&str; 0]);
    }
}
