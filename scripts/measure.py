"""Measure distilled sets against the real one: diversity, coverage, distances, maps."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from eval.hub import local_images
from eval.images import TestImages
from eval.metrics.coverage import Coverage, HiddenModes, coverage_layout, measure_coverage
from eval.metrics.measuring import FeatureExtractor, Measured, measure_sets
from eval.metrics.redundancy import redundancy
from eval.metrics.set_metrics import metrics_layout
from eval.reports.drawings.maps import maps_picture
from eval.reports.run_report import distilled_sets, parted
from eval.reports.samples import MOST_CLASSES
from eval.results.layout import Layout
from eval.results.statistics import seed_order
from eval.results.sweeps import keys_of, places_of, value_of, variants
from eval.students.registry import expand_students
from mgd3.config import identity
from mgd3.config.build import build, build_protocol, build_space
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import CONFIGS, choices, plain, student_names
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.runtime import checks
from mgd3.runtime.compute import pick_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import commit
from mgd3.storage.files import write_atomic, write_json

log = logging.getLogger(__name__)

_BRIEF = ("diversity", "distance", "coverage", "modes", "Fréchet", "redundancy")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="measure")
def main(cfg: DictConfig) -> None:
    """Write metrics.json, metrics.md and maps for each IPC below `images`."""
    with begun(cfg) as folder:
        dataset, space = build(cfg, "dataset"), build_space(cfg, "metrics")
        protocol, students = build_protocol(cfg), expand_students(student_names(cfg))
        images = local_images(str(cfg.images), Path(cfg.runs))
        sets = sets_of(dataset, images)
        checks.flag("class_maps", cfg.class_maps)
        if cfg.most_real is not None:
            checks.integer("most_real", cfg.most_real, minimum=1)
        checks.integer("unseen", cfg.unseen, minimum=0)
        names = names_of(sets, keys_of(cfg.by))
    record(folder, cfg)
    by_ipc: dict[int, dict[str, list[DistilledDataset]]] = defaultdict(lambda: defaultdict(list))
    for folder, name in names.items():
        distilled = DistilledDataset(folder)
        by_ipc[distilled.ipc][name].append(distilled)
    if isinstance(space, HiddenModes):
        coverage = space.of(dataset)
        for ipc, methods in sorted(by_ipc.items()):
            _cover(images / f"coverage-ipc{ipc}", f"ipc {ipc}", methods, coverage)
        return
    inventory = take_inventory(dataset, "train", 1, Path(cfg.cache), cfg.compute.workers)
    extract: FeatureExtractor = space.fit(dataset, inventory)
    test = TestImages(dataset, Path(cfg.cache), cfg.compute.workers)
    name = plain(cfg.metrics).get("student", choices(cfg)["metrics"])
    shown = dataset.classes[:MOST_CLASSES] if cfg.class_maps else ()
    maps = {info.name: label for label, info in enumerate(shown)}
    planes = Path(cfg.cache, "planes")
    unseen = _unseen(cfg, dataset, extract)
    for ipc, methods in sorted(by_ipc.items()):
        out = images / f"metrics-{name}-ipc{ipc}"
        found = measure_sets(
            methods, extract, f"sets of ipc {ipc}", cfg.most_real, maps, unseen, planes
        )
        repeated = {}
        if cfg.redundancy:
            device = pick_device(cfg.compute.device)
            repeated = {
                m: redundancy(s[0], s[1], protocol, students[0], test, device)
                for m, s in methods.items()
                if len(s) > 1
            }
        _write(out, f"{name}, ipc {ipc}", name, found, repeated)


def _unseen(
    cfg: DictConfig, dataset: RealDataset, extract: FeatureExtractor
) -> list[Tensor] | None:
    """Features of test images by class, by which copies of training images are told."""
    if cfg.unseen == 0:
        return None
    inventory = take_inventory(dataset, "val", 1, Path(cfg.cache), cfg.compute.workers)
    images = [[image.decode() for image in found.images[: cfg.unseen]] for found in inventory]
    return [extract(of_class)[0] for of_class in images]


def _cover(
    out: Path, title: str, methods: Mapping[str, list[DistilledDataset]], coverage: Coverage
) -> None:
    """Which hidden modes the sets of one IPC hold."""
    measured = measure_coverage(methods, coverage, title)
    table = coverage_layout(measured, f"hidden modes, {title}")
    sets = {name: [asdict(s) for s in found] for name, found in measured.items()}
    write_json(out / "coverage.json", {"commit": commit(), "sets": sets})
    write_atomic(out / "coverage.md", table.markdown().encode())
    Console().print(table.for_terminal())
    log.info("coverage: %s", out)


def sets_of(dataset: RealDataset, folder: Path) -> list[DistilledDataset]:
    """The finished sets below a folder; `UserError` if none, or one of another dataset."""
    sets, _ = parted(distilled_sets(folder))
    if not sets:
        raise UserError(f"images={folder} holds no finished distilled dataset")
    for distilled in sets:
        if [c.wnid for c in distilled.classes] != [c.wnid for c in dataset.classes]:
            raise UserError(
                f"{distilled.folder} holds the classes of {distilled.manifest['dataset']}, "
                f"not those of dataset={dataset.name}; name its own dataset"
            )
    return sets


def _write(
    out: Path, title: str, space: str, found: Measured, repeated: Mapping[str, float]
) -> None:
    table = metrics_layout(found.metrics, title, found.scores)
    if repeated:
        shown = [f"{repeated[m]:.1f}" if m in repeated else "" for m in found.metrics]
        table = table.with_column("redundancy, % ↓", shown)
    content = {
        "space": space,
        "commit": commit(),
        "sets": {m: [asdict(s) for s in of] for m, of in found.metrics.items()},
        "tsne_first_set": {m: asdict(s) for m, s in found.scores.items()},
        "redundancy": dict(repeated),
    }
    write_json(out / "metrics.json", content)
    write_atomic(out / "metrics.md", table.markdown().encode())
    write_atomic(out / "maps.svg", maps_picture(found.planes)[0].encode())
    if found.classes:
        write_atomic(out / "class_maps.svg", maps_picture(found.classes)[0].encode())
    Console().print(brief(table).for_terminal())
    log.info("metrics: %s", out)


def names_of(sets: Sequence[DistilledDataset], keys: Sequence[str]) -> dict[Path, str]:
    """A name for each set's line: its method, the values of `keys`, and what else tells it apart.

    Methods come as they appear, the sets of each by the values of `keys` and their seeds. Sets
    that differ in their seed alone share a name. Raises `UserError` as `variants` does.
    """
    names: dict[Path, str] = {}
    configurations: dict[str, list[str]] = defaultdict(list)
    methods = [distilled.manifest["method"] for distilled in sets]
    values = [tuple(value_of(distilled.manifest, key) for key in keys) for distilled in sets]
    told_apart = variants(methods, values, keys)
    places = zip(map(methods.index, methods), places_of(values), strict=True)
    seeds = [seed_order(distilled.manifest.get("seed")) for distilled in sets]
    lines = sorted(
        zip(places, seeds, sets, methods, told_apart, strict=True), key=lambda line: line[:2]
    )
    for _, _, distilled, method, variant in lines:
        name = " ".join(filter(None, [method, variant]))
        shared = identity.without_seed(distilled.identity)
        digest = identity.digest({k: v for k, v in shared.items() if k != "ipc"})
        if digest not in configurations[name]:
            configurations[name].append(digest)
        names[distilled.folder] = f"{name} #{digest}"
    alone = {name for name, digests in configurations.items() if len(digests) == 1}
    return {f: n.split(" #")[0] if n.split(" #")[0] in alone else n for f, n in names.items()}


def brief(table: Layout) -> Layout:
    """What fits a terminal; the files have every column."""
    return table.kept([0, 2, *(k for k, h in enumerate(table.headers) if h.startswith(_BRIEF))])


if __name__ == "__main__":
    command(main)
