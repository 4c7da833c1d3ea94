// Runs a race: a stream for each system, and the check of what it said. Everything that happens is dispatched to the
// reducer; nothing is kept here.

import { ApiError, checkAnswer, isAbort, streamCompletion } from "./api.js";
import { SYSTEMS } from "./race.js";
import { completionBody } from "./request.js";

// `dispatch(name, action)` returns the race after the action. Resolves when both systems are through; never rejects.
export function runRace(race, dispatch, onError, signal) {
  return Promise.all(SYSTEMS.map((name) => runSystem(race, name, dispatch, onError, signal)));
}

async function runSystem(race, name, dispatch, onError, signal) {
  const { model, prompt, problem, settings } = race;
  const body = completionBody(name, { model, prompt, settings, watch: true });
  try {
    dispatch(name, { type: "sent", at: performance.now() });
    for await (const { chunk, at } of streamCompletion({ ...body, stream_options: { include_usage: true } }, signal)) {
      dispatch(name, { type: "chunk", chunk, at });
    }
    const { text } = dispatch(name, { type: "done" }).systems[name];
    if (problem) dispatch(name, { type: "checked", result: await checkAnswer(problem.task, problem.index, text, signal) });
  } catch (error) {
    if (isAbort(error)) {
      dispatch(name, { type: "cancelled" });
      return;
    }
    dispatch(name, { type: "failed", message: error.message });
    onError(error);
    if (!(error instanceof ApiError)) console.error(error); // a mistake of the page itself
  }
}
