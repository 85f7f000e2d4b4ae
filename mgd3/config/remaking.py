"""Single images of a distilled set, made again: with the set's modes, noise streams and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mgd3.config.build import build, build_distiller
from mgd3.config.identity import set_identity
from mgd3.config.schema import choices
from mgd3.data.distilled import DistilledDataset
from mgd3.distillers.finished import FinishedLatents
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.distillers.image_maker import Making
from mgd3.finetuning.phases import NoFineTuning
from mgd3.modes.discovery import ClassModes, ModeFile
from mgd3.modes.mode_captions import kept_prompts, prompt_rows
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.sampling.terms import DenoiseState
from mgd3.storage.cache import found


def refuse_other_versions(
    identity: Mapping[str, Any], cfg: DictConfig, given: Sequence[str] = ()
) -> None:
    """`UserError` where a part of a set's identity has had other values of its own since.

    An identity holds what differs from a choice's own values, so these must be of its version.
    A user who names keys of the part in `given` is taken to know.
    """
    here = set_identity(cfg, choices(cfg))
    for group, part in identity.items():
        now = here.get(group)
        if not (isinstance(part, Mapping) and isinstance(now, Mapping)):
            continue
        was, known = part.get("version", 1), now.get("version", 1)
        named = any(g.lstrip("+").startswith((f"{group}.", f"{group}=")) for g in given)
        if was != known and not named:
            raise UserError(
                f"the set was made with version {was} of {group}={part['choice']}, and here is "
                f"{known}, with other values of its own (configs/{group}/{part['choice']}.yaml); "
                f"say what it had by \"with=['{group}.KEY=VALUE',…]\""
            )


class Remaker:
    """What made a set, set up to make single images of it again.

    An image alone in its batch agrees with the file up to rounding.
    """

    def __init__(self, distilled: DistilledDataset, cfg: DictConfig) -> None:
        """`cfg` is the set's own configuration; `UserError` where its images were not generated."""
        distiller = build_distiller(cfg)
        if not isinstance(distiller, GenerativeDistiller):
            raise UserError(f"the images of {distilled.folder} were copied, not generated")
        self.distilled, self.distiller, self._cfg = distilled, distiller, cfg

    def latents(
        self, entry: Mapping[str, Any], on_step: Callable[[DenoiseState], None] | None = None
    ) -> Tensor:
        """Latents (1, C, h, w) of the image that an entry of the manifest names, as decoded.

        Where it depends on earlier images of its class, those are made first. `on_step` sees every
        sampling step of the image itself.
        """
        seed, wnid, number = entry["noise_stream"].split("/")
        checks.choice("the class of a noise stream", wnid, [entry["wnid"]])
        classes = self.distilled.classes
        ids = self.distiller.backbone.class_ids(classes)
        maker, key = self.distiller.maker, (wnid, int(number))
        finished = FinishedLatents(None, self.distilled.ipc, maker.block)
        making = Making(
            seed=int(seed),
            rows=dict(zip((c.wnid for c in classes), ids, strict=True)),
            labels={info.wnid: label for label, info in enumerate(classes)},
            found=self._modes(wnid),
            finished=finished,
            own_rows=self._own_rows(wnid),
        )
        if maker.learns:
            maker.fit(build(self._cfg, "dataset"), self.distiller.work)
        with self._weights(wnid):
            for earlier in finished.read_by(key) if maker.in_order else ():
                finished.add([earlier], maker.sample([earlier], making))
            return maker.refined([key], maker.sample([key], making, on_step), making)

    def mode(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The mode (1, C, h, w) that the image is steered to, if any."""
        _, wnid, number = entry["noise_stream"].split("/")
        modes = self._modes(wnid)
        if not modes:
            return None
        centers = modes[wnid].modes.centers
        return centers[int(number) % len(centers)][None]

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as images (B, 3, H, W) uint8 on the CPU."""
        key = (self.distilled.classes[0].wnid, 0)  # of a message that none will need
        return torch.cat([self.distiller.maker.pixels([key], row[None]) for row in latents])

    def _modes(self, wnid: str) -> dict[str, ClassModes]:
        """The class's modes as the set keeps them; empty where nothing needs any."""
        if not self.distiller.maker.needs_modes:
            return {}
        folder = self.distilled.folder
        path = folder / "modes" / f"{wnid}.safetensors"
        modes = found(path, {}, ModeFile())
        if modes is None:
            raise UserError(f"{path} is missing: the set does not hold the modes it was made with")

        def latents() -> Tensor:
            raise UserError(f"guidance of {folder} reads real latents, which a set has not")

        return {wnid: ClassModes(modes=modes, nearest=[], latents=latents)}

    def _own_rows(self, wnid: str) -> dict[str, list[int]]:
        """The backbone's rows of the prompts that the class's modes have; empty without any."""
        if not self.distiller.prompts.needs_modes:
            return {}
        prompts = kept_prompts(self.distilled.folder)
        checks.choice("a class of prompts.json", wnid, list(prompts))
        return prompt_rows(self.distiller.backbone, {wnid: prompts[wnid]})

    def _weights(self, wnid: str) -> AbstractContextManager[None]:
        """The class's fine-tuned weights, inside the block; made again if the cache lacks them."""
        distiller = self.distiller
        if isinstance(distiller.finetune, NoFineTuning):
            return nullcontext()
        dataset = build(self._cfg, "dataset")
        phases = distiller.finetune(distiller.backbone, dataset, distiller.work)
        phase = next(p for p in phases if wnid in [c.wnid for c in p.classes])
        return phase.applied(distiller.backbone)
