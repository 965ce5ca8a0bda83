//! The table in force, and how another comes into force.
//!
//! ```text
//! file changed ─┐
//! SIGHUP ───────┼─▶ Reloader ──read, check──▶ good: Policy ──▶ everyone, with the next message
//! POST /reload ─┘                             bad:  the table before it stays; last_reload() says why
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch as latest;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub mod explain;
pub mod naming;
pub mod options;
pub mod schema;
pub mod source;
pub mod table;
pub mod watch;

use crate::message::Timestamp;
use crate::origin::{Origin, Problem};
use crate::telemetry::metrics::Metrics;
use table::RouteTable;
use watch::Watch;

/// A file of a thousand mistakes is told by its first ones; `check` shows all.
const PROBLEMS_KEPT_MAX: usize = 20;

/// The routes in force, for everyone who asks; replaced as a whole by a reload. Cheap to clone.
#[derive(Clone)]
pub struct Policy {
    table: Arc<ArcSwap<RouteTable>>,
    generation: Arc<latest::Sender<u64>>,
}

impl Policy {
    pub fn new(table: RouteTable) -> Self {
        Self { table: Arc::new(ArcSwap::from_pointee(table)), generation: Arc::new(latest::Sender::new(0)) }
    }

    /// The table in force now. Hold it for one decision, not for longer.
    pub fn table(&self) -> Arc<RouteTable> {
        self.table.load_full()
    }

    /// Puts a new table in force: it applies to the next message.
    pub fn replace(&self, table: RouteTable) {
        let before = self.table.swap(Arc::new(table));
        // Where only lines moved in the file, nobody has to look at the routes again.
        if before.routes() != self.table.load().routes() {
            self.generation.send_modify(|n| *n += 1);
        }
    }

    /// Changes whenever other routes come into force.
    pub fn changes(&self) -> latest::Receiver<u64> {
        self.generation.subscribe()
    }
}

/// A routes file that was read, and the table that it says.
#[derive(Debug)]
pub struct Loaded {
    pub table: RouteTable,
    texts: Texts,
}

/// What was read for a table, the routes file and those it names; `None`: that one could not be read.
#[derive(Debug, Default)]
struct Texts(BTreeMap<PathBuf, Option<String>>);

impl Texts {
    /// Whether reading all of it again would give the same.
    fn are_current(&self) -> bool {
        self.0.iter().all(|(path, text)| std::fs::read_to_string(path).ok() == *text)
    }
}

/// Reads a routes file, and reports everything that is wrong in it.
pub fn load(path: &Path) -> Result<Loaded, Vec<Problem>> {
    let (table, texts) = read(path);
    Ok(Loaded { table: table?, texts })
}

fn read(path: &Path) -> (Result<RouteTable, Vec<Problem>>, Texts) {
    let texts = RefCell::new(Texts::default());
    let open = |path: &Path| {
        let text = std::fs::read_to_string(path);
        texts.borrow_mut().0.insert(path.to_owned(), text.as_ref().ok().cloned());
        text
    };
    let table = open(path)
        .map_err(|error| unreadable(path, &error))
        .and_then(|text| source::read(path, &text, &open));
    (table, texts.into_inner())
}

fn unreadable(path: &Path, error: &std::io::Error) -> Vec<Problem> {
    let message = format!(
        "cannot read the routes file {}: {error}. It says which topic takes which lane: write it, or name \
         another with --set server.routes=FILE",
        path.display()
    );
    vec![Problem::new(Origin::Default, message)]
}

/// Reads the routes file again, whoever asks, and puts it in force if it is good. Cheap to clone.
#[derive(Clone)]
pub struct Reloader(Arc<Inner>);

struct Inner {
    path: PathBuf,
    policy: Policy,
    metrics: Arc<Metrics>,
    /// What the last try read, good or bad. Held through a whole reload, so that of two the later read is the later in
    /// force.
    tried: Mutex<Texts>,
    last: latest::Sender<LastReload>,
}

/// How the last reload went; starting counts as the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastReload {
    pub at: Timestamp,
    pub ok: bool,
    /// What it changed, where it took effect.
    pub changes: Summary,
    /// What was wrong. The routes in force are those before it.
    pub problems: Vec<String>,
}

/// What a reload changed, by the names of the routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    pub routes: usize,
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
}

impl Reloader {
    /// Puts in force what was loaded at the start.
    pub fn new(path: PathBuf, loaded: Loaded, metrics: Arc<Metrics>) -> Self {
        metrics.reloaded(true);
        let changes = Summary { routes: loaded.table.routes().len(), ..Summary::default() };
        let last = LastReload { at: Timestamp::now(), ok: true, changes, problems: Vec::new() };
        let (tried, last) = (Mutex::new(loaded.texts), latest::Sender::new(last));
        Self(Arc::new(Inner { path, policy: Policy::new(loaded.table), metrics, tried, last }))
    }

    pub fn policy(&self) -> &Policy {
        &self.0.policy
    }

    /// Reads the file now. If anything is wrong in it, nothing changes. Reads a file, so it may block.
    pub fn reload(&self) -> Result<Summary, Vec<Problem>> {
        self.read_again(&mut self.lock())
    }

    pub fn last_reload(&self) -> LastReload {
        self.0.last.borrow().clone()
    }

    /// How the last reload went, and each that follows.
    pub fn reloads(&self) -> latest::Receiver<LastReload> {
        self.0.last.subscribe()
    }

    /// Reloads whenever the content of the file, or of one that it names, has changed, until `stop`.
    pub async fn watch(self, stop: CancellationToken) {
        let mut watch = Watch::default();
        loop {
            let reloader = self.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || reloader.look()).await {
                error!(%error, "Looking at the routes file broke off; the routes stay as they are.");
            }
            let files: Vec<_> = self.lock().0.keys().cloned().collect();
            if watch.directories_of(&files) {
                // A look for what changed before the watch was there.
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = watch.changed() => {}
            }
        }
    }

    fn look(&self) {
        let mut tried = self.lock();
        if !tried.are_current() {
            // What came of it is in the log and in `last_reload`; there is nobody else to tell.
            let _ = self.read_again(&mut tried);
        }
    }

    fn read_again(&self, tried: &mut Texts) -> Result<Summary, Vec<Problem>> {
        let file = self.0.path.display();
        let (read, texts) = read(&self.0.path);
        *tried = texts;
        self.0.metrics.reloaded(read.is_ok());
        let problems = read.as_ref().err().map_or(&[][..], Vec::as_slice);
        let mut told: Vec<_> = problems.iter().take(PROBLEMS_KEPT_MAX).map(Problem::to_string).collect();
        if problems.len() > PROBLEMS_KEPT_MAX {
            told.push(format!("and {} more: `twinspan check` shows all", problems.len() - PROBLEMS_KEPT_MAX));
        }
        for problem in &told {
            warn!("{problem}");
        }
        let told = |ok, changes| LastReload { at: Timestamp::now(), ok, changes, problems: told };
        match read {
            Ok(table) => {
                let summary = Summary::of(&self.0.policy.table(), &table);
                self.0.policy.replace(table);
                self.0.last.send_replace(told(true, summary.clone()));
                match summary.is_unchanged() {
                    true => debug!(%file, "The routes are as they were."),
                    false => info!(%file, "New routes in force: {summary}."),
                }
                Ok(summary)
            }
            Err(problems) => {
                self.0.last.send_replace(told(false, Summary::default()));
                warn!(%file, problems = problems.len(), "The routes file is not usable; the routes before it stay in force.");
                Err(problems)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Texts> {
        // It is replaced by one statement, so a panic elsewhere spoils nothing.
        self.0.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Summary {
    fn of(before: &RouteTable, after: &RouteTable) -> Self {
        let mut summary = Summary { routes: after.routes().len(), ..Summary::default() };
        for route in after.routes() {
            let name = route.name.to_string();
            match before.routes().iter().find(|old| old.pattern == route.pattern) {
                None => summary.added.push(name),
                Some(old) if old != route => summary.changed.push(name),
                Some(_) => {}
            }
        }
        let gone = |old: &&Arc<table::Route>| !after.routes().iter().any(|new| new.pattern == old.pattern);
        summary.removed = before.routes().iter().filter(gone).map(|old| old.name.to_string()).collect();
        summary
    }

    pub fn is_unchanged(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} routes", self.routes)?;
        for (what, names) in [("added", &self.added), ("changed", &self.changed), ("removed", &self.removed)]
        {
            if !names.is_empty() {
                write!(f, ", {what} {}", names.join(" "))?;
            }
        }
        if self.is_unchanged() { f.write_str(", none changed") } else { Ok(()) }
    }
}
