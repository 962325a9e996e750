"Each notebook is a test: all of its cells run, in one process"
from pathlib import Path
import pytest
from nbdev.test import test_nb as run_notebook
from fastai.torch_core import set_seed

nbs = sorted((Path(__file__).parent.parent/'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('path', nbs, ids=lambda o: o.stem)
def test_notebook(path, capfd):
    set_seed(0)
    ok,_ = run_notebook(path)
    assert ok, capfd.readouterr().err[-3000:]
