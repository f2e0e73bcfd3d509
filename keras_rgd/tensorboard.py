"""What TensorBoard is shown of a record: tags, their descriptions, and the writing."""

import numpy as np
import tensorflow as tf

from keras_rgd.plots import picture

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
            tf.summary.image(
                "diffusion/spectrum", tf.io.decode_png(picture(record), channels=4)[None]
            )
    writer.flush()
