"""Every private or undocumented name of Keras and TensorFlow that the package uses.

Each stands behind a function that says what it expects of them and why, and has a test in
`tests/test_keras_names.py`. Elsewhere in the package are public names alone.

- `optimizers`: what happens inside of a Keras optimizer's update; on every backend.
- `models`: what Keras keeps in models, layers, losses and tensors.
- `data`: what Keras makes of the batches that `fit` is given.
- `graphs`: TensorFlow's traced graphs, and one function of TensorFlow exchanged for another.
"""
