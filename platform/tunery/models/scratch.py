"""New models: a small Llama with random weights, and a byte-level BPE tokenizer trained on the stage's rows.

Byte-level BPE: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909) over bytes, as in GPT-2. The rows determine the
tokenizer, and the seed determines the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
"""Padding and EOS token."""
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
"""Special tokens before the messages of each role."""


def chat_template(before: str, after: str, end: str) -> str:
    """Return tunery's chat template. A message is rendered as `before` + role + `after`, its content, and `end`.

    Tool definitions are rendered in the system message, and tool calls after the content of an assistant message, as
    JSON. All messages keep their reasoning, in <think> tags, so that earlier messages do not depend on later ones.
    """
    before, after, end = (json.dumps(text, ensure_ascii=False) for text in (before, after, end))
    return (
        "{% if tools %}"
        f"{{{{ {before} + 'system' + {after} }}}}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ 'Tools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
        f"{{{{ {end} }}}}{{% endif %}}"
        "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
        f"{{{{ {before} + message['role'] + {after} }}}}"
        "{% if message.get('reasoning_content') %}"
        "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}{% endif %}"
        "{{ message.get('content') or '' }}"
        "{% for call in message.get('tool_calls') or [] %}"
        "{{ '<tool_call>' + ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) "
        "+ '</tool_call>' }}{% endfor %}"
        f"{{{{ {end} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before} + 'assistant' + {after} }}}}{{% endif %}}"
    )


CHAT_TEMPLATE = chat_template("<|", "|>", END)


@dataclass(frozen=True)
class ScratchShape:
    """Shape of a Llama with tied embeddings."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int = 1024

    @property
    def parameters(self) -> int:
        """Number of parameters: embedding; in each layer four matrices of the attention, three of the MLP, and two
        norms; final norm."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden + self.layers * per_layer + self.hidden


SHAPES = {
    "tiny": ScratchShape(vocabulary=2048, hidden=128, layers=4, heads=4, intermediate=352),
    "small": ScratchShape(vocabulary=4096, hidden=192, layers=5, heads=6, intermediate=512),
}


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most `vocabulary` tokens and tunery's chat template."""
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
    """Return the config of a model with this shape. `tokens`: ids of special tokens, such as pad_token_id."""
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
    """Write a new model as a Hugging Face folder: config, weights (fp32) and tokenizer. name: one of SHAPES; texts: for
    the tokenizer; seed: of the weights."""
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
