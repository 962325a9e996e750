"Shared by all tests: no display, one thread, and real images where `SESEMI_TEST_DATA` names their folder"
import json,multiprocessing,os,subprocess,sys
os.environ.setdefault('MPLBACKEND','Agg')
os.environ.setdefault('OMP_NUM_THREADS','1')
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG',':4096:8')   # read at a process's first matrix product on a GPU, which may not be that of the test that needs it
from contextlib import contextmanager
from pathlib import Path
import numpy as np,pytest
from PIL import Image

def has_gpu():
    "Whether there is one; torch, which takes seconds, is imported by the tests themselves"
    import torch
    return torch.cuda.is_available()

def pytest_collection_modifyitems(config, items):
    "Without `-m`, tests that take minutes are left out, and those that need a GPU where there is none; with it the latter are skipped there"
    no_gpu = any('cuda' in o.keywords for o in items) and not has_gpu()
    if config.getoption('-m'):
        for o in items:
            if no_gpu and 'cuda' in o.keywords: o.add_marker(pytest.mark.skip(reason='there is no GPU'))
        return
    left_out = [o for o in items if 'slow' in o.keywords or (no_gpu and 'cuda' in o.keywords)]
    if left_out: config.hook.pytest_deselected(items=left_out)
    items[:] = [o for o in items if o not in left_out]

@pytest.fixture(scope='session')
def processes():
    "Processes by fork from one that has imported everything and has run nothing"
    here = Path(__file__).parent
    os.environ['PYTHONPATH'] = os.pathsep.join(map(str, filter(None, (here, here.parent, os.environ.get('PYTHONPATH')))))   # the server doesn't inherit sys.path
    ctx = multiprocessing.get_context('forkserver')   # of which Python has one: a second list would be ignored
    ctx.set_forkserver_preload(['killed','nbdev.test'])
    return ctx

@pytest.fixture(scope='session')
def real_data():
    "Folder of real image archives"
    path = os.environ.get('SESEMI_TEST_DATA')
    if not path: pytest.skip('SESEMI_TEST_DATA names no folder of real images')
    return Path(path)

@pytest.fixture
def folder(tmp_path):
    "A small folder in Imagewang's shape: two classes, one more in train, and unlabelled images"
    rng = np.random.default_rng(0)
    for nm,n in {'train/a':8,'train/b':8,'train/left':3,'val/a':4,'val/b':4,'unsup':12}.items():
        d = tmp_path/'data'/nm; d.mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0,256,(40,48,3),dtype=np.uint8)).save(d/f'{i}.png')
    return tmp_path/'data'

@pytest.fixture(scope='session')
def nobody():
    "A context: as a user whom permissions bind, also where tests run as root"
    @contextmanager
    def f():
        root = os.geteuid()==0
        if root: os.seteuid(65534)
        try: yield
        finally:
            if root: os.seteuid(0)
    return f

@pytest.fixture(scope='session')
def predict_alone():
    "What an exported Learner predicts for an image in a process that can't import this package; `check` is run there before that, or before it is loaded"
    def f(export, image, check='', before=False, **env):
        code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='sesemi_fastai': raise ImportError(name)
sys.meta_path.insert(0, Block())
from fastai.vision.all import *
{check if before else ''}
learn = load_learner({str(export)!r})
{'' if before else check}
print([*map(float, learn.predict({str(image)!r})[2])])
"""
        r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, env=os.environ|env)
        assert r.returncode==0, r.stderr
        return json.loads(r.stdout.strip().splitlines()[-1])
    return f
