"What can be known of a GPU without one: everything of a step is on it, and nothing makes the host wait for it"
import sys
from contextlib import nullcontext
from functools import partial
import pytest,torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from types import SimpleNamespace
from fastai.vision.all import Callback,CancelFitException,CrossEntropyLossFlat,Learner,ProgressCallback,imagenet_stats,noop
from fastai.callback.all import GradientAccumulation,GradientClip
import sesemi_fastai
from sesemi_fastai.all import EMA,EntropyMin,FixMatch,NesterovSGD,RotationPretext,StepSeed,StrongAugment,UnlabeledObjective
from sesemi_fastai.augment import DevelopCrops
from sesemi_fastai.features import find_feature_layer
from sesemi_fastai.health import ObjectiveHealth
from sesemi_fastai.objective import BoundBatch
from sesemi_fastai.passes import UnlabeledBatch,feature_pass
from test_objectives import dls,family
from test_objectives_matrix import net

own = sesemi_fastai.__path__[0]
# operations whose result has a size or a value that the host must know, and copies to it
asking = {'_local_scalar_dense','bincount','nonzero','masked_select','equal','is_nonzero','unique_dim','_unique2','unique_consecutive'}
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


class Copies(TorchDispatchMode):
    "Collects the lines at which something is copied to or from the device and waited for"
    def __init__(self): super().__init__(); self.lines = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__=='_to_copy' and args[0].device.type!=res.device.type and not kwargs.get('non_blocking'):
            f = sys._getframe(1)
            while f is not None and not f.f_code.co_filename.startswith(own): f = f.f_back
            self.lines.append(f and f'{f.f_code.co_filename[len(own)+1:]}:{f.f_lineno}')
        return res

def no_autocast(monkeypatch):
    "`meta` is a device that it doesn't know"
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *args: False)

def images(device): return torch.empty(6, 3, 32, 32, device=device)
def mirrored(x): return x.flip(3)   # fastai's classes of images can't be fake

def seen(name, device):
    "An objective that knows its data"
    *_,o = sorted(family[name](), key=lambda o: isinstance(o, UnlabeledObjective))
    object.__setattr__(o, '_learn', SimpleNamespace(dls=SimpleNamespace(train=SimpleNamespace(dataset=SimpleNamespace(tls=[[0,1,1]])), vocab=['a','b'])))
    if hasattr(o,'strong_view'): o.strong_view = mirrored
    o.kept = o.make_kept('single', 2, torch.device(device))
    return o

def step_of(o, device):
    "Its heads and state beside a model, all made on `device`, and a step's batch"
    with torch.device(device): model,o.fit_heads = net(True),nn.ModuleDict(o.make_heads(16, 2))
    return UnlabeledBatch(images(device), feature_pass(model, find_feature_layer(model, images(device))), differentiated={(v,o.bn,o.backward):{'classes','features'} for v in o.views()}, teacher=model)

# VAT differentiates within its view, which fake tensors can't without CUDA, and `meta` can
@pytest.mark.parametrize('name,device', [(o,'meta' if o=='vat' else 'cuda') for o in family])
def test_losses_on_a_fake_gpu(name, device, monkeypatch):
    "Views, heads, losses, thresholds and shares of two steps, and what watches over them"
    if device=='meta': no_autocast(monkeypatch)
    o = seen(name, device); health = ObjectiveHealth(o)
    def step(batch):
        bound = BoundBatch(batch, o); loss,figure = o.loss(bound)
        health.add(loss, figure, None if bound.outputs is None else bound.outputs.detach(), torch.empty(4, device=device, dtype=torch.long))
        return loss,figure
    with FakeTensorMode(allow_non_fake_inputs=True) if device=='cuda' else nullcontext(), torch.no_grad():
        batch = step_of(o, device); step(batch)   # the first makes what is kept
        with Copies() as c: loss,figure = step(batch)
    assert c.lines==[] and loss.device.type==figure.device.type==device

def test_crops_on_a_fake_gpu():
    "The batch augmentation: one small copy, of the table, that isn't waited for"
    table = [(20+i,30,1.2,i%2) for i in range(4)]
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as c:
        dev = DevelopCrops(torch.zeros(1,3,1,1, device='cuda'), torch.ones(1,3,1,1, device='cuda'), size=16)
        res = dev.at_once(torch.empty(sum(3*h*w for h,w,*_ in table), dtype=torch.uint8, device='cuda'), table)
    assert c.lines==[] and res.device.type=='cuda'

def test_strong_views_on_no_device(monkeypatch):
    "On `meta`, which has no values either, but takes fastai's classes"
    no_autocast(monkeypatch)
    def tensor(*args, _was=torch.tensor, **kwargs): assert kwargs.get('device') is None; return _was(*args, **kwargs)   # a copy that is waited for, and that no dispatch shows for `meta`
    monkeypatch.setattr(torch, 'tensor', tensor)
    x = torch.empty(4,3,32,32, device='meta')
    for strong in (StrongAugment(mean=imagenet_stats[0], std=imagenet_stats[1]),StrongAugment()):
        with Copies() as c: res = strong(x)
        assert c.lines==[] and res.device.type=='meta' and res.shape==x.shape
