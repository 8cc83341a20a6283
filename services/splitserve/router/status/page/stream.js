// Snapshots of a router by server-sent events. `fetch` and not EventSource, which cannot send a key.

const SILENT_MS = 8000; // the router speaks every second
const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15000;

/**
 * Watch until the signal aborts. `on` is told: snapshot(value), lost(seconds until the next try), refused() when a key is
 * wanted, which ends the watching.
 */
export async function watch(key, on, signal, nudge) {
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    const began = await once(key, on, signal);
    if (began === "refused" || signal.aborted) return;
    if (began === "heard") pause = FIRST_PAUSE_MS;
    await waited(pause * (0.75 + Math.random() / 2), on, signal, nudge);
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

/** One connection to its end: "heard" when a snapshot came, "silent", or "refused". */
async function once(key, on, signal) {
  const ended = new AbortController();
  const end = () => ended.abort();
  signal.addEventListener("abort", end);
  let watchdog = setTimeout(end, SILENT_MS);
  let outcome = "silent";
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const answer = await fetch("status/events", { headers, cache: "no-store", signal: ended.signal });
    if (answer.status === 401) {
      on.refused();
      return "refused";
    }
    if (!answer.ok) return outcome;
    for await (const data of events(answer.body)) {
      clearTimeout(watchdog);
      watchdog = setTimeout(end, SILENT_MS);
      outcome = "heard";
      on.snapshot(JSON.parse(data));
    }
  } catch (error) {
    if (!(error instanceof TypeError || error.name === "AbortError")) throw error; // a lost connection is no fault of ours
  } finally {
    clearTimeout(watchdog);
    signal.removeEventListener("abort", end);
    end();
  }
  return outcome;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let at;
    while ((at = buffer.indexOf("\n\n")) >= 0) {
      const event = buffer.slice(0, at);
      buffer = buffer.slice(at + 2);
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

/** Wait, counting down aloud; `nudge` (an EventTarget) cuts it short with "now". */
function waited(milliseconds, on, signal, nudge) {
  return new Promise((resolve) => {
    const until = performance.now() + milliseconds;
    const tick = () => {
      const left = until - performance.now();
      if (left <= 0) finish();
      else on.lost(Math.ceil(left / 1000));
    };
    const timer = setInterval(tick, 250);
    const finish = () => {
      clearInterval(timer);
      signal.removeEventListener("abort", finish);
      nudge.removeEventListener("now", finish);
      resolve();
    };
    signal.addEventListener("abort", finish);
    nudge.addEventListener("now", finish);
    tick();
  });
}
