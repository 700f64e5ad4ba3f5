"""`make shots`: the picture of the page in README.md, of the model that its first commands train."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import inspect_model

PICTURE = Path(__file__).resolve().parent.parent / "docs/page.png"
SIZE = {"width": 1200, "height": 1275}


def main(model: str) -> int:
    """Write the page of a model, open it in Debian's Chromium, and take the picture of its first screens."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        if code := inspect_model.main([model, "--html", str(file)]):
            return code
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(file.as_uri())
        page.screenshot(path=PICTURE)
        browser.close()
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
