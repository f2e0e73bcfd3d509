"""Where a model's weights meet its examples: read off the traced forward pass.

A tensor made of weights alone (a kernel reshaped, a normalised kernel) is the same for all
examples; the operation that joins it with something that differs between examples is a *use*. The
per-example gradient of a weight is the sum over its uses, whatever layer they stand in.
"""

import dataclasses
import math
from typing import Any

import tensorflow as tf

from keras_rgd._keras.graphs import current_graph, handles_in

# These see the shape of a tensor alone.
_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "VariableShape"}

# Rearrangements of entries: inner products before and after are the same.
_REARRANGE = {"Identity", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Cast", "Neg"}

# Stands for the entries of an example whose other extents, as of its time, are open.
_OPEN = -1

_ASSIGN = {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "VarIsInitializedOp"}


class NotVisibleError(ValueError):
    """A weight is used where its operation cannot be seen, as inside a loop.

    Args:
        weight: its index.
        reason: what uses it.
    """

    def __init__(self, weight, reason):
        super().__init__(reason)
        self.weight = weight


@dataclasses.dataclass(frozen=True)
class Path:
    """How a tensor follows from weights alone.

    Attributes:
        weights: indices of the weights, a frozenset.
        steps: the rearrangements from one weight to the tensor, first to last; `None` where the
            tensor is another function of one or more weights.
    """

    weights: frozenset
    steps: tuple | None

    def rearranged(self, t):
        """A tensor shaped as the weight, rearranged as the weight was."""
        for kind, there, _ in self.steps:
            t = _step(kind, there, t)
        return t

    def back(self, t, leading=()):
        """A tensor (*leading, *shape of the end), arranged as the weight."""
        for kind, _, back in reversed(self.steps):
            if kind == "Transpose" and leading:
                back = [*range(len(leading)), *(len(leading) + axis for axis in back)]
            elif kind == "Reshape":
                back = [*leading, *back]
            t = _step(kind, back, t)
        return t


def _step(kind, argument, t):
    if kind == "Neg":
        return -t
    return tf.transpose(t, argument) if kind == "Transpose" else tf.reshape(t, argument)


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that joins weights with examples.

    Attributes:
        op: the operation.
        position: which of its inputs is made of weights alone.
        path: how that input follows from the weights.
        shape: of that input, a list.
        examples: which of its inputs differ between examples.
        positions: how many rows of the other input's axis 0 belong to one example (1, or T where
            a layer runs on each timestep); `None` where the trace does not tell.
        n_examples: N, an int or a scalar tensor.
        blocks: how many times axis 0 goes through all examples, 1 but inside a dilated
            convolution, where TensorFlow moves blocks of space there.
    """

    op: tf.Operation
    position: int
    path: Path
    shape: list
    examples: tuple
    positions: int | None
    n_examples: Any
    blocks: int

    @property
    def tensor(self):
        """The input made of weights alone; the variable's handle for a lookup in it."""
        return self.op.inputs[self.position]

    @property
    def repeats(self):
        """Whether the operation itself gives the weight its axis of examples."""
        return not self.examples

    @property
    def output(self):
        return self.op.outputs[0]


def find_uses(operations, weights, examples, n, repeats):
    """The uses of weights among the operations of a forward pass.

    Args:
        operations: the operations, in the order in which they were made.
        weights: the trainable `tf.Variable`s.
        examples: the tensors that the forward pass was given, axis 0 for the examples.
        n: N where it is known, else `None`.
        repeats: whether an operation may give a weight its axis of examples; where N is known, an
            axis that happens to be as long looks the same.

    Returns:
        A list of `Use`.

    Raises:
        NotVisibleError: an operation that holds others (a loop, a function) uses a weight.
    """
    handles = {t.name: i for i, t in enumerate(handles_in(current_graph(), weights))}
    n_examples = tf.shape(examples[0])[0] if n is None else n
    elements = {t.name: _entries(t) or _OPEN for t in examples}  # of one example
    paths, blocks, found = {}, {}, []
    for op in operations:
        if op.type in _SHAPES or op.type in _ASSIGN:
            continue
        inputs = [t.name for t in op.inputs]
        joined = tuple(p for p, name in enumerate(inputs) if name in elements)
        via = {p: paths[name] for p, name in enumerate(inputs) if name in paths}
        shapes = {p: op.inputs[p].shape for p in via}
        for p, name in enumerate(inputs):
            if name in handles:
                index = handles[name]
                if op.type not in ("ReadVariableOp", "ResourceGather"):
                    raise NotVisibleError(index, f"the operation {op.type}")
                via[p] = Path(frozenset([index]), ())
                shapes[p] = weights[index].shape
        if via and not joined:
            others = [(p, t) for p, t in enumerate(op.inputs) if p not in via]
            joined = tuple(p for p, t in others if _of_batch(t, n))
            elements |= {op.inputs[p].name: _entries(op.inputs[p]) for p in joined}
        if joined:
            first = op.inputs[joined[0]]
            positions = _positions(op, joined[0], elements[first.name])
            through = blocks.get(first.name, 1)
            for t in op.outputs:
                elements[t.name] = _entries_of_output(op, t, positions, elements[first.name])
                blocks[t.name] = through
                if op.type in ("SpaceToBatchND", "BatchToSpaceND"):
                    size = tf.get_static_value(op.inputs[1])
                    there = op.type == "SpaceToBatchND" and size is not None
                    blocks[t.name] = int(size.prod()) if there else 1
                    entries = _entries(t)
                    elements[t.name] = entries and entries * blocks[t.name]
        elif via and repeats and _gives_examples(op, n):
            positions, through = 1, 1
            elements[op.outputs[0].name] = _entries(op.outputs[0])
        else:
            for t in op.outputs if via else []:
                paths[t.name] = _extended(op, list(via.values()))
            continue
        for p, path in via.items():
            if shapes[p].rank is None or None in shapes[p]:
                raise NotVisibleError(min(path.weights), f"{op.type} of a weight of unknown shape")
            shape = shapes[p].as_list()
            found.append(Use(op, p, path, shape, joined, positions, n_examples, through))
    return found


def _of_batch(t, n):
    """Whether a tensor made of neither has an entry for each example, as a recurrent zero state."""
    if t.shape.rank is None or t.shape.rank < 2:
        return False
    if t.shape[0] is not None:
        # Only by its size; zeros give no gradient, whatever the axis stands for.
        value = tf.get_static_value(t) if t.shape[0] == n else None
        return value is not None and not value.any()
    return True


def _gives_examples(op, n):
    """Whether an operation repeats a weight once for each example, as a class token's."""
    if op.type not in ("BroadcastTo", "Tile"):
        return False
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if before.rank is None or not after.rank or after[0] not in (None, n):
        return False
    return before.rank < after.rank or before[0] == 1


def _entries(t):
    known = t.shape.rank is not None and all(s is not None for s in t.shape[1:])
    return math.prod(t.shape[1:]) if known else None


def _positions(op, joined, elements):
    """Rows of axis 0 of an operation's input for one example."""
    row = _entries(op.inputs[joined])
    if op.type == "MatMul":
        # A reshape to (N T, A) has lost its A.
        weight = op.inputs[1 - joined].shape
        row = weight[1 if op.get_attr("transpose_b") else 0] if weight.rank == 2 else row
    if elements == _OPEN:
        # What has lost its time only by rows of known extent has it along axis 0.
        return None if row else 1
    if elements is None or not row:
        return None
    return max(1, elements // row)


def _entries_of_output(op, t, positions, elements):
    """Entries of one example in an output; `None` where axis 0 may be another than theirs."""
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        return elements if order is not None and order[0] == 0 else None
    if op.type in ("Reshape", "ExpandDims", "Squeeze", "Identity"):
        return elements
    row = _entries(t)
    if elements == _OPEN and (positions is None or row is None):
        return _OPEN
    if row is None or positions is None:
        # As after a transpose: let axis 0 be the examples' again. Where it is not, the check of
        # the first batch sees it.
        return row
    return positions * row


def _extended(op, paths):
    weights = frozenset().union(*(path.weights for path in paths))
    if op.type == "ReadVariableOp":
        return paths[0]
    before, after = op.inputs[0].shape, op.outputs[0].shape
    steps = paths[0].steps
    rearranges = op.type in _REARRANGE and len(paths) == 1 and steps is not None
    if not rearranges or not before.is_fully_defined() or not after.is_fully_defined():
        return Path(weights, None)
    if op.type == "Neg":
        return Path(weights, (*steps, ("Neg", None, None)))
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        if order is None:
            return Path(weights, None)
        order, back = tuple(map(int, order)), tuple(map(int, order.argsort()))
        return Path(weights, (*steps, ("Transpose", order, back)))
    if before == after:
        return Path(weights, steps)
    return Path(weights, (*steps, ("Reshape", tuple(after), tuple(before))))
