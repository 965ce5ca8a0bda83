// The page: what the monitoring socket tells goes to the lanes, the charts and the tables.
//
// Of frames that come faster than the page is drawn the newest is shown.

import { charts } from "./charts.js";
import {
  NONE,
  byId,
  count,
  element,
  laneName,
  milliseconds,
  perSecond,
  say,
  showState,
  span,
  time,
} from "./dom.js";
import { explain, explaining } from "./explain.js";
import { inspector } from "./inspector.js";
import { LANES, lane } from "./lanes.js";
import { SILENCE_MS, keep } from "./socket.js";
import { table } from "./tables.js";

const EVENTS_KEPT = 200;
const VIEWS = [...document.querySelectorAll("[data-view]")].map((view) => view.dataset.view);

let latest = null;
let events = [];
let routes = [];
let drawing = false;

const cards = Object.fromEntries(LANES.map((name) => [name, lane(name)]));
const addToCharts = charts();

const text = (name, value, more = {}) => ({ name, value, ...more });
const number = (name, value, more = {}) => ({ name, value, said: count, number: true, ...more });
const explained = (name, topic) => ({
  name,
  value: topic,
  node: (row) =>
    element(
      "a",
      { href: `#explain/${encodeURIComponent(topic(row))}`, title: `Explain ${topic(row)}` },
      topic(row),
    ),
});
const laneOf = { name: "lane", value: (row) => row.lane, node: (row) => laneName(row.lane) };

const tables = {
  topics: table("topics-table", {
    caption: "topics",
    none: "No topic has been used yet.",
    sort: { at: 0, descending: false },
    key: (row) => `${row.name} ${row.lane}`,
    columns: [
      explained("topic", (row) => row.name),
      laneOf,
      text("route", (row) => row.route),
      number("messages", (row) => row.messages),
      number("in", (row) => row.in_per_second, { said: perSecond }),
      number("subscribers", (row) => row.subscribers),
    ],
  }),
  groups: table("groups-table", {
    caption: "groups",
    none: "No consumer group has members here.",
    sort: { at: 5, descending: true },
    key: (row) => `${row.topic} ${row.group}`,
    columns: [
      explained("topic", (row) => row.topic),
      text("group", (row) => row.group),
      text("route", (row) => row.route),
      text("mode", (row) => row.mode),
      number("members", (row) => row.members),
      number("backlog", (row) => row.backlog),
      number("unacknowledged", (row) => row.unacked),
      number("oldest", (row) => row.oldest_age_ms, { said: milliseconds }),
    ],
  }),
  connections: table("connections-table", {
    caption: "connections",
    none: "No client is connected.",
    sort: { at: 2, descending: true },
    key: (row) => row.connection,
    columns: [
      text("connection", (row) => row.connection),
      text("client", (row) => row.client_id),
      text("since", (row) => row.since, { said: time }),
      number("deliveries held", (row) => row.deliveries),
    ],
  }),
  events: table("events-table", {
    caption: "events",
    none: "Nothing has happened yet.",
    key: (row) => row.key,
    columns: [
      text("time", (row) => row.ts, { said: time }),
      text("event", (row) => row.type),
      { ...laneOf, node: (row) => (row.lane ? laneName(row.lane) : document.createTextNode(NONE)) },
      text("what", (row) =>
        [row.topic, row.group, row.message, row.changes, ...(row.problems ?? [])].filter(Boolean).join(" · "),
      ),
    ],
  }),
  routes: table("routes-table", {
    caption: "routes",
    none: "There is no route.",
    sort: { at: 0, descending: false },
    key: (row) => row.name,
    columns: [text("route", (row) => row.name), text("topics", (row) => row.topic), laneOf],
  }),
};

function draw() {
  drawing = false;
  const { lanes, connections, topics, groups } = latest;
  showState(byId("status"), { ok: "up" }[latest.status] ?? latest.status, latest.status);
  say(byId("version"), latest.version);
  say(byId("uptime"), span(latest.uptime_seconds));
  say(byId("listen"), publicUrl());
  for (const [id, number] of [
    ["connections-count", connections.count],
    ["clients-count", connections.count],
    ["topics-count", topics.length],
    ["groups-count", groups.length],
  ])
    say(byId(id), count(number));
  for (const name of LANES) cards[name](latest);
  const unwell = LANES.filter((name) => lanes[name].state !== "up").map(
    (name) => `${name} ${lanes[name].state}`,
  );
  document.title = unwell.length ? `${unwell.join(", ")} · twinspan` : "twinspan";
  tables.topics(topics);
  tables.groups(groups);
  tables.connections(connections.list, connections.count);
  tables.events(events);
  tables.routes(routes);
  showReload(latest.reload);
}

function showReload({ ok, at, changes, problems }) {
  say(byId("reload-mark"), ok ? "" : "refused");
  const verdict = ok
    ? "The routes were read"
    : "The routes file was refused, and those of before stay in force,";
  byId("reload-told").replaceChildren(
    element("p", { class: ok ? "verdict" : "verdict bad" }, `${verdict} at ${time(at)}. ${changes ?? ""}`),
    element("ul", { class: "problems" }, ...problems.map((problem) => element("li", {}, problem))),
  );
}

function wake() {
  if (drawing || !latest) return;
  drawing = true;
  requestAnimationFrame(draw);
}

function heard(text) {
  const frame = JSON.parse(text);
  if (frame.type === "snapshot") {
    ({ routes } = frame);
    events = [];
    frame.events.forEach(remember);
  }
  if (frame.type === "snapshot" || frame.type === "metrics") {
    for (const name of LANES) announce(name, latest?.lanes[name].state, frame.lanes[name]);
    latest = frame;
    addToCharts(frame);
  } else {
    remember(frame);
    apply(frame);
  }
  wake();
}

let remembered = 0;
function remember(event) {
  remembered += 1;
  events = [{ ...event, key: `${remembered}` }, ...events].slice(0, EVENTS_KEPT);
}

/** What an event changes is shown at once; the next frame says the rest. */
function apply(event) {
  if (event.type === "LaneDown" || event.type === "LaneUp") {
    const now = latest.lanes[event.lane];
    const state = event.type === "LaneDown" ? "down" : "up";
    const changed = { ...now, state, since: event.ts, why: event.message ?? null };
    announce(event.lane, now.state, changed);
    const lanes = { ...latest.lanes, [event.lane]: changed };
    latest = { ...latest, lanes, status: statusOf(lanes) };
    // An outage shorter than the pause between two frames is an outage.
    addToCharts({ ts: event.ts, lanes });
  } else if (event.type === "RouteReloaded") {
    const { ok, ts, changes, problems } = event;
    latest = { ...latest, reload: { ok, at: ts, changes, problems: problems ?? [] } };
    readRoutes();
  }
}

/** As the bridge says it of its lanes. */
function statusOf(lanes) {
  const states = new Set(LANES.map((name) => lanes[name].state));
  if (states.size > 1) return "degraded";
  return states.has("up") ? "ok" : [...states][0];
}

async function readRoutes() {
  const answer = await fetch("./routes");
  ({ routes } = await answer.json());
  wake();
}

function announce(name, before, { state, why }) {
  if (before && before !== state) say(byId("announce"), `The ${name} lane is ${state}. ${why ?? ""}`);
}

/** Where the bridge listens for clients, as this browser reaches it. */
function publicUrl() {
  if (!latest) return null;
  const { listen } = latest;
  const port = listen.slice(listen.lastIndexOf(":") + 1);
  const address = listen.slice(0, listen.lastIndexOf(":"));
  const host = address === "0.0.0.0" || address === "[::]" ? location.hostname : address;
  return `${location.protocol === "https:" ? "wss" : "ws"}://${host}:${port}/ws`;
}

function showView() {
  const [named, ...rest] = location.hash.slice(1).split("/");
  const view = VIEWS.includes(named) ? named : VIEWS[0];
  for (const section of document.querySelectorAll("[data-view]"))
    section.hidden = section.dataset.view !== view;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "explain" && rest.length) explain(decoded(rest.join("/")));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

explaining((topic) => {
  const wanted = `#explain/${encodeURIComponent(topic)}`;
  // Asked for once more, it is explained once more: a reload may have changed it.
  if (location.hash === wanted) explain(topic);
  else location.hash = wanted;
});
inspector(publicUrl);
window.addEventListener("hashchange", showView);
showView();

const linked = byId("link");
const gone = byId("lost");
const monitor = new URL("./api/monitoring/ws", location.href.replace(/^http/, "ws").replace(/#.*$/, ""));
keep(
  () => monitor,
  {
    opened() {
      say(linked, "live");
      document.body.classList.remove("stale");
      gone.hidden = true;
    },
    frame: heard,
    lost(pauseMs) {
      say(linked, "not connected");
      document.body.classList.add("stale");
      gone.hidden = false;
      const told = latest ? ` What stands below is from ${time(latest.ts)}.` : "";
      say(gone, `No connection to the bridge; trying again in ${milliseconds(pauseMs)}.${told}`);
    },
  },
  { silenceMs: SILENCE_MS },
);
