"""A pack: the frozen base on a device, its members, and one optimizer step of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn.functional import cross_entropy

from tunery.errors import StageError
from tunery.models.batching import token_budget_batches
from tunery.models.encode import encoding_of
from tunery.models.fused_nll import fused_nll
from tunery.models.load import Source, load_model, load_tokenizer
from tunery.models.nll import head_is_plain
from tunery.models.packed_attention import install_varlen_attention
from tunery.models.preview import COLUMNS, stage_preview
from tunery.spec import LoraTuner
from tunery.training.job import Job, Report, rows_of
from tunery.training.packed.adamw import Rates
from tunery.training.packed.member import Member, same_rows
from tunery.training.packed.microbatches import microbatches, padded_microbatches
from tunery.training.packed.packed_batch import PackedBatch, batch_of
from tunery.training.packed.stack import Stack, StackedLinear, install
from tunery.training.packed.weightless_base import with_adapter
from tunery.training.sequences import InMemorySequences, TrainingSequences, check_sequences, open_sequences

T = TypeVar("T")
BLOCK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of a block. On a CPU so few that its activations stay in the caches."""
FIXED_TOKENS = {"cpu": 100, "cuda": 4096}
"""Tokens that take as long as what a forward and a backward pass take whatever their size: on a GPU, to launch them."""
MEASURED = 4
"""Times as many tokens are in a block of an evaluation, which keeps no activations."""
SMALLEST_BUDGET = 512
"""Padded tokens: with no memory for so few, a pack is no help."""


class Pack:
    """`budget`: padded tokens in one forward pass of a training. `free`: bytes of the device that are free."""

    def __init__(
        self,
        source: Source,
        device: str,
        dtype: str,
        gradient_checkpointing: bool = False,
        budget: int | None = None,
        free: Callable[[torch.device], float] | None = None,
    ) -> None:
        self._dtype = dtype
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        model: Any = load_model(source, torch.bfloat16 if dtype == "bf16" else torch.float32)
        model.config.use_cache = False
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = model.to(self._device).requires_grad_(False)
        self._parameters = sum(weight.numel() for weight in model.parameters())
        self._tokenizer: Any = load_tokenizer(source)
        self._plain_head = head_is_plain(model)
        self._attention = install_varlen_attention(self._model)
        self._budget = budget or BLOCK_TOKENS[self._device.type]
        self._free = free or free_bytes
        self._layers: dict[str, StackedLinear] = {}
        self._stack = Stack({}, [], self._device, model.dtype)
        self._read: dict[Any, tuple[TrainingSequences, TrainingSequences]] = {}
        self.members: list[Member] = []
        self._reports: dict[str, Report] = {}
        model.train()

    def join(self, job: Job, report: Report) -> Member | None:
        """None where its adapter and what AdamW remembers of it find no room beside those of the others. Raises
        StageError when there is nothing to learn from."""
        spec: Any = job.spec
        rows = (job.rows, job.eval_rows, encoding_of(spec))
        if rows not in self._read:
            self._read[rows] = open_sequences(job, self._tokenizer)
        check_sequences(job, *self._read[rows])
        peft_model = with_adapter(self._model, spec.tuner.lora, job.seed)
        member = Member(job, *self._read[rows], self._tokenizer, peft_model, self._parameters)
        self._check(member, peft_model)
        member.emit("preview", **stage_preview(spec, rows_of(job.rows, COLUMNS), self._tokenizer))
        if self.members and not self._has_room([*self.members, member]):
            return None
        self._layers |= install(self._model, [name for name in member.adapter.weights if name not in self._layers])
        self._reports[job.trial] = report
        self._restack([*self.members, member])
        member.report(report)
        return member

    def _check(self, member: Member, peft_model: Any) -> None:
        head = self._model.get_output_embeddings()
        names = {name for name, module in self._model.named_modules() if module is head}
        stacked = sum(matrix.numel() for pair in member.adapter.weights.values() for matrix in pair)
        trained = sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)
        assert isinstance(member.spec.tuner, LoraTuner), "packs are of these"
        if names & member.adapter.weights.keys() or stacked != trained:
            raise StageError(
                member.job.stage,
                "an adapter on the head or on an embedding can't be trained in a pack",
                cause=f"target_modules: {list(member.spec.tuner.lora.target_modules)}",
                remedy="leave them out, or set `compute: {max_packed_trials: 1}`",
            )

    def _has_room(self, members: Sequence[Member]) -> bool:
        """For a stack of all of them while the one before it is still there, and a step's activations: as many as its
        last steps took. Where a first step takes more than there is, its blocks are made smaller."""
        largest = max(sum(matrix.numel() for pair in m.adapter.weights.values() for matrix in pair) for m in members)
        return STATE_BYTES * largest * len(members) + _activation_bytes(self._device) < self._free(self._device)

    def leave(self, member: Member) -> None:
        """Its checkpoint lets it go on later, here or in another pack."""
        self._restack([other for other in self.members if other is not member])
        if not member.ended and not member.is_saved and not member.guard.last_was_skipped:
            member.attempt(member.save)

    def step(self) -> None:
        """One optimizer step of every member, and whatever is due after it. Those that ended, or failed (`error`), have
        left then."""
        members = self.members
        steps = [member.next() for member in members]
        losses = self._in_smaller_blocks(lambda: self._backward(members, [step.rows for step in steps]))
        norms = self._stack.step(
            Rates(
                *(
                    torch.tensor(values, dtype=torch.float64)
                    for values in (
                        [step.learning_rate for step in steps],
                        [step.weight_decay for step in steps],
                        [member.spec.max_grad_norm for member in members],
                        [step.number for step in steps],
                    )
                )
            )
        )
        for member, loss, norm in zip(members, losses, norms, strict=True):
            member.attempt(partial(member.took, loss, norm))
        self._in_smaller_blocks(lambda: self._evaluate([member for member in members if member.evaluates_now]))
        saving = [member for member in members if member.saves_now]
        if saving:
            self._stack.read_back()
        for member in saving:
            member.attempt(member.save)
        for member in members:
            member.report(self._reports[member.job.trial])
        ended = [member for member in members if member.ended]
        losses_of = {
            member.job.trial: self._losses(place, member) for place, member in enumerate(members) if member.ended
        }
        if ended:
            self._restack([member for member in members if not member.ended])
        for member in ended:
            member.attempt(partial(member.finish, losses_of[member.job.trial], self._measured()))

    def _in_smaller_blocks(self, work: Callable[[], T]) -> T:
        """`work`, once more from its beginning with half the tokens in a forward pass where a GPU's memory is too
        small for as many; that stays so."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self._budget < SMALLEST_BUDGET:
                    raise
                self._budget //= 2
                torch.cuda.empty_cache()

    def _restack(self, members: Sequence[Member]) -> None:
        self._stack.read_back()
        self._stack = Stack(self._layers, [member.adapter for member in members], self._device, self._model.dtype)
        self.members = list(members)

    def _backward(self, members: Sequence[Member], rows: Sequence[list[int]]) -> list[float]:
        """Gradients into the stack; returns each member's loss, the mean over its counted tokens."""
        self._stack.clear()
        counts = [sum(member.data.loss_tokens(row) for row in own) for member, own in zip(members, rows, strict=True)]
        sums_k = torch.zeros(len(members), device=self._device, dtype=torch.float64)
        weights_k = torch.tensor([1 / max(1, count) for count in counts], device=self._device)
        lengths = [[int(member.data.lengths[row]) for row in own] for member, own in zip(members, rows, strict=True)]
        cut = (
            padded_microbatches(lengths, self._budget)
            if self._attention is None
            else microbatches(lengths, self._budget, FIXED_TOKENS[self._device.type])
        )
        for block in cut:
            chosen = [
                (members[index].data, [rows[index][place] for place in places])
                for index, places in zip(block.members, block.rows, strict=True)
            ]
            self._stack.activate(block.members)
            nll_n, owners_n = self._nll(batch_of(chosen, self._attention is not None), block.members)
            (nll_n * weights_k[owners_n]).sum().backward()  # type: ignore[no-untyped-call]
            self._stack.collect()
            sums_k.index_add_(0, owners_n, nll_n.detach().double())
        return [total / max(1, count) for total, count in zip(sums_k.tolist(), counts, strict=True)]

    @torch.no_grad()
    def _evaluate(self, due: Sequence[Member]) -> None:
        """Members that are measured on the same rows are so together."""
        self._model.eval()
        losses: list[tuple[Member, float]] = []
        places = {id(member): place for place, member in enumerate(self.members)}
        for group in same_rows(due).values():
            measured = group[0].measured
            sums_k = torch.zeros(len(group), device=self._device, dtype=torch.float64)
            members = [places[id(member)] for member in group]
            for batch in token_budget_batches(measured.lengths.tolist(), max(1, MEASURED * self._budget // len(group))):
                together = batch_of([(measured, batch)] * len(group), self._attention is not None)
                self._stack.activate(members)
                nll_n, owners_n = self._nll(together, range(len(group)))
                sums_k.index_add_(0, owners_n, nll_n.double())
            count = sum(measured.loss_tokens(row) for row in range(len(measured)))
            losses += [(member, total / max(1, count)) for member, total in zip(group, sums_k.tolist(), strict=True)]
        for member, loss in losses:
            member.attempt(partial(member.evaluated, loss))
        self._model.train()

    @torch.no_grad()
    def _losses(self, place: int, member: Member) -> list[float]:
        """Of the sequences that its saved adapter is checked by (training/reload_check.py); `place`: in the stack."""
        self._model.eval()
        self._stack.activate([place])
        losses = []
        for ids in member.probe.sequences:
            one = InMemorySequences([ids])
            losses.append(float(self._nll(batch_of([(one, [0])], self._attention is not None), [0])[0].mean()))
        self._model.train()
        return losses

    def _nll(self, batch: PackedBatch, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """-log p in nats of each counted token, (n,) float32, and whose it is, (n,). `members`: of the batch.

        Without a mask: under causal attention a token never sees the padding behind it.
        """
        inputs = {"input_ids": batch.ids_bt.to(self._device)}
        if self._attention is not None and batch.layout is not None:
            self._attention.tell(batch.layout, self._device, self._model.dtype)
            inputs["position_ids"] = batch.layout.positions_bt().to(self._device)
        places_n, targets_n = batch.places_n.to(self._device), batch.targets_n.to(self._device)
        owners_n = torch.tensor(members)[batch.owners_n].to(self._device)
        if not self._plain_head:
            logits_bv = self._model(**inputs).logits.flatten(0, 1)
            return cross_entropy(logits_bv[places_n].float(), targets_n, reduction="none"), owners_n
        hidden_bth = self._model.base_model(**inputs).last_hidden_state
        hidden_nh = hidden_bth.flatten(0, 1).index_select(0, places_n)
        return fused_nll(hidden_nh, self._model.get_output_embeddings(), targets_n), owners_n

    def _measured(self) -> dict[str, Any]:
        gpu = self._device.type == "cuda"
        return {
            "dtype": self._dtype,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "packed_with": len(self.members),
        }


STATE_BYTES = 5 * 4
"""Of a number of an adapter in a stack: weight, gradient and two moments, float32, and the copy that the layers
multiply by: of bf16 with its gradient."""


def free_bytes(device: torch.device) -> float:
    """With what torch keeps for itself without using it. On a CPU adapters are small beside the base: no limit."""
    if device.type == "cpu":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def _activation_bytes(device: torch.device) -> int:
    """At their most, so far."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
