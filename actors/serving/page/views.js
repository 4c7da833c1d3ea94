// Everything that is drawn from a race. A view reads the state and draws; it keeps only what it has drawn.

import { byId, number, onWidth, percent, throttled } from "./dom.js";
import { drawEdgeList, drawGraph } from "./graph.js";
import { SYSTEMS, firstTokenSeconds, isOver, outcomeOf, planCounts, rateOf, reasonOf, restingRequest } from "./race.js";
import { createSpeech } from "./speech.js";
import { drawLegend, drawTable, drawTimeline } from "./timeline.js";
import { createTooltip } from "./tooltip.js";
import { drawRootMoves, drawTree, planInWords } from "./tree.js";

const TREE_INTERVAL = 250; // ms between two drawings of the tree, and
const GROW_INTERVAL = 700; // between two that grow

const PLACEHOLDERS = {
  one: "Says one word after the other; it cannot look ahead.",
  two: "Says them at the same pace, while planners search ahead and write into its memory.",
};

export function createViews() {
  let race = null;
  let problem = null;
  let pointed = null; // the request whose plan is pointed at
  let chosen = null; // the request that was stepped to
  let drawnPlan = null;
  let grewAt = -Infinity;

  const tooltip = createTooltip(byId("tooltip"), () => point(null));
  const speech = Object.fromEntries(
    SYSTEMS.map((name) => [name, createSpeech(byId(`${name}-said`), tooltip, PLACEHOLDERS[name], (request) => point(request))]),
  );

  const drawings = {
    graph: throttled(() => {
      const data = problem?.data?.edges ? problem.data : null;
      byId("graph-panel").hidden = !data;
      if (!data) return;
      const answers = Object.fromEntries(SYSTEMS.map((name) => [name, race?.systems[name].text ?? ""]));
      drawGraph(byId("graph"), data, answers, byId("graph").clientWidth);
      drawEdgeList(byId("graph-text"), data);
    }),
    tree: throttled(() => drawPlan(), TREE_INTERVAL),
    timeline: throttled(() => {
      const system = race?.systems.two;
      const box = byId("timeline");
      box.classList.toggle("empty", !system?.requests.length);
      if (!system?.requests.length) {
        box.replaceChildren("Every plan that is asked for appears here, from its request to its target.");
        byId("timeline-rows").replaceChildren();
        byId("timeline-note").textContent = "";
        return;
      }
      const following = box.scrollLeft + box.clientWidth >= box.scrollWidth - 40;
      drawTimeline(box, system, box.clientWidth, (request) => point(request));
      if (following && !isOver(system)) box.scrollLeft = box.scrollWidth;
      if (isOver(system) || byId("timeline-table").open) drawTable(byId("timeline-rows"), system);
      const { asked, settled, hits, written } = planCounts(system);
      byId("timeline-note").textContent =
        `${asked} asked for, ${written} written${settled ? `, ${percent(hits / settled)} of ${settled} usable in time` : ""}` +
        (system.tokens.length > 400 ? "; the last 400 positions are drawn" : "");
    }, 100),
    speech: throttled(() => {
      if (race) for (const name of SYSTEMS) drawSystem(name);
    }),
  };

  function drawPlan() {
    const system = race?.systems.two;
    const request = pointed?.plan ? pointed : chosen ?? (system ? restingRequest(system) : null);
    const plan = request?.plan ?? null;
    const box = byId("tree");
    drawStepper(system, request);
    box.classList.toggle("empty", !plan?.tree);
    if (!plan) {
      box.replaceChildren("The tree of the latest plan grows here while System 2 speaks.");
      byId("tree-words").textContent = " ";
      byId("tree-moves").replaceChildren();
      drawnPlan = null;
      return;
    }
    const now = performance.now();
    const fresh = plan !== drawnPlan && !pointed && !chosen;
    const grow = fresh && now - grewAt > GROW_INTERVAL;
    if (grow) grewAt = now;
    // A pending animation is not started over by a drawing of the same plan.
    if (plan !== drawnPlan || box.dataset.width !== String(box.clientWidth)) {
      drawTree(box, plan, box.clientWidth, grow);
      drawRootMoves(byId("tree-moves"), plan);
      box.dataset.width = box.clientWidth;
      drawnPlan = plan;
    }
    const assumed = plan.assumed?.trim();
    byId("tree-words").textContent =
      `For position ${plan.target}${assumed ? `, after “${assumed}”` : ""}: ${planInWords(plan)}. ` +
      `Value ${number(plan.value_now)} → ${number(plan.value_planned)}, ${plan.simulations} simulations; ${fateOf(request)}.`;
  }

  function drawStepper(system, request) {
    const plans = system?.requests.filter((each) => each.plan) ?? [];
    const at = plans.findIndex((each) => each.id === request?.id);
    byId("plan-number").textContent = plans.length ? `plan ${at + 1} of ${plans.length}` : " ";
    byId("plan-earlier").disabled = at <= 0;
    byId("plan-later").disabled = at < 0 || at === plans.length - 1;
  }

  function stepPlan(by) {
    const { two } = race.systems;
    const plans = two.requests.filter((each) => each.plan);
    const at = plans.findIndex((each) => each.id === (chosen ?? restingRequest(two)).id);
    const to = Math.min(plans.length - 1, Math.max(0, at + by));
    // At the last plan of a race that goes on, the next one is followed again.
    chosen = to === plans.length - 1 && !isOver(two) ? null : plans[to];
    drawings.tree();
  }

  function drawSystem(name) {
    const system = race.systems[name];
    speech[name].update(system);
    byId(`${name}-stats`).textContent = statsOf(system, name) || " ";
    const verdict = byId(`${name}-verdict`);
    const { word, kind } = verdictOf(system, race.problem);
    if (verdict.textContent !== word) verdict.textContent = word;
    verdict.className = `verdict ${kind}`;
  }

  function point(request) {
    if (request === pointed) return;
    pointed = request;
    drawings.tree();
  }

  byId("plan-earlier").addEventListener("click", () => stepPlan(-1));
  byId("plan-later").addEventListener("click", () => stepPlan(1));
  drawLegend(byId("timeline-legend"));
  for (const name of ["graph", "tree", "timeline"]) onWidth(byId(name), drawings[name]);

  const drawAll = () => Object.values(drawings).forEach((draw) => draw());
  return {
    tooltip,
    // Another problem, before its race.
    showProblem(next) {
      [problem, race] = [next, null];
      reset();
    },
    startRace(next) {
      [problem, race] = [next.problem, next];
      reset();
    },
    update(next) {
      race = next;
      drawAll();
    },
  };

  function reset() {
    tooltip.hide();
    pointed = chosen = null;
    grewAt = -Infinity;
    for (const name of SYSTEMS) {
      speech[name].clear();
      byId(`${name}-said`).classList.remove("speaking");
      byId(`${name}-stats`).textContent = " ";
      Object.assign(byId(`${name}-verdict`), { textContent: "", className: "verdict" });
    }
    drawAll();
  }
}

function fateOf(request) {
  const reason = reasonOf(request);
  return reason === null ? "on its way" : `${outcomeOf(reason).word}: ${outcomeOf(reason).says}`;
}

function verdictOf(system, problem) {
  if (system.status === "failed") return { word: "failed", kind: "bad" };
  if (system.status === "cancelled") return { word: "stopped", kind: "none" };
  if (system.checked) return system.checked.correct ? { word: "✓ right", kind: "good" } : { word: "✕ wrong", kind: "bad" };
  if (system.status === "done") return { word: problem ? "" : "not checked", kind: "none" };
  return { word: "", kind: "none" };
}

function statsOf(system, name) {
  const parts = [];
  const { tokens } = system;
  if (tokens.length) parts.push(`${tokens.length} tokens`);
  const rate = rateOf(system);
  if (rate) parts.push(`${number(rate, rate < 10 ? 1 : 0)} tokens/s`);
  const first = firstTokenSeconds(system);
  if (first !== null) parts.push(`first after ${number(first)} s`);
  if (name === "two" && system.requests.length) {
    const { written } = planCounts(system);
    parts.push(`${written} ${written === 1 ? "plan" : "plans"} written`);
  }
  if (system.finish && system.finish !== "stop") parts.push(`ended by ${system.finish}`);
  if (system.checked && !system.checked.correct) parts.push(`right would be: ${system.checked.solution}`);
  return parts.join(" · ");
}
