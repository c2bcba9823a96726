"""Edge cases of PPO with one worker and with two under ZeRO-3: fewer prompts than workers, empty responses, and logits
that are computed in several chunks, more of them on one worker than on the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_classifiers import write_language_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import ROOT

from tunery.models.encode import encode_prompts
from tunery.store.rows import row_id, write_rows

WORKER = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from tunery.spec import Compute, Ppo
from tunery.training.job import Job, RowSource
from tunery.training.ppo import engine
from tunery.models import token_log_probs
from tunery.training.ppo.ppo_worker import train

case = json.loads(sys.argv[1])
token_log_probs.LOGIT_BYTES = 4 * 300 * 3  # three tokens a piece
plain = engine.deepspeed_config

def config(*arguments):
    made = plain(*arguments)
    if made["zero_optimization"]["stage"] == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # all are sharded, however small
    return made

engine.deepspeed_config = config
out = Path(case["out"])
out.mkdir(parents=True, exist_ok=True)
spec = Ppo.model_validate({
    "kind": "ppo", "data": "d", "model": "m", "reward": "r", "epochs": 8.0, "learning_rate": 0.01,
    "global_batch_size": 4, "ppo_epochs": 2, "max_length": 64, "sampling": {"max_new_tokens": 12}, **case["fields"],
})
train(Job(
    stage="ppo", trial="", spec=spec, seed=17, model={"pretrained": case["policy"], "revision": None},
    data=(RowSource(Path(case["rows"])),), eval_data=(),
    reward={"python": case["reward"], "function": "reward"}, out=out, staging_dir=out.parent,
    store=out.parent, events=out.parent / "events",
    compute=Compute(workers=case["workers"], device="cpu", zero_stage=case["zero"], micro_batch_size=1),
    started_at=time.time(),
), lambda metrics: None)
"""


@pytest.fixture
def case(tmp_path: Path) -> dict:
    """One prompt, and a model that ends half of its responses at the first token."""
    policy = write_language_model(tmp_path / "policy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    row = {"messages": [{"role": "user", "content": "why is the row red"}]}
    with torch.no_grad():
        state_h = model.base_model(torch.tensor([encode_prompts([row], tokenizer)[0].ids])).last_hidden_state[0, -1]
        head_vh = model.get_output_embeddings().weight
        head_vh[tokenizer.eos_token_id] = state_h * (head_vh @ state_h).logsumexp(0) / (state_h @ state_h)
    model.save_pretrained(policy)
    write_rows([{**row, "id": row_id(row)}], tmp_path / "rows")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward(prompts, responses):\n    return [float(len(response)) / 10 for response in responses]\n"
    )
    return {"policy": str(policy), "rows": str(tmp_path / "rows"), "reward": str(reward)}


def trained(case: dict, folder: Path, workers: int, zero: int, fields: dict) -> tuple[list[dict], dict]:
    result = {**case, "out": str(folder / "out"), "workers": workers, "zero": zero, "fields": fields}
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    world = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1"}
    world |= {"PYTHONPATH": str(ROOT / "platform"), "MASTER_PORT": str(23000 + os.getpid() % 20000 + workers)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(result)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(text[-3000:] for text in texts)
    history = [json.loads(line) for line in (folder / "out" / "history.jsonl").read_text().splitlines()]
    return history, json.loads((folder / "outcome.json").read_text())["facts"]


@pytest.mark.parametrize("fields", [{}, {"tuner": {"lora": {"rank": 2}}}], ids=["whole", "lora"])
def test_two_workers_that_share_weights_learn_what_one_does(case: dict, tmp_path: Path, fields: dict) -> None:
    one, facts = trained(case, tmp_path / "one", 1, 0, fields)
    two, _ = trained(case, tmp_path / "two", 2, 3, fields)
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        for key, value in first.items():
            assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert facts["rows"] == 1
    state = json.loads((tmp_path / "one" / "checkpoints" / "checkpoint-1" / "ppo.json").read_text())["state"]
    assert state["reward_min"] == 0.0, "an empty answer was among them: the reward is the answer's length"
    assert one[0]["eos_rate"] < 1, "and one that was cut off"
