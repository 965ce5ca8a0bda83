//! What `DurableLane` promises of groups in every mode: who gets a message, in which order, and what becomes of it when
//! members come and go, when the group is sought, and when it is deleted.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use twinspan::lane::contract::GroupReport;

use super::*;

const GROUP: &str = "billing";
const ORDERED: [GroupMode; 2] = [GroupMode::Exclusive, GroupMode::Failover];
const DELAYING: [GroupMode; 2] = [GroupMode::Shared, GroupMode::KeyShared];

impl Ground {
    async fn try_join(
        &self,
        topic: &Topic,
        mode: GroupMode,
        prefetch: u32,
    ) -> Result<Box<dyn Member>, LaneError> {
        let joining = Joining { group: GROUP.into(), mode, start: Start::Earliest, prefetch };
        soon(self.lane.join(&self.route, topic, joining)).await
    }

    /// Joins once those who were dropped are gone: a broker may take a moment to see it.
    async fn join_as(&self, topic: &Topic, mode: GroupMode, prefetch: u32) -> Box<dyn Member> {
        let deadline = Instant::now() + SOON;
        loop {
            match self.try_join(topic, mode, prefetch).await {
                Ok(member) => return member,
                Err(LaneError::GroupBusy(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("joining as {mode:?}: {error}"),
            }
        }
    }

    async fn is_busy(&self, topic: &Topic, mode: GroupMode) {
        let asked = Instant::now();
        let refused = self.try_join(topic, mode, 10).await.map(drop);
        assert!(matches!(refused, Err(LaneError::GroupBusy(_))), "{mode:?}: {refused:?}");
        assert!(asked.elapsed() < Duration::from_secs(2), "it is refused at once");
    }

    async fn store_all(&self, topic: &Topic, messages: impl IntoIterator<Item = Message>) {
        let mut receipts = Vec::new();
        for message in messages {
            let receipt = self.lane.append(&self.route, topic, message, Publisher::default()).await;
            receipts.push(receipt.unwrap());
        }
        for receipt in receipts {
            soon(receipt).await.unwrap();
        }
    }

    async fn seek(&self, topic: &Topic, start: Start) {
        soon(self.lane.seek(&self.route, topic, GROUP, start)).await.unwrap();
    }

    /// Waits until the group's report is as it should be, and returns it.
    async fn reports(&self, topic: &Topic, right: impl Fn(&GroupReport) -> bool) -> GroupReport {
        let deadline = Instant::now() + SOON;
        loop {
            let reports = self.lane.groups(&self.route, topic).await.unwrap();
            match reports.iter().find(|report| report.name == GROUP) {
                Some(report) if right(report) => return report.clone(),
                _ => assert!(Instant::now() < deadline, "the report stays at {reports:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn keyed(payload: usize, key: impl std::fmt::Display) -> Message {
    Message { key: Some(key.to_string()), ..numbered(payload) }
}

fn delayed(payload: usize, delay: Duration) -> Message {
    Draft { payload: payload.to_string().into(), delay: Some(delay), ..Draft::default() }.accept()
}

fn in_order(handed: &[Handed]) -> Vec<usize> {
    handed.iter().map(|handed| number(&handed.envelope)).collect()
}

/// What comes within a moment, at most.
async fn glean(member: &dyn Member, patience: Duration) -> Vec<Handed> {
    match timeout(patience, member.next()).await {
        Ok(handed) => handed.unwrap().into_iter().map(Result::unwrap).collect(),
        Err(_) => Vec::new(),
    }
}

pub async fn an_exclusive_member_keeps_others_out_until_it_leaves(ground: Ground) {
    let topic = ground.topic();
    let first = ground.try_join(&topic, GroupMode::Exclusive, 10).await.unwrap();
    ground.is_busy(&topic, GroupMode::Exclusive).await;
    ground.store(&topic, 0..4).await;
    let held = take(&*first, 4).await;
    assert_eq!(in_order(&held), [0, 1, 2, 3]);
    first.ack(tags(&held[..1])).await.unwrap();
    drop(first);
    let second = ground.join_as(&topic, GroupMode::Exclusive, 10).await;
    ground.is_busy(&topic, GroupMode::Exclusive).await;
    assert_eq!(in_order(&take(&*second, 3).await), [1, 2, 3]);
}

pub async fn a_group_has_the_mode_of_its_members(ground: Ground) {
    let topic = ground.topic();
    for mode in GroupMode::ALL {
        let member = ground.join_as(&topic, mode, 10).await;
        for other in GroupMode::ALL.into_iter().filter(|other| *other != mode) {
            ground.is_busy(&topic, other).await;
        }
        drop(member);
    }
}

pub async fn failover_hands_over_within_two_seconds_and_in_order(ground: Ground) {
    let topic = ground.topic();
    let first = ground.join_as(&topic, GroupMode::Failover, 10).await;
    let second = ground.join_as(&topic, GroupMode::Failover, 10).await;
    let third = ground.join_as(&topic, GroupMode::Failover, 10).await;
    ground.store(&topic, 0..6).await;
    let held = take(&*first, 6).await;
    assert_eq!(in_order(&held), (0..6).collect::<Vec<_>>());
    first.ack(tags(&held[..3])).await.unwrap();
    assert_quiet(&*second).await;
    assert_quiet(&*third).await;

    drop(first);
    let left = Instant::now();
    let taken = take(&*second, 3).await;
    assert!(left.elapsed() < Duration::from_secs(2), "it took {:?}", left.elapsed());
    assert_eq!(in_order(&taken), [3, 4, 5]);
    second.ack(tags(&taken)).await.unwrap();
    ground.store(&topic, 6..9).await;
    assert_eq!(in_order(&take(&*second, 3).await), [6, 7, 8]);
    assert_quiet(&*third).await;

    // One that waited leaves: nothing changes. The next in line is the one that is left.
    let fourth = ground.join_as(&topic, GroupMode::Failover, 10).await;
    drop(third);
    drop(second);
    assert_eq!(in_order(&take(&*fourth, 3).await), [6, 7, 8]);
}

pub async fn failover_under_load_loses_no_order_when_the_active_member_leaves(ground: Ground) {
    const MESSAGES: usize = 600;
    let topic = ground.topic();
    let mut members = vec![ground.join_as(&topic, GroupMode::Failover, 20).await];
    members.push(ground.join_as(&topic, GroupMode::Failover, 20).await);
    let store = ground.store(&topic, 0..MESSAGES);
    let consume = async {
        let (mut acked, mut random) = (0, fastrand::Rng::with_seed(7));
        while acked < MESSAGES {
            // The active one: it takes some, acknowledges the first of them, and leaves.
            let active = members.remove(0);
            for _ in 0..random.usize(1..6) {
                let handed = soon(active.next()).await.unwrap();
                let handed: Vec<_> = handed.into_iter().map(Result::unwrap).collect();
                assert_eq!(in_order(&handed), (acked..acked + handed.len()).collect::<Vec<_>>());
                let done = random.usize(1..=handed.len());
                active.ack(tags(&handed[..done])).await.unwrap();
                acked += done;
                if done < handed.len() || acked == MESSAGES {
                    break;
                }
            }
            members.push(ground.join_as(&topic, GroupMode::Failover, 20).await);
        }
    };
    timeout(SOON * 3, async { tokio::join!(store, consume) }).await.expect("all should have come by now");
}

/// What the members of a key_shared group see, all together.
#[derive(Default)]
struct Ledger {
    /// By key: what was seen, whether it is acknowledged, and who holds it.
    keys: HashMap<String, std::collections::BTreeMap<usize, Seen>>,
    acked: usize,
}

#[derive(Default)]
struct Seen {
    acked: bool,
    holder: Option<usize>,
}

impl Ledger {
    fn handed(&mut self, member: usize, handed: &Handed) {
        let (key, n) = (handed.envelope.message.key.clone().unwrap(), number(&handed.envelope));
        let seen = self.keys.entry(key.clone()).or_default();
        for (other, state) in seen.iter().filter(|(_, state)| !state.acked) {
            let holder = state.holder;
            assert!(
                holder.is_none_or(|holder| holder == member),
                "key {key}: {n} went to member {member} while member {holder:?} held {other}"
            );
            assert!(*other >= n || holder == Some(member), "key {key}: {n} came before {other} was back");
        }
        let newest = seen.last_key_value().map(|(newest, _)| *newest);
        match seen.get_mut(&n) {
            Some(again) => {
                assert!(!again.acked, "key {key}: {n} came again although it was acknowledged");
                again.holder = Some(member);
            }
            None => {
                assert!(newest.is_none_or(|newest| newest < n), "key {key}: {n} first came after {newest:?}");
                seen.insert(n, Seen { acked: false, holder: Some(member) });
            }
        }
    }

    fn give_up(&mut self, handed: &Handed, acked: bool) {
        let key = handed.envelope.message.key.as_ref().unwrap();
        let seen = self.keys.get_mut(key).unwrap().get_mut(&number(&handed.envelope)).unwrap();
        *seen = Seen { acked, holder: None };
        self.acked += usize::from(acked);
    }
}

pub async fn key_shared_keeps_the_order_of_a_key_with_members_coming_and_going(ground: Ground) {
    const PUBLISHERS: usize = 3;
    const EACH: usize = 400;
    const KEYS: usize = 7;
    let topic = ground.topic();
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let consume = |number: usize, member: Box<dyn Member>, leave: Arc<AtomicBool>| {
        let ledger = ledger.clone();
        async move {
            let mut held: Vec<Handed> = Vec::new();
            while !leave.load(Ordering::Relaxed) {
                for handed in glean(&*member, Duration::from_millis(3)).await {
                    ledger.lock().unwrap().handed(number, &handed);
                    held.push(handed);
                }
                fastrand::shuffle(&mut held);
                let done = held.split_off(held.len() - fastrand::usize(0..=held.len()));
                // It is given up before the lane is told: from then on it may be somebody else's turn.
                done.iter().for_each(|handed| ledger.lock().unwrap().give_up(handed, true));
                member.ack(tags(&done)).await.unwrap();
            }
            held.iter().for_each(|handed| ledger.lock().unwrap().give_up(handed, false));
        }
    };
    let mut members = tokio::task::JoinSet::new();
    let mut present = std::collections::VecDeque::new();
    for number in 0..3 {
        let leave = Arc::new(AtomicBool::new(false));
        let member = ground.join_as(&topic, GroupMode::KeyShared, 30).await;
        members.spawn(consume(number, member, leave.clone()));
        present.push_back(leave);
    }
    let mut publishers = tokio::task::JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let (lane, route, topic) = (ground.lane.clone(), ground.route.clone(), topic.clone());
        publishers.spawn(async move {
            let mut receipts = Vec::new();
            for n in 0..EACH {
                let message = keyed(n, format!("{publisher}-{}", n % KEYS));
                let receipt = lane.append(&route, &topic, message, Publisher(publisher as u64)).await;
                receipts.push(receipt.unwrap());
                if n % 10 == 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            for receipt in receipts {
                soon(receipt).await.unwrap();
            }
        });
    }
    let deadline = Instant::now() + SOON * 2;
    let mut number = 3;
    while ledger.lock().unwrap().acked < PUBLISHERS * EACH {
        assert!(Instant::now() < deadline, "{} are done", ledger.lock().unwrap().acked);
        tokio::time::sleep(Duration::from_millis(40)).await;
        // One comes and one goes, until everything is published.
        if publishers.try_join_next().is_none_or(|published| published.is_err()) && !publishers.is_empty() {
            let leave = Arc::new(AtomicBool::new(false));
            let member = ground.join_as(&topic, GroupMode::KeyShared, 30).await;
            members.spawn(consume(number, member, leave.clone()));
            present.push_back(leave);
            number += 1;
            present.pop_front().unwrap().store(true, Ordering::Relaxed);
        }
        while let Some(left) = members.try_join_next() {
            left.unwrap();
        }
    }
    assert!(number > 8, "{number} members are not many");
    present.iter().for_each(|leave| leave.store(true, Ordering::Relaxed));
    while let Some(left) = members.join_next().await {
        left.unwrap();
    }
    assert_eq!(ledger.lock().unwrap().keys.len(), PUBLISHERS * KEYS);
}

pub async fn key_shared_uses_all_members_and_each_key_one(ground: Ground) {
    let topic = ground.topic();
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(ground.join_as(&topic, GroupMode::KeyShared, 1000).await);
    }
    let keys = (0..300).map(|n| keyed(n, format!("k{}", n % 100)));
    ground.store_all(&topic, keys).await;
    for n in 300..400 {
        // One by one: a broker may give to one member what was published together.
        ground.store(&topic, n..n + 1).await;
    }
    let mut got = vec![Vec::new(); 3];
    let deadline = Instant::now() + SOON;
    while got.iter().map(Vec::len).sum::<usize>() < 400 {
        assert!(Instant::now() < deadline, "{:?} came", got.iter().map(Vec::len).collect::<Vec<_>>());
        for (member, got) in members.iter().zip(&mut got) {
            got.extend(glean(&**member, Duration::from_millis(20)).await);
        }
    }
    let mut owners: HashMap<String, usize> = HashMap::new();
    for (member, got) in got.iter().enumerate() {
        let mut newest: HashMap<&str, usize> = HashMap::new();
        let (keyed, keyless): (Vec<_>, Vec<_>) =
            got.iter().partition(|handed| handed.envelope.message.key.is_some());
        assert!(!keyed.is_empty() && !keyless.is_empty(), "member {member} has its share of both");
        for handed in keyed {
            let (key, n) = (handed.envelope.message.key.as_deref().unwrap(), number(&handed.envelope));
            assert_eq!(*owners.entry(key.into()).or_insert(member), member, "key {key} has one member");
            assert!(newest.insert(key, n).is_none_or(|before| before < n), "key {key} is in order");
        }
    }
}

pub async fn a_key_moves_to_a_new_member_once_the_old_one_holds_none_of_it(ground: Ground) {
    let topic = ground.topic();
    let old = ground.join_as(&topic, GroupMode::KeyShared, 100).await;
    ground.store_all(&topic, (0..40).map(|n| keyed(n, n))).await;
    let held = take(&*old, 40).await;
    let new = ground.join_as(&topic, GroupMode::KeyShared, 100).await;
    ground.store_all(&topic, (40..80).map(|n| keyed(n, n - 40))).await;
    assert_quiet(&*new).await;
    // Nobody comes or goes any more: what moves, moves because of these.
    let (acked, back) = held.split_at(20);
    old.ack(tags(acked)).await.unwrap();
    old.nack(tags(back), Duration::ZERO).await.unwrap();
    let (mut olds, mut news) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + SOON;
    while olds.len() + news.len() < 60 {
        assert!(Instant::now() < deadline, "{} and {} came", olds.len(), news.len());
        olds.extend(sorted(&glean(&*old, Duration::from_millis(20)).await));
        news.extend(sorted(&glean(&*new, Duration::from_millis(20)).await));
    }
    let keys = |of: &[usize]| of.iter().map(|n| n % 40).collect::<BTreeSet<_>>();
    assert!(!news.is_empty() && keys(&olds).is_disjoint(&keys(&news)), "{olds:?} and {news:?}");
}

pub async fn a_full_member_of_key_shared_stops_no_keys_but_its_own(ground: Ground) {
    let topic = ground.topic();
    let full = ground.join_as(&topic, GroupMode::KeyShared, 1).await;
    let other = ground.join_as(&topic, GroupMode::KeyShared, 10).await;
    ground.store_all(&topic, (0..600).map(|n| keyed(n, format!("k{}", n % 30)))).await;
    let mut its_keys = BTreeSet::new();
    let mut came = 0;
    let held = take(&*full, 1).await;
    loop {
        let handed = glean(&*other, Duration::from_secs(2)).await;
        if handed.is_empty() {
            break;
        }
        came += handed.len();
        its_keys.extend(handed.iter().map(|handed| handed.envelope.message.key.clone()));
        other.ack(tags(&handed)).await.unwrap();
    }
    // The other had everything of its keys: now there are only the first one's.
    assert_eq!(came, its_keys.len() * 20, "of {} keys", its_keys.len());
    full.ack(tags(&held)).await.unwrap();
    for _ in came + 1..600 {
        let handed = take(&*full, 1).await;
        assert!(!its_keys.contains(&handed[0].envelope.message.key));
        full.ack(tags(&handed)).await.unwrap();
    }
    assert_quiet(&*other).await;
}

pub async fn a_rejected_message_comes_again_after_its_delay_in_every_mode(ground: Ground) {
    for mode in GroupMode::ALL {
        let topic = ground.topic();
        let member = ground.join_as(&topic, mode, 10).await;
        ground.store_all(&topic, (0..3).map(|n| keyed(n, "k"))).await;
        let held = take(&*member, 3).await;
        let (asked, delay) = (Instant::now(), Duration::from_millis(700));
        member.nack(tags(&held[1..2]), delay).await.unwrap();
        member.ack(tags(&held[..1])).await.unwrap();
        let again = take(&*member, 1).await;
        assert!(asked.elapsed() > delay.mul_f64(0.7), "{mode:?}: came after {:?}", asked.elapsed());
        assert_eq!((in_order(&again), again[0].attempt), (vec![1], 2), "{mode:?}");
        member.nack(tags(&again), Duration::ZERO).await.unwrap();
        let third = take(&*member, 1).await;
        assert_eq!((in_order(&third), third[0].attempt), (vec![1], 3), "{mode:?}");
        member.ack(tags(&third)).await.unwrap();
        member.ack(tags(&held[2..])).await.unwrap();
        assert_quiet(&*member).await;
    }
}

pub async fn a_delayed_message_waits_in_shared_groups_and_holds_up_nobody(ground: Ground) {
    const DELAY: Duration = Duration::from_secs(2);
    for mode in DELAYING {
        let topic = ground.topic();
        let member = ground.join_as(&topic, mode, 10).await;
        let late = Message { key: Some("k".into()), ..delayed(0, DELAY) };
        let due = late.deliver_at.unwrap();
        ground.store_all(&topic, [late, keyed(1, "k"), numbered(2)]).await;
        let at_once = take(&*member, 2).await;
        assert!(Timestamp::now() < due, "{mode:?}: the others do not wait");
        assert_eq!(sorted(&at_once), [1, 2], "{mode:?}");
        member.ack(tags(&at_once)).await.unwrap();
        let late = take(&*member, 1).await;
        assert!(Timestamp::now() >= due, "{mode:?}: too early by {:?}", due.as_millis());
        assert!(due.age() < Duration::from_secs(3), "{mode:?}: late by {:?}", due.age());
        assert_eq!((in_order(&late), late[0].attempt), (vec![0], 1), "{mode:?}");
    }
}

pub async fn a_delayed_message_comes_at_once_where_order_is_promised(ground: Ground) {
    const DELAY: Duration = Duration::from_secs(30);
    let topic = ground.topic();
    let tail = ground.lane.tail(&ground.route, &topic).await.unwrap();
    let mut follower = tail.follow().0;
    let messages = [numbered(0), delayed(1, DELAY), numbered(2)];
    let due = messages[1].deliver_at;
    ground.store_all(&topic, messages).await;
    let read = ground.read(&topic, Start::Earliest).await;
    assert_eq!(numbers(&read), [0, 1, 2]);
    assert_eq!(read[1].message.deliver_at, due, "whoever reads can see it");
    assert_eq!(numbers(&hear(&mut follower, 3).await), [0, 1, 2]);
    for mode in ORDERED {
        let member = ground.join_as(&topic, mode, 10).await;
        assert_eq!(in_order(&take(&*member, 3).await), [0, 1, 2], "{mode:?}");
    }
    assert!(Timestamp::now() < due.unwrap());
    // What an exclusive member gave back waits for its time where that counts.
    let member = ground.join_as(&topic, GroupMode::Shared, 10).await;
    assert_eq!(sorted(&take(&*member, 2).await), [0, 2]);
    assert_quiet(&*member).await;
}

/// Ten messages, a member that took them all and acknowledged three, a place to go on from, and what is expected then.
async fn sought(
    ground: &Ground,
    mode: GroupMode,
    case: usize,
) -> (Topic, Box<dyn Member>, Start, Vec<usize>) {
    let topic = ground.topic();
    let member = ground.join_as(&topic, mode, 20).await;
    let positions = ground.store(&topic, 0..5).await;
    let between = a_moment().await;
    a_moment().await;
    ground.store(&topic, 5..10).await;
    let held = take(&*member, 10).await;
    member.ack(tags(&held[..3])).await.unwrap();
    let (start, expected) = match case {
        0 => (Start::Earliest, 0..10),
        1 => (Start::Time(between), 5..10),
        2 => (Start::After(positions[1].clone()), 2..10),
        _ => (Start::Latest, 10..10),
    };
    // What is stored after the seek comes in any case.
    (topic, member, start, expected.chain([10]).collect())
}

pub async fn a_group_is_sought_to_any_start_with_its_members(ground: Ground) {
    for (case, mode) in (0..4).flat_map(|case| [(case, GroupMode::Shared), (case, GroupMode::Exclusive)]) {
        let (topic, member, start, expected) = sought(&ground, mode, case).await;
        ground.seek(&topic, start.clone()).await;
        ground.store(&topic, 10..11).await;
        let taken = take(&*member, expected.len()).await;
        assert_eq!(sorted(&taken), expected, "{mode:?} to {start:?}");
        assert!(taken.iter().all(|handed| handed.attempt == 1), "attempts begin again");
        if mode == GroupMode::Exclusive {
            assert!(taken.is_sorted_by_key(|handed| number(&handed.envelope)));
        }
        // They are its own again.
        member.ack(tags(&taken)).await.unwrap();
        assert_quiet(&*member).await;
        ground.reports(&topic, |report| report.backlog == 0).await;
    }
}

pub async fn a_group_is_sought_to_any_start_without_members(ground: Ground) {
    for case in 0..4 {
        let (topic, member, start, expected) = sought(&ground, GroupMode::Shared, case).await;
        drop(member);
        ground.seek(&topic, start.clone()).await;
        ground.store(&topic, 10..11).await;
        let member = ground.join_as(&topic, GroupMode::KeyShared, 20).await;
        let taken = take(&*member, expected.len()).await;
        assert_eq!(sorted(&taken), expected, "to {start:?}");
        assert!(taken.iter().all(|handed| handed.attempt == 1), "attempts begin again");
        assert_quiet(&*member).await;
    }
}

pub async fn a_seek_survives_a_restart(mut ground: Ground) {
    let (topic, member, start, expected) = sought(&ground, GroupMode::Failover, 2).await;
    ground.seek(&topic, start).await;
    drop(member);
    ground.restart().await;
    ground.store(&topic, 10..11).await;
    let member = ground.join_as(&topic, GroupMode::Failover, 20).await;
    assert_eq!(in_order(&take(&*member, expected.len()).await), expected);
    assert_quiet(&*member).await;
}

pub async fn what_a_member_had_not_taken_before_a_seek_does_not_come(ground: Ground) {
    for mode in GroupMode::ALL {
        let topic = ground.topic();
        let member = ground.join_as(&topic, mode, 20).await;
        ground.store(&topic, 0..5).await;
        ground.reports(&topic, |report| report.backlog == 5).await;
        a_moment().await;
        ground.seek(&topic, Start::Latest).await;
        assert_quiet(&*member).await;
        let report = ground.reports(&topic, |report| report.backlog == 0).await;
        assert_eq!(report.unacked, 0, "{mode:?}");
        ground.store(&topic, 5..7).await;
        assert_eq!(sorted(&take(&*member, 2).await), [5, 6], "{mode:?}");
    }
}

pub async fn seeking_what_does_not_exist_is_a_bad_request(ground: Ground) {
    let (used, unused) = (ground.topic(), ground.topic());
    ground.store(&used, 0..1).await;
    for topic in [&used, &unused] {
        let refused = ground.lane.seek(&ground.route, topic, "nobody", Start::Earliest).await;
        assert!(matches!(refused, Err(LaneError::BadRequest(_))), "{refused:?}");
        assert_eq!(ground.lane.groups(&ground.route, topic).await.unwrap(), []);
    }
}

pub async fn what_was_held_before_a_seek_is_nobodys_to_acknowledge(ground: Ground) {
    let topic = ground.topic();
    let first = ground.join_as(&topic, GroupMode::KeyShared, 100).await;
    ground.store_all(&topic, (0..40).map(|n| keyed(n, n))).await;
    let before = take(&*first, 40).await;
    let second = ground.join_as(&topic, GroupMode::KeyShared, 100).await;
    assert_quiet(&*second).await;
    ground.seek(&topic, Start::Earliest).await;

    // Now that nobody holds anything, the second has the keys that moved to it.
    let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + SOON;
    while firsts.len() + seconds.len() < 40 {
        assert!(Instant::now() < deadline, "{} and {} came", firsts.len(), seconds.len());
        firsts.extend(glean(&*first, Duration::from_millis(20)).await);
        seconds.extend(glean(&*second, Duration::from_millis(20)).await);
    }
    assert!(!seconds.is_empty());
    first.ack(tags(&before)).await.unwrap();
    ground.reports(&topic, |report| report.backlog == 40).await;
    drop(first);
    drop(second);
    let next = ground.join_as(&topic, GroupMode::KeyShared, 100).await;
    assert_eq!(sorted(&take(&*next, 40).await), (0..40).collect::<Vec<_>>());
}

/// A broker may still be fetching what the first of them held when the last one leaves and the next one comes.
pub async fn whoever_joins_as_the_last_members_leave_is_given_everything(ground: Ground) {
    const MESSAGES: usize = 20;
    for (mode, round) in DELAYING.into_iter().flat_map(|mode| (0..12).map(move |round| (mode, round))) {
        let topic = ground.topic();
        let join = async || ground.join_as(&topic, mode, 100).await;
        let leaving = vec![join().await, join().await];
        ground.store_all(&topic, (0..MESSAGES).map(|n| keyed(n, n))).await;
        given_everything(&leaving, MESSAGES).await;
        drop(leaving);
        let mut next = vec![join().await];
        if round % 2 == 1 {
            next.push(join().await);
        }
        given_everything(&next, MESSAGES).await;
    }
}

async fn given_everything(members: &[Box<dyn Member>], count: usize) {
    let (mut came, deadline) = (BTreeSet::new(), Instant::now() + SOON);
    while came.len() < count {
        assert!(Instant::now() < deadline, "only {came:?} came");
        for member in members {
            came.extend(sorted(&glean(&**member, Duration::from_millis(2)).await));
        }
    }
}

pub async fn a_deleted_group_is_gone_for_good(mut ground: Ground) {
    let topic = ground.topic();
    let delete = async |ground: &Ground| soon(ground.lane.delete_group(&ground.route, &topic, GROUP)).await;
    assert!(!delete(&ground).await.unwrap(), "there is none");
    ground.store(&topic, 0..3).await;
    assert!(!delete(&ground).await.unwrap(), "there is none");
    for mode in GroupMode::ALL {
        let member = ground.join_as(&topic, mode, 10).await;
        let held = take(&*member, 3).await;
        member.ack(tags(&held)).await.unwrap();
        let refused = delete(&ground).await;
        assert!(matches!(refused, Err(LaneError::GroupBusy(_))), "{refused:?}");
        drop(member);
        let deadline = Instant::now() + SOON;
        while matches!(delete(&ground).await, Err(LaneError::GroupBusy(_))) {
            assert!(Instant::now() < deadline, "the member left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!delete(&ground).await.unwrap(), "it was deleted");
    }
    ground.restart().await;
    assert_eq!(ground.lane.groups(&ground.route, &topic).await.unwrap(), []);
    let member = ground.join_as(&topic, GroupMode::Shared, 10).await;
    assert_eq!(sorted(&take(&*member, 3).await), [0, 1, 2], "another of its name begins anew");
}

pub async fn a_report_says_how_a_group_stands(ground: Ground) {
    let topic = ground.topic();
    assert_eq!(ground.lane.groups(&ground.route, &topic).await.unwrap(), []);
    let first = ground.join_as(&topic, GroupMode::Shared, 3).await;
    let report = ground.reports(&topic, |report| report.members == 1).await;
    assert_eq!((report.mode, report.backlog, report.unacked), (Some(GroupMode::Shared), 0, 0));
    assert_eq!(report.oldest, None);

    ground.store(&topic, 0..1).await;
    let between = a_moment().await;
    a_moment().await;
    for n in 1..5 {
        // One by one: a broker may give to one member what was published together.
        ground.store(&topic, n..n + 1).await;
    }
    let held = take(&*first, 3).await;
    let report = ground.reports(&topic, |report| (report.backlog, report.unacked) == (5, 3)).await;
    assert!(report.oldest.is_some_and(|at| at <= between), "{report:?}");
    let of_oldest = held.iter().position(|handed| number(&handed.envelope) == 0).unwrap();
    first.ack(vec![held[of_oldest].tag]).await.unwrap();
    let report = ground.reports(&topic, |report| (report.backlog, report.unacked) == (4, 3)).await;
    assert!(report.oldest.is_some_and(|at| at >= between && at.age() < SOON), "{report:?}");

    let second = ground.join_as(&topic, GroupMode::Shared, 1).await;
    ground.reports(&topic, |report| (report.members, report.unacked) == (2, 4)).await;
    drop((first, second));
    let report = ground.reports(&topic, |report| report.members == 0).await;
    assert_eq!((report.mode, report.backlog, report.unacked), (None, 4, 0));
    for mode in GroupMode::ALL {
        let member = ground.join_as(&topic, mode, 1).await;
        ground.reports(&topic, |report| (report.mode, report.members) == (Some(mode), 1)).await;
        drop(member);
    }
}

pub async fn nobody_ever_holds_more_than_the_prefetch_in_any_mode(ground: Ground) {
    const PREFETCH: usize = 4;
    for mode in GroupMode::ALL {
        let topic = ground.topic();
        let mut members = vec![(ground.join_as(&topic, mode, PREFETCH as u32).await, Vec::new())];
        if mode != GroupMode::Exclusive {
            members.push((ground.join_as(&topic, mode, PREFETCH as u32).await, Vec::new()));
        }
        ground.store_all(&topic, (0..60).map(|n| keyed(n, n % 10))).await;
        let (mut done, mut random) = (0, fastrand::Rng::with_seed(3));
        let deadline = Instant::now() + SOON;
        while done < 60 {
            assert!(Instant::now() < deadline, "{mode:?}: {done} are done");
            for (member, held) in &mut members {
                held.extend(glean(&**member, Duration::from_millis(50)).await);
                assert!(held.len() <= PREFETCH, "{mode:?}: holds {}", held.len());
                // Some are done, some come again, some stay.
                let acked = held.split_off(held.len() - random.usize(0..=held.len()));
                done += acked.len();
                member.ack(tags(&acked)).await.unwrap();
                let rejected = held.split_off(held.len() - random.usize(0..=held.len()));
                member.nack(tags(&rejected), Duration::ZERO).await.unwrap();
            }
        }
    }
}

/// However little of its prefetch is free, that much is filled at once: nobody waits until more comes free.
pub async fn a_member_that_keeps_most_of_what_it_has_gets_one_for_each_that_it_settles(ground: Ground) {
    const PREFETCH: usize = 10;
    let topic = ground.topic();
    let member = ground.join_as(&topic, GroupMode::Shared, PREFETCH as u32).await;
    for number in 0..30 {
        // One by one: what is stored together comes together.
        ground.store(&topic, number..number + 1).await;
    }
    let mut held = take(&*member, PREFETCH).await;
    for _ in PREFETCH..30 {
        let last = held.split_off(PREFETCH - 1);
        member.ack(tags(&last)).await.unwrap();
        held.extend(take(&*member, 1).await);
    }
}

/// Members join, leave, acknowledge and reject as they please; at the end everything was acknowledged, once.
pub async fn whatever_members_do_every_message_is_acknowledged_once(ground: Ground) {
    const MESSAGES: usize = 150;
    for (mode, seed) in DELAYING.into_iter().chain([GroupMode::Failover]).zip(fastrand::u64(0..1 << 32)..) {
        let mut random = fastrand::Rng::with_seed(seed);
        let topic = ground.topic();
        let mut members: Vec<(Box<dyn Member>, Vec<Handed>)> = Vec::new();
        let (mut stored, mut acked) = (0, BTreeSet::new());
        let deadline = Instant::now() + SOON * 2;
        for step in 0.. {
            let left = MESSAGES - acked.len();
            if left == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "seed {seed}, {mode:?}: {left} are left");
            // Once enough has happened, they settle down.
            let calm = step > 150;
            match random.u8(0..10) {
                _ if members.is_empty() => {
                    members.push((ground.join_as(&topic, mode, 30).await, Vec::new()));
                }
                0 if stored < MESSAGES => {
                    let batch = stored..MESSAGES.min(stored + random.usize(1..30));
                    stored = batch.end;
                    ground.store_all(&topic, batch.map(|n| keyed(n, n % 9))).await;
                }
                1 if !calm && members.len() < 4 => {
                    members.push((ground.join_as(&topic, mode, random.u32(1..30)).await, Vec::new()));
                }
                2 if !calm => drop(members.swap_remove(random.usize(0..members.len()))),
                3 if !calm => {
                    let at = random.usize(0..members.len());
                    let (member, held) = &mut members[at];
                    let rejected = held.split_off(held.len() - random.usize(0..=held.len()));
                    let delay = Duration::from_millis(random.u64(0..30));
                    member.nack(tags(&rejected), delay).await.unwrap();
                }
                _ => {
                    for (member, held) in &mut members {
                        held.extend(glean(&**member, Duration::from_millis(2)).await);
                        let back = held.iter().find(|handed| acked.contains(&number(&handed.envelope)));
                        assert!(back.is_none(), "seed {seed}, {mode:?}: {back:?} was acknowledged");
                        random.shuffle(held);
                        let done = held.split_off(held.len() - random.usize(0..=held.len()));
                        member.ack(tags(&done)).await.unwrap();
                        acked.extend(sorted(&done));
                    }
                }
            }
        }
        ground.reports(&topic, |report| report.backlog == 0).await;
    }
}

/// A test for every promise that is about the modes of groups, their seek, deletion and report.
macro_rules! group_promises {
    ($ground:path) => {
        crate::durable_contract::promises! { $ground, crate::durable_contract::groups;
            an_exclusive_member_keeps_others_out_until_it_leaves
            a_group_has_the_mode_of_its_members
            failover_hands_over_within_two_seconds_and_in_order
            failover_under_load_loses_no_order_when_the_active_member_leaves
            key_shared_keeps_the_order_of_a_key_with_members_coming_and_going
            key_shared_uses_all_members_and_each_key_one
            a_key_moves_to_a_new_member_once_the_old_one_holds_none_of_it
            a_full_member_of_key_shared_stops_no_keys_but_its_own
            a_rejected_message_comes_again_after_its_delay_in_every_mode
            a_delayed_message_waits_in_shared_groups_and_holds_up_nobody
            a_delayed_message_comes_at_once_where_order_is_promised
            a_group_is_sought_to_any_start_with_its_members
            a_group_is_sought_to_any_start_without_members
            a_seek_survives_a_restart
            what_a_member_had_not_taken_before_a_seek_does_not_come
            what_was_held_before_a_seek_is_nobodys_to_acknowledge
            whoever_joins_as_the_last_members_leave_is_given_everything
            seeking_what_does_not_exist_is_a_bad_request
            a_deleted_group_is_gone_for_good
            a_report_says_how_a_group_stands
            nobody_ever_holds_more_than_the_prefetch_in_any_mode
            a_member_that_keeps_most_of_what_it_has_gets_one_for_each_that_it_settles
            whatever_members_do_every_message_is_acknowledged_once
        }
    };
}
pub(crate) use group_promises;
