# Two commands set everything up: `make demo` trains the sample, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PYTHON_GPU ?=

.PHONY: demo test slow kills mutants bench recipes gpu prepare readme site tutorials clean
# One thread: for a network this small a second one gains little, and where another program has the second core it only waits, at ten times the time
demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning $(BIN)/sesemi_imagewang --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n 2 --dist worksteal -q --disable-warnings tests

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests -m slow

# Runs that are killed at random moments; writes tests/results/kills.json
kills: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests/test_resume.py tests/test_objectives_resume.py -m slow

# Does a test notice when the package is broken? Writes tests/results/mutants.json
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# How fast it is, against a plain loop; writes tests/benchmarks/results/bench. On a quiet machine; real images from SESEMI_TEST_DATA
bench: $(VENV)/.installed
	$(BIN)/python -W ignore tests/benchmarks/run.py $(BENCH)

# What the parts of a recipe give at equal image passes, in hours; each run is kept as it ends. Needs Imagewang in SESEMI_TEST_DATA
recipes: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/benchmarks/recipes.py $(RECIPES)

# What a GPU alone can tell, in under ten minutes on one: writes tests/results/gpu.json, and its table. Real images from SESEMI_TEST_DATA.
# `make gpu PYTHON_GPU=python3` installs nothing: that Python has torch, torchvision, fastai and what they need, and pytest
gpu: $(if $(PYTHON_GPU),,$(VENV)/.installed)
	PYTHONPATH=. $(or $(PYTHON_GPU),$(BIN)/python) -W ignore tests/gpu.py $(GPU)

# After editing notebooks: modules, clean notebooks, README
prepare: $(VENV)/.installed
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: $(VENV)/.installed
	$(BIN)/python tools/readme.py

# Pages in _docs, checked; what is wrong with them is listed, and is an error
site: $(VENV)/.installed
	$(BIN)/python -W ignore tools/build_site.py

# Execute the pages that show outputs, and keep those
tutorials: $(VENV)/.installed
	$(BIN)/python -W ignore tools/tutorials.py $(PAGES)
	$(BIN)/nbdev-clean

$(VENV)/.installed: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
