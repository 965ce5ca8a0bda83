//! One promise under every fault: what was confirmed reaches everybody, once and in its order.
//!
//! ```text
//! publishers ──▶ lane ──▶ proxy ──▶ broker          the broker is frozen, the network cut, the topic moved
//! a follower and groups of every mode ◀──┘          and in the end the books are compared
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::AsyncFnOnce;
use std::sync::Mutex;

use tokio::task::JoinSet;
use twinspan::lane::contract::{Joining, LaneError, Publisher};
use twinspan::lane::follow::{Follow, Step};
use twinspan::message::{GroupMode, Place, Start};

use super::load::{EACH, Publishers};
use super::*;
use crate::brokers::Options;
use crate::durable_contract::read;
use crate::proxy::Proxy;

/// How long after a fault everybody may take to deliver again.
const HEALED_WITHIN: Duration = Duration::from_secs(5);
const PUBLISHERS: usize = 2;
const KEYS: usize = 4;
/// Each in an entry of its own.
const ONE_BY_ONE: (usize, Duration) = (1, Duration::from_millis(4));
/// So many at once that each key's are a batch.
const IN_BATCHES: (usize, Duration) = (200, Duration::from_millis(200));

/// One delivery to a group: what, where, and as which attempt.
type Delivered = (usize, Place, u32);

/// What became of a group's deliveries.
#[derive(Default)]
struct Books {
    delivered: Vec<Delivered>,
    /// Of these the broker has confirmed that they are done.
    done: BTreeSet<Place>,
    /// These came although they were done.
    again: Vec<usize>,
}

struct Load {
    bed: Bed,
    /// How many messages an entry holds at least, on average and about.
    batches: usize,
    publishers: Publishers,
    followed: Arc<Mutex<Vec<(usize, Place)>>>,
    groups: HashMap<GroupMode, Arc<Mutex<Books>>>,
    _subscribers: JoinSet<()>,
}

impl Load {
    async fn start(bed: Bed, modes: &[GroupMode], pace: (usize, Duration)) -> Self {
        let mut subscribers = JoinSet::new();
        let followed = Arc::new(Mutex::new(Vec::new()));
        let mut follow =
            Follow::open(bed.lane.clone(), bed.route.clone(), bed.topic.clone(), Start::Earliest)
                .await
                .unwrap();
        let heard = followed.clone();
        subscribers.spawn(async move {
            loop {
                if let Step::Events(events) = follow.next().await.expect("following never ends") {
                    let events = events.into_iter().map(|event| event.unwrap());
                    heard.lock().unwrap().extend(events.map(|event| (number(&event), place(&event))));
                }
            }
        });
        let mut groups = HashMap::new();
        for mode in modes {
            let books = Arc::new(Mutex::new(Books::default()));
            let members = if *mode == GroupMode::Exclusive { 1 } else { 2 };
            for _ in 0..members {
                let joining = Joining {
                    group: mode.as_str().into(),
                    mode: *mode,
                    start: Start::Earliest,
                    prefetch: 200,
                };
                let member = bed.lane.join(&bed.route, &bed.topic, joining).await.unwrap();
                subscribers.spawn(take_part(member, books.clone()));
            }
            groups.insert(*mode, books);
        }
        let key = |n: usize| Some(format!("{}-{}", n / EACH, n % KEYS));
        let publishers = Publishers::on(&bed, PUBLISHERS, pace, key);
        let batches = if pace.0 > 1 { pace.0 / KEYS / 5 } else { 0 };
        Self { bed, batches, publishers, followed, groups, _subscribers: subscribers }
    }

    fn newest(&self) -> Vec<(String, usize)> {
        let followed = self.followed.lock().unwrap().len();
        let groups = self.groups.iter().map(|(mode, books)| {
            let distinct: BTreeSet<_> = books.lock().unwrap().delivered.iter().map(|(n, ..)| *n).collect();
            (mode.as_str().to_owned(), distinct.len())
        });
        groups.chain([("the follower".to_owned(), followed)]).collect()
    }

    /// Waits until everybody has got something new.
    async fn flows(&self, what: &str, within: Duration) {
        let (before, deadline) = (self.newest(), Instant::now() + within);
        loop {
            let now = self.newest();
            let waits: Vec<_> =
                before.iter().zip(&now).filter(|(before, now)| now.1 < before.1 + 20).collect();
            if waits.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: within {within:?} these got nothing: {waits:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the load and compares the books.
    async fn settle(self, what: &str, broker: Broke) {
        let published = self.publishers.end().await;
        is_up(&*self.bed.lane).await;
        let stored = published.check(what, &self.bed).await;
        let entries: BTreeSet<_> =
            stored.iter().map(|event| (place(event).ledger, place(event).entry)).collect();
        assert!(
            stored.len() > entries.len() * self.batches,
            "{what}: {} in {} entries",
            stored.len(),
            entries.len()
        );
        let stored: Vec<_> = stored.iter().map(|event| (number(event), place(event))).collect();
        assert!(published.acked.len() > 200, "{what}: only {} were confirmed", published.acked.len());

        let deadline = Instant::now() + HEALED_WITHIN * 2;
        while self.followed.lock().unwrap().len() < stored.len() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(
            *self.followed.lock().unwrap(),
            stored,
            "{what}: the follower has storage, each once, in order"
        );
        let places: BTreeSet<_> = stored.iter().map(|(_, place)| *place).collect();
        for (mode, books) in &self.groups {
            let who = mode.as_str();
            let got = || -> BTreeSet<Place> {
                books.lock().unwrap().delivered.iter().map(|(_, place, _)| *place).collect()
            };
            while got() != places && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let got = got();
            let missing: Vec<_> = places.difference(&got).take(9).collect();
            assert_eq!(missing, Vec::<&Place>::new(), "{what}: never delivered to the {who} group");
            let Books { delivered, again, .. } = &*books.lock().unwrap();
            let mut attempts: HashMap<Place, u32> = HashMap::new();
            for (n, place, attempt) in delivered {
                let before = attempts.insert(*place, *attempt);
                let counted = match broker {
                    Broke::Nothing => before.is_none_or(|before| *attempt > before),
                    Broke::LastConfirmed => before.is_none() || *attempt > 1,
                    Broke::Attempts => true,
                };
                assert!(
                    counted,
                    "{what}: {n} came to the {who} group as attempt {attempt}, after {before:?}"
                );
            }
            if *mode == GroupMode::Exclusive && broker == Broke::Nothing {
                // Where there are others, one may have it in its hands already that another one settles late.
                assert_eq!(*again, Vec::<usize>::new(), "{what}: done, and delivered again");
            }
            if *mode != GroupMode::Shared {
                in_order(what, who, delivered.iter().map(|(n, ..)| *n));
            }
        }
    }
}

/// Asserts that the first of each number of a key comes after the first of all that were published before it.
fn in_order(what: &str, who: &str, numbers: impl Iterator<Item = usize>) {
    let (mut seen, mut last) = (BTreeSet::new(), BTreeMap::new());
    for n in numbers.filter(|n| seen.insert(*n)) {
        let before = last.insert((n / EACH, n % KEYS), n);
        assert!(before.is_none_or(|before| before < n), "{what}: {who} has {n} after {before:?}");
    }
}

fn place(envelope: &Envelope) -> Place {
    envelope.stored.as_ref().unwrap().place
}

async fn take_part(member: Box<dyn Member>, books: Arc<Mutex<Books>>) {
    loop {
        let handed = member.next().await.expect("a membership never ends");
        let handed: Vec<_> = handed.into_iter().map(Result::unwrap).collect();
        {
            let Books { delivered, done, again } = &mut *books.lock().unwrap();
            for Handed { envelope, tag, attempt } in &handed {
                delivered.push((number(envelope), tag.place, *attempt));
                again.extend(done.contains(&tag.place).then(|| number(envelope)));
            }
        }
        // While the broker is away it cannot be confirmed; the deliveries come again then.
        let tags: Vec<_> = handed.iter().map(|handed| handed.tag).collect();
        if member.ack(tags.clone()).await.is_ok() {
            books.lock().unwrap().done.extend(tags.iter().map(|tag| tag.place));
        }
    }
}

/// What a fault may cost of what the broker knew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broke {
    Nothing,
    /// A topic that is closed may lose the acknowledgements that the broker confirmed just then: what was done comes
    /// again, as another attempt.
    LastConfirmed,
    /// A broker that was restarted counts attempts anew.
    Attempts,
}

pub async fn under_load(bed: Bed, what: &str, broker: Broke, fault: impl AsyncFnOnce(&Bed)) {
    under_load_of(ONE_BY_ONE, bed, what, broker, fault).await;
}

async fn under_load_of(
    pace: (usize, Duration),
    bed: Bed,
    what: &str,
    broker: Broke,
    fault: impl AsyncFnOnce(&Bed),
) {
    let load = Load::start(bed, &GroupMode::ALL, pace).await;
    load.flows(what, SOON).await;
    fault(&load.bed).await;
    is_up(&*load.bed.lane).await;
    load.flows(what, HEALED_WITHIN).await;
    load.settle(what, broker).await;
}

async fn behind(broker: &Broker, proxy: &Proxy) -> Bed {
    let settings = DurableSettings { url: vec![proxy.pulsar_url()], ..settings(broker) };
    let route = route("t.>", "persistent://public/default/{topic}");
    let policy = Policy::new(RouteTable::new([route.clone()]));
    let topic = topic(&format!("t.{}", MessageId::new()));
    let native = Pulsar::builder(proxy.pulsar_url(), TokioExecutor).build().await.unwrap();
    Bed { lane: open(&settings, &policy).await, route: Arc::new(route), topic, native }
}

/// One after the other on one broker, which begins a new ledger every ten entries besides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_of_network_or_topic_loses_nothing_keeps_the_order_and_heals_within_five_seconds() {
    if left_out() {
        return;
    }
    let rollover = ["managedLedgerMaxEntriesPerLedger=10", "managedLedgerMinLedgerRolloverTimeMinutes=0"];
    let options = Options { set: rollover.map(String::from).to_vec(), ..Options::default() };
    let (broker, proxy) = Proxy::pulsar(options).await;
    let bed = || behind(&broker, &proxy);

    under_load(bed().await, "nothing but new ledgers", Broke::Nothing, async |bed| {
        let begun = read(&*bed.lane, &bed.route, &bed.topic, Start::Last(1)).await;
        let first = place(&begun[0]).ledger;
        let mut seen = BTreeSet::new();
        while seen.len() < 20 {
            let newest = read(&*bed.lane, &bed.route, &bed.topic, Start::Last(1)).await;
            seen.insert(place(&newest[0]).ledger);
        }
        assert!(seen.last() > Some(&first), "the topic begins one ledger after the other: {seen:?}");
        assert!(bed.lane.state().borrow().is_up());
    })
    .await;
    under_load(bed().await, "cut every 200 ms", Broke::Nothing, async |_| {
        let cutting = proxy.cut_every(Duration::from_millis(200));
        tokio::time::sleep(Duration::from_secs(4)).await;
        drop(cutting);
    })
    .await;
    under_load(bed().await, "accepted, then closed", Broke::Nothing, async |_| {
        proxy.accept_then_close();
        proxy.cut();
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.resume();
    })
    .await;
    under_load(bed().await, "unloaded", Broke::LastConfirmed, async |bed| {
        let path = format!("persistent/public/default/{}/unload", bed.topic);
        for _ in 0..4 {
            admin(&broker, Method::PUT, &path, Value::Null).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await;
    under_load(bed().await, "frozen", Broke::Nothing, async |bed| {
        broker.stop();
        tokio::time::sleep(Duration::from_secs(10)).await;
        broker.cont();
        is_up(&*bed.lane).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_under_load_loses_nothing_confirmed_and_everybody_goes_on() {
    if left_out() {
        return;
    }
    let mut broker = Broker::pulsar(&Options::default()).await;
    for (what, pace) in [("killed", ONE_BY_ONE), ("killed among batches", IN_BATCHES)] {
        let bed = Bed::on(&broker).await;
        under_load_of(pace, bed, what, Broke::Attempts, async |bed| {
            broker.kill();
            let took = is_down(&*bed.lane).await;
            assert!(took < Duration::from_secs(3), "noticed after {took:?}");
            let asked = Instant::now();
            let refused = bed.lane.append(&bed.route, &bed.topic, numbered(0), Publisher::default()).await;
            assert!(matches!(refused.map(drop), Err(LaneError::Unavailable(_))));
            assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
            broker.restart().await;
            is_up(&*bed.lane).await;
        })
        .await;
    }
}
