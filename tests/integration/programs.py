"""Small programs in the manner of keras.io's examples and of keras_hub's tasks.

Each keeps what is characteristic of the published one (its pipeline, masks, layers, loss) with
widths of a few units and random data. The number of examples is no multiple of the batch size, so
that the batch axis is open where a step is traced.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L
from keras import ops
from keras_hub import models

import keras_rgd

N = 27  # examples
BATCH = 8
T = 6  # tokens
WIDTH = 8  # of embeddings
WORDS = [f"word{i}" for i in range(9)]
VOCABULARY = len(WORDS) + 2  # and the places of padding and of unknown words
CLASSES = 3
SIDE, CHANNELS, PATCH = 8, 2, 4  # of images
PATCHES = (SIDE // PATCH) ** 2

CROSSENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, what `fit` gets, and how they are compiled."""

    name: str
    build: Callable  # () -> the uncompiled model, as it is published
    data: Callable  # batch size -> a tf.data.Dataset in such batches, or a tuple of arrays
    loss: Callable | None = None  # a maker of losses; None for a model with one of its own
    by_examples: Callable = keras_rgd.to_rgd  # the model -> one that RGD trains by examples
    over_time: bool = False  # the loss has values (N, T)
    open_length: bool = False  # a batch is as long as its longest example
    way: str | None = "layerwise"  # what "auto" must take; None for any
    alone: bool = True  # the loss of an example is the same in every batch
    has_example_losses: bool = True

    def __str__(self):
        return self.name

    def model(self):
        """The built model; the same weights each time, and none of them 0."""
        keras.utils.set_random_seed(7)
        model = self.build()
        if not model.built:
            model(self.batches()[0][0])
        rng = np.random.default_rng(2)
        for w in model.trainable_variables:
            w.assign(ops.convert_to_numpy(w) + 0.1 * rng.normal(size=w.shape).astype("float32"))
        return model

    def compile(self, model, optimizer):
        model.compile(optimizer, **({} if self.loss is None else {"loss": self.loss()}))
        return model

    def fit(self, model, **options):
        """`fit` in the order of the data."""
        data = self.data(BATCH)
        if isinstance(data, tuple):
            names = ("x", "y", "sample_weight")
            options |= dict(zip(names, data, strict=False), batch_size=BATCH)
        else:
            options["x"] = data
        return model.fit(**options, shuffle=False, verbose=0)

    def batches(self, size=BATCH):
        """The (x, y, sample_weight) that `fit` sees, as tensors, in its order."""
        data = self.data(size)
        if isinstance(data, tuple):
            data = [_tensors(data, slice(at, at + size)) for at in range(0, N, size)]
        return [keras.utils.unpack_x_y_sample_weight(batch) for batch in data]

    def measured_data(self):
        """What the monitor and `spectrum` get: as `fit`, but with examples of one shape."""
        if not self.open_length:
            return self.data(BATCH)
        (batch,) = self.batches(N)
        return tuple(part for part in batch if part is not None)

    def loss_shape(self, y):
        """The shape of each loss's values behind the batch axis."""
        return tuple(y.shape[1:2]) if self.over_time else ()


def _tensors(arrays, part):
    return keras.tree.map_structure(lambda a: tf.convert_to_tensor(a[part]), arrays)


def _rng():
    return np.random.default_rng(1)


def _sentences(shortest=T, longest=T):
    """Strings of some words each, the shorter ones first."""
    rng = _rng()
    lengths = np.sort(rng.integers(shortest, longest + 1, N))
    return [" ".join(rng.choice(WORDS, n)) for n in lengths]


def _images(side=SIDE, channels=CHANNELS):
    return _rng().uniform(size=(N, side, side, channels)).astype("float32")


def _classes(high=CLASSES):
    return _rng().integers(0, high, N)


# Vision transformer: keras.io, vision/image_classification_with_vision_transformer


class Patches(L.Layer):
    """Images cut into squares, each a row."""

    def call(self, images):
        squares = ops.image.extract_patches(images, size=PATCH)
        return ops.reshape(squares, (ops.shape(images)[0], PATCHES, PATCH * PATCH * CHANNELS))


class PatchEncoder(L.Layer):
    """Rows projected, and a learned vector for the place of each."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.projection = L.Dense(WIDTH)
        self.places = L.Embedding(PATCHES, WIDTH)

    def call(self, patches):
        places = ops.expand_dims(ops.arange(PATCHES), 0)
        return self.projection(patches) + self.places(places)


def _augmentation(*random):
    normalization = L.Normalization()
    normalization.adapt(_images(SIDE // 2))
    return keras.Sequential([normalization, L.Resizing(SIDE, SIDE), *random], name="augmentation")


def vision_transformer():
    images = keras.Input((SIDE // 2, SIDE // 2, CHANNELS))
    augmented = _augmentation(
        L.RandomFlip("horizontal"), L.RandomRotation(0.02), L.RandomZoom(0.2, 0.2)
    )(images)
    x = PatchEncoder()(Patches()(augmented))
    h = L.LayerNormalization(epsilon=1e-6)(x)
    x = L.Add()([L.MultiHeadAttention(2, WIDTH // 2, dropout=0.1)(h, h), x])
    h = L.LayerNormalization(epsilon=1e-6)(x)
    h = L.Dropout(0.1)(L.Dense(2 * WIDTH, activation="gelu")(h))
    x = L.Add()([L.Dropout(0.1)(L.Dense(WIDTH, activation="gelu")(h)), x])
    x = L.Dropout(0.5)(L.Flatten()(L.LayerNormalization(epsilon=1e-6)(x)))
    return keras.Model(images, L.Dense(CLASSES)(x))


# MLP-Mixer: keras.io, vision/mlp_image_classification


class Mixer(L.Layer):
    """A network along the patches, then one along the channels, with one normalization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.along_patches = self._network(PATCHES)
        self.along_channels = self._network(WIDTH)
        self.normalize = L.LayerNormalization(epsilon=1e-6)

    @staticmethod
    def _network(units):
        return keras.Sequential([L.Dense(PATCHES, "gelu"), L.Dense(units), L.Dropout(0.2)])

    def call(self, x):
        columns = ops.transpose(self.normalize(x), (0, 2, 1))
        x = x + ops.transpose(self.along_patches(columns), (0, 2, 1))
        return x + self.along_channels(self.normalize(x))


def mlp_mixer():
    images = keras.Input((SIDE // 2, SIDE // 2, CHANNELS))
    augmented = _augmentation(L.RandomFlip("horizontal"), L.RandomZoom(0.2, 0.2))(images)
    x = L.Dense(WIDTH)(Patches()(augmented))
    x = keras.Sequential([Mixer()])(x)
    return keras.Model(images, L.Dense(CLASSES)(L.Dropout(0.2)(L.GlobalAveragePooling1D()(x))))


def image_classes(batch_size):
    return _images(SIDE // 2), _classes()


# Character-level LSTM: keras.io, nlp/lstm_seq2seq


def lstm_seq2seq():
    source = keras.Input((None, 5))
    _, *state = L.LSTM(WIDTH, return_state=True)(source)
    target = keras.Input((None, 4))
    decoder = L.LSTM(WIDTH, return_sequences=True, return_state=True)
    outputs, _, _ = decoder(target, initial_state=state)
    return keras.Model([source, target], L.Dense(4, activation="softmax")(outputs))


def characters(batch_size):
    rng = _rng()
    source = np.eye(5, dtype="float32")[rng.integers(0, 5, (N, T))]
    target = np.eye(4, dtype="float32")[rng.integers(0, 4, (N, T + 1))]
    return [source, target[:, :-1]], target[:, 1:]


# Translation: keras.io, nlp/neural_machine_translation_with_transformer


class PositionalEmbedding(L.Layer):
    """A vector for each token and one for its place; tokens of 0 are masked, if asked for."""

    def __init__(self, mask_zero=False, **kwargs):
        super().__init__(**kwargs)
        self.tokens = L.Embedding(VOCABULARY, WIDTH)
        self.places = L.Embedding(2 * T, WIDTH)
        self.mask_zero = mask_zero

    def call(self, tokens):
        return self.tokens(tokens) + self.places(ops.arange(ops.shape(tokens)[-1]))

    def compute_mask(self, tokens, mask=None):
        return ops.not_equal(tokens, 0) if self.mask_zero else None


class Encoder(L.Layer):
    """Attention to all tokens that are no padding."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = L.MultiHeadAttention(2, WIDTH // 2)
        self.projection = keras.Sequential([L.Dense(2 * WIDTH, "relu"), L.Dense(WIDTH)])
        self.norms = [L.LayerNormalization() for _ in range(2)]
        self.supports_masking = True

    def call(self, x, mask=None):
        padding = None if mask is None else ops.cast(mask[:, None, :], "int32")
        x = self.norms[0](x + self.attention(x, x, x, attention_mask=padding))
        return self.norms[1](x + self.projection(x))


class Decoder(L.Layer):
    """Attention to the tokens so far, and to what the encoder makes of the other sentence."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attentions = [L.MultiHeadAttention(2, WIDTH // 2) for _ in range(2)]
        self.projection = keras.Sequential([L.Dense(2 * WIDTH, "relu"), L.Dense(WIDTH)])
        self.norms = [L.LayerNormalization() for _ in range(3)]
        self.supports_masking = True

    def call(self, inputs, mask=None):
        x, encoded = inputs
        of_x, of_encoded = (None, None) if mask is None else mask
        so_far = self.causal_mask(x)
        if of_x is not None:
            so_far = ops.minimum(so_far, ops.cast(of_x[:, None, :], "int32"))
        x = self.norms[0](x + self.attentions[0](x, x, x, attention_mask=so_far))
        if of_encoded is not None:
            of_encoded = ops.cast(of_encoded[:, None, :], "int32")
        seen = self.attentions[1](x, encoded, encoded, attention_mask=of_encoded)
        x = self.norms[1](x + seen)
        return self.norms[2](x + self.projection(x))

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    @staticmethod
    def causal_mask(x):
        n, length = ops.shape(x)[0], ops.shape(x)[1]
        places = ops.arange(length)
        mask = ops.cast(places[:, None] >= places, "int32")
        return ops.tile(ops.reshape(mask, (1, length, length)), (n, 1, 1))


def translation():
    source = keras.Input((None,), dtype="int64", name="source")
    encoded = Encoder()(PositionalEmbedding(mask_zero=True)(source))
    target = keras.Input((None,), dtype="int64", name="target")
    x = Decoder()([PositionalEmbedding(mask_zero=True)(target), encoded])
    words = L.Dense(VOCABULARY, activation="softmax")(L.Dropout(0.5)(x))
    return keras.Model({"source": source, "target": target}, words)


def sentence_pairs(batch_size):
    """Sentences as tokens, in each batch padded to its longest."""
    vectorize = L.TextVectorization(vocabulary=WORDS)
    pairs = tf.data.Dataset.from_tensor_slices((_sentences(1), _sentences(2)))

    def format_pair(source, target):
        source, target = vectorize(source), vectorize(target)
        return {"source": source, "target": target[:, :-1]}, target[:, 1:]

    return pairs.batch(batch_size).map(format_pair)


# Masked words: keras.io, nlp/masked_language_modeling


class MaskedLanguageModel(keras.Model):
    """A loss of its own, summed over the words that were hidden, and a metric that follows it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.words = keras.losses.SparseCategoricalCrossentropy(reduction=None)
        self.tracker = keras.metrics.Mean(name="loss")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        losses = self.words(y, y_pred, sample_weight)
        self.tracker.update_state(losses, sample_weight=sample_weight)
        return ops.sum(losses)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return {"loss": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


class MaskedLanguageModelByExamples(keras_rgd.RGDMixin, MaskedLanguageModel):
    """The same with RGD's step."""


def masked_language_model():
    tokens = keras.Input((T,), dtype="int64")
    x = PositionalEmbedding()(tokens)
    attended = L.Dropout(0.1)(L.MultiHeadAttention(2, WIDTH // 2)(x, x, x))
    x = L.LayerNormalization(epsilon=1e-6)(x + attended)
    network = keras.Sequential([L.Dense(WIDTH, activation="relu"), L.Dense(WIDTH)])
    x = L.LayerNormalization(epsilon=1e-6)(x + L.Dropout(0.1)(network(x)))
    return MaskedLanguageModel(tokens, L.Dense(VOCABULARY, activation="softmax")(x))


def hidden_words(batch_size):
    words = np.asarray(L.TextVectorization(vocabulary=WORDS[:-1])(_sentences()))
    hidden = _rng().random(words.shape) < 0.3
    tokens = np.where(hidden, VOCABULARY - 1, words)
    return tf.data.Dataset.from_tensor_slices((tokens, words, hidden * 1.0)).batch(batch_size)


# Miniature GPT: keras.io, generative/text_generation_with_miniature_gpt


class SelfAttention(L.Layer):
    """Attention to the tokens so far, spelled out."""

    def __init__(self, heads=2, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads
        self.query, self.key, self.value, self.combine = (L.Dense(WIDTH) for _ in range(4))

    def separate(self, x):
        x = ops.reshape(x, (ops.shape(x)[0], -1, self.heads, WIDTH // self.heads))
        return ops.transpose(x, (0, 2, 1, 3))

    def call(self, x):
        query, key, value = (self.separate(f(x)) for f in (self.query, self.key, self.value))
        score = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
        score = score / ops.sqrt(ops.cast(ops.shape(key)[-1], score.dtype))
        places = ops.arange(ops.shape(score)[-1])
        so_far = ops.cast(places[:, None] >= places, score.dtype)[None, None]
        weights = ops.softmax(score * so_far - 1e4 * (1 - so_far))
        seen = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return self.combine(ops.reshape(seen, (ops.shape(x)[0], -1, WIDTH)))


class GPTBlock(L.Layer):
    """A transformer's block."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = SelfAttention()
        self.network = keras.Sequential([L.Dense(2 * WIDTH, activation="relu"), L.Dense(WIDTH)])
        self.norms = [L.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [L.Dropout(0.1) for _ in range(2)]

    def call(self, x):
        x = self.norms[0](x + self.dropouts[0](self.attention(x)))
        return self.norms[1](x + self.dropouts[1](self.network(x)))


def miniature_gpt():
    tokens = keras.Input((T,), dtype="int32")
    x = GPTBlock()(PositionalEmbedding()(tokens))
    # The second output has no loss.
    return keras.Model(tokens, [L.Dense(VOCABULARY)(x), x])


def next_words(batch_size):
    vectorize = L.TextVectorization(vocabulary=WORDS, output_sequence_length=T + 1)

    def shift(text):
        tokens = vectorize(tf.expand_dims(text, -1))
        return tokens[:, :-1], tokens[:, 1:]

    return tf.data.Dataset.from_tensor_slices(_sentences(T + 1, T + 1)).batch(batch_size).map(shift)


# Captchas: keras.io, vision/captcha_ocr

LETTERS = "abcde"


class CTCEndpoint(L.Layer):
    """The loss of the letters read, added by a layer of the model."""

    def call(self, letters, read):
        n = ops.shape(letters)[0]
        lengths = (ops.shape(a)[1] * ops.ones((n,), "int32") for a in (letters, read))
        self.add_loss(ops.ctc_loss(letters, read, *lengths))
        return read


def _read(images, direction=lambda recurrent: recurrent):
    x = L.Conv2D(4, 3, activation="relu", padding="same")(images)
    x = L.Conv2D(4, 3, activation="relu", padding="same")(L.MaxPooling2D(2)(x))
    x = L.Reshape((6, 8))(L.MaxPooling2D(2)(x))
    x = L.Dropout(0.2)(L.Dense(WIDTH, activation="relu")(x))
    x = direction(L.LSTM(4, return_sequences=True, dropout=0.25))(x)
    return L.Dense(len(LETTERS) + 2)(x)


def captcha():
    images = keras.Input((24, 8, 1), name="image")
    return keras.Model({"image": images}, _read(images))


def captcha_endpoint():
    images = keras.Input((24, 8, 1), name="image")
    letters = keras.Input((None,), dtype="int64", name="letters")
    read = _read(images, L.Bidirectional)
    return keras.Model([images, letters], CTCEndpoint()(letters, read))


def _captchas():
    rng = _rng()
    images = rng.random((N, 8, 24, 1)).astype("float32")
    letters = ["".join(rng.choice(list(LETTERS), 3)) for _ in range(N)]
    lookup = L.StringLookup(vocabulary=list(LETTERS), mask_token="")

    def encode(image, text):
        encoded = lookup(tf.strings.unicode_split(text, input_encoding="UTF-8"))
        # Time is the width of the image.
        return tf.transpose(image, (1, 0, 2)), tf.ensure_shape(encoded, (3,))

    return tf.data.Dataset.from_tensor_slices((images, letters)).map(encode)


def captchas(batch_size):
    return _captchas().map(lambda image, letters: ({"image": image}, letters)).batch(batch_size)


def captchas_with_letters(batch_size):
    pairs = _captchas().map(lambda image, letters: {"image": image, "letters": letters})
    return pairs.batch(batch_size)


# Wide and deep: keras.io, structured_data/wide_deep_cross_networks

CATEGORIES = {"soil": ["sand", "clay", "loam", "peat"], "area": ["north", "south"]}
NUMBERS = ("slope", "elevation")


def wide_and_deep():
    inputs = {name: keras.Input((), name=name) for name in NUMBERS}
    inputs |= {name: keras.Input((), name=name, dtype="string") for name in CATEGORIES}

    def encoded(name, embed):
        if name in NUMBERS:
            return ops.expand_dims(inputs[name], -1)
        words = CATEGORIES[name]
        options = dict(vocabulary=words, mask_token=None, num_oov_indices=0)
        if embed:
            return L.Embedding(len(words), 2)(L.StringLookup(**options)(inputs[name]))
        one_hot = L.StringLookup(**options, output_mode="multi_hot")
        return one_hot(ops.expand_dims(inputs[name], -1))

    wide = L.BatchNormalization()(L.concatenate([encoded(name, embed=False) for name in inputs]))
    deep = L.concatenate([encoded(name, embed=True) for name in inputs])
    for _ in range(2):
        deep = L.Dropout(0.1)(L.ReLU()(L.BatchNormalization()(L.Dense(WIDTH)(deep))))
    return keras.Model(inputs, L.Dense(CLASSES, "softmax")(L.concatenate([wide, deep])))


def cover_types(batch_size):
    rng = _rng()
    features = {name: rng.random(N).astype("float32") for name in NUMBERS}
    features |= {name: rng.choice(words, N) for name, words in CATEGORIES.items()}
    return tf.data.Dataset.from_tensor_slices((features, _classes())).batch(batch_size)


# Variational autoencoder: keras.io, generative/vae


class Sampling(L.Layer):
    """A normal variable of the given mean and log variance."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        return mean + ops.exp(0.5 * log_variance) * noise


class VAE(keras.Model):
    """Trained on images alone, by a `compute_loss` of its own."""

    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.decoder = encoder, decoder
        self.trackers = [keras.metrics.Mean(name=name) for name in ("reconstruction", "divergence")]

    def call(self, images):
        mean, log_variance, z = self.encoder(images)
        return self.decoder(z), mean, log_variance

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        images, mean, log_variance = y_pred
        pixels = keras.losses.binary_crossentropy(x, images)
        terms = ops.square(mean) + ops.exp(log_variance) - 1 - log_variance
        parts = ops.sum(pixels, (1, 2)), 0.5 * ops.sum(terms, 1)
        for tracker, part in zip(self.trackers, parts, strict=True):
            tracker.update_state(part, sample_weight=sample_weight)
        losses = parts[0] + parts[1]
        return ops.mean(losses if sample_weight is None else losses * sample_weight)


class VAEByExamples(keras_rgd.RGDMixin, VAE):
    """The same with RGD's step."""


def vae():
    images = keras.Input((SIDE, SIDE, 1))
    x = L.Conv2D(2, 3, activation="relu", strides=2, padding="same")(images)
    x = L.Conv2D(4, 3, activation="relu", strides=2, padding="same")(x)
    x = L.Dense(WIDTH, activation="relu")(L.Flatten()(x))
    statistics = [L.Dense(2, name="mean")(x), L.Dense(2, name="log_variance")(x)]
    encoder = keras.Model(images, [*statistics, Sampling()(statistics)])
    z = keras.Input((2,))
    x = L.Reshape((2, 2, 4))(L.Dense(2 * 2 * 4, activation="relu")(z))
    x = L.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
    x = L.Conv2DTranspose(2, 3, activation="relu", strides=2, padding="same")(x)
    decoder = keras.Model(z, L.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x))
    return VAE(encoder, decoder)


def images_alone(batch_size):
    return (_images(SIDE, 1),)


# keras_hub: tasks from their configurations, with random weights


class BertByExamples(keras_rgd.RGDMixin, models.BertTextClassifier):
    """The task with RGD's step."""


class ViTByExamples(keras_rgd.RGDMixin, models.ViTImageClassifier):
    """The task with RGD's step."""


class GPT2ByExamples(keras_rgd.RGDMixin, models.GPT2CausalLM):
    """The task with RGD's step."""


def _of_backbone(task, **options):
    """A function from a model of keras_hub to another task on its backbone."""
    return lambda model: task(backbone=model.backbone, preprocessor=None, **options)


def hub_bert():
    backbone = models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=2 * WIDTH,
        max_sequence_length=T,
    )
    return models.BertTextClassifier(backbone, num_classes=CLASSES, preprocessor=None)


def _padded_tokens():
    rng = _rng()
    valid = np.arange(T) < rng.integers(2, T + 1, (N, 1))
    return np.where(valid, rng.integers(1, VOCABULARY, (N, T)), 0), valid.astype("int32")


def bert_texts(batch_size):
    tokens, valid = _padded_tokens()
    segments = np.zeros_like(valid)
    x = {"token_ids": tokens, "segment_ids": segments, "padding_mask": valid}
    return x, _classes()


def hub_vit():
    backbone = models.ViTBackbone(
        image_shape=(SIDE, SIDE, CHANNELS),
        patch_size=PATCH,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        mlp_dim=2 * WIDTH,
        dropout_rate=0.1,
        attention_dropout=0.1,
    )
    return models.ViTImageClassifier(backbone, num_classes=CLASSES, preprocessor=None)


def vit_images(batch_size):
    return _images(), _classes()


def hub_gpt2():
    backbone = models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=2 * WIDTH,
        max_sequence_length=T,
    )
    return models.GPT2CausalLM(backbone, preprocessor=None)


def gpt2_texts(batch_size):
    """As its preprocessor makes them: the words that follow, padding with weight 0."""
    tokens, valid = _padded_tokens()
    x = {"token_ids": tokens, "padding_mask": valid}
    return x, np.roll(tokens, -1, axis=1), np.roll(valid, -1, axis=1).astype("float32")


PROGRAMS = [
    Program("vision_transformer", vision_transformer, image_classes, CROSSENTROPY),
    Program("mlp_mixer", mlp_mixer, image_classes, CROSSENTROPY),
    Program(
        "lstm_seq2seq",
        lstm_seq2seq,
        characters,
        keras.losses.CategoricalCrossentropy,
        over_time=True,
        way="double_backward",
    ),
    Program(
        "translation",
        translation,
        sentence_pairs,
        keras.losses.SparseCategoricalCrossentropy,
        over_time=True,
        open_length=True,
        way=None,
        alone=False,
    ),
    Program(
        "masked_language_model",
        masked_language_model,
        hidden_words,
        by_examples=lambda model: MaskedLanguageModelByExamples(model.inputs, model.outputs),
        over_time=True,
        alone=False,
    ),
    Program(
        "miniature_gpt",
        miniature_gpt,
        next_words,
        lambda: [CROSSENTROPY(), None],
        over_time=True,
        way=None,
    ),
    Program("captcha", captcha, captchas, keras.losses.CTC, way="double_backward"),
    Program(
        "captcha_endpoint",
        captcha_endpoint,
        captchas_with_letters,
        has_example_losses=False,
    ),
    Program(
        "wide_and_deep",
        wide_and_deep,
        cover_types,
        keras.losses.SparseCategoricalCrossentropy,
        way="double_backward",
    ),
    Program(
        "vae",
        vae,
        images_alone,
        by_examples=lambda model: VAEByExamples(model.encoder, model.decoder),
    ),
    Program(
        "hub_bert",
        hub_bert,
        bert_texts,
        CROSSENTROPY,
        by_examples=_of_backbone(BertByExamples, num_classes=CLASSES),
    ),
    Program(
        "hub_vit",
        hub_vit,
        vit_images,
        CROSSENTROPY,
        by_examples=_of_backbone(ViTByExamples, num_classes=CLASSES),
        way="layerwise",
    ),
    Program(
        "hub_gpt2",
        hub_gpt2,
        gpt2_texts,
        CROSSENTROPY,
        by_examples=_of_backbone(GPT2ByExamples),
        over_time=True,
    ),
]
