// A race as files: the server's event log (`crsm replay` says the same tokens again), and a Chrome trace for
// chrome://tracing or Perfetto. Both are made of what came over the stream.

import { NAMES, SYSTEMS, outcomeOf, reasonOf } from "./race.js";

// JSON lines; a generation after the other, each line as the server wrote it.
export const eventLog = (race) => SYSTEMS.flatMap((name) => race.systems[name].log).map((line) => `${line.trim()}\n`).join("");

// Trace events: a process per system; its tokens as slices on one track, every request as an asynchronous slice, what
// became of it as an instant, and the values of its plans as a counter. Times are the server's, moved by when the
// request was sent, so that both systems share one clock.
export function chromeTrace(race) {
  const began = Math.min(...SYSTEMS.map((name) => race.systems[name].began ?? Infinity));
  const events = SYSTEMS.flatMap((name, index) => traceSystem(race.systems[name], name, index + 1, began));
  return {
    displayTimeUnit: "ms",
    otherData: {
      model: race.model,
      prompt: race.prompt,
      problem: race.problem ? `${race.problem.task} ${race.problem.index}` : null,
      started: new Date(race.startedAt).toISOString(),
      settings: race.settings,
    },
    traceEvents: events,
  };
}

function traceSystem(system, name, pid, began) {
  if (system.began === null) return [];
  const offset = (system.began - began) * 1000;
  const time = (event) => Math.round(offset + 1e6 * (event.t ?? (event.at - system.began) / 1000));
  const track = { pid, tid: 1 };
  const events = [
    { ph: "M", name: "process_name", pid, tid: 0, args: { name: NAMES[name] } },
    { ph: "M", name: "process_sort_index", pid, tid: 0, args: { sort_index: pid } },
    { ph: "M", name: "thread_name", ...track, args: { name: "tokens" } },
  ];
  let previous = Math.round(offset);
  for (const bundle of bundles(system.tokens)) {
    const end = Math.max(previous, time(bundle[0]));
    bundle.forEach(({ position, id, text, logprob, injected, at }, i) => {
      const from = previous + Math.round(((end - previous) * i) / bundle.length);
      const to = previous + Math.round(((end - previous) * (i + 1)) / bundle.length);
      const args = { position, id, logprob, injected, arrived_ms: Number((at - began).toFixed(3)), together: bundle.length };
      events.push({ ph: "X", cat: injected ? "token,injected" : "token", name: text.trim() || "␣", ...track, ts: from, dur: to - from, args });
    });
    previous = end;
  }
  for (const request of system.requests) events.push(...traceRequest(request, track, time));
  return events;
}

// Tokens that came together: nothing says when each was said, and they share the time evenly.
function bundles(tokens) {
  const found = [];
  for (const token of tokens) {
    const last = found.at(-1);
    if (last && last[0].t === token.t && last[0].at === token.at) last.push(token);
    else found.push([token]);
  }
  return found;
}

function traceRequest(request, track, time) {
  const { asked, plan, injection, rejection, position, target, lag } = request;
  const end = injection ?? rejection;
  const reason = reasonOf(request);
  const events = [];
  const common = { cat: "plan", name: `plan for ${target}`, id: String(request.id), ...track };
  if (asked) {
    const last = end ?? plan ?? asked;
    events.push({ ph: "b", ...common, ts: time(asked), args: { position, target, lag } });
    if (plan) {
      events.push({ ph: "n", ...common, ts: time(plan), args: { line: plan.line, assumed: plan.assumed, simulations: plan.simulations, planner: plan.planner } });
      events.push({ ph: "C", cat: "plan", name: "value", ...track, ts: time(plan), args: { now: plan.value_now, planned: plan.value_planned } });
    }
    events.push({ ph: "e", ...common, ts: Math.max(time(asked), time(last)), args: { reason: reason ?? "open" } });
  }
  if (end) {
    const args = injection
      ? { reason, lag, late: injection.late, gates: injection.gates, alpha: injection.alpha, line: injection.line }
      : { reason, lag };
    events.push({ ph: "i", s: "t", cat: "outcome", name: outcomeOf(reason).word, ...track, ts: time(end), args });
  }
  return events;
}

export const fileName = (race, ending) =>
  `crsm-${race.problem ? `${race.problem.task}-${race.problem.index}` : "prompt"}-${new Date(race.startedAt).toISOString().slice(0, 19).replaceAll(":", "")}.${ending}`;

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
