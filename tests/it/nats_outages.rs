//! A nats-server that dies, freezes or cannot be reached: noticed within three seconds, and over when it is over.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use twinspan::lane::contract::{EphemeralLane, LaneError};
use twinspan::lane::nats::Nats;
use twinspan::policy::Policy;
use twinspan::telemetry::metrics::Metrics;

use crate::brokers::{Broker, Options, left_out};
use crate::lanes::{
    Recorder, ephemeral, is_down, is_up, message, nats, pattern, policy, publish, route, settings, topic,
};

const NOTICED_WITHIN: Duration = Duration::from_secs(3);

fn everything() -> Policy {
    policy([ephemeral(">", "{topic}")])
}

/// Nothing is accepted, nothing is waited for, and nothing is left behind.
async fn refuses_at_once(lane: &Nats, policy: &Policy) {
    let name = topic("a.b");
    let route = route(policy, &name);
    let begun = Instant::now();
    for _ in 0..1000 {
        let refused = lane.publish(&route, &name, message("lost")).await;
        assert!(matches!(refused, Err(LaneError::Unavailable(_))), "{refused:?}");
    }
    let asked = lane.request(&route, &name, message("?"), Duration::from_secs(60)).await;
    assert!(matches!(asked, Err(LaneError::Unavailable(_))), "{asked:?}");
    let heard = lane.listen(&pattern("a.b"), None, 0, Recorder::new()).await.map(drop);
    assert!(matches!(heard, Err(LaneError::Unavailable(_))), "{heard:?}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(lane.requests(), 0);
}

async fn crosses(lane: &Nats, policy: &Policy, ears: &[&Recorder], payload: &str) {
    publish(lane, policy, "a.b", payload).await;
    for ear in ears {
        ear.wait_for(payload).await;
    }
}

/// Breaks the way to the server, and heals it.
async fn survives<B>(
    lane: Arc<Nats>,
    subject: &mut B,
    hurt: impl AsyncFn(&mut B),
    heal: impl AsyncFn(&mut B),
) {
    let policy = everything();
    let (star, _star) = Recorder::listening(&*lane, "a.*").await;
    let (one, _one) = Recorder::listening(&*lane, "a.b").await;
    let grouped = Recorder::new();
    let _grouped = lane.listen(&pattern("a.b"), Some("g"), 0, grouped.clone()).await.unwrap();
    for round in 1..=2 {
        crosses(&lane, &policy, &[&star, &one, &grouped], &format!("before {round}")).await;
        let hurt_at = Instant::now();
        hurt(subject).await;
        let why = is_down(&*lane).await;
        let noticed = hurt_at.elapsed();
        assert!(noticed < NOTICED_WITHIN, "{noticed:?}: {why}");
        assert!(why.contains("nats://"), "{why}");
        refuses_at_once(&lane, &policy).await;

        heal(subject).await;
        let healed_at = Instant::now();
        is_up(&*lane).await;
        assert!(healed_at.elapsed() < Duration::from_secs(5), "{:?}", healed_at.elapsed());
        for ear in [&star, &one, &grouped] {
            assert_eq!(ear.missed_count(), round, "told before the lane is up, and once");
        }
        crosses(&lane, &policy, &[&star, &one, &grouped], &format!("after {round}")).await;
        assert!(!star.payloads().contains(&"lost".into()), "what was refused was not sent");
        println!("round {round}: noticed after {noticed:?}: {why}; up again {:?} after", healed_at.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_is_noticed_and_its_return_heals_everything() {
    if left_out() {
        return;
    }
    let mut broker = Broker::nats(&Options::default()).await;
    let lane = nats(&settings(broker.url()), &everything()).await;
    survives(lane, &mut broker, async |broker| broker.kill(), async |broker| broker.restart().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_freezes_is_noticed_and_its_return_heals_everything() {
    if left_out() {
        return;
    }
    let mut broker = Broker::nats(&Options::default()).await;
    let lane = nats(&settings(broker.url()), &everything()).await;
    let heal = async |broker: &mut Broker| {
        // Long enough frozen that the connection was given up, and several attempts at another one hang.
        tokio::time::sleep(Duration::from_secs(4)).await;
        broker.cont();
    };
    survives(lane, &mut broker, async |broker| broker.stop(), heal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_be_reached_is_noticed_and_its_return_heals_everything() {
    if left_out() {
        return;
    }
    let broker = Broker::nats(&Options::default()).await;
    let mut way = Way::to(&broker).await;
    let lane = nats(&settings(way.url()), &everything()).await;
    let heal = async |way: &mut Way| {
        tokio::time::sleep(Duration::from_secs(4)).await;
        way.open();
    };
    survives(lane, &mut way, async |way| way.hold(), heal).await;
}

/// What was accepted may be lost with the server; it is never delivered twice, and what was refused never at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_what_is_published_while_a_server_is_killed_nothing_comes_twice_and_nothing_that_was_refused() {
    if left_out() {
        return;
    }
    let mut broker = Broker::nats(&Options::default()).await;
    let policy = everything();
    let lane = nats(&settings(broker.url()), &policy).await;
    let (ear, _listening) = Recorder::listening(&*lane, "load.*").await;
    let (mut ends, mut publishers) = (Vec::new(), JoinSet::new());
    for publisher in 0..4 {
        let (lane, policy, end) = (lane.clone(), policy.clone(), CancellationToken::new());
        ends.push(end.clone().drop_guard());
        publishers.spawn(async move {
            let name = topic(&format!("load.{publisher}"));
            let route = route(&policy, &name);
            let (mut accepted, mut refused) = (Vec::new(), Vec::new());
            for n in 0.. {
                if end.is_cancelled() {
                    break;
                }
                let payload = format!("{publisher}/{n}");
                match lane.publish(&route, &name, message(payload.clone())).await {
                    Ok(()) => accepted.push(payload),
                    Err(LaneError::Unavailable(_)) => refused.push(payload),
                    Err(other) => panic!("{other}"),
                }
                if n % 50 == 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            (accepted, refused)
        });
    }
    for round in 1..=3 {
        let heard = ear.heard().len();
        ear.wait(heard + 500).await;
        broker.kill();
        is_down(&*lane).await;
        broker.restart().await;
        is_up(&*lane).await;
        println!("round {round}: {} heard before", heard);
    }
    drop(ends);
    let (mut accepted, mut refused) = (HashSet::new(), HashSet::new());
    while let Some(published) = publishers.join_next().await {
        let published = published.unwrap();
        accepted.extend(published.0);
        refused.extend(published.1);
    }
    publish(&*lane, &policy, "load.end", "end").await;
    ear.wait_for("end").await;
    let heard = ear.payloads();
    let each: HashSet<_> = heard.iter().cloned().collect();
    assert_eq!(each.len(), heard.len(), "each once");
    let delivered: Vec<_> = refused.intersection(&each).take(9).collect();
    assert_eq!(delivered, Vec::<&String>::new(), "refused, and delivered, of {}", refused.len());
    assert!(refused.len() > 100 && accepted.len() > 1500, "{} and {}", refused.len(), accepted.len());
    println!("{} accepted, {} heard, {} refused", accepted.len(), heard.len(), refused.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_to_a_server_that_just_froze_ends_within_the_deadline() {
    if left_out() {
        return;
    }
    let broker = Broker::nats(&Options::default()).await;
    let policy = everything();
    let lane = nats(&settings(broker.url()), &policy).await;
    broker.stop();
    let name = topic("a");
    let route = route(&policy, &name);
    let (begun, mut slowest, mut accepted) = (Instant::now(), Duration::ZERO, 0);
    while begun.elapsed() < Duration::from_secs(6) {
        let call = Instant::now();
        match lane.publish(&route, &name, message("x".repeat(100_000))).await {
            Ok(()) => accepted += 1,
            Err(LaneError::Unavailable(_)) if lane.state().borrow().is_up() => {}
            Err(LaneError::Unavailable(_)) => break,
            Err(other) => panic!("{other}"),
        }
        slowest = slowest.max(call.elapsed());
    }
    println!("accepted {accepted}, slowest {slowest:?}");
    // What the queue, the client library and two sockets hold, and no more however fast it comes.
    assert!(accepted < 400, "{accepted} messages of 100 kB are under way to a server that takes nothing");
    assert!(slowest < Duration::from_millis(2500), "{slowest:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    broker.cont();
    is_up(&*lane).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_opens_without_a_server_and_comes_up_when_there_is_one() {
    if left_out() {
        return;
    }
    let mut broker = Broker::nats(&Options::default()).await;
    broker.kill();
    let policy = everything();
    let begun = Instant::now();
    let lane = Nats::open(&settings(broker.url()), policy.clone(), Arc::new(Metrics::new())).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(!lane.state().borrow().is_up());
    refuses_at_once(&lane, &policy).await;
    let mut states = lane.state();
    let refused = states.wait_for(|state| format!("{state:?}").contains("refused"));
    tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap().unwrap();
    broker.restart().await;
    is_up(&*lane).await;
    let (ear, _listening) = Recorder::listening(&*lane, "a.b").await;
    crosses(&lane, &policy, &[&ear], "x").await;
    assert_eq!(ear.missed_count(), 0);
    lane.close().await;
    assert!(lane.publish(&route(&policy, &topic("a")), &topic("a"), message("x")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_reset_all_the_time_cost_little_and_heal() {
    if left_out() {
        return;
    }
    let broker = Broker::nats(&Options::default()).await;
    let way = Way::to(&broker).await;
    let policy = everything();
    let lane = nats(&settings(way.url()), &policy).await;
    let (ear, _listening) = Recorder::listening(&*lane, "a.b").await;
    let begun = Instant::now();
    let mut resets = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        way.reset();
        resets += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let connections = way.connections();
    assert!(connections <= 2 * resets + 4, "{connections} attempts for {resets} resets");
    is_up(&*lane).await;
    crosses(&lane, &policy, &[&ear], "after").await;
    assert!(ear.missed_count() >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_leaves_a_server_that_is_about_to_end_for_another() {
    if left_out() {
        return;
    }
    let leaving =
        Broker::nats(&Options { config: Some("lame_duck_duration: 60s".into()), ..Options::default() }).await;
    let staying = Broker::nats(&Options::default()).await;
    let policy = everything();
    let mut both = settings(leaving.url());
    both.url.push(staying.url());
    // Whichever it chose, both are in the pool.
    let lane = loop {
        let lane = nats(&both, &policy).await;
        let (_, varz) = leaving.get("/varz").await.unwrap();
        let varz: serde_json::Value = serde_json::from_str(&varz).unwrap();
        if varz["connections"] == 1 {
            break lane;
        }
    };
    let (ear, _listening) = Recorder::listening(&*lane, "a.b").await;
    let (end, load) = (CancellationToken::new(), lane.clone());
    let ended = end.clone();
    let publishing = tokio::spawn(async move {
        let (name, policy) = (topic("a.load"), everything());
        let route = route(&policy, &name);
        let (mut accepted, mut refused) = (0, Vec::new());
        while !ended.is_cancelled() {
            match load.publish(&route, &name, message("load")).await {
                Ok(()) => accepted += 1,
                Err(error) => refused.push(error),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (accepted, refused)
    });
    let told_at = Instant::now();
    leaving.lame_duck();
    ear.wait_missed(1).await;
    // The server itself would begin to close connections ten seconds later.
    assert!(told_at.elapsed() < Duration::from_secs(5), "{:?}", told_at.elapsed());
    is_up(&*lane).await;
    crosses(&lane, &policy, &[&ear], "after").await;
    end.cancel();
    let (accepted, refused) = publishing.await.unwrap();
    assert!(
        refused.is_empty(),
        "publishers notice: {accepted} accepted, {} refused: {:?}",
        refused.len(),
        refused[0]
    );
    let (_, varz) = staying.get("/varz").await.unwrap();
    let varz: serde_json::Value = serde_json::from_str(&varz).unwrap();
    assert_eq!(varz["connections"], 1);
}

/// A way to a server that can be held: bytes go in, and nothing comes out, and nobody is told.
struct Way {
    port: u16,
    mode: watch::Sender<Mode>,
    connections: watch::Receiver<usize>,
    _accepting: AbortOnDropHandle<()>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Open,
    Held,
    /// Connections of an earlier number are closed.
    Reset(usize),
}

impl Way {
    async fn to(broker: &Broker) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, target) = (listener.local_addr().unwrap().port(), broker.port());
        let mode = watch::Sender::new(Mode::Open);
        let (count, connections) = watch::channel(0);
        let modes = mode.subscribe();
        let accepting = async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                count.send_modify(|count| *count += 1);
                tokio::spawn(pass(client, target, modes.clone(), *count.borrow()));
            }
        };
        Self { port, mode, connections, _accepting: AbortOnDropHandle::new(tokio::spawn(accepting)) }
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    fn hold(&self) {
        self.mode.send_replace(Mode::Held);
    }

    fn open(&self) {
        self.mode.send_replace(Mode::Open);
    }

    fn reset(&self) {
        self.mode.send_replace(Mode::Reset(self.connections()));
    }

    fn connections(&self) -> usize {
        *self.connections.borrow()
    }
}

async fn pass(client: TcpStream, target: u16, modes: watch::Receiver<Mode>, number: usize) {
    let server = TcpStream::connect(("127.0.0.1", target)).await.unwrap();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // What was held is gone for good: a way that was lost does not deliver later.
    let lost = Arc::new(AtomicBool::new(false));
    let forth = copy(from_client, to_server, modes.clone(), lost.clone());
    let back = copy(from_server, to_client, modes.clone(), lost);
    let mut reset = modes;
    tokio::select! {
        () = forth => {}
        () = back => {}
        _ = reset.wait_for(|mode| matches!(mode, Mode::Reset(up_to) if number <= *up_to)) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
    lost: Arc<AtomicBool>,
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let held = async { drop(modes.wait_for(|mode| *mode == Mode::Held).await) };
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = held => {
                lost.store(true, Ordering::SeqCst);
                return until_open(&mut modes).await;
            }
        };
        match read {
            Ok(read) if read > 0 && !lost.load(Ordering::SeqCst) => {
                if to.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
            Ok(read) if read > 0 => return until_open(&mut modes).await,
            _ => return,
        }
    }
}

/// A connection that was lost ends when the way is open again: the other side answers that it knows nothing of it.
async fn until_open(modes: &mut watch::Receiver<Mode>) {
    let _ = modes.wait_for(|mode| *mode != Mode::Held).await;
}
