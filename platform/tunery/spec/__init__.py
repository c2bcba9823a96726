"""The experiment's schema and loader: pydantic and YAML, no Ray, no torch (a test holds that)."""

from tunery.spec.experiment import Compute, Experiment, Tracking, Wandb
from tunery.spec.load import load, parse
from tunery.spec.reference import AUTO, Pretrained, Scratch
from tunery.spec.scorers import Ifd, Perplexity, Scorer, ScorerSpec
from tunery.spec.search import Dimension, Search
from tunery.spec.stages import (
    RANDOM,
    Dataset,
    Evaluate,
    Keep,
    Lora,
    Pretrain,
    Quota,
    Review,
    Score,
    Select,
    Sft,
    Stage,
    Training,
    Tuner,
)

__all__ = [
    "AUTO",
    "RANDOM",
    "Compute",
    "Dataset",
    "Dimension",
    "Evaluate",
    "Experiment",
    "Ifd",
    "Keep",
    "Lora",
    "Perplexity",
    "Pretrain",
    "Pretrained",
    "Quota",
    "Review",
    "Score",
    "Scorer",
    "ScorerSpec",
    "Scratch",
    "Search",
    "Select",
    "Sft",
    "Stage",
    "Tracking",
    "Training",
    "Tuner",
    "Wandb",
    "load",
    "parse",
]
