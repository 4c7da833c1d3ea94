// The state of a race: what the two systems have said and what became of System 2's plans. Pure: every function takes
// a state and returns a new one, so that a view can be drawn, exported and tested from it alone.
//
// A plan for target τ is written right before the token at τ is consumed; the token that it shapes first is at τ + 1.

export const SYSTEMS = ["one", "two"];

export const NAMES = { one: "System 1", two: "System 2" };

// What became of a request: the mark of the timeline, a word, and an explanation. `hit`: something usable came in time.
export const OUTCOMES = {
  on_time: { mark: "disc", hit: true, word: "on time", says: "written into the state at its target" },
  late: { mark: "triangle", hit: true, word: "late", says: "came after its target, carried forward and written weaker" },
  shut: { mark: "ring", hit: true, word: "gates shut", says: "on time, but promised no gain: nothing was written" },
  superseded: { mark: "diamond", hit: true, word: "superseded", says: "usable, but a newer plan was there as well" },
  mismatch: { mark: "cross", hit: false, word: "mismatch", says: "the text went another way than was assumed" },
  stale: { mark: "square", hit: false, word: "stale", says: "came too long after its target" },
  declined: { mark: "minus", hit: false, word: "declined", says: "never asked: it would have come too late" },
  shed: { mark: "minus", hit: false, word: "shed", says: "dropped by busy planners" },
  lost: { mark: "block", hit: false, word: "lost", says: "never came back" },
  malformed: { mark: "block", hit: false, word: "malformed", says: "came damaged" },
  old_version: { mark: "block", hit: false, word: "old version", says: "made with other weights" },
  ended: { mark: "bar", hit: false, word: "ended", says: "the answer was over first" },
};

export const outcomeOf = (reason) => OUTCOMES[reason] ?? { mark: "block", hit: false, word: reason, says: "" };

const freshSystem = () => ({
  status: "waiting", // then speaking; then done, cancelled or failed
  began: null, // when the request was sent, on the page's clock (ms)
  tokens: [], // {position, id, text, logprob, injected, t, at}
  text: "",
  requests: [], // in the order asked, see applyEvent
  latest: null, // id of the request whose plan came last
  log: [],
  finish: null,
  end: null, // {position, text, injected}: the verdict on itself that the model ends with; no part of the text
  usage: null,
  checked: null, // {correct, solution}
  error: null,
});

export const newRace = (prompt, problem, settings, model) => ({
  prompt,
  problem,
  settings,
  model,
  startedAt: Date.now(),
  systems: { one: freshSystem(), two: freshSystem() },
});

export const isOver = (system) => ["done", "cancelled", "failed"].includes(system.status);

export const raceIsOver = (race) => SYSTEMS.every((name) => isOver(race.systems[name]));

// One step of one system. `action.type`: sent, chunk, done, cancelled, failed, checked.
export function reduce(race, name, action) {
  const system = step(race.systems[name], action);
  return { ...race, systems: { ...race.systems, [name]: system } };
}

function step(system, action) {
  if (action.type === "checked") return { ...system, checked: action.result };
  if (isOver(system)) return system;
  switch (action.type) {
    case "sent":
      return { ...system, began: action.at };
    case "chunk":
      return applyChunk(system, action.chunk, action.at);
    case "done":
      return { ...system, status: "done" };
    case "cancelled":
      return { ...system, status: "cancelled" };
    case "failed":
      return { ...system, status: "failed", error: action.message };
    default:
      throw new Error(`action ${action.type} is unknown`);
  }
}

function applyChunk(system, chunk, at) {
  const choice = chunk.choices[0];
  const usage = chunk.usage ?? system.usage;
  if (!choice) return { ...system, usage };
  const extra = { ...chunk.crsm, ...choice.crsm };
  const tokens = (extra.tokens ?? []).map((token) => ({ ...token, t: extra.t ?? null, at }));
  const next = {
    ...system,
    usage,
    status: "speaking",
    text: system.text + (choice.text ?? ""),
    tokens: tokens.length ? [...system.tokens, ...tokens] : system.tokens,
    log: extra.log?.length ? [...system.log, ...extra.log] : system.log,
    finish: extra.finish ?? choice.finish_reason ?? system.finish,
  };
  const told = (extra.events ?? []).reduce((state, event) => applyEvent(state, event, at), next);
  return extra.verdict ? withEnd(told, extra.verdict) : told;
}

function withEnd(system, verdict) {
  const position = (system.tokens.at(-1)?.position ?? -1) + 1;
  const injected = system.requests.some((request) => request.injection?.position === position - 1);
  return { ...system, end: { position, text: verdict, injected } };
}

// A request: {id, position, target, lag, asked, plan, injection, rejection}, the last four events or null.
function applyEvent(system, event, at) {
  const stamped = { ...event, at };
  const id = event.request ?? `unasked-${system.requests.length}`;
  const index = system.requests.findIndex((request) => request.id === id);
  const known =
    index < 0
      ? { id, position: event.position, target: event.target, lag: event.lag, asked: null, plan: null, injection: null, rejection: null }
      : system.requests[index];
  const slot = { "crsm.request": "asked", "crsm.plan": "plan", "crsm.inject": "injection", "crsm.reject": "rejection" };
  if (!slot[event.type]) return system; // of a newer server
  const request = { ...known, [slot[event.type]]: stamped };
  const requests = index < 0 ? [...system.requests, request] : system.requests.with(index, request);
  return { ...system, requests, latest: event.type === "crsm.plan" ? id : system.latest };
}

// -------------------------------------------------------------------------------------------------------- questions

// Why a request ended, or null while it is open.
export const reasonOf = (request) => request.injection?.reason ?? request.rejection?.reason ?? null;

// The request whose plan shaped a token, or null.
export const requestBehind = (system, token) =>
  (token.injected && system.requests.find((request) => request.injection?.position === token.position - 1)) || null;

// Whose plan is shown if nobody asks for another: the latest; once all is said, the written one that promised most, as
// the latest looks beyond the end.
export function restingRequest(system) {
  const gain = ({ injection }) => injection.value_planned - injection.value_now;
  const written = system.requests.filter((request) => request.plan && request.injection);
  if (isOver(system) && written.length) return written.reduce((best, request) => (gain(request) > gain(best) ? request : best));
  return system.requests.find((request) => request.id === system.latest) ?? null;
}

export function planCounts(system) {
  const settled = system.requests.filter((request) => reasonOf(request) !== null);
  const written = settled.filter((request) => request.injection).length;
  const hits = settled.filter((request) => outcomeOf(reasonOf(request)).hit).length;
  return { asked: system.requests.length, settled: settled.length, hits, written };
}

// Tokens per second after the first one.
export function rateOf(system) {
  const { tokens } = system;
  if (tokens.length < 2) return null;
  const seconds = (tokens.at(-1).at - tokens[0].at) / 1000;
  return seconds > 0 ? (tokens.length - 1) / seconds : null;
}

export const firstTokenSeconds = (system) =>
  system.tokens.length && system.began !== null ? (system.tokens[0].at - system.began) / 1000 : null;

// One system's state at the end, in a sentence: what a screen reader says.
export function summary(race, name) {
  const system = race.systems[name];
  if (system.status === "failed") return `${NAMES[name]}: ${system.error}`;
  if (system.status === "cancelled") return `${NAMES[name]} was stopped.`;
  const verdict = system.checked === null ? "" : system.checked.correct ? " Right." : " Wrong.";
  return `${NAMES[name]} said: ${system.text.trim()}.${verdict}`;
}
