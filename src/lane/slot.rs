//! Where the messages of one batch get their receipts: a slot that they share, and a number in it for each.
//!
//! ```text
//! Slot ──refuse──▶ │ 0 │ 1 │           the first of those that wait
//!      ──confirm─▶         │ 2 │ 3 │   all others, which are stored one behind another
//! Waiting            ▲ one for each message
//! ```
//! A batch is confirmed as a whole. A channel for each of its messages would be two allocations for each, which another
//! thread frees.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::task::coop::poll_proceed;

use super::contract::LaneError;
use crate::message::Place;

/// Answers the messages of one batch. Those that have no answer when it is dropped get one that says so.
#[derive(Default)]
pub struct Slot {
    shared: Arc<Shared>,
    messages: u32,
    answered: u32,
}

/// What becomes of one message: its place once it is stored.
pub struct Waiting {
    shared: Arc<Shared>,
    number: u32,
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    /// Why messages were refused, each with the number behind the last of them.
    refused: Vec<(u32, LaneError)>,
    /// The number of the first of the others, and its place.
    stored: Option<(u32, Place)>,
    /// Of those that were asked before they had an answer, by their number.
    wakers: Vec<Option<Waker>>,
}

impl Slot {
    /// One more message.
    pub fn add(&mut self) -> Waiting {
        let number = self.messages;
        self.messages += 1;
        Waiting { shared: self.shared.clone(), number }
    }

    /// The first so many of those that wait.
    pub fn refuse(&mut self, messages: u32, why: LaneError) {
        self.answered += messages;
        let mut state = self.shared.state();
        state.refused.push((self.answered, why));
        let asked = state.wakers.iter_mut().take(self.answered as usize);
        let wakers: Vec<_> = asked.filter_map(Option::take).collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// All that wait.
    pub fn refuse_all(&mut self, why: LaneError) {
        self.refuse(self.messages - self.answered, why);
    }

    /// The first of those that wait is stored there, the others one behind another in the same entry.
    pub fn confirm(mut self, first: Place) {
        let mut state = self.shared.state();
        state.stored = Some((self.answered, first));
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.answered = self.messages;
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.answered < self.messages {
            self.refuse_all(LaneError::OutcomeUnknown("the producer ended before the receipt came".into()));
        }
    }
}

impl Future for Waiting {
    type Output = Result<Place, LaneError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // As with tokio's own channels, whoever takes many answers gives others a turn.
        let turn = ready!(poll_proceed(context));
        let mut state = self.shared.state();
        match state.answer(self.number) {
            Some(answer) => {
                turn.made_progress();
                Poll::Ready(answer)
            }
            None => {
                state.will_wake(self.number, context.waker());
                Poll::Pending
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn answer(&self, number: u32) -> Option<Result<Place, LaneError>> {
        if let Some((_, why)) = self.refused.iter().find(|(end, _)| number < *end) {
            return Some(Err(why.clone()));
        }
        let (first, place) = self.stored?;
        Some(Ok(Place { index: place.index + (number - first), ..place }))
    }

    /// Whoever asked last is woken, and nobody twice.
    fn will_wake(&mut self, number: u32, waker: &Waker) {
        let at = number as usize;
        if self.wakers.len() <= at {
            self.wakers.resize(at + 1, None);
        }
        match &mut self.wakers[at] {
            Some(known) if known.will_wake(waker) => {}
            known => *known = Some(waker.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use futures_util::FutureExt;

    use super::*;

    const PLACE: Place = Place { ledger: 1, entry: 2, index: 0 };

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn poll(self: &Arc<Self>, waiting: &mut Waiting) -> Poll<Result<Place, LaneError>> {
            waiting.poll_unpin(&mut Context::from_waker(&self.clone().into()))
        }

        fn woken(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn slot_of<const N: usize>() -> (Slot, [Waiting; N]) {
        let mut slot = Slot::default();
        let waiting = std::array::from_fn(|_| slot.add());
        (slot, waiting)
    }

    fn late() -> LaneError {
        LaneError::Unavailable("late".into())
    }

    /// What it says now.
    fn now(waiting: &mut Waiting) -> Result<Place, LaneError> {
        waiting.now_or_never().unwrap()
    }

    #[test]
    fn a_receipt_is_ready_whether_it_was_asked_before_the_answer_or_only_behind_it() {
        let (slot, [mut before, mut behind]) = slot_of();
        let count = Arc::<Count>::default();
        assert!(count.poll(&mut before).is_pending());
        slot.confirm(PLACE);
        assert_eq!(count.woken(), 1);
        for (waiting, index) in [(&mut before, 0), (&mut behind, 1)] {
            assert_eq!(now(waiting).unwrap(), Place { index, ..PLACE });
        }
    }

    #[test]
    fn each_that_waits_is_woken_once_however_often_it_asked_and_only_whoever_asked_last() {
        let (slot, mut waiting) = slot_of::<3>();
        let counts: [Arc<Count>; 3] = Default::default();
        for _ in 0..3 {
            for (count, waiting) in counts.iter().zip(&mut waiting).rev() {
                assert!(count.poll(waiting).is_pending());
            }
        }
        let moved = Arc::<Count>::default();
        assert!(moved.poll(&mut waiting[1]).is_pending());
        assert_eq!(slot.shared.state().wakers.len(), 3);
        slot.confirm(PLACE);
        assert_eq!(counts.map(|count| count.woken()), [1, 0, 1]);
        assert_eq!(moved.woken(), 1);
    }

    #[test]
    fn who_is_refused_is_told_why_and_the_others_go_on_waiting() {
        let (mut slot, [mut a, mut b, mut c, mut d]) = slot_of();
        let count = Arc::<Count>::default();
        for waiting in [&mut a, &mut c] {
            assert!(count.poll(waiting).is_pending());
        }
        slot.refuse(1, late());
        assert_eq!(count.woken(), 1);
        slot.refuse(1, LaneError::Internal("later".into()));
        assert_eq!(count.woken(), 1);
        assert!(matches!(now(&mut a), Err(LaneError::Unavailable(_))));
        assert!(matches!(now(&mut b), Err(LaneError::Internal(_))));
        assert!(count.poll(&mut c).is_pending() && count.poll(&mut d).is_pending());

        let mut e = slot.add();
        slot.confirm(Place { index: 1, ..PLACE });
        assert_eq!(count.woken(), 3);
        let indexes = [&mut c, &mut d, &mut e].map(|waiting| now(waiting).unwrap().index);
        assert_eq!(indexes, [1, 2, 3]);
        assert!(matches!(now(&mut a), Err(LaneError::Unavailable(_))), "what was said is said again");
    }

    #[test]
    fn all_that_wait_are_refused_and_nobody_hears_another_answer() {
        let (mut slot, [mut a, mut b]) = slot_of();
        let count = Arc::<Count>::default();
        assert!(count.poll(&mut b).is_pending());
        slot.refuse(1, late());
        slot.refuse_all(LaneError::Internal("failed".into()));
        drop(slot);
        assert_eq!(count.woken(), 1);
        assert!(matches!(now(&mut a), Err(LaneError::Unavailable(_))));
        assert!(matches!(now(&mut b), Err(LaneError::Internal(_))));
    }

    #[tokio::test]
    async fn whoever_takes_many_answers_gives_others_a_turn() {
        let (slot, waiting) = slot_of::<1000>();
        slot.confirm(PLACE);
        let taking = async {
            for waiting in waiting {
                waiting.await.unwrap();
            }
        };
        let others = std::sync::atomic::AtomicBool::default();
        let taken = tokio::join!(biased; async { taking.await; others.load(Ordering::SeqCst) }, async {
            others.store(true, Ordering::SeqCst);
        });
        assert!(taken.0, "they had none");
    }

    #[test]
    fn nobody_waits_for_a_slot_that_was_dropped() {
        let (mut slot, [mut a, mut b, mut c]) = slot_of();
        let count = Arc::<Count>::default();
        assert!(count.poll(&mut b).is_pending());
        slot.refuse(1, late());
        drop(slot);
        assert_eq!(count.woken(), 1);
        assert!(matches!(now(&mut a), Err(LaneError::Unavailable(_))));
        for waiting in [&mut b, &mut c] {
            let Err(LaneError::OutcomeUnknown(why)) = now(waiting) else { panic!("nobody knows of it") };
            assert_eq!(why, "the producer ended before the receipt came");
        }
    }

    #[test]
    fn receipts_that_nobody_waits_for_leave_one_waker_each_and_none_behind_the_answer() {
        let (slot, waiting) = slot_of::<2>();
        let count = Arc::<Count>::default();
        for mut waiting in waiting {
            for _ in 0..5 {
                assert!(count.poll(&mut waiting).is_pending());
            }
        }
        assert_eq!(Arc::strong_count(&count), 3);
        slot.confirm(PLACE);
        assert_eq!(Arc::strong_count(&count), 1);
    }
}
