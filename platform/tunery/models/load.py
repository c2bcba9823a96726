"""Loading a model and its tokenizer: a hub name, a Hugging Face folder, or an artifact of this store.

A model artifact holds `model/` (a whole model) or `adapter/` (PEFT, to be laid on its base) and `base.json` that says
what the base is. Adapters are merged on loading, so that whoever scores, evaluates or trains on sees one plain model.
A classifier's adapter holds its head too, and `head.json` says what that tells apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import TuneryError
from tunery.models.labels import Labels, RewardNorm, labels_of
from tunery.models.model_folder import BadModel
from tunery.models.scratch import chat_template
from tunery.spec import Pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD = "head.json"
Source = dict[str, Any]
"""{"artifact": path} | {"pretrained": path or hub name, "revision": hub revision or None}: fits into JSON."""


def source_of(model: str | Pretrained, artifacts: dict[str, Path], folder: Path) -> Source:
    """Where a stage's model comes from; `artifacts` by stage name, `folder` where relative paths start."""
    if isinstance(model, str):
        return {"artifact": str(artifacts[model])}
    if model.is_folder:
        return {"pretrained": str((folder / Path(model.pretrained).expanduser()).resolve()), "revision": None}
    return {"pretrained": model.pretrained, "revision": model.revision}


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """With a padding token and a chat template: tunery's own where the model brings none."""
    tokenizer = load_own_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _plain_template(tokenizer)
    return tokenizer


def load_own_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """As the model brings it."""
    from transformers import AutoTokenizer

    if "artifact" in source:
        artifact = Path(source["artifact"])
        return AutoTokenizer.from_pretrained(artifact / ("model" if (artifact / "model").is_dir() else "adapter"))
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, source)
    return tokenizer


def _disable_cudnn_sdp() -> None:
    """Of this process. cuDNN's attention, which torch (2.11, 2.13) prefers on an H100, builds a plan for each new
    shape, and batches here are as long as their longest row: a step of LoRA on 0.6 B parameters took 0.62 s with it and
    0.35 s without, answers 33 s and 13 s."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model in `dtype`, adapters merged."""
    from transformers import AutoModelForCausalLM

    _disable_cudnn_sdp()
    if "pretrained" in source:
        return _from_hub(AutoModelForCausalLM, source, dtype=dtype)
    artifact = Path(source["artifact"])
    return load_saved_model(artifact, base_of(artifact) if is_adapter(source) else {}, dtype)


def load_saved_model(folder: Path, base: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The same from a folder that holds `model/`, or `adapter/` on `base`."""
    from transformers import AutoModelForCausalLM

    if (folder / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    return _merged(load_model(base, dtype), folder).requires_grad_(True)  # PEFT (0.21.2) leaves the base frozen


def _merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    return merged


def load_classifier(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, Labels]:
    """A sequence-classification model in `dtype`, and what it tells apart.

    Raises TuneryError for a model without such a head: transformers would give it one of random weights.
    """
    from transformers import AutoModelForSequenceClassification

    _disable_cudnn_sdp()
    if "artifact" in source:
        artifact = Path(source["artifact"])
        model, labels = load_saved_classifier(artifact, base_of(artifact) if is_adapter(source) else {}, dtype)
        temperature = _facts(artifact).get("temperature")
        return model, dataclasses.replace(labels, temperature=temperature, scale=scale_of(artifact))
    name = source["pretrained"]
    model, told = _from_hub(AutoModelForSequenceClassification, source, dtype=dtype, output_loading_info=True)
    try:
        if missing := sorted(told["missing_keys"]):
            raise BadModel(
                f"`{name}` has no classification head",
                f"it has no weights for {', '.join(missing[:4])}",
                "take a model that was trained to classify; a language model scores by `perplexity` or `ifd`",
            )
        return model, labels_of(model.config.to_dict(), name)
    except BadModel as error:
        raise TuneryError(error.message, cause=error.cause, remedy=error.remedy) from None


def load_saved_classifier(folder: Path, base: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, Labels]:
    """The same from a folder that holds `model/`, or `adapter/` and its head on `base`; without temperature and scale,
    which are facts of an artifact."""
    if (folder / "model").is_dir():
        return load_classifier({"pretrained": str(folder / "model"), "revision": None}, dtype)
    names = tuple(json.loads((folder / HEAD).read_text())["labels"])
    headed, _ = load_with_new_head(base, names, dtype)
    # The head was trained and saved in full precision.
    return _merged(headed, folder).to(dtype), Labels(names, len(names) == 1)


def scale_of(artifact: Path) -> RewardNorm | None:
    """Of the rewards of a `reward` stage's artifact; None of another's."""
    facts = _facts(artifact)
    return RewardNorm(facts["reward_mean"], facts["reward_deviation"]) if "reward_mean" in facts else None


def _facts(artifact: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())["facts"]
    return facts


def load_with_new_head(source: Source, labels: Sequence[str], dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """A sequence-classification model in `dtype` on the weights of a language model, to be trained, and its modules
    whose weights are random. A head of as many labels that the model has already is kept.

    Rows of a batch are told apart from their padding by `pad_token_id`, which its config has then. Raises TuneryError
    when more than a head (and what pools for it) would be random.
    """
    from transformers import AutoModelForSequenceClassification

    _disable_cudnn_sdp()
    if is_adapter(source):
        whole = load_model(source, dtype)
        model = AutoModelForSequenceClassification.from_config(_for_labels(source, labels), dtype=dtype)
        setattr(model, model.base_model_prefix, getattr(whole, whole.base_model_prefix))
        inherited = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict()}
        return model, _modules(key for key in model.state_dict() if key not in inherited)
    model, told = _from_hub(
        AutoModelForSequenceClassification,
        _folder_of(source),
        config=_for_labels(source, labels),
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
    body = f"{model.base_model_prefix}."
    if missing := [key for key in new if key.startswith(body) and "pooler" not in key]:
        raise TuneryError(
            f"`{source.get('pretrained', source.get('artifact'))}` can't be given a classification head",
            cause=f"it has no weights for {', '.join(missing[:4])}",
            remedy="take a language model of an architecture that transformers knows, saved by `save_pretrained`",
        )
    return model, _modules(new)


def outline_with_head(source: Source, labels: Sequence[str]) -> PreTrainedModel:
    """The same without any weights: what it takes is known before it is loaded."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        outline: PreTrainedModel = AutoModelForSequenceClassification.from_config(_for_labels(source, labels))
    return outline


def _for_labels(source: Source, labels: Sequence[str]) -> PretrainedConfig:
    from transformers import AutoConfig

    root = source
    while is_adapter(root):
        root = base_of(Path(root["artifact"]))
    names = dict(enumerate(labels))
    config: PretrainedConfig = _from_hub(
        AutoConfig,
        _folder_of(root),
        num_labels=len(labels),
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type="single_label_classification" if len(labels) > 1 else None,
    )
    text = config.get_text_config()
    tokenizer = load_own_tokenizer(source)
    # Some configs name a token that there is not, such as -1.
    if text.pad_token_id is None or not 0 <= text.pad_token_id < len(tokenizer):
        text.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return config


def _modules(keys: Iterable[str]) -> list[str]:
    """Of parameters, by name."""
    return sorted({key.rpartition(".")[0] for key in keys})


def write_head(folder: Path, labels: Sequence[str]) -> None:
    """Beside an adapter that holds a classification head: what it tells apart."""
    (folder / HEAD).write_text(json.dumps({"labels": list(labels)}) + "\n")


def load_encoder(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """A model without its head, encoder or causal, in `dtype`: it gives hidden states."""
    from transformers import AutoModel

    _disable_cudnn_sdp()
    if "artifact" in source:
        causal: PreTrainedModel = load_model(source, dtype).base_model
        return causal
    model, told = _from_hub(AutoModel, source, dtype=dtype, output_loading_info=True)
    # Models that were not trained with a pooler get one of random weights; nobody asks it here.
    if missing := sorted(key for key in told["missing_keys"] if "pooler" not in key):
        raise TuneryError(
            f"`{source['pretrained']}` can't be loaded without its head",
            cause=f"it has no weights for {', '.join(missing[:4])}",
            remedy="take a model of an architecture that transformers knows, saved by `save_pretrained`",
        )
    encoder: PreTrainedModel = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder


def is_adapter(source: Source) -> bool:
    return "artifact" in source and not (Path(source["artifact"]) / "model").is_dir()


def base_of(artifact: Path) -> Source:
    """What an adapter lies on. Artifacts are named relative to the store, so that a store can be moved."""
    base: Source = json.loads((artifact / "base.json").read_text())
    return {"artifact": str(artifact.parent / base["artifact"])} if "artifact" in base else base


def _folder_of(source: Source) -> Source:
    """Of a whole model."""
    return {"pretrained": str(Path(source["artifact"]) / "model"), "revision": None} if "artifact" in source else source


def write_base(folder: Path, source: Source) -> None:
    """Beside an adapter: what it lies on. The adapter's own configuration, which PEFT (0.21) writes with a path of this
    machine and with sets in an order that changes from process to process, gets neither."""
    named = {"artifact": Path(source["artifact"]).name} if "artifact" in source else source
    (folder / "base.json").write_text(json.dumps(named, indent=1) + "\n")
    path = folder / "adapter" / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    ordered = {key: sorted(value) if _is_set(value) else value for key, value in config.items()}
    if "artifact" in source:
        ordered["base_model_name_or_path"] = None
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n")


def _is_set(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _from_hub(auto: Any, source: Source, **options: Any) -> Any:
    name, revision = source["pretrained"], source["revision"]
    try:
        return auto.from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise TuneryError(
            f"the model `{name}` can't be loaded",
            cause=str(error).strip().splitlines()[0],
            remedy="check the name and revision, the network (HF_HUB_OFFLINE), and HF_TOKEN for gated models; "
            "or download it and give the folder, such as {pretrained: ./models/name}",
        ) from error


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """tunery's chat template with role words instead of the special tokens that a foreign tokenizer lacks."""
    end = tokenizer.eos_token
    if end is None:
        raise TuneryError(
            "the model's tokenizer has neither a chat template nor an end token",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    # A template writes the BOS token itself, where the tokenizer puts one before a text.
    bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else None
    return (f"{{{{ {json.dumps(bos)} }}}}" if bos else "") + chat_template("", ": ", end)
