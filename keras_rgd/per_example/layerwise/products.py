"""The form of a weight that is contracted with its input: dense layers, attention, einsums.

A place is what the output has an entry for and the weight has not: a timestep of a dense layer over
time. An example with P places has g_i = sum_p left_ip right_ip^T, an A x B matrix from P (A + B)
numbers, and its part of the Gram matrix can be had in two ways:

- by rows: form the N matrices g_i, then their inner products: N P A B + N^2 A B multiply-adds;
- by products of places ("ghost", as the rows are never there): <g_i, g_j> = sum_pq <left_ip,
  left_jq> <right_ip, right_jq>, N^2 P^2 (A + B) multiply-adds.
"""

import tensorflow as tf

from keras_rgd.per_example.layerwise.forms import PLACES, ROOM, Form, NoFormError, column, flat


class Contraction(Form):
    """T is a matrix, or several: g_i = sum_p left_ip right_ip^T.

    Args:
        left: shape (N, A) or (N, ..., P, A).
        right: shape (N, B) or (N, ..., P, B).
        shape: of T, whose entries are (..., A, B) in `order`.
        n: N, or a guess of it, to count work by.
        order: the permutation that takes the axes of `split` to T's; `None` where they are T's.
        split: the shape before the permutation.
    """

    def __init__(self, left, right, shape, n, order=None, split=None):
        super().__init__(shape)
        self._left, self._right, self._n = left, right, n
        self._order, self._split = order, split
        places = self._places or PLACES
        self.work = self.rows_work = n * places * self.size
        ghost = n * n * places * places * (left.shape[-1] + right.shape[-1])
        through_rows = n * places * self.size + n * n * self.size
        # By products of places where that is less work than by rows.
        plain = left.shape.rank <= 3 and self._places is not None
        self._ghost = plain and (places == 1 or ghost < through_rows)
        self.gram_work = ghost if self._ghost else through_rows

    @classmethod
    def mergeable(cls, forms):
        """Whether `merged` takes these forms: plain products with the same matrix."""
        return all(type(f) is cls and f._left.shape.rank <= 3 for f in forms) and (
            len({(str(f._order), str(f._split), f._left.shape[-1]) for f in forms}) == 1
        )

    @classmethod
    def merged(cls, forms):
        """One form for several products with one matrix: g_i is the sum of theirs.

        Their places stand side by side, so that products between two of them are counted too.
        """
        first = forms[0]
        left, right = (
            tf.concat([t if t.shape.rank == 3 else t[:, None] for t in factors], 1)
            for factors in ([f._left for f in forms], [f._right for f in forms])
        )
        return cls(left, right, first.shape, first._n, first._order, first._split)

    @property
    def _one_place(self):
        return self._left.shape.rank == 2

    @property
    def _places(self):
        return 1 if self._one_place else self._left.shape[-2]

    def _rows(self, after):
        if self._one_place:
            rows = self._left[:, :, None] * self._right[:, None, :]
        else:
            rows = tf.matmul(self._left, self._right, transpose_a=True)
        return [self._arranged(rows)]

    def _arranged(self, rows):
        """Matrices (N, ..., A, B) as rows (N, |T|), T's axes in T's order."""
        if self._order is not None:
            rows = tf.reshape(rows, [-1, *self._split])
            rows = tf.transpose(rows, [0, *(axis + 1 for axis in self._order)])
        return tf.reshape(rows, [-1, self.size])

    def _back(self, v):
        """v, shaped as T, as factors see it: shape (..., A, B)."""
        if self._order is not None:
            inverse = [self._order.index(i) for i in range(len(self._order))]
            v = tf.transpose(tf.reshape(v, self.shape), inverse)
        batch = self._left.shape[1:-2] if not self._one_place else []
        return tf.reshape(v, [*batch, self._left.shape[-1], self._right.shape[-1]])

    @property
    def _keeps_rows(self):
        """Whether the Gram matrix forms rows, and they take little more room than the factors."""
        if self._ghost or not self.has_rows or self._places is None:
            return False
        a, b = self._left.shape[-1], self._right.shape[-1]
        return a * b <= ROOM * self._places * (a + b)

    def dot(self, v):
        if self._keeps_rows:
            return super().dot(v)
        through = tf.matmul(self._left, self._back(v)) * self._right
        return tf.reduce_sum(through, list(range(1, through.shape.rank)))

    def combine(self, w):
        if self._keeps_rows:
            return super().combine(w)
        right = self._right * column(w, self._right)
        if self._left.shape.rank > 3:
            combined = tf.einsum("n...pa,n...pb->...ab", self._left, right)
        else:
            combined = tf.matmul(flat(self._left), flat(right), transpose_a=True)
        return tf.reshape(self._arranged(combined[None]), self.shape)

    def gram(self, outer, after=()):
        if not self._ghost:
            return None
        if self._one_place:
            return outer(self._left) * outer(self._right)
        left, right = flat(self._left), flat(self._right)
        p = self._left.shape[1]
        products = tf.reshape(outer(left) * outer(right), [-1, p, tf.shape(left)[0] // p, p])
        return tf.reduce_sum(products, [1, 3])


def contraction(x_labels, t_labels, z_labels, x, gradient, use, n):
    """The form of z = einsum(x, T), T the weight: as `Contraction` needs its factors.

    Each label falls in one of five groups: with "npa,ab->npb" (a dense layer over time) a is
    `left`, b is `right` and p is one of `places`; labels of all three tensors are `in_all` (a
    matrix of its own for each), and labels of x alone are `summed` first.
    """
    terms = (x_labels, t_labels, z_labels)
    name = f"the contraction {x_labels},{t_labels}->{z_labels}"
    if any(len(set(term)) != len(term) for term in terms) or "n" in t_labels:
        raise NoFormError(name)
    if x_labels[0] != "n" or z_labels[0] != "n":
        raise NoFormError("examples along another axis than 0")
    size = dict(zip(t_labels, use.shape, strict=True))
    for labels, t in ((x_labels, x), (z_labels, gradient)):
        for label, extent in zip(labels, t.shape, strict=True):
            if size.get(label) not in (None, extent):
                raise NoFormError("a weight that is broadcast in the product")
    in_all = [c for c in t_labels if c in x_labels and c in z_labels]
    left = [c for c in t_labels if c in x_labels and c not in z_labels]
    right = [c for c in t_labels if c in z_labels and c not in x_labels]
    places = [c for c in z_labels[1:] if c in x_labels and c not in t_labels]
    summed = [c for c in x_labels if c not in t_labels and c not in z_labels]
    seen = len(in_all) + len(left) + len(right)
    if seen != len(t_labels) or set(z_labels) - {"n", *t_labels, *x_labels}:
        raise NoFormError(name)
    if summed:
        x = tf.reduce_sum(x, [x_labels.index(c) for c in summed])
        x_labels = "".join(c for c in x_labels if c not in summed)
    arranged = [
        _arrange(t, labels, [in_all, places, last])
        for t, labels, last in ((x, x_labels, left), (gradient, z_labels, right))
    ]
    order = [*in_all, *left, *right]
    permutation = [order.index(c) for c in t_labels]
    straight = permutation == sorted(permutation)
    return Contraction(
        *arranged,
        use.shape,
        n,
        order=None if straight else permutation,
        split=None if straight else [size[c] for c in order],
    )


def _arrange(t, labels, groups):
    """A tensor with its axes as (N, *in_all, P, last), P and `last` each flattened to one axis.

    Without P where neither `places` nor `in_all` has a label.
    """
    in_all, places, last = groups
    order = [labels.index(c) for c in ["n", *in_all, *places, *last]]
    if order != sorted(order):
        t = tf.transpose(t, order)
    kept, rest = t.shape[1 : 1 + len(in_all)], t.shape[1 + len(in_all) :]
    p, flat = rest[: len(places)], rest[len(places) :].num_elements()
    if flat is None or not kept.is_fully_defined():
        raise NoFormError("a product over axes of unknown extent")
    if len(last) == 1 and (len(places) == 1 or not places and not in_all):
        return t
    if not places:
        return tf.reshape(t, [-1, *kept, 1, flat] if in_all else [-1, flat])
    if p.is_fully_defined():
        return tf.reshape(t, [-1, *kept, p.num_elements(), flat])
    return tf.reshape(t, [tf.shape(t)[0], *kept, -1, flat])
