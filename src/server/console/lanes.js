// The two lanes side by side, in the same rows, so that they compare.

import {
  NONE,
  byId,
  bytes,
  count,
  element,
  milliseconds,
  perSecond,
  say,
  showState,
  span,
  state,
  time,
} from "./dom.js";

export const LANES = ["ephemeral", "durable"];

const MEASURES = [
  ["heartbeat", (lane) => lane.probe],
  ["publish", (lane) => lane.publish],
  ["delivery", (lane) => lane.delivery],
];

const isTrouble = (value) => value > 0;

// Each fact: what it is called, its value, how it is said, and when it is trouble.
const TRAFFIC = [
  ["in", (lane) => lane.in_per_second, perSecond],
  ["out", (lane) => lane.out_per_second, perSecond],
  ["errors", (lane) => lane.errors_per_second, perSecond, isTrouble],
  ["dropped", (lane) => lane.dropped_per_second, perSecond, isTrouble],
];

const HEARTBEATS = [
  ["last heartbeat", (lane) => lane.probe.last_ms, milliseconds],
  ["missing", (lane) => lane.probe.missing, count, isTrouble],
];

const BROKER = [
  ["version", (lane) => lane.broker?.version, (version) => version ?? NONE],
  ["connections", (lane) => lane.broker?.connections, count],
  ["subscriptions", (lane) => lane.broker?.subscriptions, count],
  ["slow consumers", (lane) => lane.broker?.slow_consumers, count, isTrouble],
  ["in", (lane) => lane.broker?.in_per_second, perSecond],
  ["out", (lane) => lane.broker?.out_per_second, perSecond],
];

const spool = (lane) => lane.outage?.spool;

const OUTAGE = [
  [
    "breaker",
    (lane) => lane.outage?.breaker,
    (breaker) => breaker ?? NONE,
    (breaker) => breaker !== "closed",
  ],
  ["open topics", (lane) => lane.outage?.open_topics, count, isTrouble],
  ["spooled", (lane) => spool(lane)?.messages, count, isTrouble],
  ["on disk", (lane) => spool(lane)?.bytes, bytes],
  ["oldest", (lane) => spool(lane)?.oldest_age_seconds, span],
  ["set aside", (lane) => spool(lane)?.set_aside, count, isTrouble],
];

const BACKLOG = [
  ["groups", (_, groups) => groups.length, count],
  ["backlog", (_, groups) => sum(groups, "backlog"), count],
  ["unacknowledged", (_, groups) => sum(groups, "unacked"), count],
  ["oldest", (_, groups) => oldest(groups), milliseconds],
];

const BUSIEST = 6;

const sum = (groups, field) => groups.reduce((total, group) => total + (group[field] ?? 0), 0);

function oldest(groups) {
  const ages = groups.map((group) => group.oldest_age_ms).filter((age) => typeof age === "number");
  return ages.length ? Math.max(...ages) : null;
}

/** Fills a lane's card; what it returns shows a frame in it. */
export function lane(name) {
  const card = byId(`lane-${name}`);
  const heading = element("h2", { id: `lane-${name}-name` }, name);
  const backend = element("span", { class: "backend" }, NONE);
  const standing = state("unknown");
  const since = element("p", { class: "since" });
  const why = element("p", { class: "why" });
  const heartbeats = facts(null, HEARTBEATS);
  const latencies = latencyTable();
  const parts = [facts("Traffic", TRAFFIC), facts("Broker", BROKER)];
  if (name === "durable") parts.push(facts("Outage", OUTAGE), facts("Consumer groups", BACKLOG));
  const busy = busiest(name);
  card.replaceChildren(
    element("header", {}, heading, backend, standing, since),
    why,
    element(
      "div",
      { class: "figures" },
      element("div", {}, latencies.node, heartbeats.node),
      ...parts.map((part) => part.node),
      busy.node,
    ),
  );
  return ({ lanes, groups, topics }) => {
    const lane = lanes[name];
    say(backend, lane.backend);
    card.dataset.state = lane.state;
    showState(standing, lane.state, lane.state);
    const lasts = Math.max(0, Math.floor((Date.now() - new Date(lane.since)) / 1000));
    say(since, `since ${time(lane.since)}, for ${span(lasts)}`);
    const reasons = [lane.why, lane.broker?.problem && `Broker: ${lane.broker.problem}`].filter(Boolean);
    say(why, reasons.join(" "));
    latencies.show(lane);
    busy.show(topics);
    for (const part of [heartbeats, ...parts]) part.show(lane, groups);
  };
}

/** The topics with the most messages into the bridge; one of both lanes is in both cards. */
function busiest(name) {
  const rows = Array.from({ length: BUSIEST }, () => {
    const [link, rate] = [element("a"), element("dd")];
    return { link, rate, node: element("div", {}, element("dt", {}, link), rate) };
  });
  const node = element(
    "div",
    { class: "facts-of busiest" },
    element("h3", {}, "Busiest topics"),
    element("dl", {}, ...rows.map((row) => row.node)),
  );
  const show = (topics) => {
    const busy = topics.filter((topic) => [name, "both"].includes(topic.lane) && topic.in_per_second > 0);
    busy.sort((a, b) => b.in_per_second - a.in_per_second);
    rows.forEach(({ link, rate, node }, at) => {
      node.hidden = at >= busy.length;
      if (node.hidden) return;
      link.href = `#explain/${encodeURIComponent(busy[at].name)}`;
      say(link, busy[at].name);
      say(rate, perSecond(busy[at].in_per_second));
    });
    node.classList.toggle("empty", busy.length === 0);
  };
  return { node, show };
}

function latencyTable() {
  const rows = MEASURES.map(([name, of]) => {
    const cells = [element("td"), element("td")];
    const node = element("tr", {}, element("th", { scope: "row" }, name), ...cells);
    return { of, cells, node };
  });
  const column = (name) => element("th", { scope: "col" }, name);
  const head = element("tr", {}, element("th", { scope: "col" }, "Latency"), column("p50"), column("p99"));
  const node = element(
    "table",
    { class: "latencies" },
    element("thead", {}, head),
    element("tbody", {}, ...rows.map((row) => row.node)),
  );
  const show = (lane) => {
    for (const { of, cells } of rows) {
      say(cells[0], milliseconds(of(lane)?.p50_ms));
      say(cells[1], milliseconds(of(lane)?.p99_ms));
    }
  };
  return { node, show };
}

function facts(title, rows) {
  const shown = rows.map(([name, of, said, troubled]) => {
    const value = element("dd", {}, NONE);
    return { of, said, troubled, value, node: element("div", {}, element("dt", {}, name), value) };
  });
  const node = element(
    "div",
    { class: "facts-of" },
    ...(title ? [element("h3", {}, title)] : []),
    element("dl", {}, ...shown.map((fact) => fact.node)),
  );
  const show = (lane, groups) => {
    for (const { of, said, troubled, value } of shown) {
      const now = of(lane, groups);
      say(value, said(now));
      const known = now !== null && now !== undefined;
      value.classList.toggle("bad", Boolean(known && troubled?.(now)));
    }
  };
  return { node, show };
}
