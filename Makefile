# Two commands set everything up: `make demo` trains the sample, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow prepare clean
demo: $(VENV)/.installed
	PYTHONWARNINGS=ignore::FutureWarning $(BIN)/sesemi_imagewang --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q --disable-warnings tests -m slow

# After editing notebooks: modules, clean notebooks, README
prepare: $(VENV)/.installed
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

$(VENV)/.installed: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
