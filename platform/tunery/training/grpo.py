"""`grpo` and `rloo`: sample a group of responses to each prompt; the advantage of a response is its reward relative to
those of its group (Shao et al. 2024, https://arxiv.org/abs/2402.03300; Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740). By TRL's trainers.

Each worker samples responses to its share of the prompts, so results differ with the number of workers. Evaluations
sample each batch from a fixed seed and do not.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from tunery.models.precision import score_dtype
from tunery.models.reward_functions import RewardFn, load_reward
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Grpo, adapter_spec
from tunery.spec.feedback import GroupRl
from tunery.training.distributed_eval import DistributedEval
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import PromptSet, read_row_sequences

METRIC_NAMES = {
    "reward_std": "reward_std",
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "clipped_ratio",
    "clip_ratio/region_mean": "clip_fraction",
}
"""TRL's metric names, and the names that they are logged under."""
EVAL_BATCH_SIZE = 16
"""Fixed, whatever `compute` is, so that evaluations sample the same responses."""
FINAL_POINTS = 5
"""Logged values that the final metrics are averaged over."""


class GroupRlTask:
    """What the trainer adapters of `grpo` and `rloo` share."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no prompt of `data`, or of `eval_data`, leaves room for a response, and TuneryError if
        the reward can't be loaded."""
        assert isinstance(job.spec, GroupRl)
        assert job.reward is not None
        self._job, self._spec = job, job.spec
        # TRL 1.16 loads the reference by the name in the model's config, which for a merged adapter is its base.
        self._policy = Policy(job, rank, as_folder=job.spec.beta > 0 and not adapter_spec(job.spec.tuner).has_adapter)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._eval_data = PromptSet(data), PromptSet(eval_data)
        self.examples = self._data
        device = torch.device("cuda" if job.compute.device == "gpu" else "cpu")
        # Before TrainingArguments are constructed: after that, ZeRO-3 would shard the reward model.
        self._reward_fn = load_reward(job.reward, score_dtype(job.compute), device, job.spec.max_length)

    def trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> Any:
        spec, sampling = self._spec, self._spec.sampling
        # Before the models are loaded: under ZeRO-3 the arguments make transformers shard them while they load.
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
            "shuffle_dataset": False,  # already in training order (training/batches.py)
            "disable_dropout": False,  # Policy disables the model's own dropout
        }
        trainer_class, config = self._trl_trainer(settings)
        return trainer_class(
            **self._policy.arguments(),
            data=self._data,
            eval_data=self._eval_data,
            reward_fn=self._reward_fn,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": order}),
            callbacks=[callback],
        )

    def _trl_trainer(self, settings: dict[str, Any]) -> tuple[Any, Any]:
        """Return the trainer class and its TRL config with these `settings`."""
        raise NotImplementedError

    def save(self, trainer: Any) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.sequences.first(PROBED), parameters)

    def data_stats(self) -> dict[str, Any]:
        return {**self._data.facts(), "eval_rows": self._eval_data.sequences.stats.rows}

    def final_metrics(self, trainer: Any) -> dict[str, Any]:
        """tokens: of prompts and responses, over all responses; first_reward: of the first step; eval_reward: of the
        last evaluation; other metrics: means of the last five logged values."""
        history: list[dict[str, Any]] = trainer.state.log_history
        final_means = {}
        for name in ("reward", "kl", "response_length", "clipped_ratio"):
            points = [point[name] for point in history if point.get(name) is not None][-FINAL_POINTS:]
            final_means[name] = sum(points) / len(points) if points else None
        first = next((point["reward"] for point in history if "reward" in point), None)
        rewards = {"first_reward": first, "eval_reward": trainer.last_eval_metrics.get("eval_reward")}
        return {"tokens": int(trainer.state.num_input_tokens_seen), **final_means, **rewards}


class GrpoTask(GroupRlTask):
    """The trainer adapter of `grpo`."""

    def _trl_trainer(self, settings: dict[str, Any]) -> tuple[Any, Any]:
        assert isinstance(self._spec, Grpo)
        return GrpoTrainer, GRPOConfig(**settings, loss_type=self._spec.loss, scale_rewards=self._spec.scale)


class RlooTask(GroupRlTask):
    """The trainer adapter of `rloo`."""

    def _trl_trainer(self, settings: dict[str, Any]) -> tuple[Any, Any]:
        return RlooTrainer, RLOOConfig(**settings)


class PromptIndexTrainer(DistributedEval):
    """Mixin for TRL's GRPOTrainer and RLOOTrainer (1.16): prompts are passed as indices, tokenized by models/encode.py,
    and scored by a RewardFn."""

    model_wrapped: Any
    generation_config: Any
    generation_kwargs: Any
    _metrics: Any

    def __init__(self, *, data: PromptSet, eval_data: PromptSet, reward_fn: RewardFn, **arguments: Any) -> None:
        self._data, self._eval_data, self._reward_fn = data, eval_data, reward_fn

        def reward_func(prompts: list[int], completions: list[str], **kwargs: Any) -> list[float]:
            return reward_fn([data.row(index) for index in prompts], completions)

        super().__init__(reward_funcs=reward_func, **arguments)  # type: ignore[call-arg]  # of TRL's trainer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """eval_reward: mean reward of one response per prompt, sampled from a fixed seed."""
        prompts = self._eval_data

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            # The rows of a batch do not depend on the number of workers, so neither does its seed.
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed + batch[0])
                responses = self._sample_responses([prompts.ids(index) for index in batch])
            rewards = self._reward_fn([prompts.row(index) for index in batch], responses)
            return torch.tensor([[reward] for reward in rewards])

        rewards = self.evaluate_rows(prompts.lengths, 1, evaluate_batch, EVAL_BATCH_SIZE)
        return self.report_metrics({"eval_reward": rewards.mean().item()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for trl_name, name in METRIC_NAMES.items():
            if trl_name in metrics:
                metrics[name] = metrics.pop(trl_name)
        super().log(logs, start_time)  # type: ignore[misc]

    def _tokenize_prompts(self, prompts: list[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._data.ids(index) for index in prompts], None, {}

    def _sample_responses(self, prompts: list[list[int]]) -> list[str]:
        """Sample a response to each prompt. Call on all ranks: ZeRO-3 gathers the weights."""
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        max_length = max(map(len, prompts))
        padding = [max_length - len(ids) for ids in prompts]
        ids = [[tokenizer.pad_token_id] * count + ids for count, ids in zip(padding, prompts, strict=True)]
        mask = [[0] * count + [1] * (max_length - count) for count in padding]
        inputs = {
            "input_ids": torch.tensor(ids, device=self.args.device),
            "attention_mask": torch.tensor(mask, device=self.args.device),
        }
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
        ) as model:
            sequences = model.generate(**inputs, generation_config=self.generation_config)
        responses: list[str] = tokenizer.batch_decode(sequences[:, max_length:], skip_special_tokens=True)
        return responses


class GrpoTrainer(PromptIndexTrainer, GRPOTrainer):  # type: ignore[misc]  # trl ships no types
    """GRPO on prompt indices."""


class RlooTrainer(PromptIndexTrainer, RLOOTrainer):  # type: ignore[misc]
    """RLOO on prompt indices."""
