"""Which evaluator family our runs of a paper's rows are of, and tables that do not say it."""

from __future__ import annotations

from omegaconf import DictConfig

from mgd3.config.identity import spelt
from mgd3.config.paper import TABLE, PaperTable
from mgd3.config.schema import composed
from mgd3.runtime.errors import UserError


def evaluator_family(cfg: DictConfig) -> str | None:
    """The family that a configuration's protocol says it is of; None compares with nothing."""
    return cfg.protocol.get("family")


def refuse_mixed_families(table: PaperTable, file: str) -> None:
    """`UserError` for a row with a protocol of its own that does not say its numbers' family.

    `file` below configs/paper holds the table.
    """
    for row in table.published:
        options = table.rows.get(row, {})
        own = [f"{k}={spelt(v)}" for k, v in options.items() if k.split(".")[0] == "protocol"]
        if not own or table.names_family(row):
            continue
        ours = evaluator_family(composed(f"paper={file}", *own, name="reproduce"))
        theirs = table.family_of(row)
        if ours != theirs:
            raise UserError(
                f"paper_table mixes evaluator families: row {row} is scored under {ours} "
                f"({', '.join(own)}), and its published values are said to be of the whole table's "
                f"{theirs}; name this row's in paper_table.family: "
                f"{{{TABLE}: {theirs}, {spelt(row)}: …}}"
            )
