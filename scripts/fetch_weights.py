"""Fetch a backbone's weights to where a run looks for them.

python scripts/fetch_weights.py dit_xl2_256                          a backbone of configs/backbone
python scripts/fetch_weights.py dit_xl2_256 backbone.vae=ORG/NAME    with another VAE
python scripts/fetch_weights.py stabilityai/sd-vae-ft-mse            a hub repository
python scripts/fetch_weights.py https://HOST/FILE#sha256=HEX         a file, checksum optional

Repositories go to the hub's cache (HF_HOME), files to weights/ or MGD3_WEIGHTS. A broken download
goes on where it stopped; sizes and checksums are verified where they are published.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.backbones.weights.checkpoints import read_weights
from mgd3.backbones.weights.download import PARTS, fetch_repository, fetch_url
from mgd3.backbones.weights.sources import download_path, find_file, is_url
from mgd3.config.schema import CONFIGS, errors_for_people, plain, register
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

_BACKBONES = sorted(p.stem for p in Path(CONFIGS, "backbone").glob("*.yaml"))


def sources(backbone: str, overrides: list[str]) -> dict[str, list[str]]:
    """What a backbone's configuration reads, with the pipeline folders that it needs of each."""
    checks.choice("BACKBONE", backbone, _BACKBONES)
    register()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("config", overrides=[f"backbone={backbone}", *overrides])
    options = plain(cfg.backbone)
    weights, vae = options.get("weights"), options.get("vae")
    if weights == "???":
        print(f"backbone={backbone}: its weights are your own, made by scripts/train_backbone.py")
        weights = None
    rest = [part for part in PARTS if part != "vae"]
    found = {str(weights): rest if vae else list(PARTS)} if weights else {}
    return found | ({str(vae): ["vae"]} if vae else {})


def fetch(source: str, parts: list[str]) -> Path:
    """The local path of a source, fetched unless it is there."""
    if is_url(source):
        path = download_path(source)
        is_new = not path.is_file()
        fetch_url(source, path)
        try:
            read_weights("fetched", path)
        except UserError:
            if is_new:
                path.unlink()
            raise
        return path
    local = find_file("weights", source) or Path(source).expanduser()
    if local.exists():
        return local
    if source.count("/") != 1:
        raise UserError(f"{source} is neither here nor a hub id (org/name) nor an https address")
    return fetch_repository(source, parts)


def main() -> None:
    """Fetch everything that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="BACKBONE|HUB_ID|URL", help=", ".join(_BACKBONES))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. backbone.vae=...")
    arguments = parser.parse_args()
    is_source = is_url(arguments.what) or "/" in arguments.what
    wanted = (
        {arguments.what: list(PARTS)} if is_source else sources(arguments.what, arguments.overrides)
    )
    for source, parts in wanted.items():
        print(f"{source}: {fetch(source, parts)}")
    if not wanted:
        print(f"backbone={arguments.what} needs no weights")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with errors_for_people():
        main()
