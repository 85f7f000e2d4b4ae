"""What is run on the dry device: every path of product code that would compute on a GPU, small."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from dry.generating import BACKBONES, GUIDANCE, SAMPLERS, SIDES, decoding, encoding, sampling
from dry.learning import BATCH, SIZE, coverage, fine_tuning, from_scratch, set_metrics, student
from dry.work import Make

_LIKE_ANOTHER = "stable_diffusion_xl"  # but for what its network is told


@dataclass(frozen=True)
class Subject:
    """One thing that is run; a step is what `step` says."""

    name: str
    step: str
    make: Make
    amount: int  # steps of the first measurement; the second, if any, does twice as many
    pixels: int  # bytes of a step's images as uint8
    process: str  # subjects of one name share a process, and the networks that it has loaded


def subjects() -> list[Subject]:
    """All of them, those that take longest first."""
    return [*_of_sampling(), *_of_images(), *_of_students(), *_of_the_rest()]


def _of_sampling() -> list[Subject]:
    found, what = [], "step of 4 images"
    for backbone in reversed(BACKBONES):
        side = SIDES.get(backbone, 64)
        all_of_them = product(SAMPLERS, GUIDANCE)
        for sampler, guidance in [("ddpm", "mode")] if backbone == _LIKE_ANOTHER else all_of_them:
            make, name = sampling(backbone, sampler, guidance), f"{backbone} {sampler} {guidance}"
            found.append(Subject(f"sampling {name}", what, make, 3, 4 * 3 * side**2, backbone))
    half = sampling("dit_digits", "ddpm", "mode", "bfloat16")
    name = "sampling dit_digits ddpm mode bfloat16"
    return [*found, Subject(name, what, half, 3, 4 * 3 * 8 * 8, "dit_digits")]


def _of_images() -> list[Subject]:
    chunks = (("latents", False), ("moments", True))
    return [
        *(
            Subject(f"decoding {b}", "batch of 4 images", decoding(b), 1, 4 * 3 * s * s, b)
            for b, s in (("dit_digits", 8), ("ldm", 64), ("stable_diffusion", 64))
        ),
        *(
            Subject(
                f"encoding {name}", "16 images", encoding(moments), 1, 16 * 3 * 64 * 64, "codec"
            )
            for name, moments in chunks
        ),
    ]


def _of_students() -> list[Subject]:
    kinds = {
        "hard_label": ("convnet3_w8", "resnetap10_w8", "resnet10", "timm/test_resnet"),
        "soft_label": ("convnet3_w8", "resnetap10_w8", "resnet10_bn", "timm/test_resnet"),
        "soft_label_fkd": ("convnet3_w8",),
    }
    pixels, what = BATCH * 3 * SIZE * SIZE, f"batch of {BATCH} images"
    made = {f"{p} {name}": student(name, p) for p, names in kinds.items() for name in names}
    made["hard_label convnet3_w8 bfloat16"] = student("convnet3_w8", "hard_label", "bfloat16")
    made["hard_label convnet3_w8 mapped"] = student("convnet3_w8", "hard_label", on_host=True)
    return [Subject(n, what, make, 2, pixels, n.split()[0]) for n, make in made.items()]


def _of_the_rest() -> list[Subject]:
    tuned = ("plain", "minimax", "self_adaptive_memory")
    scratch, pair = from_scratch("float32"), 2 * 3 * SIZE * SIZE
    return [
        *(
            Subject(
                f"fine-tuning {n}", "batch of 8 latents", fine_tuning(n), 2, 8 * 3 * 64, "tuned"
            )
            for n in tuned
        ),
        Subject("from scratch", "batch of 4 latents", scratch, 2, 4 * 3 * 4 * 4, "from scratch"),
        Subject("set metrics", "image of each class", set_metrics, 3, pair, "set metrics"),
        Subject("coverage", "image of each class", coverage, 3, pair, "coverage"),
    ]
