"""What TensorBoard and matplotlib are shown of a record."""

import io

import matplotlib.figure
import numpy as np
import tensorflow as tf

_SCALARS = (
    "lambda_max",
    "trace",
    "rank",
    "rank_gram",
    "participation_ratio",
    "effective_rank",
    "epsilon",
    "epsilon_lambda_max",
    "weak_field_error",
    "weak_field_error_gradient",
    "step_epsilon",
    "descent_ratio",
    "cosine_top",
    "overlap",
    "gradient_norm",
    "noise_scale",
    "seconds",
)


def write(writer, record):
    """Write one record to TensorBoard: scalars, the spectrum as a histogram and as a picture.

    Args:
        writer: a `tf.summary` file writer.
        record: a `DiffusionRecord`; its epoch is the step.
    """
    with writer.as_default(step=record.epoch):
        for name in _SCALARS:
            value = getattr(record, name)
            if value is not None and np.isfinite(value):
                tf.summary.scalar(f"diffusion/{name}", value)
        counted = record.eigenvalues[record.eigenvalues > record.rank_gram_cut]
        if len(counted):
            # Linear buckets would show nothing of a spectrum over many decades.
            tf.summary.histogram("diffusion/log10_eigenvalues", np.log10(counted))
            tf.summary.image("diffusion/spectrum", _picture(record)[None])
    writer.flush()


def plot_spectrum(records, ax=None):
    """Eigenvalues against their index on log-log axes, with the rank cut and 1/eps of the last.

    Args:
        records: one `DiffusionRecord`, or a list of them to be drawn from light to dark.
        ax: matplotlib axes to draw on. Defaults to `None`, axes of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there is no record, or none with a positive eigenvalue.
    """
    records = list(records) if isinstance(records, list | tuple) else [records]
    if not any(record.lambda_max > 0 for record in records):
        raise ValueError(
            f"Expected a record with a positive eigenvalue. Received: {records!r:.100}"
        )
    if ax is None:
        figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
        ax = figure.add_subplot()
    for shade, record in zip(np.linspace(0.25, 1, len(records)), records, strict=True):
        counted = record.eigenvalues[record.eigenvalues > record.rank_gram_cut]
        label = f"epoch {record.epoch}" if record in (records[0], records[-1]) else None
        color = matplotlib.colormaps["viridis_r"](shade if len(records) > 1 else 0.8)
        ax.loglog(
            np.arange(1, len(counted) + 1), counted, ".-", ms=3, lw=1, color=color, label=label
        )
    last = records[-1]
    if last.rank is not None:
        ax.axhline(
            last.rank_cut, color="tab:gray", ls="--", lw=1, label=f"rank cut: rank {last.rank}"
        )
    else:
        ax.axhline(
            last.rank_gram_cut,
            color="tab:gray",
            ls="--",
            lw=1,
            label=f"rank cut: rank {last.rank_gram}",
        )
    if last.epsilon > 0:
        ax.axhline(1 / last.epsilon, color="tab:red", ls=":", lw=1.5, label=r"$1/\epsilon$")
    ax.set_xlabel("index of the eigenvalue")
    ax.set_ylabel("eigenvalue of D")
    ax.set_title(f"Spectrum of D, N = {last.examples}, d = {last.n_weights:,}")
    ax.legend(loc="lower left", fontsize="small")
    return ax


def _picture(record):
    """The spectrum as an RGBA image, uint8, shape (height, width, 4)."""
    figure = plot_spectrum(record).figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return tf.io.decode_png(buffer.getvalue(), channels=4)
