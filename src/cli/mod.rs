//! What people type: serve, check, explain, and a client on the terminal.

mod consume;
mod bench;
mod health;
mod live;
mod problems;
mod serve;
mod talk;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::config::{self, Sources};
use crate::message::Lane;
use crate::policy;
use crate::topic::Topic;

/// One WebSocket for NATS and Apache Pulsar: the policy decides per topic.
#[derive(Parser)]
#[command(name = "twinspan", version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    layers: Layers,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Args)]
struct Layers {
    /// A settings file; several are layered in order. Without one, config/twinspan.toml is read if it is there.
    #[arg(long = "config", value_name = "FILE", global = true)]
    files: Vec<PathBuf>,
    /// One setting, above files and environment: `--set session.ping_interval=10s`.
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the bridge.
    Serve,
    /// Read settings and routes as `serve` would, and report every error.
    Check {
        /// Ask the brokers too: whether they are there, let us in, and keep what the routes promise.
        #[arg(long)]
        live: bool,
    },
    /// Say which route a topic takes, and why.
    Explain {
        topic: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Publish a message, or each line of standard input.
    Pub(talk::Publish),
    /// Subscribe to a topic or a pattern.
    Sub(talk::Subscribe),
    /// Send a request and print the reply.
    Request(talk::Request),
    /// Answer requests.
    Reply(talk::Reply),
    /// Take part in a group: run a command for each message, or print it.
    Consume(consume::Work),
    /// Load both lanes and print rates and latencies side by side, also beside Pulsar's own clients.
    Bench(Box<bench::Bench>),
    /// Ask a running bridge how it is: exit 0 healthy, 1 degraded, 2 down or not there.
    Health {
        /// Only this lane.
        #[arg(long, value_parser = lane)]
        lane: Option<Lane>,
        /// Go on asking every two seconds until Ctrl-C.
        #[arg(long)]
        watch: bool,
    },
}

fn lane(name: &str) -> Result<Lane, String> {
    Lane::ALL.into_iter().find(|lane| lane.as_str() == name).ok_or_else(|| "ephemeral or durable".into())
}

/// Does what was typed. Errors go to standard error, in sentences.
pub async fn run(arguments: Arguments) -> ExitCode {
    let sources = Sources::new(arguments.layers.files, arguments.layers.set);
    let done = match arguments.verb {
        Verb::Serve => serve::serve(&sources).await,
        Verb::Check { live } => return check(&sources, live).await,
        Verb::Explain { topic, json } => explain(&sources, &topic, json),
        Verb::Pub(asked) => talk::publish(asked).await,
        Verb::Sub(asked) => talk::subscribe(asked).await,
        Verb::Request(asked) => talk::request(asked).await,
        Verb::Reply(asked) => talk::reply(asked).await,
        Verb::Consume(asked) => consume::consume(asked).await,
        Verb::Bench(asked) => bench::bench(*asked, &sources).await,
        Verb::Health { lane, watch } => return health::health(&sources, lane, watch).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twinspan: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn check(sources: &Sources, live: bool) -> ExitCode {
    let report = config::check(sources);
    if report.is_good() {
        println!("{report}");
        if live { live::check(report).await } else { ExitCode::SUCCESS }
    } else {
        eprintln!("{report}");
        ExitCode::FAILURE
    }
}

fn explain(sources: &Sources, topic: &str, json: bool) -> Result<()> {
    let topic = Topic::parse(topic)?;
    let settings = config::load(sources).map_err(|problems| problems::as_error(&problems))?;
    let loaded = config::load_routes(&settings).map_err(|problems| problems::as_error(&problems))?;
    let explanation = policy::explain::explain(&loaded.table, &topic, |lane| settings.of_lane(lane));
    if json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        println!("{explanation}");
    }
    Ok(())
}
