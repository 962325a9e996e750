# Two commands set everything up: `make demo` trains the sample, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow kills mutants bench prepare readme site clean
demo: $(VENV)/.installed
	PYTHONWARNINGS=ignore::FutureWarning $(BIN)/sesemi_imagewang --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests -m slow

# Runs that are killed at random moments; writes tests/results/kills.json
kills: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests/test_resume.py -m slow

# Does a test notice when the package is broken? Writes tests/results/mutants.json
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# How fast it is, against a plain loop; writes tests/benchmarks/results/bench. On a quiet machine; real images from SESEMI_TEST_DATA
bench: $(VENV)/.installed
	$(BIN)/python -W ignore tests/benchmarks/run.py $(BENCH)

# After editing notebooks: modules, clean notebooks, README
prepare: $(VENV)/.installed
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: $(VENV)/.installed
	$(BIN)/python tools/readme.py

# Pages in _docs, without Quarto. One notebook at a time: in parallel an error in one silently drops others
site: $(VENV)/.installed
	$(BIN)/python -m pip install -q 'smalldocs>=0.5'
	rm -rf _proc _docs
	$(BIN)/python -W ignore -c 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)'
	$(BIN)/smalldocs render -q _proc
	mv _proc/_site _docs

$(VENV)/.installed: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
