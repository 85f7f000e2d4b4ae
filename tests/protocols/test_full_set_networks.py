"""Networks that are trained on the full real set, whoever asks for them: how they are trained."""

import pytest
import torch
from support import composed

from eval.images import TestImages
from mgd3.config.build import build, build_protocol, build_space
from mgd3.data.inventory import take_inventory
from mgd3.storage.tensors import load_tensors

TINY = ("dataset.classes=[0,1]", "compute.device=cpu")
NETWORK = "student=convnet2_w4"


def taught(cfg, *real):
    build_protocol(cfg).source.network(*real)


def fitted(key):
    return lambda cfg, *real: build_space(cfg, key).fit(*real)


@pytest.mark.parametrize(
    "trained, asked",
    [
        (taught, ["protocol=soft_label_short", f"protocol.teacher.{NETWORK}",
                  "protocol.teacher.epochs=2"]),
        (fitted("features"), ["features=student", f"features.{NETWORK}", "features.epochs=2"]),
        (fitted("surrogate"), ["surrogate=trajectory", f"surrogate.{NETWORK}", "surrogate.epochs=2",
                               "surrogate.lr=0.1"]),
    ],
    ids=["teacher", "features", "surrogate"],
)  # fmt: skip
def test_they_are_compiled_where_the_run_compiles(trained, asked, tmp_path, graphs):
    weights = {}
    for compiled in ("false", "training"):
        cache = tmp_path / compiled
        cfg = composed(*TINY, *asked, f"cache={cache}", f"compute.compile={compiled}")
        dataset = build(cfg, "dataset")
        trained(cfg, dataset, take_inventory(dataset, "train", 1, cache, 1))
        assert bool(graphs) == (compiled == "training")
        files = sorted(cache.glob("students/*")) or sorted(cache.glob("trajectories/*/0002*"))
        weights[compiled] = load_tensors(files[-1])
    ours, theirs = weights["training"], weights["false"]
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize("source", ["online", "stored"])
def test_the_teacher_that_answers_is_compiled_where_the_run_compiles(source, tmp_path, graphs):
    answers = {}
    for compiled in ("training", "false"):
        graphs.clear()
        cfg = composed(
            *TINY, "protocol=soft_label_short", f"protocol.teacher.{NETWORK}",
            "protocol.teacher.epochs=1", "protocol.teacher.minimum_top1=0",
            f"protocol.answers.source={source}", f"cache={tmp_path / compiled}",
            f"compute.compile={compiled}",
        )  # fmt: skip
        protocol, dataset = build_protocol(cfg), build(cfg, "dataset")
        protocol.prepare(TestImages(dataset, tmp_path / compiled, 1), torch.device("cpu"))
        trained = len(graphs)
        pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        ask = protocol.objective(pixels).answers
        ask.begin(0)
        answers[compiled] = ask(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))
        assert (len(graphs) > trained) == (compiled == "training")
    assert torch.allclose(answers["training"], answers["false"], atol=1e-3)
    folders = {path.name for path in tmp_path.glob("*/labels/*")}
    assert len(folders) == (source == "stored")
