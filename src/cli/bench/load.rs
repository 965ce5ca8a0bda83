//! The loads: one round of each, the same for every target.
//!
//! ```text
//! windowed   as fast as answers come, so many unanswered; latency from handing over to answer
//! paced      at a rate; latency from when a message was to be sent, so a target that stalls cannot hide it
//! flow       paced, with receivers: latency from then to reception
//! drain      a group that empties a backlog, each message acknowledged by itself
//! ```

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::meter::{Meter, Process, Spent};
use super::traffic::{Incoming, Line};

/// A target that answers nothing for so long has failed.
const STALL: Duration = Duration::from_secs(20);
/// How long receivers wait for what may have been dropped, once everything is published.
const LAST: Duration = Duration::from_secs(2);
/// How far in the future a pace begins, so that everybody is ready.
const LEAD: Duration = Duration::from_millis(50);

/// What one round gave.
#[derive(Debug)]
pub struct Round {
    pub sent: u64,
    /// Messages with an answer: acknowledgements or responses.
    pub acked: u64,
    /// Deliveries there should have been.
    pub expected: u64,
    /// Deliveries, each number and receiver once.
    pub received: u64,
    /// Deliveries of something that was received already.
    pub repeated: u64,
    /// Messages, answers or deliveries a second, whichever the load is about.
    pub rate: f64,
    pub seconds: f64,
    /// In nanoseconds.
    pub latency: Option<Histogram<u64>>,
    /// Of the acknowledgements, where `latency` is that of what was published.
    pub acks: Option<Histogram<u64>>,
    pub spent: Spent,
    /// What the processor time is divided by.
    pub counted: u64,
}

/// From a microsecond to ten minutes, to a thousandth.
fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1_000, 600_000_000_000, 3)?)
}

fn record(latency: &mut Histogram<u64>, elapsed: Duration, count: u64) {
    latency.saturating_record_n(elapsed.as_nanos() as u64, count);
}

async fn in_time<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(STALL, what).await.with_context(|| format!("nothing came for {} s", STALL.as_secs()))?
}

/// As fast as answers come, `window` unanswered at most.
pub async fn windowed(line: Line, window: u64, time: Duration, carrier: Option<&Process>) -> Result<Round> {
    let (mut out, mut back) = line;
    let mut latency = histogram()?;
    // Answers may overtake each other by a few places: their times are kept for longer than the window.
    let slots = (window * 4).next_power_of_two();
    let handed = Mutex::new(vec![Instant::now(); slots as usize]);
    let (sent, acked, room) = (AtomicU64::new(0), AtomicU64::new(0), Notify::new());
    let (mut counted, mut arrived) = (0, Vec::new());

    let meter = Meter::begin(carrier);
    let begun = Instant::now();
    let (until, mut last) = (begun + time, begun);
    let sending = async {
        loop {
            let now = Instant::now();
            if now >= until {
                return anyhow::Ok(());
            }
            let from = sent.load(Relaxed);
            let count = window - (from - acked.load(Relaxed));
            if count == 0 {
                room.notified().await;
                continue;
            }
            {
                let mut handed = handed.lock().unwrap_or_else(PoisonError::into_inner);
                for number in from..from + count {
                    handed[(number % slots) as usize] = now;
                }
            }
            sent.store(from + count, Relaxed);
            out.send(from, count).await?;
        }
    };
    let mut receive = async |arrived: &mut Vec<u64>| {
        in_time(back.next(arrived)).await?;
        let now = Instant::now();
        let handed = handed.lock().unwrap_or_else(PoisonError::into_inner);
        for number in arrived.iter() {
            record(&mut latency, now - handed[(number % slots) as usize], 1);
        }
        drop(handed);
        let all = acked.fetch_add(arrived.len() as u64, Relaxed) + arrived.len() as u64;
        arrived.clear();
        // What comes after the time is up counts only where nothing came before.
        if now <= until || last == begun {
            (counted, last) = (all, now);
        }
        room.notify_one();
        anyhow::Ok(())
    };
    {
        let receiving = async {
            loop {
                receive(&mut arrived).await?;
            }
        };
        tokio::select! {
            sent = sending => sent?,
            failed = receiving => return failed,
        }
    }
    let sent = sent.load(Relaxed);
    while acked.load(Relaxed) < sent {
        receive(&mut arrived).await?;
    }
    let spent = meter.spent();
    let seconds = (last - begun).as_secs_f64();
    let acked = acked.into_inner();
    Ok(Round {
        sent,
        acked,
        expected: 0,
        received: 0,
        repeated: 0,
        rate: counted as f64 / seconds,
        seconds,
        latency: Some(latency),
        acks: None,
        spent,
        counted: acked,
    })
}

/// When each message is to be sent.
#[derive(Clone, Copy)]
pub struct Pace {
    begin: Instant,
    rate: f64,
    count: u64,
}

impl Pace {
    fn new(rate: f64, time: Duration) -> Self {
        let count = (rate * time.as_secs_f64()).round().max(1.0) as u64;
        Self { begin: Instant::now() + LEAD, rate, count }
    }

    fn due(&self, nth: u64) -> Instant {
        self.begin + Duration::from_secs_f64(nth as f64 / self.rate)
    }

    /// Tells how many are due by now, each time that changes. A thread of its own, because the runtime's timers are
    /// whole milliseconds, of which some latencies are few.
    fn start(self) -> mpsc::Receiver<u64> {
        let (due, told) = mpsc::channel(1024);
        std::thread::spawn(move || {
            for nth in 0..self.count {
                std::thread::sleep(self.due(nth).saturating_duration_since(Instant::now()));
                if due.blocking_send(nth + 1).is_err() {
                    return;
                }
            }
        });
        told
    }
}

/// At a rate, whatever the answers do.
pub async fn paced(line: Line, rate: f64, time: Duration, carrier: Option<&Process>) -> Result<Round> {
    send_paced(line, Pace::new(rate, time), 0, carrier).await
}

async fn send_paced(line: Line, pace: Pace, base: u64, carrier: Option<&Process>) -> Result<Round> {
    let (mut out, mut back) = line;
    let mut latency = histogram()?;
    let mut due = pace.start();
    let meter = Meter::begin(carrier);
    let sending = async {
        let mut sent = 0;
        while let Some(mut upto) = due.recv().await {
            // What is late goes out together.
            while let Ok(more) = due.try_recv() {
                upto = more;
            }
            out.send(base + sent, upto - sent).await?;
            sent = upto;
        }
        anyhow::Ok(sent)
    };
    let (mut acked, mut last) = (0, pace.begin);
    let receiving = async {
        let mut arrived = Vec::new();
        while acked < pace.count {
            // The first may be seconds away where the rate is below one.
            in_time(back.next(&mut arrived)).await?;
            last = Instant::now();
            for number in arrived.drain(..) {
                record(&mut latency, last.saturating_duration_since(pace.due(number - base)), 1);
                acked += 1;
            }
        }
        anyhow::Ok(())
    };
    let (sent, ()) = tokio::try_join!(sending, receiving)?;
    let seconds = (last - pace.begin).as_secs_f64();
    Ok(Round {
        sent,
        acked,
        expected: 0,
        received: 0,
        repeated: 0,
        rate: acked as f64 / seconds,
        seconds,
        latency: Some(latency),
        acks: None,
        spent: meter.spent(),
        counted: acked,
    })
}

/// At a rate, to receivers. `base` is where this round's numbers begin: what another round left is not counted.
pub async fn flow(
    line: Line,
    receivers: Vec<Box<dyn Incoming>>,
    base: u64,
    rate: f64,
    time: Duration,
    carrier: Option<&Process>,
) -> Result<Round> {
    let pace = Pace::new(rate, time);
    let mut receiving = JoinSet::new();
    let expected = pace.count * receivers.len() as u64;
    for receiver in receivers {
        receiving.spawn(receive(receiver, pace, base));
    }
    let mut round = send_paced(line, pace, base, carrier).await?;
    let mut latency = histogram()?;
    let mut last = pace.begin;
    round.expected = expected;
    while let Some(heard) = receiving.join_next().await {
        let heard = heard??;
        latency.add(&heard.latency)?;
        round.received += heard.count;
        round.repeated += heard.repeated;
        last = last.max(heard.last);
    }
    round.seconds = (last - pace.begin).as_secs_f64();
    round.rate = round.received as f64 / round.seconds;
    round.counted = round.received;
    round.acks = round.latency.replace(latency);
    Ok(round)
}

struct Received {
    count: u64,
    repeated: u64,
    latency: Histogram<u64>,
    last: Instant,
}

async fn receive(mut receiver: Box<dyn Incoming>, pace: Pace, base: u64) -> Result<Received> {
    let mut heard = Received { count: 0, repeated: 0, latency: histogram()?, last: pace.begin };
    let mut seen = vec![false; pace.count as usize];
    let mut arrived = Vec::new();
    while heard.count < pace.count {
        let end = pace.due(pace.count).max(heard.last) + LAST;
        let left = end.saturating_duration_since(Instant::now());
        match timeout(left, receiver.next(&mut arrived)).await {
            Ok(came) => came?,
            // What has not come by now was dropped.
            Err(_) => break,
        }
        let now = Instant::now();
        for number in arrived.drain(..) {
            let Some(seen) = number.checked_sub(base).and_then(|nth| seen.get_mut(nth as usize)) else {
                continue;
            };
            if std::mem::replace(seen, true) {
                heard.repeated += 1;
                continue;
            }
            heard.count += 1;
            heard.last = now;
            record(&mut heard.latency, now.saturating_duration_since(pace.due(number - base)), 1);
        }
    }
    receiver.settle().await?;
    Ok(heard)
}

/// Publishes the messages `0..count` and returns once all are stored.
pub async fn fill(line: Line, count: u64) -> Result<()> {
    let (mut out, mut back) = line;
    let receiving = async {
        let (mut stored, mut arrived) = (0, Vec::new());
        while stored < count {
            in_time(back.next(&mut arrived)).await?;
            stored += arrived.drain(..).count() as u64;
        }
        Ok(())
    };
    tokio::try_join!(out.send(0, count), receiving)?;
    Ok(())
}

/// Empties a backlog of the messages `0..count`.
pub async fn drain(mut member: Box<dyn Incoming>, count: u64, carrier: Option<&Process>) -> Result<Round> {
    let meter = Meter::begin(carrier);
    let begun = Instant::now();
    let mut seen = vec![false; count as usize];
    let (mut received, mut repeated, mut arrived) = (0, 0, Vec::new());
    while received < count {
        in_time(member.next(&mut arrived)).await.with_context(|| format!("{received} of {count} came"))?;
        for number in arrived.drain(..) {
            let Some(seen) = seen.get_mut(number as usize) else {
                bail!("message {number} was not published")
            };
            match std::mem::replace(seen, true) {
                false => received += 1,
                true => repeated += 1,
            }
        }
    }
    in_time(member.settle()).await?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Round {
        sent: count,
        acked: 0,
        expected: count,
        received,
        repeated,
        rate: received as f64 / seconds,
        seconds,
        latency: None,
        acks: None,
        spent: meter.spent(),
        counted: received,
    })
}
