"""Plans: rates come from this machine's finished runs alone, or from a batch tried now."""

import pytest
import torch
from support import composed, manifest, row

from eval.reports.rates import Rates
from eval.results.rows import ResultStore
from mgd3.config.build import build_protocol
from mgd3.data.claims import FORMAT
from mgd3.runtime.machine import machine_name
from mgd3.storage.files import write_json

CPU = torch.device("cpu")
BACKBONE = {"choice": "dit_digits", "version": 1, "values": {}}


def protocol():
    return build_protocol(composed())


def finished(folder, machine, seconds, student_seconds):
    """What a run of 5 images and one student leaves."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/0.png").write_bytes(b"x" * 123)
    images = [manifest()["images"][0] | {"file": "images/0.png"}] * 5
    made = manifest(machine=machine, identity={"backbone": BACKBONE}, images=images)
    write_json(folder / "manifest.json", made)
    write_json(folder / "times.json", {"sample": seconds, "encode": 1000.0})
    scores, scored = folder / "hard-1", {"values": {"image_size": 8}}
    claimed = {"format": FORMAT, "identity": {"protocol": scored}, "data": {}}
    write_json(scores / "protocol.json", claimed)
    ResultStore(scores / "results.jsonl").append(
        row(
            student="convnet2_w8", protocol=protocol().name, machine=machine, epochs=2,
            train_seconds=student_seconds, test_seconds=0.0,
        )
    )  # fmt: skip


def test_rates_are_this_machines(tmp_path):
    finished(tmp_path / "a", machine_name(CPU), 10.0, 30.0)
    finished(tmp_path / "b", "another machine", 1e6, 1e6)
    rates = Rates(tmp_path, CPU)
    assert rates.distilling("mgd3", BACKBONE) == pytest.approx(2.0)  # encoding is done once
    assert rates.distilling("unguided", BACKBONE) is None
    assert rates.distilling("mgd3", BACKBONE | {"version": 2}) is None
    assert rates.distilling("mgd3", None) is None
    seconds, _, recorded = rates.training("convnet2_w8", protocol(), 10, 20)
    assert (seconds, recorded) == (pytest.approx(3.0), True)  # 30 s for 2 epochs of 5 images
    assert rates.image_bytes("digits", {"image_size": 8}) == 123
    assert rates.image_bytes("imagenette", {"image_size": 256}) > 256**2


def test_an_unknown_student_is_tried(tmp_path):
    rates = Rates(tmp_path, CPU)
    seconds, small, recorded = rates.training("convnet2_w8", protocol(), 10, 8)
    _, large, _ = rates.training("convnet2_w8", protocol(), 10, 32)
    assert seconds > 0 and not recorded
    assert large == 4 * small > 8 * 8 * 8 * 8 * 4  # more than one layer's output, float32
