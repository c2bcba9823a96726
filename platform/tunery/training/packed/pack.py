"""A pack: a frozen base model on a device, its members, and optimizer steps of all members at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from tunery.errors import StageError
from tunery.models.batching import token_budget_batches
from tunery.models.load import Source, load_model, load_tokenizer
from tunery.models.packed_attention import install_varlen_attention
from tunery.models.preview import COLUMNS, stage_preview
from tunery.models.row_encodings import encoding_of
from tunery.models.token_log_probs import TokenLogProbs
from tunery.spec import adapter_spec, settings_of
from tunery.training.job import Job, Report, rows_of
from tunery.training.packed.adamw import StepHyperparams
from tunery.training.packed.member import Member, group_by_eval_data
from tunery.training.packed.microbatches import microbatches, padded_microbatches
from tunery.training.packed.packed_batch import PackedBatch, build_packed_batch
from tunery.training.packed.stack import Stack, StackedLinear, install
from tunery.training.packed.weightless_base import with_adapter
from tunery.training.sequences import InMemorySequences, TrainingSequences, check_sequences, open_sequences

T = TypeVar("T")
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens per micro batch, including padding. Few on a CPU, so that activations stay in its caches."""
FIXED_COST_TOKENS = {"cpu": 100, "cuda": 4096}
"""Constant cost of a forward and backward pass (on a GPU: kernel launches), as the number of tokens that take as
long."""
EVAL_BATCH_FACTOR = 4
"""Evaluation batches have this many times the tokens of a micro batch, since they keep no activations."""
MIN_BUDGET = 512
"""Tokens per micro batch below which a GPU out-of-memory error is raised instead of retried."""
ADAPTER_STATE_BYTES = 5 * 4
"""Bytes per adapter parameter in a stack: weight, gradient and two moments in float32, and the copy that the layers use
(in bf16 with its gradient)."""


class Pack:
    """Trains several LoRA adapters on one copy of their base model."""

    def __init__(
        self,
        source: Source,
        device: str,
        dtype: str,
        gradient_checkpointing: bool = False,
        budget: int | None = None,
        free_memory: Callable[[torch.device], float] | None = None,
    ) -> None:
        """source: the base model; device: "cpu" or "gpu"; dtype: "fp32" or "bf16"; budget: tokens per micro batch,
        including padding; free_memory: returns the free bytes of a device."""
        self._dtype = dtype
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        model: Any = load_model(source, torch.bfloat16 if dtype == "bf16" else torch.float32)
        model.config.use_cache = False
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = model.to(self._device).requires_grad_(False)
        self._num_parameters = sum(weight.numel() for weight in model.parameters())
        self._tokenizer: Any = load_tokenizer(source)
        self._log_probs = TokenLogProbs(model)
        self._attention = install_varlen_attention(self._model)
        self._budget = budget or MICRO_BATCH_TOKENS[self._device.type]
        self._free_memory = free_memory or free_bytes
        self._layers: dict[str, StackedLinear] = {}
        self._stack = Stack({}, [], self._device, model.dtype)
        self._sequences: dict[Any, tuple[TrainingSequences, TrainingSequences]] = {}
        self.members: list[Member] = []
        model.train()

    def join(self, job: Job, report: Report) -> Member | None:
        """Add a training to the pack. Return None if the device has no memory for its adapter and AdamW state. Raises
        StageError if too few rows are usable, or if its adapter can't be trained in a pack."""
        spec: Any = job.spec
        key = (job.data, job.eval_data, encoding_of(spec))
        if key not in self._sequences:
            self._sequences[key] = open_sequences(job, self._tokenizer)
        check_sequences(job, *self._sequences[key])
        peft_model = with_adapter(self._model, spec.tuner, job.seed)
        member = Member(job, *self._sequences[key], self._tokenizer, peft_model, self._num_parameters, report)
        self._check_adapter(member, peft_model)
        member.loop.emit("preview", **stage_preview(spec, rows_of(job.data, COLUMNS), self._tokenizer))
        if self.members and not self._has_memory([*self.members, member]):
            return None
        self._layers |= install(self._model, [name for name in member.adapter.weights if name not in self._layers])
        self._restack([*self.members, member])
        member.loop.flush_reports()
        return member

    def _check_adapter(self, member: Member, peft_model: Any) -> None:
        """Raise StageError if the adapter includes the output head, or modules other than linear layers."""
        tuner, head = member.spec.tuner, self._model.get_output_embeddings()
        head_names = {name for name, module in self._model.named_modules() if module is head}
        num_stacked = sum(matrix.numel() for pair in member.adapter.weights.values() for matrix in pair)
        num_trainable = sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)
        if head_names & member.adapter.weights.keys() or num_stacked != num_trainable:
            raise StageError(
                member.job.stage,
                "an adapter on the head or on an embedding can't be trained in a pack",
                cause=f"target_modules: {list(adapter_spec(tuner).target_modules(settings_of(tuner)))}",
                remedy="remove them from target_modules, or set `compute: {max_packed_trials: 1}`",
            )

    def _has_memory(self, members: Sequence[Member]) -> bool:
        """Whether the free memory suffices for a new stack of all members, beside the old one, and for the activations
        of a step, estimated by their peak so far. If a step needs more, `_retry_with_smaller_budget` handles it."""
        largest = max(
            sum(matrix.numel() for pair in member.adapter.weights.values() for matrix in pair) for member in members
        )
        stack_bytes = ADAPTER_STATE_BYTES * largest * len(members)
        return stack_bytes + _activation_bytes(self._device) < self._free_memory(self._device)

    def leave(self, member: Member) -> None:
        """Remove a member and write its checkpoint, so that it can resume in this or another pack."""
        self._restack([other for other in self.members if other is not member])
        if not member.ended and not member.loop.is_saved and not member.loop.guard.last_was_skipped:
            member.attempt(member.save)

    def step(self) -> None:
        """Take one optimizer step of every member, then log, evaluate, save and finish members as due. Remove members
        that ended or failed (`error`)."""
        members = self.members
        batches = [member.next_batch() for member in members]
        losses = self._retry_with_smaller_budget(lambda: self._backward(members, [batch.indices for batch in batches]))
        grad_norms = self._stack.step(
            StepHyperparams(
                *(
                    torch.tensor(values, dtype=torch.float64)
                    for values in (
                        [batch.learning_rate for batch in batches],
                        [batch.weight_decay for batch in batches],
                        [member.spec.max_grad_norm for member in members],
                        [batch.step for batch in batches],
                    )
                )
            )
        )
        for member, loss, grad_norm in zip(members, losses, grad_norms, strict=True):
            member.attempt(partial(member.record_step, loss, grad_norm))
        self._retry_with_smaller_budget(
            lambda: self._evaluate([member for member in members if member.loop.should_evaluate])
        )
        to_save = [member for member in members if member.loop.should_save and not member.ended]
        if to_save:
            self._stack.sync_to_adapters()
        for member in to_save:
            member.attempt(member.save)
        for member in members:
            member.loop.flush_reports()
        ended = [member for member in members if member.ended]
        probe_losses = {
            member.job.trial: self._probe_losses(index, member) for index, member in enumerate(members) if member.ended
        }
        if ended:
            self._restack([member for member in members if not member.ended])
        for member in ended:
            member.attempt(partial(member.finish, probe_losses[member.job.trial], self._runtime_stats()))

    def _retry_with_smaller_budget(self, function: Callable[[], T]) -> T:
        """Call `function`. On a GPU out-of-memory error halve the budget of this and all later micro batches, and call
        it again."""
        while True:
            try:
                return function()
            except torch.OutOfMemoryError:
                if self._budget < MIN_BUDGET:
                    raise
                self._budget //= 2
                torch.cuda.empty_cache()

    def _restack(self, members: Sequence[Member]) -> None:
        """Replace the stack and `members` by those of `members`."""
        self._stack.sync_to_adapters()
        self._stack = Stack(self._layers, [member.adapter for member in members], self._device, self._model.dtype)
        self.members = list(members)

    def _backward(self, members: Sequence[Member], batches: Sequence[list[int]]) -> list[float]:
        """Compute the gradients of a step, in the stack. Return the loss of each member, the mean over its loss tokens.
        `batches`: indices of the sequences of each member."""
        self._stack.zero_grad()
        counts = [
            sum(member.data.loss_tokens(index) for index in batch)
            for member, batch in zip(members, batches, strict=True)
        ]
        sums_k = torch.zeros(len(members), device=self._device, dtype=torch.float64)
        weights_k = torch.tensor([1 / max(1, count) for count in counts], device=self._device)
        lengths = [
            [int(member.data.lengths[index]) for index in batch] for member, batch in zip(members, batches, strict=True)
        ]
        micro_batches = (
            padded_microbatches(lengths, self._budget)
            if self._attention is None
            else microbatches(lengths, self._budget, FIXED_COST_TOKENS[self._device.type])
        )
        for micro_batch in micro_batches:
            selection = [
                (members[member].data, [batches[member][row] for row in rows])
                for member, rows in zip(micro_batch.members, micro_batch.rows, strict=True)
            ]
            self._stack.activate(micro_batch.members)
            packed_batch = build_packed_batch(selection, self._attention is not None)
            nll_n, member_indices_n = self._nll(packed_batch, micro_batch.members)
            (nll_n * weights_k[member_indices_n]).sum().backward()  # type: ignore[no-untyped-call]
            self._stack.accumulate_grads()
            sums_k.index_add_(0, member_indices_n, nll_n.detach().double())
        return [total / max(1, count) for total, count in zip(sums_k.tolist(), counts, strict=True)]

    @torch.no_grad()
    def _evaluate(self, members: Sequence[Member]) -> None:
        """Compute the evaluation losses of `members`; those with the same evaluation data share batches."""
        self._model.eval()
        losses: list[tuple[Member, float]] = []
        stack_index = {id(member): index for index, member in enumerate(self.members)}
        for group in group_by_eval_data(members).values():
            eval_data = group[0].eval_data
            sums_k = torch.zeros(len(group), device=self._device, dtype=torch.float64)
            active = [stack_index[id(member)] for member in group]
            for batch in token_budget_batches(
                eval_data.lengths.tolist(), max(1, EVAL_BATCH_FACTOR * self._budget // len(group))
            ):
                packed_batch = build_packed_batch([(eval_data, batch)] * len(group), self._attention is not None)
                self._stack.activate(active)
                nll_n, member_indices_n = self._nll(packed_batch, range(len(group)))
                sums_k.index_add_(0, member_indices_n, nll_n.double())
            count = sum(eval_data.loss_tokens(row) for row in range(len(eval_data)))
            losses += [(member, total / max(1, count)) for member, total in zip(group, sums_k.tolist(), strict=True)]
        for member, loss in losses:
            member.attempt(partial(member.record_evaluation, loss))
        self._model.train()

    @torch.no_grad()
    def _probe_losses(self, index: int, member: Member) -> list[float]:
        """Return the losses of the member's probe (training/reload_check.py). `index`: of the member in the stack."""
        self._model.eval()
        self._stack.activate([index])
        losses = []
        for ids in member.probe.sequences:
            batch = build_packed_batch([(InMemorySequences([ids]), [0])], self._attention is not None)
            losses.append(float(self._nll(batch, [0])[0].mean()))
        self._model.train()
        return losses

    def _nll(self, batch: PackedBatch, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -log p of each loss token in nats, (n,) float32, and the member of each, (n,) int64.

        members: the numbers to return for the members of the batch. Causal attention needs no attention mask for
        padding on the right.
        """
        inputs = {"input_ids": batch.ids_bt.to(self._device)}
        if self._attention is not None and batch.layout is not None:
            self._attention.set_layout(batch.layout, self._device, self._model.dtype)
            inputs["position_ids"] = batch.layout.positions_bt().to(self._device)
        state_indices_n, targets_n = batch.state_indices_n.to(self._device), batch.targets_n.to(self._device)
        member_indices_n = torch.tensor(members)[batch.member_indices_n].to(self._device)
        log_probs_n, _ = self._log_probs(inputs, state_indices_n, targets_n)
        return -log_probs_n, member_indices_n

    def _runtime_stats(self) -> dict[str, Any]:
        gpu = self._device.type == "cuda"
        return {
            "dtype": self._dtype,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "packed_with": len(self.members),
        }


def free_bytes(device: torch.device) -> float:
    """Return the free GPU memory in bytes, including unused memory in torch's cache; infinity on a CPU, where adapters
    are small beside the base."""
    if device.type == "cpu":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)


def _activation_bytes(device: torch.device) -> int:
    """Return the peak memory of activations so far, in bytes; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
