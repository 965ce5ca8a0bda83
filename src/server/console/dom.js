// Making elements, and saying numbers as people read them. What comes from outside enters the page as text.

export const byId = (id) => document.getElementById(id);

/** An element with its attributes and what is in it: nodes, or text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

/** What is wider than the page is scrolled, by the keyboard too. */
export const scrolled = (name, wide) =>
  element(
    "div",
    { "class": "scroll", "role": "region", "tabindex": "0", "aria-label": `Table of ${name}` },
    wide,
  );

/** Sets a text only where it differs, so that a selection in it stays. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** What was not measured. */
export const NONE = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const missing = (value) => value === null || value === undefined;

export const count = (value) => (missing(value) ? NONE : whole.format(value));

export function milliseconds(ms) {
  if (missing(ms)) return NONE;
  if (ms < 0.995) return `${ms.toFixed(2)} ms`;
  if (ms < 99.5) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return span(ms / 1000);
}

export function perSecond(rate) {
  if (missing(rate)) return NONE;
  return `${rate < 99.95 ? tenth.format(rate) : whole.format(rate)} /s`;
}

export function bytes(size) {
  if (missing(size)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? whole.format(size) : tenth.format(size)} ${units[unit]}`;
}

/** A span of time in its two largest units. */
export function span(seconds) {
  if (missing(seconds)) return NONE;
  if (seconds < 9.95) return `${Number.isInteger(seconds) ? seconds : seconds.toFixed(1)} s`;
  const parts = [
    ["d", 86400],
    ["h", 3600],
    ["min", 60],
    ["s", 1],
  ];
  let rest = Math.round(seconds);
  const first = parts.findIndex(([, length]) => rest >= length);
  const said = [];
  for (const [unit, length] of parts.slice(first, first + 2)) {
    const number = Math.floor(rest / length);
    rest -= number * length;
    if (number > 0) said.push(`${number} ${unit}`);
  }
  return said.join(" ");
}

const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const calendar = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** The time of day, with the date where it is not today's. */
export function time(when) {
  const date = new Date(when);
  if (Number.isNaN(date.getTime())) return NONE;
  return date.toDateString() === new Date().toDateString() ? clock.format(date) : calendar.format(date);
}

/** How a thing stands, by word and shape. */
export function state(standing) {
  const made = element(
    "span",
    { class: "state" },
    element("span", { class: "shape" }),
    element("span", { class: "word" }),
  );
  showState(made, standing, standing);
  return made;
}

export function showState(node, standing, word) {
  node.dataset.state = standing;
  say(node.querySelector(".word"), word);
}

/** A lane's name in the lane's colour. */
export const laneName = (lane) => element("span", { "class": "of-lane", "data-lane": lane }, lane);
