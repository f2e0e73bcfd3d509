"""Figures of the spectrum of D, by matplotlib."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from keras_rgd.diffusion_matrix import rank_cut
from keras_rgd.records import DiffusionRecord, Spectrum


def plot_spectrum(
    records: DiffusionRecord | Spectrum | list[DiffusionRecord | Spectrum], ax: Any = None
) -> Any:
    """Eigenvalues against their index on log-log axes, with the rank cut and 1/eps of the last.

    Args:
        records: one `DiffusionRecord` or `Spectrum`, or a list to be drawn from light to dark.
        ax: matplotlib axes to draw on. Defaults to `None`, axes of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there is no record, or none with a positive eigenvalue.
    """
    # Only here: half of the time that importing the package would take.
    import matplotlib.figure

    records = list(records) if isinstance(records, list | tuple) else [records]
    if not any(record.lambda_max > 0 for record in records):
        raise ValueError(
            f"Expected a record with a positive eigenvalue. Received: {records!r:.100}"
        )
    if ax is None:
        figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
        ax = figure.add_subplot()
    for shade, record in zip(np.linspace(0.25, 1, len(records)), records, strict=True):
        counted = record.eigenvalues[record.eigenvalues > _floor(record)]
        ends = record in (records[0], records[-1])
        label = _label(record, records) if ends else None
        color = matplotlib.colormaps["viridis_r"](shade if len(records) > 1 else 0.8)
        ax.loglog(
            np.arange(1, len(counted) + 1), counted, ".-", ms=3, lw=1, color=color, label=label
        )
    last = records[-1]
    rank, cut, factor = _rank(last)
    label = rf"cut $\lambda_{{max}}\,{factor}$: rank {rank}"
    ax.axhline(cut, color="tab:gray", ls="--", lw=1, label=label)
    epsilon = getattr(last, "epsilon", 0)
    if epsilon > 0:
        ax.axhline(1 / epsilon, color="tab:red", ls=":", lw=1.5, label=r"$1/\epsilon$")
    ax.set_xlabel("index of the eigenvalue")
    ax.set_ylabel("eigenvalue of D")
    n = last.n_examples if isinstance(last, Spectrum) else last.examples
    ax.set_title(f"Spectrum of D, N = {n:,}, d = {last.n_weights:,}")
    ax.legend(loc="lower left", fontsize="small")
    return ax


def _label(record, records):
    if isinstance(record, Spectrum):
        return f"spectrum {records.index(record) + 1}" if len(records) > 1 else None
    return f"epoch {record.epoch}"


def _floor(record):
    """Eigenvalues below are rounding."""
    if isinstance(record, Spectrum):
        n, d = record.n_examples, record.n_weights
        return rank_cut(record.lambda_max, n, d, "gram_of_dataset")
    return record.rank_gram_cut


_BY_D = r"d\,\epsilon_{32}"  # of float32


def _rank(record):
    """The rank as it is shown, its cut, and what lambda_max is multiplied by there."""
    if isinstance(record, Spectrum):
        rank = f"{record.rank}{' or more' if record.rank_is_lower_bound else ''}"
        by_d = record.rank_rule == "reference"
        return rank, record.rank_cut, _BY_D if by_d else r"\min(N, d)\,\epsilon_{32}"
    if record.rank is not None:
        return f"{record.rank}", record.rank_cut, _BY_D
    return f"{record.rank_gram}", record.rank_gram_cut, r"N\,\epsilon"


def picture(record: DiffusionRecord) -> bytes:
    """The spectrum of a record as a PNG file, bytes."""
    buffer = io.BytesIO()
    plot_spectrum(record).figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
