// Which lane a topic takes, and who said so.

import { NONE, byId, element, laneName, scrolled } from "./dom.js";

const form = byId("explain-form");
const explained = byId("explained");

/** `choose` is told a topic that somebody typed. */
export function explaining(choose) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    choose(form.elements.topic.value.trim());
  });
}

export async function explain(topic) {
  form.elements.topic.value = topic;
  try {
    const answer = await fetch(`./explain/${encodeURIComponent(topic)}`);
    const told = await answer.json();
    // Somebody may have asked for another one meanwhile.
    if (form.elements.topic.value !== topic) return;
    explained.replaceChildren(...(answer.ok ? shown(told) : [refused(told.error.message)]));
  } catch (problem) {
    explained.replaceChildren(refused(`The bridge gave no answer: ${problem.message}`));
  }
}

const refused = (message) => element("p", { class: "bad" }, message);

function shown({
  topic,
  why,
  route,
  lane,
  nats_subject,
  pulsar_topic,
  options = [],
  settings = [],
  also_match = [],
}) {
  if (!route) return [element("p", { class: "verdict bad" }, why)];
  const verdict = element(
    "p",
    { class: "verdict" },
    element("code", {}, topic),
    " takes the lane ",
    laneName(lane),
    " by the route ",
    element("code", {}, route),
    ". ",
    why,
  );
  const names = [
    ["NATS subject", nats_subject],
    ["Pulsar topic", pulsar_topic],
  ].filter(([, name]) => name);
  const losers = also_match.map(({ route, topic, from, why }) => [`${route} (${topic})`, why, from]);
  return [
    verdict,
    ...names.map(([what, name]) => element("p", {}, `${what} `, element("code", {}, name))),
    rows("Options of the route", ["option", "value", "said by"], options.map(told)),
    ...(losers.length ? [rows("Routes that match as well", ["route", "why not", "said by"], losers)] : []),
    rows("Settings of the lane", ["setting", "value", "said by"], settings.map(told)),
  ];
}

const told = ({ name, value, from }) => [
  name,
  value === null ? NONE : typeof value === "string" ? value : JSON.stringify(value),
  from,
];

function rows(caption, heads, lines) {
  const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)));
  const body = lines.map((line) =>
    element(
      "tr",
      { class: line.at(-1) === "default" ? "by-default" : null },
      ...line.map((text) => element("td", {}, text)),
    ),
  );
  const table = element(
    "table",
    { class: "rows" },
    element("caption", {}, caption),
    element("thead", {}, head),
    element("tbody", {}, ...body),
  );
  return scrolled(caption.toLowerCase(), table);
}
