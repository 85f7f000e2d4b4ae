"""A DiT's timesteps and classes, embedded once in a forward pass as the released network does.

diffusers' port embeds them in every block and once more at its end: 29 times in DiT-XL/2, a third
of its kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


class SharedEmbedder(nn.Module):
    """diffusers' embedder of timesteps and classes, which takes an embedding for a timestep.

    Its parameters have the port's names.
    """

    def __init__(self, embedder: Any) -> None:
        super().__init__()
        self.time_proj = embedder.time_proj
        self.timestep_embedder = embedder.timestep_embedder
        self.class_embedder = embedder.class_embedder

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: Any = None) -> Tensor:
        """The embedding (B, D) of timesteps (B,) and classes (B,), or the one that is given."""
        if timestep.dim() == 2:
            return timestep
        waves = self.time_proj(timestep).to(hidden_dtype)  # (B, 256)
        return self.timestep_embedder(waves) + self.class_embedder(class_labels)


class EmbeddedOnce(nn.Module):
    """A transformer that embeds once where its blocks share an embedder.

    Training calls the transformer itself: the order in which 29 gradients are added up is part of
    its results.
    """

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Tensor:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        embedder = self.transformer.transformer_blocks[0].norm1.emb
        if isinstance(embedder, SharedEmbedder):
            t = embedder(t, class_ids, hidden_dtype=x_t.dtype)  # (B, D)
        return self.transformer(x_t, timestep=t, class_labels=class_ids, return_dict=False)[0]
