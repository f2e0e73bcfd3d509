"""What `accelerator.sh` measures by `fit` on Keras's JAX backend; see there.

Three tables, each row printed when it is made: milliseconds and memory of training steps, SGD's
and RGD's; how far the arithmetic of an accelerator moves the gradient, D v and the eigenvalues of
D; and the spectrum of D over 10,000 images. A row that would not fit into the time is not begun.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import keras
import models
import numpy as np

import keras_rgd

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import architectures  # noqa: E402

layers = keras.layers
TOKENS, VOCABULARY = 64, 8192

# Seconds that are kept for the tables after the steps'.
KEPT = 150


def block(x, width, causal):
    """A transformer block, its LayerNormalization first."""
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(width // 64, 64)(y, y, use_causal_mask=causal)
    y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(width)(y)


class Positions(layers.Layer):
    """A vector for each place, added."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal", name="table")

    def call(self, x):
        return x + self.table


def vit(width, depth):
    """A vision transformer on 32x32x3 in patches of 4x4, which are 64 tokens."""

    def outputs(x):
        x = layers.Reshape((TOKENS, width))(layers.Conv2D(width, 4, 4)(x))
        x = Positions()(x)
        for _ in range(depth):
            x = block(x, width, causal=False)
        x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
        return layers.Dense(models.CLASSES)(x)

    return models.Benchmark((32, 32, 3), outputs, steps=0)


class Language(models.Benchmark):
    """Texts, of which each token is to tell the next."""

    def data(self, count):
        texts = np.random.default_rng(0).integers(0, VOCABULARY, (count, TOKENS + 1))
        return texts[:, :-1].astype("int32"), texts[:, 1:]


def gpt(width, depth):
    """A language model of 8,192 words on texts of 64."""

    def outputs(x):
        x = Positions()(layers.Embedding(VOCABULARY, width)(x))
        for _ in range(depth):
            x = block(x, width, causal=True)
        return layers.Dense(VOCABULARY, use_bias=False)(layers.LayerNormalization()(x))

    return Language((TOKENS,), outputs, steps=0, tokens=True)


MODELS = {name: models.benchmark(name) for name in ("mlp", "cnn", "resnet20-bn", "transformer")}
MODELS |= {"vit-10m": vit(384, 6), "vit-100m": vit(768, 14), "vit-tiny": vit(64, 1)}
MODELS |= {"gpt-10m": gpt(256, 8), "gpt-100m": gpt(768, 12), "gpt-tiny": gpt(64, 1)}

# model, N, precision, ways: at most 30 compilations, the most telling first.
BOTH = ("sgd", "rgd")
STEPS = [
    ("cnn", 128, "tensorfloat32", (*BOTH, "window-32")),
    ("resnet20-bn", 128, "tensorfloat32", BOTH),
    ("gpt-10m", 128, "tensorfloat32", (*BOTH, "window-32")),
    ("gpt-100m", 128, "tensorfloat32", BOTH),
    ("vit-100m", 128, "tensorfloat32", BOTH),
    ("mlp", 128, "tensorfloat32", BOTH),
    ("transformer", 128, "tensorfloat32", BOTH),
    ("vit-10m", 128, "tensorfloat32", BOTH),
    ("gpt-10m", 1024, "tensorfloat32", BOTH),
    ("cnn", 1024, "tensorfloat32", BOTH),
    ("resnet20-bn", 1024, "tensorfloat32", BOTH),
    ("gpt-10m", 1024, "float32", BOTH),
    ("resnet20-bn", 1024, "float32", BOTH),
    ("gpt-10m", 1024, "bfloat16", BOTH),
]
TINY_STEPS = [
    ("mlp", 16, "tensorfloat32", (*BOTH, "window-4")),
    ("vit-tiny", 8, "float32", BOTH),
    ("gpt-tiny", 8, "bfloat16", BOTH),
]
MOVED, TINY_MOVED = [("cnn", 128), ("resnet20-bn", 128), ("gpt-10m", 64)], [("cnn", 16)]


class Clock:
    """Whether one more row fits: each is taken to last as long as the longest before it."""

    def __init__(self, until):
        self._until, self._longest, self._started = until, 0.0, time.time()

    def fits(self):
        """Whether a row that begins now ends in time."""
        now = time.time()
        self._longest = max(self._longest, now - self._started)
        self._started = now
        return now + self._longest < self._until


def use(precision):
    """What float32 products are rounded to from here on, and the dtype that models compute in."""
    import jax

    half = precision == "bfloat16"
    keras.config.set_dtype_policy("mixed_bfloat16" if half else "float32")
    jax.config.update("jax_default_matmul_precision", "float32" if half else precision)


def compiled(name, way):
    """A new model, the same each time, compiled with the optimizer of a way."""
    keras.utils.set_random_seed(0)
    benchmark = MODELS[name]
    x = keras.Input(benchmark.shape, dtype="int32" if benchmark.tokens else None)
    model = keras_rgd.RGDModel(x, benchmark.outputs(x))
    optimizer = keras.optimizers.SGD(0.01)
    if way == "rgd":
        optimizer = keras_rgd.RGD(0.01)
    elif way != "sgd":
        optimizer = keras_rgd.RGD(0.01, window=int(way.removeprefix("window-")))
    model.compile(optimizer, models.loss())
    return model


def step(name, n, way, tiny):
    """Milliseconds of a step, seconds of the first, MiB and Gflop that XLA counts in one."""
    import jax

    model = compiled(name, way)
    x, y = MODELS[name].data(n)
    start = time.perf_counter()
    model.fit(x, y, batch_size=n, verbose=0)
    first = time.perf_counter() - start
    seconds, count = [], 1
    for _ in range(2 if tiny else 4):
        start = time.perf_counter()
        model.fit(_Repeated(x, y, count), verbose=0)
        seconds.append((time.perf_counter() - start) / count)
        count = 2 if tiny else min(max(int(1.5 / seconds[-1]), 5), 200)
    state = [model.trainable_variables, model.non_trainable_variables]
    state = [*state, model.optimizer.variables, model.metrics_variables]
    state = tuple([v.value for v in variables] for variables in state)
    # Found in the cache, where `fit` left it.
    function = jax.jit(model.train_step, donate_argnums=0).lower(state, (x, y)).compile()
    memory, cost = function.memory_analysis(), function.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "ms": 1e3 * statistics.median(seconds[1:]),
        "first": first,
        "mib": size / 2**20,
        "gflop": cost.get("flops", float("nan")) / 1e9,
        "weights": model.count_params(),
    }


class _Repeated(keras.utils.PyDataset):
    """One batch, so many times."""

    def __init__(self, x, y, count):
        super().__init__()
        self._batch, self._count = (x, y), count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self._batch


def print_steps(rows, until, tiny):
    """The first table."""
    print("\n| model | weights | N | products | optimizer | ms | over SGD | MiB | Gflop | first |")
    print("|---|---:|---:|---|---|---:|---:|---:|---:|---:|")
    clock = Clock(until)
    for name, n, precision, ways in rows:
        sgd = None
        for way in ways:
            if not clock.fits():
                print(f"\nNo time was left for {name}, N = {n}, {precision}, {way}, and after it.")
                return
            use(precision)
            try:
                s = step(name, n, way, tiny)
            except Exception as error:
                # Of an accelerator not seen before the next row may tell more.
                print(f"| {name} | | {n} | {precision} | {way} | {_line(error)} |", flush=True)
                continue
            sgd = s["ms"] if way == "sgd" else sgd
            ratio = f"{s['ms'] / sgd:.2f}" if sgd else ""
            print(
                f"| {name} | {s['weights']:,} | {n} | {precision} | {way} | {s['ms']:.2f} "
                f"| {ratio} | {s['mib']:,.0f} | {s['gflop']:,.3g} | {s['first']:.1f} s |",
                flush=True,
            )


def _line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def seen(name, n, precision):
    """The gradient and D v, flat, and the ten leading eigenvalues, float64."""
    use(precision)
    model = compiled(name, "sgd")
    x, y = MODELS[name].data(n)
    D = keras_rgd.diffusion_matrix(model, x, y)
    v = D.gradients.gradient
    flat = [
        np.concatenate([np.ravel(keras.ops.convert_to_numpy(t)).astype(float) for t in u])
        for u in (v, D.matvec(v))
    ]
    return *flat, D.eigenvalues()[:10]


def print_moved(cases, until):
    """The second table: TensorFloat-32 and bfloat16 products against those of float32."""
    print("\n| model | N | products | gradient | D v | lambda_max | ten eigenvalues at worst |")
    print("|---|---:|---|---:|---:|---:|---:|")
    clock = Clock(until)
    for name, n in cases:
        exact = None
        for precision in ("float32", "tensorfloat32", "bfloat16"):
            if not clock.fits():
                print(f"\nNo time was left for {name}, {precision}, and after it.")
                return
            found = seen(name, n, precision)
            exact = exact or found
            moved = [
                np.linalg.norm(a - b) / np.linalg.norm(b)
                for a, b in zip(found[:2], exact[:2], strict=True)
            ]
            ratio = np.abs(found[2] / exact[2] - 1)
            if found is not exact:
                cells = (f"{m:.1e}" for m in (*moved, ratio[0], ratio.max()))
                print(f"| {name} | {n} | {precision} |", " | ".join(cells), "|", flush=True)


def print_spectrum(folder, until, tiny):
    """The third table."""
    if not Clock(until).fits():
        print("\nNo time was left for the spectrum.")
        return
    use("float32")
    file = folder / "images.npz"
    count, name = (64, "random pixels") if tiny else (10_000, "random pixels")
    if file.exists():
        name, images = "CIFAR-10", np.load(file)
        x, y = images["x"].astype("float32") / 255, images["y"]
    else:
        x, y = MODELS["resnet20-bn"].data(count)
    keras.utils.set_random_seed(0)
    model = MODELS["cnn"].model() if tiny else architectures.resnet110()
    if tiny:
        x = x[:, :28, :28, :1]
    model.compile(keras.optimizers.SGD(0.01), models.loss())
    # Moving statistics, which evaluation mode uses.
    model.fit(x, y, batch_size=128, verbose=0)
    epochs = [time.perf_counter()]
    model.fit(x, y, batch_size=128, verbose=0)
    epochs.append(time.perf_counter())
    s = keras_rgd.spectrum(
        model, (x, y), k=20, memory_limit=24 * 2**30, batch_size=min(250, len(x)), verbose=False
    )
    print(
        "\n| network | images | N | d | method | seconds | an epoch of SGD | lambda_max | trace |"
    )
    print("|---|---|---:|---:|---|---:|---:|---:|---:|")
    print(
        f"| {model.name} | {name} | {s.n_examples:,} | {s.n_weights:,} | {s.method} "
        f"| {time.perf_counter() - epochs[1]:.1f} | {epochs[1] - epochs[0]:.1f} s "
        f"| {s.lambda_max:.4g} | {s.trace:.4g} |",
        flush=True,
    )


def run(args):
    """Print the tables."""
    import jax

    # What `fit` compiled is asked for its memory: not to be compiled again for that.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A second derivative, or a forward one, of cuDNN's attention is not to be had.
    keras.config.disable_flash_attention()
    device = jax.devices()[0]
    print(f"\n{device.device_kind} ({device.platform}), JAX {jax.__version__}, ", end="")
    print(f"Keras {keras.__version__}, numpy {np.__version__}")
    print_steps(
        TINY_STEPS if args.tiny else STEPS, args.until - (0 if args.tiny else KEPT), args.tiny
    )
    print_moved(TINY_MOVED if args.tiny else MOVED, args.until - (0 if args.tiny else KEPT / 2))
    print_spectrum(args.folder, args.until, args.tiny)


def images(args):
    """Save 10,000 images of CIFAR-10."""
    from keras_rgd.datasets import load_dataset

    try:
        x, y = load_dataset("cifar10", "test")
    except ValueError as error:
        print(f"The spectrum will be of random pixels: {error}")
        return
    np.savez_compressed(args.folder / "images.npz", x=np.uint8(np.round(255 * x)), y=y)


def main():
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (run, images):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("folder", type=pathlib.Path)
        command.add_argument("--until", type=float, default=float("inf"), help="seconds of 1970")
        command.add_argument("--tiny", action="store_true")
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
