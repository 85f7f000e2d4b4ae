"""Hidden modes: counted by a network that knows them, against sets whose digits are known."""

import pytest
import torch
from PIL import Image
from support import composed, row

from eval.metrics.coverage import (
    SetCoverage,
    coverage_layout,
    expected_covered,
)
from eval.reports.findings import sentences
from mgd3.config.build import build, build_space
from mgd3.data.digits import Digits, DigitsParity
from mgd3.runtime.errors import UserError


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    cfg = composed(
        "dataset=digits_parity", "metrics=coverage", "metrics.student=convnet3_w64",
        "metrics.epochs=30", f"cache={tmp_path_factory.mktemp('cache')}", "compute.device=cpu",
        "compute.workers=1", name="measure",
    )  # fmt: skip
    return build_space(cfg, "metrics").of(build(cfg, "dataset"))


class Made:
    """A set of real digits whose modes are known."""

    def __init__(self, digits, seed=0):
        self.digits, self.manifest = digits, {"seed": seed}

    def images(self):
        for label, digit, k in self.digits:
            yield Digits(8).images("val", digit)[k].decode(), label


def test_modes_of_real_digits_are_recognised(measure):
    one_each = [(digit % 2, digit, k) for digit in range(10) for k in range(8)]
    found = measure(Made(one_each))
    assert (found.covered, found.modes) == (10, 10)
    assert found.foreign < 0.1 and found.evenness > 0.97
    assert sum(found.counts) == round(80 * (1 - found.foreign))
    one_digit = measure(Made([(label, label, k) for label in (0, 1) for k in range(8)]))
    assert 2 <= one_digit.covered <= 3 and one_digit.evenness < 0.3
    assert one_digit.counts[0] >= 7


def test_a_mode_in_the_other_class_is_foreign(measure):
    swapped = measure(Made([(1 - digit % 2, digit, k) for digit in range(10) for k in range(3)]))
    assert swapped.foreign > 0.9 and swapped.covered <= 2


def test_real_images_are_at_their_modes_and_noise_is_not(measure):
    real = measure(Made([(digit % 2, digit, 0) for digit in range(10)]))

    class Noise(Made):
        def images(self):
            for label, _, k in self.digits:
                draw = torch.Generator().manual_seed(k)
                pixels = torch.randint(256, (8, 8), generator=draw, dtype=torch.uint8).numpy()
                yield Image.fromarray(pixels).convert("RGB"), label

    noise = measure(Noise([(k % 2, 0, k) for k in range(20)]))
    assert noise.distance > 1.5 * real.distance


def test_independent_draws_miss_what_counting_says():
    assert 5 - expected_covered(5, 5) == pytest.approx(1.6384)
    assert expected_covered(1, 10) == pytest.approx(1)


def covered(count, seed):
    return SetCoverage(
        covered=count,
        modes=10,
        evenness=0.5,
        foreign=0.1,
        images=10,
        distance=1.0,
        counts=[1] * 10,
        seed=seed,
    )


FEWER, MORE = (6, 7, 8, 8, 8), (7, 8, 9, 9, 10)  # modes by seed; 1.2 apart, give or take 0.56


def test_differences_are_paired_by_seed():
    ours = [covered(c, s) for s, c in enumerate(MORE)]
    theirs = [covered(c, s) for s, c in enumerate(FEWER)]
    table = coverage_layout({"mgd3": ours, "unguided": theirs}, "t")
    lines = dict(zip(table.headers, table.texts()[0], strict=True))
    assert lines["modes covered of 10"].startswith("8.60 [")
    assert lines["minus unguided"] == "+1.20 [+0.64, +1.76]"


def test_sentences_say_what_the_numbers_allow():
    plain = [covered(c, s) for s, c in enumerate(FEWER)]
    better = [covered(c, s) for s, c in enumerate(MORE)]
    rows = [row(m, s, last=last) for m, scores in (("unguided", (70, 80, 75)),
            ("mgd3", (71, 79, 76))) for s, last in enumerate(scores)]  # fmt: skip
    first, said = sentences(rows, {"unguided": plain, "mgd3": better}, "mgd3", 5)
    assert "unguided 7.4, mgd3 8.6; independent draws that hit all modes alike" in first
    assert "would show 6.7" in first
    assert "More modes? Yes: +1.20 [+0.64, +1.76] modes, paired over 5 sets." in said
    assert "Better students? 3 sets cannot tell: +0.33 [" in said
    _, fewer = sentences(rows, {"unguided": better, "mgd3": plain}, "mgd3", 5)
    assert "No, fewer: -1.20" in fewer
    assert sentences(rows, {"mgd3": better}, "mgd3", 5) == []


def test_a_dataset_that_does_not_know_its_modes_is_refused():
    cfg = composed("dataset=digits", "metrics=coverage", "compute.device=cpu", name="measure")
    with pytest.raises(UserError, match="dataset=digits does not say which hidden modes"):
        build_space(cfg, "metrics").of(build(cfg, "dataset"))
    assert DigitsParity(8).parts.name == "digits"
