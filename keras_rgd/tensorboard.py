"""What TensorBoard is shown of a record: tags, their descriptions, and the writing."""

from __future__ import annotations

import os
import struct
import time

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.histogram import summary_v2 as histogram
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar import summary_v2 as scalar
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from keras_rgd.plots import picture
from keras_rgd.records import DiffusionRecord

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


class RecordWriter:
    """A run that TensorBoard shows, by TensorBoard's own writer, whichever backend runs Keras.

    Args:
        log_dir: its folder.
    """

    def __init__(self, log_dir: str | os.PathLike):
        self._file = EventFileWriter(str(log_dir))

    def write(self, record: DiffusionRecord) -> None:
        """Write scalars, the spectrum as a histogram and as a picture; its epoch is the step."""
        summaries = [
            scalar.scalar_pb(f"diffusion/{name}", value, description)
            for name, description in _SCALARS.items()
            if (value := getattr(record, name)) is not None and np.isfinite(value)
        ]
        counted = record.eigenvalues[record.eigenvalues > record.rank_gram_cut]
        if len(counted):
            # Linear buckets would show nothing of a spectrum over many decades.
            summaries.append(
                histogram.histogram_pb("diffusion/log10_eigenvalues", np.log10(counted))
            )
            summaries.append(_image("diffusion/spectrum", picture(record)))
        values = [value for summary in summaries for value in summary.value]
        summary = summary_pb2.Summary(value=values)
        event = event_pb2.Event(wall_time=time.time(), step=record.epoch, summary=summary)
        self._file.add_event(event)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _image(tag: str, png: bytes) -> summary_pb2.Summary:
    """A picture as the image plugin stores it: width, height, and the file."""
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
    tensor = make_tensor_proto([str(width).encode(), str(height).encode(), png])
    metadata = image.create_summary_metadata(display_name=None, description=None)
    return summary_pb2.Summary(
        value=[summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)]
    )
