"What can be known of a GPU without one: nothing of a step makes the host wait for the device"
import sys
from functools import partial
import pytest,torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.vision.all import Callback,CancelFitException,CrossEntropyLossFlat,Learner,ProgressCallback,noop
from fastai.callback.all import GradientAccumulation,GradientClip
import sesemi_fastai
from sesemi_fastai.all import EMA,EntropyMin,FixMatch,NesterovSGD,RotationPretext,StepSeed
from test_objectives import dls,family
from test_objectives_matrix import net

own = sesemi_fastai.__path__[0]
# operations whose result has a size or a value that the host must know, and copies to it
asking = {'_local_scalar_dense','nonzero','masked_select','equal','is_nonzero','unique_dim','_unique2','unique_consecutive'}
methods = 'tolist numpy cpu __array__ __bool__ __float__ __int__'.split()

def who():
    "Line of the package within a step that is being executed, if one is"
    f,line,step = sys._getframe(2),None,False
    while f is not None:
        if f.f_code.co_name=='do_item': return   # an image before it is in a batch is always the host's
        if line is None and f.f_code.co_filename.startswith(own): line = f'{f.f_code.co_filename[len(own)+1:]}:{f.f_lineno}'
        step,f = step or f.f_code.co_name=='_do_one_batch',f.f_back
    return line if step else None

class Waits(TorchDispatchMode):
    "Collects the lines at which the host would wait"
    def __init__(self): super().__init__(); self.lines,self.on = [],False
    def add(self, what):
        line = who()
        if self.on and line: self.lines.append(f'{what} at {line}')
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ('index','index_put','index_put_') and any(o is not None and o.dtype in (torch.bool,torch.uint8) for o in args[1])
        if name in asking or masked: self.add(name)
        return func(*args, **(kwargs or {}))

class FromTheSecond(Callback):
    "Counts from the second step of training on: the first prepares; without validation"
    order,run_valid = -100,False
    def before_batch(self): self.learn.waits.on = self.train_iter>0
    def after_epoch(self): raise CancelFitException

@pytest.fixture
def waits_of(monkeypatch, dls):
    def f(*cbs, opt_func=partial(NesterovSGD, mom=.9)):
        learn,w = Learner(dls, net(True), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, cbs=[StepSeed(), *cbs]),Waits()
        learn.remove_cb(ProgressCallback); learn.logger = noop
        with monkeypatch.context() as m, w:
            for k in methods:
                def asked(self, *args, _was=getattr(torch.Tensor, k), _k=k, **kw): w.add(_k); return _was(self, *args, **kw)
                m.setattr(torch.Tensor, k, asked)
            learn.waits = w; learn.add_cb(FromTheSecond()); learn.fit(1, .01)
        assert learn.train_iter>2
        return w.lines
    return f

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('name', family)
def test_no_objective_waits(waits_of, name, backward):
    "Losses, figures, thresholds, shares, averages and draws of a step stay on the device"
    assert waits_of(*family[name](backward=backward))==[]

def test_no_composition_waits(waits_of):
    "Three objectives with thresholds and shares that move, an average, accumulation and clipping"
    assert waits_of(RotationPretext(), EntropyMin(), FixMatch(weighting='free', align='labels'), EMA(), GradientAccumulation(16), GradientClip(1.))==[]

def test_waits_are_noticed(waits_of):
    "The test itself: an objective that asks for a value, in each way"
    class Asks(RotationPretext):
        def loss(self, batch):
            loss,figure = super().loss(batch); ask(loss, figure)
            return loss,figure
    for ask in (lambda l,f: l.item(), lambda l,f: float(l), lambda l,f: l.detach().cpu(), lambda l,f: f[f], lambda l,f: f.nonzero(), lambda l,f: l>0 and None, lambda l,f: f.tolist()):
        assert waits_of(Asks())!=[]
