// A WebSocket that comes back: with backoff, and not at the same moment as everybody else's.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
// A socket that was open for so long was well: what ends it is not the trouble of before.
const SETTLED_MS = 5_000;
// The bridge speaks every 2 s: one that is silent for so long is gone, though no one said so.
export const SILENCE_MS = 8_000;

/**
 * Keeps a socket to what `url()` says. `on` has `opened()`, `frame(text)` and `lost(pauseMs)`; a socket that is lost
 * says nothing more. With `silenceMs` one that says nothing for so long is given up.
 */
export function keep(url, on, { protocols = [], silenceMs = 0 } = {}) {
  let socket = null;
  let pause = FIRST_PAUSE_MS;
  let watch = 0;
  let again = 0;

  const connect = () => {
    const opening = new WebSocket(url(), protocols);
    let openedAt = 0;
    let over = false;
    socket = opening;
    const end = () => {
      if (over) return;
      over = true;
      clearTimeout(watch);
      if (openedAt && performance.now() - openedAt > SETTLED_MS) pause = FIRST_PAUSE_MS;
      const wait = pause * (0.75 + Math.random() / 2);
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
      again = setTimeout(connect, wait);
      on.lost(wait);
    };
    const heard = () => {
      if (!silenceMs) return;
      clearTimeout(watch);
      watch = setTimeout(() => {
        end();
        opening.close();
      }, silenceMs);
    };
    opening.onopen = () => {
      openedAt = performance.now();
      if (!over) on.opened();
    };
    opening.onmessage = ({ data }) => {
      if (over) return;
      heard();
      on.frame(data);
    };
    opening.onclose = end;
    heard();
  };
  connect();

  // Whoever comes back to the page, or to the network, does not wait for the pause to end.
  const hurry = () => {
    if (document.visibilityState === "visible" && socket.readyState === WebSocket.CLOSED) {
      clearTimeout(again);
      connect();
    }
  };
  document.addEventListener("visibilitychange", hurry);
  window.addEventListener("online", hurry);

  return {
    isOpen: () => socket.readyState === WebSocket.OPEN,
    send: (text) => socket.send(text),
  };
}
