"""Rows per second of tokenising conversations with a Qwen3 chat template: tunery's cache beside TRL's SFTTrainer.

    PYTHONPATH=platform python benchmarks/tokenize_rows.py --rows 1000000 --peer-rows 100000

Rows are questions and answers of the builtin corpus, repeated with a number in each. TRL prepares its rows with
`assistant_only_loss` and as many processes as tunery uses; its time is that of constructing the trainer, less that of
constructing it for ten rows. Printed: rows per second of both and the ratio, the largest resident memory of tunery's
process and of its children at a tenth of the rows and at all of them, and the seconds that opening the finished cache
takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunery.ingest.read import read_source
from tunery.models.encode import Encoding
from tunery.models.row_encodings import CONVERSATIONS
from tunery.models.token_cache import TokenCache
from tunery.spec import Dataset
from tunery.store.rows import row_id, write_rows

MAX_LENGTH = 1024


def corpus() -> list[dict[str, Any]]:
    stage = Dataset(kind="dataset", source="builtin:python-docs", subset="questions")
    return list(read_source(stage, Path("."), lambda line: None))


def numbered(rows: list[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(islice(cycle(rows), count)):
        question, *rest = row["messages"]
        turns = [{**question, "content": f"{number}: {question['content']}"}, *rest]
        changed = {"messages": turns, "source": "corpus", "line": number + 1}
        yield {**changed, "id": row_id(changed)}


def write_tokenizer(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A byte-level BPE of 8,192 tokens with Qwen3's special tokens and the chat template that TRL ships."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (turn["content"] for row in rows for turn in row["messages"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(text) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    ).save_pretrained(folder)


def ours(rows: Path, name: str, tokenizer: Path, store: Path) -> dict[str, float]:
    """In a process of its own, so that its memory is its own."""
    from tunery.models.load import load_tokenizer

    loaded = load_tokenizer({"pretrained": str(tokenizer), "revision": None})
    before = _peak()
    cache = TokenCache(store / "tokenized", store / "leases")
    timings = []
    for _ in range(2):
        begin = time.perf_counter()
        found = cache.open_or_build(rows, name, loaded, Encoding(MAX_LENGTH), CONVERSATIONS)
        timings.append(time.perf_counter() - begin)
    return {
        "seconds": timings[0],
        "opening": timings[1],
        "tokens": float(found.stats.tokens),
        "before_mib": before,
        "peak_mib": _peak(),
        "child_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def peer(rows: list[dict[str, Any]], count: int, folder: Path, processes: int) -> float:
    """Seconds of TRL's preparation."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )

    def seconds(number: int) -> float:
        data = datasets.Dataset.from_list([{"messages": row["messages"]} for row in numbered(rows, number)])
        with tempfile.TemporaryDirectory() as out:
            settings = SFTConfig(
                output_dir=out,
                max_length=MAX_LENGTH,
                assistant_only_loss=True,
                dataset_num_proc=processes if number > 10 else None,
                use_cpu=True,
                bf16=False,
                report_to="none",
            )
            begin = time.perf_counter()
            SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
            return time.perf_counter() - begin

    fixed = seconds(10)
    return seconds(count) - fixed


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_process(connection: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))


def run_alone(function: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(sender, function, arguments))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None, help="where rows and tokens go (a temporary folder)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="tokenize-rows-"))
    rows = corpus()
    write_tokenizer(folder / "tokenizer", rows)
    processes = len(os.sched_getaffinity(0))
    print(f"{processes} cores; rows of the corpus: {len(rows):,}", flush=True)

    seconds = run_alone(peer, rows, options.peer_rows, folder / "tokenizer", processes)
    theirs = options.peer_rows / seconds
    print(f"TRL      {options.peer_rows:>9,} rows  {seconds:8.1f} s  {theirs:9,.0f} rows/s", flush=True)
    for count in (options.rows // 10, options.rows):
        artifact = folder / f"rows-{count}"
        write_rows(numbered(rows, count), artifact)
        told = run_alone(ours, artifact, artifact.name, folder / "tokenizer", folder / "store")
        speed = count / told["seconds"]
        print(
            f"tunery   {count:>9,} rows  {told['seconds']:8.1f} s  {speed:9,.0f} rows/s  ({speed / theirs:.2f} x TRL)  "
            f"peak {told['peak_mib']:,.0f} MiB (before: {told['before_mib']:,.0f}; "
            f"of a child {told['child_mib']:,.0f})  "
            f"second run {told['opening']:.3f} s  {told['tokens']:,.0f} tokens",
            flush=True,
        )
        print(json.dumps({"rows": count, **told}), flush=True)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
