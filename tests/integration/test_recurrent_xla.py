"""Recurrent layers that draw random numbers, by second derivatives of their loops under XLA.

It takes XLA most of a minute and a GiB.
"""

import zoos


def test_recurrent_and_random_layers_are_exact_under_xla():
    zoos.assert_equals_dense_D("recurrent and random", "double_backward", "float32")
