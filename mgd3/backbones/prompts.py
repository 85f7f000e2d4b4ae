"""From classes to prompts, and from prompts to the text encoder's states."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd3.backbones.weights.sources import at_hand, load_pretrained
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)

_AT_ONCE = 64  # prompts
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
    from transformers import CLIPTextModel

    return _encoded(
        prompts,
        source,
        compute,
        ("text_encoder", "tokenizer"),
        CLIPTextModel,
        lambda encoder, ids: (encoder(ids)[0],),
    )[0]


def encode_prompts_twice(
    prompts: Sequence[str], source: str, compute: Compute
) -> tuple[Tensor, Tensor]:
    """SDXL's states (P, tokens, D1 + D2) and pooled embedding (P, D), float32.

    States are the last but one of either text encoder, side by side; the embedding is the second
    encoder's projection. Each is loaded for this call alone.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    (first,) = _encoded(
        prompts,
        source,
        compute,
        ("text_encoder", "tokenizer"),
        CLIPTextModel,
        lambda encoder, ids: (encoder(ids, output_hidden_states=True).hidden_states[-2],),
    )

    def second(encoder: Any, ids: Tensor) -> tuple[Tensor, ...]:
        out = encoder(ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    states, pooled = _encoded(
        prompts,
        source,
        compute,
        ("text_encoder_2", "tokenizer_2"),
        CLIPTextModelWithProjection,
        second,
    )
    return torch.cat([first, states], dim=-1), pooled


def _encoded(
    prompts: Sequence[str],
    source: str,
    compute: Compute,
    parts: tuple[str, str],
    model: Any,
    run: Callable[[Any, Tensor], tuple[Tensor, ...]],
) -> list[Tensor]:
    """What `run(encoder, tokens (P, T))` gives for all prompts, float32.

    `parts`: the pipeline's folders of encoder and tokenizer.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # the long prompt is ours to explain
    transformers_logging.disable_progress_bar()
    encoder = load_pretrained("backbone.weights", source, parts[0], model=model, alone=False)
    encoder = compute.place(encoder)
    tokenizer = _tokenizer(source, parts[1], encoder.config.vocab_size)
    longest = encoder.config.max_position_embeddings  # a tokenizer may not know it
    if parts[1] == "tokenizer":  # a second one cuts as the first
        _warn_of_long_prompts(prompts, tokenizer, longest - 2)  # a start and an end are added
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    ).input_ids  # (P, tokens)
    found: list[Tensor] = []  # whole from the first batch on: a set may have thousands of prompts
    for start in range(0, len(prompts), _AT_ONCE):
        with torch.no_grad():
            outputs = run(encoder, tokens[start : start + _AT_ONCE].to(compute.torch_device))
        found = found or [o.new_empty(len(prompts), *o.shape[1:]).float() for o in outputs]
        for whole, output in zip(found, outputs, strict=True):
            whole[start : start + _AT_ONCE] = output
    return found


def _tokenizer(source: str, part: str, vocabulary: int) -> Any:
    from transformers import CLIPTokenizer

    try:
        folder = at_hand("backbone.weights", source, part)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=part, local_files_only=True)
        if len(tokenizer) < vocabulary // 2:  # it loads without its files, too
            raise ValueError(f"{len(tokenizer)} of {vocabulary} words")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"backbone.weights={source}: its {part} could not be loaded ({first_line(error)}); "
            "the pipeline may be incomplete: copy or fetch it again"
        ) from error
    return tokenizer


def _warn_of_long_prompts(prompts: Sequence[str], tokenizer: Any, longest: int) -> None:
    tokens = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
    long = [
        (prompt, ids) for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > longest
    ]
    if not long:
        return
    prompt, ids = long[0]
    others = f"; {len(long) - 1} more prompts are too long" if long[1:] else ""
    log.warning(
        "the prompt %r has %d tokens, the text encoder takes %d; cut off: %r%s",
        *(prompt, len(ids), longest, tokenizer.decode(ids[longest:]), others),
    )
