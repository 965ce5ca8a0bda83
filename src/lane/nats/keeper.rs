//! Watches over the connection: asks for an echo twice a second, and tells the ears when one connection was replaced
//! by another.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::link::{ECHO_DEADLINE, Link};
use super::state::State;
use super::upstreams::Upstreams;

const INTERVAL: Duration = Duration::from_millis(500);
/// One echo may be late on a busy machine; two are not.
const MISSES_DOWN: u32 = 2;
/// The client library's own pings end a dead connection after three seconds. Forcing it to is for connections on which
/// only pings work, and comes later: it first says goodbye to the server, and over TLS it waits to be heard.
const MISSES_RECONNECT: u32 = 5;

/// Runs until the lane is dropped.
pub async fn run(link: Arc<Link>, upstreams: Arc<Upstreams>, state: Arc<State>) {
    let mut misses = 0;
    loop {
        if state.take_lame_duck() {
            link.leave().await;
        }
        if state.take_overflow() {
            upstreams.missed();
        }
        let connects = link.connects();
        if link.is_connected() {
            let begun = Instant::now();
            let echo = tokio::select! {
                () = state.woken() => continue,
                echo = link.echo() => echo,
            };
            if echo.is_ok() {
                misses = 0;
                upstreams.catch_up(connects);
                state.up(|| link.is_connected() && link.connects() == connects);
            } else {
                misses += 1;
                // A refusal comes at once, and is no more urgent than silence.
                let _ = timeout_at(begun + ECHO_DEADLINE, state.woken()).await;
                if misses >= MISSES_DOWN {
                    state.mute();
                }
                if misses >= MISSES_RECONNECT {
                    misses = 0;
                    link.reconnect().await;
                }
            }
        } else {
            misses = 0;
            state.lost();
        }
        if misses == 0 {
            let _ = timeout(INTERVAL, state.woken()).await;
        }
    }
}
