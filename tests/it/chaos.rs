//! Everything breaks, at random but by a seed, under load on real brokers; and every promise holds.
//!
//! ```text
//! publishers,  ──▶ balancer ──▶ bridge ─┬─ proxy ──▶ NATS     killed, frozen, gone, reset again and again, slow
//! subscribers                   bridge ─┤
//!                               bridge ─┴─ proxy ──▶ Pulsar   the same, and gone while a bridge's disk is full
//!                               killed, or given routes with a mistake
//! ```
//! `make chaos SEED=7 MINUTES=10` runs one; the seed repeats the plan, not each moment of it.

mod plan;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Mutex as Turn;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::plan::{Fault, Plan, Step};
use crate::brokers::{Broker, Options, left_out};
use crate::checker::{Answer, Hurt, Moment};
use crate::crowd::{self, Book, Crowd};
use crate::fleet::Fleet;
use crate::harness::http_client;
use crate::proxy::Proxy;
use crate::truth::{self, Broken, Subject};

/// Together they draw every fault.
const SEEDS: [u64; 3] = [9, 13, 54];
const BRIDGES: usize = 3;
/// What a bridge of a debug build takes at most: some 60 MiB at rest, and what waits in its queues.
const RESIDENT_KIB: u64 = 128 << 10;
const DESCRIPTORS: usize = 200;
/// `spool_max`.
const SPOOL_BYTES: f64 = 16.0 * 1024.0 * 1024.0;
/// Of one processor, while a broker is broken, in whatever way.
const LOAD_MAX: f64 = 0.5;
const RESET_EVERY: Duration = Duration::from_millis(200);
/// A Pulsar that is well answers its own health check within this.
const PROMPT: Duration = Duration::from_secs(1);
/// How long what was broken last may need until everything flows and has come.
const DRAINED: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_breaks_every_promise_holds() {
    if left_out() {
        return;
    }
    let given = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    match given("SEED") {
        Some(seed) => run(Plan::draw(seed, given("MINUTES").unwrap_or(1), BRIDGES)).await,
        None => {
            for seed in SEEDS {
                run(Plan::draw(seed, 1, BRIDGES)).await;
            }
        }
    }
}

#[test]
fn the_fixed_seeds_draw_every_fault() {
    let drawn: Vec<_> = SEEDS.into_iter().flat_map(|seed| Plan::draw(seed, 1, BRIDGES).faults()).collect();
    let all = [("nats", &plan::NATS[..]), ("pulsar", &plan::PULSAR), ("bridge", &plan::BRIDGE)];
    for (name, fault) in all.into_iter().flat_map(|(name, all)| all.iter().map(move |of| (name, *of))) {
        assert!(drawn.contains(&(name, fault)), "no seed draws {fault:?} for {name}");
    }
}

/// What the faults share.
struct Run {
    book: Arc<Book>,
    fleet: Arc<Fleet>,
    routes: String,
    /// A bridge is broken in one way at a time.
    bridges: Turn<()>,
    broken: Mutex<Vec<Broken>>,
    complaints: Mutex<Vec<String>>,
}

async fn run(plan: Plan) {
    println!("{plan}");
    let (options, to_nats) = (Options::default(), Proxy::start());
    let (mut nats, (mut pulsar, to_pulsar)) =
        tokio::join!(Broker::nats(&options), Proxy::pulsar(options.clone()));
    to_nats.lead_to(nats.port());
    let nats_url = format!("nats://127.0.0.1:{}", to_nats.port());
    let mut settings = crowd::settings(&nats_url, &to_pulsar.pulsar_url(), &pulsar.admin_url());
    settings.push("lanes.durable.spool_max=16MiB".into());
    crowd::make_namespace(&pulsar, "chaos").await;
    let (book, routes) = (Book::begin(), crowd::routes("chaos"));
    let fleet = Fleet::start(BRIDGES, &routes, settings, book.clone()).await;
    let run = Run {
        book,
        fleet,
        routes,
        bridges: Turn::new(()),
        broken: Mutex::default(),
        complaints: Mutex::default(),
    };
    let crowd = Crowd::begin(&run.fleet.url(), &run.book, plan.seed).await;
    run.fleet.is_well().await;
    let (watching, admin) = (run.fleet.watch(), pulsar.admin_url());
    let breaking = async {
        tokio::join!(
            run.break_nats(&plan.nats, &mut nats, &to_nats),
            run.break_pulsar(&plan.pulsar, &mut pulsar, &to_pulsar),
            run.break_bridges(&plan.bridges),
        );
        // What bridges say of what was mended last is looked at, too.
        sleep(Duration::from_secs(8)).await;
    };
    tokio::select! {
        () = breaking => {}
        () = run.look_at_pulsar(&admin) => {}
    }
    drop(watching);
    crowd.finish(&run.fleet.url(), &run.book, DRAINED).await;
    run.check(&plan);
}

impl Run {
    async fn break_nats(&self, steps: &[Step], nats: &mut Broker, way: &Proxy) {
        for step in steps {
            sleep(step.pause).await;
            let (from, storm) = (self.book.now(), self.break_broker(step.fault, nats, way));
            self.last(step).await;
            let mending = self.book.now();
            drop(storm);
            mend_broker(step.fault, nats, way).await;
            self.mended("NATS", Hurt::Nats, Subject::Ephemeral, step, (from, mending));
        }
    }

    async fn break_pulsar(&self, steps: &[Step], pulsar: &mut Broker, way: &Proxy) {
        for (round, step) in steps.iter().enumerate() {
            sleep(step.pause).await;
            let turn = match step.fault {
                Fault::DiskFull => Some(self.bridges.lock().await),
                _ => None,
            };
            let (from, storm) = (self.book.now(), self.break_broker(step.fault, pulsar, way));
            match step.fault {
                Fault::DiskFull => self.fill_disk(round as u64, step).await,
                _ => self.last(step).await,
            }
            let mending = self.book.now();
            drop((storm, turn));
            mend_broker(step.fault, pulsar, way).await;
            self.mended("Pulsar", Hurt::Pulsar, Subject::Durable, step, (from, mending));
        }
    }

    async fn break_bridges(&self, steps: &[Step]) {
        for Step { pause, fault, lasts, bridge } in steps.iter().copied() {
            sleep(pause).await;
            let _turn = self.bridges.lock().await;
            let from = self.book.now();
            match fault {
                Fault::BridgeKilled => {
                    self.fleet.kill(bridge).await;
                    sleep(lasts).await;
                    self.fleet.begin(bridge).await;
                    self.book.disturbed(Hurt::Bridge, from, self.book.now());
                }
                _ => {
                    let mistake =
                        format!("{}\n[[route]]\ntopic = \"live.a\"\nlain = \"durable\"\n", self.routes);
                    self.fleet.write_routes(bridge, &mistake);
                    sleep(lasts).await;
                    let mending = self.book.now();
                    self.fleet.write_routes(bridge, &self.routes);
                    let (subject, mended) = (Subject::Routes, self.book.now());
                    let bridge = Some(bridge);
                    self.broken.lock().unwrap().push(Broken {
                        subject,
                        bridge,
                        is_away: true,
                        from,
                        mending,
                        mended,
                    });
                }
            }
            println!("{from:>7} to {:>7} ms  bridge {bridge}: {fault:?}", self.book.now());
        }
    }

    /// Asks Pulsar itself how it is, for ever: where it cannot say, bridges may call it down. One that was killed serves
    /// some requests, and then none, for a while after it has come back.
    async fn look_at_pulsar(&self, admin: &str) {
        let client = http_client();
        loop {
            let from = self.book.now();
            let look = client.get(format!("{admin}/admin/v2/brokers/health")).send();
            let is_well = timeout(PROMPT, look)
                .await
                .is_ok_and(|answer| answer.is_ok_and(|answer| answer.status().is_success()));
            if !is_well {
                let (subject, mended) = (Subject::Durable, self.book.now());
                let of = Broken { subject, bridge: None, is_away: false, from, mending: mended, mended };
                self.broken.lock().unwrap().push(of);
            }
            sleep(PROMPT).await;
        }
    }

    /// What lasts as long as what is returned.
    fn break_broker(&self, fault: Fault, broker: &mut Broker, way: &Proxy) -> Option<JoinSet<()>> {
        match fault {
            Fault::Killed => broker.kill(),
            Fault::Frozen => broker.stop(),
            Fault::Gone | Fault::DiskFull => way.hold(),
            Fault::Slow => way.slow(),
            Fault::Reset => return Some(way.cut_every(RESET_EVERY)),
            Fault::BridgeKilled | Fault::BadRoutes => unreachable!("a bridge's"),
        }
        None
    }

    /// While it lasts no bridge is busy with it.
    async fn last(&self, step: &Step) {
        let used =
            || (0..BRIDGES).map(|bridge| (self.fleet.since(bridge), self.fleet.takes(bridge).processor));
        let before: Vec<_> = used().collect();
        sleep(step.lasts).await;
        for (bridge, (before, after)) in before.into_iter().zip(used()).enumerate() {
            let load = (after.1 - before.1) / step.lasts.as_secs_f64();
            let is_the_same = before.0 == after.0;
            if is_the_same {
                println!("bridge {bridge} took {load:.2} of a processor in {:?}", step.fault);
            }
            if is_the_same && load > LOAD_MAX {
                self.complain(format!("bridge {bridge} took {load:.2} of a processor in {step:?}"));
            }
        }
    }

    /// Pulsar is away. Nothing of the bridge's files may grow any more, and its spool says so.
    async fn fill_disk(&self, round: u64, step: &Step) {
        // Until then it may still take the lane for one that is up.
        sleep(Duration::from_secs(4)).await;
        let bridge = step.bridge;
        let bytes = std::fs::metadata(self.fleet.spool(bridge)).unwrap().len();
        let url = self.fleet.with(bridge, |process| {
            process.limit_files(Some(bytes));
            process.url()
        });
        let url = url.expect("it runs");
        let stop = CancellationToken::new();
        let (is_full, ()) = tokio::join!(crowd::fill(&url, &self.book, round, stop.clone()), async {
            sleep(step.lasts).await;
            stop.cancel();
        });
        if !is_full {
            self.complain(format!("bridge {bridge} took everything though its disk was full: {step:?}"));
        }
        self.fleet.with(bridge, |process| process.limit_files(None));
    }

    fn mended(
        &self,
        name: &str,
        hurt: Hurt,
        subject: Subject,
        step: &Step,
        (from, mending): (Moment, Moment),
    ) {
        let mended = self.book.now();
        self.book.disturbed(hurt, from, mended);
        let is_away = !matches!(step.fault, Fault::Slow | Fault::Reset);
        self.broken.lock().unwrap().push(Broken { subject, bridge: None, is_away, from, mending, mended });
        println!("{from:>7} to {mended:>7} ms  {name}: {:?}, mended from {mending} ms on", step.fault);
    }

    fn complain(&self, complaint: String) {
        self.complaints.lock().unwrap().push(complaint);
    }

    fn check(&self, plan: &Plan) {
        let broken = self.broken.lock().unwrap().clone();
        for lie in truth::lies(&self.fleet.statements(), &broken) {
            self.complain(format!("said, and not so: {lie}"));
        }
        for bridge in 0..BRIDGES {
            let most = self.fleet.most(bridge);
            println!("bridge {bridge}: {most:?}");
            let is_bounded = most.resident_kib <= RESIDENT_KIB
                && most.descriptors <= DESCRIPTORS
                && most.spool_bytes <= SPOOL_BYTES;
            if !is_bounded {
                self.complain(format!("bridge {bridge} took {most:?}"));
            }
            for line in self.fleet.log(bridge).iter().filter(|line| line.contains("panicked")) {
                self.complain(format!("bridge {bridge}: {line}"));
            }
        }
        let internal = Answer::Unknown("INTERNAL".into());
        self.book.read(|history| {
            let mut answers = std::collections::BTreeMap::new();
            for of in &history.operations {
                *answers.entry(format!("{} {:?}", of.name.topic, of.answer)).or_insert(0) += 1;
                if of.answer == internal {
                    self.complain(format!("a defect: {of:?}"));
                }
            }
            println!("{answers:#?}");
        });
        let complaints: Vec<_> = self.complaints.lock().unwrap().drain(..).chain(self.book.told()).collect();
        if !complaints.is_empty() {
            println!("{}", self.fleet.logs());
        }
        assert!(complaints.is_empty(), "{plan}{} complaints:\n{}", complaints.len(), complaints.join("\n"));
    }
}

async fn mend_broker(fault: Fault, broker: &mut Broker, way: &Proxy) {
    match fault {
        Fault::Killed => broker.restart().await,
        Fault::Frozen => broker.cont(),
        // What was on its way is lost, as with any machine that is gone.
        Fault::Gone | Fault::DiskFull => {
            way.cut();
            way.resume();
        }
        _ => way.resume(),
    }
}
