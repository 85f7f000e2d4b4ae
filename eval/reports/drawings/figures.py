"""Matplotlib's figures, as bytes; it is imported when one is drawn, and needs no screen."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def drawing(salt: str = "report") -> Iterator[None]:
    """Text is printed as it is, dollars included; the same drawing gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": salt, "text.parse_math": False}):
        yield


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes, (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def as_png(figure: Figure, dpi: int) -> bytes:
    """A PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_svg(figure: Figure, dpi: int | str = "figure") -> str:
    """An <svg> element; `dpi` is that of what is rasterized in it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=dpi, metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
