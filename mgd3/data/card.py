"""The page of a distilled set: what it is, and how other libraries read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mgd3.runtime.text import markdown_text


def dataset_card(manifest: Mapping[str, Any], licence: str | None = None, scores: str = "") -> str:
    """A dataset card as the Hugging Face hub shows it, `scores` in Markdown.

    `licence` is the hub's identifier of one, such as cc-by-4.0.
    """
    classes = "\n".join(
        f"| {label} | {markdown_text(c['wnid'])} | {markdown_text(c['name'])} |"
        for label, c in enumerate(manifest["classes"])
    )
    count, note = len(manifest["images"]), manifest["dataset_note"]
    method = markdown_text(manifest["method"])
    noted = f"\n**Note:** {markdown_text(note)}.\n" if note else ""
    scored = f"\n## Scores\n\n{scores}" if scores else ""
    licensed = f"license: {licence}\n" if licence else ""
    files = image_files(c["wnid"] for c in manifest["classes"])
    return f"""---
{licensed}task_categories: [image-classification]
tags: [dataset-distillation]
configs:
- config_name: default
  drop_labels: false
  data_files:
  - split: train
    path: {files}
---
# {markdown_text(manifest["dataset"])}, {manifest["ipc"]} images per class, {method}

{count} training images of {len(manifest["classes"])} classes, made by {method} with seed
{manifest["seed"]}. `manifest.json` holds the full configuration, versions and checksums.
{noted}
```python
torchvision.datasets.ImageFolder("images")
datasets.load_dataset("imagefolder", data_files={{"train": {files}}}, drop_labels=False)
```

Both number the classes in sorted order; the benchmark's order is

| label | folder | name |
|---|---|---|
{classes}
{scored}
## Configuration

```json
{json.dumps(manifest["config"], indent=2)}
```
"""


def image_files(wnids: Iterable[str]) -> str:
    """What `load_dataset` needs to be told to find every image, as Python and YAML write it.

    Left alone, it takes class folders called train, test or val for splits; and folders whose names
    begin with two underscores count only where a pattern says so.
    """
    if any(wnid.startswith("__") for wnid in wnids):
        return '["images/**", "images/__*/*"]'
    return '"images/**"'
