"""Tiny sequence-classification models with random weights, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tunery.models.scratch import train_tokenizer

TEXT = "why how what is the a row model it is because so red green blue one two three of and no yes"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LIVELY = 0.4
"""Standard deviation of the initial weights; large, so that a wrong token, pair or mask changes the logits noticeably.
"""


def write_encoder(folder: Path, labels: list[str], positions: int = 64, **config: Any) -> Path:
    """Save a BERT classifier with a word-level tokenizer that encodes pairs and has no chat template."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    shape = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        initializer_range=LIVELY,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **config,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_reward_model(folder: Path, pad: int | None = None, labels: int = 1) -> Path:
    """Save a Llama with a classification head and a chat template. Without `pad` the config has no padding token, as is
    common."""
    torch.manual_seed(0)
    LlamaForSequenceClassification(_llama(num_labels=labels, pad_token_id=pad)).save_pretrained(folder)
    train_tokenizer([TEXT], 300).save_pretrained(folder)
    return folder


def write_language_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(_llama()).save_pretrained(folder)
    train_tokenizer([TEXT], 300).save_pretrained(folder)
    return folder


def _llama(**config: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        initializer_range=LIVELY,
        **config,
    )
