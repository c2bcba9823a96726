"""Load a model and its tokenizer from the hub, a Hugging Face folder, or an artifact of the store.

A model artifact contains `model/` (a full model), or `adapter/` (PEFT) and `base.json`, which names the adapter's base.
Adapters are merged on loading, so that scoring, evaluation and training get a plain model. The adapter of a classifier
includes its head, and `head.json` lists its labels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import StoreError, TuneryError
from tunery.models.labels import Labels, RewardNorm, labels_of
from tunery.models.model_folder import BadModel
from tunery.models.scratch import chat_template
from tunery.spec import Pretrained
from tunery.store.atomic_write import read_json
from tunery.store.checksums import MANIFEST

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD = "head.json"
"""File beside an adapter with the labels of its classification head."""
Source = dict[str, Any]
"""{"artifact": path} | {"pretrained": path or hub name, "revision": hub revision or None}: JSON-serializable."""


def source_of(model: str | Pretrained, artifacts: dict[str, Path], folder: Path) -> Source:
    """Return the source of a stage's model. `artifacts`: by stage name; `folder`: base of relative paths."""
    if isinstance(model, str):
        return {"artifact": str(artifacts[model])}
    if model.is_folder:
        return {"pretrained": str((folder / Path(model.pretrained).expanduser()).resolve()), "revision": None}
    return {"pretrained": model.pretrained, "revision": model.revision}


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load a tokenizer. If it has no padding token, the EOS token is used; if it has no chat template, that of
    tunery."""
    tokenizer = load_original_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _plain_template(tokenizer)
    return tokenizer


def load_original_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it was saved."""
    from transformers import AutoTokenizer

    if "artifact" in source:
        artifact = Path(source["artifact"])
        return AutoTokenizer.from_pretrained(artifact / ("model" if (artifact / "model").is_dir() else "adapter"))
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, source)
    return tokenizer


def _disable_cudnn_sdp() -> None:
    """Disable cuDNN attention in this process. torch (2.11, 2.13) prefers it on an H100, but cuDNN builds a plan for
    each new shape, and lengths vary between batches. A LoRA step on 0.6 B parameters took 0.62 s with cuDNN and 0.35 s
    without, generation 33 s and 13 s."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model in `dtype`, with adapters merged."""
    from transformers import AutoModelForCausalLM

    _disable_cudnn_sdp()
    if "pretrained" in source:
        return _from_hub(AutoModelForCausalLM, source, dtype=dtype)
    artifact = Path(source["artifact"])
    return load_saved_model(artifact, base_of(artifact) if is_adapter(source) else {}, dtype)


def load_saved_model(folder: Path, base: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model from a folder with `model/`, or with `adapter/` for `base`."""
    from transformers import AutoModelForCausalLM

    if (folder / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    return _merge_adapter(load_model(base, dtype), folder)


def _merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge `folder/adapter` into its base."""
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    return merged.requires_grad_(True)  # PEFT (0.21.2) leaves the base frozen


def load_classifier(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, Labels]:
    """Load a sequence-classification model in `dtype`, and its labels. Raises TuneryError for a model without a
    classification head, since transformers would initialize one randomly."""
    from transformers import AutoModelForSequenceClassification

    _disable_cudnn_sdp()
    if "artifact" in source:
        artifact = Path(source["artifact"])
        model, labels = load_saved_classifier(artifact, base_of(artifact) if is_adapter(source) else {}, dtype)
        temperature = _facts(artifact).get("temperature")
        return model, dataclasses.replace(labels, temperature=temperature, reward_norm=load_reward_norm(artifact))
    name = source["pretrained"]
    model, loading_info = _from_hub(AutoModelForSequenceClassification, source, dtype=dtype, output_loading_info=True)
    try:
        if missing := sorted(loading_info["missing_keys"]):
            raise BadModel(
                f"`{name}` has no classification head",
                f"it has no weights for {', '.join(missing[:4])}",
                "use a model that was trained to classify; a language model scores by `perplexity` or `ifd`",
            )
        return model, labels_of(model.config.to_dict(), name)
    except BadModel as error:
        raise TuneryError(error.message, cause=error.cause, remedy=error.remedy) from None


def load_saved_classifier(folder: Path, base: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, Labels]:
    """Load a classifier from a folder with `model/`, or with `adapter/`, which includes its head, for `base`. Its
    labels have neither temperature nor reward normalization, which are in an artifact's manifest."""
    if (folder / "model").is_dir():
        return load_classifier({"pretrained": str(folder / "model"), "revision": None}, dtype)
    names = tuple(json.loads((folder / HEAD).read_text())["labels"])
    model, _ = load_with_new_head(base, names, dtype)
    # The head was trained and saved in fp32.
    return _merge_adapter(model, folder).to(dtype), Labels(names, len(names) == 1)


def load_reward_norm(artifact: Path) -> RewardNorm | None:
    """Return the reward normalization of the artifact of a `reward` stage; None for any other artifact."""
    facts = _facts(artifact)
    return RewardNorm(facts["reward_mean"], facts["reward_std"]) if "reward_mean" in facts else None


def _facts(artifact: Path) -> dict[str, Any]:
    """Return the facts in an artifact's manifest. Raises StoreError if it is unreadable."""
    manifest = read_json(artifact / MANIFEST)
    if manifest is None:
        raise StoreError(
            f"{artifact / MANIFEST} can't be read",
            cause="it is truncated, or was removed while a run used it",
            remedy="run `tunery run` again: it rebuilds the artifact",
        )
    facts: dict[str, Any] = manifest["facts"]
    return facts


def load_with_new_head(source: Source, labels: Sequence[str], dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """Load a language model with a classification head for training, in `dtype`. Return it and the names of its
    randomly initialized modules. An existing head with the same number of labels is kept.

    The config gets a `pad_token_id`, which the model needs to find the last token of a row. Raises TuneryError if other
    modules than the head and a pooler would be initialized randomly.
    """
    from transformers import AutoModelForSequenceClassification

    _disable_cudnn_sdp()
    if is_adapter(source):
        language_model = load_model(source, dtype)
        model = AutoModelForSequenceClassification.from_config(_config_with_labels(source, labels), dtype=dtype)
        setattr(model, model.base_model_prefix, getattr(language_model, language_model.base_model_prefix))
        inherited = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict()}
        return model, _modules(key for key in model.state_dict() if key not in inherited)
    model, loading_info = _from_hub(
        AutoModelForSequenceClassification,
        _folder_of(source),
        config=_config_with_labels(source, labels),
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new_keys = sorted({*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])})
    backbone = f"{model.base_model_prefix}."
    if missing := [key for key in new_keys if key.startswith(backbone) and "pooler" not in key]:
        raise TuneryError(
            f"`{source.get('pretrained', source.get('artifact'))}` can't be given a classification head",
            cause=f"it has no weights for {', '.join(missing[:4])}",
            remedy="use a language model of an architecture that transformers knows, saved by `save_pretrained`",
        )
    return model, _modules(new_keys)


def weightless_model_with_head(source: Source, labels: Sequence[str]) -> PreTrainedModel:
    """Return the model of `load_with_new_head` on the meta device, without weights, to inspect it before loading."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(_config_with_labels(source, labels))
    return model


def _config_with_labels(source: Source, labels: Sequence[str]) -> PretrainedConfig:
    """Return the config of the source's full model, with these labels and a valid padding token."""
    from transformers import AutoConfig

    root = source
    while is_adapter(root):
        root = base_of(Path(root["artifact"]))
    config: PretrainedConfig = _from_hub(
        AutoConfig,
        _folder_of(root),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        problem_type="single_label_classification" if len(labels) > 1 else None,
    )
    text_config = config.get_text_config()
    tokenizer = load_original_tokenizer(source)
    # Some configs have an invalid token id, such as -1.
    if text_config.pad_token_id is None or not 0 <= text_config.pad_token_id < len(tokenizer):
        text_config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return config


def _modules(keys: Iterable[str]) -> list[str]:
    """Return the module names of the parameters `keys`."""
    return sorted({key.rpartition(".")[0] for key in keys})


def write_head(folder: Path, labels: Sequence[str]) -> None:
    """Write the labels of an adapter that includes a classification head."""
    (folder / HEAD).write_text(json.dumps({"labels": list(labels)}) + "\n")


def load_encoder(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model without its head, encoder or causal, in `dtype`; its outputs are hidden states."""
    from transformers import AutoModel

    _disable_cudnn_sdp()
    if "artifact" in source:
        causal: PreTrainedModel = load_model(source, dtype).base_model
        return causal
    model, loading_info = _from_hub(AutoModel, source, dtype=dtype, output_loading_info=True)
    # A missing pooler is initialized randomly, but not used here.
    if missing := sorted(key for key in loading_info["missing_keys"] if "pooler" not in key):
        raise TuneryError(
            f"`{source['pretrained']}` can't be loaded without its head",
            cause=f"it has no weights for {', '.join(missing[:4])}",
            remedy="use a model of an architecture that transformers knows, saved by `save_pretrained`",
        )
    encoder: PreTrainedModel = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder


def is_adapter(source: Source) -> bool:
    """Whether the source is an artifact with an adapter."""
    return "artifact" in source and not (Path(source["artifact"]) / "model").is_dir()


def base_of(artifact: Path) -> Source:
    """Return the source of an adapter's base. base.json names an artifact relative to the store, so that the store can
    be moved."""
    base: Source = json.loads((artifact / "base.json").read_text())
    return {"artifact": str(artifact.parent / base["artifact"])} if "artifact" in base else base


def _folder_of(source: Source) -> Source:
    """Return the source of a full model as a folder or hub name."""
    return {"pretrained": str(Path(source["artifact"]) / "model"), "revision": None} if "artifact" in source else source


def write_base(folder: Path, source: Source) -> None:
    """Write base.json beside an adapter. Also remove local paths from its PEFT config and sort sets in it, which PEFT
    (0.21) writes in random order, so that artifacts are reproducible."""
    base = {"artifact": Path(source["artifact"]).name} if "artifact" in source else source
    (folder / "base.json").write_text(json.dumps(base, indent=1) + "\n")
    path = folder / "adapter" / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    reproducible = {key: sorted(value) if _is_set(value) else value for key, value in config.items()}
    if "artifact" in source:
        reproducible["base_model_name_or_path"] = None
    path.write_text(json.dumps(reproducible, indent=2, sort_keys=True) + "\n")


def _is_set(value: object) -> bool:
    """Whether a value in a PEFT config may be a set of names, which JSON stores as a list."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _from_hub(auto_class: Any, source: Source, **options: Any) -> Any:
    """Call `from_pretrained` of one of transformers' Auto classes. Raises TuneryError if it fails."""
    name, revision = source["pretrained"], source["revision"]
    try:
        # Explicit: transformers would otherwise ask in a terminal whether to run a repository's own code.
        return auto_class.from_pretrained(name, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise TuneryError(
            f"the model `{name}` can't be loaded",
            cause=str(error).strip().splitlines()[0],
            remedy="check the name and revision, the network (HF_HUB_OFFLINE), and HF_TOKEN for gated models; "
            "or download it and give the folder, such as {pretrained: ./models/name}",
        ) from error


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return tunery's chat template with role names as text, for tokenizers without tunery's special tokens."""
    eos_token = tokenizer.eos_token
    if eos_token is None:
        raise TuneryError(
            "the model's tokenizer has neither a chat template nor an EOS token",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    # The template must write the BOS token itself if the tokenizer adds one to texts.
    bos_token = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else None
    return (f"{{{{ {json.dumps(bos_token)} }}}}" if bos_token else "") + chat_template("", ": ", eos_token)
