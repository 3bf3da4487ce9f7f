"""A T5 encoder with random weights, and a tokenizer that was trained on a few words."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer


def write_t5(folder: Path, width: int) -> None:
    """Write model and tokenizer; tokens are `width` wide."""
    torch.manual_seed(2)
    config = T5Config(d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=256)
    T5EncoderModel(config).save_pretrained(folder)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a handwritten three", "two dogs, one cat! the quick brown fox jumps over it"] * 20),
        model_writer=pieces,
        vocab_size=48,
        **{
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "num_threads": 1,
            "hard_vocab_limit": False,
            "minloglevel": 2,
        },
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
