// The picture: router, prefill workers, KV transfer, decode workers. Load is fill and width.

import { count, percent, shape } from "./elements.js";

const NARROW = 620;
const GAP = 12;

/** Draw a snapshot `width` pixels wide. */
export function flow(snapshot, width) {
  const columns = {
    prefill: snapshot.workers.filter((worker) => worker.role === "prefill"),
    decode: snapshot.workers.filter((worker) => worker.role === "decode"),
  };
  const places = placed(columns, width);
  const picture = shape("svg", {
    viewBox: `0 0 ${width} ${places.height}`, width, height: places.height, role: "img", "aria-label": told(snapshot, columns),
  });
  const lines = shape("g", { class: "lines" });
  toPrefill(lines, columns.prefill, places);
  for (const from of columns.prefill) {
    for (const to of columns.decode) {
      const link = snapshot.links.find((one) => one.prefill === from.name && one.decode === to.name);
      const d = across(places.at.get(from.name), places.at.get(to.name));
      lines.append(line(d, "transfer", link?.requests ?? 0, link?.moving ?? 0));
    }
  }
  toDecode(lines, snapshot, columns, places);
  picture.append(lines, router(snapshot, places.router));
  for (const role of ["prefill", "decode"]) {
    picture.append(heading(role, columns[role].length, places.columns[role]));
    for (const worker of columns[role]) picture.append(node(worker, places.at.get(worker.name)));
  }
  return picture;
}

function placed(columns, width) {
  const narrow = width < NARROW;
  const most = Math.max(columns.prefill.length, columns.decode.length, 1);
  const height = most > 6 ? 40 : 62;
  const top = narrow ? 118 : 30;
  const bottom = top + most * (height + GAP);
  const between = narrow ? 34 : Math.max(60, width * 0.11);
  const first = narrow ? 0 : 150 + between;
  const size = (width - first - between) / 2;
  const columnsAt = { prefill: { x: first, y: top - 10, w: size }, decode: { x: first + size + between, y: top - 10, w: size } };
  const at = new Map();
  for (const role of ["prefill", "decode"]) {
    const room = bottom - top;
    const offset = (room - columns[role].length * (height + GAP)) / 2;
    columns[role].forEach((worker, n) => {
      at.set(worker.name, { x: columnsAt[role].x, y: top + offset + n * (height + GAP), w: size, h: height });
    });
  }
  const router = narrow ? { x: (width - 190) / 2, y: 2, w: 190, h: 62 } : { x: 0, y: top + (bottom - top - GAP) / 2 - 38, w: 150, h: 76 };
  return { narrow, at, router, columns: columnsAt, height: narrow ? bottom : bottom + 32 };
}

/** What prefill workers read, or are asked to read. On a phone the column gets one line. */
function toPrefill(lines, workers, { at, router, narrow, columns }) {
  if (!workers.length) return;
  if (narrow) {
    const requests = workers.reduce((sum, worker) => sum + worker.requests, 0);
    lines.append(line(down(router, columns.prefill, 0.35), "prefill", requests));
    return;
  }
  for (const worker of workers) lines.append(line(across(router, at.get(worker.name)), "prefill", worker.requests));
}

/** Prompts that decode workers read themselves: round the prefill column. */
function toDecode(lines, snapshot, { decode }, { at, router, narrow, columns, height }) {
  if (!decode.length) return;
  const names = new Set(decode.map((worker) => worker.name));
  const split = snapshot.links.filter((link) => names.has(link.decode)).reduce((sum, link) => sum + link.requests, 0);
  const local = Math.max(0, decode.reduce((sum, worker) => sum + worker.requests, 0) - split);
  if (narrow) {
    lines.append(line(down(router, columns.decode, 0.65), "decode", local));
    return;
  }
  if (!local) return;
  const last = at.get(decode.at(-1).name), end = last.y + last.h + 2;
  const x = router.x + router.w / 2, y = height - 8, to = columns.decode.x + 40;
  lines.append(line(`M${x} ${router.y + router.h}C${x} ${y} ${x + 20} ${y} ${x + 60} ${y}H${to - 30}Q${to} ${y} ${to} ${Math.min(end + 20, y - 14)}V${end}`, "decode", local));
  const words = `${count(local)} read where ${local === 1 ? "it decodes" : "they decode"}`;
  lines.append(shape("text", { x: x + 64, y: y - 8, class: "heading decode" }, words));
}

function across(from, to) {
  const x = from.x + from.w, y = from.y + from.h / 2, end = to.y + to.h / 2, half = (to.x - x) / 2;
  return `M${x} ${y}C${x + half} ${y} ${to.x - half} ${end} ${to.x} ${end}`;
}

function down(router, column, share) {
  const x = router.x + router.w * share, y = router.y + router.h, end = column.x + column.w / 2, to = column.y + 10;
  return `M${x} ${y}C${x} ${y + 28} ${end} ${to - 28} ${end} ${to}`;
}

/** Thin and pale when nothing goes there, moving while KV is on its way. */
function line(d, phase, requests, moving = 0) {
  const width = requests ? Math.min(9, 1.5 + Math.sqrt(requests) * 1.4) : 1;
  const classes = `line ${phase}${requests ? " used" : ""}${moving ? " moving" : ""}`;
  return shape("path", { d, class: classes, "stroke-width": width });
}

function heading(role, workers, { x, y, w }) {
  return shape("text", { x, y, class: `heading ${role}` }, workers ? role : `no ${role} worker`);
}

function router(snapshot, { x, y, w, h }) {
  const { waiting } = snapshot.load;
  return shape("g", { transform: `translate(${x} ${y})`, class: "node router" },
    shape("rect", { width: w, height: h, rx: 10, class: "box" }),
    shape("text", { x: 14, y: 25, class: "name" }, "router"),
    shape("text", { x: 14, y: 44, class: "small" }, `${count(snapshot.live_total)} live`),
    shape("text", { x: h > 70 ? 14 : 74, y: h > 70 ? 61 : 44, class: waiting ? "small warn" : "small" }, `${count(waiting)} waiting`));
}

function node(worker, { x, y, w, h }) {
  const tall = h > 50;
  const dead = worker.state === "lost" || worker.state === "stuck";
  const group = shape("g", { transform: `translate(${x} ${y})`, class: `node ${worker.role} ${worker.state}` });
  const inside = w - 24;
  const numbers = dead ? worker.state : worker.state === "serving" ? `${count(worker.running)} run · ${count(worker.waiting)} wait` : worker.state;
  group.append(
    shape("title", {}, `${worker.name}: ${worker.state}, ${percent(worker.kv_used)} of its KV in use`),
    shape("rect", { width: w, height: h, rx: 9, class: "box" }),
    shape("text", { x: 12, y: tall ? 22 : 18, class: "name" }, fitted(worker.name, inside - (tall ? 0 : 96))),
    shape("text", { x: tall ? 12 : w - 12, y: tall ? 39 : 18, class: "small", "text-anchor": tall ? "start" : "end" }, numbers),
    shape("rect", { x: 12, y: h - 13, width: inside, height: 5, rx: 2.5, class: "track" }));
  if (!dead) {
    group.append(
      shape("rect", { x: 12, y: h - 13, width: inside * worker.kv_promised, height: 5, rx: 2.5, class: "promised" }),
      shape("rect", { x: 12, y: h - 13, width: inside * worker.kv_used, height: 5, rx: 2.5, class: "used" }));
    if (tall && w > 190) group.append(shape("text", { x: w - 12, y: 39, class: "small", "text-anchor": "end" }, `${percent(worker.kv_used)} KV`));
  }
  return group;
}

/** A name cut in its middle: host names differ at both ends. */
function fitted(name, width) {
  const most = Math.max(6, Math.floor(width / 8.8));
  if (name.length <= most) return name;
  const half = (most - 1) / 2;
  return `${name.slice(0, Math.ceil(half))}…${name.slice(-Math.floor(half))}`;
}

function told(snapshot, columns) {
  const moving = snapshot.links.reduce((sum, link) => sum + link.moving, 0);
  return `${columns.prefill.length} prefill and ${columns.decode.length} decode workers, ${snapshot.live_total} live requests, ${moving} with KV on its way`;
}
