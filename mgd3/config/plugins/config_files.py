"""Configuration files, each parsed once in a process: a grid composes hundreds of times."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source as hydras
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

_parsed: dict[tuple[str, int, int], bytes] = {}  # by path, time of change and size


class FileConfigSource(hydras.FileConfigSource):
    """Hydra's source of YAML files, which parses a file again only once it has changed.

    Of the same name, since a launcher's process registers Hydra's after ours: it keeps the first
    of a name and refuses another one.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """A result of the caller's own, for Hydra writes into it."""
        path = Path(self.path, self._normalize_file_name(config_path))
        try:
            found = path.stat()
        except OSError:  # Hydra says what is wrong
            return super().load_config(config_path)
        key = str(path), found.st_mtime_ns, found.st_size
        if key not in _parsed:
            _parsed[key] = pickle.dumps(super().load_config(config_path), pickle.HIGHEST_PROTOCOL)
        return pickle.loads(_parsed[key])

    def __deepcopy__(self, memo: dict[int, Any]) -> FileConfigSource:
        """Itself: Hydra copies its sources for every composition, and this one never changes."""
        return self

    def __reduce__(self) -> tuple[type[hydras.FileConfigSource], tuple[str, str]]:
        """Hydra's own: a launcher's process may not know where ours lies."""
        return hydras.FileConfigSource, (self.provider, f"{self.scheme()}://{self.path}")


def parse_once() -> None:
    """Let Hydra read through ours from now on."""
    Plugins.instance()  # which registers Hydra's own sources first
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
