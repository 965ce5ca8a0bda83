// Drives the console in a real browser; ends with 1 where a promise does not hold.
//
//   drive.mjs ──"kill nats"──▶ the test, which does it ──"done"──▶ drive.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [page_url, screenshots] = process.argv.slice(2);
const require = createRequire(`${process.env.NODE_MODULES}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const PATIENCE_MS = 20_000;
const NOTICED_MS = 5_000;
const VIEWS = ["topics", "groups", "connections", "events", "inspector", "explain", "reload"];

// The test that goes away takes this with it.
const words = createInterface({ input: process.stdin });
words.on("close", () => process.exit(1));
const answers = words[Symbol.asyncIterator]();

async function ask(what) {
  console.log(what);
  const { value } = await answers.next();
  assert.equal(value, "done", what);
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  // Nobody but the bridge is to be asked for anything.
  args: ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"],
});
const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
page.setDefaultTimeout(PATIENCE_MS);
const complaints = [];
page.on("console", (said) => {
  if (["error", "warning"].includes(said.type())) complaints.push(`${said.type()}: ${said.text()}`);
});
page.on("pageerror", (error) => complaints.push(error.stack));
page.on("requestfailed", (request) => complaints.push(`${request.url()}: ${request.failure()?.errorText}`));
await page.exposeFunction("complain", (text) => complaints.push(text));
await page.addInitScript(() =>
  document.addEventListener("securitypolicyviolation", (violation) =>
    window.complain(`policy ${violation.violatedDirective}: ${violation.blockedURI}`),
  ),
);

const card = (lane, state) => page.locator(`#lane-${lane}[data-state=${state}]`);
const view = (name) => page.locator(`[data-view=${name}]`);
const show = async (name) => {
  await page.locator(`.views a[href="#${name}"]`).click();
  await view(name).waitFor();
};
const row = (name, ...texts) =>
  texts.reduce((rows, text) => rows.filter({ hasText: text }), view(name).locator("tbody tr")).first();
const frame = (type, ...texts) =>
  texts
    .reduce(
      (frames, text) => frames.filter({ hasText: text }),
      page.locator("#frames li").filter({ has: page.locator(`[data-type=${type}]`) }),
    )
    .first();

async function theLanesAreShown() {
  for (const [lane, backend] of [
    ["ephemeral", "nats"],
    ["durable", "pulsar"],
  ]) {
    await card(lane, "up").waitFor();
    assert.match(
      await card(lane, "up").innerText(),
      new RegExp(`${lane}\\s+${backend}\\s+up\\s+since \\d\\d:`),
    );
    const heartbeat = page.locator(`#lane-${lane} .latencies tr`).filter({ hasText: "heartbeat" });
    await heartbeat.filter({ hasText: /heartbeat\s*[\d.]+ ms\s*[\d.]+ ms/ }).waitFor();
  }
  assert.equal(await page.locator(".bar .state").innerText(), "ok");
  // As many curves as the legend names, each with its newest value.
  await page.waitForFunction(
    () =>
      [...document.querySelectorAll("#latency-legend .value")].filter((value) =>
        / ms$/.test(value.textContent),
      ).length === 4,
  );
  assert.ok(
    await page.evaluate(() => {
      const { width, height } = document.querySelector("#latency canvas");
      const pixels = document
        .querySelector("#latency canvas")
        .getContext("2d")
        .getImageData(0, 0, width, height).data;
      return new Set(new Uint32Array(pixels.buffer)).size > 10;
    }),
    "the curves are drawn",
  );
}

/** Goes on with the Tab key until what has the focus is what is looked for. */
async function tabTo(selector) {
  for (let presses = 0; presses < 60; presses += 1) {
    await page.keyboard.press("Tab");
    if (await page.evaluate((selector) => document.activeElement.matches(selector), selector)) return;
  }
  assert.fail(`the Tab key does not reach ${selector}`);
}

async function theKeyboardAloneSendsAMessageThatIsSeen() {
  await tabTo('.views a[href="#inspector"]');
  await page.keyboard.press("Enter");
  await tabTo("[name=pattern]");
  await page.keyboard.type("telemetry.>");
  await page.keyboard.press("Enter");
  await frame("ack", "telemetry.>").waitFor();
  await tabTo("[name=topic]");
  await page.keyboard.type("telemetry.console");
  await tabTo("[name=payload]");
  await page.keyboard.press("Control+A");
  await page.keyboard.type('{"travels": 12345678901234567890}');
  await tabTo("[name=publish]");
  await page.keyboard.press("Enter");
  await frame("publish", "telemetry.console").waitFor();
  await frame("ack", "telemetry.console", /after [\d.]+ ms/).waitFor();
  // The bytes that were typed, and not the number that a script makes of them.
  await frame(
    "event",
    'telemetry.console  ephemeral  {"travels":12345678901234567890}',
    /after [\d.]+ ms/,
  ).waitFor();
  await frame("event", "telemetry.console").locator("summary").click();
  await frame("event", '"travels": 12345678901234567890').locator("pre").waitFor();
}

async function publish(topic, payload, button = "publish") {
  await page.fill("#send [name=topic]", topic);
  await page.fill("#send [name=payload]", payload);
  await page.click(`#send [name=${button}]`);
}

async function bothLanesCarryWhatIsSent() {
  await page.fill("[name=pattern]", "orders.>");
  await page.click("#follow button:not(.chips button)");
  await frame("ack", "orders.>", "durable").waitFor();
  await publish("orders.console", "no JSON");
  await frame("event", "orders.console", '"no JSON"').waitFor();
  await page.locator("#outcome", { hasText: "orders.console: the message is on the durable lane" }).waitFor();
  await publish("svc.nobody", "1", "request");
  await frame("error", "NO_RESPONDERS").waitFor();
  await page.locator("#outcome.bad", { hasText: "NO_RESPONDERS" }).waitFor();
  await page.click('[aria-label="Unsubscribe from orders.>"]');
  await page.locator("#outcome", { hasText: "orders.>: unsubscribed" }).waitFor();
}

async function theTablesTellOfIt() {
  await show("topics");
  await row("topics", "telemetry.console", "ephemeral").waitFor();
  await row("topics", "orders.console", "durable").waitFor();
  await show("groups");
  await row("groups", "orders.backlog", "billing", "shared").waitFor();
  // How groups stand is looked at every ten seconds.
  await row("groups", "billing").locator("td:nth-child(6)", { hasText: /^3$/ }).waitFor();
  await show("connections");
  await row("connections", "console").waitFor();
  await show("events");
  await row("events", "TopicCreated", "telemetry.console").waitFor();
  await row("events", "GroupJoined", "billing").waitFor();
}

async function aTopicIsExplained() {
  await show("topics");
  await row("topics", "orders.console").locator("a").click();
  await view("explain")
    .locator(".verdict", { hasText: /takes the lane durable by the route orders\./ })
    .waitFor();
  await row("explain", "pulsar", "routes.toml:").waitFor();
  await page.fill("#explain-form [name=topic]", "no.such.route");
  await page.keyboard.press("Enter");
  await view("explain").locator(".verdict.bad", { hasText: "No route matches" }).waitFor();
}

async function aReloadIsTold() {
  await show("reload");
  await row("reload", "telemetry.>").waitFor();
  await ask("add a route");
  await view("reload")
    .locator(".verdict", { hasText: "1 route added" })
    .or(view("reload").locator(".verdict", { hasText: "added.by.reload" }))
    .first()
    .waitFor();
  await row("reload", "added.by.reload").waitFor();
}

async function aLaneGoesDownAndComesBack() {
  await ask("kill nats");
  await card("ephemeral", "down").waitFor({ timeout: NOTICED_MS });
  assert.equal(await page.locator("#lane-ephemeral .state").innerText(), "down");
  assert.notEqual(await page.locator("#lane-ephemeral .why").innerText(), "");
  assert.equal(await page.locator(".bar .state").innerText(), "degraded");
  assert.match(await page.locator("#announce").innerText(), /ephemeral lane is down/);
  await page.waitForFunction(() => document.title.startsWith("ephemeral down"));
  await card("durable", "up").waitFor();
  await show("inspector");
  await frame("info", "LANE_DOWN").waitFor();
  await page.screenshot({ path: `${screenshots}/down.png` });
  await ask("restart nats");
  await card("ephemeral", "up").waitFor({ timeout: NOTICED_MS });
  await page.waitForFunction(() => document.title === "twinspan");
}

async function aLostBridgeIsToldAndFoundAgain() {
  const other = await browser.newPage();
  let away = false;
  let socket;
  await other.routeWebSocket(/monitoring/, (opened) => {
    socket = opened;
    if (away) socket.close();
    else socket.connectToServer();
  });
  await other.goto(page_url);
  await other.locator("#lane-durable[data-state=up]").waitFor();
  away = true;
  await socket.close();
  await other.locator("#lost", { hasText: "No connection to the bridge" }).waitFor();
  await other.locator("body.stale").waitFor();
  away = false;
  await other.locator("#lost").waitFor({ state: "hidden" });
  await other.locator("#link", { hasText: "live" }).waitFor();
  await other.close();
}

/** In both schemes and both sizes each view can be read, also by who hears it, and none hangs over the edge. */
async function everybodyCanReadIt() {
  for (const colorScheme of ["light", "dark"]) {
    for (const [size, width, height] of [
      ["wide", 1440, 900],
      ["phone", 390, 844],
    ]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height });
      for (const name of VIEWS) {
        await show(name);
        await page.screenshot({ path: `${screenshots}/${size}-${colorScheme}-${name}.png`, fullPage: true });
        const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        assert.ok(over <= 0, `${name} is ${over} pixels too wide for a ${size} page`);
        if (!(await page.evaluate(() => "axe" in window))) await page.evaluate(axe);
        const { violations } = await page.evaluate(() => window.axe.run());
        const told = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join("; ")}`);
        assert.deepEqual(told, [], `${name}, ${size}, ${colorScheme}`);
      }
    }
  }
}

const promises = [
  theLanesAreShown,
  theKeyboardAloneSendsAMessageThatIsSeen,
  bothLanesCarryWhatIsSent,
  theTablesTellOfIt,
  aTopicIsExplained,
  aReloadIsTold,
  aLaneGoesDownAndComesBack,
  aLostBridgeIsToldAndFoundAgain,
  everybodyCanReadIt,
];
try {
  await page.goto(page_url);
  for (const promise of promises) {
    console.log(`# ${promise.name}`);
    await promise();
    assert.deepEqual(complaints, [], promise.name);
  }
} catch (failure) {
  await page.screenshot({ path: `${screenshots}/failed.png`, fullPage: true }).catch(() => {});
  console.error(failure, complaints);
  process.exitCode = 1;
}
words.removeAllListeners("close");
await browser.close();
process.exit();
