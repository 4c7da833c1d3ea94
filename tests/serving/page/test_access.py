"""A page for everyone: names, keyboard, touch, small windows, contrast, a strict content policy."""

from __future__ import annotations

import pytest

from tests.serving.page.visiting import over, race, ready

pytestmark = pytest.mark.browser


INTERACTIVE = {"button", "combobox", "textbox", "spinbutton", "slider", "link", "DisclosureTriangle", "searchbox"}


def test_every_control_has_a_name(served, visit):
    page = ready(visit(served.url))
    race(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.evaluate("document.querySelectorAll('[hidden]').forEach((each) => (each.hidden = false))")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in tree if node.get("role", {}).get("value") in INTERACTIVE and not node["ignored"]]
    assert len(controls) >= 25
    assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []
    # Drawings are images with a description, and every landmark of a kind can be told apart.
    assert page.locator("main svg[role='img']:not([aria-label])").count() == 0
    assert (page.locator("main").count(), page.locator("h1").count()) == (1, 1)


def test_the_first_key_leads_past_the_controls_to_the_race(served, visit):
    page = ready(visit(served.url))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the race"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "race"


def test_a_race_needs_no_pointer(served, visit):
    page = ready(visit(served.url))
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    page.keyboard.press("Enter")
    over(page)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('injected')"):
            break
    assert page.locator("#tooltip").is_visible()


@pytest.mark.parametrize("width", [360, 768, 1024, 1920])
def test_nothing_is_wider_than_the_window(served, visit, width):
    page = ready(visit(served.url, viewport={"width": width, "height": 740}))
    race(page)
    page.locator("#score-count").fill("3")
    page.locator("#score-start").click()
    page.locator("#score-start:enabled").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#start").bounding_box()["height"] >= 32


def test_a_finger_shows_what_a_pointer_does(served, visit):
    page = ready(visit(served.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True))
    race(page)
    page.locator("#two-said .injected").first.tap()
    page.wait_for_timeout(400)
    box = page.locator("#tooltip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0
    assert page.locator("#tooltip tbody tr").count() == 4


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgb(getComputedStyle(node).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  const tags = "h1, h2, p, label, li, td, th, dt, dd, span, button, output, summary, option, text";
  for (const node of document.querySelectorAll(tags)) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const seen = node.checkVisibility({ visibilityProperty: true }) && !node.closest(":disabled, .hidden, .skip");
    if (!own || !seen) continue;
    const style = getComputedStyle(node);
    const colour = rgb(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(ground(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([node.outerHTML.slice(0, 80), contrast]);
  }
  return { low, ground: light(ground(document.body)) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(served, visit, scheme):
    page = ready(visit(served.url, color_scheme=scheme))
    race(page)
    page.locator("#two-said .injected").first.focus()
    found = page.evaluate(CONTRASTS)
    assert found["low"] == []
    assert (found["ground"] > 0.5) is (scheme == "light")
    page.locator("#theme").select_option("light" if scheme == "dark" else "dark")
    assert (page.evaluate(CONTRASTS)["ground"] > 0.5) is (scheme == "dark")


def test_nothing_on_the_page_needs_a_looser_content_policy(served, visit):
    page = ready(visit(served.url))
    race(page)
    policy = page.request.get(served.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert page.locator("script:not([src]), [onclick], [onload]").count() == 0
    source = page.request.get(served.url).text()
    assert "style=" not in source and "http" not in source.replace("http-equiv", "")


def test_time_from_first_paint_to_first_token(paced, visit, capsys):
    """A figure, not a claim: the page is loaded, a race begun at once, at the page's own pace."""
    times = []
    for _ in range(3):
        page = visit(paced.url, {})
        page.locator("#start:enabled").click(no_wait_after=True)
        page.locator("#two-said .token").first.wait_for()
        times.append(
            page.evaluate("performance.now() - performance.getEntriesByName('first-contentful-paint')[0].startTime")
            / 1000
        )
    with capsys.disabled():
        print(f"\nfirst paint to first token: {', '.join(f'{seconds:.2f}' for seconds in times)} s")
