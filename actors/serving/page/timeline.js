// Requests and what became of them, by token position: a span from the request to its target, and a mark where it
// ended. Shapes differ as well as colours.

import { html, number, svg } from "./dom.js";
import { packLanes } from "./layout.js";
import { OUTCOMES, outcomeOf, reasonOf } from "./race.js";
import { planInWords } from "./tree.js";

const SHOWN = 400; // positions drawn; the last ones
const LANE = 20;
const HEAD = 40;
const COLUMN = { least: 34, most: 132 };

// Columns (token positions) and spans with their lanes. Pure.
export function layoutTimeline(system) {
  const tokens = system.end ? [...system.tokens, system.end] : system.tokens;
  const start = tokens.length ? tokens[0].position : system.requests[0].position;
  const first = Math.max(start, (tokens.at(-1)?.position ?? start) - SHOWN);
  const requests = system.requests.filter((request) => request.position >= first);
  const ends = requests.map((request) => Math.max(request.position, endOf(request)));
  const last = Math.max(first, tokens.at(-1)?.position ?? first, ...ends);
  const lanes = packLanes(requests.map((request, i) => [request.position, ends[i]]));
  const words = new Map(tokens.map((token) => [token.position, token]));
  return {
    columns: Array.from({ length: last - first + 1 }, (_, i) => ({ position: first + i, token: words.get(first + i) ?? null })),
    spans: requests.map((request, i) => ({ request, lane: lanes[i], from: request.position, to: request.target, end: endOf(request), reason: reasonOf(request) })),
    lanes: Math.max(1, ...lanes.map((lane) => lane + 1)),
  };
}

// Where a request ended: a late plan at the position at which it was written, everything else at its target.
const endOf = (request) => request.injection?.position ?? request.target;

export function drawTimeline(box, system, width, onPoint) {
  if (!system.requests.length) {
    box.replaceChildren();
    return;
  }
  const { columns, spans, lanes } = layoutTimeline(system);
  const column = Math.max(COLUMN.least, Math.min(COLUMN.most, (width - 16) / columns.length));
  const x = (position) => 8 + column * (position - columns[0].position + 0.5);
  const height = HEAD + LANE * lanes + 12;
  const written = new Set(spans.filter((span) => span.request.injection).map((span) => span.end));
  const heads = columns.map(({ position, token }) =>
    svg("g", { class: token?.injected ? "head injected" : token ? "head" : "head ahead", transform: `translate(${x(position)} 0)` },
      svg("line", { class: written.has(position) ? "grid written" : "grid", y1: HEAD - 8, y2: height - 4 }),
      svg("text", { y: 14 }, clip(token?.text ?? "·", column)),
      svg("text", { class: "position", y: 27 }, String(position)),
    ),
  );
  const rows = spans.map((span) => {
    const y = HEAD + LANE * (span.lane + 0.5);
    const kind = span.reason === null ? "open" : outcomeOf(span.reason).mark;
    const { plan } = span.request;
    return svg("g", { class: `span ${kind} ${span.reason ?? ""}`, onpointerenter: () => onPoint?.(span.request), onpointerleave: () => onPoint?.(null) },
      svg("line", { class: "reach", x1: x(span.from), x2: Math.max(x(span.to), x(span.from) + 1), y1: y, y2: y }),
      span.end > span.to && svg("line", { class: "carried", x1: x(span.to), x2: x(span.end), y1: y, y2: y }),
      svg("line", { class: "asked", x1: x(span.from), x2: x(span.from), y1: y - 5, y2: y + 5 }),
      plan && span.reason !== null && span.to > span.from && svg("circle", { class: "came", cx: Math.min(Math.max(x(plan.position), x(span.from)), x(span.end)), cy: y, r: 2.5 }),
      span.reason === null
        ? svg("circle", { class: "mark waiting", cx: x(span.to), cy: y, r: 2 })
        : mark(kind, x(span.end), y),
      svg("rect", { class: "hit", x: x(span.from) - 8, y: y - LANE / 2, width: x(Math.max(span.end, span.to)) - x(span.from) + 16, height: LANE }),
      svg("title", {}, inWords(span)),
    );
  });
  box.replaceChildren(
    svg("svg", { width: Math.max(width, 16 + column * columns.length), height, class: "timeline", role: "img", "aria-label": describe(spans) }, heads, rows),
  );
}

const clip = (text, column) => {
  const room = Math.max(2, Math.floor(column / 8));
  const word = text.trim() || "·";
  return word.length > room ? `${word.slice(0, room - 1)}…` : word;
};

function mark(kind, x, y) {
  const shapes = {
    disc: () => svg("circle", { r: 6 }),
    ring: () => svg("circle", { r: 5 }),
    triangle: () => svg("path", { d: "M0 -7L6.5 5H-6.5Z" }),
    diamond: () => svg("path", { d: "M0 -6.5L6.5 0L0 6.5L-6.5 0Z" }),
    cross: () => svg("path", { d: "M-5 -5L5 5M5 -5L-5 5" }),
    square: () => svg("rect", { x: -5, y: -5, width: 10, height: 10 }),
    block: () => svg("rect", { x: -5, y: -5, width: 10, height: 10 }),
    minus: () => svg("path", { d: "M-6 0H6" }),
    bar: () => svg("path", { d: "M0 -6V6" }),
  };
  return svg("g", { class: `mark ${kind}`, transform: `translate(${x} ${y})` }, shapes[kind]());
}

function inWords({ request, from, to, end, reason }) {
  const outcome = reason === null ? "open" : outcomeOf(reason).word;
  const where = end > to ? `, written before position ${end}` : "";
  return `asked at ${from} for ${to}: ${outcome}${where}${request.plan ? `; plan ${planInWords(request.plan)}` : ""}`;
}

function describe(spans) {
  const counts = new Map();
  for (const { reason } of spans) {
    const word = reason === null ? "open" : outcomeOf(reason).word;
    counts.set(word, (counts.get(word) ?? 0) + 1);
  }
  return `${spans.length} plans asked for: ${[...counts].map(([word, count]) => `${count} ${word}`).join(", ")}. The table below has each.`;
}

// Marks that stand for more than one outcome.
const SHARED = { lost: "lost, damaged, old version", declined: "declined, shed" };

export function drawLegend(list) {
  const item = (drawing, word, says) =>
    html("li", { title: says || undefined }, svg("svg", { width: 18, height: 16, class: "timeline", "aria-hidden": "true" }, drawing), word);
  list.replaceChildren(
    item(svg("g", { class: "span" }, svg("line", { class: "asked", x1: 3, x2: 3, y1: 3, y2: 13 }), svg("line", { class: "reach", x1: 3, x2: 17, y1: 8, y2: 8 })), "asked → target"),
    item(svg("g", { class: "span" }, svg("line", { class: "reach", x1: 1, x2: 17, y1: 8, y2: 8 }), svg("circle", { class: "came", cx: 9, cy: 8, r: 2.5 })), "plan came"),
    ...Object.entries(OUTCOMES)
      .filter(([reason]) => !["malformed", "old_version", "shed"].includes(reason))
      .map(([reason, { mark: kind, word, says }]) => item(svg("g", { class: `span ${kind} ${reason}` }, mark(kind, 9, 8)), SHARED[reason] ?? word, says)),
  );
}

export function drawTable(body, system) {
  body.replaceChildren(
    ...system.requests.map((request) => {
      const reason = reasonOf(request);
      const event = request.injection ?? request.plan;
      return html("tr", {},
        html("td", {}, String(request.position)),
        html("td", {}, String(request.target)),
        html("td", {}, reason === null ? "open" : outcomeOf(reason).word),
        html("td", {}, request.injection ? `before ${request.injection.position}` : "–"),
        html("td", {}, event ? `${number(event.value_now)} → ${number(event.value_planned)}` : "–"),
        html("td", {}, event ? planInWords(event) : "–"),
      );
    }),
  );
}
