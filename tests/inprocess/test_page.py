"""The page at `/` in a real browser, before the real Pipeline and stages: pico, heat by script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.inprocess.chromium import chromium, opened, until
from tests.inprocess.local_service import Service

PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 2,
}
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}}
SHOTS = Path(__file__).parents[2] / "out" / "screenshots"
"""Where pictures of the page stay, to be looked at."""
MARKUP = (
    """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> & 'a' "red" circle"""
)


@pytest.fixture(scope="module")
def browser(service: Service) -> Iterator[Any]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as found:
        yield found


def draw(page: Any, prompt: str, **fields: Any) -> None:
    """Fill the form in and send it by the keyboard's shortcut."""
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")


def until_done(page: Any, words: str = "Done") -> None:
    until(page, f"document.getElementById('status').textContent === '{words}'")


def is_drawn(page: Any) -> bool:
    """Return whether the picture on the stage came through Kelvin and can be seen."""
    until(page, "document.querySelector('#frames img').src.includes('/images/')")
    until(page, "document.querySelector('#frames img').complete")
    return bool(page.evaluate("document.querySelector('#frames img').naturalWidth === 64"))


def test_a_browser_logs_in_and_watches_a_picture_form(service: Service, browser: Any):
    key = service.key()
    with opened(browser, service.url, **DESK) as page:
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#generate:visible")
        page.wait_for_selector("#gallery-empty:visible")
        draw(page, MARKUP, num_inference_steps=16, num_images=2)
        page.wait_for_selector(".frame.forming img[src^='data:image/jpeg']")
        until(page, "document.getElementById('progress').value > 2")
        page.screenshot(path=SHOTS / "forming.png")
        until_done(page)
        assert is_drawn(page)
        assert page.inner_text("#caption") == MARKUP
        assert page.get_attribute("#frames img", "alt") == f"{MARKUP} (1 of 2)"
        page.wait_for_selector(".tile.succeeded img")
        assert page.get_attribute(".tile", "aria-label") == MARKUP
        page.reload()
        page.click(".tile")
        assert is_drawn(page)
        assert page.input_value("#prompt") == MARKUP
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[src='x'], main script").count() == 0
        page.click("#log-out")
        page.wait_for_selector("#key:visible")
        assert "kelvin_key" not in {each["name"] for each in page.context.cookies()}


def test_cancel_stops_the_job(service: Service, browser: Any):
    key = service.key()
    with opened(browser, service.url, key, **DESK) as page, service.as_tenant(key) as http:
        draw(page, "a long one", num_inference_steps=200)
        until(page, "document.getElementById('progress').value > 1")
        page.click("#cancel")
        until_done(page, "Cancelled")
        (job,) = http.get("/v1/jobs").json()["jobs"]
        assert job["status"] == "cancelled"
        page.wait_for_selector(".tile.cancelled")
        assert page.is_hidden("#cancel")


def test_the_gallery_is_endless_and_gives_back_every_parameter(service: Service, browser: Any):
    key = service.key()
    asked = {
        "prompt": "two blue squares",
        "negative_prompt": "a circle",
        "width": 80,
        "height": 96,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "sampler": "dpmpp_2m",
        "scheduler": "beta",
        "seed": 2**64 - 1,
        "guidance_interval": [0.2, 0.9],
    }
    with service.as_tenant(key) as http:
        first = http.post("/v1/generate", json=asked).json()
        for number in range(27):
            job = http.post("/v1/jobs", json={"prompt": f"given up {number}"}).json()
            http.delete(f"/v1/jobs/{job['id']}")
        with opened(browser, service.url, key, **DESK) as page:
            page.wait_for_selector(".tile")
            newest = page.get_attribute(".tile >> nth=0", "aria-label")
            assert newest.endswith("given up 26")
            page.mouse.wheel(0, 10_000)
            until(page, "document.querySelectorAll('.tile').length === 28")
            assert page.is_hidden("#more")
            page.click(f"[data-id='{first['id']}'] .tile")
            for name, value in asked.items():
                if name != "guidance_interval":
                    assert page.input_value(f"#{name}") == str(value), name
            assert "guidance_interval" in page.inner_text("#carried")
            with page.expect_response("**/v1/jobs/*/events"):
                page.click("#generate")
            until_done(page)
            again = http.get("/v1/jobs?limit=1").json()["jobs"][0]
            sent = again["request"]
            assert {name: sent[name] for name in asked} == asked
            assert again["result"]["images"][0]["sha256"] == first["images"][0]["sha256"]
            page.on("dialog", lambda dialog: dialog.accept())
            page.click("#delete")
            until(page, "document.querySelectorAll('.tile').length === 28")
            assert http.get(f"/v1/jobs/{again['id']}").status_code == 404


def test_drawing_starts_from_a_picture_that_is_chosen(
    service: Service, browser: Any, tmp_path: Path
):
    key = service.key()
    with opened(browser, service.url, key, **DESK) as page, service.as_tenant(key) as http:
        page.wait_for_selector("#model option", state="attached")
        assert page.is_hidden("#strength")
        page.set_input_files("#start-file", picture_file(tmp_path / "wide.png", 200, 100))
        page.wait_for_selector("#strength:visible")
        assert (page.input_value("#width"), page.input_value("#height")) == ("96", "64")
        draw(page, "in colours", strength=0.5, num_inference_steps=4)
        until_done(page)
        page.locator("#start").scroll_into_view_if_needed()
        page.screenshot(path=SHOTS / "start.png")
        (job,) = http.get("/v1/jobs").json()["jobs"]
        assert job["request"]["strength"] == 0.5
        assert job["request"]["init_image"].endswith(f"{job['id']}/input.png")
        # What was made is what the next one starts from.
        page.click("#start-from")
        assert page.input_value("#strength") == "0.5"
        draw(page, "in other colours")
        until(page, "document.getElementById('caption').textContent === 'in other colours'")
        until_done(page)
        again = http.get("/v1/jobs?limit=1").json()["jobs"][0]
        assert again["request"]["init_image"] != job["request"]["init_image"]
        page.click("#start-remove")
        assert page.is_hidden("#strength")
        page.click(f"[data-id='{job['id']}'] .tile")
        assert page.input_value("#strength") == "0.5"
        assert page.inner_text("#start-name") == "as that picture did"
        assert page.is_hidden("#carried")


def picture_file(path: Path, width: int, height: int) -> Path:
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(path)
    return path


def test_a_file_that_is_no_picture_is_said_at_its_field(
    service: Service, browser: Any, tmp_path: Path
):
    with opened(browser, service.url, service.key(), refused="400", **DESK) as page:
        page.wait_for_selector("#model option", state="attached")
        (tmp_path / "x.png").write_bytes(b"no picture")
        page.set_input_files("#start-file", tmp_path / "x.png")
        page.wait_for_selector("#init_image-problem")
        assert page.is_visible("#start-file")
        assert page.is_hidden("#strength")


def test_what_is_wrong_is_said_at_its_field(service: Service, browser: Any):
    with opened(browser, service.url, service.key(), refused="400", **DESK) as page:
        page.wait_for_selector("#model option", state="attached")
        draw(page, "a", width=65)
        page.wait_for_selector("#width-problem")
        assert "multiple of 16" in page.inner_text("#width-problem")
        assert page.evaluate("document.activeElement.id") == "width"
        page.fill("#width", "64")
        assert page.locator(".problem:visible, [aria-invalid]").count() == 0, "it is put right"
        draw(page, "a", width=64, seed="12x")
        assert "whole number" in page.inner_text("#seed-problem")
        assert page.locator(".problem:visible").count() == 1


def test_each_warning_of_a_picture_has_a_line(service: Service, browser: Any):
    with opened(browser, service.url, service.key(), **DESK) as page:
        page.wait_for_selector("#model option", state="attached")
        draw(page, "a red circle " * 20)
        until_done(page)
        first, second = page.inner_text("#stage-problem").splitlines()[:2]
        assert (first[:6], second[:6]) == ("CLIP-L", "CLIP-G")


# WCAG 2.2, 1.4.10: nothing is to be scrolled sideways at 320 pixels.
def test_the_narrowest_screen_shows_all_there_is(service: Service, browser: Any):
    narrow: dict[str, Any] = {**PHONE, "viewport": {"width": 320, "height": 640}}
    with opened(browser, service.url, service.key(), **narrow) as page:
        page.wait_for_selector("#model option", state="attached")
        for view in ("pictures", "operations"):
            page.click(f"a[href='#{view}']")
            page.wait_for_selector(f"#{view}:visible")
            assert page.evaluate("document.documentElement.scrollWidth") == 320, view
            assert page.evaluate(TOO_SMALL) == [], view


def test_it_works_by_keyboard_alone(service: Service, browser: Any):
    with opened(browser, service.url, service.key(), **DESK) as page:
        page.wait_for_selector("#model option", state="attached")
        tab_to(page, "prompt")
        page.keyboard.type("a green star")
        tab_to(page, "num_inference_steps")
        page.keyboard.type("200")
        tab_to(page, "generate")
        page.keyboard.press("Enter")
        page.wait_for_selector("#cancel:visible")
        tab_to(page, "cancel")
        page.keyboard.press("Space")
        until_done(page, "Cancelled")
        page.evaluate("document.activeElement.blur()")
        page.focus("#prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("something else")
        page.wait_for_selector(".tile.cancelled")
        tab_to(page, None, "tile")
        page.keyboard.press("Enter")
        assert page.input_value("#prompt") == "a green star"
        assert (
            page.eval_on_selector(".tile", "tile => getComputedStyle(tile).outlineStyle") == "solid"
        )


def tab_to(page: Any, element_id: str | None, of_class: str = "") -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.id, document.activeElement.className]")
        if focused[0] == element_id or (of_class and of_class in focused[1].split()):
            return
    pytest.fail(f"the keyboard does not reach {element_id or of_class}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_light_and_dark(service: Service, browser: Any, scheme: str):
    key = service.key()
    with opened(browser, service.url, key, color_scheme=scheme, **PHONE) as page:
        page.wait_for_selector("#model option", state="attached")
        assert not page.evaluate("document.getElementById('settings').open")
        draw(page, "a yellow ring")
        until_done(page)
        assert is_drawn(page)
        for view in ("pictures", "operations"):
            page.click(f"a[href='#{view}']")
            page.wait_for_selector(f"#{view}:visible")
            if view == "operations":  # filled once the service has answered
                page.wait_for_selector("#operations .card .live-line")
            assert page.evaluate("document.documentElement.scrollWidth") == 390, view
            assert page.evaluate(TOO_SMALL) == [], view
            assert page.evaluate(FAINT) == [], view
            page.evaluate("scrollTo(0, 0)")  # or the bar at the top hides what it has scrolled over
            page.screenshot(path=SHOTS / f"phone-{scheme}-{view}.png", full_page=True)
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        red, green, blue = map(int, re.findall(r"\d+", ground)[:3])
        assert (red + green + blue < 150) is (scheme == "dark")


# WCAG 2.2, 2.5.8: targets of at least 24 pixels.
TOO_SMALL = """() => [
    ...document.querySelectorAll('button, .button, input, select, textarea, nav a')]
  .filter((each) => each.checkVisibility())
  .filter((each) => each.getBoundingClientRect().height < 24)
  .map((each) => each.id || each.className || each.textContent)"""
# WCAG 2.2, 1.4.3: contrast of text of at least 4.5 to 1, against the nearest ground behind it.
FAINT = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (each) => {
    for (let at = each; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.endsWith(', 0)')) return colour;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  return [...document.querySelectorAll('body *')]
    .filter((each) => each.checkVisibility() && !each.disabled)
    .filter((each) => [...each.childNodes].some(
      (child) => child.nodeType === 3 && child.data.trim()))
    .filter((each) => {
      const [one, other] = [light(getComputedStyle(each).color), light(ground(each))];
      return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05) < 4.5;
    })
    .map((each) => each.textContent.trim().slice(0, 60));
}"""


def test_the_operations_view_follows_the_heat(service: Service, browser: Any):
    key = service.key()
    with opened(browser, service.url, key, **DESK) as page, service.as_tenant(key) as http:
        page.click("#operations-link")
        card = page.locator(".card", has_text="denoiser-a")
        card.wait_for()
        until(page, "document.querySelector('.card .line')?.getAttribute('d').includes('L')")
        assert "45 °C" in card.inner_text()
        assert "300 W" in card.inner_text()
        assert "rehearsal" in card.inner_text()
        jobs = [
            http.post("/v1/jobs", json={"prompt": "work", "num_inference_steps": 200}).json()["id"]
            for _ in range(6)
        ]
        service.set_heat(temperature_c=84, power_w=690, clocks_event_reasons=0x20)
        try:
            card.locator(".badge", has_text="throttled").wait_for()
            until(page, "[...document.querySelectorAll('.card.hot')].length === 1")
            text = card.inner_text()
            assert re.search(r"Temperature\s+84 °C", text)
            assert re.search(r"Margin\s+1 °C", text)
            assert re.search(r"Power\s+690 W", text)
            until(
                page,
                "[...document.querySelectorAll('.card .live-line svg')].some((svg) =>"
                " /^Rows: [1-9]/.test(svg.getAttribute('aria-label')))",
            )
            queues = "document.getElementById('queues').innerText"
            until(page, rf"/Denoising: waits\D+\d+\.\d s/.test({queues})")
            pools = page.inner_text("#pools")
            assert "denoiser-b" in pools
            assert "the number of replicas is fixed" in pools
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=SHOTS / f"operations-{scheme}.png")
        finally:
            service.set_heat()
            for job in jobs:
                http.delete(f"/v1/jobs/{job}")
        until(page, "document.querySelectorAll('.card.hot').length === 0")
        page.click("a[href='#pictures']")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        with page.expect_response("**/v1/jobs?*"):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert not [each for each in asked if each.endswith("/v1/status")]
