//! A client on the terminal: pub, sub, request, reply.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use super::consume::printing;
use super::terminal::{Target, mode, print, start};
use crate::client::{Consume, Event, Incoming, Published, Sender, Status, Subscribe as Subscribed};
use crate::message::{Draft, GroupMode, Start};

/// How many lines of `pub TOPIC -` may be unacknowledged.
const UNACKNOWLEDGED_MAX: usize = 512;

#[derive(Args)]
pub struct Publish {
    #[command(flatten)]
    target: Target,
    topic: String,
    /// The payload as it is to be published; `-` publishes each line of standard input.
    payload: String,
    /// Orders messages, and picks the member of a key-shared group.
    #[arg(long)]
    key: Option<String>,
    /// A header, `name=value`; may be given several times.
    #[arg(long = "header", value_name = "NAME=VALUE")]
    headers: Vec<String>,
}

#[derive(Args)]
pub struct Subscribe {
    #[command(flatten)]
    target: Target,
    /// A topic, or a pattern with `*` and `>`.
    pattern: String,
    /// Begin with the newest N of each topic.
    #[arg(long, value_name = "N", conflicts_with = "from")]
    last: Option<u32>,
    /// Begin at `earliest`, an RFC 3339 time, or after a position.
    #[arg(long, value_parser = start)]
    from: Option<Start>,
    /// Only the events that this expression over topic, key, headers and payload holds for.
    #[arg(long, value_name = "EXPRESSION")]
    filter: Option<String>,
    /// Take part in a group; each message is acknowledged once it is printed.
    #[arg(long, conflicts_with = "last")]
    group: Option<String>,
    /// How the group's members share: shared, key_shared, failover or exclusive.
    #[arg(long, requires = "group", value_parser = mode)]
    mode: Option<GroupMode>,
    /// End after so many events.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Print whole frames instead of topic and payload.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Request {
    #[command(flatten)]
    target: Target,
    topic: String,
    payload: String,
    /// How long to wait, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
}

#[derive(Args)]
pub struct Reply {
    #[command(flatten)]
    target: Target,
    /// The requests to answer: a topic, or a pattern.
    pattern: String,
    /// The answer to every request.
    #[arg(required_unless_present = "exec")]
    payload: Option<String>,
    /// A shell command that gets the request on standard input and whose output is the answer.
    #[arg(long, value_name = "COMMAND", conflicts_with = "payload")]
    exec: Option<String>,
    /// Share the requests with the other members of a group.
    #[arg(long)]
    group: Option<String>,
}

pub async fn publish(asked: Publish) -> Result<()> {
    let mut headers = BTreeMap::new();
    for header in &asked.headers {
        let Some((name, value)) = header.split_once('=') else {
            bail!("--header {header}: write NAME=VALUE")
        };
        headers.insert(name.to_owned(), value.to_owned());
    }
    let draft = |payload: String| Draft {
        payload: Bytes::from(payload),
        key: asked.key.clone(),
        headers: headers.clone(),
        ..Draft::default()
    };
    let twinspan = asked.target.connect().await?;
    if asked.payload != "-" {
        return acknowledged(&twinspan.send(&asked.topic, draft(asked.payload.clone())).await?);
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut under_way = FuturesUnordered::new();
    let (mut is_open, mut read, mut failed) = (true, 0_u64, 0_u64);
    while is_open || !under_way.is_empty() {
        tokio::select! {
            line = lines.next_line(), if is_open && under_way.len() < UNACKNOWLEDGED_MAX => {
                let Some(line) = line.context("reading standard input")? else {
                    is_open = false;
                    continue;
                };
                read += 1;
                let (number, placed) = (read, twinspan.send_in_line(&asked.topic, draft(line)).await);
                under_way.push(async move {
                    match placed {
                        Ok(published) => (number, published.await),
                        Err(error) => (number, Err(error)),
                    }
                });
            }
            Some((number, published)) = under_way.next(), if !under_way.is_empty() => match published {
                Ok(published) => acknowledged(&published)?,
                Err(error) => {
                    failed += 1;
                    eprintln!("-- line {number}: {error}");
                }
            },
        }
    }
    eprintln!("{} acknowledged, {failed} failed.", read - failed);
    if failed > 0 { bail!("{failed} of {read} lines were not acknowledged") } else { Ok(()) }
}

fn acknowledged(published: &Published) -> Result<()> {
    let id = published.id;
    match (published.status, &published.position) {
        (Status::Spooled, _) => print(format_args!("spooled {id}")),
        (_, Some(position)) => print(format_args!("stored {id} at {position}")),
        (Status::Duplicate, None) => print(format_args!("stored {id} before")),
        (Status::Ok, None) => print(format_args!("sent {id}")),
    }
}

pub async fn subscribe(asked: Subscribe) -> Result<()> {
    let twinspan = asked.target.connect().await?;
    let from = asked.last.map(Start::Last).or(asked.from).unwrap_or_default();
    let count = asked.count.unwrap_or(u64::MAX);
    let whole = asked.json;
    if let Some(group) = asked.group {
        eprintln!("Subscribed to {} as a member of {group}. Ctrl-C ends.", asked.pattern);
        let mode = asked.mode.unwrap_or_default();
        let options = Consume { group, mode, filter: asked.filter, from, ..Consume::default() };
        printing(&twinspan, &asked.pattern, options, count, move |event| shown(event, whole)).await?;
        return Ok(());
    }
    let options = Subscribed { from, filter: asked.filter, group: None };
    let mut subscription = twinspan.subscribe(&asked.pattern, options).await?;
    let lane = subscription.lane().unwrap_or("both lanes");
    eprintln!("Subscribed to {} ({lane}). Ctrl-C ends.", asked.pattern);
    let mut left = count;
    while left > 0 {
        match subscription.next().await? {
            Incoming::Event(event) => {
                left -= 1;
                print(format_args!("{}", shown(&event, whole)))?;
            }
            Incoming::Gap { dropped, reason, .. } => {
                let dropped = dropped.map_or("an unknown number of".into(), |n| n.to_string());
                eprintln!("-- gap: {dropped} events ({reason})");
            }
            Incoming::Info(info) => eprintln!("-- {}", info.code.as_deref().unwrap_or("?")),
            Incoming::Error(error) => eprintln!("-- {}: {}", error.code, error.message),
        }
    }
    Ok(())
}

fn shown(event: &Event, whole: bool) -> String {
    match whole {
        true => event.heard.frame.clone(),
        false => format!("{} {}", event.topic(), String::from_utf8_lossy(&event.payload)),
    }
}

pub async fn request(asked: Request) -> Result<()> {
    let twinspan = asked.target.connect().await?;
    let timeout = Duration::from_millis(asked.timeout_ms);
    let reply = twinspan.request(&asked.topic, asked.payload, timeout).await?;
    print(format_args!("{}", String::from_utf8_lossy(&reply.payload)))
}

pub async fn reply(asked: Reply) -> Result<()> {
    let twinspan = asked.target.connect().await?;
    let options = Subscribed { group: asked.group, ..Subscribed::default() };
    let mut subscription = twinspan.subscribe(&asked.pattern, options).await?;
    eprintln!("Answering {}. Ctrl-C ends.", asked.pattern);
    loop {
        match subscription.next().await? {
            Incoming::Event(event) => {
                let (Some(reply_to), Some(sender)) = (event.heard.reply_to.clone(), subscription.sender())
                else {
                    continue;
                };
                print(format_args!("{}", shown(&event, false)))?;
                let (command, answer) = (asked.exec.clone(), asked.payload.clone());
                tokio::spawn(async move {
                    let answered = match command {
                        Some(command) => answer_by(&command, event.payload, &sender, &reply_to).await,
                        None => {
                            let payload = Bytes::from(answer.unwrap_or_default());
                            let reply = Draft { payload, ..Draft::default() };
                            sender.reply(&reply_to, &reply).await.map_err(Into::into)
                        }
                    };
                    if let Err(error) = answered {
                        eprintln!("-- not answered: {error:#}");
                    }
                });
            }
            Incoming::Error(error) => eprintln!("-- {}: {}", error.code, error.message),
            Incoming::Gap { .. } | Incoming::Info(_) => {}
        }
    }
}

async fn answer_by(command: &str, request: Bytes, sender: &Sender, reply_to: &str) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot run a shell")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input has its reasons.
        let _ = stdin.write_all(&request).await;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        bail!("the command ended with {}", output.status);
    }
    Ok(sender.reply(reply_to, &Draft { payload: output.stdout.into(), ..Draft::default() }).await?)
}
