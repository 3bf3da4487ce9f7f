"""CLIP text towers that are no transformers folder yet: open_clip's, converted, and small random ones.

Both become a `CLIPTextModelWithProjection` and a `CLIPTokenizer`, so that there is one way to compute features, and an
export can write them where stock pipelines look.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmscale.encoders.weights import check_safetensors
from fmscale.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
PAD_TOKENS = {"clip_l": END_TOKEN, "clip_g": "!"}  # as the tokenizers of the SD3 pipelines pad

TOWER_KEYS = {
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
}  # all else is more than transformers' CLIP can
RENAMED = (
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)

WORD_STD = 1.0
SPECIAL_STD = 0.3  # of the start and the end token: all captions share them, so the less they weigh the better
POSITION_STD = 1.0  # as much as words: who stands above whom is a matter of place
QUERY_KEY_GAIN = 2.0  # attention that picks words; at 1 it would average all words, and captions would look alike


def clip_tokenizer(max_length: int, pad_token: str = END_TOKEN) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, made from the vocabulary that open_clip ships.

    Args:
        max_length: tokens per caption, with the start and the end token.
        pad_token: what fills short captions; a token of the vocabulary.

    Returns:
        A tokenizer of 49,408 tokens.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    shipped = SimpleTokenizer()
    names = {"<start_of_text>": START_TOKEN, "<end_of_text>": END_TOKEN}
    vocabulary = {names.get(token, token): number for token, number in shipped.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(shipped.bpe_ranks), pad_token=pad_token, model_max_length=max_length
    )


def load_open_clip(name: str, checkpoint: Path) -> nn.Module:
    """The text tower of an open_clip checkpoint; the image tower is not read.

    Args:
        name: a model that open_clip knows, such as ViT-bigG-14.
        checkpoint: its weights as one .safetensors file on this machine.

    Returns:
        open_clip's `TextTransformer`, for `from_open_clip`; it cannot run itself.

    Raises:
        UserError: an unknown name, a tower that transformers' CLIP cannot express, or weights of another model.
    """
    from open_clip.transformer import QuickGELU, TextTransformer

    config = _tower_config(name)
    settings = config["text_cfg"]
    with torch.device("meta"):  # only a frame for the weights to come
        tower = TextTransformer(
            **settings, output_dim=config["embed_dim"], act_layer=QuickGELU if config.get("quick_gelu") else nn.GELU
        )
    try:
        tower.load_state_dict(_read_tower(checkpoint), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint}: not the weights of open_clip's {name} ({reason})") from error
    return tower


def model_config(name: str) -> dict[str, Any]:
    """What open_clip says of a model.

    Raises:
        UserError: it knows no such model.
    """
    import open_clip

    known = open_clip.list_models()  # checked first: open_clip would look for other names on the network
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "open_clip.list_models() names them"
        raise UserError(f"open_clip has no model {name!r}; {hint}")
    return open_clip.get_model_config(name)


def _tower_config(name: str) -> dict[str, Any]:
    config = model_config(name)
    extra = sorted(key for key, value in config["text_cfg"].items() if key not in TOWER_KEYS and value)
    if extra:
        raise UserError(
            f"open_clip's {name} has a text tower with {', '.join(extra)}, which transformers' CLIP cannot express; "
            "choose a model whose text_cfg has only " + ", ".join(sorted(TOWER_KEYS))
        )
    return {**config, "text_cfg": {key: config["text_cfg"][key] for key in TOWER_KEYS & set(config["text_cfg"])}}


def _read_tower(checkpoint: Path) -> dict[str, Tensor]:
    """The text tower's weights by open_clip's names; some models store them under `text.`."""
    from safetensors import safe_open

    roots = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    check_safetensors(checkpoint)
    with safe_open(checkpoint, framework="pt") as file:
        named = {name.removeprefix("module.").removeprefix("text."): name for name in file.keys()}  # noqa: SIM118
        return {short: file.get_tensor(name) for short, name in named.items() if short.startswith(roots)}


def from_open_clip(tower: Any) -> CLIPTextModelWithProjection:
    """An open_clip text tower as transformers' model: the same features up to rounding.

    Args:
        tower: open_clip's `TextTransformer`: causal, pooled at the end token, with a projection without bias.

    Returns:
        The model in float32 on the CPU, in evaluation mode.

    Raises:
        UserError: the tower computes something that transformers' CLIP cannot express.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    blocks = tower.transformer.resblocks
    pooled_at_end = tower.pool_type == "argmax" and tower.attn_mask is not None
    state = _transformers_state(tower.state_dict())
    config = CLIPTextConfig(
        vocab_size=tower.vocab_size,
        hidden_size=tower.width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        projection_dim=tower.output_dim,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=tower.context_length,
        hidden_act=_activation_name(blocks[0].mlp.gelu),
        layer_norm_eps=tower.ln_final.eps,
        **_special_ids(tower.vocab_size),
    )
    model = CLIPTextModelWithProjection(config)
    if not pooled_at_end or set(state) != set(model.state_dict()):
        raise UserError("this open_clip text tower computes what transformers' CLIP cannot; choose a plain one")
    model.load_state_dict(state)
    return model.eval()


def _transformers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights by transformers' names: query, key and value apart, the projection as a Linear's weight."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        if name == "text_projection":
            renamed["text_projection.weight"] = tensor.T.contiguous()
        elif ".attn.in_proj_" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = piece
        else:
            renamed[name] = tensor
    return renamed


def _activation_name(activation: nn.Module) -> str:
    from open_clip.transformer import QuickGELU

    if isinstance(activation, QuickGELU):
        return "quick_gelu"
    if isinstance(activation, nn.GELU) and activation.approximate == "none":
        return "gelu"
    raise UserError(
        f"this open_clip text tower has the activation {activation}; only QuickGELU and GELU can be converted"
    )


def _special_ids(vocab_size: int) -> dict[str, Any]:
    """The start and the end token are CLIP's last two."""
    return {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}


def random_clip(
    folder: Path | str, *, width: int, layers: int, heads: int, projection_dim: int, max_length: int, seed: int
) -> None:
    """Write a small CLIP text model with random weights, and its tokenizer, as a transformers folder.

    Never trained, it still gives each caption features of its own, from which a small model can learn what words mean.

    Args:
        folder: is created.
        width: of a token, a multiple of `heads`.
        layers: at least 2, for features are taken before the last.
        heads: of each attention.
        projection_dim: width of the pooled embedding.
        max_length: tokens per caption.
        seed: the same seed writes the same weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    assert layers >= 2, layers
    tokenizer = clip_tokenizer(max_length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        hidden_act="gelu",
        **_special_ids(len(tokenizer)),
    )
    model = CLIPTextModelWithProjection(config)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights: larger ones than a model that is to be trained starts from, so that captions differ clearly.

    | tensor                        | value                                    |
    |-------------------------------|------------------------------------------|
    | embedding of words            | normal, std WORD_STD                     |
    | embedding of start, end token | normal, std SPECIAL_STD                  |
    | embedding of positions        | normal, std POSITION_STD                 |
    | query and key matrices        | normal, std QUERY_KEY_GAIN / sqrt(width) |
    | other matrices                | normal, std 1 / sqrt(inputs)             |
    | norm weights                  | 1                                        |
    | biases                        | 0                                        |
    """
    for name, weight in model.named_parameters():
        if "token_embedding" in name:
            weight.normal_(std=WORD_STD, generator=generator)
            weight[-2:] *= SPECIAL_STD / WORD_STD
        elif "position_embedding" in name:
            weight.normal_(std=POSITION_STD, generator=generator)
        elif weight.ndim == 2:
            gain = QUERY_KEY_GAIN if ".q_proj." in name or ".k_proj." in name else 1.0
            weight.normal_(std=gain * weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(float("norm" in name and name.endswith("weight")))
