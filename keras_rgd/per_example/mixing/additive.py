"""Whether the loss of a batch is the mean of what its parts have, so that they are enough."""

import numpy as np

from keras_rgd.per_example.mixing.following import Cause

# What a tensor is: one that depends on no example; the mean over the examples of a number that each
# has, or a linear function of such means; a sum over the examples.
_CONSTANT, _MEAN, _SUM = "constant", "mean", "sum"

_LINEAR = {
    *("Identity", "Cast", "Reshape", "Squeeze", "ExpandDims", "Neg", "Pack", "ConcatV2", "AddN"),
    *("Add", "AddV2", "Sub", "EnsureShape", "StopGradient"),
}
_PRODUCTS = {"Mul": 1, "RealDiv": -1, "Div": -1, "DivNoNan": -1}


class _NotAdditiveError(Exception):
    """The batch enters as a whole, by the operation `op`."""

    def __init__(self, op):
        super().__init__()
        self.op = op


def not_additive(loss, follower):
    """The `Cause` by which a batch's loss is not the mean of its parts' losses, or `None`.

    Args:
        loss: a scalar tensor of a traced graph.
        follower: a `following.Follower` of that graph.
    """
    try:
        kind = _kind(loss, follower, {})
    except _NotAdditiveError as error:
        return Cause(error.op, error.op.type)
    return Cause(loss.op, loss.op.type) if kind == _SUM else None


def _kind(t, follower, known):
    if t.name not in known:
        known[t.name] = _new_kind(t, follower, known)
    return known[t.name]


def _new_kind(t, follower, known):
    found, op = follower.found(t), t.op
    if found is None or (found.place is None and found.mixed is None and found.statistic is None):
        return _CONSTANT
    if found.place is not None:
        raise _NotAdditiveError(op)  # more than a number of the batch
    if op.type in ("Mean", "Sum"):
        inner = follower.found(op.inputs[0])
        if inner is not None and inner.place is not None:
            if inner.statistic is not None:
                raise _NotAdditiveError(inner.statistic.op)
            return _MEAN if op.type == "Mean" else _SUM
        return _kind(op.inputs[0], follower, known)
    if op.type in _LINEAR:
        kinds = {s.op: _kind(s, follower, known) for s in op.inputs if s.dtype.is_floating}
        of_sums = [s for s, kind in kinds.items() if kind == _SUM]
        if of_sums and len(of_sums) < len(kinds):
            raise _NotAdditiveError(of_sums[0])
        return _SUM if of_sums else _MEAN
    if op.type in _PRODUCTS:
        kinds = [_kind(s, follower, known) for s in op.inputs]
        additive = [i for i, kind in enumerate(kinds) if kind != _CONSTANT]
        if len(additive) == 1 and (additive == [0] or op.type == "Mul"):
            if kinds[additive[0]] == _SUM:
                return _MEAN if _is_count(op, 1 - additive[0], follower) else _SUM
            return _MEAN
    raise _NotAdditiveError(op)


def _is_count(op, index, follower):
    """Whether a factor is one over N, or one over N times another whole number."""
    value = follower.value(op.inputs[index])
    if value is None or np.size(value) != 1:
        return False
    count = float(value) ** -_PRODUCTS[op.type]
    return np.isfinite(count) and abs(count / follower.n - round(count / follower.n)) < 1e-6
