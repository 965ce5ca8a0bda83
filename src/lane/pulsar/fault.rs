//! Why the broker did not do what it was asked, and what that means on the lane.

use pulsar::proto::ServerError;

use crate::lane::contract::LaneError;

#[derive(Debug, Clone, thiserror::Error)]
pub enum Fault {
    /// No connection, or no answer in time.
    #[error("{0}")]
    Lost(String),
    #[error("the durable lane was closed")]
    Closed,
    /// The broker's own answer.
    #[error("the broker refused: {text} ({})", error.as_str_name())]
    Refused { error: ServerError, text: String },
}

impl Fault {
    pub fn refused(error: i32, text: String) -> Self {
        let error = ServerError::try_from(error).unwrap_or(ServerError::UnknownError);
        // A broker adds its stack trace; the first line says it.
        let text = text.lines().next().unwrap_or_default().to_owned();
        Fault::Refused { error, text }
    }

    /// Whether asking again is of no use.
    pub fn is_lasting(&self) -> bool {
        use ServerError as E;
        matches!(
            self,
            Fault::Closed
                | Fault::Refused {
                    error: E::AuthorizationError
                        | E::TopicNotFound
                        | E::SubscriptionNotFound
                        | E::InvalidTopicName
                        | E::NotAllowedError
                        | E::TopicTerminatedError
                        | E::IncompatibleSchema,
                    ..
                }
        )
    }

    /// Whether this is what a broker says of a topic that moves just now, and will not say for long.
    pub fn is_passing(&self) -> bool {
        matches!(self, Fault::Refused { .. }) && !self.is_busy() && !self.is_lasting()
    }

    /// Whether messages that wait for a producer are refused rather than kept.
    pub fn refuses_messages(&self) -> bool {
        use ServerError as E;
        let Fault::Refused { error, .. } = self else { return self.is_lasting() };
        self.is_lasting()
            || matches!(
                error,
                E::ProducerBlockedQuotaExceededError | E::ProducerBlockedQuotaExceededException
            )
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, Fault::Refused { error: ServerError::TopicNotFound, .. })
    }

    /// The subscription has its consumer, or is of another type.
    pub fn is_busy(&self) -> bool {
        matches!(self, Fault::Refused { error: ServerError::ConsumerBusy, .. })
    }

    /// The lane's error, where nothing was sent or stored.
    pub fn on_lane(self) -> LaneError {
        use ServerError as E;
        let said = self.to_string();
        match self {
            Fault::Refused { error: E::AuthorizationError | E::AuthenticationError, .. } => {
                LaneError::Forbidden(said)
            }
            Fault::Refused { error: E::ConsumerBusy, .. } => LaneError::GroupBusy(said),
            Fault::Refused {
                error: E::ProducerBlockedQuotaExceededError | E::ProducerBlockedQuotaExceededException,
                ..
            } => LaneError::StorageFull(said),
            Fault::Lost(_) | Fault::Closed => LaneError::Unavailable(said),
            refused if refused.is_lasting() => LaneError::BadRequest(said),
            Fault::Refused { .. } => LaneError::Unavailable(said),
        }
    }
}
