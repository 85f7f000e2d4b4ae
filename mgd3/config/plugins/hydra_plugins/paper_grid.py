"""A grid of runs as a Hydra sweep: the jobs come from a paper's table, not from commas.

Hydra takes plugins from a package of this name alone; `schema.find_plugins` says where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from hydra_plugins.side_by_side import launch
from omegaconf import DictConfig


class PaperGrid(Sweeper):
    """Hands the command line to a function, and what that launches to Hydra's launcher.

    `handler` names the function: of the composed configuration, the overrides that are not
    Hydra's own, and `launch`, which takes lists of run.py's overrides.
    """

    launcher: Launcher
    config: DictConfig

    def __init__(self, handler: str) -> None:
        self._handler = handler

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra once."""
        get_method(self._handler)(self.config, arguments, self._launch)

    def _launch(self, jobs: Sequence[Sequence[str]]) -> Sequence[Any]:
        return launch(self.launcher, jobs)
