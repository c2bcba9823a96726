"""PPO as TRL had it, to compare with: trl 1.12.0, the last release with one, in an environment of its own.

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
    PEER/bin/python benchmarks/ppo_peer.py record SETTINGS.json FOLDER
    PEER/bin/python benchmarks/ppo_peer.py train SETTINGS.json RESULTS.json

    record  trains `steps` steps and keeps what the last one computed in FOLDER/step.safetensors, the weights of policy
            and value model in FOLDER/before and FOLDER/after, and what `train` writes in FOLDER/results.json. Adam's
            state is not kept: an update can be repeated exactly where `steps` is 1
    train   trains, and writes score, KL, length and seconds of every step, and mean seconds without the first step.
            `cpu_seconds` are of all cores, and tell less of what else the machine does

SETTINGS.json:

    policy    folder of a causal language model with its tokenizer; the reference model is a copy of it
    value     folder of a sequence classifier of one output
    reward    another such folder, or {"count": ID}: an answer's score is how often it has that token
    prompts   lists of token ids
    steps     rollouts, each with its updates
    seed, threads
    dtype     of all models; "float32" where not given
    ppo       fields of trl's PPOConfig: response_length, stop_token, temperature, kl_coef, num_ppo_epochs,
              num_mini_batches, per_device_train_batch_size, learning_rate, ..

step.safetensors has local variables of `PPOTrainer.train` under their own names (STEP below), and of its micro batches
in the order they came (MICRO below) as `micro.0.new_logprobs`, `micro.1.new_logprobs`, ..

TRL's optimizer steps after `gradient_accumulation_steps` micro batches, whatever `num_mini_batches` says, and after
each one while the last batch of the prompts is in use. Minibatches are a step each where `gradient_accumulation_steps`
is 1, as it is by default, and `per_device_train_batch_size` the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

# fmt: off
STEP = (
    "queries", "query_responses", "responses", "sequence_lengths", "padding_mask", "padding_mask_p1",
    "logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns",
    "approxkl_stats", "pg_clipfrac_stats", "pg_loss_stats", "vf_loss_stats", "vf_clipfrac_stats", "entropy_stats",
    "ratio_stats",
)
# fmt: on
MICRO = ("micro_batch_inds", "new_logprobs", "vpred", "ratio", "pg_loss", "vf_loss", "loss")


class Count(torch.nn.Module):
    """Rates without weights. TRL gives the last hidden states of a reward model's backbone to its `score`, and takes
    what that says at an answer's last token: here how many of the tokens until there were `token`."""

    base_model_prefix = "backbone"

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token
        self.prompt_length = 0

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        found = input_ids == self.token
        found[:, : self.prompt_length] = False
        return SimpleNamespace(hidden_states=[found.cumsum(1).float().unsqueeze(-1)])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Peer(PPOTrainer):
    """TRL's trainer with its loop as it is. What the loop calls is wrapped, and looks at the loop's variables."""

    def __init__(self, settings: dict[str, Any], scratch: str, keep: Path | None) -> None:
        quiet = {"num_sample_generations": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args = PPOConfig(output_dir=scratch, seed=settings["seed"], bf16=False, **quiet, **settings["ppo"])
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if len(settings["prompts"]) < batch:
            raise ValueError(
                f"{len(settings['prompts'])} prompts do not fill a batch of {batch}: TRL would wait for ever"
            )
        args.total_episodes = settings["steps"] * batch
        dtype = getattr(torch, settings.get("dtype", "float32"))
        reward = settings["reward"]
        super().__init__(
            args=args,
            processing_class=AutoTokenizer.from_pretrained(settings["policy"], padding_side="left"),
            model=AutoModelForCausalLM.from_pretrained(settings["policy"], dtype=dtype),
            ref_model=None,
            reward_model=Count(reward["count"]) if isinstance(reward, dict) else classifier(reward, dtype),
            value_model=classifier(settings["value"], dtype),
            train_dataset=Dataset.from_dict({"input_ids": settings["prompts"]}),
        )
        self.keep = keep
        self.finished: list[dict[str, Any]] = []
        self.micro: list[dict[str, torch.Tensor]] = []
        self.now: dict[str, float] = {"optimizer_steps": 0}
        ppo_trainer.batch_generation = self.generating(ppo_trainer.batch_generation)
        ppo_trainer.masked_whiten = self.whitening(ppo_trainer.masked_whiten)
        self.accelerator.backward = self.going_back(self.accelerator.backward)

    def train(self) -> None:
        self.began, self.cpu_began = self.clock(), time.process_time()
        super().train()

    def generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def generate(model: torch.nn.Module, queries: torch.Tensor, *rest: Any) -> Any:
            if isinstance(self.reward_model, Count):
                self.reward_model.prompt_length = queries.shape[1]
            begin = self.clock()
            made = function(model, queries, *rest)
            self.generated = self.clock()
            self.now["generate_seconds"] = self.generated - begin
            return made

        return generate

    def whitening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # The last call before the updates is the one for advantages, with the mask of the answers' tokens.
        def whiten(values: torch.Tensor, mask: torch.Tensor, **rest: Any) -> torch.Tensor:
            made = function(values, mask, **rest)
            self.rated = self.clock()
            self.now["rate_seconds"] = self.rated - self.generated
            self.now["length"] = mask.sum(1).float().mean().item()
            return made

        return whiten

    def going_back(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: torch.Tensor) -> None:
            kept = self.keep is not None and len(self.finished) == self.args.num_total_batches - 1
            if kept and not self.micro:
                self.save_weights("before")
            function(loss)
            self.now["optimizer_steps"] += self.accelerator.sync_gradients
            if kept:
                variables = sys._getframe(1).f_locals
                self.micro.append({name: torch.as_tensor(variables[name]).detach().clone() for name in MICRO})
                gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
                # Of all that was summed up until here.
                self.micro[-1]["gradient_norm"] = torch.nn.utils.get_total_norm(gradients)
                self.micro[-1]["optimizer_stepped"] = torch.tensor(self.accelerator.sync_gradients)

        return backward

    def log(self, logs: dict[str, float], *_: Any) -> None:
        ended = self.clock()
        seconds = {
            "seconds": ended - self.began,
            "cpu_seconds": time.process_time() - self.cpu_began,
            "update_seconds": ended - self.rated,
        }
        told = {"score": logs["objective/scores"], "kl": logs["objective/kl"]}
        self.finished.append({**told, **self.now, **seconds, "trl": logs})
        if self.micro:
            # Only here: the variables, once looked at, keep their tensors alive for another step.
            self.save_step(sys._getframe(1).f_locals)
        self.now = {"optimizer_steps": 0}
        self.began, self.cpu_began = self.clock(), time.process_time()

    def save_step(self, variables: dict[str, Any]) -> None:
        assert self.keep is not None
        tensors = {name: variables[name] for name in STEP}
        for at, micro in enumerate(self.micro):
            tensors |= {f"micro.{at}.{name}": value for name, value in micro.items()}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, self.keep / "step.safetensors")
        self.save_weights("after")

    def save_weights(self, when: str) -> None:
        assert self.keep is not None
        self.model.policy.save_pretrained(self.keep / when / "policy")
        self.model.value_model.save_pretrained(self.keep / when / "value")

    def clock(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()


def classifier(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)


def results(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The first step pays for what is done once, and is not in the means."""
    times = ("seconds", "cpu_seconds", "generate_seconds", "rate_seconds", "update_seconds")
    means = {name: statistics.mean(step[name] for step in steps[1:] or steps) for name in times}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"mean": means, "peak_bytes": peak, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "train"))
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())
    keep = None
    if arguments.command == "record":
        keep = arguments.out
        keep.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings["threads"])
    # TRL seeds torch alone, and draws minibatches with numpy.
    set_seed(settings["seed"])
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(settings, scratch, keep)
        peer.train()
    file = keep / "results.json" if keep is not None else arguments.out
    file.write_text(json.dumps(results(peer.finished), indent=1) + "\n")


if __name__ == "__main__":
    main()
