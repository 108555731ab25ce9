"""The report in a real browser: no error in its console, no wider than the window, both themes, the reader's keys."""

import shutil

import pytest
from report_support import make_run

from distill.report import write_report
from distill.traces.store import read_traces

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver (Debian: apt install both)"),
]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("browser") / "tiny")
    return run, write_report(run)


def show(browser, path, width=1000, theme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    browser.get(path.as_uri())


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 820, 1440])
def test_it_opens_without_an_error_and_fits(browser, page, width, theme, tmp_path):
    show(browser, page[1], width, theme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    cut_off = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(cut_off) == 0
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) is (theme == "dark")
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def visible(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.traces > .trace')].filter(t => !t.hidden).map(t => t.textContent)"
    )


def test_the_reader_finds_traces(browser, page):
    run, path = page
    show(browser, path)
    everything = visible(browser)
    told = browser.find_element("css selector", ".reader output")
    assert told.text == f"{len(everything)} of {len(everything)}"
    search = browser.find_element("css selector", ".reader input")
    trace, _ = next(iter(read_traces(run / "filtered" / "kept")))
    words = trace.prompt.messages[-1]["content"].split()[:4]
    search.send_keys(" ".join(words))
    found = visible(browser)
    assert 0 < len(found) < len(everything) and all(word in text for text in found for word in words)
    assert told.text == f"{len(found)} of {len(everything)}"
    search.send_keys("\ue00c")  # Escape
    assert len(visible(browser)) == len(everything)
    browser.find_element("css selector", ".reader select").send_keys("correct: wrong")
    wrong = visible(browser)
    assert wrong and len(wrong) < len(everything) and all("wrong" in text for text in wrong)


def test_the_reader_is_driven_by_keys(browser, page):
    show(browser, page[1])
    keys = browser.switch_to.active_element
    traces = "[...document.querySelectorAll('.traces > .trace')]"
    focused = f"return {traces}.findIndex(t => t.contains(document.activeElement))"
    at = []
    for key in ("j", "j", "j", "k"):
        keys.send_keys(key)
        keys = browser.switch_to.active_element
        at.append(browser.execute_script(focused))
    assert at == [0, 1, 2, 1]
    trace = browser.find_elements("css selector", ".traces > .trace")[1]
    keys.send_keys("r")
    reasoning = trace.find_element("css selector", ".reasoning")
    assert trace.get_attribute("open") and reasoning.get_attribute("open")
    keys.send_keys("r")
    assert not reasoning.get_attribute("open")
    keys.send_keys("/")
    assert browser.switch_to.active_element.tag_name == "input"


def test_a_large_run_is_sampled(browser, tmp_path):
    """Not a timing: a run of many long traces is sampled, so what the browser gets is small."""
    run = make_run(tmp_path / "run", "filter", traces=3000)
    path = write_report(run)
    show(browser, path)
    assert path.stat().st_size < 3_000_000
    assert len(visible(browser)) <= 60 + 15 * 12
