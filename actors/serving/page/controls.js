// The settings: what the sliders mean, what they show, and what is remembered of them. Only what was changed is stored,
// so that another model's own settings count for everything else.

import { byId } from "./dom.js";

const STORE = "crsm.settings";
const PACES = [1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 0]; // 0: none
const SHOW_PACE = 4; // tokens per second at which plans can be followed with the eye

const count = (noun) => (value) => `${value} ${noun}${value === 1 ? "" : "s"}`;

const doubling = (most) => {
  const steps = [];
  for (let value = 1; value < most; value *= 2) steps.push(value);
  return [...steps, most];
};

const range = (from, to) => Array.from({ length: Math.max(1, to - from + 1) }, (_, i) => from + i);

const hundredths = (most) => range(0, Math.round(100 * most)).map((value) => value / 100);

// What each slider can be set to, in order, and how a value reads. `limits` and `planners` are the server's.
function sliders(limits, planners) {
  return {
    pace: { steps: PACES, say: (value) => (value ? `${value} tokens/s` : "unpaced") },
    lag: { steps: range(0, Math.min(limits.max_lag ?? 8, 16)), say: count("token") },
    injection_rate: { steps: hundredths(1), say: (value) => value.toFixed(2) },
    simulations: { steps: doubling(Math.min(limits.max_simulations ?? 256, 1024)), say: String },
    planners: { steps: range(0, planners.maximum), say: String },
    hypotheses: { steps: range(1, Math.min(limits.max_hypotheses ?? 4, 8)), say: String },
    temperature: { steps: range(0, 30).map((value) => value / 20), say: (value) => (value ? value.toFixed(2) : "0 (greedy)") },
  };
}

export function readStored() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    return stored && typeof stored === "object" && !Array.isArray(stored) ? stored : {};
  } catch {
    return {};
  }
}

export function store(changes) {
  try {
    localStorage.setItem(STORE, JSON.stringify({ ...readStored(), ...changes }));
  } catch {
    // No storage: the settings last as long as the page.
  }
}

const nearest = (steps, value) => steps.reduce((best, step, i) => (Math.abs(step - value) < Math.abs(steps[best] - value) ? i : best), 0);

// Sets the controls up for a server; returns {values(), reset()}. `onPlanners(count)`: the planners slider was let go.
export function createControls(info, onPlanners) {
  const specs = sliders(info.limits ?? {}, info.planners);
  const own = { ...info.defaults, pace: info.defaults.pace ?? SHOW_PACE, seed: 0, planners: info.planners.count };
  for (const [name, spec] of Object.entries(specs)) {
    // The server's own value can always be chosen, whatever the steps are.
    if (name !== "pace" || own.pace) spec.steps = withValue(spec.steps, own[name]);
  }
  const values = { ...own };

  const setSlider = (name, value) => {
    const { steps, say } = specs[name];
    const input = byId(`set-${name}`);
    const index = name === "pace" && value === 0 ? steps.length - 1 : nearest(steps, value);
    Object.assign(input, { min: 0, max: steps.length - 1, step: 1, value: index });
    values[name] = steps[index];
    byId(`out-${name}`).textContent = say(values[name]);
    input.setAttribute("aria-valuetext", say(values[name]));
  };

  const setField = (name, value) => {
    byId(`set-${name}`).value = value;
    values[name] = value;
  };

  const setAll = (wanted) => {
    for (const name of Object.keys(specs)) setSlider(name, usable(wanted[name], own[name]));
    setField("max_tokens", Math.min(usable(wanted.max_tokens, own.max_tokens), info.limits?.max_tokens ?? Infinity));
    setField("seed", usable(wanted.seed, own.seed));
    const channels = [...byId("set-channel").options].map((option) => option.value);
    setField("channel", [wanted.channel, own.channel, "state"].find((channel) => channels.includes(channel)));
  };

  for (const [name, { steps }] of Object.entries(specs)) {
    const input = byId(`set-${name}`);
    input.addEventListener("input", () => {
      setSlider(name, specs[name].steps[input.valueAsNumber]);
      if (name !== "planners") store({ [name]: values[name] });
    });
    input.disabled = steps.length < 2;
  }
  byId("set-planners").addEventListener("change", () => onPlanners(values.planners));
  byId("set-max_tokens").max = info.limits?.max_tokens ?? "";
  for (const name of ["max_tokens", "seed"]) {
    byId(`set-${name}`).addEventListener("change", ({ target }) => {
      const value = Math.round(target.valueAsNumber);
      const inside = Number.isFinite(value) && value >= Number(target.min) && (!target.max || value <= Number(target.max));
      setField(name, inside ? value : values[name]);
      store({ [name]: values[name] });
    });
  }
  byId("set-channel").addEventListener("change", ({ target }) => {
    values.channel = target.value;
    store({ channel: values.channel });
  });
  if (info.clock === "virtual") {
    byId("set-pace").disabled = true;
    own.pace = 0;
    specs.pace = { steps: [0], say: () => "none: virtual clock" };
  }
  byId("planners-row").hidden = info.planners.maximum === 0;
  setAll({ ...own, ...readStored(), planners: info.planners.count });

  return {
    // What a request carries.
    values: () => {
      const { planners, ...settings } = values;
      return settings;
    },
    setPlanners: ({ count: planners }) => setSlider("planners", planners),
    reset: () => {
      store(Object.fromEntries(Object.keys(own).map((name) => [name, undefined])));
      setAll({ ...own, planners: values.planners });
    },
  };
}

const usable = (value, fallback) => (typeof value === "number" && Number.isFinite(value) ? value : fallback);

function withValue(steps, value) {
  if (steps.includes(value)) return steps;
  const tail = steps.at(-1) === 0 && steps.length > 1 ? [0] : []; // "unpaced" stays last
  return [...[...steps.slice(0, steps.length - tail.length), value].sort((a, b) => a - b), ...tail];
}
