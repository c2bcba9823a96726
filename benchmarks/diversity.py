"""k-center and score-first from 10,000 to 1,000,000 rows: seconds, memory, and how far the chosen cover the others.

    python benchmarks/diversity.py [--rows 10000 100000 1000000] [--chosen 1000] [--dimensions 256] [--threads 2 1]

The vectors are made up: a thousand clusters of very different sizes, and one row in two hundred anywhere. Each line is
a process of its own:

    k_center     ours: a pass over the vectors for some hundred choices
    plain        the greedy choice as Gonzalez has it, a pass for each; must choose the same rows
    score_first  DEITA's, at the cosine of 0.5; the score is made up
    random       as many rows, drawn

memory: the most that the process held besides its start, files that are mapped (which the system may drop) left out.
radius: distance of the worst covered row to its nearest chosen one, over all rows; similarity: the mean cosine to it.
picks: a hash of the chosen rows in their order. It must not change with the number of threads.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

MOST_PLAIN = 100_000
"""Rows: it holds all vectors in memory, and takes minutes."""
METHODS = ("k_center", "plain", "score_first", "random")


def vectors(rows: int, dimensions: int) -> np.ndarray:
    """float16, of length 1."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((1000, dimensions)).astype(np.float32)
    sizes = 1 / np.arange(1, 1001)
    found = np.empty((rows, dimensions), np.float16)
    for start in range(0, rows, 10_000):
        count = min(10_000, rows - start)
        part = centres[draw.choice(1000, count, p=sizes / sizes.sum())]
        part[draw.random(count) < 0.005] = 0
        part += 0.5 * draw.standard_normal((count, dimensions)).astype(np.float32)
        found[start : start + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


class Memory:
    """The most anonymous memory of this process, looked at every 5 ms."""

    def __init__(self) -> None:
        self._start, self.most, self._over = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._now() - self._start)

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def measure(method: str, rows: int, chosen: int, dimensions: int) -> dict[str, Any]:
    from tunery.selection.candidates import Candidates, round_vectors
    from tunery.selection.coverage import coverage
    from tunery.selection.k_center import k_center
    from tunery.selection.score_first import score_first

    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        candidates = Candidates(Path(folder), dimensions)
        made = vectors(rows, dimensions)
        for start in range(0, rows, 4096):
            whole, _ = round_vectors(made[start : start + 4096])
            ids = np.arange(start, start + len(whole), dtype=np.uint64)
            candidates.add(whole, ids, draw.random(len(whole)), draw.random(len(whole)))
        del made
        candidates.close()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed above is taken for ours
        memory, begin = Memory(), time.time()
        if method == "k_center":
            picks = k_center(candidates, chosen)[0]
        elif method == "plain":
            picks = plain(candidates, chosen)
        elif method == "score_first":
            picks = score_first(candidates, chosen, 0.5, Path(folder)).selected
        else:
            picks = draw.permutation(rows)[:chosen].tolist()
        seconds, most = time.time() - begin, memory.stop()
        told = coverage(candidates, np.arange(rows), np.array(picks))
    digest = hashlib.sha256(np.array(picks, np.int64).tobytes()).hexdigest()[:8]
    return {"seconds": seconds, "memory": most, "chosen": len(picks), **told, "picks": digest}


def plain(candidates: Any, chosen: int) -> list[int]:
    from tunery.selection.k_center import k_center

    rows, squares = candidates.vectors(slice(0, candidates.count)), np.asarray(candidates.squares)
    picks = list(k_center(candidates, 1)[0])
    near = np.full(len(rows), np.inf, np.float32)
    while len(picks) < chosen:
        last = picks[-1]
        np.minimum(near, rows @ (rows[last] * np.float32(-2)) + squares + squares[last], out=near)
        picks.append(int(near.argmax()))
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--chosen", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1, 1])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        (rows,) = arguments.rows
        print(json.dumps(measure(arguments.one, rows, arguments.chosen, arguments.dimensions)))
        return
    print(f"{arguments.dimensions} dimensions, {arguments.chosen:,} to be chosen, {os.cpu_count()} cores")
    print(
        f"{'rows':>10} {'threads':>7} {'method':12} {'seconds':>8} {'memory':>8} {'chosen':>7} {'radius':>7} "
        f"{'similarity':>10} picks"
    )
    for rows in arguments.rows:
        for threads in arguments.threads:
            for method in METHODS:
                if (method == "random" and threads != arguments.threads[0]) or (
                    method == "plain" and rows > MOST_PLAIN
                ):
                    continue
                command = [sys.executable, __file__, "--one", method, "--rows", str(rows)]
                command += ["--chosen", str(arguments.chosen), "--dimensions", str(arguments.dimensions)]
                limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}
                told = json.loads(
                    subprocess.run(
                        command, env={**os.environ, **limits}, check=True, capture_output=True, text=True
                    ).stdout
                )
                print(
                    f"{rows:10,} {threads:7} {method:12} {told['seconds']:8.2f} {told['memory'] / 2**20:5.0f} MB "
                    f"{told['chosen']:7,} {told['radius']:7.3f} {told['similarity']:10.3f} {told['picks']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
