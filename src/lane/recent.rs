//! The ids that came last.

use std::collections::{HashSet, VecDeque};

use crate::message::MessageId;

/// How many are remembered.
const IDS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub struct Recent {
    order: VecDeque<MessageId>,
    ids: HashSet<MessageId>,
}

impl Recent {
    pub fn insert(&mut self, id: MessageId) {
        if self.ids.insert(id) {
            self.order.push_back(id);
            if self.order.len() > IDS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.ids.remove(&oldest);
            }
        }
    }

    pub fn contains(&self, id: &MessageId) -> bool {
        self.ids.contains(id)
    }
}
