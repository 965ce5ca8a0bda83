//! What becomes of published messages, from who publishes to who counts.
//!
//! They are handed over by the handful: a channel's turn for each would cost a tenth of what our own session takes.

use std::collections::VecDeque;

use anyhow::{Context, Result};
use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::mpsc;

use super::traffic::Incoming;

/// Receipts that are handed over together, so few that the first is looked at at once.
const HANDFUL: usize = 64;
/// Handfuls that nobody has taken; more than any window needs. The publisher waits.
const HANDFULS_MAX: usize = 1 << 12;

/// The publisher's end: each message's number, and a future that is ready once it is stored.
pub struct UnderWay<F> {
    handful: Vec<(u64, F)>,
    handfuls: mpsc::Sender<Vec<(u64, F)>>,
}

/// The other end, in the order of publishing.
pub struct Receipts<F> {
    waiting: VecDeque<(u64, F)>,
    handfuls: mpsc::Receiver<Vec<(u64, F)>>,
}

pub fn channel<F>() -> (UnderWay<F>, Receipts<F>) {
    let (sender, receiver) = mpsc::channel(HANDFULS_MAX);
    let under_way = UnderWay { handful: Vec::new(), handfuls: sender };
    (under_way, Receipts { waiting: VecDeque::new(), handfuls: receiver })
}

impl<F> UnderWay<F> {
    pub async fn add(&mut self, number: u64, receipt: F) -> Result<()> {
        self.handful.push((number, receipt));
        if self.handful.len() < HANDFUL { Ok(()) } else { self.hand_over().await }
    }

    /// Comes behind the last one.
    pub async fn hand_over(&mut self) -> Result<()> {
        let handful = std::mem::replace(&mut self.handful, Vec::with_capacity(HANDFUL));
        self.handfuls.send(handful).await.ok().context("nobody takes the receipts any more")
    }
}

#[async_trait]
impl<F, T, E> Incoming for Receipts<F>
where
    F: Future<Output = Result<T, E>> + Unpin + Send,
    E: Into<anyhow::Error>,
{
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        while into.is_empty() {
            if self.waiting.is_empty() {
                self.waiting.extend(self.handfuls.recv().await.context("the publisher has ended")?);
            }
            if let Some((number, receipt)) = self.waiting.front_mut() {
                receipt.await.map_err(Into::into)?;
                into.push(*number);
                self.waiting.pop_front();
            }
        }
        loop {
            while let Some((number, receipt)) = self.waiting.front_mut() {
                let Some(stored) = receipt.now_or_never() else { return Ok(()) };
                stored.map_err(Into::into)?;
                into.push(*number);
                self.waiting.pop_front();
            }
            let Ok(handful) = self.handfuls.try_recv() else { return Ok(()) };
            self.waiting.extend(handful);
        }
    }
}
