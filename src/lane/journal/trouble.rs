//! What the writer does when storage fails, and how it finds its way back without a restart.
//!
//! redb refuses every write, and every read, after the first I/O error until it is opened again. Then the log itself
//! says whether the commit that failed is in it. That it is in it proves nothing about the disk, since an fsync may
//! have failed: such a commit stays unknown. That it is not is certain for good, because redb names a commit in its
//! head after everything else of it has reached the disk.

use redb::TableDefinition;
use tracing::{error, info, warn};

use super::load::load;
use super::log::Command;
use super::store::{Failure, FailureKind};
use super::writer::Writer;
use crate::lane::contract::{LaneError, LaneState};

/// How much room a full disk must have beyond what did not fit before the log is up again: else it would go up and
/// down with every message that just fits or just does not.
const SPARE_BYTES: usize = 1 << 20;
/// In rows of a page or so, as messages come: what retention frees inside the file is not in one piece.
static TRIAL_ROW: [u8; 3500] = [0; 3500];
const ROOM: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("room");

/// Why nothing can be stored now.
pub struct Trouble {
    pub failure: Failure,
    /// The room that was missing.
    bytes: usize,
    /// The store could not be opened again.
    unopened: bool,
}

impl Writer {
    /// A transaction failed, or may have: finds out which, answers whoever waits for it, and tries to go on.
    pub(super) fn fail(&mut self, batch: Vec<Command>, bytes: usize, failure: Failure, number: u64) {
        error!(what = failure.what, "The log could not be written; opening it again.");
        let before = self.commits;
        let damage = failure.kind == FailureKind::Damage;
        let reopened = self.reopen();
        let error = match &reopened {
            Ok(()) if self.commits == before => refusal(&failure),
            Ok(()) | Err(_) => {
                LaneError::OutcomeUnknown(format!("the log failed while it stored this: {}", failure.what))
            }
        };
        debug_assert!(reopened.is_err() || self.commits == before || self.commits == number);
        // The state says so before anybody is told of an error.
        self.trouble = Some(Trouble { failure: failure.clone(), bytes, unopened: reopened.is_err() });
        self.in_trouble(failure, reopened.is_err());
        let certain = matches!(error, LaneError::Unavailable(_));
        if certain && damage && batch.len() > 1 {
            // One of them met a damaged page. The others need not suffer for it, nor be told.
            self.try_room();
            for command in batch {
                match &self.trouble {
                    Some(trouble) => refuse(command, &refusal(&trouble.failure)),
                    None => self.commit(vec![command], bytes),
                }
            }
            return;
        }
        batch.into_iter().for_each(|command| refuse(command, &error));
        if reopened.is_ok() {
            self.try_room();
        }
    }

    /// A reader met an I/O error, so the store has to be opened again before anybody can go on.
    pub(super) fn reopen_suspect(&mut self) {
        if self.trouble.is_some() {
            return;
        }
        warn!("Reading the log failed; opening it again.");
        if let Err(failure) = self.reopen() {
            self.trouble = Some(Trouble { failure: failure.clone(), bytes: 0, unopened: true });
            self.in_trouble(failure, true);
        }
    }

    /// The next try of a log in trouble.
    pub(super) fn try_again(&mut self) {
        if self.trouble.as_ref().is_some_and(|trouble| trouble.unopened)
            && let Err(failure) = self.reopen()
        {
            return self.in_trouble(failure, true);
        }
        // What retention frees inside the file may be all the room that is missing.
        if let Err(failure) = self.remove_old() {
            let unopened = self.reopen().is_err();
            return self.in_trouble(failure, unopened);
        }
        self.try_room();
    }

    /// Stores as much as could not be stored, and some more, and removes it again.
    fn try_room(&mut self) {
        let missing = self.trouble.as_ref().filter(|trouble| trouble.failure.kind == FailureKind::Full);
        let bytes = missing.map_or(0, |trouble| trouble.bytes + SPARE_BYTES);
        let log = self.log.clone();
        let tried = log
            .store
            .write(|transaction| {
                let mut room = transaction.open_table(ROOM)?;
                for row in 0..bytes / TRIAL_ROW.len() {
                    room.insert(row as u64, &TRIAL_ROW[..])?;
                }
                Ok(())
            })
            .and_then(|()| log.store.write(|transaction| Ok(transaction.delete_table(ROOM).map(|_| ())?)));
        match tried {
            Ok(()) => {
                info!("The log can be written.");
                self.trouble = None;
                self.log.state.send_replace(LaneState::Up);
            }
            Err(failure) => {
                let unopened = self.reopen().is_err();
                self.in_trouble(failure, unopened);
            }
        }
    }

    fn in_trouble(&mut self, failure: Failure, unopened: bool) {
        let text = match failure.kind {
            FailureKind::Full => format!(
                "the disk under the log is full ({}): nothing can be stored until there is room, what is stored can be read",
                failure.what
            ),
            _ => format!("the log {} cannot be written: {}", self.log.store.file().display(), failure.what),
        };
        if let Some(trouble) = &mut self.trouble {
            trouble.failure = failure;
            trouble.unopened = unopened;
        }
        self.log.state.send_if_modified(|state| {
            let changed = *state != LaneState::Down(text.clone());
            *state = LaneState::Down(text.clone());
            if changed {
                error!(reason = text, "The log is down.");
            }
            changed
        });
    }

    /// Opens the store again and learns from it what it holds.
    fn reopen(&mut self) -> Result<(), Failure> {
        let log = self.log.clone();
        let reopened = log
            .store
            .reopen()
            .map_err(|error| Failure { kind: FailureKind::Io, what: error.to_string() })
            .and_then(|()| {
                self.commits = log.store.commits()?;
                self.next_topic_id = self.next_topic_id.max(load(&log)? + 1);
                Ok(())
            });
        log.reopened.send_modify(|times| *times += 1);
        reopened
    }
}

/// Why nothing of it was stored.
pub fn refusal(failure: &Failure) -> LaneError {
    match failure.kind {
        FailureKind::Full => {
            LaneError::StorageFull(format!("the disk under the log is full ({})", failure.what))
        }
        _ => LaneError::Unavailable(format!("the log cannot be written ({})", failure.what)),
    }
}

pub fn refuse(command: Command, error: &LaneError) {
    let error = error.clone();
    match command {
        Command::Append { receipt, .. } => drop(receipt.send(Err(error))),
        Command::Create { done, .. } | Command::Delete { done, .. } | Command::Remove { done, .. } => {
            drop(done.send(Err(error)));
        }
        Command::Begin { done, .. } => drop(done.send(Err(error))),
        Command::Ack { done, .. } | Command::Seek { done, .. } | Command::Probe { done } => {
            drop(done.send(Err(error)));
        }
        Command::Close { done } => drop(done.send(())),
    }
}
