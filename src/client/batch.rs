//! Many messages in few frames, and what becomes of each.
//!
//! ```text
//! drafts ──a hundred a frame──▶ line ──results──▶ acknowledged, or refused
//!   ▲                                 └─refused for now─┐
//!   └──────────────── after a wait, with the same id ───┘
//! ```

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::connection::{ClientError, with_messages};
use super::dial::Options;
use super::line::{Ask, Line, Published, SendError, is_unknown};
use crate::message::{Draft, MessageId};

/// What one frame holds at most, unless a single message is larger: a small part of what a bridge takes by default.
const FRAME_MESSAGES: usize = 100;
const FRAME_BYTES: usize = 128 * 1024;

type Outcome = Result<Published, SendError>;

/// One message on its way.
struct Parcel {
    /// Its place among the results.
    at: usize,
    id: MessageId,
    draft: Draft,
    /// Some attempt may have stored it.
    unknown: bool,
    last: Option<ClientError>,
}

/// What became of each, in their order; what could not be written as a message stays the error it is.
pub async fn send_all(
    line: &Line,
    options: Options,
    topic: &str,
    drafts: impl IntoIterator<Item = Result<Draft, SendError>>,
) -> Vec<Outcome> {
    let until = Instant::now() + options.deadline;
    let (mut outcomes, mut parcels) = (Vec::new(), Vec::new());
    for (at, draft) in drafts.into_iter().enumerate() {
        outcomes.push(draft.as_ref().err().cloned().map(Err));
        if let Ok(mut draft) = draft {
            let id = *draft.id.get_or_insert_default();
            parcels.push(Parcel { at, id, draft, unknown: false, last: None });
        }
    }
    let mut failures = 0;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        parcels = attempt(line, topic, left, parcels, &mut outcomes).await;
        let wait = options.backoff.delay(failures);
        failures += 1;
        if parcels.is_empty() || Instant::now() + wait >= until {
            break;
        }
        sleep(wait).await;
    }
    for parcel in parcels {
        let source = parcel.last.clone().unwrap_or(ClientError::NoAnswer(options.deadline));
        outcomes[parcel.at] = Some(Err(parcel.failed(source)));
    }
    outcomes.into_iter().flatten().collect()
}

/// Sends all of them once, and returns those that were refused for now.
async fn attempt(
    line: &Line,
    topic: &str,
    deadline: Duration,
    parcels: Vec<Parcel>,
    outcomes: &mut [Option<Outcome>],
) -> Vec<Parcel> {
    let mut under_way = FuturesOrdered::new();
    for frame in frames(parcels) {
        let answer = line.ask(Ask {
            kind: "publish",
            frame: with_messages(json!({ "topic": topic }), frame.iter().map(|parcel| &parcel.draft)),
            bytes: frame.iter().map(|parcel| parcel.draft.payload.len()).sum(),
            id: frame.first().map(|parcel| parcel.id),
            deadline,
        });
        let placed = answer.await;
        under_way.push_back(async move {
            match placed {
                Ok(answer) => (frame, answer.await),
                Err(error) => (frame, Err(error)),
            }
        });
    }
    let mut again = Vec::new();
    while let Some((frame, answer)) = under_way.next().await {
        let (lane, results) = match answer {
            Ok(heard) => (heard.lane, heard.results),
            Err(error) => {
                for mut parcel in frame {
                    parcel.unknown |= matches!(error, SendError::OutcomeUnknown { .. });
                    let (SendError::OutcomeUnknown { source, .. } | SendError::NotSent { source }) = &error
                    else {
                        continue;
                    };
                    outcomes[parcel.at] = Some(Err(parcel.failed(source.clone())));
                }
                continue;
            }
        };
        let mut results = results.into_iter();
        for mut parcel in frame {
            match results.next().map(|result| (result.error.clone(), result)) {
                Some((None, result)) => {
                    let ts = result.ts.unwrap_or_default();
                    let status = result.status.as_deref();
                    outcomes[parcel.at] =
                        Some(Ok(Published::new(parcel.id, status, lane.clone(), result.position, ts)));
                }
                Some((Some(error), _)) => {
                    parcel.unknown |= is_unknown(&error);
                    let may_retry = error.retryable;
                    let source = ClientError::Refused(error);
                    if may_retry {
                        parcel.last = Some(source);
                        again.push(parcel);
                    } else {
                        outcomes[parcel.at] = Some(Err(parcel.failed(source)));
                    }
                }
                // A bridge that says nothing of it may have stored it.
                None => {
                    parcel.unknown = true;
                    again.push(parcel);
                }
            }
        }
    }
    again
}

fn frames(parcels: Vec<Parcel>) -> Vec<Vec<Parcel>> {
    let (mut frames, mut bytes) = (Vec::<Vec<Parcel>>::new(), 0);
    for parcel in parcels {
        bytes += parcel.draft.payload.len();
        match frames.last_mut() {
            Some(frame) if frame.len() < FRAME_MESSAGES && bytes <= FRAME_BYTES => frame.push(parcel),
            _ => {
                bytes = parcel.draft.payload.len();
                frames.push(vec![parcel]);
            }
        }
    }
    frames
}

impl Parcel {
    fn failed(&self, source: ClientError) -> SendError {
        match self.unknown {
            true => SendError::OutcomeUnknown { id: Some(self.id), source },
            false => SendError::NotSent { source },
        }
    }
}
