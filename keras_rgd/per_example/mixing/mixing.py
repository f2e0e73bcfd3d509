"""Whether the examples of a batch mix on the way to their losses: read off a traced graph.

f_i may depend on the trainable weights through what belongs to example i alone. That is asked of
the graph of the forward pass and the loss, whatever the numbers are at the moment (see
`following`).
"""

import dataclasses
import typing

import keras
import tensorflow as tf

from keras_rgd._keras.graphs import handles_in, new_graph, placeholder
from keras_rgd.per_example.batch import Batch, mapped
from keras_rgd.per_example.layer_calls import calls, named
from keras_rgd.per_example.layerwise.uses import NotVisibleError, find_uses
from keras_rgd.per_example.loss_weights import what_losses_read
from keras_rgd.per_example.losses import replaced
from keras_rgd.per_example.mixing import arithmetic_rules, arrangement_rules
from keras_rgd.per_example.mixing.additive import not_additive
from keras_rgd.per_example.mixing.following import Cause, Follower, Found
from keras_rgd.per_example.mixing.places import Place
from keras_rgd.per_example.traces import forgotten

# How many examples to trace for where the step is for any number: a prime that no other axis is
# likely to have for its length.
_MANY = 127

_RULES = arithmetic_rules.RULES | arrangement_rules.RULES

# In the names of operations that draw random numbers.
_DRAWS = ("Random", "TruncatedNormal", "Multinomial", "StatefulStandardNormal", "StatefulUniform")


class Spot(typing.NamedTuple):
    """Where in a model the examples come together."""

    owner: str  # the layer or the model
    operation: str  # of TensorFlow
    known: bool  # True: they do. False: they may, as nothing is known of the operation


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What a graph shows of a model's examples; each a `Spot`, or `None` where there is none.

    Attributes:
        outputs: where examples mix before the model's output, in what depends on weights.
        loss: where they mix in the loss.
        beside: the path of a weight that an example's loss depends on otherwise than through the
            model's output, a string.
        lanes: where a number of the whole batch enters an example's output, also one that depends
            on no weight, as the batch's size or the mean of its inputs.
        batch: where one enters an example's loss, or the batch's loss is otherwise not the mean of
            that of its parts.
        random: what draws random numbers before the model's output.
        rows: where a weight meets examples that do not lie along axis 0, one after the other.
    """

    outputs: Spot | None
    loss: Spot | None
    beside: str | None
    lanes: Spot | None
    batch: Spot | None
    random: Spot | None
    rows: Spot | None

    @property
    def apart(self):
        """Whether f_i depends on the weights through example i alone."""
        return self.outputs is None and self.loss is None


@forgotten()
def mixing_of(losses, specs, sizes=None):
    """What mixes the examples of batches like this.

    Nothing is run, and no variable changes.

    Args:
        losses: the `ExampleLosses` of a model.
        specs: a `Batch` of tensors or of specs of them, with open sizes where the step is traced
            for any.
        sizes: the same with sizes to take where `specs` has none. Defaults to `None`.

    Returns:
        A `Mixing`.

    Raises:
        ValueError: where the loss gives no f_i.
    """
    n = specs.known_size
    if n is not None and n > 1:
        return _followed(losses, _concrete(specs, sizes, None))
    try:
        return _followed(losses, _concrete(specs, sizes, _MANY))
    except (ValueError, TypeError, tf.errors.OpError):
        # A model for one size of batch, which says so nowhere.
        return _followed(losses, _concrete(specs, sizes, None))


def _concrete(specs, sizes, n):
    """Specs with a number for each open size; N entries along axis 0 where N is given."""
    own = specs.known_size or (None if sizes is None else sizes.known_size)

    def concrete(spec, like):
        shape, given = spec.shape, spec.shape if like is None else like.shape
        if shape.rank is None or given.rank != shape.rank:
            shape, given = (given, given) if shape.rank is None else (shape, shape)
        lengths = [_length(s, g) for s, g in zip(shape, given, strict=True)]
        if lengths and n is not None and (shape[0] is None or shape[0] == own):
            lengths[0] = n
        return tf.TensorSpec(lengths, spec.dtype)

    return mapped(concrete, specs, specs if sizes is None else sizes)


def _length(size, given):
    if size is not None:
        return size
    return _MANY if given is None else given


def _followed(losses, specs):
    model = losses.model
    graph, traced = new_graph("examples"), {}
    given = handles = None
    with graph.as_default():
        given = specs.mapped(placeholder)
        captured = handles_in(graph, losses.weights)
        pairs = zip(captured, model.trainable_variables, strict=True)
        handles = {t.name: variable for t, variable in pairs}

        def forward():
            traced["y_pred"] = losses.forward(given.x)

        made = calls(model, forward, mark=lambda: len(graph.get_operations()))
        forward_operations = graph.get_operations()
        drawing = [op for op in forward_operations if any(w in op.type for w in _DRAWS)]
        outputs = what_losses_read(traced["y_pred"])
        copied = replaced(traced["y_pred"], tf.identity)
        copies = what_losses_read(copied)
        u = tf.ones([specs.known_size], keras.config.floatx())
        total, derivatives = losses(given, copied, u)
        derivatives = tf.convert_to_tensor(derivatives)
    tensors = given.tensors()
    found = {t.name: None for t in graph.inputs}
    n = specs.known_size
    found |= {t.name: Found(Place(0)) if t.shape[:1] == [n] else None for t in tensors}
    found |= {name: Found(None, follows=True) for name in handles}
    whole = Follower(n, found, _RULES)
    by_output = [whole.found(t) for t in outputs]
    end = whole.found(derivatives)
    # Once more for the loss alone, as if the examples of all outputs were apart.
    apart = zip(copies, by_output, strict=True)
    found |= {t.name: Found(Place(0), follows=True) for t, f in apart if f and f.follows}
    loss = Follower(n, found, _RULES).found(derivatives)
    where = _Where(model, made)
    parts = not_additive(total, whole)
    with graph.as_default():
        weights = [w.value for w in model.trainable_variables]
        examples = Batch(given.x).tensors()
        misplaced = _misplaced(whole, forward_operations, weights, examples)
    return Mixing(
        outputs=_first(where.says(f.mixed) for f in by_output if f and f.mixed),
        loss=_first(_of_loss(where, f) for f in (loss, end)),
        beside=_beside(derivatives, copies, handles),
        lanes=_first(where.of_batch(f) for f in by_output if f),
        batch=_first([where.of_batch(end) if end else None, parts and where.says(parts)]),
        random=_first(where.says(Cause(op, op.type)) for op in drawing),
        rows=_first(where.says(Cause(op, op.type)) for op in misplaced),
    )


def _misplaced(follower, operations, weights, examples):
    """Operations that join weights with examples elsewhere than "layerwise" reads them."""
    try:
        uses = find_uses(operations, weights, examples, follower.n, True)
    except NotVisibleError:
        return []  # which "layerwise" says itself
    return [use.op for use in uses if not _is_read(use, follower.found(use.output))]


def _is_read(use, found):
    if found is None or found.place is None:
        return True
    axis, outer, inner = found.place
    return axis == 0 and outer == use.blocks and use.rows_per_example in (None, outer * inner)


def _of_loss(where, found):
    if found and found.mixed:
        return where.says(found.mixed)
    if found and found.follows and found.place != Place(0):
        return where.elsewhere("of the losses")
    return None


def _first(sentences):
    return next((s for s in sentences if s is not None), None)


def _beside(end, copies, handles):
    """The path of a weight that `end` depends on otherwise than through `copies`, or `None`."""
    stop = {t.name for t in copies}
    seen, stack = set(), [end]
    while stack:
        t = stack.pop()
        if t.name in seen or t.name in stop:
            continue
        seen.add(t.name)
        if t.name in handles:
            return f"'{handles[t.name].path}'"
        if t.op.type not in ("StopGradient", "Shape", "ZerosLike", "OnesLike"):
            stack += t.op.inputs
    return None


class _Where:
    """Says where in a model an operation stands."""

    def __init__(self, model, made):
        self._model, self._made = model, made

    def says(self, cause):
        operations = {op.name: i for i, op in enumerate(cause.op.graph.get_operations())}
        at = operations[cause.op.name]
        owner = next((c.layer for c in self._made if c.start <= at < c.end), self._model)
        return Spot(named([owner]), cause.kind, cause.known)

    def elsewhere(self, what):
        return Spot(named([self._model]), f"the order {what}", True)

    def of_batch(self, found):
        cause = found.mixed or found.statistic
        if cause is not None:
            return self.says(cause)
        return None if found.place == Place(0) else self.elsewhere("of its output's axes")
