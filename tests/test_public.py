"What `import *` brings along: all of the public contract, and nothing that a notebook had already"
import builtins,importlib,keyword,pkgutil,subprocess,sys
import pytest
import fastai.vision.all as fastai_all
import sesemi_fastai,sesemi_fastai.all as ours

contract = '''PairedDataLoaders RotationPretext JigsawPretext EntropyMin PseudoLabel PiModel MeanTeacher VAT FixMatch BarlowTwins EMA NesterovSGD PolyWarmup
sesemi_learner rotations ResumeTraining sesemi_imagewang sesemi_doctor doctor BFloat16 BatchNormGroups BadImageError CheckpointError RunConfig train_run write_report'''.split()
modules = sorted(o.name for o in pkgutil.iter_modules(sesemi_fastai.__path__) if o.name not in ('all','_modidx'))

def test_the_contract_is_there():
    assert not set(contract)-set(ours.__all__) and len(set(ours.__all__))==len(ours.__all__)
    for o in ours.__all__: assert getattr(getattr(ours, o), '__module__', 'sesemi_fastai').startswith('sesemi_fastai'), f"{o} is another package's"

@pytest.mark.parametrize('start', ['from fastai.vision.all import *', 'from fastai.vision.all import *\nfrom fastai.callback.all import *\nfrom fastai.distributed import *\nfrom fastcore.all import *\nimport numpy as np,pandas as pd,torch\nfrom torch import nn\nfrom torchvision.models import *'])
def test_no_name_is_replaced(start):
    names = {}; exec(start, names); before = dict(names)
    exec('from sesemi_fastai.all import *', names)
    assert [k for k,v in before.items() if names[k] is not v and k!='__builtins__']==[]

def test_no_name_is_a_common_word():
    "One lower-case word would hide a notebook's own variable, or be hidden by it; the public contract has two"
    words = [o for o in ours.__all__ if o.isalpha() and o.islower()]
    assert set(words)<={'rotations','doctor'}
    taken = {*dir(builtins), *keyword.kwlist, *fastai_all.__dict__, *'main plan pool look counts opened formats finished load_image Picture recipes versions differences unpack printable seeded weak report Report Finding Look Html Crop'.split()}
    assert not taken&set(ours.__all__)

def test_nothing_of_fastai_is_changed_and_modules_can_be_reloaded():
    "In another process: fastai's classes keep their members; every module can be imported alone, and reloaded as autoreload does, after which a Learner still trains"
    code = f"""
import importlib,sys
from fastai.vision.all import *
from fastai.distributed import *
from fastai.test_utils import synth_learner
def members(): return {{f'{{c.__name__}}.{{k}}':v for c in (Learner,Recorder,DataLoaders,TfmdDL,Callback,DataLoader,Optimizer,OptimWrapper,Tensor,nn.Module) for k,v in vars(c).items()}}
before = members()
from sesemi_fastai.all import *
after = members()
print(sorted(k for k,v in before.items() if after[k] is not v), sorted(set(after)-set(before)), sep=',')
for _ in range(2):
    for m in {modules!r}: importlib.reload(importlib.import_module('sesemi_fastai.'+m))
    importlib.reload(sys.modules['sesemi_fastai.all'])
from sesemi_fastai.all import *
learn = synth_learner(); learn.opt_func = NesterovSGD
with learn.no_bar(), learn.no_logging(): learn.fit_poly_warmup(1, .01)
print(type(learn.summary()).__name__)
for m in {modules!r}:
    for o in [o for o in sys.modules if o.startswith('sesemi_fastai')]: del sys.modules[o]
    importlib.import_module('sesemi_fastai.'+m)"""
    r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-2000:]
    lines = r.stdout.splitlines(); changed,added = eval(lines[0])
    assert changed==[] and 'Learner.fit_poly_warmup' in added and set(added)<={'Learner.fit_poly_warmup','Learner.fit_cosine_warmup','Recorder.plot_objectives'}, (changed,added)
    assert lines[-1]=='PrettyString'

def test_callbacks_are_left_out_of_exports():
    "Each of the package: a Learner that has one is exported without it, and loads where the package isn't installed"
    ours_ = [o for m in modules for o in vars(importlib.import_module(f'sesemi_fastai.{m}')).values() if isinstance(o, type) and issubclass(o, fastai_all.Callback) and o.__module__.startswith('sesemi_fastai')]
    assert len(set(ours_))>20 and [o for o in ours_ if not issubclass(o, ours.TransientCallback)]==[]

def test_a_command_starts_without_torch():
    "So that an interrupt while torch is imported finds somebody who answers it"
    r = subprocess.run([sys.executable,'-c','import sys,sesemi_fastai.command; print([o for o in ("torch","fastai","numpy","matplotlib") if o in sys.modules])'], capture_output=True, text=True)
    assert r.stdout.strip()=='[]', r.stdout+r.stderr
