//! `bench`: load and latency through the bridge on either lane, beside the lanes without it and Pulsar's own clients.
//!
//! ```text
//! warm-up ─▶ round 1: A B C ─▶ round 2: A B C ─▶ … ─▶ medians, spreads, ratios
//! ```
//! Whatever is compared takes turns, so that what else the machine does disturbs all of it alike. It publishes the same
//! message: who publishes to Pulsar without the bridge adds the id and the time that the bridge stores with each.

mod bridge;
mod direct;
mod load;
mod meter;
mod pulsar_crate;
mod pulsar_ws;
mod receipts;
mod report;
mod socket;
mod traffic;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::problems;
use crate::config::{self, Sources};
use crate::lane::pulsar::peer::Entries;
use crate::message::{Lane, Lanes};
use crate::policy::Policy;
use crate::units;
use bridge::Bridge;
use direct::{Direct, Ground};
use load::Round;
use meter::Process;
use pulsar_crate::PulsarCrate;
use pulsar_ws::PulsarWs;
use report::{Row, Table};
use traffic::{How, PAYLOAD_MIN, Payload, Target};

const DEFAULT_URL: &str = "ws://127.0.0.1:8090/ws";
/// A JVM that has just started compiles what it runs: its first figures are up to four times worse.
const WARMUP_PULSAR: Duration = Duration::from_secs(30);
const WARMUP: Duration = Duration::from_millis(500);
/// Later loads find a broker that runs warm already, but for what only they use.
const LATER_WARMUP: u32 = 10;
/// A round of warming up: short, so that everything compared gets its turns.
const WARMUP_ROUND: Duration = Duration::from_millis(500);
/// How far apart the numbers of two rounds begin.
const ROUND_NUMBERS: u64 = 1_000_000_000;
const WINDOW_MAX: u64 = 1 << 16;

#[derive(Args)]
pub struct Bench {
    /// What to measure [default: all of them].
    #[arg(value_enum, value_name = "WORKLOAD")]
    workloads: Vec<Workload>,
    /// The bridge to load [default: ws://127.0.0.1:8090/ws].
    #[arg(long)]
    url: Option<String>,
    /// Only topics of these: ephemeral, durable, both [default: ephemeral,durable].
    #[arg(long, value_parser = lanes, value_delimiter = ',', value_name = "LANES")]
    lane: Vec<Lanes>,
    /// The lanes without the bridge, opened in this process as `serve` would.
    #[arg(long, conflicts_with = "compare")]
    direct: bool,
    /// One of Pulsar's own clients: pulsar-ws, pulsar-crate, pulsar-crate-batched or pulsar-crate-folded.
    #[arg(long, value_parser = peer, conflicts_with_all = ["compare", "direct"])]
    peer: Option<Who>,
    /// Several, in turns, with the ratios of each to every later one. All publish the same message: Pulsar's own
    /// clients add the two properties that the bridge stores.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TARGETS")]
    compare: Vec<Who>,
    /// Where Pulsar's WebSocket API is.
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:8080")]
    peer_url: String,
    /// publish: messages that are not acknowledged.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=WINDOW_MAX))]
    window: u64,
    /// paced, end-to-end, request, fan-out: messages a second.
    #[arg(long, default_value_t = 200.0, value_parser = rate)]
    rate: f64,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 128)]
    size: usize,
    /// consume, and end-to-end with --group: deliveries that are not acknowledged.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    prefetch: u32,
    /// consume: messages in the backlog.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    backlog: u64,
    /// consume: messages in each entry of Pulsar's storage, published by a native producer; without it the backlog
    /// is published by what is measured.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    per_entry: Option<u32>,
    /// end-to-end: receive as the member of a shared group instead of as a plain subscriber.
    #[arg(long)]
    group: bool,
    /// fan-out: how many subscribe.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    subscribers: u32,
    /// How long a round is.
    #[arg(long, default_value = "2s", value_parser = units::parse_duration, value_name = "TIME")]
    time: Duration,
    /// [default: 1, or 3 where several are compared]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Load that is not measured, before the first workload; a tenth of it before each other [default: 30s where a
    /// Pulsar is known to be behind it, 500ms elsewhere].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    warmup: Option<Duration>,
    /// A line of JSON for each workload, in place of the tables, or besides them in a file.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "-", value_name = "FILE")]
    json: Option<String>,
    /// What topics on the durable lane begin with: a route of that lane has to match.
    #[arg(long, value_name = "TOPIC", default_value = "orders.bench")]
    durable_topic: String,
    /// The same for the ephemeral lane.
    #[arg(long, value_name = "TOPIC", default_value = "telemetry.bench")]
    ephemeral_topic: String,
    /// The same for topics of both lanes.
    #[arg(long, value_name = "TOPIC", default_value = "alerts.bench")]
    both_topic: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
enum Workload {
    /// As fast as acknowledgements come, --window of them open.
    Publish,
    /// Acknowledgements at a --rate.
    Paced,
    /// Publish to receive at a --rate, by a plain subscriber or a --group.
    EndToEnd,
    /// A group empties a backlog, each message acknowledged by itself.
    Consume,
    /// Requests and their replies at a --rate.
    Request,
    /// One publisher at a --rate, many --subscribers.
    FanOut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Who {
    /// Through the WebSocket.
    Bridge,
    /// The lanes without the bridge.
    Direct,
    /// Pulsar's WebSocket API.
    PulsarWs,
    /// The `pulsar` crate's producer and consumer.
    PulsarCrate,
    /// The same in batches of 1000, or of what 5 ms bring.
    PulsarCrateBatched,
    /// The same, folded with LZ4 as our batches are.
    PulsarCrateFolded,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Bridge => "bridge",
            Who::Direct => "direct",
            Who::PulsarWs => "pulsar-ws",
            Who::PulsarCrate => "pulsar-crate",
            Who::PulsarCrateBatched => "pulsar-crate-batched",
            Who::PulsarCrateFolded => "pulsar-crate-folded",
        }
    }

    fn is_peer(self) -> bool {
        !matches!(self, Who::Bridge | Who::Direct)
    }
}

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Workload::Publish => "publish",
            Workload::Paced => "paced",
            Workload::EndToEnd => "end-to-end",
            Workload::Consume => "consume",
            Workload::Request => "request",
            Workload::FanOut => "fan-out",
        }
    }

    fn is_on(self, lanes: Lanes) -> bool {
        match self {
            Workload::Consume => lanes.takes(Lane::Durable),
            Workload::Request => lanes.takes(Lane::Ephemeral),
            _ => true,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Workload::Publish | Workload::Paced => "acks/s",
            Workload::EndToEnd | Workload::Consume | Workload::FanOut => "deliveries/s",
            Workload::Request => "replies/s",
        }
    }
}

fn peer(name: &str) -> Result<Who, String> {
    let who = Who::from_str(name, false).ok().filter(|who| who.is_peer());
    who.ok_or_else(|| "pulsar-ws, pulsar-crate, pulsar-crate-batched or pulsar-crate-folded".into())
}

fn lanes(name: &str) -> Result<Lanes, String> {
    let known = [Lanes::EPHEMERAL, Lanes::DURABLE, Lanes::Both];
    known.into_iter().find(|lanes| lanes.as_str() == name).ok_or_else(|| "ephemeral, durable or both".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| (0.1..=1e6).contains(rate));
    rate.ok_or_else(|| "from 0.1 to 1000000 messages a second".into())
}

pub async fn bench(asked: Bench, sources: &Sources) -> Result<()> {
    let plan = Plan::make(asked, sources).await?;
    // On the runtime's own threads, as the lanes and the sockets are: the main one would be woken across threads.
    tokio::spawn(plan.run()).await?
}

/// One thing that is measured.
struct Subject {
    who: Who,
    lanes: Lanes,
    target: Arc<dyn Target>,
    /// The process that carries, besides this one.
    carrier: Option<Process>,
}

impl Subject {
    fn one_process(&self) -> bool {
        !matches!(self.who, Who::Bridge | Who::PulsarWs)
    }
}

struct Plan {
    asked: Bench,
    ground: Option<Ground>,
    subjects: Vec<Subject>,
    workloads: Vec<Workload>,
    payload: Payload,
    rounds: u32,
    warmup: Duration,
    /// Tells this run's topics and groups from any other's.
    run: String,
    /// Rounds so far, warm-up included.
    round: u64,
    /// The topics that hold a backlog, by who filled them.
    filled: HashMap<Option<(&'static str, Lanes)>, String>,
}

impl Plan {
    async fn make(asked: Bench, sources: &Sources) -> Result<Self> {
        ensure!((PAYLOAD_MIN..=4 << 20).contains(&asked.size), "--size is from {PAYLOAD_MIN} bytes to 4 MiB");
        let who = match (asked.compare.is_empty(), asked.direct, asked.peer) {
            (false, _, _) => asked.compare.clone(),
            (true, true, _) => vec![Who::Direct],
            (true, false, Some(peer)) => vec![peer],
            (true, false, None) => vec![Who::Bridge],
        };
        let peers = who.iter().any(|who| who.is_peer());
        let lanes = match asked.lane.is_empty() {
            false => asked.lane.clone(),
            true if peers => vec![Lanes::DURABLE],
            true => vec![Lanes::EPHEMERAL, Lanes::DURABLE],
        };
        ensure!(!peers || !lanes.contains(&Lanes::EPHEMERAL), "Pulsar's own clients have no ephemeral lane");
        let is_bridge = who.iter().all(|who| *who == Who::Bridge);
        ensure!(
            is_bridge || !lanes.contains(&Lanes::Both),
            "it is the bridge that carries topics of both lanes"
        );
        let named = !asked.workloads.is_empty();
        let mut workloads = if named { asked.workloads.clone() } else { Workload::value_variants().to_vec() };
        workloads.retain(|workload| lanes.iter().any(|lanes| workload.is_on(*lanes)));
        ensure!(!workloads.is_empty(), "consume is of the durable lane alone, request of the ephemeral one");

        // The bridge knows its own settings; everything else is opened with ours.
        let own = who.iter().any(|who| *who != Who::Bridge) || asked.per_entry.is_some();
        let ground = own.then(|| ground(sources)).transpose()?;
        let mut on_pulsar = peers || ground.as_ref().is_some_and(Ground::is_on_pulsar);
        if who.contains(&Who::Bridge) {
            on_pulsar |= is_bridge_on_pulsar(asked.url.as_deref()).await?;
        }
        let mut subjects = Vec::new();
        let direct: Option<Arc<dyn Target>> = ground.clone().map(|ground| Arc::new(Direct::new(ground)) as _);
        for lanes in lanes {
            for &who in &who {
                let target: Arc<dyn Target> = match (who, &ground, &direct) {
                    (Who::Direct, _, Some(direct)) => direct.clone(),
                    (Who::PulsarWs, Some(ground), _) => {
                        Arc::new(PulsarWs { url: asked.peer_url.clone(), ground: ground.clone() })
                    }
                    (Who::PulsarCrate, Some(ground), _) => {
                        Arc::new(PulsarCrate { ground: ground.clone(), entries: Entries::Single })
                    }
                    (Who::PulsarCrateBatched, Some(ground), _) => {
                        Arc::new(PulsarCrate { ground: ground.clone(), entries: Entries::Batched })
                    }
                    (Who::PulsarCrateFolded, Some(ground), _) => {
                        Arc::new(PulsarCrate { ground: ground.clone(), entries: Entries::Folded })
                    }
                    _ => Arc::new(Bridge {
                        url: asked.url.clone().unwrap_or_else(|| DEFAULT_URL.into()),
                        lanes,
                    }),
                };
                let carrier = match who {
                    Who::Bridge => local_port(asked.url.as_deref()).and_then(Process::listening_on),
                    _ => None,
                };
                subjects.push(Subject { who, lanes, target, carrier });
            }
        }
        let rounds = asked.rounds.unwrap_or(if who.len() > 1 { 3 } else { 1 });
        let warmup = asked.warmup.unwrap_or(if on_pulsar { WARMUP_PULSAR } else { WARMUP });
        Ok(Self {
            payload: Payload::new(asked.size),
            ground,
            subjects,
            workloads,
            rounds,
            warmup,
            run: format!("{:08x}", fastrand::u32(..)),
            round: 0,
            filled: HashMap::new(),
            asked,
        })
    }

    async fn run(mut self) -> Result<()> {
        let subjects = std::mem::take(&mut self.subjects);
        let bar = ProgressBar::new(0);
        // It shows on a terminal alone.
        bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}")?);
        bar.enable_steady_tick(Duration::from_millis(200));
        let mut warmup = self.warmup;
        for workload in self.workloads.clone() {
            let subjects: Vec<_> = subjects.iter().filter(|subject| workload.is_on(subject.lanes)).collect();
            bar.set_length(bar.length().unwrap_or_default() + u64::from(self.rounds) * subjects.len() as u64);
            bar.set_message(format!("{}: warm-up for {}", workload.name(), units::show_duration(warmup)));
            let until = Instant::now() + warmup;
            while Instant::now() < until {
                for subject in &subjects {
                    self.one(workload, subject, WARMUP_ROUND.min(warmup)).await?;
                }
            }
            let mut rounds: Vec<_> = subjects.iter().map(|_| Vec::new()).collect();
            for number in 1..=self.rounds {
                for (subject, rounds) in subjects.iter().zip(&mut rounds) {
                    let (name, lanes) = (subject.who.name(), subject.lanes);
                    bar.set_message(format!("{}: round {number} of {name}, {lanes}", workload.name()));
                    rounds.push(self.one(workload, subject, self.asked.time).await?);
                    bar.inc(1);
                }
            }
            let table = self.table(workload, warmup, &subjects, rounds);
            bar.suspend(|| self.show(&table))?;
            warmup = self.warmup / LATER_WARMUP;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// One round of one load on one thing.
    async fn one(&mut self, workload: Workload, subject: &Subject, time: Duration) -> Result<Round> {
        self.round += 1;
        let done = self.load(workload, subject, time).await;
        done.with_context(|| format!("{} on {}, {} lane", workload.name(), subject.who.name(), subject.lanes))
    }

    async fn load(&mut self, workload: Workload, subject: &Subject, time: Duration) -> Result<Round> {
        let Subject { target, carrier, .. } = subject;
        let (carrier, rate, payload) = (carrier.as_ref(), self.asked.rate, self.payload.clone());
        let topic = self.topic(workload, subject);
        if let Some(ground) = &self.ground {
            let (route, _) = ground.route(&topic)?;
            ensure!(route.lane == subject.lanes, "`{topic}` takes the {} lane", route.lane);
        }
        match workload {
            Workload::Publish => {
                load::windowed(target.publisher(&topic, &payload).await?, self.asked.window, time, carrier)
                    .await
            }
            Workload::Paced => {
                load::paced(target.publisher(&topic, &payload).await?, rate, time, carrier).await
            }
            Workload::EndToEnd | Workload::FanOut => {
                let how = match workload == Workload::EndToEnd && self.asked.group {
                    true => self.member(false),
                    false => How::Plain,
                };
                let count = if workload == Workload::FanOut { self.asked.subscribers } else { 1 };
                // The publisher first: with it the topic exists, and nobody has to wait for it.
                let line = target.publisher(&topic, &payload).await?;
                let mut receivers = Vec::new();
                for _ in 0..count {
                    receivers.push(target.receiver(&topic, &how).await?);
                }
                let base = self.round * ROUND_NUMBERS % 10u64.pow(traffic::DIGITS as u32);
                load::flow(line, receivers, base, rate, time, carrier).await
            }
            Workload::Request => {
                let _responder = target.responder(&topic).await?;
                load::paced(target.requester(&topic, &payload).await?, rate, time, carrier).await
            }
            Workload::Consume => {
                let topic = self.backlog(subject).await?;
                let member = target.receiver(&topic, &self.member(true)).await?;
                load::drain(member, self.asked.backlog, carrier).await
            }
        }
    }

    fn topic(&self, workload: Workload, subject: &Subject) -> String {
        let begin = match subject.lanes {
            Lanes::One(Lane::Durable) => &self.asked.durable_topic,
            Lanes::One(Lane::Ephemeral) => &self.asked.ephemeral_topic,
            Lanes::Both => &self.asked.both_topic,
        };
        format!("{begin}.{}.{}.{}", self.run, workload.name(), subject.who.name())
    }

    /// A group of this round's own.
    fn member(&self, earliest: bool) -> How {
        let name = format!("bench-{}-{}", self.run, self.round);
        How::Group { name, earliest, prefetch: self.asked.prefetch }
    }

    /// A topic with a backlog, filled when it is first needed: every round's group begins at its beginning.
    async fn backlog(&mut self, subject: &Subject) -> Result<String> {
        let native = self.asked.per_entry.zip(self.ground.clone());
        // What a native producer wrote is the same for everybody.
        let key = if native.is_some() { None } else { Some((subject.who.name(), subject.lanes)) };
        if let Some(topic) = self.filled.get(&key) {
            return Ok(topic.clone());
        }
        let topic = self.topic(Workload::Consume, subject);
        let line = match native {
            Some((count, ground)) => {
                let entries = Entries::Of(count);
                PulsarCrate { ground, entries }.publisher(&topic, &self.payload).await?
            }
            None => subject.target.publisher(&topic, &self.payload).await?,
        };
        load::fill(line, self.asked.backlog).await.context("publishing the backlog")?;
        self.filled.insert(key, topic.clone());
        Ok(topic)
    }

    fn table(
        &self,
        workload: Workload,
        warmup: Duration,
        subjects: &[&Subject],
        rounds: Vec<Vec<Round>>,
    ) -> Table {
        let row = |(subject, rounds): (&&Subject, Vec<Round>)| Row {
            name: format!("{} {}", subject.who.name(), subject.lanes),
            target: subject.who.name(),
            lane: subject.lanes.as_str(),
            one_process: subject.one_process(),
            rounds,
        };
        let Bench { window, rate, size, prefetch, backlog, subscribers, .. } = self.asked;
        let entries = self.asked.per_entry.map_or(String::new(), |count| format!(" in entries of {count}"));
        let what = match workload {
            Workload::Publish => format!("{window} unacknowledged"),
            Workload::Paced | Workload::Request => format!("{rate}/s, from when each was to be sent"),
            Workload::EndToEnd if self.asked.group => format!("{rate}/s to a shared group"),
            Workload::EndToEnd => format!("{rate}/s to a plain subscriber"),
            Workload::Consume => format!("{backlog} messages{entries}, one ack each, prefetch {prefetch}"),
            Workload::FanOut => format!("{rate}/s to {subscribers} subscribers"),
        };
        let time = match workload {
            Workload::Consume => String::new(),
            _ => format!(" of {}", units::show_duration(self.asked.time)),
        };
        let rounds_told = match self.rounds {
            1 => format!("1 round{time}"),
            n => format!("{n} rounds{time}, median (min..max)"),
        };
        Table {
            workload: workload.name(),
            title: format!("{}, {size} B: {what}; {rounds_told}", workload.name()),
            unit: workload.unit(),
            options: self.options(workload, warmup),
            rows: subjects.iter().zip(rounds).map(row).collect(),
        }
    }

    fn options(&self, workload: Workload, warmup: Duration) -> Value {
        let mut options = json!({
            "size": self.asked.size,
            "time_s": self.asked.time.as_secs_f64(),
            "warmup_s": warmup.as_secs_f64(),
        });
        match workload {
            Workload::Publish => options["window"] = json!(self.asked.window),
            Workload::Paced | Workload::Request => options["rate"] = json!(self.asked.rate),
            Workload::EndToEnd => {
                options["rate"] = json!(self.asked.rate);
                options["group"] = json!(self.asked.group);
            }
            Workload::FanOut => {
                options["rate"] = json!(self.asked.rate);
                options["subscribers"] = json!(self.asked.subscribers);
            }
            Workload::Consume => {
                options["prefetch"] = json!(self.asked.prefetch);
                options["backlog"] = json!(self.asked.backlog);
                options["per_entry"] = json!(self.asked.per_entry);
            }
        }
        options
    }

    fn show(&self, table: &Table) -> Result<()> {
        match self.asked.json.as_deref() {
            Some("-") => println!("{}", table.json()),
            Some(file) => {
                use std::io::Write;
                table.print();
                let opened = std::fs::File::options().create(true).append(true).open(file);
                let mut lines = opened.with_context(|| format!("cannot write {file}"))?;
                writeln!(lines, "{}", table.json())?;
            }
            None => table.print(),
        }
        Ok(())
    }
}

fn ground(sources: &Sources) -> Result<Ground> {
    let settings = config::load(sources).map_err(|problems| problems::as_error(&problems))?;
    let loaded = config::load_routes(&settings).map_err(|problems| problems::as_error(&problems))?;
    Ok(Ground { settings: Arc::new(settings), policy: Policy::new(loaded.table) })
}

/// The host and port of a `ws://…` URL, and the rest's beginning.
fn authority(url: &str) -> Option<&str> {
    url.split_once("://")?.1.split('/').next()
}

/// The port of a bridge on this machine.
fn local_port(url: Option<&str>) -> Option<u16> {
    let (host, port) = authority(url.unwrap_or(DEFAULT_URL))?.rsplit_once(':')?;
    matches!(host, "127.0.0.1" | "localhost" | "[::1]").then(|| port.parse().ok())?
}

/// What the bridge itself says of its durable lane; that there is one is learned by the way.
async fn is_bridge_on_pulsar(url: Option<&str>) -> Result<bool> {
    let asked = url.unwrap_or(DEFAULT_URL);
    let Some(authority) = authority(asked) else { bail!("--url {asked} is no ws://HOST:PORT/ws") };
    let scheme = if asked.starts_with("wss:") { "https" } else { "http" };
    crate::lane::install_crypto();
    let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).no_proxy().build()?;
    let answer = client.get(format!("{scheme}://{authority}/health")).send().await;
    let health: Value = match (answer, url) {
        (Ok(answer), _) => answer.json().await.unwrap_or_default(),
        (Err(_), None) => bail!(
            "no bridge answers at {DEFAULT_URL}. Start one in another terminal with `twinspan serve`, name another \
             with --url, or measure the lanes without a bridge with --direct"
        ),
        (Err(error), Some(url)) => return Err(error).with_context(|| format!("no bridge answers at {url}")),
    };
    Ok(health["lanes"]["durable"]["backend"] == "pulsar")
}
