"""The examples of docs/extending.md, run as the page says."""

import json
import re

import pytest
from conftest import QUICK, ROOT, run

PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ("modes=farthest", "guidance=late", "guidance.start_t=2", "sampler.steps=4"),
        ("method=mean_image",),
    ],
    ids=["modes and guidance", "method"],
)
def test_the_pages_files_run(tmp_path, overrides):
    files = re.findall(r"`(my_[\w/.]+)`\n\n```(?:python|yaml)\n(.*?)```", PAGE, re.S)
    assert len(files) == 6
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert "PYTHONPATH=. python run.py --config-dir my_configs" in PAGE
    done = run(
        tmp_path, "--config-dir", "my_configs", *QUICK, *overrides, "ipc=3", PYTHONPATH="."
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    (manifest,) = tmp_path.rglob("manifest.json")
    config = json.loads(manifest.read_text())["config"]
    assert any("my_" in str(part) for part in config.values())
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 30
