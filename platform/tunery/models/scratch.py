"""New models: a small Llama with random weights and a byte-level BPE tokenizer trained on the rows at hand.

Byte-level BPE: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909) over bytes, as in GPT-2. The same rows make the
same tokenizer, and the same seed the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class ScratchShape:
    """A Llama's shape; the embedding is tied to the head."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int = 1024

    @property
    def parameters(self) -> int:
        """Exact: embedding, per layer attention (4), MLP (3) and two norms, and the last norm."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden


SHAPES = {
    "tiny": ScratchShape(vocabulary=2048, hidden=128, layers=4, heads=4, intermediate=352),
    "small": ScratchShape(vocabulary=4096, hidden=192, layers=5, heads=6, intermediate=512),
}


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens with tunery's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def scratch_config(shape: ScratchShape, **tokens: int | None) -> LlamaConfig:
    """`tokens`: numbers of the special ones."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        **tokens,
    )


def write_scratch_model(folder: Path, name: str, texts: Iterable[str], seed: int) -> None:
    """Config, weights (fp32) and tokenizer of a new model, as a Hugging Face folder."""
    import torch
    from transformers import LlamaForCausalLM

    shape = SHAPES[name]
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    config = scratch_config(
        shape, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
