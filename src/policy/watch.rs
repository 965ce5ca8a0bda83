//! Tells when a file may have changed, by watching the directory it is in.
//!
//! A watch on the file itself is lost with the first editor that renames a new file over it. Events of the directory
//! cover writing in place, renaming, and the symbolic links that Kubernetes swaps beside the file (the file's own
//! entry does not change then, so events are not filtered by name: whoever listens compares the content).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::warn;

/// A write in place is several events: the file is looked at once it has been quiet for so long.
const QUIET: Duration = Duration::from_millis(150);
/// In a directory that is never quiet it is looked at all the same, after so many rounds of `QUIET`.
const QUIET_ROUNDS_MAX: usize = 8;
/// Watches are lost without a word (the directory replaced, a network file system), so the file is looked at besides.
pub const LOOK_EVERY: Duration = Duration::from_secs(30);

pub struct Watch {
    event: Arc<Notify>,
    /// Dropped, it ends the watch. `None` where the system gave none.
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    pub fn new(file: &Path) -> Self {
        let event = Arc::new(Notify::new());
        let watcher = watcher(file, event.clone());
        if let Err(error) = &watcher {
            warn!(
                file = %file.display(), %error,
                "The directory of the routes file cannot be watched: changes are noticed every {LOOK_EVERY:?} instead."
            );
        }
        Self { event, _watcher: watcher.ok() }
    }

    /// Returns when the file may have changed, or was not looked at for `LOOK_EVERY`. Cancel safe.
    pub async fn changed(&self) {
        if timeout(LOOK_EVERY, self.event.notified()).await.is_err() {
            return;
        }
        for _ in 0..QUIET_ROUNDS_MAX {
            if timeout(QUIET, self.event.notified()).await.is_err() {
                return;
            }
        }
    }
}

fn watcher(file: &Path, event: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut watcher = notify::recommended_watcher(move |told: notify::Result<notify::Event>| {
        // Reading the file is an event as well, and would go round for ever. An error may hide a change.
        if told.is_err() || told.is_ok_and(|event| is_change(event.kind)) {
            event.notify_one();
        }
    })?;
    watcher.watch(directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

fn is_change(kind: EventKind) -> bool {
    !kind.is_access() || kind == EventKind::Access(AccessKind::Close(AccessMode::Write))
}
