"""Several guidances at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage, stages_of
from mgd3.sampling.terms import (
    DenoiseState,
    Guidance,
    GuidanceTerm,
    Reach,
    SamplingBatch,
    advice_of,
    fit_part,
    has_twin,
    needs_finished,
    reach_of,
)


class SumTerm:
    """The sum of the parts' terms, for one batch."""

    def __init__(self, terms: Sequence[GuidanceTerm]) -> None:
        self._terms = terms

    def reach(self, step: int) -> Reach:
        """The largest of the parts'."""
        return max(reach_of(term, step) for term in self._terms)

    @property
    def twin(self) -> bool:
        """Does any part look at twins?"""
        return any(map(has_twin, self._terms))

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""
        return reduce(Tensor.add, (term(state) for term in self._terms))


class Sum:
    """g_t is the sum of several guidances' (MGD3 with IGD's, for one)."""

    def __init__(self, block: int = 1, **parts: Guidance) -> None:
        """`parts` by name; `block` is what parts that read finished latents share.

        Raises `UserError` for no part at all.
        """
        if not parts:
            raise UserError("guidance: a sum has at least one part")
        self.parts = parts
        self.block = checks.integer("guidance.block", block, minimum=1)

    @property
    def needs_modes(self) -> bool:
        """Does any part?"""
        return any(part.needs_modes for part in self.parts.values())

    @property
    def needs_finished(self) -> bool:
        """Does any part?"""
        return any(map(needs_finished, self.parts.values()))

    @property
    def reach(self) -> Reach:
        """The largest of the parts'."""
        return max(map(reach_of, self.parts.values()))

    def check(self, num_steps: int) -> None:
        """Each part's own."""
        for part in self.parts.values():
            part.check(num_steps)

    def advice(self, num_steps: int, elements: int) -> list[str]:
        """Each part's own."""
        return [text for p in self.parts.values() for text in advice_of(p, num_steps, elements)]

    def fit(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> None:
        """Each part's own."""
        for part in self.parts.values():
            fit_part(part, dataset, lambda: inventory, backbone, work)

    def stages(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> list[Stage]:
        """Each part's own."""
        parts = self.parts.values()
        return [s for part in parts for s in stages_of(part, dataset, inventory, backbone, work)]

    def bind(self, batch: SamplingBatch) -> SumTerm:
        """The sum of the parts' terms."""
        return SumTerm([part.bind(batch) for part in self.parts.values()])
