// The prompt box: built-in problems by task and number, or the reader's own words.

import { getProblem, isAbort } from "./api.js";
import { byId, html } from "./dom.js";
import { readStored, store } from "./controls.js";

const LARGEST = 1_000_000;

// `onChange(problem)`: another problem, or null while the prompt is the reader's own.
export function createProblemBox(info, onChange, onError) {
  const [task, index, prompt] = ["task", "index", "prompt"].map(byId);
  let loaded = null;
  let current; // what onChange was last told; undefined: nothing yet
  let loading = new AbortController();

  const note = () => {
    byId("prompt-note").textContent = current ? "A fresh problem: no model was trained on it." : "Your own words: nothing to check them against.";
  };

  const tell = (problem) => {
    if (problem === current) return;
    current = problem;
    note();
    onChange(problem);
  };

  const load = async () => {
    loading.abort();
    loading = new AbortController();
    try {
      loaded = await getProblem(task.value, indexOf(index), loading.signal);
    } catch (error) {
      if (!isAbort(error)) onError(error);
      return;
    }
    // Whoever was faster than the first problem keeps their own words.
    const typed = current === undefined && prompt.value.trim() !== "";
    if (!typed) prompt.value = loaded.prompt;
    store({ task: task.value, index: loaded.index });
    tell(typed ? null : loaded);
  };

  const go = (to) => {
    index.value = to;
    return load();
  };

  prompt.addEventListener("input", () => loaded && tell(prompt.value.trim() === loaded.prompt.trim() ? loaded : null));
  task.addEventListener("change", load);
  index.addEventListener("change", () => go(indexOf(index)));
  byId("next-problem").addEventListener("click", () => go(loaded ? indexOf(index) + 1 : indexOf(index)));
  byId("random-problem").addEventListener("click", () => go(Math.floor(Math.random() * 10_000)));

  const stored = readStored();
  task.replaceChildren(...info.tasks.map((name) => html("option", { value: name }, name.replaceAll("_", " "))));
  if (info.tasks.includes(stored.task)) task.value = stored.task;
  if (Number.isInteger(stored.index)) index.value = stored.index;
  const none = info.tasks.length === 0;
  for (const id of ["task", "index", "next-problem", "random-problem"]) byId(id).disabled = none;

  return {
    problem: () => current ?? null,
    prompt: () => (current ? current.prompt : prompt.value),
    load: none ? async () => tell(null) : load,
  };
}

const indexOf = (input) => Math.min(LARGEST, Math.max(0, Math.round(input.valueAsNumber) || 0));
