"""`grpo` and `rloo`, by TRL's GRPOTrainer and RLOOTrainer: sample a group of responses to each prompt. The advantage of
a response is its reward relative to the rewards of its group (GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300;
RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740).

Each worker samples the responses to its own prompts, so results depend on the number of workers. Evaluations do not:
they sample each batch from a fixed seed.
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
from tunery.training.distributed_eval import DistributedEvalMixin
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe
from tunery.training.sequences import PromptSet, read_row_sequences

METRIC_NAMES = {
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "clipped_ratio",
    "clip_ratio/region_mean": "clip_fraction",
}
"""Our names of TRL's metrics, by TRL's names."""
EVAL_BATCH_SIZE = 16
"""Rows per evaluation batch. Independent of `compute`, so that evaluations sample the same responses everywhere."""
NUM_FINAL_VALUES = 5
"""Number of logged values that the final metrics are averaged over."""


class GroupRlTask:
    """The base class of the training tasks of `grpo` and `rloo`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no prompt of `data`, or of `eval_data`, leaves tokens for a response, and TuneryError if
        the reward can't be loaded."""
        assert isinstance(job.spec, GroupRl)
        assert job.reward is not None, "the stage kind has the key `reward`"
        self._job, self._spec = job, job.spec
        # TRL 1.16 loads the reference model by the name in the policy's config. In a merged adapter, that is its base.
        loads_reference = job.spec.beta > 0 and not adapter_spec(job.spec.tuner).has_adapter
        self._policy = Policy(job, rank, requires_model_folder=loads_reference)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._eval_data = PromptSet(data), PromptSet(eval_data)
        self.examples = self._data
        device = torch.device("cuda" if job.compute.device == "gpu" else "cpu")
        # Load the reward model before the TrainingArguments are constructed: after that, ZeRO-3 would shard it.
        self._reward_fn = load_reward(job.reward, score_dtype(job.compute), device, job.spec.max_length)

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> Any:
        spec, sampling = self._spec, self._spec.sampling
        config_arguments: dict[str, Any] = {
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
        # Construct the arguments before loading the models: under ZeRO-3 they make transformers shard them.
        trainer_class, config = self._trainer_class_and_config(config_arguments)
        return trainer_class(
            **self._policy.trainer_arguments(),
            data=self._data,
            eval_data=self._eval_data,
            reward_fn=self._reward_fn,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": order}),
            callbacks=[callback],
        )

    def _trainer_class_and_config(self, config_arguments: dict[str, Any]) -> tuple[Any, Any]:
        """Return the trainer class and its TRL config."""
        raise NotImplementedError

    def save(self, trainer: Any) -> None:
        self._policy.save(trainer)

    def probe(self, num_parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.sequences.first(NUM_PROBE_CANDIDATES), num_parameters)

    def data_stats(self) -> dict[str, Any]:
        return {**self._data.facts(), "eval_rows": self._eval_data.sequences.stats.rows}

    def final_metrics(self, trainer: Any) -> dict[str, Any]:
        """Return metrics for the facts. tokens: of prompts and responses, over all responses; first_reward: of the
        first step; eval_reward: of the last evaluation; other metrics: means of the last five logged values."""
        history: list[dict[str, Any]] = trainer.state.log_history
        final_means = {}
        for name in ("reward", "kl", "response_length", "clipped_ratio"):
            values = [entry[name] for entry in history if entry.get(name) is not None][-NUM_FINAL_VALUES:]
            final_means[name] = sum(values) / len(values) if values else None
        first_reward = next((entry["reward"] for entry in history if "reward" in entry), None)
        rewards = {"first_reward": first_reward, "eval_reward": trainer.last_eval_metrics.get("eval_reward")}
        return {"tokens": int(trainer.state.num_input_tokens_seen), **final_means, **rewards}


class GrpoTask(GroupRlTask):
    """The training task of `grpo`."""

    def _trainer_class_and_config(self, config_arguments: dict[str, Any]) -> tuple[Any, Any]:
        assert isinstance(self._spec, Grpo)
        config = GRPOConfig(**config_arguments, loss_type=self._spec.loss, scale_rewards=self._spec.scale)
        return GrpoTrainer, config


class RlooTask(GroupRlTask):
    """The training task of `rloo`."""

    def _trainer_class_and_config(self, config_arguments: dict[str, Any]) -> tuple[Any, Any]:
        return RlooTrainer, RLOOConfig(**config_arguments)


class PromptIndexMixin(DistributedEvalMixin):
    """Mixin for TRL's GRPOTrainer and RLOOTrainer (1.16) on prompt indices instead of messages: models/encode.py
    tokenizes the prompts, and a RewardFn computes the rewards."""

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
        """Return eval_reward: the mean reward of one response per prompt, sampled from a fixed seed."""
        prompts = self._eval_data

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            # Neither the rows of a batch nor its seed depend on the number of workers.
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
        """Sample a response to each prompt of a batch, padded on the left. Call on all ranks: ZeRO-3 gathers the
        weights."""
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        max_length = max(map(len, prompts))
        padding = [max_length - len(ids) for ids in prompts]
        input_ids = [[tokenizer.pad_token_id] * count + ids for count, ids in zip(padding, prompts, strict=True)]
        attention_mask = [[0] * count + [1] * (max_length - count) for count in padding]
        inputs = {
            "input_ids": torch.tensor(input_ids, device=self.args.device),
            "attention_mask": torch.tensor(attention_mask, device=self.args.device),
        }
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
        ) as model:
            sequences = model.generate(**inputs, generation_config=self.generation_config)
        responses: list[str] = tokenizer.batch_decode(sequences[:, max_length:], skip_special_tokens=True)
        return responses


class GrpoTrainer(PromptIndexMixin, GRPOTrainer):  # type: ignore[misc]  # trl ships no types
    """GRPO on prompt indices."""


class RlooTrainer(PromptIndexMixin, RLOOTrainer):  # type: ignore[misc]
    """RLOO on prompt indices."""
