// Both systems over many problems: accuracy with its interval, and the exact test that they differ.

import { ApiError, checkAnswer, complete, getProblem } from "./api.js";
import { html, percent, svg } from "./dom.js";
import { NAMES, SYSTEMS } from "./race.js";
import { completionBody } from "./request.js";
import { formatP, mcnemar, wilson } from "./statistics.js";

const PARALLEL = 4;
const TRIES = 20;

export const emptyScore = () => ({ answered: 0, both: 0, onlyOne: 0, onlyTwo: 0, neither: 0 });

// The score with one more problem. Pure.
export function addResult(score, { one, two }) {
  const cell = one && two ? "both" : one ? "onlyOne" : two ? "onlyTwo" : "neither";
  return { ...score, answered: score.answered + 1, [cell]: score[cell] + 1 };
}

export const rightOf = (score) => ({ one: score.both + score.onlyOne, two: score.both + score.onlyTwo });

// Answers `count` problems from `start` on, a few at a time; `onScore(score)` after each. The first error ends it.
export async function runScore({ model, task, start, count, settings }, onScore, signal) {
  let score = emptyScore();
  let next = start;
  const stop = new AbortController();
  const any = AbortSignal.any([signal, stop.signal]);
  const worker = async () => {
    while (next < start + count) {
      const index = next++;
      const problem = await patiently(() => getProblem(task, index, any), any);
      const [one, two] = await Promise.all(
        SYSTEMS.map(async (name) => {
          const body = completionBody(name, { model, prompt: problem.prompt, settings, watch: false });
          const answer = await patiently(() => complete(body, any), any);
          return (await patiently(() => checkAnswer(task, problem.index, answer.choices[0].text, any), any)).correct;
        }),
      );
      score = addResult(score, { one, two });
      onScore(score);
    }
  };
  try {
    await Promise.all(Array.from({ length: Math.min(PARALLEL, count) }, worker));
  } finally {
    stop.abort();
  }
  return score;
}

// A full server is asked again when it says so.
async function patiently(ask, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 429 || tries === TRIES) throw error;
      await pause(1000 * Math.min(5, Math.max(0.1, error.retryAfter ?? 1)), signal);
    }
  }
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

// ------------------------------------------------------------------------------------------------------------- view

export function drawScore(box, score) {
  if (!score.answered) {
    box.replaceChildren();
    return;
  }
  const right = rightOf(score);
  const rows = SYSTEMS.map((name) => {
    const [low, high] = wilson(right[name], score.answered);
    return html("tr", { class: name },
      html("th", { scope: "row" }, html("span", { class: "swatch", "aria-hidden": "true" }), NAMES[name]),
      html("td", { class: "figure" }, percent(right[name] / score.answered, 1)),
      html("td", { class: "interval-cell" }, interval(right[name] / score.answered, low, high)),
      html("td", {}, `${percent(low, 1)} to ${percent(high, 1)}`),
      html("td", {}, `${right[name]} of ${score.answered}`),
    );
  });
  const { both, onlyOne, onlyTwo, neither } = score;
  box.replaceChildren(
    html("table", { class: "scores" },
      html("caption", { class: "hidden" }, "Accuracy of both systems"),
      html("thead", {}, html("tr", {}, ["System", "Accuracy", "0 to 100 %", "95 % Wilson interval", "Right"].map((head) => html("th", { scope: "col" }, head)))),
      html("tbody", {}, rows),
    ),
    html("p", { class: "test" },
      html("strong", {}, `McNemar p = ${formatP(mcnemar(onlyOne, onlyTwo))}`),
      ` (exact, two-sided). Right by System 2 only: ${onlyTwo}, by System 1 only: ${onlyOne}, by both: ${both}, by neither: ${neither}.`),
  );
}

function interval(share, low, high) {
  const x = (value) => 4 + 132 * value;
  return svg("svg", { class: "interval", width: 140, height: 18, "aria-hidden": "true" },
    svg("line", { class: "axis", x1: x(0), x2: x(1), y1: 9, y2: 9 }),
    svg("line", { class: "range", x1: x(low), x2: x(high), y1: 9, y2: 9 }),
    svg("circle", { cx: x(share), cy: 9, r: 4.5 }),
  );
}
