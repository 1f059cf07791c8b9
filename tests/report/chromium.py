"""Headless Chromium, driven as a reader would, on a page from file://."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (smolpost[dev])")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys as Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="chromium and chromedriver are not installed (Debian: chromium chromium-driver)",
)
# Script that gives name -> ratio of every text on the page.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const rgba = (css) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const backgroundOf = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgba(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
};
const ratios = {};
for (const element of document.querySelectorAll("body, body *")) {
  if (!element.checkVisibility() || element.matches("script, option")) continue;
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  const [a, b] = [luminance(rgba(getComputedStyle(element).color)), luminance(backgroundOf(element))];
  const name = `${element.tagName} ${element.className} in ${element.parentElement.className}`;
  ratios[name] = Math.min(ratios[name] ?? 99, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
}
return ratios;
"""


def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser until the generator goes on.

    Args:
        profile: An empty folder.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,1000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


class OpenedPage:
    """A page that has just been opened."""

    def __init__(self, browser, file, **media):
        features = {"prefers-color-scheme": "light", "prefers-reduced-motion": "no-preference"} | {
            f"prefers-{name.replace('_', '-')}": value for name, value in media.items()
        }
        features = [{"name": name, "value": value} for name, value in features.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(file.as_uri())
        self.browser = browser
        self.wait("return document.body.dataset.ready === 'true'")

    def wait(self, script: str):
        return WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda driver: driver.execute_script(script))

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def write(self, box: str, text: str) -> None:
        element = self.browser.find_element(By.ID, box)
        element.clear()
        element.send_keys(text)
