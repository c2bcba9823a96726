"""`tunery export` of models: exported models load without tunery and are unchanged, the model card states their origin,
and invalid requests are refused. Weights are real but tiny; artifacts are written by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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
from tunery.pipeline.cache_keys import fingerprints
from tunery.search.space import trial_experiment, trial_id
from tunery.spec import Experiment, Lora, load
from tunery.store import Artifact, Store

SECRET = "a row that nobody else may read"
TEXT = """
# Which learning rate is best?
# And does it last?
name: small
seed: 5
stages:
  rows:   {kind: dataset, source: "PLACE/rows.jsonl", limit: 20}
  held:   {kind: dataset, source: "PLACE/held.jsonl"}
  scored: {kind: score, data: rows, by: [{length: words}]}
  clean:  {kind: select, data: scored, keep: {length: {range: [1, 9]}}}
  base:   {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: auto}
  sft:    {kind: sft, data: clean, model: base, tuner: {lora: {rank: 2}}, epochs: 1, learning_rate: 1e-3,
           eval_data: held}
  more:   {kind: sft, data: rows, model: sft, epochs: 1, learning_rate: 1e-3}
  judge:  {kind: classifier, data: {good: rows, bad: held}, model: base, tuner: {lora: {rank: 2}}, epochs: 1,
           learning_rate: 1e-3}
  rm:     {kind: reward, data: rows, model: {pretrained: PLACE/encoder}, epochs: 1, learning_rate: 1e-3}
  local:  {kind: sft, data: rows, model: {pretrained: PLACE/llama}, tuner: {lora: {rank: 2}}, epochs: 1,
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
    "dataset": {"rows": 20, "quarantined": 1, "quarantine": {"first": [{"excerpt": SECRET}]}, "planted": {}},
    "score": {"rows": 20, "rows_out": 20, "scores": {"length": {"median": 4.0}}},
    "select": {
        "rows_in": 20,
        "kept": 12,
        "rules": [{"score": "length", "rule": "length range 1..9", "cuts": [1.0, 9.0], "dropped": 8}],
        "samples": {"deciles": [SECRET]},
    },
    "classifier": {"temperature": 1.5},
    "reward": {"reward_mean": 0.25, "reward_deviation": 2.0},
}
TRAINED = {"rows": 20, "steps": 5, "tokens": 321, "loss": 3.5, "eval_loss": 3.25, "resolved": {}}


class Bench:
    """A folder with an experiment, its data and models, and the store of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        for name in ("rows", "held"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} {SECRET}"}) + "\n")
        write_language_model(folder / "llama", seed=7)
        write_encoder(folder / "encoder", ["reward"])
        self.file = folder / "small.yaml"
        self.file.write_text(TEXT.replace("PLACE", str(folder)))
        self.experiment, _ = load(self.file)
        self.values = [{"sft.learning_rate": rate} for rate in (3e-3, 5e-3)]
        self.trials = [trial_id(values) for values in self.values]

    def make(self, experiment: Experiment) -> dict[str, Artifact]:
        """The artifacts of all stages, each once."""
        made: dict[str, Artifact] = {}
        for name, (print_, own, inputs) in fingerprints(experiment, self.folder).items():
            kind = experiment.stages[name].kind
            artifact = self.store.find(kind, print_)
            if artifact is None:
                out = self.store.staging_dir(kind, print_) / "out"
                out.mkdir(parents=True)
                weights(name, made, self.folder, out, seed=len(list(self.store.root.rglob("manifest.json"))))
                described = {"kind": kind, "fingerprint": print_, "identity": own, "inputs": inputs}
                facts = {"facts": facts_of(name, kind)}
                artifact = self.store.commit(out, {**described, **facts}, {"workers": 1, "device": "cpu"})
            made[name] = artifact
        return made

    def log(self, run: str = "small") -> Log:
        return Log(self, run)

    def export(self, out: Path, run: str = "small", **asked: Any) -> Path:
        export_model(run, out, self.store, **asked)
        return out


class Log:
    """Writes the event log of a run as its driver and its trials do."""

    def __init__(self, bench: Bench, run: str) -> None:
        self.bench, self.folder = bench, bench.store.run(run)

    def begin(self, text: str | None = None) -> Log:
        text = self.bench.file.read_text() if text is None else text
        stages = [{"name": name, "kind": stage.kind} for name, stage in self.bench.experiment.stages.items()]
        self._write("driver", "run_started", run=self.folder.name, file="small.yaml", text=text, stages=stages)
        return self

    def made(self, experiment: Experiment, trial: str = "", without: str = "") -> Log:
        for name, artifact in self.bench.make(experiment).items():
            if name != without:
                told = {"kind": artifact.kind, "fingerprint": artifact.fingerprint, "facts": artifact.facts}
                self._write(trial or "driver", "stage_finished", stage=name, artifact=str(artifact.path), **told)
        return self

    def search(self, states: tuple[str, str] = ("done", "done"), *, told: bool = True) -> Log:
        """Two trials; `told`: not found in the store, as by a second run."""
        self._write("driver", "search_started", metric="sft.eval_loss", mode="min", trials=2, space={})
        for trial, values, state in zip(self.bench.trials, self.bench.values, states, strict=True):
            if told and state == "done":
                self.made(trial_experiment(self.bench.experiment, values), trial)
            value = values["sft.learning_rate"]
            self._write("driver", "trial_finished", trial=trial, overrides=values, state=state, value=value, error="")
        return self

    def found(self, best: int = 0, **more: Any) -> Log:
        self._write("driver", "search_finished", best=self.bench.trials[best], value=0.5, seconds=1.0, **more)
        return self

    def end(self, state: str = "done") -> None:
        self._write("driver", "run_finished", state=state, seconds=1.0, message="")

    def _write(self, writer: str, event: str, **values: Any) -> None:
        trial = writer if writer.startswith("trial") else ""
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)


def weights(name: str, made: dict[str, Artifact], folder: Path, out: Path, seed: int) -> None:
    """What the stage `name` leaves in `out`: random weights, other ones for another seed."""
    set_seed(seed)
    outside = {"local": folder / "llama", "hub": folder / "llama"}
    lora = Lora(rank=2)
    if name in ("base", "more"):
        model = write_language_model(out / "model", seed)
        spoil(model / "config.json", "_name_or_path", folder)
        spoil(model / "tokenizer_config.json", "name_or_path", folder)
    elif name == "rm":
        write_encoder(out / "model", ["reward"], positions=32 + seed)
    elif name in ("sft", *outside):
        source = {"artifact": str(made["base"].path)} if name == "sft" else {"pretrained": str(outside[name])}
        base = load_model({"revision": None, **source}, torch.float32)
        save_adapter(get_peft_model(base, lora_config(lora, "CAUSAL_LM")), out, made["base"].path / "model")
        hub = {"pretrained": "org/llama", "revision": "abc"}
        write_base(out, hub if name == "hub" else {"revision": None, **source})
    elif name == "judge":
        base, new = load_with_new_head({"artifact": str(made["base"].path)}, ["bad", "good"], torch.float32)
        save_adapter(get_peft_model(base, lora_config(lora, "SEQ_CLS", new)), out, made["base"].path / "model")
        write_base(out, {"artifact": str(made["base"].path)})
        write_head(out, ["bad", "good"])


def save_adapter(model: Any, out: Path, tokenizer: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # LoRA's B is zero at first: the adapter would change nothing
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out / "adapter")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out / "adapter")


def spoil(path: Path, key: str, folder: Path) -> None:
    """As older versions of transformers left it."""
    path.write_text(json.dumps({**json.loads(path.read_text()), key: str(folder / "llama")}))


def facts_of(name: str, kind: str) -> dict[str, Any]:
    if kind == "evaluate":
        losses = {"base": 4.0, "sft": 3.25}
        told = {"set": "held", "perplexity": 9.0, "rows": 20}
        return {"results": [{"model": model, "loss": loss, **told} for model, loss in losses.items()]}
    own = FACTS.get(kind, {})
    if kind in ("dataset", "score", "select"):
        return own
    auto = {"learning_rate": {"value": 2e-3, "rule": "a small model from scratch"}} if name == "base" else {}
    return {**TRAINED, **own, "resolved": auto}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A finished run, whose second trial is the best. Nobody may change its artifacts."""
    bench = Bench(tmp_path_factory.mktemp("secret-place"))
    bench.log().begin().made(bench.experiment).search().found(best=1).end()
    return bench


IDS = torch.tensor([[3, 17, 4, 9, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def model_of(bench: Bench, name: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    experiment = bench.experiment if values is None else trial_experiment(bench.experiment, values)
    return {"artifact": str(bench.make(experiment)[name].path)}


# What is exported.


def test_best_trials_model_loads_without_tunery_and_has_the_same_logits(bench: Bench, tmp_path: Path) -> None:
    out = bench.export(tmp_path / "out")
    best = logits(load_model(model_of(bench, "sft", bench.values[1]), torch.float32))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), best)
    for other in (None, bench.values[0]):
        assert not torch.allclose(best, logits(load_model(model_of(bench, "sft", other), torch.float32)))


def test_tokenizer_comes_along_with_its_chat_template(bench: Bench, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.export(tmp_path / "out"))
    turns = [{"role": "user", "content": "why"}]
    assert "why" in tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("trial", [0, "file"])
def test_certain_trial_and_the_files_own_values(bench: Bench, tmp_path: Path, trial: int | str) -> None:
    asked, values = ("file", None) if trial == "file" else (bench.trials[0], bench.values[0])
    out = bench.export(tmp_path / "out", trial=asked)
    expected = load_model(model_of(bench, "sft", values), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))


def test_stage_that_no_search_touches_is_the_files(bench: Bench, tmp_path: Path) -> None:
    exported = export_model("small", tmp_path / "out", bench.store, stage="base")
    assert exported.target.trial is None
    assert exported.target.trained_with == ""
    expected = load_model(model_of(bench, "base"), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(expected))


def test_stage_behind_the_search_is_the_files_own_and_the_output_says_so(bench: Bench, tmp_path: Path) -> None:
    exported = export_model("small", tmp_path / "out", bench.store, stage="more")
    assert exported.target.artifact.path == Path(model_of(bench, "more")["artifact"])
    assert "no trial trained `more`" in render(exported)
    assert "the file's own values" in render(exported)


def test_run_without_a_search_gives_the_last_model_of_the_file(bench: Bench, tmp_path: Path) -> None:
    text = bench.file.read_text().split("search:")[0].replace("  hub:", "  last:")
    bench.log("plain").begin(text.replace("name: small", "name: plain")).made(bench.experiment)
    with pytest.raises(RequestError, match="`last` of the run `plain` isn't finished"):
        export_model("plain", tmp_path / "out", bench.store)
    assert export_model("plain", tmp_path / "out", bench.store, stage="rm").target.stage == "rm"


def test_run_is_named_by_its_folder_or_its_experiments_file(bench: Bench, tmp_path: Path) -> None:
    for number, run in enumerate((str(bench.store.run("small")), str(bench.file))):
        assert export_model(run, tmp_path / str(number), bench.store).target.trial.name == bench.trials[1]  # type: ignore[union-attr]


def test_moved_store_is_as_good(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(bench.store.root)
    out = tmp_path / "out"
    assert export_model(str(tmp_path / "elsewhere/runs/small"), out, Store(tmp_path)).out == out


def test_search_that_was_found_in_the_store_names_its_best_model(bench: Bench, tmp_path: Path) -> None:
    best = trial_experiment(bench.experiment, bench.values[0])
    prints = {name: artifact.fingerprint for name, artifact in bench.make(best).items()}
    bench.log("again").begin().made(bench.experiment).search(told=False).found(best=0, best_fingerprints=prints).end()
    for trial in (None, bench.trials[0]):
        exported = export_model("again", tmp_path / f"out-{trial}", bench.store, trial=trial)
        assert exported.target.artifact.fingerprint == prints["sft"]
    assert "another run" in refused(bench, tmp_path / "out", "again", trial=bench.trials[1]).cause
    bench.log("older").begin().made(bench.experiment).search(told=False).found(best=0).end()
    assert "another run" in refused(bench, tmp_path / "out", "older").cause


def test_what_trials_of_an_edited_file_made_is_not_mixed_up(bench: Bench, tmp_path: Path) -> None:
    edited = bench.experiment.model_copy(update={"seed": 6})
    other = bench.file.read_text().replace("seed: 5", "seed: 6")
    log = bench.log("edited").begin().made(bench.experiment).search().found(best=0)
    log.begin(other).made(trial_experiment(edited, bench.values[0]), bench.trials[0])
    log.begin("# only a comment\n" + bench.file.read_text()).made(bench.experiment).search(told=False).found(best=0)
    made = export_model("edited", tmp_path / "out", bench.store).target.artifact.path
    assert str(made) == model_of(bench, "sft", bench.values[0])["artifact"]


# Adapters.


def test_adapter_alone_lies_on_the_exported_base(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_model("small", tmp_path / "out", bench.store, adapter=True)
    assert exported.format.base_command == f"tunery export small ./base --stage base --trial {bench.trials[1]}"
    bench.export(tmp_path / "base", stage="base", trial=bench.trials[1])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)  # the base is named relative to where the adapter is loaded
    named = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), "out")
    merged = load_model(model_of(bench, "sft", bench.values[1]), torch.float32)
    assert torch.allclose(logits(model), logits(merged), atol=1e-5)


@pytest.mark.parametrize(("stage", "base", "revision"), [("local", "./llama", None), ("hub", "org/llama", "abc")])
def test_adapter_names_its_base_on_the_hub_or_the_folders_last_part(
    bench: Bench, tmp_path: Path, stage: str, base: str, revision: str | None
) -> None:
    out = bench.export(tmp_path / "out", stage=stage, adapter=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
    assert f'from_pretrained("{base}"' in (out / "README.md").read_text()


def test_model_on_a_folder_from_outside_is_merged(bench: Bench, tmp_path: Path) -> None:
    out = bench.export(tmp_path / "out", stage="local")
    expected = load_model(model_of(bench, "local"), torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))


# Classifiers.


def test_classifier_beside_an_adapter_is_exported_with_its_head(bench: Bench, tmp_path: Path) -> None:
    out = bench.export(tmp_path / "out", stage="judge")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    expected, _ = load_classifier(model_of(bench, "judge"), torch.float32)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert "1.5" in (out / "README.md").read_text()  # the temperature


def test_classifiers_adapter_loads_with_the_lines_of_its_card(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.export(tmp_path / "base", stage="base")
    out = bench.export(tmp_path / "out", stage="judge", adapter=True)
    monkeypatch.chdir(tmp_path)
    code = (out / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    expected, _ = load_classifier(model_of(bench, "judge"), torch.float32)
    assert torch.allclose(logits(names["model"]), logits(expected), atol=1e-5)


def test_reward_model_is_copied_and_its_scale_told(bench: Bench, tmp_path: Path) -> None:
    out = bench.export(tmp_path / "out", stage="rm")
    expected, _ = load_classifier(model_of(bench, "rm"), torch.float32)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(out)), logits(expected))
    assert "(output - 0.25) / 2" in (out / "README.md").read_text()


# The card and the lineage.


def front_matter(out: Path) -> dict[str, Any]:
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_front_matter_is_what_the_hub_reads(bench: Bench, tmp_path: Path) -> None:
    own = front_matter(bench.export(tmp_path / "own"))
    assert own == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunery", "sft", "lora"],
    }
    hub = front_matter(bench.export(tmp_path / "hub", stage="hub", adapter=True))
    assert (hub["library_name"], hub["base_model"]) == ("peft", "org/llama")
    judge = front_matter(bench.export(tmp_path / "judge", stage="judge"))
    assert judge["pipeline_tag"] == "text-classification"


def test_card_tells_question_training_data_scores_and_search(bench: Bench, tmp_path: Path) -> None:
    card = (bench.export(tmp_path / "out") / "README.md").read_text()
    for said in (
        "> Which learning rate is best?\n> And does it last?",
        f"It was trained by {bench.trials[1]}, the best trial.",
        "| learning_rate | 5e-3 |",
        "| tuner.lora.alpha | 4 (auto) |",
        "`rows` (dataset): 20 rows, 1 quarantined; source rows.jsonl, split all, limit 20",
        "`scored` (score of data `rows`): 20 rows, length median 4",
        "`clean` (select of data `scored`): kept 60%: 12 of 20; length range 1..9 (threshold 1.000 and 9.000) drops 8",
        "`base` (pretrain of data `rows`): loss 3.500",
        "| sft.learning_rate | choice [0.003, 0.005] | 5e-3 |",
        f"the best is {bench.trials[1]} with 5e-3",
        "| seed | 5 |",
    ):
        assert said in card
    assert "| held | 20 | 3.250 | 9.000 |" not in card  # that is of the file's own values
    own = (bench.export(tmp_path / "own", trial="file") / "README.md").read_text()
    assert "| held | 20 | 3.250 | 9.000 |" in own
    base = (bench.export(tmp_path / "base", stage="base") / "README.md").read_text()
    assert "| learning_rate | 2e-3 (auto: a small model from scratch) |" in base
    assert "## Hyperparameter search" not in base


def test_win_rates_that_name_the_model_are_told_from_both_sides(bench: Bench, tmp_path: Path) -> None:
    print_ = bench.make(bench.experiment)["more"].fingerprint
    result = {"set": "asked", "win_rate": 0.75, "interval": [0.6, 0.9], "rows": 8}
    for field, names, beaten in (("models.0", ["base", "more"], "base"), ("baseline", ["more", "hub"], "more")):
        out = bench.store.staging_dir("win_rate", field) / "out"
        out.mkdir(parents=True)
        facts = {"results": [{"model": names[1], "baseline": {"model": beaten}, **result}]}
        identity = {"names": [*names, "asked"], "judge": {"python": "/home/me/rate.py", "function": "rate"}}
        manifest = {"kind": "win_rate", "fingerprint": field, "identity": identity, "inputs": {field: print_}}
        bench.store.commit(out, {**manifest, "facts": facts}, {})
    card = (bench.export(tmp_path / "out", stage="more") / "README.md").read_text()
    assert "| **more** | base | asked (8) | rate.py | 0.750 | 0.600–0.900 |" in card
    assert "| hub | **more** | asked (8) | rate.py | 0.750 | 0.600–0.900 |" in card


def test_lineage_has_the_manifests_from_dataset_to_model(bench: Bench, tmp_path: Path) -> None:
    told = json.loads((bench.export(tmp_path / "out") / "lineage.json").read_text())
    assert [stage["stage"] for stage in told["stages"]] == ["rows", "scored", "clean", "held", "base", "sft"]
    assert told["overrides"] == bench.values[1]
    best = bench.make(trial_experiment(bench.experiment, bench.values[1]))["sft"]
    assert told["stages"][-1] == {"stage": "sft", **best.manifest}


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [(stage, False) for stage in ("base", "sft", "judge", "rm", "local")]
    + [(stage, True) for stage in ("sft", "judge", "local", "hub")],
)
def test_no_path_of_this_machine_and_no_row_is_in_any_file(
    bench: Bench, tmp_path: Path, stage: str, adapter: bool
) -> None:
    out = bench.export(tmp_path / "out", stage=stage, adapter=adapter)
    for path in out.iterdir():
        content = path.read_bytes().decode("utf-8", errors="replace")
        assert str(bench.folder) not in content, path
        assert str(tmp_path) not in content, path
        assert SECRET not in content, path


# What can't be exported.


def refused(bench: Bench, out: Path, run: str = "small", **asked: Any) -> RequestError:
    with pytest.raises(RequestError) as told:
        export_model(run, out, bench.store, **asked)
    assert told.value.remedy
    assert not out.is_dir() or not list(out.parent.glob(f".{out.name}*"))
    return told.value


@pytest.mark.parametrize(
    ("asked", "message", "remedy"),
    [
        ({"run": "smal"}, "there is no run `smal`", "small"),
        ({"stage": "stf"}, "no stage `stf`", "did you mean `sft`?"),
        ({"stage": "clean"}, "no stage `clean`", "known: base, sft"),
        ({"trial": "trial-nothing"}, "no trial `trial-nothing`", "trial-"),
        ({"stage": "base", "adapter": True}, "`base` has no adapter", "leave out --adapter"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    bench: Bench, tmp_path: Path, asked: dict[str, Any], message: str, remedy: str
) -> None:
    told = refused(bench, tmp_path / "out", **asked)
    assert message in told.message
    assert remedy in told.remedy


def test_trial_that_made_no_such_model_is_refused(bench: Bench, tmp_path: Path) -> None:
    for trial in bench.trials:  # the best one too: nobody asked for its own values
        told = refused(bench, tmp_path / "out", stage="more", trial=trial)
        assert "has no model `more`" in told.message
        assert "trials that have one: none" in told.remedy


def test_search_without_a_best_trial_is_refused_but_not_what_it_leaves_alone(bench: Bench, tmp_path: Path) -> None:
    log = bench.log("cut-off").begin().made(bench.experiment).search(("done", "stopped"))
    log.end("interrupted")
    told = refused(bench, tmp_path / "out", "cut-off")
    assert "no best trial yet" in told.message
    assert "1 of 2 trials are done" in told.cause
    stopped = refused(bench, tmp_path / "out", "cut-off", trial=bench.trials[1])
    assert "stopped" in stopped.cause
    assert bench.trials[0] in stopped.remedy
    for number, asked in enumerate(({"stage": "base"}, {"trial": "file"}, {"trial": bench.trials[0]})):
        bench.export(tmp_path / str(number), "cut-off", **asked)


def test_unfinished_model_and_run_that_told_nothing_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.log("half").begin().made(bench.experiment, without="more").end("failed")
    told = refused(bench, tmp_path / "out", "half", stage="more", trial="file")
    assert "`more` of the run `half` isn't finished" in told.message
    assert "the run is failed, the stage waiting" in told.cause
    (bench.store.run("empty") / "events").mkdir(parents=True)
    assert "has no model" in refused(bench, tmp_path / "out", "empty").message


def test_removed_artifacts_are_refused(bench: Bench, tmp_path: Path) -> None:
    experiment = bench.experiment.model_copy(update={"seed": 99})
    text = bench.file.read_text().replace("seed: 5", "seed: 99")
    bench.log("gone").begin(text).made(experiment)
    made = bench.make(experiment)
    for stage, removed, said in (
        ("more", "more", "the model of `more` is no longer"),
        ("judge", "base", "no longer exists"),
    ):
        made[removed].path.rename(tmp_path / removed)
        assert said in refused(bench, tmp_path / "out", "gone", stage=stage, trial="file").message


def test_edited_file_is_refused_and_its_runs_name_taken(bench: Bench, tmp_path: Path) -> None:
    edited = tmp_path / "small.yaml"
    edited.write_text(bench.file.read_text().replace("limit: 20", "limit: 10"))
    told = refused(bench, tmp_path / "out", str(edited))
    assert "edited since" in told.message
    assert "tunery run" in told.remedy


def not_empty(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").touch()


@pytest.mark.parametrize("occupy", [not_empty, Path.touch], ids=["not empty", "a file"])
def test_nothing_is_written_over(bench: Bench, tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "out")
    refused(bench, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_folder_and_folders_that_are_not_there_yet_are_taken(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert (bench.export(out, stage="base") / "model.safetensors").is_file()


@pytest.mark.parametrize("fails", ["card", "write_model"])
def test_failed_export_leaves_nothing_behind(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tunery.export.export_command, fails, fail)
    with pytest.raises(TuneryError, match="No space left") as told:
        export_model("small", tmp_path / "out", bench.store)
    assert told.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# The command.


def test_command_tells_json_or_words_and_ends_with_2_where_the_request_was_wrong(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tunery", "export", *words, "--store", str(bench.store.root)])
        cli.main()

    command("small", str(tmp_path / "out"), "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["stage"], told["trial"], told["form"]) == ("sft", bench.trials[1], "model")
    command("small", str(tmp_path / "adapter"), "--adapter")
    assert f"trained by {bench.trials[1]}, the best trial" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command("small", str(tmp_path / "out"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
