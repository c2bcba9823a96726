"""Configs and registry entries of the scorers that read a model's likelihoods, logits or embeddings of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from tunery.spec.references import ROWS, Auto, Model, StageRef
from tunery.spec.scorers.scorer_entry import ByOption, ClassificationSpec, ModelScorerSpec, ResponseOrAll, ScorerEntry


class Perplexity(ModelScorerSpec):
    """exp of the mean negative log-likelihood of a row's tokens. Lower is better.

    Marion et al. 2023, "When Less is More" (https://arxiv.org/abs/2309.04564).
    """

    perplexity: Model
    """Causal language model."""
    of: ResponseOrAll = "response"
    """response: of the last response given everything before it (of a text, all of it); all: of every token."""


class Ifd(ModelScorerSpec):
    """Instruction-following difficulty: perplexity of the response given the prompt, divided by that without the
    prompt.

    Near 1 and above, the response hardly depends on the prompt; near 0 the response is trivial. Li et al. 2024, "From
    Quantity to Quality" (https://arxiv.org/abs/2308.12032), train on the highest below 1. To filter bad rows, lower is
    better.
    """

    ifd: Model
    """Causal language model."""


class Reward(ClassificationSpec):
    """Output of a reward model: the single logit of its head, unbounded; of a `reward` stage normalised to (logit -
    mean) / standard deviation. Higher is better.

    Stiennon et al. 2020, "Learning to summarize from human feedback" (https://arxiv.org/abs/2009.01325). Any
    sequence-classification model with one label works, regression models too.
    """

    reward: Model
    """A `reward` stage, or a sequence-classification model with one label."""


class Classifier(ClassificationSpec):
    """Probability of one label under a text classifier. Higher is better: set the label of good rows, or `prefer: low`
    in `keep`.

    A softmax over the labels; a sigmoid for each if the model's config has `multi_label_classification`, and for a
    model with one label. As in FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), whose own classifier
    is a regression: use `reward` for that.
    """

    classifier: Model
    """A `classifier` stage, or a sequence-classification model."""
    label: str | Annotated[int, Field(ge=0)]
    """Name or number of the label, as in `id2label` of the model's config.json."""
    temperature: Annotated[float, Field(gt=0)] | Auto = 1.0
    """Divisor of the logits: above 1 probabilities are less extreme, below 1 more (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). With two labels, or a sigmoid, it does not change the order of rows. auto: the
    one that calibrates a `classifier` stage best on its eval_data."""


class Embedding(ModelScorerSpec):
    """Cosine similarity to the most similar row of another stage. Higher is better.

    The embedding is the mean of the model's last hidden states over the row's tokens, as in Reimers & Gurevych 2019,
    "Sentence-BERT" (https://arxiv.org/abs/1908.10084). A row that is also in the other stage has 1. Without another
    stage there is no score, but the vectors are stored for `diverse` in a select stage.
    """

    embedding: Model
    """An encoder, or a causal language model without its head."""
    reference: str | None = None
    """Stage with the reference rows; of more than 2,048 rows a sample of that size by a hash of their ids."""

    @property
    def returns_embeddings(self) -> bool:
        return self.reference is None

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        if self.reference is not None:
            yield StageRef(("reference",), self.reference, ROWS)


def _model_setting(value: str) -> dict[str, str]:
    return {"pretrained": value}


MODEL_SCORERS = (
    ScorerEntry(
        Perplexity,
        "likelihood",
        "tunery.scoring.scorers.perplexity:PerplexityScorer",
        direction="minimize",
        version=2,
        by_option=ByOption(_model_setting, required="a model's folder or hub name: `perplexity=./model`"),
        default_rule="best 80%",  # as in experiments/quickstart.yaml
    ),
    ScorerEntry(
        Ifd,
        "likelihood",
        "tunery.scoring.scorers.ifd:IfdScorer",
        direction="minimize",
        version=2,
        by_option=ByOption(_model_setting, required="a model's folder or hub name: `ifd=./model`"),
    ),
    ScorerEntry(
        Reward,
        "classification",
        "tunery.scoring.scorers.reward_score:RewardScorer",
        direction="maximize",
        version=2,
        by_option=ByOption(_model_setting, required="a reward model's folder or hub name: `reward=./model`"),
    ),
    ScorerEntry(
        Classifier,
        "classification",
        "tunery.scoring.scorers.label_probability:ClassifierScorer",
        direction="maximize",
        version=3,
        by_option=ByOption(
            _model_setting,
            required="a classifier's folder or hub name: `classifier=./model`",
            fields={"label": "good"},  # classifiers trained by tunery have the labels bad and good
        ),
        default_rule=">= 0.5",
    ),
    ScorerEntry(
        Embedding,
        "embedding",
        "tunery.scoring.scorers.embedding:embedding_scorer",
        direction="maximize",
        version=2,
        by_option='a model and reference rows: `--by "{embedding: ./model, reference: good.jsonl}"`',
    ),
)
