//! A client on the terminal: pub, sub, request, reply.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::client::{Client, ClientError, Sender};
use crate::message::Draft;
use crate::wire::json::heard::Heard;

/// How many lines of `pub TOPIC -` may be unacknowledged.
const UNACKNOWLEDGED_MAX: usize = 512;

#[derive(Args)]
pub struct Target {
    /// The bridge to talk to.
    #[arg(long, default_value = "ws://127.0.0.1:8090/ws")]
    url: String,
}

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
    #[arg(long)]
    from: Option<String>,
    /// Take part in a group; each message is acknowledged once it is printed.
    #[arg(long)]
    group: Option<String>,
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
    let client = Client::connect(&asked.target.url).await?;
    let mut headers = std::collections::BTreeMap::new();
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
    if asked.payload != "-" {
        let ack = client.publish(&asked.topic, &draft(asked.payload.clone())).await?;
        return acknowledged(&ack);
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut under_way: JoinSet<Result<Heard, ClientError>> = JoinSet::new();
    while let Some(line) = lines.next_line().await.context("reading standard input")? {
        if under_way.len() >= UNACKNOWLEDGED_MAX
            && let Some(ack) = under_way.join_next().await
        {
            acknowledged(&ack??)?;
        }
        under_way.spawn(client.publish_in_line(&asked.topic, &draft(line)).await?);
    }
    while let Some(ack) = under_way.join_next().await {
        acknowledged(&ack??)?;
    }
    Ok(())
}

fn acknowledged(ack: &Heard) -> Result<()> {
    let id = ack.message_id.as_deref().unwrap_or("-");
    match &ack.position {
        Some(position) => print(format_args!("stored {id} at {position}")),
        None => print(format_args!("sent {id}")),
    }
}

pub async fn subscribe(asked: Subscribe) -> Result<()> {
    let mut client = Client::connect(&asked.target.url).await?;
    let from = asked.from.as_deref().map(start);
    let options = json!({ "last_n": asked.last, "from": from, "group": asked.group });
    let ack = client.subscribe(&asked.pattern, options).await?;
    let lane = ack.lane.as_deref().unwrap_or("both lanes");
    eprintln!("Subscribed to {} ({lane}). Ctrl-C ends.", asked.pattern);
    let mut left = asked.count.unwrap_or(u64::MAX);
    while left > 0 {
        let heard = client.next().await?;
        match heard.kind.as_str() {
            "event" => {
                left -= 1;
                show(&heard, asked.json)?;
                if let Some(delivery) = heard.delivery {
                    client.ack(&[delivery]).await?;
                }
            }
            "gap" => {
                let dropped = heard.dropped.map_or("an unknown number of".into(), |n| n.to_string());
                eprintln!("-- gap: {dropped} events ({})", heard.reason.as_deref().unwrap_or("?"));
            }
            "info" => eprintln!("-- {}", heard.code.as_deref().unwrap_or("?")),
            "error" => bail!("{}", refused(&heard)),
            _ => {}
        }
    }
    Ok(())
}

fn start(from: &str) -> Value {
    match from {
        "earliest" | "latest" => json!(from),
        time if time.contains('T') => json!({ "time": time }),
        position => json!({ "position": position }),
    }
}

fn show(heard: &Heard, whole: bool) -> Result<()> {
    let topic = heard.topic.as_deref().unwrap_or("?");
    if whole {
        return print(format_args!("{}", heard.frame));
    }
    let payload = heard.payload().unwrap_or_default();
    print(format_args!("{topic} {}", String::from_utf8_lossy(&payload)))
}

pub async fn request(asked: Request) -> Result<()> {
    let client = Client::connect(&asked.target.url).await?;
    let draft = Draft { payload: Bytes::from(asked.payload), ..Draft::default() };
    let reply = client.request(&asked.topic, &draft, Duration::from_millis(asked.timeout_ms)).await?;
    print(format_args!("{}", String::from_utf8_lossy(&reply.payload().unwrap_or_default())))
}

pub async fn reply(asked: Reply) -> Result<()> {
    let mut client = Client::connect(&asked.target.url).await?;
    client.subscribe(&asked.pattern, json!({ "group": asked.group })).await?;
    eprintln!("Answering {}. Ctrl-C ends.", asked.pattern);
    loop {
        let heard = client.next().await?;
        match (heard.kind.as_str(), &heard.reply_to) {
            ("event", Some(reply_to)) => {
                show(&heard, false)?;
                let (sender, reply_to) = (client.sender(), reply_to.clone());
                let payload = heard.payload().unwrap_or_default();
                match (&asked.exec, &asked.payload) {
                    (Some(command), _) => {
                        let command = command.clone();
                        tokio::spawn(async move {
                            if let Err(error) = answer_by(&command, payload, &sender, &reply_to).await {
                                eprintln!("-- not answered: {error:#}");
                            }
                        });
                    }
                    (None, answer) => {
                        let payload = Bytes::from(answer.clone().unwrap_or_default());
                        sender.reply(&reply_to, &Draft { payload, ..Draft::default() }).await?;
                    }
                }
            }
            ("error", _) => eprintln!("-- {}", refused(&heard)),
            _ => {}
        }
    }
}

async fn answer_by(command: &str, request: Vec<u8>, sender: &Sender, reply_to: &str) -> Result<()> {
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

fn refused(heard: &Heard) -> String {
    heard
        .error
        .as_ref()
        .map_or("an error without a word".into(), |error| format!("{}: {}", error.code, error.message))
}

/// Prints a line; a reader that has gone (`| head`) ends the command without a panic.
fn print(line: std::fmt::Arguments<'_>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("writing to standard output")
}
