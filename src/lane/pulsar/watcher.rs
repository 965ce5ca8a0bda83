//! A watcher of a namespace's topics on a session.

use std::sync::Arc;

use pulsar::proto::ServerError;
use tokio::sync::mpsc;

use super::fault::Fault;
use super::newer::{Changed, NewerCommand};
use super::session::Session;

/// Our end of it. Dropping it closes it at the broker.
pub struct Watcher {
    session: Arc<Session>,
    id: u64,
    changes: mpsc::Receiver<Changed>,
}

impl Watcher {
    /// Returns once every topic of the namespace that appears from now on is told, where its name fits the expression.
    pub async fn place(session: Arc<Session>, namespace: &str, expression: &str) -> Result<Self, Fault> {
        if !session.takes_watchers {
            let text = "it tells nobody of topics that appear".into();
            return Err(Fault::Refused { error: ServerError::NotAllowedError, text });
        }
        let (id, changes) = session.attach_watcher();
        let watcher = Watcher { session, id, changes };
        let command = |request_id| NewerCommand::watch(request_id, id, namespace, expression);
        watcher.session.request(command).await?;
        Ok(watcher)
    }

    /// What changed next; `None` once the connection is lost, or more came than was taken. Cancel safe.
    pub async fn next(&mut self) -> Option<Changed> {
        self.changes.recv().await
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.session.detach_watcher(self.id);
    }
}
