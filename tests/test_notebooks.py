"Each notebook is a test: all of its cells run, in a fresh process, since its cells patch the package's classes with their own definitions"
import multiprocessing,os
from pathlib import Path
import pytest
from nbdev.test import test_nb as run_notebook
from fastai.torch_core import set_seed

nbs = sorted((Path(__file__).parent.parent/'nbs').glob('*.ipynb'))

def run(path, log):
    "In the new process: exit status 0 where all cells ran; what was printed is in `log`"
    with open(log,'w') as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)   # the default for what the notebook starts, not `forkserver`
    set_seed(0)
    os._exit(not run_notebook(path)[0])

@pytest.mark.parametrize('path', nbs, ids=lambda o: o.stem)
def test_notebook(processes, path, tmp_path):
    p = processes.Process(target=run, args=(path, tmp_path/'log'))
    p.start(); p.join()
    assert p.exitcode==0, (tmp_path/'log').read_text()[-3000:]
