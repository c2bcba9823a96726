# `make demo` and `make test` are all a fresh machine needs: Python 3.11 to 3.13, make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STORE ?= .tunery
SPREAD := -n logical --maxprocesses 8

.PHONY: demo experiments test unit check format docs gpu faults constraints clean

demo: $(READY)  ## the main job: one experiment from raw rows to a compared and tracked result
	$(BIN)/tunery run experiments/quickstart.yaml --store $(STORE)

experiments: $(READY)  ## every experiment, one after another, in one store; prints a table of their results
	PYTHONPATH=platform $(BIN)/python experiments/run_all.py --store $(STORE)

test: $(READY)  ## all tests, with real Ray, DeepSpeed, TRL and W&B
	$(BIN)/python -m pytest $(SPREAD) tests/unit tests/test_architecture.py
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration

unit: $(READY)  ## the tests that start no Ray, in seconds
	$(BIN)/python -m pytest $(SPREAD) tests/unit tests/test_architecture.py

check: $(READY)  ## ruff, mypy, import-linter, and every experiment validates
	$(BIN)/ruff check platform tests benchmarks experiments cluster
	$(BIN)/ruff format --check platform tests benchmarks experiments cluster
	$(BIN)/mypy
	PYTHONPATH=platform $(BIN)/lint-imports
	for file in experiments/*.yaml; do $(BIN)/tunery validate $$file || exit 1; done

format: $(READY)
	$(BIN)/ruff format platform tests benchmarks experiments cluster
	$(BIN)/ruff check --fix platform tests benchmarks experiments cluster

docs: $(READY)  ## rebuild the generated pages of docs/
	PYTHONPATH=platform:tests/support $(BIN)/python tests/support/experiment_reference.py
	PYTHONPATH=platform:tests/support $(BIN)/python tests/support/template_table.py

gpu:  ## the quickstart on one GPU and on two, ZeRO-2 and ZeRO-3, beside the CPU; on a host that has tunery's packages
	$(PYTHON) benchmarks/gpu_matches_cpu.py

faults: $(READY)  ## what happens when workers, nodes, drivers and disks fail, on three nodes; as root also disks; about an hour
	PYTHONPATH=platform $(BIN)/python benchmarks/faults.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(READY)

constraints:  ## pin what is installed now
	(head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//; s/ @ file.*//' | sort -f) \
		> constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf .venv .tunery build *.egg-info platform/*.egg-info
