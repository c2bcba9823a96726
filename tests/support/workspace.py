"""Run experiments as a user does: `python -m tunery run FILE` in a separate process, with real components."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from one_process import build_stages

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
# A small experiment for the tests.
name: small
seed: 17
stages:
  texts:      {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 150}
  questions:  {kind: dataset, source: "builtin:python-docs", subset: questions, split: train, limit: 120,
               corrupt_fraction: 0.2}
  validation: {kind: dataset, source: "builtin:python-docs", subset: questions, split: validation, limit: 30}
  base:   {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 2e-3, global_batch_size: 4,
           max_length: 128}
  scored: {kind: score, data: questions, by: [{perplexity: base}]}
  clean:  {kind: select, data: scored, keep: {perplexity: {keep_fraction: 0.8}}}
  sft:    {kind: sft, data: clean, model: base, epochs: 2, learning_rate: 1e-3, global_batch_size: 4,
           eval_data: validation, num_evals: 2}
  eval:   {kind: evaluate, models: [base, sft], data: {validation: validation}}
compute: {workers: 2, zero_stage: 2, save_steps: 10, max_failures: 0}
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "WANDB_MODE": "offline", "COLUMNS": "120"}


@dataclass
class Workspace:
    """A folder with an experiment and a store."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "experiment.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def run(self) -> Path:
        return self.store / "runs" / "small"

    def write(self, edit: Callable[[dict], None] = lambda experiment: None) -> Path:
        experiment = yaml.safe_load(TEXT.replace("e-3", ".0e-3"))  # PyYAML's loader reads 2e-3 as a string
        edit(experiment)
        self.file.write_text(yaml.safe_dump(experiment, sort_keys=False))
        return self.file

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "tunery", *words]

    def tunery(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, "--store", str(self.store)),
            env={**ENVIRONMENT, **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            cwd=self.folder,
        )

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Start `tunery run` in the background, in its own process group."""
        return subprocess.Popen(
            self.command("run", str(self.file), "--store", str(self.store)),
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=self.folder,
        )

    def without_ray(self, store: Path, **environment: str) -> dict[str, dict]:
        """Build the stages of the experiment in one process; return path and facts by stage."""
        return build_stages(self.file, store, **environment)

    def artifacts(self, kind: str) -> list[Path]:
        return sorted((self.store / "artifacts").glob(f"{kind}-*"))

    def only(self, kind: str) -> Path:
        (path,) = self.artifacts(kind)
        return path

    def events(self) -> list[dict]:
        lines = [line for path in (self.run / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
        return sorted((json.loads(line) for line in lines), key=lambda event: event["t"])


def wait_for(
    condition: Callable[[], object], seconds: float = 120, process: subprocess.Popen[str] | None = None
) -> None:
    end = time.time() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the process ended too early:\n{process.stdout.read()}\n{process.stderr.read()}")
        assert time.time() < end, f"the condition was not met after {seconds} s"
        time.sleep(0.05)


def facts(artifact: Path) -> dict:
    return json.loads((artifact / "manifest.json").read_text())["facts"]
