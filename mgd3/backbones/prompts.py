"""From classes to prompts, and from prompts to the text encoder's states."""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd3.backbones.weights.sources import at_hand, load_pretrained
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)

_FIELDS = ("name", "synonyms", "wnid")


class PromptTemplate:
    """A class's prompt: text with {name}, {synonyms} (all of its names) and {wnid} filled in.

    «{name}» is the paper's class name; «{synonyms}» the whole line of names that the released
    script uses («tench, Tinca tinca»).
    """

    def __init__(self, template: str) -> None:
        if not isinstance(template, str):
            raise UserError(f"backbone.prompt={template!r} is not text")
        try:
            fields = {
                name for _, name, _, _ in string.Formatter().parse(template) if name is not None
            }
        except (ValueError, TypeError) as error:
            raise UserError(f"backbone.prompt={template!r} is no template: {error}") from error
        unknown = sorted(fields - set(_FIELDS))
        if unknown:
            raise UserError(
                f"backbone.prompt={template!r}: {{{unknown[0]}}} is unknown; allowed: "
                + ", ".join(f"{{{f}}}" for f in _FIELDS)
            )
        self.template = template
        try:
            self(ClassInfo("wnid", "name"))
        except (ValueError, LookupError, AttributeError) as error:
            raise UserError(f"backbone.prompt={template!r} is no template: {error}") from error

    def __call__(self, info: ClassInfo) -> str:
        """The prompt of one class."""
        name = info.name.split(",")[0].strip()
        return self.template.format(name=name, synonyms=info.name, wnid=info.wnid)


def encode_prompts(prompts: Sequence[str], source: str, compute: Compute) -> Tensor:
    """The text encoder's last states, (P, tokens, D) float32; it is loaded for this call alone.

    Warns of a prompt longer than the tokenizer takes and says what is cut.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # the long prompt is ours to explain
    transformers_logging.disable_progress_bar()
    encoder = load_pretrained(
        "backbone.weights", source, "text_encoder", model=CLIPTextModel, alone=False
    )
    encoder = compute.place(encoder)
    try:
        folder = at_hand("backbone.weights", source, "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, subfolder="tokenizer", local_files_only=True
        )
        if len(tokenizer) < encoder.config.vocab_size // 2:  # it loads without its files, too
            raise ValueError(f"{len(tokenizer)} of {encoder.config.vocab_size} words")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"backbone.weights={source}: its tokenizer could not be loaded ({first_line(error)}); "
            "the pipeline may be incomplete: copy or fetch it again"
        ) from error
    longest = encoder.config.max_position_embeddings  # a tokenizer may not know it
    _warn_of_long_prompts(prompts, tokenizer, longest - 2)  # a start and an end are added
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    ).input_ids  # (P, tokens)
    with torch.no_grad():
        parts = [encoder(part.to(compute.torch_device))[0] for part in tokens.split(64)]
    return torch.cat(parts).float()


def _warn_of_long_prompts(prompts: Sequence[str], tokenizer: Any, longest: int) -> None:
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > longest:
            lost = tokenizer.decode(ids[longest:])
            log.warning(
                "the prompt %r has %d tokens, the text encoder takes %d; cut off: %r",
                *(prompt, len(ids), longest, lost),
            )
