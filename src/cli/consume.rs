//! `consume`: a member of a group on the terminal, and the workers behind it.
//!
//! ```text
//! message ──▶ the command's standard input ──exit 0──▶ ack, else nack: it comes again after a wait
//!         └─▶ a line of standard output, where there is no command ──▶ ack
//! ```

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::terminal::{Signals, Target, mode, print, start};
use crate::client::{Consume, Consumed, Event, Twinspan};
use crate::message::{GroupMode, Start};

#[derive(Args)]
pub struct Work {
    #[command(flatten)]
    target: Target,
    /// A durable topic, or a pattern with `*` and `>`.
    topic: String,
    /// The group to take part in.
    #[arg(long, value_name = "NAME")]
    group: String,
    /// A shell command that is run for each message, with the payload on standard input. Exit code 0 acknowledges;
    /// anything else, and the message comes again after a wait that doubles by its attempt.
    ///
    /// It finds MESSAGE_TOPIC, MESSAGE_ID, MESSAGE_KEY, MESSAGE_ATTEMPT and MESSAGE_POSITION in its environment.
    /// Without a command each message is printed as a line of JSON, and acknowledged by that.
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// How many commands may run at once. Messages of one key are handled in their order.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// How the members share: shared, key_shared, failover or exclusive.
    #[arg(long, default_value = "shared", value_parser = mode)]
    mode: GroupMode,
    /// Only the messages that this expression over topic, key, headers and payload holds for.
    #[arg(long, value_name = "EXPRESSION")]
    filter: Option<String>,
    /// How many messages may be taken and not acknowledged. Default: two for each command that may run.
    #[arg(long, value_name = "N")]
    prefetch: Option<u32>,
    /// Where a new group begins: `earliest`, `latest`, an RFC 3339 time, or after a position.
    #[arg(long, default_value = "latest", value_parser = start)]
    from: Start,
}

pub async fn consume(asked: Work) -> Result<()> {
    let twinspan = asked.target.connect().await?;
    let options = Consume {
        group: asked.group,
        mode: asked.mode,
        filter: asked.filter,
        concurrency: asked.concurrency.into(),
        prefetch: asked.prefetch,
        from: asked.from,
        ..Consume::default()
    };
    eprintln!(
        "Consuming {} as a member of {}. Ctrl-C finishes what runs, and ends.",
        asked.topic, options.group
    );
    let consumed = match asked.exec {
        Some(command) => {
            let command: Arc<str> = command.into();
            let handler = move |event| run(command.clone(), event);
            until_signalled(&twinspan, &asked.topic, options, CancellationToken::new(), handler).await?
        }
        None => {
            printing(&twinspan, &asked.topic, options, u64::MAX, |event| event.heard.frame.clone()).await?
        }
    };
    eprintln!(
        "{} handled, {} failed, {} of those handled without confirmation.",
        consumed.handled, consumed.failed, consumed.unconfirmed
    );
    Ok(())
}

/// Prints so many messages, each acknowledged once it is written.
pub async fn printing(
    twinspan: &Twinspan,
    topic: &str,
    options: Consume,
    count: u64,
    line: impl Fn(&Event) -> String + Send + Sync + 'static,
) -> Result<Consumed> {
    let (stop, left, broken) =
        (CancellationToken::new(), Arc::new(Mutex::new(count)), Arc::new(Mutex::new(None)));
    let handler = {
        let (stop, broken) = (stop.clone(), broken.clone());
        move |event: Event| {
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            let printed = match *left {
                0 => Err("enough were printed"),
                _ => print(format_args!("{}", line(&event))).map_err(|error| {
                    *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    "it could not be printed"
                }),
            };
            *left = left.saturating_sub(1);
            if *left == 0 || printed.is_err() {
                stop.cancel();
            }
            std::future::ready(printed)
        }
    };
    let consumed = until_signalled(twinspan, topic, options, stop, handler).await?;
    match broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error),
        None => Ok(consumed),
    }
}

async fn until_signalled<H, F, E>(
    twinspan: &Twinspan,
    topic: &str,
    options: Consume,
    stop: CancellationToken,
    handler: H,
) -> Result<Consumed>
where
    H: Fn(Event) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: std::fmt::Display,
{
    let mut signals = Signals::new()?;
    let consuming = twinspan.consume(topic, options, stop.clone(), handler);
    tokio::pin!(consuming);
    tokio::select! {
        consumed = &mut consuming => return Ok(consumed?),
        () = signals.next() => stop.cancel(),
    }
    tokio::select! {
        consumed = consuming => Ok(consumed?),
        () = signals.next() => bail!("ended at once by a second signal; what was not acknowledged comes again"),
    }
}

async fn run(command: Arc<str>, event: Event) -> Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-c", &command]).stdin(Stdio::piped()).kill_on_drop(true);
    // Ctrl-C is for this program, which waits for the command.
    shell.process_group(0);
    let variables = [
        ("MESSAGE_TOPIC", Some(event.topic())),
        ("MESSAGE_ID", event.id()),
        ("MESSAGE_KEY", event.key()),
        ("MESSAGE_ATTEMPT", Some(&*event.attempt().to_string())),
        ("MESSAGE_POSITION", event.position()),
    ];
    for (name, value) in variables {
        match value {
            Some(value) => shell.env(name, value),
            // Not that of whoever started this program.
            None => shell.env_remove(name),
        };
    }
    let mut child = shell.spawn().context("cannot run a shell")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input has its reasons.
        let _ = stdin.write_all(&event.payload).await;
    }
    match child.wait().await?.code() {
        Some(0) => Ok(()),
        Some(code) => bail!("the command ended with exit code {code}"),
        None => bail!("the command was killed by a signal"),
    }
}
