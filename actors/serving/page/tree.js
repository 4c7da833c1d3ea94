// The search tree of a plan: left to right, a column per token ahead. Area shows visits, colour value, and the
// principal variation is drawn strongly and said in words.

import { html, number, percent, svg } from "./dom.js";
import { tidyTree } from "./layout.js";

const SHOWN = 40; // nodes; the most visited ones
const HEIGHT = 215; // of the rows together, as long as each is between these two
const ROW = { least: 23, most: 68 };
const MARGIN = { left: 22, right: 56, top: 20, bottom: 14 };
const LARGEST = 12; // radius of the root

// The most visited `limit` nodes of a tree, every one with its parent: nodes {token, text, visits, value, prior, key,
// principal, children}. `key` is the way from the root, so that a node can be found again in the next tree.
export function prune(tree, line, limit = SHOWN) {
  const copy = (node, key, principal) => ({ ...node, key, principal, children: [], whole: node.children ?? [] });
  const root = copy(tree, "", true);
  const queue = [root];
  let kept = 0;
  while (queue.length && kept < limit) {
    let best = 0;
    for (let i = 1; i < queue.length; i++) if (queue[i].visits > queue[best].visits) best = i;
    const [node] = queue.splice(best, 1);
    kept += 1;
    node.parent?.children.push(node);
    const depth = node.key === "" ? 0 : node.key.split(".").length;
    for (const child of node.whole) {
      if (!child.visits) continue;
      const principal = node.principal && child.token === line[depth];
      queue.push({ ...copy(child, node.key === "" ? `${child.token}` : `${node.key}.${child.token}`, principal), parent: node });
    }
  }
  return { root, kept, total: countVisited(tree) };
}

const countVisited = (node) => 1 + (node.children ?? []).reduce((sum, child) => sum + (child.visits ? countVisited(child) : 0), 0);

// What the plan says, in words.
export function planInWords(plan) {
  const words = (plan.line ?? "").trim().split(/\s+/).filter(Boolean);
  return words.length ? words.join(" → ") : "nothing";
}

const clamp = (value) => Math.min(1, Math.max(0, value));

export const valueColour = (value) =>
  `color-mix(in oklab, var(--value-high) ${Math.round(100 * clamp(value))}%, var(--value-low))`;

// Draws the tree of a crsm.plan event into `box`; `grow` animates it, depth by depth.
export function drawTree(box, plan, width, grow) {
  if (!plan?.tree) {
    box.replaceChildren();
    return;
  }
  const { root, kept, total } = prune(plan.tree, plan.line_tokens ?? []);
  const { placed, rows, depth } = tidyTree(root, (node) => node.children);
  const pitch = Math.min(ROW.most, Math.max(ROW.least, HEIGHT / rows));
  const height = MARGIN.top + MARGIN.bottom + pitch * rows;
  const column = Math.min(132, (width - MARGIN.left - MARGIN.right) / Math.max(depth, 1));
  const x = (item) => MARGIN.left + column * item.depth;
  const y = (item) => MARGIN.top + pitch * (item.row + 0.5);
  const radius = (node) => Math.max(3, LARGEST * Math.sqrt(node.visits / Math.max(1, root.visits)));
  const order = placed.map((_, index) => index).sort((a, b) => placed[a].node.principal - placed[b].node.principal);
  const edges = order.filter((index) => placed[index].parent >= 0).map((index) => {
    const to = placed[index];
    const from = placed[to.parent];
    const middle = (x(from) + x(to)) / 2;
    return svg("path", {
      class: to.node.principal ? "edge principal" : "edge",
      d: `M${x(from)} ${y(from)}C${middle} ${y(from)} ${middle} ${y(to)} ${x(to)} ${y(to)}`,
      pathLength: 1,
      style: { "--depth": to.depth, "--thick": `${1 + 3 * Math.sqrt(to.node.visits / Math.max(1, root.visits))}px` },
    });
  });
  const nodes = order.map((index) => {
    const item = placed[index];
    const { node } = item;
    const title = `${node.text?.trim() || "now"}: ${node.visits} visits, value ${number(node.value)}`;
    return svg(
      "g",
      { class: node.principal ? "node principal" : "node", transform: `translate(${x(item)} ${y(item)})`, style: { "--depth": item.depth } },
      svg("circle", { r: radius(node), style: { fill: valueColour(node.value) } }),
      node.children.length
        ? svg("text", { class: "above", y: -radius(node) - 4 }, item.depth ? shorten(node.text) : "")
        : svg("text", { x: radius(node) + 4, y: 4 }, item.depth ? shorten(node.text) : ""),
      svg("title", {}, node.prior === undefined || !item.depth ? title : `${title}, prior ${number(node.prior)}`),
    );
  });
  box.replaceChildren(
    svg(
      "svg",
      { width, height, class: grow ? "tree grow" : "tree", role: "img", "aria-label": describeTree(plan, kept, total) },
      svg("g", {}, edges),
      svg("g", {}, nodes),
    ),
  );
}

const shorten = (text) => (text.trim().length > 9 ? `${text.trim().slice(0, 8)}…` : text.trim() || "␣");

function describeTree(plan, kept, total) {
  const shown = kept < total ? `, the ${kept} most visited drawn` : "";
  return `Search tree of ${total} nodes${shown}. Principal variation: ${planInWords(plan)}.`;
}

// The tree for those who do not see it: the moves at its root, most visited first.
export function drawRootMoves(body, plan) {
  const moves = plan?.tree?.children ?? [];
  const visits = Math.max(1, moves.reduce((sum, move) => sum + move.visits, 0));
  body.replaceChildren(
    ...moves.map((move) =>
      html("tr", {},
        html("th", { scope: "row" }, move.text.trim()),
        html("td", {}, String(move.visits)),
        html("td", {}, percent(move.visits / visits)),
        html("td", {}, number(move.value)),
        html("td", {}, move.prior === undefined ? "–" : number(move.prior)),
      ),
    ),
  );
}
