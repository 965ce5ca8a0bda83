//! Room in a line, in messages and in bytes. Who finds none waits in turn.

use tokio::sync::Semaphore;

use super::batch::Freed;

pub struct Room {
    messages: Semaphore,
    bytes: Semaphore,
    messages_max: usize,
}

impl Room {
    /// `bytes` must hold the largest message.
    pub fn new(messages: usize, bytes: usize) -> Self {
        Self { messages: Semaphore::new(messages), bytes: Semaphore::new(bytes), messages_max: messages }
    }

    /// Room for a message, if there is some now.
    pub fn try_take(&self, bytes: u32) -> Option<Taken<'_>> {
        let messages = self.messages.try_acquire().ok()?;
        let bytes = self.bytes.try_acquire_many(bytes).ok()?;
        Some(Taken { messages, bytes })
    }

    pub async fn take(&self, bytes: u32) -> Taken<'_> {
        loop {
            // They fail only where they are closed, and nobody closes them.
            if let (Ok(messages), Ok(bytes)) =
                (self.messages.acquire().await, self.bytes.acquire_many(bytes).await)
            {
                return Taken { messages, bytes };
            }
        }
    }

    pub fn give(&self, freed: Freed) {
        if freed != Freed::default() {
            self.messages.add_permits(freed.messages);
            self.bytes.add_permits(freed.bytes);
        }
    }

    /// How many messages take room.
    pub fn taken(&self) -> usize {
        self.messages_max - self.messages.available_permits()
    }

    /// Returns once nothing takes room.
    pub async fn is_free(&self) {
        // Fails only where it is closed, and nobody closes it.
        let _ = self.messages.acquire_many(self.messages_max as u32).await;
    }
}

/// Given back when it is dropped.
pub struct Taken<'a> {
    messages: tokio::sync::SemaphorePermit<'a>,
    bytes: tokio::sync::SemaphorePermit<'a>,
}

impl Taken<'_> {
    /// The message stays; what it took is given back with its receipt.
    pub fn keep(self) {
        self.messages.forget();
        self.bytes.forget();
    }
}
