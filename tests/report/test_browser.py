"""The report and the card in a real browser, headless Chromium, with hostile text planted everywhere. Skipped where
there is no browser: Debian has it as chromium and chromium-driver, Python's side is selenium."""

import json
import shutil

import pytest

from hpsafety import cli
from tests.report.fake_run import HOSTILE, make_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'hpsafety[test]'")
    if not BROWSER or not DRIVER:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("browser") / "run", n=40, hostile=HOSTILE)
    assert cli.main(["report", str(path)]) == cli.main(["card", str(path)]) == 0
    assert cli.main(["report", str(path), str(path), "--out", str(path / "two.html")]) == 0
    return path


def requests(driver) -> list[str]:
    """Addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("name", ["report.html", "card/card.html", "two.html"])
def test_it_loads_and_nothing_else_happens(driver, run, name):
    """No error on the console, no script from a prompt, no request beyond the file itself."""
    driver.get_log("browser")
    requests(driver)
    driver.get((run / name).as_uri())
    assert driver.execute_script("return window.HACKED") is None
    scripts = driver.execute_script("return document.scripts.length")
    assert driver.title != "HACKED" and scripts == (1 if name == "report.html" else 0)
    assert not [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert set(requests(driver)) == {(run / name).as_uri()}


def test_the_policy_holds(driver, run):
    """A script that gets into the page is not run, and a picture from the network is refused."""
    driver.get((run / "report.html").as_uri())
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.LET_IN = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert driver.execute_script("return window.LET_IN") is None
    blocked = [e["message"] for e in driver.get_log("browser") if "Content Security Policy" in e["message"]]
    assert len(blocked) == 2, blocked


def test_search_finds_folded_text_and_leaves_it_folded(driver, run):
    driver.get((run / "report.html").as_uri())
    box = driver.find_element("id", "search")

    def shown(words: str) -> list[str]:
        box.clear()
        box.send_keys(words)
        rows = driver.execute_script("return [...document.querySelectorAll('#samples tbody tr')].filter(r => !r.hidden)"
                                     ".map(r => r.textContent)")  # fmt: skip
        told = driver.find_element("id", "found").text
        assert told == f"{len(rows)} of 120 shown"
        return rows

    assert len(shown("question a7only")) == 1
    assert len(shown("BORDERLINE")) == 40 and len(shown("no such words")) == 0 and len(shown("<script>")) == 3
    assert driver.execute_script("return document.querySelectorAll('#samples details[open]').length") == 0
    risky = driver.find_element("css selector", "details.risky .text")
    assert not risky.is_displayed()
    shown("adversarial")
    driver.find_element("css selector", "details.risky summary").click()
    assert risky.is_displayed() and "<script>" in risky.text


@pytest.mark.parametrize("name", ["report.html", "card/card.html", "two.html"])
def test_a_phone_shows_it_without_scrolling_sideways(driver, run, name):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get((run / name).as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_themes(driver, run, theme):
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get((run / "report.html").as_uri())
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    red = int(ground.split("(")[1].split(",")[0])
    assert (red > 200) == (theme == "light")


def test_many_questions_are_fast(driver, tmp_path):
    """Beyond some hundred rows: 400 are on the page, and a search takes less than a fifth of a second."""
    path = make_run(tmp_path / "run", n=300)
    assert cli.main(["report", str(path)]) == 0
    driver.get((path / "report.html").as_uri())
    took = driver.execute_script(
        "const box = document.getElementById('search'); const t = performance.now();"
        "for (const w of ['a', 'adversarial', 'question 9']) { box.value = w; box.dispatchEvent(new Event('input'));"
        "document.body.offsetHeight; } return (performance.now() - t) / 3;"
    )
    assert "of 400 shown" in driver.find_element("id", "found").text and took < 200, took
