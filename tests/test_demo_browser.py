"""The demo in a real browser: Debian's Chromium without a window, driven through selenium.

`LEXMAE_DEMO_PICTURE=RUN:CORPUS pytest tests/test_demo_browser.py -k picture` makes `docs/demo.png`, where RUN is a
folder with `model`, `index` and `vectors-docs`, such as a stage of a pipeline, and CORPUS the texts.
`LEXMAE_DEMO_QUERY` replaces the query.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path

import pytest
from demo_data import EVIL, Folders, build

from lexmae.demo import app as web
from lexmae.demo.service import Service

pytest.importorskip("flask", reason="the demo's package flask is absent")
pytest.importorskip("selenium", reason="the package selenium, which drives a browser, is absent")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PICTURE = os.environ.get("LEXMAE_DEMO_PICTURE", "")
QUERY = os.environ.get("LEXMAE_DEMO_QUERY", "how do vaccines stop an infection")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --force-device-scale-factor=1 --hide-scrollbars""".split()
SIZES = {"desktop": (1280, 900), "tablet": (768, 1024), "phone": (360, 740)}
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs the commands chromium and chromedriver")]


@contextlib.contextmanager
def served(folders: Folders):
    """The address of a page over these folders."""
    from werkzeug.serving import make_server

    service = Service(*folders)
    opened = web.listen("127.0.0.1", 0)
    server = make_server("127.0.0.1", 0, web.create_app(service, hits=10), threaded=True, fd=opened.fileno())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        opened.close()
        service.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(build(tmp_path_factory.mktemp("demo"))) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def no_complaints(request):
    """No script ran that should not, and nothing was blocked or missing: the console stays empty."""
    yield
    if "browser" in request.fixturenames:
        complaints = [entry["message"] for entry in request.getfixturevalue("browser").get_log("browser")]
        assert [text for text in complaints if "status of 404" not in text] == []


def show(browser, size: str, scheme: str = "light") -> None:
    """Set the size of the page and the colour scheme that the user prefers."""
    width, height = SIZES[size]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})


def focused(browser) -> str:
    """What has the focus: its id, else the text of the link."""
    element = browser.switch_to.active_element
    return element.get_attribute("id") or element.text


def press(browser, *keys: str) -> None:
    browser.switch_to.active_element.send_keys(*keys)


def results(browser) -> list:
    """The links of the results, once there are some: a key press does not wait for the page that it asks for."""
    return WebDriverWait(browser, 20).until(lambda now: now.find_elements("css selector", "a.result"))


def pages(address: str) -> list[str]:
    """Every kind of page, with the texts that try to be markup."""
    evil = "?id=evil%22%3E%3Cb%3E&q=silver+%3Cscript%3E"
    return [address, f"{address}?q=silver+bridges&hits=50", f"{address}document{evil}", f"{address}document?id=none",
            f"{address}?q={'longword' * 30}"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_page_scrolls_sideways(browser, address, size, scheme):
    show(browser, size, scheme)
    for page in pages(address):
        browser.get(page)
        wide = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1] == SIZES[size][0], page
        assert browser.title != "caught" and "lexmae" in browser.title


def test_the_scheme_is_followed(browser, address):
    grounds = {}
    for scheme in ("light", "dark"):
        show(browser, "desktop", scheme)
        browser.get(address)
        grounds[scheme] = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert grounds == {"light": "rgb(250, 248, 245)", "dark": "rgb(20, 24, 26)"}


def test_search_with_the_keyboard_alone(browser, address):
    show(browser, "desktop")
    browser.get(address)
    assert focused(browser) == "q"
    press(browser, "silver bridges", Keys.ENTER)
    titles = [link.text for link in results(browser)]
    assert len(titles) == 10 and "silver bridges" in browser.title
    browser.find_element("tag name", "body").send_keys("/")
    assert focused(browser) == "q"
    press(browser, Keys.ARROW_DOWN)
    assert focused(browser) == titles[0]
    press(browser, Keys.ARROW_DOWN)
    press(browser, Keys.ARROW_DOWN)
    press(browser, Keys.ARROW_UP)
    assert focused(browser) == titles[1]
    press(browser, Keys.ARROW_UP)
    press(browser, Keys.ARROW_UP)
    assert focused(browser) == "q"
    press(browser, Keys.ARROW_DOWN)
    press(browser, Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda now: now.find_elements("class name", "document"))
    assert browser.find_element("tag name", "h1").text == titles[0]
    assert browser.find_elements("css selector", ".why .terms li")
    browser.find_element("css selector", ".back a").click()
    assert len(results(browser)) == 10


def test_the_order_of_the_focus(browser, address):
    show(browser, "desktop")
    browser.get(f"{address}?q=silver")
    found = []
    for _ in range(6):
        press(browser, Keys.TAB)
        found.append(focused(browser))
    titles = [link.text for link in results(browser)]
    assert found == ["Skip to the results", "lexmae", "q", "Search", *titles[:2]]


def test_everything_has_a_name(browser, address):
    browser.get(f"{address}?q=silver+bridges")
    box = browser.find_element("id", "q")
    assert box.accessible_name == "Search the documents" and box.aria_role == "searchbox"
    assert browser.find_element("tag name", "form").aria_role == "search"
    assert all(link.accessible_name for link in browser.find_elements("tag name", "a"))
    headings = [int(element.tag_name[1]) for element in browser.find_elements("css selector", "h1, h2, h3")]
    assert headings[0] == 1 and headings.count(1) == 1 and all(b - a <= 1 for a, b in zip(headings, headings[1:],
                                                                                          strict=False))


def test_bars_are_as_long_as_their_weights(browser, address):
    show(browser, "desktop")
    browser.get(f"{address}?q=silver+bridges")
    first = browser.find_element("css selector", ".results .terms")
    rows = [(float(row.find_element("class name", "number").text), row.find_element("class name", "fill").rect["width"])
            for row in first.find_elements("tag name", "li")]
    assert len(rows) > 2 and rows == sorted(rows, reverse=True)
    for value, width in rows:
        assert width / rows[0][1] == pytest.approx(value / rows[0][0], abs=0.02)


def test_the_page_works_without_scripts(browser, address):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
        browser.find_element("id", "q").send_keys("silver", Keys.ENTER)
        assert results(browser)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_markup_in_texts_is_shown_as_it_is(browser, address):
    browser.get(f"{address}document?id=evil%22%3E%3Cb%3E")
    assert browser.find_element("tag name", "h1").text == EVIL.title and browser.title != "caught"
    assert "<img src=x onerror=" in browser.find_element("class name", "whole").text
    assert not browser.find_elements("tag name", "img")


@pytest.mark.skipif(":" not in PICTURE, reason="LEXMAE_DEMO_PICTURE=RUN:CORPUS asks for docs/demo.png")
def test_picture(browser):
    run, _, corpus = PICTURE.rpartition(":")
    folder = Path(__file__).parents[1] / "docs"
    made = Folders(Path(run) / "model", Path(run) / "index", Path(run) / "vectors-docs", Path(corpus))
    with served(made) as address:
        show(browser, "desktop")
        browser.get(address)
        browser.find_element("id", "q").send_keys(QUERY, Keys.ENTER)
        results(browser)
        browser.execute_script("document.activeElement.blur()")
        browser.save_screenshot(str(folder / "demo.png"))
        if more := os.environ.get("LEXMAE_DEMO_MORE"):  # a folder for the other sizes, schemes and pages, to look at
            _more(browser, Path(more))


def _more(browser, folder: Path) -> None:
    link = results(browser)[0].get_attribute("href")
    here = browser.current_url
    for name, page in (("results", here), ("document", link), ("home", here.split("?")[0])):
        for size in SIZES:
            for scheme in ("light", "dark"):
                show(browser, size, scheme)
                browser.get(page)
                browser.save_screenshot(str(folder / f"{name}-{size}-{scheme}.png"))
