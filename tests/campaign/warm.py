"""Imported by the process that cases are forked from: what every run does once is done already.

Reading configurations takes a second before caches are warm. Nothing here trains: autograd's
threads would not survive a fork.
"""

import sys
import tempfile
from pathlib import Path

from conftest import run

with tempfile.TemporaryDirectory() as folder:
    commands = [
        ("run.py", "backbone=toy", "students=[]", "ipc=1", "dataset.classes=[0]", "tracker=none",
         "compute.device=cpu", "report=true"),
        ("run.py", "--cfg", "job", "protocol=soft_label_short", "tracker=none"),
        ("scripts/evaluate.py", "--cfg", "job", "images=x"),
    ]  # fmt: skip
    if "mgd3.backbones.dit" in sys.modules:
        backbone = ("scripts/train_backbone.py", "--cfg", "job", "backbone=dit_digits")
        commands.append(backbone)
    for script, *overrides in commands:
        done = run(Path(folder), *overrides, script=script)
        assert done.returncode == 0, done.stderr
