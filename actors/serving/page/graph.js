// The graph of a path problem, and the path of each system on it as it is said.

import { html, svg } from "./dom.js";
import { NAMES, SYSTEMS } from "./race.js";
import { tidyTree } from "./layout.js";

const RADIUS = 15;
const HEIGHT = 250; // of the rows together, as long as each is between these two
const ROW = { least: 40, most: 68 };
const MARGIN = 46;
const SIDE = { one: -4, two: 4 }; // the two strokes run beside each other

// Nodes by columns from the start; nodes that cannot be reached from it stand in a last column. Pure.
export function layoutGraph(data) {
  const next = new Map();
  const names = new Set([String(data.start), String(data.goal)]);
  for (const [from, to] of data.edges) {
    next.set(String(from), [...(next.get(String(from)) ?? []), String(to)]);
    names.add(String(from)).add(String(to));
  }
  const seen = new Set([String(data.start)]);
  const { placed, rows, depth } = tidyTree(String(data.start), (name) =>
    (next.get(name) ?? []).filter((to) => !seen.has(to) && seen.add(to)),
  );
  const nodes = new Map(placed.map(({ node, depth: column, row }) => [node, { column, row }]));
  let row = 0;
  for (const name of names) if (!nodes.has(name)) nodes.set(name, { column: depth + 1, row: row++ });
  return { nodes, rows: Math.max(rows, row), columns: depth + (row ? 2 : 1) };
}

// The steps that an answer makes: {from, to, isEdge, right, wrongTurn}. A wrong turn leaves the way to the goal, or takes
// no edge; what follows a wrong turn is not right either. Words that name no node are skipped. Pure.
export function stepsOf(text, data) {
  const names = new Set(data.edges.flat().map(String));
  const edges = new Set(data.edges.map(([from, to]) => `${from} ${to}`));
  const path = data.path.map(String);
  const said = text.split(/\s+/).filter((word) => names.has(word));
  const steps = [];
  let right = said[0] === path[0];
  for (let i = 1; i < said.length; i++) {
    const isEdge = edges.has(`${said[i - 1]} ${said[i]}`);
    const before = right || (i === 1 && said[0] !== path[0]);
    right &&= said[i] === path[i];
    steps.push({ from: said[i - 1], to: said[i], isEdge, right, wrongTurn: !isEdge || (before && !right) });
  }
  return { said, steps };
}

// Draws the graph, and on it the answers {one: text, two: text}.
export function drawGraph(box, data, answers, width) {
  const { nodes, rows, columns } = layoutGraph(data);
  const column = Math.min(170, (width - 2 * MARGIN) / Math.max(1, columns - 1));
  const left = (width - column * (columns - 1)) / 2;
  const pitch = Math.min(ROW.most, Math.max(ROW.least, HEIGHT / rows));
  const height = pitch * rows + 24;
  const place = (name) => ({ x: left + column * nodes.get(name).column, y: 14 + pitch * (nodes.get(name).row + 0.5) });
  const line = (from, to, shift) => shifted(place(from), place(to), shift);
  const edges = data.edges.map(([from, to]) => {
    const { a, b } = line(String(from), String(to), 0);
    return svg("line", { class: "edge", x1: a.x, y1: a.y, x2: b.x, y2: b.y });
  });
  const paths = SYSTEMS.map((name) => {
    const { steps } = stepsOf(answers[name] ?? "", data);
    return svg("g", { class: `path ${name}` }, steps.map((step) => drawStep(step, line(step.from, step.to, SIDE[name]), name)));
  });
  const reached = Object.fromEntries(SYSTEMS.map((name) => [name, new Set(stepsOf(answers[name] ?? "", data).said)]));
  const circles = [...nodes.keys()].map((name) => {
    const { x, y } = place(name);
    const role = name === String(data.start) ? "start" : name === String(data.goal) ? "goal" : "";
    const classes = ["node", role, ...SYSTEMS.filter((system) => reached[system].has(name)).map((system) => `by-${system}`)];
    return svg("g", { class: classes.filter(Boolean).join(" "), transform: `translate(${x} ${y})` },
      role === "goal"
        ? svg("rect", { x: -RADIUS, y: -RADIUS, width: 2 * RADIUS, height: 2 * RADIUS, rx: 4 })
        : svg("circle", { r: RADIUS }),
      svg("text", { y: 4.5 }, name),
      role === "goal" && svg("text", { class: "role beside", x: RADIUS + 7, y: 4 }, role),
      role === "start" && svg("text", { class: "role", y: RADIUS + 14 }, role),
    );
  });
  box.replaceChildren(
    svg("svg", { width, height: height + 8, class: "graph", role: "img", "aria-label": describe(data, answers) }, edges, paths, circles),
  );
}

// A line between two nodes' rims, moved sideways by `shift`.
function shifted(from, to, shift) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const [ux, uy] = [(to.x - from.x) / length, (to.y - from.y) / length];
  const move = (point, along) => ({ x: point.x + along * ux - shift * uy, y: point.y + along * uy + shift * ux });
  return { a: move(from, RADIUS), b: move(to, -RADIUS) };
}

function drawStep(step, { a, b }, name) {
  const middle = { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  // A step along no edge bows out, so that it crosses no node on its way.
  const bow = step.isEdge ? middle : { x: middle.x + 0.25 * (b.y - a.y), y: middle.y - 0.25 * (b.x - a.x) - 12 };
  const at = { x: (middle.x + bow.x) / 2, y: (middle.y + bow.y) / 2 };
  return [
    svg("path", { class: step.isEdge ? (step.right ? "stroke" : "stroke astray") : "stroke no-edge", d: `M${a.x} ${a.y}Q${bow.x} ${bow.y} ${b.x} ${b.y}`, pathLength: 1 },
      svg("title", {}, `${NAMES[name]}: ${step.from} to ${step.to}${step.isEdge ? "" : ", which is no edge"}${step.right ? "" : ", wrong"}`)),
    step.wrongTurn && svg("path", { class: "wrong", d: `M${at.x - 5} ${at.y - 5}l10 10m0 -10l-10 10` }),
  ];
}

function describe(data, answers) {
  const said = SYSTEMS.map((name) => {
    const { said: nodes, steps } = stepsOf(answers[name] ?? "", data);
    if (!nodes.length) return "";
    const wrong = steps.find((step) => step.wrongTurn);
    return ` ${NAMES[name]} goes ${nodes.join(", ")}${wrong ? `; its step to ${wrong.to} is wrong` : ""}.`;
  });
  return `Graph of ${data.edges.length} edges from ${data.start} to ${data.goal}.${said.join("")}`;
}

// The graph for those who do not see it.
export function drawEdgeList(box, data) {
  box.replaceChildren(
    html("p", {}, `Start ${data.start}, goal ${data.goal}. Edges: ${data.edges.map(([from, to]) => `${from} to ${to}`).join("; ")}.`),
  );
}
