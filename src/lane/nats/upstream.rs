//! One subscription at the server, and the ears that hear it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OnceCell, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::seen::Tick;
use crate::lane::contract::{Ear, LaneError};
use crate::message::Envelope;
use crate::policy::table::{Route, Template};
use crate::topic::{Pattern, Topic};

/// What is asked of the server, and for which topics.
#[derive(Debug, Clone, PartialEq)]
pub struct Want {
    pub subject: String,
    pub group: Option<String>,
    pub template: Template,
    pub pattern: Pattern,
}

/// One subscription at the server.
pub struct Upstream {
    pub subject: String,
    pub group: Option<String>,
    /// How many hold it. Changed under the lock of all upstreams; the last one takes it down.
    pub claims: AtomicUsize,
    /// Which subscription of the lane it was, counted from 1; 0: it was not asked for yet.
    pub number: AtomicU64,
    pub opened: OnceCell<Drain>,
    /// Why the server does not grant it.
    pub refused: watch::Sender<Option<LaneError>>,
    classes: Mutex<Vec<Class>>,
    turn: AtomicUsize,
}

/// The task of an open upstream.
pub struct Drain {
    pub task: AbortOnDropHandle<()>,
    /// Answered when everything that came before was handed on.
    pub marks: mpsc::Sender<oneshot::Sender<()>>,
}

/// Ears with the same pattern over the same template.
struct Class {
    template: Template,
    pattern: Pattern,
    places: Arc<[Arc<Place>]>,
}

/// One ear, wherever it is placed.
pub struct Place {
    pub ear: Arc<dyn Ear>,
    /// What was seen up to here is in its history: a later copy is skipped.
    after: AtomicU64,
    /// The connection of which it last heard.
    connects: AtomicU64,
}

impl Place {
    pub fn new(ear: Arc<dyn Ear>, connects: u64) -> Self {
        Self { ear, after: AtomicU64::new(Tick::default().0), connects: AtomicU64::new(connects) }
    }

    /// It has a history of all that was seen so far.
    pub fn begin_after(&self, tick: Tick) {
        self.after.store(tick.0, Ordering::Relaxed);
    }

    fn hear(&self, route: &Arc<Route>, envelope: &Arc<Envelope>, seen: Option<Tick>, connects: u64) {
        self.catch_up(connects);
        if seen.is_none_or(|tick| tick.0 > self.after.load(Ordering::Relaxed)) {
            self.ear.hear(route, envelope);
        }
    }

    /// The first message of a new connection comes behind the word that some are missing.
    pub fn catch_up(&self, connects: u64) {
        if self.connects.fetch_max(connects, Ordering::Relaxed) < connects {
            self.ear.missed();
        }
    }
}

impl Upstream {
    pub fn new(want: &Want) -> Self {
        Self {
            subject: want.subject.clone(),
            group: want.group.clone(),
            claims: AtomicUsize::new(0),
            classes: Mutex::default(),
            number: AtomicU64::new(0),
            opened: OnceCell::new(),
            refused: watch::Sender::new(None),
            turn: AtomicUsize::new(fastrand::usize(..1 << 16)),
        }
    }

    /// The topics of `want` are heard here from now on.
    pub fn widen(&self, want: &Want) {
        self.with_class(want, |_| {});
    }

    pub fn place(&self, want: &Want, place: &Arc<Place>) {
        self.with_class(want, |class| {
            class.places = class.places.iter().chain([place]).cloned().collect();
        });
    }

    pub fn displace(&self, want: &Want, place: &Arc<Place>) {
        self.with_class(want, |class| {
            let stays = |other: &&Arc<Place>| !Arc::ptr_eq(other, place);
            class.places = class.places.iter().filter(stays).cloned().collect();
        });
    }

    fn with_class(&self, want: &Want, change: impl FnOnce(&mut Class)) {
        let mut classes = self.classes();
        let is_it = |class: &Class| class.pattern == want.pattern && class.template == want.template;
        let at = classes.iter().position(is_it).unwrap_or_else(|| {
            let (template, pattern) = (want.template.clone(), want.pattern.clone());
            classes.push(Class { template, pattern, places: Arc::default() });
            classes.len() - 1
        });
        change(&mut classes[at]);
    }

    pub fn templates(&self) -> Vec<Template> {
        let mut templates: Vec<Template> = Vec::new();
        for class in self.classes().iter() {
            if !templates.contains(&class.template) {
                templates.push(class.template.clone());
            }
        }
        templates
    }

    /// Who hears a topic now. Later changes leave the lists as they are.
    pub fn audience(&self, template: &Template, topic: &Topic) -> Audience {
        let classes = self.classes();
        let hearing =
            classes.iter().filter(|class| class.template == *template && class.pattern.matches(topic));
        Audience(hearing.map(|class| class.places.clone()).collect())
    }

    pub fn places(&self) -> Vec<Arc<Place>> {
        self.classes().iter().flat_map(|class| class.places.iter().cloned()).collect()
    }

    fn classes(&self) -> MutexGuard<'_, Vec<Class>> {
        // Each use leaves it whole, so a panic elsewhere spoils nothing.
        self.classes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ears for one message.
pub struct Audience(Vec<Arc<[Arc<Place>]>>);

impl Audience {
    /// Everybody hears, or where it is a group's upstream, the member whose turn it is.
    pub fn hear(
        &self,
        upstream: &Upstream,
        route: &Arc<Route>,
        envelope: &Arc<Envelope>,
        seen: Option<Tick>,
        connects: u64,
    ) {
        let places = || self.0.iter().flat_map(|places| places.iter());
        match upstream.group {
            None => places().for_each(|place| place.hear(route, envelope, seen, connects)),
            Some(_) => {
                let members: usize = self.0.iter().map(|places| places.len()).sum();
                let turn = upstream.turn.fetch_add(1, Ordering::Relaxed).checked_rem(members);
                if let Some(member) = turn.and_then(|turn| places().nth(turn)) {
                    member.hear(route, envelope, seen, connects);
                }
            }
        }
    }
}
