//! What waits for one client is bounded, in order, and complete: what is not delivered is announced, exactly there.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Waker};

use futures_util::future::BoxFuture;
use proptest::prelude::*;
use twinspan::message::{Draft, Envelope, Lane};
use twinspan::policy::table::Route;
use twinspan::session::outbox::{Item, Outbox, SubscriptionNo};
use twinspan::topic::{Pattern, Topic};
use twinspan::wire::verbs::Event;

use crate::lanes::ephemeral;

/// What a frame that is no event weighs.
const ANSWER_BYTES: usize = 128;

/// The last subscription is a wildcard over both routes, the others have one.
const ROUTE_OF: [&[usize]; 4] = [&[0], &[0], &[1], &[0, 1]];

#[derive(Debug, Clone)]
enum Step {
    Event { subscription: usize, route: usize, bytes: usize },
    Durable { bytes: usize },
    Answer,
    Missed { subscription: usize, count: u64 },
    Take,
}

/// What waits, in the plainest form.
#[derive(Debug, Clone, PartialEq)]
enum Waiting {
    Event { subscription: usize, route: usize, n: u64, bytes: usize },
    Durable { n: u64, bytes: usize },
    Answer,
    Gap { subscription: usize, dropped: u64 },
}

impl Waiting {
    fn bytes(&self) -> usize {
        match self {
            Waiting::Event { bytes, .. } | Waiting::Durable { bytes, .. } => *bytes,
            Waiting::Answer => ANSWER_BYTES,
            Waiting::Gap { .. } => 0,
        }
    }
}

/// The outbox as a list that is searched from the front.
struct Model {
    list: Vec<Waiting>,
    shares: [usize; 2],
    messages_max: usize,
    bytes_max: usize,
}

impl Model {
    fn bytes(&self) -> usize {
        self.list.iter().map(Waiting::bytes).sum()
    }

    fn push_event(&mut self, subscription: usize, route: usize, n: u64, bytes: usize) {
        loop {
            let is_of = |waiting: &Waiting| matches!(waiting, Waiting::Event { route: r, .. } if *r == route);
            let has_share = self.list.iter().filter(|waiting| is_of(waiting)).count() >= self.shares[route];
            let full = self.list.len() >= self.messages_max;
            let heavy = self.bytes() > 0 && self.bytes() + bytes > self.bytes_max;
            if !has_share && !full && !heavy {
                return self.list.push(Waiting::Event { subscription, route, n, bytes });
            }
            let may_go = |waiting: &Waiting| match has_share {
                true => is_of(waiting),
                false => matches!(waiting, Waiting::Event { .. }),
            };
            let Some(oldest) = self.list.iter().position(may_go) else {
                return self.announce(subscription, 1);
            };
            let Waiting::Event { subscription: of, .. } = self.list[oldest] else { unreachable!() };
            match self.gap(of) {
                Some(dropped) => {
                    *dropped += 1;
                    self.list.remove(oldest);
                }
                None => self.list[oldest] = Waiting::Gap { subscription: of, dropped: 1 },
            }
        }
    }

    fn gap(&mut self, of: usize) -> Option<&mut u64> {
        self.list.iter_mut().find_map(|waiting| match waiting {
            Waiting::Gap { subscription, dropped } if *subscription == of => Some(dropped),
            _ => None,
        })
    }

    fn announce(&mut self, subscription: usize, count: u64) {
        match self.gap(subscription) {
            Some(dropped) => *dropped += count,
            None => self.list.push(Waiting::Gap { subscription, dropped: count }),
        }
    }

    fn takes_durable(&self, bytes: usize) -> bool {
        let fits =
            self.list.len() < (self.messages_max / 2).max(1) && self.bytes() + bytes <= self.bytes_max / 2;
        fits || self.list.is_empty()
    }
}

fn pattern(subscription: usize) -> Pattern {
    Pattern::parse(&format!("s{subscription}.>")).unwrap()
}

/// An event that says which it is, so large.
fn item(route: Option<&Arc<Route>>, name: &str, n: u64, bytes: usize) -> (Item, usize) {
    let payload = format!("{n:<bytes$}").into_bytes().into();
    let mut envelope = Envelope::ephemeral(
        Topic::parse(name).unwrap(),
        Draft { payload, ..Draft::default() }.accept(),
        None,
    );
    if route.is_none() {
        envelope.lane = Lane::Durable;
    }
    let bytes = envelope.weight();
    (Item { event: Event::Live(Arc::new(envelope)), route: route.cloned(), settle: None, since: None }, bytes)
}

fn number(item: &Item) -> Option<(&str, u64)> {
    match &item.event {
        Event::Live(envelope) => {
            let n = std::str::from_utf8(&envelope.message.payload).unwrap().trim().parse().unwrap();
            Some((envelope.topic.as_str(), n))
        }
        _ => None,
    }
}

/// What was taken, in the model's words; what an event weighs is known by its number.
fn seen(item: &Item, routes: &[Arc<Route>; 2], weights: &HashMap<(usize, u64), usize>) -> Waiting {
    let subscription_of = |name: &str| name[1..].split('.').next().unwrap().parse::<usize>().unwrap();
    match (&item.event, number(item)) {
        (Event::Gap { topic, dropped, .. }, _) => {
            Waiting::Gap { subscription: subscription_of(topic.as_str()), dropped: dropped.unwrap() }
        }
        (Event::Live(envelope), Some((_, n))) if envelope.lane == Lane::Durable => {
            Waiting::Durable { n, bytes: weights[&(usize::MAX, n)] }
        }
        (_, Some((name, n))) => {
            let subscription = subscription_of(name);
            let route = routes
                .iter()
                .position(|route| Some(route.name.clone()) == item.route.as_ref().map(|r| r.name.clone()));
            Waiting::Event { subscription, route: route.unwrap(), n, bytes: weights[&(subscription, n)] }
        }
        _ => Waiting::Answer,
    }
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![8 => 1..100_usize, 2 => 1..2000_usize, 1 => 1..9000_usize];
    let event = (0..4_usize, any::<bool>(), bytes.clone()).prop_map(|(subscription, second, bytes)| {
        let routes = ROUTE_OF[subscription];
        Step::Event { subscription, route: routes[usize::from(second) % routes.len()], bytes }
    });
    prop_oneof![
        100 => event,
        10 => bytes.prop_map(|bytes| Step::Durable { bytes }),
        4 => Just(Step::Answer),
        2 => (0..4_usize, 1..5_u64).prop_map(|(subscription, count)| Step::Missed { subscription, count }),
        1 => Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_outbox_is_the_plain_list_it_stands_for(
        steps in proptest::collection::vec(step(), 1..600),
        messages_max in 1..200_usize,
        bytes_max in 500..8000_usize,
        shares in [1..6_usize, 1..400_usize],
    ) {
        let routes = [0, 1].map(|n| {
            let mut route = ephemeral(&format!("route{n}"), "{topic}");
            route.queue = shares[n];
            Arc::new(route)
        });
        let outbox = Outbox::new(messages_max, bytes_max);
        let mut model = Model { list: Vec::new(), shares, messages_max, bytes_max };
        let mut weights = HashMap::new();
        let (mut pushed, mut since_take) = ([0_u64; 4], [0_u64; 4]);
        let (mut next, mut durables) = ([0_u64; 4], (0, 0));
        let mut blocked: Vec<(BoxFuture<'_, ()>, u64, usize)> = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        for step in steps.into_iter().chain((0..600).map(|_| Step::Take)) {
            let mut tries = matches!(step, Step::Take) || blocked.is_empty();
            match step {
                Step::Event { subscription, route, bytes } => {
                    let n = pushed[subscription];
                    let (item, bytes) = item(Some(&routes[route]), &format!("s{subscription}.x"), n, bytes);
                    weights.insert((subscription, n), bytes);
                    let lost = |model: &Model| -> u64 { model.list.iter().map(|waiting| match waiting {
                        Waiting::Gap { dropped, .. } => *dropped,
                        _ => 0,
                    }).sum() };
                    let before = lost(&model);
                    model.push_event(subscription, route, n, bytes);
                    let dropped = outbox.push_ephemeral(subscription as SubscriptionNo, &pattern(subscription), item);
                    prop_assert_eq!(dropped.len() as u64, lost(&model) - before);
                    pushed[subscription] += 1;
                    since_take[subscription] += 1;
                }
                Step::Durable { bytes } => {
                    let (item, bytes) = item(None, "d.x", durables.0, bytes);
                    weights.insert((usize::MAX, durables.0), bytes);
                    blocked.push((Box::pin(outbox.push_durable(item)), durables.0, bytes));
                    durables.0 += 1;
                }
                Step::Answer => {
                    model.list.push(Waiting::Answer);
                    outbox.push(Event::Pong { request_id: None });
                }
                // A subscription announces what it held back before it brings anything.
                Step::Missed { subscription, count } if since_take[subscription] == 0 => {
                    model.announce(subscription, count);
                    outbox.gap(subscription as SubscriptionNo, &pattern(subscription), &routes[0], count);
                    pushed[subscription] += count;
                }
                Step::Missed { .. } => {}
                Step::Take => {
                    let mut take = Box::pin(outbox.take());
                    let taken = match take.as_mut().poll(&mut cx) {
                        std::task::Poll::Ready(taken) => taken.items,
                        std::task::Poll::Pending => Vec::new(),
                    };
                    let taken: Vec<_> = taken.iter().map(|item| seen(item, &routes, &weights)).collect();
                    prop_assert_eq!(&taken, &model.list);
                    model.list.clear();
                    since_take = [0; 4];
                    // Whatever the policy is: nothing is lost without a word, and nothing is out of order.
                    for waiting in &taken {
                        match waiting {
                            Waiting::Gap { subscription, dropped } => next[*subscription] += dropped,
                            Waiting::Event { subscription, n, .. } if ROUTE_OF[*subscription].len() == 1 => {
                                prop_assert_eq!(*n, next[*subscription], "a gap stands where the events would have been");
                                next[*subscription] += 1;
                            }
                            Waiting::Event { subscription, .. } => next[*subscription] += 1,
                            Waiting::Durable { n, .. } => {
                                prop_assert_eq!(*n, durables.1, "no durable event is dropped");
                                durables.1 += 1;
                            }
                            Waiting::Answer => {}
                        }
                    }
                    for subscription in 0..4 {
                        let gaps = taken.iter().filter(|w| matches!(w, Waiting::Gap { subscription: s, .. } if *s == subscription));
                        prop_assert!(gaps.count() <= 1, "one gap at a time");
                        prop_assert_eq!(next[subscription], pushed[subscription], "delivered and announced");
                    }
                }
            }
            // Those who wait try again once something was taken: the first one first, as one feed's events do.
            while tries && let Some((push, n, bytes)) = blocked.first_mut() {
                tries = model.takes_durable(*bytes);
                prop_assert_eq!(push.as_mut().poll(&mut cx).is_ready(), tries);
                if tries {
                    model.list.push(Waiting::Durable { n: *n, bytes: *bytes });
                    drop(blocked.remove(0));
                }
            }
            // Answers and gaps apart, which have bounds of their own, never more waits than may.
            let events: Vec<_> = model.list.iter().filter(|w| matches!(w, Waiting::Event { .. } | Waiting::Durable { .. })).collect();
            prop_assert!(events.len() <= messages_max);
            prop_assert!(events.iter().map(|w| w.bytes()).sum::<usize>() <= bytes_max || events.len() == 1);
        }
        prop_assert!(blocked.is_empty() && durables.0 == durables.1, "what waited came in the end");
    }
}

#[test]
fn whoever_pushes_at_the_same_time_loses_nothing_without_a_word() {
    const EVENTS: u64 = 20_000;
    let route = {
        let mut route = ephemeral("route", "{topic}");
        route.queue = 50;
        Arc::new(route)
    };
    let outbox = Outbox::new(64, 1 << 20);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    std::thread::scope(|threads| {
        for subscription in 0..3_usize {
            let (outbox, route) = (&outbox, &route);
            threads.spawn(move || {
                for n in 0..EVENTS {
                    let (item, _) = item(Some(route), &format!("s{subscription}.x"), n, 10);
                    outbox.push_ephemeral(subscription as SubscriptionNo, &pattern(subscription), item);
                }
            });
        }
        let (mut next, mut dropped_in_all) = ([0; 3], 0);
        let taking = async {
            while next.iter().sum::<u64>() < 3 * EVENTS {
                for item in outbox.take().await.items {
                    match &item.event {
                        Event::Gap { topic, dropped, .. } => {
                            let subscription = (0..3).find(|s| pattern(*s) == *topic).unwrap();
                            next[subscription] += dropped.unwrap();
                            dropped_in_all += dropped.unwrap();
                        }
                        _ => {
                            let (name, n) = number(&item).unwrap();
                            let subscription = (0..3).find(|s| name.starts_with(&format!("s{s}."))).unwrap();
                            assert_eq!(n, next[subscription]);
                            next[subscription] += 1;
                        }
                    }
                }
            }
        };
        runtime.block_on(async { crate::harness::soon(taking).await });
        println!("{dropped_in_all} of {} were dropped", 3 * EVENTS);
        assert_eq!(next, [EVENTS; 3]);
    });
}
