"""`tunery export` of models: exported models load without tunery and are unchanged, the model card states their origin,
and invalid requests are rejected. Weights are real but tiny; artifacts are written by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from small_classifiers import write_encoder, write_language_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

import tunery.export.export_command
from tunery import cli
from tunery.errors import RequestError, TuneryError
from tunery.events.event_log import EventLog
from tunery.export.export_command import export_model, render
from tunery.models.adapters import lora_config
from tunery.models.load import load_classifier, load_model, load_with_new_head, write_base, write_head
from tunery.pipeline.cache_keys import cache_keys
from tunery.search.space import trial_experiment, trial_id
from tunery.spec import Experiment, Lora, load
from tunery.store import Artifact, Store

SECRET = "a row that must not be published"
TEXT = """
# Which learning rate is best?
# And does it last?
name: small
seed: 5
stages:
  rows:   {kind: dataset, source: "FOLDER/rows.jsonl", limit: 20}
  held:   {kind: dataset, source: "FOLDER/held.jsonl"}
  scored: {kind: score, data: rows, by: [{length: words}]}
  clean:  {kind: select, data: scored, keep: {length: {range: [1, 9]}}}
  base:   {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: auto}
  sft:    {kind: sft, data: clean, model: base, tuner: {lora: {rank: 2}}, epochs: 1, learning_rate: 1e-3,
           eval_data: held}
  more:   {kind: sft, data: rows, model: sft, epochs: 1, learning_rate: 1e-3}
  judge:  {kind: classifier, data: {good: rows, bad: held}, model: base, tuner: {lora: {rank: 2}}, epochs: 1,
           learning_rate: 1e-3}
  rm:     {kind: reward, data: rows, model: {pretrained: FOLDER/encoder}, epochs: 1, learning_rate: 1e-3}
  local:  {kind: sft, data: rows, model: {pretrained: FOLDER/llama}, tuner: {lora: {rank: 2}}, epochs: 1,
           learning_rate: 1e-3}
  hub:    {kind: sft, data: rows, model: {pretrained: org/llama, revision: abc}, tuner: {lora: {rank: 2}}, epochs: 1,
           learning_rate: 1e-3}
  eval:   {kind: evaluate, models: [base, sft], data: {held: held}, baseline: base}
search:
  metric: sft.eval_loss
  mode: min
  trials: 2
  algorithm: grid
  space: {sft.learning_rate: {choice: [3e-3, 5e-3]}}
"""
FACTS: dict[str, dict[str, Any]] = {
    "dataset": {
        "rows": 20,
        "quarantined": 1,
        "quarantine": {"first": [{"excerpt": SECRET}]},
        "injected_corruption": {},
    },
    "score": {"rows": 20, "rows_out": 20, "scores": {"length": {"median": 4.0}}},
    "select": {
        "rows_in": 20,
        "kept": 12,
        "rules": [{"score": "length", "rule": "length range 1..9", "thresholds": [1.0, 9.0], "dropped": 8}],
        "samples": {"deciles": [SECRET]},
    },
    "classifier": {"temperature": 1.5},
    "reward": {"reward_mean": 0.25, "reward_std": 2.0},
}
TRAINED = {"rows": 20, "steps": 5, "tokens": 321, "loss": 3.5, "eval_loss": 3.25, "resolved": {}}


class ExportWorkspace:
    """A folder with an experiment, its data and models, and the store of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        for name in ("rows", "held"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} {SECRET}"}) + "\n")
        write_language_model(folder / "llama", seed=7)
        write_encoder(folder / "encoder", ["reward"])
        self.file = folder / "small.yaml"
        self.file.write_text(TEXT.replace("FOLDER", str(folder)))
        self.experiment, _ = load(self.file)
        self.values = [{"sft.learning_rate": rate} for rate in (3e-3, 5e-3)]
        self.trials = [trial_id(values) for values in self.values]

    def artifacts(self, experiment: Experiment) -> dict[str, Artifact]:
        """Return the artifacts of all stages; write those that do not exist yet."""
        artifacts: dict[str, Artifact] = {}
        for name, key in cache_keys(experiment, self.folder).items():
            kind = experiment.stages[name].kind
            artifact = self.store.find(kind, key.fingerprint)
            if artifact is None:
                out = self.store.staging_dir(kind, key.fingerprint) / "out"
                out.mkdir(parents=True)
                weights(name, artifacts, self.folder, out, seed=len(list(self.store.root.rglob("manifest.json"))))
                manifest = {"kind": kind, **asdict(key), "facts": facts_of(name, kind)}
                with self.store.lease(kind, key.fingerprint) as lease:
                    artifact = self.store.commit(out, manifest, {"workers": 1, "device": "cpu"}, lease)
            artifacts[name] = artifact
        return artifacts

    def log(self, run: str = "small") -> RunLog:
        return RunLog(self, run)

    def export(self, out: Path, run: str = "small", **options: Any) -> Path:
        export_model(run, out, self.store, **options)
        return out


class RunLog:
    """Writes the event log of a run like its driver and trials."""

    def __init__(self, workspace: ExportWorkspace, run: str) -> None:
        self.workspace, self.folder = workspace, workspace.store.run(run)

    def run_started(self, text: str | None = None) -> RunLog:
        text = self.workspace.file.read_text() if text is None else text
        stages = [{"name": name, "kind": stage.kind} for name, stage in self.workspace.experiment.stages.items()]
        self._write("driver", "run_started", run=self.folder.name, file="small.yaml", text=text, stages=stages)
        return self

    def stages_finished(self, experiment: Experiment, trial: str = "", without: str = "") -> RunLog:
        for name, artifact in self.workspace.artifacts(experiment).items():
            if name != without:
                values = {"kind": artifact.kind, "fingerprint": artifact.fingerprint, "facts": artifact.facts}
                self._write(trial or "driver", "stage_finished", stage=name, artifact=str(artifact.path), **values)
        return self

    def search(self, states: tuple[str, str] = ("done", "done"), *, with_stages: bool = True) -> RunLog:
        """Log two trials; without their stages, as if a second run reused the search from the store."""
        self._write("driver", "search_started", metric="sft.eval_loss", mode="min", trials=2, space={})
        for trial, values, state in zip(self.workspace.trials, self.workspace.values, states, strict=True):
            if with_stages and state == "done":
                self.stages_finished(trial_experiment(self.workspace.experiment, values), trial)
            value = values["sft.learning_rate"]
            self._write("driver", "trial_finished", trial=trial, overrides=values, state=state, value=value, error="")
        return self

    def search_finished(self, best: int = 0, **more: Any) -> RunLog:
        self._write("driver", "search_finished", best=self.workspace.trials[best], value=0.5, seconds=1.0, **more)
        return self

    def run_finished(self, state: str = "done") -> None:
        self._write("driver", "run_finished", state=state, seconds=1.0, message="")

    def _write(self, writer: str, event: str, **values: Any) -> None:
        trial = writer if writer.startswith("trial") else ""
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)


def weights(name: str, artifacts: dict[str, Artifact], folder: Path, out: Path, seed: int) -> None:
    """Write the output of the stage `name` to `out`: random weights that depend on the seed."""
    set_seed(seed)
    external = {"local": folder / "llama", "hub": folder / "llama"}
    lora = Lora(rank=2)
    if name in ("base", "more"):
        model = write_language_model(out / "model", seed)
        add_local_path(model / "config.json", "_name_or_path", folder)
        add_local_path(model / "tokenizer_config.json", "name_or_path", folder)
    elif name == "rm":
        write_encoder(out / "model", ["reward"], positions=32 + seed)
    elif name in ("sft", *external):
        source = {"artifact": str(artifacts["base"].path)} if name == "sft" else {"pretrained": str(external[name])}
        base = load_model({"revision": None, **source}, torch.float32)
        save_adapter(get_peft_model(base, lora_config(lora, "CAUSAL_LM")), out, artifacts["base"].path / "model")
        hub = {"pretrained": "org/llama", "revision": "abc"}
        write_base(out, hub if name == "hub" else {"revision": None, **source})
    elif name == "judge":
        base, new = load_with_new_head({"artifact": str(artifacts["base"].path)}, ["bad", "good"], torch.float32)
        save_adapter(get_peft_model(base, lora_config(lora, "SEQ_CLS", new)), out, artifacts["base"].path / "model")
        write_base(out, {"artifact": str(artifacts["base"].path)})
        write_head(out, ["bad", "good"])


def save_adapter(model: Any, out: Path, tokenizer: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # LoRA's B is initialized to zero: the adapter would have no effect
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out / "adapter")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out / "adapter")


def add_local_path(path: Path, key: str, folder: Path) -> None:
    """Add a local path, as older versions of transformers did."""
    path.write_text(json.dumps({**json.loads(path.read_text()), key: str(folder / "llama")}))


def facts_of(name: str, kind: str) -> dict[str, Any]:
    if kind == "evaluate":
        losses = {"base": 4.0, "sft": 3.25}
        common = {"set": "held", "perplexity": 9.0, "rows": 20}
        return {"results": [{"model": model, "loss": loss, **common} for model, loss in losses.items()]}
    facts = FACTS.get(kind, {})
    if kind in ("dataset", "score", "select"):
        return facts
    auto = {"learning_rate": {"value": 2e-3, "rule": "a small model from scratch"}} if name == "base" else {}
    return {**TRAINED, **facts, "resolved": auto}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> ExportWorkspace:
    """A finished run whose second trial is the best. Its artifacts must not be changed."""
    workspace = ExportWorkspace(tmp_path_factory.mktemp("private-folder"))
    workspace.log().run_started().stages_finished(workspace.experiment).search().search_finished(best=1).run_finished()
    return workspace


IDS = torch.tensor([[3, 17, 4, 9, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(input_ids=IDS).logits
    return output


def model_of(workspace: ExportWorkspace, name: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    experiment = workspace.experiment if values is None else trial_experiment(workspace.experiment, values)
    return {"artifact": str(workspace.artifacts(experiment)[name].path)}


# Selection of the model.


def test_model_of_the_best_trial_loads_without_tunery_and_has_the_same_logits(
    workspace: ExportWorkspace, tmp_path: Path
) -> None:
    out = workspace.export(tmp_path / "out")
    best = logits(load_model(model_of(workspace, "sft", workspace.values[1]), torch.float32))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), best)
    for other in (None, workspace.values[0]):
        assert not torch.allclose(best, logits(load_model(model_of(workspace, "sft", other), torch.float32)))


def test_tokenizer_is_exported_with_its_chat_template(workspace: ExportWorkspace, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace.export(tmp_path / "out"))
    messages = [{"role": "user", "content": "why"}]
    assert "why" in tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("trial", [0, "file"])
def test_model_of_a_selected_trial_or_of_the_file_is_exported(
    workspace: ExportWorkspace, tmp_path: Path, trial: int | str
) -> None:
    trial_name, values = ("file", None) if trial == "file" else (workspace.trials[0], workspace.values[0])
    out = workspace.export(tmp_path / "out", trial=trial_name)
    expected = load_model(model_of(workspace, "sft", values), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))


def test_stage_that_the_search_does_not_change_has_the_values_of_the_file(
    workspace: ExportWorkspace, tmp_path: Path
) -> None:
    exported = export_model("small", tmp_path / "out", workspace.store, stage="base")
    assert exported.target.trial is None
    assert exported.target.trained_with == ""
    expected = load_model(model_of(workspace, "base"), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(expected))


def test_stage_that_trials_do_not_train_has_the_values_of_the_file_and_a_note(
    workspace: ExportWorkspace, tmp_path: Path
) -> None:
    exported = export_model("small", tmp_path / "out", workspace.store, stage="more")
    assert exported.target.artifact.path == Path(model_of(workspace, "more")["artifact"])
    assert "no trial trained `more`" in render(exported)
    assert "the file's own values" in render(exported)


def test_last_model_is_exported_without_a_search(workspace: ExportWorkspace, tmp_path: Path) -> None:
    text = workspace.file.read_text().split("search:")[0].replace("  hub:", "  last:")
    workspace.log("plain").run_started(text.replace("name: small", "name: plain")).stages_finished(workspace.experiment)
    with pytest.raises(RequestError, match="`last` of the run `plain` isn't finished"):
        export_model("plain", tmp_path / "out", workspace.store)
    assert export_model("plain", tmp_path / "out", workspace.store, stage="rm").target.stage == "rm"


def test_run_is_selected_by_folder_or_experiment_file(workspace: ExportWorkspace, tmp_path: Path) -> None:
    for number, run in enumerate((str(workspace.store.run("small")), str(workspace.file))):
        assert export_model(run, tmp_path / str(number), workspace.store).target.trial.name == workspace.trials[1]  # type: ignore[union-attr]


def test_run_in_a_moved_store_is_exported(workspace: ExportWorkspace, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(workspace.store.root)
    out = tmp_path / "out"
    assert export_model(str(tmp_path / "elsewhere/runs/small"), out, Store(tmp_path)).out == out


def test_best_model_of_a_reused_search_is_exported(workspace: ExportWorkspace, tmp_path: Path) -> None:
    best = trial_experiment(workspace.experiment, workspace.values[0])
    best_fingerprints = {name: artifact.fingerprint for name, artifact in workspace.artifacts(best).items()}
    workspace.log("again").run_started().stages_finished(workspace.experiment).search(
        with_stages=False
    ).search_finished(best=0, best_fingerprints=best_fingerprints).run_finished()
    for trial in (None, workspace.trials[0]):
        exported = export_model("again", tmp_path / f"out-{trial}", workspace.store, trial=trial)
        assert exported.target.artifact.fingerprint == best_fingerprints["sft"]
    assert "another run" in error_of(workspace, tmp_path / "out", "again", trial=workspace.trials[1]).cause
    workspace.log("older").run_started().stages_finished(workspace.experiment).search(
        with_stages=False
    ).search_finished(best=0).run_finished()
    assert "another run" in error_of(workspace, tmp_path / "out", "older").cause


def test_trials_of_different_versions_of_a_file_are_distinguished(workspace: ExportWorkspace, tmp_path: Path) -> None:
    edited = workspace.experiment.model_copy(update={"seed": 6})
    other = workspace.file.read_text().replace("seed: 5", "seed: 6")
    log = workspace.log("edited").run_started().stages_finished(workspace.experiment).search().search_finished(best=0)
    log.run_started(other).stages_finished(trial_experiment(edited, workspace.values[0]), workspace.trials[0])
    log.run_started("# only a comment\n" + workspace.file.read_text()).stages_finished(workspace.experiment).search(
        with_stages=False
    ).search_finished(best=0)
    artifacts = export_model("edited", tmp_path / "out", workspace.store).target.artifact.path
    assert str(artifacts) == model_of(workspace, "sft", workspace.values[0])["artifact"]


# Adapters.


def test_adapter_loads_on_the_exported_base(
    workspace: ExportWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_model("small", tmp_path / "out", workspace.store, adapter=True)
    assert exported.format.base_command == f"tunery export small ./base --stage base --trial {workspace.trials[1]}"
    workspace.export(tmp_path / "base", stage="base", trial=workspace.trials[1])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)  # the base is named relative to where the adapter is loaded
    base_name = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_name), "out")
    merged = load_model(model_of(workspace, "sft", workspace.values[1]), torch.float32)
    assert torch.allclose(logits(model), logits(merged), atol=1e-5)


@pytest.mark.parametrize(("stage", "base", "revision"), [("local", "./llama", None), ("hub", "org/llama", "abc")])
def test_adapter_refers_to_its_base_by_hub_name_or_folder_name(
    workspace: ExportWorkspace, tmp_path: Path, stage: str, base: str, revision: str | None
) -> None:
    out = workspace.export(tmp_path / "out", stage=stage, adapter=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
    assert f'from_pretrained("{base}"' in (out / "README.md").read_text()


def test_adapter_of_an_external_model_folder_is_merged(workspace: ExportWorkspace, tmp_path: Path) -> None:
    out = workspace.export(tmp_path / "out", stage="local")
    expected = load_model(model_of(workspace, "local"), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))


# Classifiers.


def test_classifier_with_an_adapter_is_exported_with_its_head(workspace: ExportWorkspace, tmp_path: Path) -> None:
    out = workspace.export(tmp_path / "out", stage="judge")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    expected, _ = load_classifier(model_of(workspace, "judge"), torch.float32)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert "1.5" in (out / "README.md").read_text()  # the temperature


def test_classifier_adapter_loads_with_the_code_of_its_card(
    workspace: ExportWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.export(tmp_path / "base", stage="base")
    out = workspace.export(tmp_path / "out", stage="judge", adapter=True)
    monkeypatch.chdir(tmp_path)
    code = (out / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    expected, _ = load_classifier(model_of(workspace, "judge"), torch.float32)
    assert torch.allclose(logits(names["model"]), logits(expected), atol=1e-5)


def test_reward_model_is_copied_and_its_normalization_is_in_the_card(
    workspace: ExportWorkspace, tmp_path: Path
) -> None:
    out = workspace.export(tmp_path / "out", stage="rm")
    expected, _ = load_classifier(model_of(workspace, "rm"), torch.float32)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(out)), logits(expected))
    assert "(output - 0.25) / 2" in (out / "README.md").read_text()


# The card and the lineage.


def front_matter(out: Path) -> dict[str, Any]:
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(front)
    return metadata


def test_front_matter_follows_the_hub_format(workspace: ExportWorkspace, tmp_path: Path) -> None:
    sft = front_matter(workspace.export(tmp_path / "sft"))
    assert sft == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunery", "sft", "lora"],
    }
    hub = front_matter(workspace.export(tmp_path / "hub", stage="hub", adapter=True))
    assert (hub["library_name"], hub["base_model"]) == ("peft", "org/llama")
    judge = front_matter(workspace.export(tmp_path / "judge", stage="judge"))
    assert judge["pipeline_tag"] == "text-classification"


def test_card_has_question_training_data_scores_and_search(workspace: ExportWorkspace, tmp_path: Path) -> None:
    card = (workspace.export(tmp_path / "out") / "README.md").read_text()
    for text in (
        "> Which learning rate is best? And does it last?\n",
        f"It was trained by {workspace.trials[1]}, the best trial.",
        "| learning_rate | 5e-3 |",
        "| tuner.lora.alpha | 4 (auto) |",
        "`rows` (dataset): 20 rows, 1 quarantined; source rows.jsonl, split all, limit 20",
        "`scored` (score of data `rows`): 20 rows, length median 4",
        "`clean` (select of data `scored`): kept 60%: 12 of 20; length range 1..9 (threshold 1.000 and 9.000) drops 8",
        "`base` (pretrain of data `rows`): loss 3.500",
        "| sft.learning_rate | choice [0.003, 0.005] | 5e-3 |",
        f"the best is {workspace.trials[1]} with 5e-3",
        "| seed | 5 |",
    ):
        assert text in card
    assert "| held | 20 | 3.250 | 9.000 |" not in card  # the loss with the file's own values
    file_card = (workspace.export(tmp_path / "file", trial="file") / "README.md").read_text()
    assert "| held | 20 | 3.250 | 9.000 |" in file_card
    base = (workspace.export(tmp_path / "base", stage="base") / "README.md").read_text()
    assert "| learning_rate | 2e-3 (auto: a small model from scratch) |" in base
    assert "## Hyperparameter search" not in base


def test_card_has_win_rates_as_model_and_as_baseline(workspace: ExportWorkspace, tmp_path: Path) -> None:
    model_fingerprint = workspace.artifacts(workspace.experiment)["more"].fingerprint
    result = {"set": "prompts", "win_rate": 0.75, "interval": [0.6, 0.9], "rows": 8}
    for field, names, baseline in (("models.0", ["base", "more"], "base"), ("baseline", ["more", "hub"], "more")):
        out = workspace.store.staging_dir("win_rate", field) / "out"
        out.mkdir(parents=True)
        facts = {"results": [{"model": names[1], "baseline": {"model": baseline}, **result}]}
        identity = {"names": [*names, "prompts"], "judge": {"python": "/home/me/rate.py", "function": "rate"}}
        manifest = {
            "kind": "win_rate",
            "fingerprint": field,
            "identity": identity,
            "inputs": {field: model_fingerprint},
        }
        with workspace.store.lease(manifest["kind"], manifest["fingerprint"]) as lease:
            workspace.store.commit(out, {**manifest, "facts": facts}, {}, lease)
    card = (workspace.export(tmp_path / "out", stage="more") / "README.md").read_text()
    assert "| **more** | base | prompts (8) | rate.py | 0.750 | 0.600–0.900 |" in card
    assert "| hub | **more** | prompts (8) | rate.py | 0.750 | 0.600–0.900 |" in card


def test_lineage_has_the_manifests_from_dataset_to_model(workspace: ExportWorkspace, tmp_path: Path) -> None:
    lineage = json.loads((workspace.export(tmp_path / "out") / "lineage.json").read_text())
    assert [stage["stage"] for stage in lineage["stages"]] == ["rows", "scored", "clean", "held", "base", "sft"]
    assert lineage["overrides"] == workspace.values[1]
    best = workspace.artifacts(trial_experiment(workspace.experiment, workspace.values[1]))["sft"]
    assert lineage["stages"][-1] == {"stage": "sft", **best.manifest}


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [(stage, False) for stage in ("base", "sft", "judge", "rm", "local")]
    + [(stage, True) for stage in ("sft", "judge", "local", "hub")],
)
def test_exported_files_have_no_local_path_and_no_row(
    workspace: ExportWorkspace, tmp_path: Path, stage: str, adapter: bool
) -> None:
    out = workspace.export(tmp_path / "out", stage=stage, adapter=adapter)
    for path in out.iterdir():
        content = path.read_bytes().decode("utf-8", errors="replace")
        assert str(workspace.folder) not in content, path
        assert str(tmp_path) not in content, path
        assert SECRET not in content, path


# Errors.


def error_of(workspace: ExportWorkspace, out: Path, run: str = "small", **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        export_model(run, out, workspace.store, **options)
    assert caught.value.remedy
    assert not out.is_dir() or not list(out.parent.glob(f".{out.name}*"))
    return caught.value


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"run": "smal"}, "there is no run `smal`", "small"),
        ({"stage": "stf"}, "no stage `stf`", "did you mean `sft`?"),
        ({"stage": "clean"}, "no stage `clean`", "known: base, sft"),
        ({"trial": "trial-nothing"}, "no trial `trial-nothing`", "trial-"),
        ({"stage": "base", "adapter": True}, "`base` has no adapter", "remove --adapter"),
    ],
)
def test_unknown_run_stage_or_trial_is_an_error_with_suggestions(
    workspace: ExportWorkspace, tmp_path: Path, options: dict[str, Any], message: str, remedy: str
) -> None:
    error = error_of(workspace, tmp_path / "out", **options)
    assert message in error.message
    assert remedy in error.remedy


def test_trial_without_the_model_is_an_error(workspace: ExportWorkspace, tmp_path: Path) -> None:
    for trial in workspace.trials:  # including the best one
        error = error_of(workspace, tmp_path / "out", stage="more", trial=trial)
        assert "has no model `more`" in error.message
        assert "trials that have one: none" in error.remedy


def test_unfinished_search_is_an_error_except_for_models_that_do_not_need_it(
    workspace: ExportWorkspace, tmp_path: Path
) -> None:
    log = workspace.log("cut-off").run_started().stages_finished(workspace.experiment).search(("done", "stopped"))
    log.run_finished("interrupted")
    error = error_of(workspace, tmp_path / "out", "cut-off")
    assert "no best trial yet" in error.message
    assert "1 of 2 trials are done" in error.cause
    stopped = error_of(workspace, tmp_path / "out", "cut-off", trial=workspace.trials[1])
    assert "stopped" in stopped.cause
    assert workspace.trials[0] in stopped.remedy
    for number, options in enumerate(({"stage": "base"}, {"trial": "file"}, {"trial": workspace.trials[0]})):
        workspace.export(tmp_path / str(number), "cut-off", **options)


def test_unfinished_model_and_empty_run_are_errors(workspace: ExportWorkspace, tmp_path: Path) -> None:
    workspace.log("unfinished").run_started().stages_finished(workspace.experiment, without="more").run_finished(
        "failed"
    )
    error = error_of(workspace, tmp_path / "out", "unfinished", stage="more", trial="file")
    assert "`more` of the run `unfinished` isn't finished" in error.message
    assert "the run is failed, the stage pending" in error.cause
    (workspace.store.run("empty") / "events").mkdir(parents=True)
    assert "has no model" in error_of(workspace, tmp_path / "out", "empty").message


def test_removed_artifacts_are_an_error(workspace: ExportWorkspace, tmp_path: Path) -> None:
    experiment = workspace.experiment.model_copy(update={"seed": 99})
    text = workspace.file.read_text().replace("seed: 5", "seed: 99")
    workspace.log("removed").run_started(text).stages_finished(experiment)
    artifacts = workspace.artifacts(experiment)
    for stage, removed, message in (
        ("more", "more", "the model of `more` is no longer"),
        ("judge", "base", "no longer exists"),
    ):
        artifacts[removed].path.rename(tmp_path / removed)
        assert message in error_of(workspace, tmp_path / "out", "removed", stage=stage, trial="file").message


def test_edited_file_is_an_error(workspace: ExportWorkspace, tmp_path: Path) -> None:
    edited = tmp_path / "small.yaml"
    edited.write_text(workspace.file.read_text().replace("limit: 20", "limit: 10"))
    error = error_of(workspace, tmp_path / "out", str(edited))
    assert "edited since" in error.message
    assert "tunery run" in error.remedy


def folder_with_a_file(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").touch()


@pytest.mark.parametrize("create", [folder_with_a_file, Path.touch], ids=["not empty", "a file"])
def test_existing_files_are_not_overwritten(
    workspace: ExportWorkspace, tmp_path: Path, create: Callable[[Path], None]
) -> None:
    create(tmp_path / "out")
    error_of(workspace, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_and_missing_folders_are_accepted(workspace: ExportWorkspace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert (workspace.export(out, stage="base") / "model.safetensors").is_file()


@pytest.mark.parametrize("fails", ["card", "write_model"])
def test_failed_export_leaves_nothing_behind(
    workspace: ExportWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tunery.export.export_command, fails, fail)
    with pytest.raises(TuneryError, match="No space left") as caught:
        export_model("small", tmp_path / "out", workspace.store)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# The command.


def test_command_prints_json_or_text_and_exits_with_2_for_an_invalid_request(
    workspace: ExportWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tunery", "export", *words, "--store", str(workspace.store.root)])
        cli.main()

    command("small", str(tmp_path / "out"), "--json")
    output = json.loads(capsys.readouterr().out)
    assert (output["stage"], output["trial"], output["format"]) == ("sft", workspace.trials[1], "model")
    command("small", str(tmp_path / "adapter"), "--adapter")
    assert f"trained by {workspace.trials[1]}, the best trial" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        command("small", str(tmp_path / "out"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
