"""The experiment's schema and loader: pydantic and YAML, no Ray, no torch (a test holds that)."""

from tunery.spec.experiment import Compute, Experiment, Tracking, Wandb
from tunery.spec.load import load, parse
from tunery.spec.search import Dimension, Search
from tunery.spec.stages import (
    AUTO,
    Dataset,
    Evaluate,
    Keep,
    Lora,
    Perplexity,
    Pretrain,
    Pretrained,
    Review,
    Score,
    Scorer,
    Scratch,
    Select,
    Sft,
    Stage,
    Training,
    Tuner,
)

__all__ = [
    "AUTO",
    "Compute",
    "Dataset",
    "Dimension",
    "Evaluate",
    "Experiment",
    "Keep",
    "Lora",
    "Perplexity",
    "Pretrain",
    "Pretrained",
    "Review",
    "Score",
    "Scorer",
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
