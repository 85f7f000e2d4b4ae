"""Numbers of the original implementations, reproduced in float32 to 1e-4.

The folder is `MGD3_GOLDEN_DIR`, or the copies beside this file; sizes and settings are read from
the files, so that other networks with the same layout can be dropped in.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import GOLDEN

from eval.students.convnet import ConvNet
from eval.students.resnet import resnet_in
from eval.students.resnet_ap import ResNetAP
from mgd3.backbones.dit import BareDiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.weights.dit_weights import from_original
from mgd3.runtime.compute import Compute
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.checkpoints import read_weights

TOLERANCE = 1e-4


def _read(name, folder=GOLDEN):
    with safe_open(folder / name, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def _names(file, suffix):
    with safe_open(GOLDEN / file, framework="pt") as f:
        return sorted(k.removesuffix(suffix) for k in f.keys() if k.endswith(suffix))  # noqa: SIM118


def golden_network():
    """The golden network as a backbone, without a codec."""
    _, metadata = _read("dit_mode_guidance.safetensors")
    tensors, _ = read_weights("weights", GOLDEN / "dit_mode_guidance.pt")
    network = from_original(tensors, json.loads(metadata["config"])["num_heads"])
    return BareDiT(network.eval(), Compute(device="cpu"))


class RecordedNoise:
    def __init__(self, x_t, steps):
        self._initial, self._steps = x_t, iter(steps)

    def initial(self):
        return self._initial

    def step(self):
        return next(self._steps)


@torch.inference_mode()
def test_forward_pass_of_the_original_checkpoint():
    golden, _ = _read("dit_mode_guidance.safetensors")
    out = golden_network().predict(
        golden["forward.x"].float(), golden["forward.t"], golden["forward.y"]
    )
    difference = torch.cat([out.eps, out.variance], dim=1) - golden["forward.out"]
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("case", _names("dit_mode_guidance.safetensors", ".x_T"))
def test_whole_trajectory(case):
    golden, _ = _read("dit_mode_guidance.safetensors")
    g = {k.removeprefix(f"{case}."): v for k, v in golden.items() if k.startswith(f"{case}.")}
    steps, stop_t, scale, cfg_scale = g["params"].tolist()
    sampler_class = DDIM if case.startswith("ddim") else DDPM
    sampler = sampler_class(steps=int(steps), cfg_scale=cfg_scale, cfg_channels=3)
    out = sampler(
        golden_network(),
        SamplingBatch(class_ids=g["labels"], modes=g["modes"].float()),
        ModeGuidance(scale=scale, stop_t=int(stop_t)),
        RecordedNoise(g["x_T"].float(), g.get("step_noise", torch.empty(0)).float()),
    )
    assert (out - g["out"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("part", ["unet", "encoder", "decoder"])
def test_latent_diffusion(part, tmp_path):
    """The original's UNet, its latents before quantisation, its pictures of quantised ones."""
    folder = Path(os.environ.get("MGD3_GOLDEN_DIR", GOLDEN.parents[2] / "shared/golden"))
    if not (folder / "ldm_class_conditional.ckpt").is_file():
        pytest.skip(f"{folder} has no ldm_class_conditional.ckpt; MGD3_GOLDEN_DIR names its folder")
    golden, metadata = _read("ldm_class_conditional.safetensors", folder)
    backbone = LDM(
        str(folder / "ldm_class_conditional.ckpt"),
        image_size=json.loads(metadata["vq"])["resolution"],
        num_heads=json.loads(metadata["unet"])["num_heads"],
        cache=tmp_path,
        compute=Compute(device="cpu"),
    )
    keys = ["first", "second"]
    out, expected = {
        "unet": lambda: (
            backbone.predict(golden["unet.x"], golden["unet.t"], golden["unet.y"]).eps,
            golden["unet.out"],
        ),
        "encoder": lambda: (
            backbone.codec.encode(golden["vq.images"], keys),
            golden["vq.latents"],
        ),
        "decoder": lambda: (backbone.codec.decode(golden["vq.latents"]), golden["vq.decoded"]),
    }[part]()
    assert (out - expected).abs().max() < TOLERANCE
    assert backbone.null_class == int(metadata["num_classes"]) - 1


@pytest.mark.parametrize("name", _names("students.safetensors", ".logits"))
@torch.inference_mode()
def test_student_networks(name):
    golden, metadata = _read("students.safetensors")
    options = json.loads(metadata[name])
    image_size, classes = options["size"], options["classes"]
    if name.startswith("convnet"):
        student = ConvNet(options["depth"], options["width"], classes, image_size)
    elif name.startswith("resnet_ap"):
        student = ResNetAP(options["depth"], round(64 * options["width"]), classes, image_size)
    else:
        student = resnet_in(options["depth"], classes, image_size)
    prefix = f"{name}.state."
    state = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    student.load_state_dict(state, strict=True)
    assert (student(golden[f"{name}.x"]) - golden[f"{name}.logits"]).abs().max() < TOLERANCE
