// The page: one snapshot a second in, everything drawn from it. Draws nothing while nobody sees it.

import { age, element, say } from "./elements.js";
import { flow } from "./flow.js";
import { watch } from "./stream.js";
import { legend, numbers, requestTable, workerTable } from "./tables.js";

const SHORT = 15; // requests shown at first
const KEY = "splitserve-api-key";
const $ = (id) => document.getElementById(id);
const nudge = new EventTarget();
const workers = workerTable($("workers"));
const requests = requestTable($("requests"));

let watching = null;
let last = null;
let contact = "";
let everything = false;
let known = null; // worker -> state, as last told

legend($("legend"));
$("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  say($("login-error"), "");
  begin();
});
$("retry").addEventListener("click", () => nudge.dispatchEvent(new Event("now")));
$("more").addEventListener("click", () => {
  everything = !everything;
  $("more").setAttribute("aria-expanded", `${everything}`);
  if (last) listed(last);
});
document.addEventListener("visibilitychange", () => (document.hidden ? stop() : begin()));
new ResizeObserver(() => last && draw(last)).observe($("flow"));
begin();

function begin() {
  if (document.hidden) return;
  stop();
  watching = new AbortController();
  const signal = watching.signal;
  const mine = (act) => (value) => { if (!signal.aborted) act(value); };
  watch(sessionStorage.getItem(KEY), { snapshot: mine(show), lost: mine(lost), refused: mine(refused) }, signal, nudge);
}

function stop() {
  watching?.abort();
  watching = null;
}

function refused() {
  const tried = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  $("status").hidden = true;
  $("login").hidden = false;
  if (tried) say($("login-error"), "That key is not one of the router's.");
  tell("locked", "wait", "a key is wanted");
  $("key").focus();
}

function lost(seconds) {
  tell("lost", "bad", `lost contact · next try in ${seconds} s`);
  $("status").classList.toggle("stale", last !== null);
}

/** The pill in the header; a screen reader hears changes of kind, not the countdown. */
function tell(kind, tone, text) {
  $("contact").dataset.tone = tone;
  say($("contact-text"), text);
  $("retry").hidden = kind !== "lost";
  if (kind !== contact && contact) announce(kind === "lost" ? "Lost contact with the router." : kind === "live" ? "In contact with the router." : "");
  contact = kind;
}

function announce(text) {
  if (text) $("say").textContent = text;
}

function show(snapshot) {
  last = snapshot;
  const { router } = snapshot;
  $("login").hidden = true;
  $("status").hidden = false;
  $("status").classList.remove("stale");
  tell("live", router.why_not_ready ? "wait" : "good", router.why_not_ready ? "not ready" : "live");
  document.title = `splitserve · ${router.name}`;
  say($("about"), `${router.model} · ${router.name} · up ${age(router.up_s)} · ${router.version}`);
  notices(router);
  numbers($("numbers"), snapshot.load, snapshot.live_total);
  draw(snapshot);
  workers.show(snapshot.workers, "No worker was heard of yet. splitserve prefill and splitserve decode start one.");
  listed(snapshot);
  changes(snapshot.workers);
}

/** Live ones and the last few that ended, or all. */
function listed({ live, recent }) {
  const all = [...live, ...recent];
  $("more").hidden = all.length <= SHORT;
  say($("more"), everything ? "Show fewer" : `Show all ${all.length}`);
  requests.show(everything ? all : all.slice(0, SHORT), "No request yet.");
}

function draw(snapshot) {
  const width = Math.floor($("flow").clientWidth);
  if (width) $("flow").replaceChildren(flow(snapshot, width));
}

function notices(router) {
  const texts = [
    router.why_not_ready && `Not ready: ${router.why_not_ready}.`,
    !router.bus_up && "The bus is away: nothing new can be placed.",
    router.degraded && "Redis is away: requests go on, but a restart would forget them.",
  ].filter(Boolean);
  const place = $("notices");
  if (texts.join() !== [...place.children].map((child) => child.textContent).join()) {
    place.replaceChildren(...texts.map((text) => element("p", { class: "notice" }, text)));
  }
}

function changes(list) {
  const states = new Map(list.map((worker) => [worker.name, worker.state]));
  if (known) {
    const news = [...states].filter(([name, state]) => known.get(name) !== state).map(([name, state]) => `${name}: ${state}.`);
    announce(news.join(" "));
  }
  known = states;
}
