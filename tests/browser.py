"""Chromium without a window, driven by selenium, for tests of pages."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator

import pytest

PLOTLY = importlib.util.find_spec("plotly") is not None
SELENIUM = importlib.util.find_spec("selenium") is not None
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@contextlib.contextmanager
def browser(width: int = 1200, *, dark: bool = False) -> Iterator:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        yield driver
    finally:
        driver.quit()


DRAW = "const done = arguments[0]; Promise.all(places.map(draw)).then(() => setTimeout(done, 200))"
# Where CERL_REQUIRE names chromium, these tests fail instead of being skipped.
browsers = pytest.mark.skipif(
    not (PLOTLY and SELENIUM and BROWSER and DRIVER)
    and "chromium" not in os.environ.get("CERL_REQUIRE", ""),
    reason="no plotly, selenium or Chromium",
)
