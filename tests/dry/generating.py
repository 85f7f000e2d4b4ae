"""Encoding, sampling and decoding with every backbone, sampler and guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from conftest import image
from networks import compvis_tensors, small_stable_diffusion, small_stable_diffusion_xl, small_vae
from support import GOLDEN

from dry.count import counts
from dry.work import Make, Values
from mgd3.backbones.dit import DiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.stable_diffusion_xl import StableDiffusionXL
from mgd3.backbones.toy import Toy
from mgd3.data.datasets import ImageTree
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.modes.finders import KMeansModes
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Compute, Work
from mgd3.sampling.guidance import ModeGuidance, NoGuidance, TangentModeGuidance
from mgd3.sampling.samplers import DDIM, DDPM, ReleasedDDIM

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
CLASSES = ("n01440764", "n01443537")  # ImageNet's first two, which every network here knows


def weights(folder: Path) -> None:
    """Write the small networks that the backbones read."""
    small_vae(folder / "vae")
    torch.save({"state_dict": compvis_tensors()}, folder / "model.ckpt")
    small_stable_diffusion(folder / "pipeline")
    small_stable_diffusion_xl(folder / "xl")


BACKBONES = {
    "toy": lambda w, c: Toy(8, mean=0.0, shift=0.2, std=0.3, compute=c),
    "dit_digits": lambda w, c: DiT(DIGITS, None, 8, num_heads=4, compute=c),
    "dit": lambda w, c: DiT(
        str(GOLDEN / "dit_mode_guidance.pt"), str(w / "vae"), 64, num_heads=4, compute=c
    ),
    "ldm": lambda w, c: LDM(str(w / "model.ckpt"), 64, cache=w, compute=c),
    "stable_diffusion": lambda w, c: StableDiffusion(str(w / "pipeline"), 64, 32, compute=c),
    "stable_diffusion_xl": lambda w, c: StableDiffusionXL(str(w / "xl"), 64, 32, compute=c),
}
SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "ddim_released": ReleasedDDIM}
GUIDANCE = {
    "none": NoGuidance,
    "mode": lambda: ModeGuidance(0.1, 0),
    "mode_tangent": lambda: TangentModeGuidance(0.1, 0, tangent_dim=2, tangent_neighbors=3),
}
SIDES = {"toy": 8, "dit_digits": 8}  # pixels; 64 of the others


@cache
def _backbone(name: str, weights: Path, device: str, precision: str = "float32"):
    """Loaded once in a process."""
    return BACKBONES[name](weights, Compute(device=device, precision=precision))


def tree(folder: Path, per_class: int, classes: tuple[str, str] = CLASSES) -> ImageTree:
    """Two classes of noise images, in a folder of their own."""
    root = folder / f"tree-{per_class}"
    for split, count in (("train", per_class), ("val", 2)):
        for label, wnid in enumerate(classes):
            (root / split / wnid).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                image(seed=100 * label + k).save(root / split / wnid / f"{k:03d}.png")
    return ImageTree("noise", None, str(root), 16)


def _distilling(
    backbone: str, sampler: str, guidance: str, steps: int, ipc: int, device: str, folder: Path,
    precision: str = "float32", marks: bool = True,
) -> Callable[[], Values]:  # fmt: skip
    """Batches of four images; with `marks` each step is one."""
    kind, options = SAMPLERS[sampler], {}
    if kind is DDPM:
        options = {"variance": "learned" if backbone.startswith("dit") else "fixed"}
    seen: Values = {}

    def on_step(state) -> None:
        if marks:
            counts().mark()
        seen[f"x0_hat {state.step} {state.images[0]}"] = state.x0_hat

    distiller = GenerativeDistiller(
        _backbone(backbone, folder.parent, device, precision),
        kind(steps=steps, cfg_scale=2.0, cfg_channels=3, **options),
        GUIDANCE[guidance](),
        KMeansModes(),
        Work(cache=folder / "cache", batch_size=4, workers=1, flip="none"),
        on_step=on_step,
    )
    dataset = tree(folder, 4, ("0", "1") if backbone == "dit_digits" else CLASSES)

    def work() -> Values:
        out = distiller.distill(dataset, ipc, 0, folder / "out", {"method": "m", "config": {}})
        pictures = {f"image {k}": from_pil(made) for k, (made, _) in enumerate(out.images())}
        return seen | pictures

    return work


def sampling(backbone: str, sampler: str, guidance: str, precision: str = "float32") -> Make:
    """A batch of four images, in as many steps as is asked."""

    def make(device: str, steps: int, folder: Path) -> Callable[[], Values]:
        return _distilling(backbone, sampler, guidance, steps, 2, device, folder, precision)

    return make


def decoding(backbone: str) -> Make:
    """Batches of four images: two steps, decoded, checked, written."""

    def make(device: str, batches: int, folder: Path) -> Callable[[], Values]:
        return _distilling(backbone, "ddpm", "none", 2, 2 * batches, device, folder, marks=False)

    return make


def encoding(moments: bool) -> Make:
    """Chunks of sixteen images to latents in the cache."""

    def make(device: str, chunks: int, folder: Path) -> Callable[[], Values]:
        dataset = tree(folder, 16 * chunks)
        codec = _backbone("stable_diffusion", folder.parent, device).codec
        codec.network  # noqa: B018 loaded on first use
        (found, _), info = take_inventory(dataset, "train", 1, folder, 1), dataset.classes[0]
        cache = LatentCache(folder / "latents", codec, "none")

        def work() -> Values:
            if moments:
                return dict(zip(("mean", "std"), cache.moments(info, found), strict=True))
            return {"latents": cache.latents(info, found)}

        return work

    return make
