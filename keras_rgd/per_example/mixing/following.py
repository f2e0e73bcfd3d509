"""Where the examples lie in each tensor of a traced graph, and which operations mix them.

Whether examples mix is asked of the graph, and so for every value of the variables and every random
draw: no batch's numbers can show a layer that is switched off at that moment. There is a rule for
each type of operation that says where the examples lie in its outputs, given where they lie in its
inputs. Functions, branches and loops are entered, and all branches are followed.
"""

import typing

import tensorflow as tf

from keras_rgd._keras.graphs import function_graph, has_gradient_of_its_own, placeholder
from keras_rgd.per_example import single_operation
from keras_rgd.per_example.mixing.places import Place, UnknownError, agreed


class Cause(typing.NamedTuple):
    """The operation by which examples came together.

    Attributes:
        op: the operation; of one inside a function, branch or loop, the operation that holds it.
        kind: its type.
        known: True where it brings examples together; False where it may, as nothing is known of
            it.
    """

    op: tf.Operation
    kind: str
    known: bool = True


class Found(typing.NamedTuple):
    """What is known of a tensor; `None` instead of it for a constant of the graph.

    Attributes:
        place: where the examples lie, or `None`.
        follows: whether it depends on a trainable weight in a way that has a gradient.
        mixed: the `Cause` that mixed examples in what depends on weights, or `None`.
        statistic: the `Cause` by which a number of the whole batch, as a count or a mean of the
            data, came into it, or `None`. Gradients do not pass through it, so that it mixes
            nothing; but it differs from batch to batch.
    """

    place: Place | None
    follows: bool = False
    mixed: Cause | None = None
    statistic: Cause | None = None


# What a rule returns instead of a place where the examples of an output lie along no axis.
LOST = "lost"

_HAVE_GRADIENTS = (tf.variant, tf.resource)

# Tensors with more entries than this are data, not sizes or indices whose values matter.
_SMALL = 4096

# A loop is followed round after round until nothing new is found, at most this often; it takes one
# round for each of its variables that depends on another.
_ROUNDS = 64

# Operations that read the shape or the length of their inputs and not the entries.
_SHAPES = {
    *("BroadcastGradientArgs", "OnesLike", "Rank", "Shape", "ShapeN", "Size", "VariableShape"),
    *("TensorListElementShape", "TensorListLength", "ZerosLike"),
}

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_LOOPS = {"While", "StatelessWhile"}


class Follower:
    """Follows examples and weights through one graph and the functions it calls.

    Args:
        n: N, the number of examples the graph was traced for.
        found: what is known already, `Found` by tensor name.
        rules: functions by operation type, as `following_rules` describes them.
    """

    def __init__(self, n, found, rules):
        self.n = n
        self._found, self._rules = dict(found), rules
        self._values = {}

    def found(self, tensor):
        """What is known of a tensor of the graph, a `Found` or `None`.

        All that leads to it is followed first.
        """
        stack = [tensor]
        while stack:
            t = stack[-1]
            if t.name in self._found:
                stack.pop()
                continue
            missing = [s for s in t.op.inputs if s.name not in self._found]
            if missing:
                stack += missing
                continue
            inputs = [self._found[s.name] for s in t.op.inputs]
            for output, found in zip(t.op.outputs, self._outputs(t.op, inputs), strict=True):
                self._found[output.name] = found
        return self._found[tensor.name]

    def value(self, tensor):
        """The value of a small tensor that the graph alone determines, or `None`."""
        if tensor.ref() not in self._values:
            self._values[tensor.ref()] = self._new_value(tensor)
        return self._values[tensor.ref()]

    def _new_value(self, tensor):
        op, entries = tensor.op, tensor.shape.num_elements()
        # Of open length are sizes and indices alone, as the axes that were broadcast.
        small = tensor.dtype.is_integer if entries is None else entries <= _SMALL
        if not small or not tensor.dtype.is_numpy_compatible:
            return None
        value = tf.get_static_value(tensor)
        if value is None and 0 < len(op.inputs) < 8 and not op.op_def.is_stateful:
            given = [self.value(t) for t in op.inputs]
            if all(v is not None for v in given):
                return single_operation.value(op, given, tensor.value_index)
        return value

    def _outputs(self, op, inputs):
        """A list of `Found`, one for each output of an operation."""
        if op.type in _SHAPES or all(found is None for found in inputs):
            return [None] * len(op.outputs)
        if op.type in _CALLS:
            return self._called(op, self._function(op, "f"), inputs, op.inputs)
        if op.type in _BRANCHES:
            return self._branched(op, inputs)
        if op.type in _LOOPS:
            return self._looped(op, inputs)
        if op.type == "IdentityN":
            outputs = list(inputs)
        elif op.type in ("ReadVariableOp", "Identity", "Snapshot"):
            outputs = [inputs[0]] * len(op.outputs)
        else:
            outputs = self._by_rule(op, inputs)
        outputs = [_as_dtype(found, t) for found, t in zip(outputs, op.outputs, strict=True)]
        apart = any(found and found.follows and found.mixed is None for found in outputs)
        if apart and has_gradient_of_its_own(op):
            outputs = self._checked_backward(op, inputs, outputs)
        return outputs

    def _by_rule(self, op, inputs):
        known = [found for found in inputs if found is not None]
        follows = any(found.follows for found in known)
        mixed = next((found.mixed for found in known if found.mixed is not None), None)
        statistic = next((f.statistic for f in known if f.statistic is not None), None)
        if op.type == "StopGradient":
            place = known[0].place or self._guess(op.outputs[0])
            return [Found(place, False, None, statistic or mixed)]
        if mixed is not None:
            return [Found(None, follows, mixed, statistic)] * len(op.outputs)
        if all(found.place is None for found in known):
            if follows and not all(found.follows for found in known):
                # Weights meet a number of the whole batch: this is no single example's any more.
                return [Found(None, True, _cause(op), statistic)] * len(op.outputs)
            places = [None] * len(op.outputs)
            if not follows:
                places = [self._guess(t) for t in op.outputs]
            return [Found(place, follows, None, statistic) for place in places]
        places, known = self._ruled(op, inputs)
        if not known and follows:
            places = self._tried(op, inputs)
        if not known and not follows:
            # It depends on data alone, so that no gradient passes and any place is right.
            places = [self._guess(t) or LOST for t in op.outputs]
            if op.type in self._rules or op.type in single_operation.NEVER:
                statistic = statistic or Cause(op, op.type, known=False)
        if not isinstance(places, list):
            places = [places] * len(op.outputs)
        cause, outputs = Cause(op, op.type, known), []
        for place, t in zip(places, op.outputs, strict=True):
            if place is not LOST:
                outputs.append(Found(place, follows, None, statistic))
            elif follows:
                outputs.append(Found(None, True, cause, statistic or cause))
            else:
                outputs.append(Found(self._guess(t), False, None, statistic or cause))
        return outputs

    def _ruled(self, op, inputs):
        """Where an operation leaves the examples by its rule, and whether that is known."""
        if op.type not in self._rules:
            return LOST, False
        try:
            return self._rules[op.type](self, op, inputs), True
        except UnknownError:
            return LOST, False

    def _guess(self, tensor):
        """Axis 0 of data that may have one entry an example there, else `None`."""
        shape = tensor.shape
        if shape.rank is None or not shape.rank or shape[0] not in (None, self.n):
            return None
        return Place(0)

    def _tried(self, op, inputs):
        """Where an operation without a rule leaves the examples, by running it alone; or LOST."""
        given = [self.value(t) if t.dtype.is_integer else tf.get_static_value(t) for t in op.inputs]
        return single_operation.places(op, inputs, given, self.n) or LOST

    # Operations that hold others.

    @staticmethod
    def _function(op, name):
        return function_graph(op, op.get_attr(name).name)

    def _called(self, op, graph, inputs, tensors):
        """The outputs of a function that an operation calls.

        Args:
            op: the operation.
            graph: the function's.
            inputs: a `Found` or `None` for each argument.
            tensors: the arguments themselves where the function gets their values, else `None`.
        """
        if graph is None:
            cause = Cause(op, op.type, known=False)
            return [Found(None, True, cause, cause)] * len(op.outputs)
        arguments = [t.name for t in graph.inputs]
        follower = Follower(self.n, dict(zip(arguments, inputs, strict=True)), self._rules)
        for inner, outer in zip(graph.inputs, tensors, strict=True):
            if outer is not None and outer.dtype.is_integer:
                follower._values[inner.ref()] = self.value(outer)
        outputs = [follower.found(t) for t in graph.outputs]
        return [found and _named(found, op) for found in outputs]

    def _branched(self, op, inputs):
        if op.type in ("If", "StatelessIf"):
            graphs = [self._function(op, name) for name in ("then_branch", "else_branch")]
        else:
            graphs = [function_graph(op, f.name) for f in op.get_attr("branches")]
        decides, arguments = inputs[0], inputs[1:]
        outputs = [self._called(op, graph, arguments, op.inputs[1:]) for graph in graphs]
        joined = [self._joined(op, found) for found in zip(*outputs, strict=True)]
        return [self._decided(op, decides, found) for found in joined]

    def _looped(self, op, inputs):
        body, condition = self._function(op, "body"), self._function(op, "cond")
        if body is None or condition is None:
            return self._called(op, None, inputs, op.inputs)
        now = list(inputs)
        # A variable that the loop does not change has the same value inside.
        pairs = zip(op.inputs, body.inputs, body.outputs, strict=True)
        tensors = [given if inner is outer else None for given, inner, outer in pairs]
        for _ in range(_ROUNDS):
            after = self._called(op, body, now, tensors)
            joined = [self._joined(op, pair) for pair in zip(now, after, strict=True)]
            if joined == now:
                break
            now = joined
        else:
            now = [Found(None, True, _cause(op), _cause(op)) for _ in now]
        (decides,) = self._called(op, condition, now, tensors)
        return [self._decided(op, decides, found) for found in now]

    @staticmethod
    def _decided(op, decides, found):
        """An output of a branch or loop, where `decides` says which branch or how many rounds."""
        if decides is None or (decides.statistic is None and decides.place is None):
            return found
        statistic = decides.statistic or _cause(op)
        if found is None:
            return Found(None, False, None, statistic)
        return found._replace(statistic=found.statistic or statistic)

    @staticmethod
    def _joined(op, several):
        """What is known of a tensor that is one of several, as the output of either branch."""
        known = [found for found in several if found is not None]
        if not known:
            return None
        follows = any(found.follows for found in known)
        mixed = next((found.mixed for found in known if found.mixed is not None), None)
        statistic = next((f.statistic for f in known if f.statistic is not None), None)
        place, agree = agreed([(found.place, found.follows) for found in known])
        if mixed is None and not agree and follows:
            mixed = _cause(op)
        return Found(None if mixed is not None else place, follows, mixed, statistic)

    def _checked_backward(self, op, inputs, outputs):
        """The outputs of an operation with a gradient of its own, mixed where that mixes."""
        graph = op.graph
        with graph.as_default():
            floating = [t for t in op.outputs if t.dtype.is_floating]
            moving = [i for i, t in enumerate(op.inputs) if t.dtype.is_floating and inputs[i]]
            cotangents = [placeholder(t) for t in floating]
            try:
                xs = [op.inputs[i] for i in moving]
                gradients = tf.gradients(floating, xs, grad_ys=cotangents)
            except (LookupError, ValueError, TypeError, NotImplementedError):
                cause = Cause(op, op.type, known=False)
                return [Found(None, True, cause, cause) if f and f.follows else f for f in outputs]
        by_name = dict(zip((t.name for t in op.outputs), outputs, strict=True))
        for cotangent, t in zip(cotangents, floating, strict=True):
            found = by_name[t.name]
            self._found[cotangent.name] = found and Found(found.place, True, found.mixed)
        # The backward pass may read the outputs: until it is followed they count as the rule says.
        self._found |= by_name
        for i, gradient in zip(moving, gradients, strict=True):
            found = inputs[i]
            # The gradient by a weight is a sum over the examples, and mixes nothing.
            if gradient is None or not found.follows or found.place is None:
                continue
            back = self.found(tf.convert_to_tensor(gradient))
            mixed = back and back.mixed
            if back is not None and (mixed is not None or back.place != found.place):
                cause = Cause(op, op.type, known=mixed is None or mixed.known)
                return [Found(None, True, cause, cause) if f and f.follows else f for f in outputs]
        return outputs


def _cause(op):
    return Cause(op, op.type)


def _named(found, op):
    """What was found inside an operation, with that operation as the cause."""
    return found._replace(
        mixed=found.mixed and found.mixed._replace(op=op),
        statistic=found.statistic and found.statistic._replace(op=op),
    )


def _as_dtype(found, tensor):
    """What is found of an output, given its dtype: integers pass no gradient on.

    An integer may be the batch's size alone, so that its cause is not known to be more.
    """
    if found is None or tensor.dtype.is_floating or tensor.dtype.is_complex:
        return found
    if tensor.dtype in _HAVE_GRADIENTS:
        return found
    statistic = found.statistic or found.mixed
    return Found(found.place, False, None, statistic and statistic._replace(known=False))
