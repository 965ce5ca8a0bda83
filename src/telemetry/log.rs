//! What is logged, and how it looks: one line for each event, whatever is in it.
//!
//! Topics, headers and the words of a broker reach the log, and anyone may have written them. A line break in one of
//! them would forge a line of ours, and an escape sequence would speak to the terminal of whoever reads it. So every
//! character that does anything but stand there is written as its number, in both formats by the same `Escaped`.
//! What is logged says what became of a message, never what is in it.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::{self, Write};
use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing::{Dispatch, Event, Level, Subscriber, enabled, error};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, JsonFields, Writer, format};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::origin::nearest;

/// Who knows other programs of this kind looks here first: where it is set, it is the filter.
pub const VARIABLE: &str = "RUST_LOG";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    pub format: LogFormat,
    pub filter: LogFilter,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people: coloured on a terminal.
    #[default]
    Pretty,
    /// For programs: an object for each line.
    Json,
}

/// Levels by target, as `RUST_LOG` has them. One that exists can be read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogFilter(String);

impl Default for LogFilter {
    /// The brokers' clients tell every reconnect and every dropped message; the lanes say the same once, in sentences.
    fn default() -> Self {
        Self("info,async_nats=warn,pulsar=error".into())
    }
}

impl TryFrom<String> for LogFilter {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // A word alone is a target, too: a misspelt level would silence everything without a word.
        for word in text.split(',').map(str::trim) {
            if !LEVELS.contains(&word.to_lowercase().as_str())
                && let Some(meant) = nearest(word, LEVELS)
            {
                return Err(format!("{word:?} is no level; did you mean {meant:?}?"));
            }
        }
        match EnvFilter::builder().parse(&text) {
            Ok(_) => Ok(Self(text)),
            Err(error) => Err(format!(
                "{text:?} is no filter ({error}): write a level, and target=level for what differs, such as {:?}",
                Self::default().0
            )),
        }
    }
}

impl From<LogFilter> for String {
    fn from(filter: LogFilter) -> Self {
        filter.0
    }
}

impl LogSettings {
    /// The defaults and `RUST_LOG`, for commands that read no settings.
    pub fn of_environment() -> Result<Self, String> {
        let said = std::env::var(VARIABLE).unwrap_or_default();
        match said.is_empty() {
            true => Ok(Self::default()),
            false => match said.try_into() {
                Ok(filter) => Ok(Self { filter, ..Self::default() }),
                Err(why) => Err(format!("{VARIABLE}: {why}")),
            },
        }
    }
}

/// From now on this process logs to standard error, its panics too. A second call changes nothing.
pub fn to_stderr(settings: &LogSettings) {
    if dispatch(settings, std::io::stderr, std::io::stderr().is_terminal()).try_init().is_ok() {
        log_panics();
    }
}

/// What writes events as the settings say.
pub fn dispatch<W>(settings: &LogSettings, to: W, is_terminal: bool) -> Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // It was parsed before; what it cannot read now it leaves out.
    let filter = EnvFilter::builder().parse_lossy(&settings.filter.0);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_terminal).with_writer(to);
    match settings.format {
        LogFormat::Pretty => log.fmt_fields(PlainFields).into(),
        LogFormat::Json => {
            let format = format().json().flatten_event(true).with_span_list(false);
            log.event_format(PlainLine(format)).fmt_fields(JsonFields::new()).into()
        }
    }
}

/// A panic is an event like any other: its words may come from outside, and it is one line.
fn log_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // Whoever filters us out wants to know of this all the same.
        if !enabled!(Level::ERROR) {
            return default(panic);
        }
        let place = panic.location().map(ToString::to_string);
        let why = panic.payload_as_str().unwrap_or("it gave no reason");
        let backtrace = Backtrace::capture();
        let backtrace =
            (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(&backtrace));
        error!(place, why, backtrace, "A task panicked.");
    }));
}

/// The fields of an event or a span as text: what is in them is escaped, and what colours the rest of the line is not.
struct PlainFields;

impl<'a> FormatFields<'a> for PlainFields {
    fn format_fields<R: RecordFields>(&self, mut to: Writer<'a>, fields: R) -> fmt::Result {
        let mut text = String::new();
        DefaultFields::new().format_fields(Writer::new(&mut text), fields)?;
        write!(to, "{}", Escaped(&text))
    }
}

/// An event as JSON. serde_json escapes what JSON demands, which leaves what only terminals and editors act upon.
struct PlainLine<F>(F);

impl<S, N, F> FormatEvent<S, N> for PlainLine<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        writeln!(to, "{}", Escaped(line.trim_end()))
    }
}

/// A text on one line, with nothing in it that acts upon a terminal, an editor or what reads line by line. The escapes
/// are those of JSON, where such a character stands inside of strings alone.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\n' => f.write_str("\\n"),
            c if acts(c) => write!(f, "\\u{:04x}", u32::from(c)),
            c => f.write_char(c),
        })
    }
}

/// C0, DEL and C1; the line and paragraph separators; and what turns the direction of the text around it.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
