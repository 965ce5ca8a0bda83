// A client on the public socket whose every frame is shown.
//
//   form ──frame──▶ socket ──▶ bridge
//   list ◀── each frame, sent or heard; the newest win where more come than can be shown

import { byId, count, element, milliseconds, say } from "./dom.js";
import { keep } from "./socket.js";

const SHOWN = 200;
const SUMMARY_CHARS = 240;
// Of a larger frame the beginning is kept.
const KEPT_CHARS = 64 * 1024;

const list = byId("frames");
const outcome = byId("outcome");
const pause = byId("pause");
const follow = byId("follow");
const send = byId("send");

/** What is subscribed to: its chip, and what is left to say of where it begins. */
const patterns = new Map();
/** When what waits for its answer was sent, by `request_id`; and publishes by message id, once it is known. */
const asked = new Map();
const published = new Map();
/** What is published once the socket is open. */
let unsent = [];
let waiting = [];
let unshown = 0;
let drawing = false;
let last = 0;
let socket = null;
let url = null;

/** `at` tells where the public socket is. */
export function inspector(at) {
  url = at;
  follow.addEventListener("submit", (event) => {
    event.preventDefault();
    subscribe(follow.elements.pattern.value.trim(), follow.elements.start.value);
  });
  send.addEventListener("submit", (event) => {
    event.preventDefault();
    publish(
      event.submitter?.value ?? "publish",
      send.elements.topic.value.trim(),
      send.elements.payload.value,
    );
  });
  pause.addEventListener("click", () => {
    pause.setAttribute("aria-pressed", `${pause.getAttribute("aria-pressed") !== "true"}`);
    draw();
  });
  byId("clear").addEventListener("click", () => {
    [waiting, unshown] = [[], 0];
    list.replaceChildren();
    draw();
  });
}

function subscribe(pattern, start) {
  if (patterns.has(pattern)) {
    told(`${pattern} is subscribed to already.`, true);
    return;
  }
  const remove = element("button", { "type": "button", "aria-label": `Unsubscribe from ${pattern}` }, "×");
  const chip = element("li", {}, element("code", {}, pattern), remove);
  const beginning = { last: { last_n: 10 }, earliest: { from: "earliest" } }[start];
  patterns.set(pattern, { chip, beginning });
  byId("followed").append(chip);
  remove.addEventListener("click", () => {
    forget(pattern);
    if (socket?.isOpen()) transmit({ type: "unsubscribe", topic: pattern });
  });
  if (isConnected()) begin(pattern);
}

function begin(pattern) {
  const subscribed = patterns.get(pattern);
  transmit({ type: "subscribe", topic: pattern, client_id: "console", ...subscribed.beginning });
  // On another connection it goes on with what comes then.
  subscribed.beginning = {};
}

function forget(pattern) {
  patterns.get(pattern)?.chip.remove();
  patterns.delete(pattern);
}

function publish(type, topic, payload) {
  const frame = { type, topic };
  let message;
  try {
    JSON.parse(payload);
    // The bytes that were typed, not what a parser makes of a large number.
    message = `{"payload":${payload}}`;
  } catch {
    message = JSON.stringify({ payload, encoding: "text" });
  }
  told(`${type === "request" ? "Asking" : "Publishing to"} ${topic} …`);
  if (isConnected()) transmit(frame, message);
  else if (socket) unsent.push({ frame, message });
  else told("The bridge has not told yet where its public socket is; nothing was sent.", true);
}

/** Whether the socket is open; the first who asks has it opened. */
function isConnected() {
  if (url()) socket ??= keep(url, { opened, frame: heard, lost }, { protocols: ["twinspan.v1"] });
  return Boolean(socket?.isOpen());
}

function opened() {
  say(byId("socket"), `connected to ${url()}`);
  for (const pattern of patterns.keys()) begin(pattern);
  const now = unsent;
  unsent = [];
  for (const { frame, message } of now) transmit(frame, message);
}

function lost(pauseMs) {
  asked.clear();
  unsent = [];
  say(byId("socket"), `no connection to ${url()}; trying again in ${milliseconds(pauseMs)}`);
  told("No connection to the public socket. What was not answered may or may not have arrived.", true);
}

function transmit(frame, message) {
  last += 1;
  const id = `console-${last}`;
  let text = JSON.stringify({ ...frame, request_id: id });
  if (message) text = `${text.slice(0, -1)},"message":${message}}`;
  asked.set(id, { at: performance.now(), ...frame });
  socket.send(text);
  record("sent", text, frame, "");
}

function heard(text) {
  const now = performance.now();
  let frame;
  try {
    frame = JSON.parse(text);
  } catch {
    frame = { type: "not JSON" };
  }
  const question = asked.get(frame.request_id);
  asked.delete(frame.request_id);
  let note = "";
  if (question) {
    note = `after ${milliseconds(now - question.at)}`;
    if (question.type === "publish" && frame.message_id) arrives(frame.message_id, question.at);
    answered(question, frame, note);
  } else if (frame.type === "event") {
    const at = published.get(frame.message?.id);
    if (at) note = `after ${milliseconds(now - at)}`;
  }
  record("heard", text, frame, note, now);
}

/** A publish has its id: the event may have come before. */
function arrives(id, at) {
  published.set(id, at);
  if (published.size > SHOWN) published.delete(published.keys().next().value);
  for (const { frame, noted, now } of waiting.concat([...list.children].map((node) => node.record))) {
    if (frame.type === "event" && frame.message?.id === id) say(noted, `after ${milliseconds(now - at)}`);
  }
}

function answered(question, frame, note) {
  const { type, topic } = question;
  if (frame.type === "error") {
    const { code, message } = frame.error;
    if (type === "subscribe") forget(topic);
    told(`${topic}: ${code}, ${note}: ${message}`, true);
  } else if (type === "publish") {
    const state = frame.status === "ok" ? `is on the ${frame.lane} lane` : `was answered ${frame.status}`;
    told(`${topic}: the message ${state}, ${note}.`);
  } else if (type === "request") {
    told(`${topic}: the response came ${note}.`);
  } else {
    told(`${topic}: ${type === "subscribe" ? "subscribed" : "unsubscribed"}, ${note}.`);
  }
}

function told(text, bad = false) {
  say(outcome, text);
  outcome.classList.toggle("bad", bad);
}

function record(direction, text, frame, note, now = performance.now()) {
  const noted = element("span", { class: "note" }, note);
  waiting.push({
    direction,
    text: text.slice(0, KEPT_CHARS),
    length: text.length,
    frame,
    noted,
    now,
    at: new Date(),
  });
  if (waiting.length > SHOWN) {
    waiting.shift();
    unshown += 1;
  }
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  drawing = false;
  const paused = pause.getAttribute("aria-pressed") === "true";
  say(pause, paused ? "Go on" : "Pause");
  if (!paused) {
    list.prepend(...waiting.map(row).reverse());
    waiting = [];
    while (list.children.length > SHOWN) list.lastElementChild.remove();
  }
  const hidden = unshown + waiting.length;
  say(byId("unshown"), hidden ? `${count(hidden)} not shown` : "");
  byId("frames-none").hidden = list.children.length > 0;
}

function row(record) {
  const { direction, text, length, frame, noted, at } = record;
  const word = direction === "sent" ? "to the bridge" : "from the bridge";
  const stamp = `${at.toTimeString().slice(0, 8)}.${`${at.getMilliseconds()}`.padStart(3, "0")}`;
  const summary = element(
    "summary",
    {},
    element("time", {}, stamp),
    element(
      "span",
      { "class": "arrow", "role": "img", "aria-label": word },
      direction === "sent" ? "→" : "←",
    ),
    element("span", { "class": "type", "data-type": frame.type }, `${frame.type}`),
    element("span", { class: "gist" }, gist(frame, text)),
    noted,
  );
  const details = element("details", {}, summary);
  // Laid out once somebody looks.
  details.addEventListener(
    "toggle",
    () => {
      const rest = length - text.length;
      details.append(element("pre", {}, rest ? `${text} … and ${count(rest)} more` : indent(text)));
    },
    { once: true },
  );
  const node = element("li", { "data-direction": direction }, details);
  node.record = record;
  return node;
}

/** A frame whose numbers are written as they came, where the browser can do that. */
function exact(text) {
  const asWritten = (_, value, context) =>
    typeof value === "number" && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
  try {
    return JSON.parse(text, asWritten);
  } catch {
    return null;
  }
}

/** What a frame is about, in one line. */
function gist(frame, written) {
  const { error, topic, message, status, lane, code, dropped, reason } = frame;
  const isMessage = message !== null && typeof message === "object";
  const payload = isMessage ? JSON.stringify((exact(written) ?? frame).message.payload) : message;
  const parts = [
    topic,
    lane,
    status,
    error ? `${error.code}: ${error.message}` : code,
    payload,
    dropped === undefined ? reason : `${dropped ?? "unknown"} dropped, ${reason}`,
  ];
  const text = parts.filter((part) => typeof part === "string").join("  ");
  return text.length > SUMMARY_CHARS ? `${text.slice(0, SUMMARY_CHARS)}…` : text;
}

/** JSON over several lines, each value as it was written. */
function indent(text) {
  let deep = 0;
  const line = () => `\n${"  ".repeat(deep)}`;
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g) ?? [];
  return tokens
    .map((token, at) => {
      switch (token) {
        case "{":
        case "[":
          deep += 1;
          return "}]".includes(tokens[at + 1]) ? token : token + line();
        case "}":
        case "]":
          deep -= 1;
          return "{[".includes(tokens[at - 1]) ? token : line() + token;
        case ",":
          return token + line();
        case ":":
          return ": ";
        default:
          return token;
      }
    })
    .join("");
}
