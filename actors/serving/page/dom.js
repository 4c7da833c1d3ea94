// Elements in one call. Styles go through the CSSOM: the page's content policy allows no style attribute.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function html(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "style") {
      for (const [key, setting] of Object.entries(value)) element.style.setProperty(key, setting);
    } else if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Calls `draw(width)` now and whenever the element gets another width.
export function onWidth(element, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(element.clientWidth);
    if (now && now !== width) draw((width = now));
  }).observe(element);
}

// At most one call per frame and per `interval` milliseconds, and a fifth of the time; the last one is never lost.
export function throttled(draw, interval = 0) {
  let waiting = false;
  let last = -Infinity;
  let cost = 0;
  return () => {
    if (waiting) return;
    waiting = true;
    const run = () => requestAnimationFrame((now) => {
      waiting = false;
      draw();
      last = performance.now();
      cost = last - now;
    });
    const rest = Math.max(interval, 4 * cost) - (performance.now() - last);
    if (rest > 0) setTimeout(run, rest);
    else run();
  };
}

export const number = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "–");

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
