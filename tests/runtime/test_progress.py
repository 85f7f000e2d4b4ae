"""What a stage says before it begins, while it goes on, and when it ends."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from mgd3.runtime.progress import Count, progress
from mgd3.runtime.stages import Stage, announce, duration, total_seconds
from mgd3.runtime.text import shortened
from mgd3.storage.timing import WorkPace


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_resumed_stage_counts_its_rate_from_where_it_resumed(clock, said):
    with progress("training", 8000, "steps", done=1600) as advance:
        clock(300)
        advance(150)
        clock(1.0)
        advance(1)
    assert said() == [
        "training: about 3.5 h left, judged by its first 5 min (a guess)",
        "training: 1,750/8,000 steps, 2.0 s each, 3.5 h left",
        "training: 151 steps in 301.0 s (and 1,600 before)",
    ]


def test_the_first_unit_of_a_compiled_network_counts_for_no_rate(clock, said, tmp_path):
    pace = WorkPace(tmp_path, "a compiled step", bars_device())
    with progress("training", 6000, "steps", done=1000, pace=pace, compiles=True) as advance:
        clock(90)
        advance()
        clock(30)
        advance(300)
    assert said() == [
        "training: 1,001/6,000 steps",
        "training: about 8 min left, judged by its first 30 s (a guess)",
        "training: 1,301/6,000 steps, 10.0/s, 8 min left",
        "training: 301 steps in 120.0 s (and 1,000 before)",
    ]
    assert pace.seconds == pytest.approx(0.1)


def test_a_finished_stage_says_its_unit_and_a_short_one_nothing(clock, said):
    with progress("training convnet3, seed 0", 20, "epochs") as advance:
        clock(7.4)
        advance(20)
    with progress("reading", 719, "images") as advance:
        advance(719)
    assert said() == ["training convnet3, seed 0: 20 epochs in 7.4 s"]


def test_what_takes_long_is_said_before_and_only_then(said):
    stage = Stage(what="trains a network", seconds=28800, guess="a guess", shorter="epochs=…")
    announce(stage)
    announce(Stage(what="copies", seconds=59.0))
    announce(Stage(what="never done"))
    announce(Stage(what="done", seconds=1e6, there=True))
    assert said() == ["trains a network: about 8.0 h here (a guess); epochs=… shortens it"]
    done = Stage(what="done", seconds=1e6, there=True)
    assert total_seconds([stage, done]) == (28800, False)
    assert total_seconds([stage, Stage(what="never done")]) == (28800, True)
    assert [duration(s) for s in (0.6, 89, 91, 5399, 5401)] == [
        "1 s", "89 s", "2 min", "90 min", "1.5 h",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "corrected"), [(None, True), (1000, False), (90, True)])
def test_the_first_seconds_correct_an_estimate(clock, said, seconds, corrected):
    stage = Stage(what="w", seconds=seconds, shorter="ipc=…")
    with progress("sampling", 100, "steps", stage=stage) as advance:
        clock(10)
        advance()  # 1,000 s in all
        judged = "about 16 min left, judged by its first 10 s (a guess)"
        assert (f"sampling: {judged}; ipc=… shortens it" in said()) == corrected
        clock(1)
        advance()
    assert len([line for line in said() if "judged" in line]) == corrected


def test_the_pace_of_work_is_kept_for_this_machine(clock, tmp_path):
    def pace(kind="an epoch", each=1.0):
        return WorkPace(tmp_path, kind, bars_device(), each)

    assert pace().seconds is None
    with progress("training", 10, "epochs", done=4, pace=pace(each=600)) as advance:
        clock(12)
        advance(6)
    assert pace(each=600).seconds == pytest.approx(2.0)
    assert pace(each=300).seconds == pytest.approx(1.0)  # half as many images
    assert pace("another").seconds is None
    with pytest.raises(RuntimeError), progress("training", 10, pace=pace()) as advance:
        clock(1000)
        advance(1)
        raise RuntimeError
    assert pace(each=600).seconds == pytest.approx(2.0)
    pace().path.write_text("[1]")
    assert pace().seconds is None


def bars_device():
    import torch

    return torch.device("cpu")


def test_a_count_without_work_knows_no_rate(clock):
    count = Count(10, 3, "files")
    clock(5)
    assert (str(count), count.left) == ("3/10 files", None)


@pytest.mark.parametrize("at_end", [True, False])
def test_long_names_are_cut(at_end):
    for most in range(1, 12):
        assert len(shortened("abcdefghij", most, at_end)) == min(most, 10)
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abcdefghij", 5, at_end=True) == "abcd…"


LIVE = """
import logging, sys, time
from mgd3.runtime.progress import progress
from mgd3.runtime.screen import ScreenHandler
logging.basicConfig(level=logging.INFO, handlers=[ScreenHandler()], format="%(message)s")
with progress("runs of a sweep", 2, "runs") as outer:
    for name in ("a" * 70 + "-the-end", "short"):
        with progress(f"training {name}", 30, "epochs") as advance:
            for k in range(30):
                time.sleep(0.036)
                advance(note="loss 0.1234 and more " * 9)
            logging.info("%s", "one line " * 20 + name[-3:])
        outer()
"""


def on_terminal(columns):
    """Everything that a terminal of that width is sent."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", LIVE])
    sent = b""
    while select.select([master], [], [], 60)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        sent += part
    os.waitpid(pid, 0)
    os.close(master)
    return sent.decode()


@pytest.mark.parametrize("columns", [80, 110])
def test_bars_stay_within_the_terminal_and_lines_come_once(columns):
    sent = on_terminal(columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    lines = re.split(r"[\r\n]+", plain)
    shown = [line.rstrip() for line in lines if "━" in line]
    assert shown and max(map(len, shown)) < columns
    assert any("…" in line.split("━")[0] and "the-end" in line for line in shown)
    assert any("30 epochs" in line or "/30 epochs" in line for line in shown)
    assert plain.count("one line " * 20 + "end") == plain.count("one line " * 20 + "ort") == 1
    assert plain.count("training short: 30 epochs in") == 1
    assert "Traceback" not in plain


def test_there_are_no_colours_and_no_bars_in_a_pipe():
    done = subprocess.run(
        [sys.executable, "-c", LIVE], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "━" not in done.stdout + done.stderr
    assert done.stdout.count("short: 30 epochs in") == 1
