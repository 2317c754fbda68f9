"""The chat page in a browser: it streams, shows text as text, stops, says what went wrong, asks nothing elsewhere."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request

import pytest

from megakern.inference import Writer
from megakern.serve.app import PAGE, page_and_policy
from tests.serving import serving, tiny_loaded

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser's driver: pip install megakern[dev]")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None or DRIVER is None:
        pytest.skip("there is no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for(condition, seconds: float = 15.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


class Page:
    def __init__(self, driver, url: str) -> None:
        self.driver = driver
        driver.get_log("performance")
        driver.get_log("browser")
        driver.get(url)
        wait_for(lambda: self.find("#model").text not in ("", "…"))

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector
        )

    def set(self, name: str, value: str) -> None:
        self.driver.execute_script(
            "const box = document.getElementById(arguments[0]); box.value = arguments[1]; "
            "box.dispatchEvent(new Event('change'))", name, value,
        )  # fmt: skip

    def send(self, text: str) -> None:
        self.find("#text").send_keys(text)
        self.find("#send").click()

    def wait_for_end(self) -> None:
        wait_for(lambda: self.find("#send").is_displayed())


def test_a_conversation(browser, loaded):
    with serving(loaded) as running:
        page = Page(browser, running.url)
        assert page.find("#model").text == "tiny" and "megakern" in browser.title
        page.set("temperature", "0")
        page.set("max_tokens", "40")
        page.set("system", "be brief")
        messages = [{"role": "system", "content": "be brief"}]
        for question in ("hello <b>there</b> & <img src=x onerror=alert(1)>", "and a story"):
            page.send(question)
            page.wait_for_end()
            messages.append({"role": "user", "content": question})
            ids = running.service.template.encode(messages, loaded.tokenizer, add_generation_prompt=True)
            answer = "".join(piece.text for piece in Writer(loaded, [ids], max_tokens=40))
            messages.append({"role": "assistant", "content": answer})
            assert page.texts(".turn") == [message["content"] for message in messages[1:]]
        assert not page.driver.find_elements("css selector", ".turn *"), "text is text, never elements"
        page.find("#reset").click()
        assert page.texts(".turn") == []
        assert [row["message"] for row in browser.get_log("browser")] == [], "the policy was not broken"
        asked = re.findall(
            r'"url\\?":\\?"(\w+://[^"\\]+)', str([row["message"] for row in browser.get_log("performance")])
        )
        assert asked and {url for url in asked if not url.startswith((running.url, "data:", "chrome"))} == set()


def test_an_answer_is_stopped_and_its_pages_are_free(browser, loaded):
    with serving(loaded) as running:
        step = running.service.worker.engine.step

        def slow():
            time.sleep(0.03)
            return step()

        running.service.worker.engine.step = slow
        page = Page(browser, running.url)
        page.set("temperature", "1.5")
        page.send("a long story")
        wait_for(lambda: len("".join(page.texts(".assistant"))) > 3)
        assert page.find("#stop").is_displayed() and running.service.worker.open == 1
        page.find("#stop").click()
        running.wait_until_free()
        assert page.texts(".note") == ["stopped"] and len(page.texts(".assistant")[0]) > 3
        assert page.find("#send").is_displayed()


def test_what_went_wrong_is_shown_and_the_token_is_asked_for(browser, loaded):
    with serving(loaded, token="a-secret-of-some-length") as running:
        page = Page(browser, running.url)
        assert "this server needs its token" in page.find("#model").text and page.find("#token").is_displayed()
        page.set("token", "a-secret-of-some-length")
        wait_for(lambda: page.find("#model").text == "tiny")
        page.send("x" * 600)
        page.wait_for_end()
        assert "are more than this model's 512; shorten the prompt" in page.texts(".note.bad")[0]
        assert page.find("#text").get_attribute("value") == "x" * 600, "the message can be mended"


def test_the_policy_allows_what_is_in_the_page_alone(loaded):
    text, policy = page_and_policy()
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
    assert not re.search(r"(src|href)=|https?:|url\(|@import|innerHTML|\son\w+=", text), "nothing from elsewhere"
    with serving(loaded) as running, urllib.request.urlopen(running.url) as answer:
        assert answer.headers["content-security-policy"] == policy and answer.read().decode() == PAGE.read_text()
        assert answer.headers["x-content-type-options"] == "nosniff"
