"""What a network keeps between its forward and its backward pass, in closed form; nothing is run, and torch stays out.

Counted as torch computes without `engine.compile` and `engine.fp8`, and with an attention that keeps no weight for each
pair of tokens: any kernel but `math`. Weights, their gradients and what an allocator wastes are not in it, nor is the
attention's bias, a number per token.

Dimensions: B images, N image tokens, L text tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fmscale.models.shapes import TIMESTEP_FEATURES

FLOAT32 = 4  # bytes of an element


class Activations(NamedTuple):
    """Bytes for one micro-batch.

    Attributes:
        start: of that, what precedes the blocks, and stays until the end of the backward pass.
        saved: what the forward pass keeps for the backward pass.
        transient: by how much more than that there is at most: gradients, and what is computed again. An estimate,
            right within a tenth of the sum.
    """

    start: int
    saved: int
    transient: int


class _Size(NamedTuple):
    """What the bytes of a block depend on beside its tokens.

    Attributes:
        width: D.
        heads: of attention.
        batch: B.
        item: bytes of an element.
        qk_norm: whether queries and keys are normalised.
        fused_norm: whether one kernel does that.
        parts: of blocks that forget.
    """

    width: int
    heads: int
    batch: int
    item: int
    qk_norm: bool
    fused_norm: bool
    parts: Collection[str]

    def rows(self, count: int) -> int:
        """Bytes of so many rows of D elements, for each image."""
        return self.batch * count * self.width * self.item

    def floats(self, count: int) -> int:
        """Bytes of so many float32, for each image."""
        return self.batch * count * FLOAT32


class _Block(NamedTuple):
    """Bytes of a block.

    Attributes:
        inputs: that it keeps if it forgets all that happens in it.
        kept: that it keeps if it does not.
        whole: the same where no part of it forgets either.
        working: that its backward pass adds, at most at a time.
        again: that its parts compute again, at most at a time.
    """

    inputs: int
    kept: int
    whole: int
    working: int
    again: int = 0


class _Network(NamedTuple):
    """Bytes of a network.

    Attributes:
        start: of what precedes the blocks, and stays until the end of the backward pass.
        blocks: in order.
        end: of what follows them.
    """

    start: int
    blocks: Sequence[_Block]
    end: _Block


def activations(
    model: Mapping[str, Any],
    height: int,
    width: int,
    text_tokens: int,
    batch: int,
    item: int,
    recompute_every: int = 0,
    recompute: Collection[str] = (),
    fused_norm: bool = True,
) -> Activations:
    """What is kept for the backward pass of one micro-batch.

    Args:
        model: the `model` section of a config.
        height, width: of the latents, in latent pixels.
        text_tokens: L, as the network gets them: one that stands for many counts once.
        batch: B.
        item: bytes of an element: 2 in bf16, 4 in fp32.
        recompute_every: so many-th blocks forget all that happens in them; 0 for none.
        recompute: parts that forget in the other blocks, named as for `engine.blocks.recompute`.
        fused_norm: queries and keys are normalised by one kernel, as on GPUs. The CPU takes steps, which keep more.
    """
    norm = model["family"] == "flux" or model["qk_norm"]
    size = _Size(model["heads"] * model["head_dim"], model["heads"], batch, item, norm, fused_norm, recompute)
    image = (height // model["patch_size"]) * (width // model["patch_size"])
    return _over_time(ACTIVATIONS[model["family"]](model, size, image, text_tokens), recompute_every)


def _over_time(network: _Network, every: int) -> Activations:
    """Of a step. When the backward pass is at a block, what later ones kept is gone."""
    saved = most = network.start
    for number, block in enumerate([*network.blocks, network.end]):
        forgets = every and number % every == 0 and number < len(network.blocks)
        saved += block.inputs if forgets else block.kept
        again = block.whole - block.inputs if forgets else block.again
        most = max(most, saved + again + block.working)
    return Activations(network.start, saved, most - saved)


def _mmdit(model: Mapping[str, Any], size: _Size, image: int, text: int) -> _Network:
    """Of an `MMDiT`."""
    last = model["layers"] - 1
    duals = [layer in model["dual_attention_layers"] for layer in range(model["layers"])]
    blocks = [_joint(size, image, text, dual, layer == last) for layer, dual in enumerate(duals)]
    rows = sum(9 if dual else 6 for dual in duals) + 6 * last + 2 + 2  # the image's, the text's, the last norm's
    told = 2 if model.get("leap_embed") else 1
    return _Network(_start(model, size, image, text, rows, told), blocks, _end(model, size, image, image))


def _flux(model: Mapping[str, Any], size: _Size, image: int, text: int) -> _Network:
    """Of a `Flux`."""
    layers, singles, tokens = model["layers"], model["single_layers"], image + text
    blocks = [_joint(size, image, text, dual=False, last=False)] * layers + [_single(size, tokens)] * singles
    told = 1 + sum(bool(model.get(name)) for name in ("guidance_embed", "leap_embed"))
    start = _start(model, size, image, text, 12 * layers + 3 * singles + 2, told)
    rotation = tokens * model["head_dim"] * FLOAT32  # a cosine and a sine for each pair of channels, for all images
    return _Network(start + rotation, blocks, _end(model, size, image, tokens))


def _start(model: Mapping[str, Any], size: _Size, image: int, text: int, rows: int, told: int) -> int:
    """Of latents, text and what else the network is told, and of so many rows of modulation."""
    patch_values = model["latent_channels"] * model["patch_size"] ** 2
    given = image * patch_values + text * model["context_dim"] + told * TIMESTEP_FEATURES + model["pooled_dim"]
    conditioning = 2 * (told + 1) + 2  # around the activation of each MLP, and of their sum
    return size.batch * int(given) * size.item + size.rows(conditioning + rows)


def _end(model: Mapping[str, Any], size: _Size, image: int, tokens: int) -> _Block:
    """Of the output, from the image's among so many tokens: these, normed, modulated; and the error, in float32."""
    patch_values = model["latent_channels"] * model["patch_size"] ** 2
    kept = size.rows(tokens + 2 * image) + _modulated(size, image) + size.floats(image * int(patch_values))
    # Three products in float32 by which a gradient goes back through `modulate`.
    return _Block(kept, kept, kept, size.floats(3 * size.width * image))


def _joint(size: _Size, image: int, text: int, dual: bool, last: bool) -> _Block:
    """Of a `JointBlock`."""
    tokens = image + text

    def kept(parts: Collection[str]) -> int:
        some = size._replace(parts=parts)
        of_text = _read_stream(some, text) if last else _stream(some, text, dual=False)
        return _stream(some, image, dual) + of_text + _attention(some, tokens, 4)  # queries, keys, values, attended

    # Gradients of the tokens, of what a branch gives, and of what is between the MLP's layers.
    working = size.rows((1 + 1 + 4) * tokens)
    again = size.rows(8 * image) if "mlp" in size.parts else 0
    return _Block(size.rows(tokens), kept(size.parts), kept(()), working, again)


def _stream(size: _Size, tokens: int, dual: bool) -> int:
    """Of a `Stream`, without the joint attention."""
    rows = 3 + 1 + 3 + 1  # for each of two branches: tokens, normed, modulated; and what it gives
    rows += 1 if size.batch > 1 else 0  # its share of what was attended to, copied because images lie apart there
    rows += 0 if "mlp" in size.parts else 4 + 4  # around the activation
    kept = size.rows(rows * tokens) + 2 * _modulated(size, tokens) + _norms(size, tokens, in_product=False)
    return kept + (_dual(size, tokens) if dual else 0)


def _read_stream(size: _Size, tokens: int) -> int:
    """Of a `ReadStream`, without the joint attention: tokens, normed, modulated."""
    return size.rows(3 * tokens) + _modulated(size, tokens) + _norms(size, tokens, in_product=False)


def _dual(size: _Size, tokens: int) -> int:
    """Of the attention of a `Stream` to itself: modulated, what it gives, and what is between."""
    kept = size.rows(2 * tokens) + size.floats(size.width)
    if "dual" in size.parts:
        return kept
    # Values are a slice of the product that they are from, which keeps all of it even where `qkv` forgets.
    rows = 3 + (2 if size.qk_norm else 0) + 1  # product, normed queries and keys, attended
    return kept + _attention(size, tokens, rows) + _norms(size, tokens, in_product=True)


def _single(size: _Size, tokens: int) -> _Block:
    """Of a `SingleBlock`, which has no parts."""
    size = size._replace(parts=())
    # Tokens, normed, modulated; what `enter` gives; queries and keys, turned; attended; what `leave` takes and gives.
    kept = _attention(size, tokens, 3 + 7 + 2 + 1 + 5 + 1)
    kept += _modulated(size, tokens) + _norms(size, tokens, in_product=True)
    # Gradients of the tokens, of queries, keys and values, and of what is within the MLP.
    return _Block(size.rows(tokens), kept, kept, size.rows((1 + 3 + 4) * tokens))


def _attention(size: _Size, tokens: int, rows: int) -> int:
    """So many rows for each token, and the logarithm of the softmax's sum for each query."""
    return size.rows(rows * tokens) + size.floats(size.heads * tokens)


def _modulated(size: _Size, tokens: int) -> int:
    """Mean and deviation of each token, and 1 + scale."""
    return size.floats(2 * tokens + size.width)


def _norms(size: _Size, tokens: int, *, in_product: bool) -> int:
    """Of the norms of queries and keys, without the product that these are from if it is kept anyway: `in_product`."""
    if not size.qk_norm or "qkv" in size.parts:
        return 0
    kept = size.floats(2 * size.heads * tokens)  # deviations
    widened = not size.fused_norm and size.item < FLOAT32  # then float32 copies are kept, and the product is not
    kept += 0 if in_product or widened else size.rows(3 * tokens)
    steps = 0 if size.fused_norm else 4 if widened else 2
    return kept + size.floats(steps * size.width * tokens)


ACTIVATIONS: dict[str, Callable[[Mapping[str, Any], _Size, int, int], _Network]] = {"mmdit": _mmdit, "flux": _flux}
