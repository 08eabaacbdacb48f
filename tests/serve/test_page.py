"""The page at `/` in a real browser, without a window."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from exit_models import some_exits
from places import LONGCOT as SAMPLE
from servers import serving

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import write_exits
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.weights import open_weights

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")
ASK = "x1 = 38 x2 = 75 x3 = x1 + x2 ?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("page") / "longcot"
    convert(Checkpoint.open(SAMPLE), root.parent / "ckpt")
    with open_weights(root.parent / "ckpt") as source:  # a head that was never fitted: what it says does not matter here
        write_exits(root.parent / "ckpt", some_exits(source.config.hidden_size), source.config)
    build(root.parent / "ckpt", root, {"backend": ("onnxruntime",), "max_batch_size": 4, "max_seq_len": 1024})
    with serving(root, root.parent / "log") as running:
        yield running


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={tmp_path}/profile"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def until(driver, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 1000, 0.05).until(lambda one: one.execute_script(f"return {script}"))


def shot(driver, name):
    """Kept where THOUGHTX_SHOTS says, for people to look at."""
    if where := os.environ.get("THOUGHTX_SHOTS"):
        driver.save_screenshot(str(Path(where) / f"{name}.png"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ask_by_keyboard_and_see_the_steps(server, browser, scheme):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.set_window_size(1200, 900)
    browser.get(server.url)
    until(browser, "document.getElementById('model').textContent === 'longcot'")
    prompt = browser.find_element(By.ID, "prompt")
    prompt.send_keys(ASK, Keys.CONTROL, Keys.ENTER)
    until(browser, "!document.getElementById('send').disabled && document.querySelector('.facts')?.textContent")
    steps = browser.execute_script("return [...document.querySelectorAll('ol.steps li')].map(one => one.textContent)")
    assert len(steps) >= 2 and all(steps)
    assert browser.execute_script("return document.querySelector('.answer').textContent").strip()
    assert "tokens/s" in browser.execute_script("return document.querySelector('.facts').textContent")
    assert browser.execute_script("return !document.querySelector('.reply details').open")
    shot(browser, f"answer-{scheme}")
    for row in browser.get_log("browser"):
        assert row["level"] != "SEVERE" or "favicon" in row["message"], row


@pytest.mark.slow
def test_two_answers_side_by_side_on_a_phone_and_an_error(server, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
    browser.get(server.url)
    until(browser, "document.getElementById('model').textContent === 'longcot' && !document.getElementById('compare-set').hidden")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_script("document.getElementById('settings').open = true; document.getElementById('compare').click()")
    prompt = browser.find_element(By.ID, "prompt")
    prompt.send_keys(ASK, Keys.CONTROL, Keys.ENTER)
    until(browser, "[...document.querySelectorAll('.facts')].filter(one => one.textContent).length === 2")
    titles = browser.execute_script("return [...document.querySelectorAll('.reply h2')].map(one => one.textContent)")
    assert titles == ["Without early exit", "With early exit"]
    tokens = browser.execute_script("return [...document.querySelectorAll('.facts')].map(one => parseInt(one.textContent))")
    assert all(tokens)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shot(browser, "phone")
    browser.execute_script("arguments[0].value = 'x '.repeat(3000)", prompt)
    prompt.send_keys(Keys.CONTROL, Keys.ENTER)
    until(browser, "document.querySelector('.error')?.textContent.includes('max_seq_len')")
