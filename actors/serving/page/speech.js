// What a system says, token by token. Tokens shaped by a plan are buttons that explain it; one of them is in the tab
// order and the arrow keys go on from it.

import { html, number } from "./dom.js";
import { outcomeOf, requestBehind } from "./race.js";
import { planInWords } from "./tree.js";

// `onPoint(request)`: a plan is pointed at (null: no longer).
export function createSpeech(box, tooltip, placeholder, onPoint) {
  let shown = 0;
  let ended = false;
  let injected = [];

  const point = (button, request) => {
    tooltip.show(button, explanation(request));
    onPoint(request);
  };

  const clear = () => {
    shown = 0;
    ended = false;
    injected = [];
    box.replaceChildren(html("span", { class: "placeholder" }, placeholder));
  };

  const addButton = (token, request) => {
    const button = html(
      "button",
      {
        type: "button",
        class: "token injected",
        tabindex: injected.length ? -1 : 0,
        "data-position": token.position,
        "aria-label": `${wordOf(token)}, shaped by the plan ${planInWords(request.injection)}`,
        onpointerenter: () => point(button, request),
        onpointerleave: () => tooltip.leave(),
        onfocus: () => point(button, request),
        onblur: () => tooltip.leave(),
        onclick: () => point(button, request),
      },
      wordOf(token),
    );
    injected.push(button);
    return button;
  };

  box.addEventListener("keydown", (event) => {
    const at = injected.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: injected.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = injected[Math.min(Math.max(to, 0), injected.length - 1)];
    injected[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  // The model's verdict on itself closes an answer.
  const endMark = (system) => {
    const request = requestBehind(system, system.end);
    const word = request ? addButton(system.end, request) : html("span", { class: "token" }, system.end.text);
    return html("span", { class: "end" }, "Its own verdict: ", word);
  };

  clear();
  return {
    clear,
    // Says what is new since the last call.
    update(system) {
      if (shown === 0 && (system.tokens.length || system.status !== "waiting")) box.replaceChildren();
      for (const token of system.tokens.slice(shown)) {
        const request = requestBehind(system, token);
        const lead = /^\s*/.exec(token.text)[0];
        if (lead) box.append(lead);
        box.append(request ? addButton(token, request) : html("span", { class: "token" }, token.text.slice(lead.length)));
      }
      shown = system.tokens.length;
      if (!ended && system.status !== "waiting" && system.status !== "speaking") {
        ended = true;
        box.classList.remove("speaking");
        if (system.end) box.append(endMark(system));
        if (!shown) box.append(html("span", { class: "placeholder" }, system.status === "failed" ? "nothing was said" : "stopped"));
      } else if (!ended) {
        box.classList.add("speaking");
      }
    },
  };
}

const wordOf = (token) => token.text.trim() || "␣";

function explanation(request) {
  const { injection, plan } = request;
  const late = injection.late ? `, written ${injection.late} ${injection.late === 1 ? "token" : "tokens"} late` : "";
  const rows = [
    ["plan", planInWords(injection)],
    ["value", `${number(injection.value_now)} → ${number(injection.value_planned)}`],
    ["asked", `${request.lag} ${request.lag === 1 ? "token" : "tokens"} ahead${late}`],
    ["outcome", outcomeOf(injection.reason).word],
  ];
  if (plan?.assumed?.trim()) rows.splice(1, 0, ["assumed", plan.assumed.trim()]);
  if (plan) rows.push(["search", `${plan.simulations} simulations, ${number(1000 * plan.seconds, 1)} ms`]);
  if (injection.policy_weight) rows.push(["policy weight", number(injection.policy_weight)]);
  return html("div", {},
    html("p", { class: "tip-title" }, `Written before position ${injection.position}`),
    html("dl", {}, rows.map(([name, text]) => [html("dt", {}, name), html("dd", {}, text)])),
    html("table", { class: "gates" },
      html("thead", {}, html("tr", {}, ["layer", "gate", "", "α"].map((head) => html("th", { scope: "col" }, head)))),
      html("tbody", {}, injection.gates.map((gate, layer) =>
        html("tr", {},
          html("th", { scope: "row" }, String(layer)),
          html("td", { class: "bar-cell" }, html("span", { class: "gate-bar", style: { "--share": Math.min(1, Math.max(0, gate)) } })),
          html("td", {}, number(gate)),
          html("td", {}, number(injection.alpha[layer], 3)),
        )))),
  );
}
