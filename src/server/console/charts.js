// The last minutes of both lanes on one axis.
//
// What the bridge says every 2 s is kept here, in a ring: the page draws what it has heard itself.

import uPlot from "./vendor/uPlot.esm.js";
import { byId, element, milliseconds, perSecond, say } from "./dom.js";
import { LANES } from "./lanes.js";

const KEPT_SECONDS = 300;
// Frames come every 2 s; where they did not, the curves have a hole.
const HOLE_SECONDS = 5;
const HEIGHT = 196;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const LATENCY = { choices: ["probe", "publish", "delivery"], lines: ["p50", "p99"], said: milliseconds };
const RATES = { choices: ["rate"], lines: ["in", "out"], said: perSecond };

/** Both charts; `add` takes a frame, `mend` tells them that the colours changed. */
export function charts() {
  const heard = [];
  const latency = chart("latency", LATENCY, heard, {
    scale: { distr: 3, range: (_, least, most) => decades(least, most) },
    splits: (_, __, least, most) => decadesBetween(least, most),
    ticks: (_, splits) => splits.map(tick),
  });
  const rates = chart("rates", RATES, heard, {
    scale: { range: (_, __, most) => [0, Math.max(1, (most ?? 0) * 1.3)] },
    ticks: (_, splits) => splits.map((rate) => (rate >= 10_000 ? `${rate / 1000}k` : `${rate}`)),
  });
  for (const choice of document.querySelectorAll("input[name=measure]")) {
    choice.addEventListener("change", () => latency.choose(choice.value));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    latency.draw();
    rates.draw();
  });
  return (frame) => {
    const at = new Date(frame.ts).getTime() / 1000;
    const last = heard.at(-1);
    if (last && at <= last.at) return;
    if (last && at - last.at > HOLE_SECONDS) heard.push({ at: last.at + 1, lanes: null });
    heard.push({ at, lanes: frame.lanes });
    while (heard[0].at < at - KEPT_SECONDS) heard.shift();
    latency.draw();
    rates.draw();
  };
}

// A lane that is down has no latency, whatever was measured before.
const VALUES = {
  p50: (lane, choice) => (lane.state === "down" ? null : lane[choice].p50_ms),
  p99: (lane, choice) => (lane.state === "down" ? null : lane[choice].p99_ms),
  in: (lane) => lane.in_per_second,
  out: (lane) => lane.out_per_second,
};

function chart(id, { choices, lines, said }, heard, { scale, splits, ticks }) {
  const place = byId(id);
  let choice = choices[0];
  const curves = LANES.flatMap((lane) => lines.map((line, at) => ({ lane, line, dashed: at === 1 })));
  const legend = curves.map(({ lane, line, dashed }) => {
    const value = element("span", { class: "value" });
    const mark = element("span", { "class": dashed ? "mark dashed" : "mark", "data-lane": lane });
    byId(`${id}-legend`).append(element("li", {}, mark, `${lane} ${line} `, value));
    return value;
  });
  const valueOf = ({ lane, line }, sample) => {
    const of = sample?.lanes?.[lane];
    return of ? VALUES[line](of, choice) : null;
  };
  const axis = {
    stroke: () => colour("faint-text"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: () => colour("grid"), width: 1 },
    ticks: { show: false },
  };
  const plot = new uPlot(
    {
      width: place.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "console" }, y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: true, range: (_, __, last) => [last - KEPT_SECONDS, last] }, y: scale },
      axes: [
        { ...axis, size: 26, values: "{HH}:{mm}:{ss}", space: 90 },
        { ...axis, size: 56, values: ticks, splits, space: 24 },
      ],
      series: [
        {},
        ...curves.map(({ lane, dashed }) => ({
          stroke: () => colour(lane),
          width: dashed ? 1.25 : 2,
          dash: dashed ? [4, 3] : undefined,
          points: { show: false },
        })),
      ],
      hooks: {
        drawClear: [(plot) => shadeOutages(plot, heard)],
        setCursor: [() => showLegend()],
      },
    },
    [[], ...curves.map(() => [])],
    place,
  );

  const showLegend = () => {
    const sample = heard[plot.cursor.idx ?? heard.length - 1];
    curves.forEach((curve, at) => say(legend[at], said(valueOf(curve, sample))));
  };
  const draw = () => {
    plot.setData([
      heard.map((sample) => sample.at),
      ...curves.map((curve) => heard.map((sample) => valueOf(curve, sample))),
    ]);
    showLegend();
  };
  new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
  return {
    draw,
    choose: (chosen) => {
      choice = chosen;
      draw();
    },
  };
}

/** While a lane is not up, the background says so, by colour and word. */
function shadeOutages(plot, heard) {
  const { left, top, width, height } = plot.bbox;
  const { ctx } = plot;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  const words = [];
  LANES.forEach((lane, row) => {
    let before = "up";
    heard.forEach((sample, at) => {
      const standing = sample.lanes?.[lane].state ?? "up";
      const began = standing !== before;
      before = standing;
      if (standing === "up") return;
      const until = heard[at + 1]?.at ?? sample.at;
      const [from, to] = [sample.at, until].map((at) => Math.round(plot.valToPos(at, "x", true)));
      ctx.fillStyle = colour(`${standing}-shade`);
      ctx.fillRect(from, top, to - from, height);
      if (began) words.push({ lane, standing, from, row });
    });
  });
  for (const { lane, standing, from, row } of words) {
    ctx.fillStyle = colour(standing);
    const word = `${lane} ${standing}`;
    const room = left + width - ctx.measureText(word).width;
    ctx.fillText(word, Math.min(from + 4 * ratio, room), top + (3 + 14 * row) * ratio);
  }
  ctx.restore();
}

/** Whole decades around what is shown, at least two of them. */
function decades(least, most) {
  let low = Math.floor(Math.log10(least > 0 ? least : 0.1));
  const high = Math.max(Math.ceil(Math.log10(most > 0 ? most : 10)), low + 1);
  if (high - low < 2) low = high - 2;
  return [10 ** low, 10 ** high];
}

function decadesBetween(least, most) {
  const splits = [];
  for (let at = Math.round(Math.log10(least)); at <= Math.round(Math.log10(most)); at += 1)
    splits.push(10 ** at);
  return splits;
}

const tick = (ms) => (ms >= 1000 ? `${ms / 1000} s` : `${ms < 0.01 ? ms.toFixed(3) : ms} ms`);
