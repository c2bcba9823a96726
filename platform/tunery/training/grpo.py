"""`grpo` and `rloo`: a group of answers is drawn to each prompt, and an answer counts by how far its reward is above
those of the others (Shao et al. 2024, https://arxiv.org/abs/2402.03300; Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740), by TRL's trainers.

Answers are drawn by each worker for its share of the prompts, so another number of workers draws others: trainings with
other `compute` are alike, not the same. Evaluations draw from a fixed seed, batch by batch, whoever draws.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from tunery.models.actor_pool import score_dtype
from tunery.models.reward_functions import RewardFn, load_reward
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Grpo, Rloo
from tunery.training.distributed_eval import DistributedEval
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import PromptSet, read_row_sequences

METRIC_NAMES = {
    "reward_std": "reward_deviation",
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "cut_off",
    "clip_ratio/region_mean": "clip_fraction",
}
"""TRL's names of what it measures, and ours."""
EVAL_BATCH_SIZE = 16
"""Answers of an evaluation: whatever `compute` says, so that the same are drawn."""
LAST = 5
"""Points of a curve whose mean is told of its end."""


class GrpoTask:
    """The recipe of both."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no row has a prompt that leaves room for an answer, or none of eval_data, and
        TuneryError when the reward can't be loaded."""
        assert isinstance(job.spec, Grpo | Rloo)
        assert job.reward is not None
        self._job, self._spec = job, job.spec
        # TRL 1.16 loads the reference by the name in the model's config: of a merged adapter that is its base.
        self._policy = Policy(job, rank, as_folder=job.spec.beta > 0 and job.spec.tuner == "full")
        data, evaluated = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._evaluated = PromptSet(data), PromptSet(evaluated)
        self.examples = self._data
        device = torch.device("cuda" if job.compute.device == "gpu" else "cpu")
        # Before the training's arguments are made: after that ZeRO-3 would load it in pieces.
        self._reward = load_reward(job.reward, score_dtype(job.compute), device, job.spec.max_length)

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> Any:
        spec, sampling = self._spec, self._spec.sampling
        # Under ZeRO-3 these make transformers shard the models while they load.
        settings: dict[str, Any] = {
            **arguments,
            "num_generations": spec.group_size,
            "num_iterations": spec.iterations,
            "beta": spec.beta,
            "epsilon": spec.clip,
            "max_completion_length": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "generation_kwargs": {"min_new_tokens": sampling.min_new_tokens},
            "shuffle_dataset": False,  # it comes in the order in which it is to be seen (training/batches.py)
            "disable_dropout": False,  # the model's own is off (training/policy.py)
        }
        kind: Any = RlooTrainer
        config: Any = RLOOConfig(**settings) if isinstance(spec, Rloo) else None
        if isinstance(spec, Grpo):
            kind, config = GrpoTrainer, GRPOConfig(**settings, loss_type=spec.loss, scale_rewards=spec.scale)
        return kind(
            **self._policy.arguments(),
            data=self._data,
            evaluated=self._evaluated,
            reward=self._reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": order}),
            callbacks=[steps],
        )

    def save(self, trainer: Any) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.sequences.first(PROBED), parameters)

    def counted(self) -> dict[str, Any]:
        return {**self._data.facts(), "eval_rows": self._evaluated.sequences.stats.rows}

    def found(self, trainer: Any) -> dict[str, Any]:
        """tokens: of prompts and answers, over all answers. first_reward: of the first step. Of the last five points of
        each curve the mean; eval_reward at the end."""
        history: list[dict[str, Any]] = trainer.state.log_history
        ends = {}
        for name in ("reward", "kl", "response_length", "cut_off"):
            points = [point[name] for point in history if point.get(name) is not None][-LAST:]
            ends[name] = sum(points) / len(points) if points else None
        first = next((point["reward"] for point in history if "reward" in point), None)
        told = {"first_reward": first, "eval_reward": trainer.metrics_at_end.get("eval_reward")}
        return {"tokens": int(trainer.state.num_input_tokens_seen), **ends, **told}


class OnPrompts(DistributedEval):
    """Beside TRL's GRPOTrainer and RLOOTrainer (1.16): prompts are handed around by their number, their tokens are
    those of models/encode.py, the rewards ours."""

    model_wrapped: Any
    generation_config: Any
    generation_kwargs: Any
    _metrics: Any

    def __init__(self, *, data: PromptSet, evaluated: PromptSet, reward: RewardFn, **arguments: Any) -> None:
        self._data, self._evaluated, self._reward = data, evaluated, reward

        def rate(prompts: list[int], completions: list[str], **others: Any) -> list[float]:
            return reward([data.row(number) for number in prompts], completions)

        super().__init__(reward_funcs=rate, **arguments)  # type: ignore[call-arg]  # of TRL's trainer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """eval_reward: the mean over one answer to each prompt, drawn from a fixed seed."""
        prompts = self._evaluated

        def measure(batch: list[int]) -> torch.Tensor:
            # The rows of a batch don't depend on the number of workers: neither does its seed.
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed + batch[0])
                answers = self._draw([prompts.ids(number) for number in batch])
            return torch.tensor([[value] for value in self._reward([prompts.row(n) for n in batch], answers)])

        rewards = self.measured(prompts.lengths, 1, measure, EVAL_BATCH_SIZE)
        return self.told({"eval_reward": rewards.mean().item()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for theirs, ours in METRIC_NAMES.items():
            if theirs in metrics:
                metrics[ours] = metrics.pop(theirs)
        super().log(logs, start_time)  # type: ignore[misc]

    def _tokenize_prompts(self, prompts: list[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._data.ids(number) for number in prompts], None, {}

    def _draw(self, prompts: list[list[int]]) -> list[str]:
        """Of all ranks together: ZeRO-3 gathers the weights."""
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        longest = max(map(len, prompts))
        gaps = [longest - len(ids) for ids in prompts]
        ids = [[tokenizer.pad_token_id] * gap + ids for gap, ids in zip(gaps, prompts, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        inputs = {
            "input_ids": torch.tensor(ids, device=self.args.device),
            "attention_mask": torch.tensor(mask, device=self.args.device),
        }
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
        ) as model:
            drawn = model.generate(**inputs, generation_config=self.generation_config)
        answers: list[str] = tokenizer.batch_decode(drawn[:, longest:], skip_special_tokens=True)
        return answers


class GrpoTrainer(OnPrompts, GRPOTrainer):  # type: ignore[misc]  # trl ships no types
    """GRPO on our prompts."""


class RlooTrainer(OnPrompts, RLOOTrainer):  # type: ignore[misc]
    """RLOO on our prompts."""
