"""Tokenizers with the chat templates of model families, and kinds of tokenizers, for tests of the encoding.

The templates of TRL are read from the installed package. Families without a template in TRL are written here in their
style. Every tokenizer is real and small, and has the special tokens that its template uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunery.models.chat_template import chat_template_of
from tunery.models.load import _plain_template
from tunery.models.scratch import CHAT_TEMPLATE
from tunery.store.rows import Row

_TRL = Path(trl.__file__).parent / "chat_templates"
_SPECIAL = re.compile(
    r"<\|[A-Za-z_/▁]+\|?>|<[A-Za-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|\"\|>|\[gMASK\]|<sop>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|<end_of_utterance>|<fake_token_around_image>|<image>"
)
_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")
"""Added tokens that are not special, as in Qwen's tokenizers."""

_EOS = {
    "qwen": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "lfm2": "<|im_end|>",
    "phi3": "<|end|>",
    "gemma": "<eos>",
    "diffusion_gemma": "<eos>",
    "glm4moe": "<|endoftext|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "llava": "</s>",
    "mistral_v3": "</s>",
    "llama2": "</s>",
    "vicuna": "</s>",
    "zephyr": "</s>",
    "chatml": "<|endoftext|>",  # as in a Qwen base model: this token does not end a message
    "plain": "</s>",
    "no_end_tokens": "</s>",
    "scratch": "<|end|>",
}


def _turns(system: str, user: str, assistant: str, prompt: str, start: str = "") -> str:
    """Return a template that renders each message by its role; `C` stands for the content."""

    def render(text: str) -> str:
        before, _, after = text.partition("C")
        return f"{{{{- {before!r} + message['content'] + {after!r} }}}}"

    return (
        f"{{{{- {start!r} }}}}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{system if system.startswith('{') else render(system)}"
        f"{{% elif message['role'] == 'user' %}}{render(user)}"
        f"{{% elif message['role'] == 'assistant' %}}{render(assistant)}"
        "{% else %}{{ raise_exception('a turn of an unknown role: ' + message['role']) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{- {prompt!r} }}}}{{% endif %}}"
    )


_CHATML = _turns(
    "<|im_start|>system\nC<|im_end|>\n",
    "<|im_start|>user\nC<|im_end|>\n",
    "<|im_start|>assistant\nC<|im_end|>\n",
    "<|im_start|>assistant\n",
)
OWN_TEMPLATES = {
    "chatml": _CHATML,
    "zephyr": _turns("<|system|>\nC</s>\n", "<|user|>\nC</s>\n", "<|assistant|>\nC</s>\n", "<|assistant|>\n"),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + message['content'].strip() + ' [/INST]' }}{% set ns.system = '' %}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only system, user and assistant turns') }}{% endif %}{% endfor %}"
    ),
    "vicuna": _turns("C ", "USER: C ", "ASSISTANT: C</s>", "ASSISTANT:", start="<s>"),
    "mistral_v3": (
        "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('system turns are not supported') }}"
        "{% elif message['role'] == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}"
        "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{{ '[INST] ' + message['content'] + '[/INST]' }}"
        "{% elif message['role'] == 'tool' %}"
        "{{ '[TOOL_RESULTS] {\"content\": ' + (message['content'] | tojson) + ', \"call_id\": \"'"
        " + message['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}"
        "{% elif message['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for call in message['tool_calls'] %}"
        "{% if call['id'] | length != 9 %}{{ raise_exception('ids of tool calls have 9 characters') }}{% endif %}"
        "{{ ', ' if not loop.first }}{{ '{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' "
        "+ (call['function']['arguments'] | tojson) + ', \"id\": \"' + call['id'] + '\"}' }}{% endfor %}"
        "{{ ']' + eos_token }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "glm_plain": _turns("<|system|>\nC", "<|user|>\nC", "<|assistant|>\nC", "<|assistant|>", start="[gMASK]<sop>"),
    "no_end_tokens": _turns("C\n", "### Human: C\n", "### Assistant: C\n", "### Assistant:"),
    "raises_on_system": _turns(
        "{{ raise_exception('no system turns, please') }}",
        "<|user|>C<|end|>",
        "<|assistant|>C<|end|>",
        "<|assistant|>",
    ),
    "ignores_system": _turns("{# nothing #}", "<|user|>C<|end|>", "<|assistant|>C<|end|>", "<|assistant|>"),
    "strips_content": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{#<|system|><|user|>#}"
    ),
    "drops_thinking": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if message['reasoning_content'] and loop.last %}"
        "{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
        "{{ message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{#<|system|><|user|>#}"
    ),
    "dated": (
        "{{ '<|system|>Today is ' + strftime_now('%Y-%m-%d') + '.<|end|>' }}"
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{#<|user|>#}"
    ),
    "scratch": CHAT_TEMPLATE + "{#<|system|><|user|><|assistant|><|tool|>#}",
}
"""Templates in the style of families that have none in TRL, and tunery's own template for scratch models."""

TRL_FAMILIES = sorted(path.stem for path in _TRL.glob("*.jinja"))
FAMILIES = [*TRL_FAMILIES, *OWN_TEMPLATES, "plain"]
"""`plain`: the template that `load_tokenizer` adds to a tokenizer without one."""

_SENTENCES = [
    "The answer is Paris, and the question is what the capital of France is.",
    "Add the numbers: two and two make four.\n\nIt is so, because I think so.",
    "USER: where? ASSISTANT: in Paris.",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _SENTENCES * 3,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|pad|>", "<unk>"]
        ),
    )
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """Return a BPE tokenizer with byte fallback, like SentencePiece. scheme: `first` adds a space before a text,
    `always` also after each special token, as in Llama 2's tokenizer, `never` adds none."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])
    )
    tokenizer.train_from_iterator(
        _SENTENCES * 3,
        trainers.BpeTrainer(
            vocab_size=700,
            show_progress=False,
            special_tokens=["<|pad|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        ),
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer.train_from_iterator(
        _SENTENCES * 3,
        trainers.UnigramTrainer(
            vocab_size=200,
            initial_alphabet=alphabet,
            show_progress=False,
            special_tokens=["<|pad|>", "<unk>"],
            unk_token="<unk>",
        ),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _SENTENCES * 3,
        trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=["<|pad|>", "<unk>"]),
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "metaspace first": functools.partial(metaspace, "first"),
    "metaspace always": functools.partial(metaspace, "always"),
    "metaspace never": functools.partial(metaspace, "never"),
    "unigram": unigram,
    "word piece": word_piece,
}


@functools.cache
def _trained(kind: str) -> str:
    return str(KINDS[kind]().to_str())


def source_of(family: str) -> str:
    """Return the source of the template; "" for `plain`."""
    if family == "plain":
        return ""
    return OWN_TEMPLATES[family] if family in OWN_TEMPLATES else (_TRL / f"{family}.jinja").read_text(encoding="utf-8")


@functools.cache
def tokenizer_of(family: str, kind: str = "byte-level", adds: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the chat template and special tokens of a family. adds: `bos` and `eos`, the tokens that
    it adds to a text."""
    source = source_of(family) or None
    eos = next((token for name, token in _EOS.items() if family.startswith(name)), "<|end|>")
    bos = "<s>" if eos == "</s>" else "<|bos|>"
    backend = Tokenizer.from_str(_trained(kind))
    special = sorted({*_SPECIAL.findall(source or ""), eos, bos})
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    markup = sorted(set(_MARKUP.findall(source or "")))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in markup])
    if adds:
        single = f"{bos if 'bos' in adds else ''} $A {eos if 'eos' in adds else ''}".strip()
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<|pad|>", chat_template=source
    )
    if family == "plain":
        tokenizer.chat_template = _plain_template(tokenizer)
    return tokenizer


def rendered(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as rendered by the tokenizer's chat template."""
    template = chat_template_of(tokenizer)
    return template.unescape(template.conversation(row).text)
