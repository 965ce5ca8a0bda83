//! A subscription on a session: what comes by it, and what its owner may say.

use std::collections::VecDeque;
use std::sync::Arc;

use pulsar::proto::base_command::Type;
use pulsar::proto::{
    BaseCommand, CommandAck, CommandFlow, CommandGetLastMessageId, CommandRedeliverUnacknowledgedMessages,
    CommandSeek, CommandSubscribe, MessageIdData,
};
use tokio::sync::{mpsc, watch};

use super::fault::Fault;
use super::session::{Delivery, Session, command, unexpected};

/// Our end of a subscription. Dropping it closes it at the broker, which then delivers to others what was not
/// acknowledged.
pub struct Consumer {
    session: Arc<Session>,
    id: u64,
    deliveries: mpsc::UnboundedReceiver<Vec<Delivery>>,
    /// What has come and was not taken.
    came: VecDeque<Delivery>,
    activated: watch::Receiver<u32>,
}

impl Consumer {
    /// Subscribes. Nothing comes before the first permits are given.
    pub async fn subscribe(session: Arc<Session>, subscribe: CommandSubscribe) -> Result<Self, Fault> {
        let (id, deliveries, activated) = session.attach();
        let consumer = Consumer { session, id, deliveries, came: VecDeque::new(), activated };
        let answer = consumer
            .session
            .request(|request_id| BaseCommand {
                subscribe: Some(CommandSubscribe { consumer_id: id, request_id, ..subscribe }),
                ..command(Type::Subscribe)
            })
            .await?;
        answer.success.map(|_| consumer).ok_or_else(unexpected)
    }

    /// The next entry; `None` once the connection is lost or the broker moved the topic: subscribe again then.
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        if self.came.is_empty() {
            self.came = self.deliveries.recv().await?.into();
        }
        self.came.pop_front()
    }

    /// What came together, or nothing where the broker has made this the active consumer. `None`: as `next` has it,
    /// subscribe again. Cancel safe; not to be mixed with `next`.
    pub async fn next_or_active(&mut self) -> Option<Vec<Delivery>> {
        tokio::select! {
            Ok(()) = self.activated.changed() => Some(Vec::new()),
            came = self.deliveries.recv() => came,
        }
    }

    /// What has come already.
    pub fn try_next(&mut self) -> Option<Delivery> {
        if self.came.is_empty() {
            self.came = self.deliveries.try_recv().ok()?.into();
        }
        self.came.pop_front()
    }

    /// Closes it before its owner gets round to it.
    pub fn closing(&self) -> impl FnOnce() + Send + 'static + use<> {
        let (session, id) = (self.session.clone(), self.id);
        move || session.detach(id)
    }

    /// Whether the broker has closed it, on a connection that stands: the topic moves, or its group was sought.
    pub fn was_closed(&self) -> bool {
        !self.session.is_lost()
    }

    pub fn permit(&self, messages: u32) -> impl Future<Output = Result<(), Fault>> + Send + use<'_> {
        let flow = CommandFlow { consumer_id: self.id, message_permits: messages };
        self.session.send(&BaseCommand { flow: Some(flow), ..command(Type::Flow) })
    }

    /// Acknowledges and waits until the broker has recorded it. Borrows nothing, so that many can be under way.
    pub fn ack(
        &self,
        ids: Vec<MessageIdData>,
    ) -> impl Future<Output = Result<(), Fault>> + Send + 'static + use<> {
        let (session, consumer_id) = (self.session.clone(), self.id);
        async move {
            let answer = session
                .request(|request_id| BaseCommand {
                    ack: Some(CommandAck {
                        consumer_id,
                        message_id: ids,
                        request_id: Some(request_id),
                        ..Default::default()
                    }),
                    ..command(Type::Ack)
                })
                .await?;
            let recorded = answer.ack_response.ok_or_else(unexpected)?;
            match recorded.error {
                Some(error) => Err(Fault::refused(error, recorded.message.unwrap_or_default())),
                None => Ok(()),
            }
        }
    }

    /// Has the broker deliver entries again, to any consumer of the subscription.
    pub fn redeliver(
        &self,
        ids: Vec<MessageIdData>,
    ) -> impl Future<Output = Result<(), Fault>> + Send + use<'_> {
        let redeliver = CommandRedeliverUnacknowledgedMessages {
            consumer_id: self.id,
            message_ids: ids,
            consumer_epoch: None,
        };
        let redeliver = BaseCommand {
            redeliver_unacknowledged_messages: Some(redeliver),
            ..command(Type::RedeliverUnacknowledgedMessages)
        };
        self.session.send(&redeliver)
    }

    /// The id of the newest message of the topic; `None` where it holds none.
    pub async fn last(&self) -> Result<Option<MessageIdData>, Fault> {
        let consumer_id = self.id;
        let answer = self
            .session
            .request(|request_id| BaseCommand {
                get_last_message_id: Some(CommandGetLastMessageId { consumer_id, request_id }),
                ..command(Type::GetLastMessageId)
            })
            .await?;
        let last = answer.get_last_message_id_response.ok_or_else(unexpected)?.last_message_id;
        // An empty topic's is -1:-1, and that of a ledger just begun n:-1.
        Ok((last.entry_id != u64::MAX).then_some(last))
    }

    /// Moves the subscription to the first message published at a time or later. The broker closes the consumer then:
    /// subscribe again under the same name.
    pub async fn seek(&self, millis: u64) -> Result<(), Fault> {
        let consumer_id = self.id;
        self.session
            .request(|request_id| BaseCommand {
                seek: Some(CommandSeek {
                    consumer_id,
                    request_id,
                    message_publish_time: Some(millis),
                    message_id: None,
                }),
                ..command(Type::Seek)
            })
            .await?;
        Ok(())
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.session.detach(self.id);
    }
}
