"""The step of RGD in other libraries: per-example gradients, Gram matrix, eigenvalue, direction.

Each function takes the model's name ("mlp" or "cnn"), its data as numpy arrays, and returns a
function without arguments that computes one direction, all of it. They need the extra `bench`.
"""

import importlib.util

import numpy as np

EPSILON = 0.5  # times 1 / M_x


def jax_step(name, x, y):
    """vmap(grad), all under jit."""
    import jax
    import jax.numpy as jnp

    key = iter(jax.random.split(jax.random.key(0), 8))

    def dense(a, b):
        return jax.random.normal(next(key), (a, b)) / a**0.5, jnp.zeros(b)

    def conv(a, b):
        return jax.random.normal(next(key), (3, 3, a, b)) / (9 * a) ** 0.5, jnp.zeros(b)

    if name == "mlp":
        params = [dense(784, 256), dense(256, 256), dense(256, 10)]
    else:
        params = [conv(1, 32), conv(32, 64), dense(1600, 128), dense(128, 10)]

    def logits(params, x):
        if name == "cnn":
            x = x[None]
            for w, b in params[:2]:
                x = jax.lax.conv_general_dilated(
                    x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jax.nn.relu(x + b)
                window = (1, 2, 2, 1)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
            x, params = x.reshape(-1), params[2:]
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    def loss(params, x, y):
        return -jax.nn.log_softmax(logits(params, x))[y]

    @jax.jit
    def direction(params, x, y):
        rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
        G = jnp.concatenate([r.reshape(len(x), -1) for r in jax.tree.leaves(rows)], 1)
        v = G.mean(0)
        centred = G - v
        top = jnp.linalg.eigvalsh(centred @ centred.T / len(x))[-1]
        return v - EPSILON / top / len(x) * centred.T @ (centred @ v)

    x, y = jnp.asarray(x), jnp.asarray(y)
    return lambda: direction(params, x, y).block_until_ready()


def _torch_model(name):
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def _torch_data(name, x, y):
    import torch

    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return (x.permute(0, 3, 1, 2).contiguous() if name == "cnn" else x), y


def _torch_direction(rows):
    import torch

    G = torch.cat([r.reshape(len(r), -1) for r in rows], 1)
    v = G.mean(0)
    centred = G - v
    top = torch.linalg.eigvalsh(centred @ centred.T / len(G))[-1]
    return v - EPSILON / top / len(G) * centred.T @ (centred @ v)


def torch_func_step(name, x, y):
    """vmap(grad) of torch.func."""
    import torch

    model = _torch_model(name)
    params = {k: p.detach() for k, p in model.named_parameters()}
    x, y = _torch_data(name, x, y)

    def loss(params, x, y):
        logits = torch.func.functional_call(model, params, (x[None],))
        return torch.nn.functional.cross_entropy(logits, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return lambda: _torch_direction(gradients(params, x, y).values())


def opacus_step(name, x, y):
    """GradSampleModule of Opacus."""
    import torch
    from opacus import GradSampleModule

    model = GradSampleModule(_torch_model(name), loss_reduction="sum")
    x, y = _torch_data(name, x, y)

    def step():
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        return _torch_direction([p.grad_sample for p in model.parameters()])

    return step


def backpack_step(name, x, y):
    """BatchGrad of BackPACK."""
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(_torch_model(name))
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))
    x, y = _torch_data(name, x, y)

    def step():
        model.zero_grad()
        with backpack(BatchGrad()):
            loss(model(x), y).backward()
        return _torch_direction([p.grad_batch for p in model.parameters()])

    return step


_PEERS = {
    "jax": ("jax", jax_step),
    "torch.func": ("torch", torch_func_step),
    "opacus": ("opacus", opacus_step),
    "backpack": ("backpack", backpack_step),
}


# Those that can be imported here.
INSTALLED = {
    name: step
    for name, (module, step) in _PEERS.items()
    if importlib.util.find_spec(module) is not None
}


def data(name, n):
    """Random examples and classes, numpy arrays, as of the Keras model of that name."""
    rng = np.random.default_rng(0)
    shape = {"mlp": (784,), "cnn": (28, 28, 1)}[name]
    return rng.normal(size=(n, *shape)).astype("float32"), rng.integers(0, 10, n)
