//! Who is connected.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::shared::Shared;

/// The open connections of this process.
#[derive(Default)]
pub struct Roster {
    last: AtomicU64,
    open: Mutex<BTreeMap<u64, Weak<Shared>>>,
}

impl Roster {
    /// A number for one more connection.
    pub fn next(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn enter(&self, session: &Arc<Shared>) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(session.id, Arc::downgrade(session));
    }

    pub fn leave(&self, id: u64) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    pub fn sessions(&self) -> Vec<Arc<Shared>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().filter_map(Weak::upgrade).collect()
    }

    pub fn len(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
