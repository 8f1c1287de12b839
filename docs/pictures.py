"""Make the pictures in these pages from a real run, with this machine's Chromium.

    python docs/pictures.py [RUN]

RUN (default: demo) is a folder in DATA_DIR/runs (default: data/runs) that has a report.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# For the playground, whose process starts in another folder.
os.environ["PYTHONPATH"] = str(ROOT)

from tests.tools.browser import DESK, chromium, opened, photograph_playground
from tests.tools.playground_process import playground

PROMPT = "import os\n\ndef read(path):\n"
PICTURES = ROOT / "docs" / "pictures"


def main(run: str) -> None:
    data_dir = Path(os.environ.get("DATA_DIR", "data")).absolute()
    PICTURES.mkdir(exist_ok=True)
    report = data_dir / "runs" / run / "report" / "report.html"
    with chromium() as browser, playground(data_dir, run=run) as server:
        for theme in ("light", "dark"):
            with opened(browser, report.as_uri(), theme=theme) as page:
                page.wait_for_selector("body[data-drawn]")
                page.screenshot(path=PICTURES / f"report-{theme}.png")
            path = PICTURES / f"playground-{theme}.png"
            photograph_playground(browser, server.url, path, prompt=PROMPT, theme=theme, size=DESK)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["demo"]))
