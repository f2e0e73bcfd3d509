"""What TensorBoard and matplotlib are shown of a record."""

import io

import matplotlib.figure
import numpy as np
import tensorflow as tf

from keras_rgd.diffusion import FLOAT32_EPSILON
from keras_rgd.whole_dataset import Spectrum

# What TensorBoard shows of each beside its chart; markdown.
_SCALARS = {
    "lambda_max": "The largest eigenvalue of D, M_x of the paper; squared gradient.",
    "trace": "tr D, the variance of the per-example gradients; squared gradient.",
    "rank": "Eigenvalues above lambda_max d eps of float32 (Chaudhari and Soatto, 1710.11029).",
    "rank_gram": "Eigenvalues above lambda_max N eps of the Gram matrix's dtype.",
    "participation_ratio": "tr(D)^2 / tr(D^2).",
    "effective_rank": "exp of the entropy of eigenvalues / trace.",
    "epsilon": "eps(x) by the rule, for the measured D; one over squared gradient.",
    "epsilon_lambda_max": "eps lambda_max, below 1 (Eq. 6 of the paper).",
    "weak_field_error": "||(I + eps D)^-1 - (I - eps D)||, the operator norm.",
    "weak_field_error_gradient": "The same on the gradient v, relative to |(I + eps D)^-1 v|.",
    "step_epsilon": "Geometric mean of the eps that the epoch's RGD steps used, of those above 0.",
    "steps_without_epsilon": "The epoch's RGD steps with eps = 0.",
    "step_epsilon_lambda_max": "step_epsilon times lambda_max: 1 and more is beyond Eq. (6).",
    "step_weak_field_error": "On the step: mean over the epoch's RGD steps.",
    "step_lambda_max": "M_x as RGD's last step saw it: a bound, or an estimate with a margin.",
    "window_cosine": "Cosine of D v by RGD's window and D v as measured, v the gradient.",
    "window_rank": "Rank of the D of RGD's window, at most W - 1.",
    "descent_ratio": "1 - eps v^T D v / |v|^2.",
    "cosine_top": "|cos| of the gradient and the top eigenvector of D.",
    "overlap": "Of the top eigenspaces of this epoch and the last, tr(P_t P_s) / k.",
    "gradient_norm": "|v|, the gradient of the loss on the measured examples.",
    "noise_scale": "Gradient noise scale tr S / |G|^2 (1812.06162), in examples.",
    "neglected_curvature": "|eps Cov_i(f_i, H_i x')| / |v|: what Eq. (10) drops, at its velocity.",
    "neglected_acceleration": "|eps D x''| / |dv/dt|: likewise, of a time integral.",
    "neglected_christoffel": "What is O(eps^2) in Eq. (7) / |dv/dt|: likewise.",
    "neglected_epsilon": "Of the derivative of eps(x) / |dv/dt|: likewise.",
    "seconds": "What the measurement took.",
}


def write(writer, record):
    """Write one record to TensorBoard: scalars, the spectrum as a histogram and as a picture.

    Args:
        writer: a `tf.summary` file writer.
        record: a `DiffusionRecord`; its epoch is the step.
    """
    with writer.as_default(step=record.epoch):
        for name, description in _SCALARS.items():
            value = getattr(record, name)
            if value is not None and np.isfinite(value):
                tf.summary.scalar(f"diffusion/{name}", value, description=description)
        counted = record.eigenvalues[record.eigenvalues > record.rank_gram_cut]
        if len(counted):
            # Linear buckets would show nothing of a spectrum over many decades.
            tf.summary.histogram("diffusion/log10_eigenvalues", np.log10(counted))
            tf.summary.image("diffusion/spectrum", _picture(record)[None])
    writer.flush()


def plot_spectrum(records, ax=None):
    """Eigenvalues against their index on log-log axes, with the rank cut and 1/eps of the last.

    Args:
        records: one `DiffusionRecord` or `Spectrum`, or a list to be drawn from light to dark.
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
    if getattr(last, "epsilon", 0) > 0:
        ax.axhline(1 / last.epsilon, color="tab:red", ls=":", lw=1.5, label=r"$1/\epsilon$")
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
        return record.lambda_max * min(record.n_examples, record.n_weights) * FLOAT32_EPSILON
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


def _picture(record):
    """The spectrum as an RGBA image, uint8, shape (height, width, 4)."""
    figure = plot_spectrum(record).figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return tf.io.decode_png(buffer.getvalue(), channels=4)
