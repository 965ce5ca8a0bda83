//! Tells when one of some files may have changed, by watching the directories they are in.
//!
//! A watch on the file itself is lost with the first editor that renames a new file over it. Events of the directory
//! cover writing in place, renaming, and the symbolic links that Kubernetes swaps beside the file (the file's own
//! entry does not change then, so events are not filtered by name: whoever listens compares the content).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
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
    watched: HashSet<PathBuf>,
    /// Dropped, it ends the watch. `None` where the system gave none.
    watcher: Option<RecommendedWatcher>,
}

impl Default for Watch {
    /// Watches nothing yet.
    fn default() -> Self {
        let event = Arc::new(Notify::new());
        let told = event.clone();
        let watcher = notify::recommended_watcher(move |told_of: notify::Result<notify::Event>| {
            // Reading the file is an event as well, and would go round for ever. An error may hide a change.
            if told_of.is_err() || told_of.is_ok_and(|event| is_change(event.kind)) {
                told.notify_one();
            }
        });
        if let Err(error) = &watcher {
            warn!(%error, "Files cannot be watched: changes are noticed every {LOOK_EVERY:?} instead.");
        }
        Self { event, watched: HashSet::new(), watcher: watcher.ok() }
    }
}

impl Watch {
    /// Watches the directories of these files as well. `true`: some of them are new.
    pub fn directories_of(&mut self, files: &[PathBuf]) -> bool {
        let before = self.watched.len();
        for file in files {
            let directory = match file.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            let Some(watcher) = &mut self.watcher else { continue };
            if !self.watched.insert(directory.to_owned()) {
                continue;
            }
            if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
                warn!(
                    file = %file.display(), %error,
                    "The directory of this file cannot be watched: changes are noticed every {LOOK_EVERY:?} instead."
                );
            }
        }
        self.watched.len() > before
    }

    /// Returns when one of the files may have changed, or they were not looked at for `LOOK_EVERY`. Cancel safe.
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

fn is_change(kind: EventKind) -> bool {
    !kind.is_access() || kind == EventKind::Access(AccessKind::Close(AccessMode::Write))
}
