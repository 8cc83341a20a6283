// Numbers, workers and requests. Rows are kept by their key, so that focus, selection and open details stay.

import { age, count, duration, element, percent, say } from "./elements.js";

export const STAGES = [
  ["tokenise", "tokenise"], ["place", "placed"], ["reserve", "decode reserved"], ["prefill_bus", "bus"], ["prefill_queue", "prefill queue"], ["prefill", "prefill"],
  ["other", "other, to the first token"], ["handle", "handle"], ["transfer", "KV transfer"], ["decode_queue", "decode queue"],
  ["first_step", "first decode step"], ["gap_other", "other, to the second token"], ["decode", "decode"], ["waiting", "so far"],
];
const NAMES = new Map(STAGES);

export function numbers(list, load, total) {
  const ended = load.outcomes;
  const tiles = [
    ["tokens a second", load.tokens_per_s < 10 ? load.tokens_per_s.toFixed(1) : count(load.tokens_per_s), "over ten seconds"],
    ["time to first token", duration(load.ttft_s), "median, last minute"],
    ["inter-token latency", duration(load.inter_token_s), "median, last minute"],
    ["live requests", count(total), stateText(load.states)],
    ["waiting for a worker", count(load.waiting), `${count(load.waiting_tokens)} prompt tokens`],
    ["finished, last minute", count(ended.finished), `${count(ended.cancelled)} cancelled · ${count(ended.failed)} failed`],
  ];
  tiles.forEach(([name, value, note], n) => {
    const tile = list.children[n] ?? list.appendChild(element("div", {}, element("dt"), element("dd", { class: "value" }), element("dd", { class: "note muted" })));
    say(tile.children[0], name);
    say(tile.children[1], value);
    say(tile.children[2], note);
  });
}

function stateText(states) {
  const parts = Object.entries(states).filter(([, n]) => n).map(([state, n]) => `${count(n)} ${state}`);
  return parts.length ? parts.join(" · ") : "none";
}

/** A table that becomes cards on a phone; the roles are written out, for some readers lose them with the layout. */
class Table {
  constructor(place, label, columns) {
    this.columns = columns;
    this.rows = new Map();
    this.body = element("tbody", { role: "rowgroup" });
    const heads = columns.map(({ name, kind }) => element("th", { role: "columnheader", scope: "col", class: kind }, name));
    this.table = element("table", { role: "table", "aria-label": label },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)), this.body);
    this.empty = element("p", { class: "muted empty" });
    place.append(this.table, this.empty);
  }

  show(items, empty) {
    this.table.hidden = !items.length;
    this.empty.hidden = !!items.length;
    say(this.empty, empty);
    const seen = new Set();
    items.forEach((item, n) => {
      const key = item.name ?? item.id;
      seen.add(key);
      const row = this.rows.get(key) ?? this.row(key);
      if (this.body.children[n] !== row) this.body.insertBefore(row, this.body.children[n] ?? null);
      row.dataset.state = item.state;
      this.columns.forEach(({ show }, column) => show(row.children[column], item));
    });
    for (const [key, row] of this.rows) {
      if (!seen.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
  }

  row(key) {
    const cells = this.columns.map(({ name, kind }, n) =>
      element(n ? "td" : "th", { role: n ? "cell" : "rowheader", scope: n ? null : "row", class: kind, "data-label": name }));
    const row = element("tr", { role: "row" }, ...cells);
    this.rows.set(key, row);
    return row;
  }
}

const text = (of) => (cell, item) => say(cell, of(item));

/** What a worker said last means nothing once it is gone. */
const alive = (of) => text((worker) => (gone(worker) ? "–" : of(worker)));

function gone(worker) {
  return worker.state === "lost" || worker.state === "stuck";
}

export function workerTable(place) {
  return new Table(place, "Workers", [
    { name: "worker", kind: "key", show: text((w) => w.name) },
    { name: "role", show: (cell, w) => { cell.className = `role ${w.role}`; say(cell, w.role); } },
    { name: "state", show: stateCell },
    { name: "running", kind: "number", show: alive((w) => count(w.running)) },
    { name: "waiting", kind: "number", show: alive((w) => count(w.waiting)) },
    { name: "tokens to read", kind: "number", show: alive((w) => count(w.queued_tokens)) },
    { name: "KV in use", kind: "number", show: meter },
    { name: "step", kind: "number", show: alive((w) => (w.step_age_s ? duration(w.step_age_s) : "idle")) },
    { name: "known for", kind: "number", show: text((w) => age(w.since_s)) },
  ]);
}

function stateCell(cell, worker) {
  cell.className = "state";
  const silent = ["lost", "stuck", "suspect"].includes(worker.state) ? `, silent for ${age(worker.silent_s)}` : "";
  say(cell, worker.state + silent);
}

function meter(cell, worker) {
  if (!cell.children.length) {
    cell.append(element("span", { class: "meter", "aria-hidden": "true" }, element("span", { class: "promised" }), element("span", { class: "used" })), element("span"));
    cell.className = `number kv ${worker.role}`;
  }
  const [bars, words] = cell.children;
  const here = gone(worker) ? 0 : 100;
  bars.children[0].style.width = `${worker.kv_promised * here}%`;
  bars.children[1].style.width = `${worker.kv_used * here}%`;
  say(words, here ? percent(worker.kv_used) : "–");
}

export function requestTable(place) {
  return new Table(place, "Live and recent requests", [
    { name: "request", kind: "key", show: (cell, r) => { cell.title = r.id; say(cell, shortened(r.id)); } },
    { name: "state", show: (cell, r) => { cell.className = "state"; say(cell, r.error ? `${r.state}: ${r.error}` : r.state); } },
    { name: "workers", kind: "path", show: text((r) => [r.prefill, r.decode].filter(Boolean).join(" → ") || "–") },
    { name: "attempts", kind: "number", show: text(attempts) },
    { name: "tokens", kind: "number", show: text((r) => `${count(r.prompt_tokens)} → ${count(r.completion_tokens)}`) },
    { name: "time", kind: "number", show: text((r) => duration(r.seconds)) },
    { name: "ended", kind: "number", show: text((r) => (r.ended_s === null ? "lives" : `${age(r.ended_s)} ago`)) },
    { name: "stages", kind: "stages", show: stages },
  ]);
}

function attempts(request) {
  const tried = `${request.attempts_prefill} + ${request.attempts_decode}`;
  return request.workers_lost ? `${tried}, ${request.workers_lost} lost` : tried;
}

function shortened(id) {
  const [kind, rest] = id.includes("-") ? [id.slice(0, id.indexOf("-") + 1), id.slice(id.indexOf("-") + 1)] : ["", id];
  return rest.length > 8 ? `${kind}${rest.slice(0, 8)}…` : id;
}

function stages(cell, request) {
  if (!cell.children.length) {
    cell.append(element("details", {}, element("summary", {}, element("span", { class: "bar", "aria-hidden": "true" }), element("span", { class: "unseen" })), element("ol", { class: "durations" }), element("p", { class: "key" }, request.id)));
  }
  const [summary, list] = cell.firstChild.children;
  const [bar, words] = summary.children;
  const total = request.bar.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  const parts = request.bar.filter(([, seconds]) => seconds > 0);
  resized(bar, parts.length, () => element("span"));
  resized(list, parts.length, () => element("li", {}, element("span", { class: "swatch", "aria-hidden": "true" }), element("span"), element("span", { class: "number" })));
  parts.forEach(([name, seconds], n) => {
    bar.children[n].className = `stage ${name}`;
    bar.children[n].style.flexGrow = `${seconds / total}`;
    const [swatch, label, time] = list.children[n].children;
    swatch.className = `swatch stage ${name}`;
    say(label, NAMES.get(name) ?? name);
    say(time, duration(seconds));
  });
  const longest = parts.reduce((a, b) => (b[1] > a[1] ? b : a), ["", 0]);
  say(words, longest[0] ? `longest: ${NAMES.get(longest[0]) ?? longest[0]}, ${duration(longest[1])}` : "nothing measured");
}

function resized(parent, size, make) {
  while (parent.children.length > size) parent.lastChild.remove();
  while (parent.children.length < size) parent.append(make());
}

export function legend(list) {
  for (const [name, words] of STAGES) {
    if (!["other", "gap_other", "waiting"].includes(name)) {
      list.append(element("li", {}, element("span", { class: `swatch stage ${name}`, "aria-hidden": "true" }), words));
    }
  }
  list.append(element("li", {}, element("span", { class: "swatch stage other", "aria-hidden": "true" }), "other"));
}
