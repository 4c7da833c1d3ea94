// One tooltip for the whole page: beside its anchor, inside the window, and gone with Escape. It can be hovered itself.

const GAP = 8;
const LINGER = 120; // ms in which the pointer may cross from the anchor to the tooltip

export function createTooltip(box, onHide) {
  let anchor = null;
  let leaving = 0;

  const hide = () => {
    clearTimeout(leaving);
    anchor?.removeAttribute("aria-describedby");
    anchor = null;
    if (!box.hidden) onHide?.();
    box.hidden = true;
  };

  const show = (element, content) => {
    clearTimeout(leaving);
    if (anchor && anchor !== element) anchor.removeAttribute("aria-describedby");
    anchor = element;
    box.replaceChildren(content);
    box.hidden = false;
    element.setAttribute("aria-describedby", box.id);
    place();
  };

  const place = () => {
    const at = anchor.getBoundingClientRect();
    if (at.bottom < 0 || at.top > innerHeight) return hide();
    const size = box.getBoundingClientRect();
    const left = Math.min(Math.max(GAP, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - GAP);
    const below = at.bottom + GAP + size.height < innerHeight;
    box.style.setProperty("left", `${left}px`);
    box.style.setProperty("top", `${below ? at.bottom + GAP : Math.max(GAP, at.top - GAP - size.height)}px`);
  };

  const leave = () => {
    clearTimeout(leaving);
    leaving = setTimeout(hide, LINGER);
  };

  box.addEventListener("pointerenter", () => clearTimeout(leaving));
  box.addEventListener("pointerleave", leave);
  for (const moved of ["scroll", "resize"]) addEventListener(moved, () => anchor && place(), { passive: true, capture: true });
  return { show, hide, leave, isOpen: () => !box.hidden };
}
