"""Where a model's weights meet its examples: read off the traced forward pass.

A tensor made of weights alone (a kernel, a kernel reshaped, a normalised kernel) is the same for
all examples. The operation that joins it with a tensor that differs between examples is a *use* of
those weights. The per-example gradient of a weight is the sum over its uses, whatever layer they
stand in. `docs/layerwise.md` draws one model from its trace to its Gram matrix.
"""

import dataclasses
import math
from typing import Any

import tensorflow as tf

from keras_rgd._keras.graphs import current_graph, handles_in
from keras_rgd.per_example.layerwise.functions import called

# Operations that read the shape of a tensor and not its entries.
_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "VariableShape"}

# Operations that only rearrange the entries of a weight (or change their sign or dtype): the inner
# product of two gradients is the same before and after.
_REARRANGE = {"Identity", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Cast", "Neg"}

# Stands for the number of entries that an example has where that is open in the trace, as for
# sequences of any length.
_OPEN = -1

_ASSIGN = {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "VarIsInitializedOp"}


class NotVisibleError(ValueError):
    """A weight is used where its operation cannot be seen, as inside a loop.

    Args:
        weight: the weight's index among the trainable weights.
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
        rearrangements: what takes one weight to the tensor, first to last, each as (operation,
            its argument, the argument of its inverse); empty where the tensor is the weight
            itself. `None` where it is another function of one or more weights, as a sum of two.
    """

    weights: frozenset
    rearrangements: tuple | None

    def rearranged(self, t):
        """A tensor shaped as the weight, rearranged as the weight was."""
        for kind, there, _ in self.rearrangements:
            t = _rearranged(kind, there, t)
        return t

    def back(self, t, leading=()):
        """A tensor shaped as the end of the path, arranged as the weight: `rearranged` undone.

        Args:
            t: of shape (*leading, *shape of the end).
            leading: sizes of axes before those, which stay where they are; -1 for one open size.
        """
        for kind, _, back in reversed(self.rearrangements):
            if kind == "Transpose" and leading:
                back = [*range(len(leading)), *(len(leading) + axis for axis in back)]
            elif kind == "Reshape":
                back = [*leading, *back]
            t = _rearranged(kind, back, t)
        return t


def _rearranged(kind, argument, t):
    if kind == "Neg":
        return -t
    return tf.transpose(t, argument) if kind == "Transpose" else tf.reshape(t, argument)


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that joins weights with examples.

    Attributes:
        op: the operation, or the call of a function that does nothing else than it.
        weight_input: the number of its input that is made of weights alone.
        path: how that input follows from the weights.
        shape: of that input, a list.
        example_inputs: the numbers of its inputs that differ between examples, a tuple; empty
            where the operation itself repeats the weight for each example, as for a class token.
        rows_per_example: how many rows along axis 0 of such an input belong to one example: 1, or
            T where a layer sees (N * T, A), the timesteps of an example side by side. `None` where
            the trace does not tell.
        n_examples: N, an int or a scalar tensor.
        blocks: how many copies of the batch stand one after another along axis 0: 1, but for the
            convolution inside a dilated one, where TensorFlow's SpaceToBatchND has moved that many
            blocks of space there.
        inside: the `Called` of a call, else `None`.
    """

    op: tf.Operation
    weight_input: int
    path: Path
    shape: list
    example_inputs: tuple
    rows_per_example: int | None
    n_examples: Any
    blocks: int
    inside: Any = None

    @property
    def tensor(self):
        """The input made of weights alone; the variable's handle for a lookup in it."""
        return self.op.inputs[self.weight_input]

    @property
    def repeats(self):
        """Whether the operation itself gives the weight its axis of examples."""
        return not self.example_inputs

    @property
    def output(self):
        return self.op.outputs[0]


def find_uses(operations, weights, examples, n, repeats):
    """The uses of weights among the operations of a forward pass.

    Of `Dense(3)` on inputs (N, T, A) the trace has, with the kernel W and the bias b,

        Reshape      (N, T, A)                -> (N * T, A)   examples alone: no use
        MatMul       (N * T, A), W (A, 3)     -> (N * T, 3)   joins both: a use of W
        Reshape      (N * T, 3)               -> (N, T, 3)    examples alone: no use
        BiasAdd      (N, T, 3), b (3,)        -> (N, T, 3)    joins both: a use of b

    and what is returned is, but for what both have in common,

        Use(op=MatMul, weight_input=1, shape=[A, 3], example_inputs=(0,), rows_per_example=T, ...)
        Use(op=BiasAdd, weight_input=1, shape=[3], example_inputs=(0,), rows_per_example=1, ...)

    A kernel that is transposed before the MatMul is still "weights alone": its use has that
    transpose in `path.rearrangements`.

    Args:
        operations: the operations, in the order in which they were made.
        weights: the trainable `tf.Variable`s.
        examples: the tensors that the forward pass was given, axis 0 for the examples.
        n: N where it is known, else `None`.
        repeats: whether a Tile or BroadcastTo of a weight to N rows, as of a class token, gives it
            the axis of the examples. Where N is known, another axis that happens to be as long
            looks the same.

    Returns:
        A list of `Use`.

    Raises:
        NotVisibleError: an operation that holds others (a loop, a function) uses a weight.
    """
    handles = {t.name: i for i, t in enumerate(handles_in(current_graph(), weights))}
    n_examples = tf.shape(examples[0])[0] if n is None else n
    read = {t.name for op in operations for t in op.inputs}
    of_weights, of_examples, found = {}, _OfExamples(examples), []
    for op in operations:
        if op.type in _SHAPES or op.type in _ASSIGN:
            continue
        inside = called(op, read)
        via = _weight_inputs(op, of_weights, handles, weights, inside)
        joined = of_examples.inputs(op)
        if via and not joined:
            joined = of_examples.started(op, via, n)
        if joined:
            rows, blocks = of_examples.follow(op, joined[0])
        elif via and repeats and _gives_examples(op, n):
            rows, blocks = 1, 1
            of_examples.start(op.outputs[0])
        else:
            paths = [path for path, _ in via.values()]
            of_weights |= {t.name: _extended(op, paths) for t in op.outputs if paths}
            continue
        for number, (path, shape) in via.items():
            if shape.rank is None or None in shape:
                raise NotVisibleError(min(path.weights), f"{op.type} of a weight of unknown shape")
            use = Use(op, number, path, shape.as_list(), joined, rows, n_examples, blocks, inside)
            found.append(use)
    return found


def _weight_inputs(op, of_weights, handles, weights, inside):
    """The inputs of an operation that are made of weights alone: number -> (`Path`, shape)."""
    found = {}
    for number, t in enumerate(op.inputs):
        if t.name in of_weights:
            found[number] = of_weights[t.name], t.shape
        elif t.name in handles:
            index = handles[t.name]
            if op.type not in ("ReadVariableOp", "ResourceGather") and inside is None:
                raise NotVisibleError(index, f"the operation {op.type}")
            found[number] = Path(frozenset([index]), ()), weights[index].shape
    return found


class _OfExamples:
    """The tensors that differ between examples, and how much of axis 0 an example has in each.

    Known by name are the number of entries of one example (`_OPEN` where the trace leaves it open,
    `None` where axis 0 may be another than the examples') and `Use.blocks`.

    Args:
        examples: the tensors that differ from the start, axis 0 for the examples.
    """

    def __init__(self, examples):
        self._entries = {t.name: _entries(t) or _OPEN for t in examples}
        self._blocks = {}

    def inputs(self, op):
        """The numbers of an operation's inputs that differ between examples."""
        return tuple(i for i, t in enumerate(op.inputs) if t.name in self._entries)

    def start(self, t):
        """Let a tensor be one that differs between examples, one row of axis 0 for each."""
        self._entries[t.name] = _entries(t)

    def started(self, op, via, n):
        """The inputs, not of weights, that have an axis of examples though they follow from none.

        A recurrent layer's zero state is made from the batch's size alone.
        """
        new = [i for i, t in enumerate(op.inputs) if i not in via and _of_batch(t, n)]
        for i in new:
            self.start(op.inputs[i])
        return tuple(new)

    def follow(self, op, joined):
        """Take an operation's outputs for tensors that differ between examples, as an input does.

        Args:
            op: the operation.
            joined: the number of that input.

        Returns:
            `Use.rows_per_example` and `Use.blocks` of the operation.
        """
        first = op.inputs[joined]
        entries, blocks = self._entries[first.name], self._blocks.get(first.name, 1)
        rows = _rows_per_example(op, joined, entries)
        for t in op.outputs:
            self._entries[t.name] = _entries_of_output(op, t, rows, entries)
            self._blocks[t.name] = blocks
            if op.type in ("SpaceToBatchND", "BatchToSpaceND"):
                size = tf.get_static_value(op.inputs[1])
                there = op.type == "SpaceToBatchND" and size is not None
                self._blocks[t.name] = int(size.prod()) if there else 1
                row = _entries(t)
                self._entries[t.name] = row and row * self._blocks[t.name]
        return rows, blocks


def _of_batch(t, n):
    """Whether axis 0 of a tensor that depends on neither weights nor data is that of the examples.

    So it is for the zero state that a recurrent layer starts from.
    """
    if t.shape.rank is None or t.shape.rank < 2:
        return False
    if t.shape[0] is not None:
        # Its length alone says so, which may be chance. Zeros give no gradient, so that a wrong
        # guess about them does no harm.
        value = tf.get_static_value(t) if t.shape[0] == n else None
        return value is not None and not value.any()
    return True


def _gives_examples(op, n):
    """Whether an operation repeats a weight once for each example, as a class token."""
    if op.type not in ("BroadcastTo", "Tile"):
        return False
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if before.rank is None or not after.rank or after[0] not in (None, n):
        return False
    return before.rank < after.rank or before[0] == 1


def _entries(t):
    """Entries of one row of axis 0; `None` where the trace leaves that open."""
    known = t.shape.rank is not None and all(s is not None for s in t.shape[1:])
    return math.prod(t.shape[1:]) if known else None


def _rows_per_example(op, joined, elements):
    """`Use.rows_per_example`, from the entries that an example has in the input `joined`."""
    row = _entries(op.inputs[joined])
    if op.type == "MatMul":
        # The static shape after a reshape to (N * T, A) may not say A; the weight's does.
        weight = op.inputs[1 - joined].shape
        row = weight[1 if op.get_attr("transpose_b") else 0] if weight.rank == 2 else row
    if elements == _OPEN:
        # The open extent, as the time, lies along axis 0 where a row has none, else in the row.
        return None if row else 1
    if elements is None or not row:
        return None
    return max(1, elements // row)


def _entries_of_output(op, t, rows_per_example, elements):
    """Entries of one example in an output; `None` where axis 0 may not be the examples'."""
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        return elements if order is not None and order[0] == 0 else None
    if op.type in ("Reshape", "ExpandDims", "Squeeze", "Identity"):
        return elements
    row = _entries(t)
    if elements == _OPEN and (rows_per_example is None or row is None):
        return _OPEN
    if row is None or rows_per_example is None:
        # We lost track, say after a transpose, and assume that axis 0 is the examples' again, one
        # row for each. Where that is wrong, `mixing` or `trial` refuses the model.
        return row
    return rows_per_example * row


def _extended(op, paths):
    """The `Path` of an operation's outputs whose inputs are of weights alone, by those paths."""
    weights = frozenset().union(*(path.weights for path in paths))
    if op.type == "ReadVariableOp":
        return paths[0]
    before, after = op.inputs[0].shape, op.outputs[0].shape
    before_it = paths[0].rearrangements
    rearranges = op.type in _REARRANGE and len(paths) == 1 and before_it is not None
    if not rearranges or not before.is_fully_defined() or not after.is_fully_defined():
        return Path(weights, None)
    if op.type == "Neg":
        return Path(weights, (*before_it, ("Neg", None, None)))
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        if order is None:
            return Path(weights, None)
        order, back = tuple(map(int, order)), tuple(map(int, order.argsort()))
        return Path(weights, (*before_it, ("Transpose", order, back)))
    if before == after:
        return Path(weights, before_it)
    return Path(weights, (*before_it, ("Reshape", tuple(after), tuple(before))))
