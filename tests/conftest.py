"Shared by all tests: no display, one thread, and real images where `SESEMI_TEST_DATA` names their folder"
import json,os,subprocess,sys
os.environ.setdefault('MPLBACKEND','Agg')
os.environ.setdefault('OMP_NUM_THREADS','1')
from pathlib import Path
import numpy as np,pytest
from PIL import Image

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; run with `make slow`')

def pytest_collection_modifyitems(config, items):
    if config.getoption('-m'): return
    slow = [o for o in items if 'slow' in o.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [o for o in items if o not in slow]

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
def predict_alone():
    "What an exported Learner predicts for an image in a process that can't import this package; `check` is run there before that, or before it is loaded"
    def f(export, image, check='', before=False):
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
        r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
        assert r.returncode==0, r.stderr
        return json.loads(r.stdout.strip().splitlines()[-1])
    return f
