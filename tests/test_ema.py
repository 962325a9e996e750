"""`EMA` against a loop; what each way to end a fit leaves. A test's docstring says what is asserted."""
import pickle
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.callback.all import GradientAccumulation
from fastai.vision.all import (Callback,CancelEpochException,CancelFitException,CancelStepException,CancelTrainException,CancelBatchException,DataLoader,DataLoaders,
    Learner,OptimWrapper,ProgressCallback,SaveModelCallback,SGD,noop,partial)
from sesemi_fastai import ema as ema_module
from sesemi_fastai.ema import EMA,copy_model,plain_model

N = 25 # Batches an epoch
class Net(nn.Module):
    "BatchNorm, dropout, a tied weight, a frozen one, a buffer of whole numbers and one that isn't saved"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.drop,self.a,self.b = nn.Conv2d(1,4,3),nn.BatchNorm2d(4),nn.Dropout(.2),nn.Linear(4,4),nn.Linear(4,4)
        self.b.weight = self.a.weight
        self.b.bias.requires_grad_(False)
        self.register_buffer('count', torch.zeros((), dtype=torch.long)); self.register_buffer('scale', torch.ones(()), persistent=False)
    def forward(self, x):
        if self.training: self.count += 1; self.scale += .01
        return self.b(self.drop(self.a(self.bn(self.conv(x)).relu().mean((2,3)))))*self.scale

class Loss(nn.CrossEntropyLoss):
    "In the precision that fastai's Recorder can smooth"
    def forward(self, *args): return super().forward(*args).float()

def batches(n=4*N): g = torch.Generator().manual_seed(0); return torch.randn(n,1,6,6,generator=g).double(),torch.randint(4,(n,),generator=g)
def make(tmp_path, *cbs, opt_func=partial(SGD, mom=.9), skip=0, **kw):
    x,y = batches(); torch.manual_seed(0)
    dls = DataLoaders(DataLoader(TensorDataset(x[4*skip:],y[4*skip:]), bs=4, num_workers=0), DataLoader(TensorDataset(x[:8],y[:8]), bs=4, num_workers=0), device='cpu')
    learn = Learner(dls, Net().double(), loss_func=Loss(), opt_func=opt_func, path=tmp_path, model_dir='.', cbs=cbs, wd=0., **kw)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn
@pytest.fixture
def learner(tmp_path): return partial(make, tmp_path)

def tensors(m): return {k:v.detach().clone() for k,v in [*m.named_parameters(),*m.named_buffers()]}
def holds(m, weights): return all(torch.equal(weights[k], v) for k,v in m.state_dict().items() if k!='b.weight')   # but for the buffer that isn't saved
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a) and len(a)==len(b)
def close(a, b):
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-12, atol=1e-12)

class Watch(Callback):
    "Weights after each step, their average by a loop, and what validation sees; `decay` as in `EMA`"
    order,decay = 9,.95
    def before_train(self):
        if not hasattr(self,'avg'): self.avg,self.n,self.weights,self.valid,self.ids = tensors(self.model),0,[],[],[id(p) for p in self.model.parameters()]
    def after_cancel_step(self): self.skipped = True
    def after_step(self):
        if self.__dict__.pop('skipped', False): return
        d,new = min(self.decay, (1+self.n)/(10+self.n)),tensors(self.model)
        self.avg = {k:d*a+(1-d)*new[k] if a.is_floating_point() else new[k] for k,a in self.avg.items()}
        self.n += 1; self.weights.append(new)
    def before_validate(self): self.valid.append((tensors(self.model), self.avg))

class At(Callback):
    "Do `f(learn)` at an event of an epoch, and at a training step where it is one of a batch"
    run_valid = False
    def __init__(self, event, f, epoch=1, step=3, order=7): self.at,self.order = (epoch,step),order; setattr(self, event, partial(self._do, f))
    def _do(self, f):
        if (self.epoch, self.iter if self.training else 0)==(self.at[0], self.at[1] if self.training else 0): f(self.learn)
def throw(e):
    def f(learn): raise e
    return f

def test_fifty_steps(learner):
    "averages of weights and BatchNorm's buffers equal a loop's in double precision; validation and the end see them; training is bitwise that without EMA"
    learn,plain = learner(Watch()),learner(Watch())
    for o,cbs in ((learn,EMA(.95)),(plain,None)): torch.manual_seed(1); o.fit(2, .1, cbs=cbs)
    w = learn.watch
    assert w.n==2*N==50 and all(map(same, w.weights, plain.watch.weights))
    for seen,avg in w.valid: close(seen, avg)
    close(tensors(learn.model), w.avg)
    assert w.avg['bn.running_mean'].abs().sum()>0 and w.avg['count']==50 and not torch.equal(w.avg['conv.weight'], w.weights[-1]['conv.weight'])
    assert [id(p) for p in learn.model.parameters()]==w.ids and not hasattr(learn,'ema')
    assert all(torch.equal(a['grad_avg'], b['grad_avg']) for (a,b) in zip(*[[learn_.opt.state[p] for p in learn_.model.parameters() if p.requires_grad] for learn_ in (learn,plain)]))

def test_without_warmup(learner):
    "a constant share of .5 from the first step"
    seen = []
    learn = learner(At('after_step', lambda l: seen.append((tensors(l.model), tensors(l.ema.teacher))), epoch=0, step=0)); before = tensors(learn.model)
    learn.fit(1, .1, cbs=EMA(.5, warmup=False))
    (w,t), = seen; torch.testing.assert_close(t['conv.weight'], (before['conv.weight']+w['conv.weight'])/2, rtol=1e-12, atol=0)

def test_gradient_accumulation(learner):
    "steps that the optimizer takes count, batches that only add to gradients do not"
    learn = learner(Watch(), EMA(.95)); learn.fit(1, .1, cbs=GradientAccumulation(n_acc=12))
    assert learn.watch.n==N//3==learn.ema.n_updates
    close(tensors(learn.model), learn.watch.avg)

def test_skipped_step(learner):
    "mixed precision's way to skip a step: `before_step` raises `CancelStepException`"
    learn = learner(Watch(), EMA(.95), At('before_step', throw(CancelStepException()), epoch=0, order=10)); learn.fit(1, .1)
    assert learn.ema.n_updates==N-1==learn.watch.n
    # Buffers moved in the forward pass of the skipped step are averaged with the next one, as those of the loop
    close(tensors(learn.model), learn.watch.avg)

def test_teacher(learner):
    "in evaluation mode, without gradients, one module during a fit, equal to the averages; no hooks of others"
    class Hooked(Callback):
        def before_fit(self): self.handle = self.model.conv.register_forward_hook(self.hook)
        def hook(self, *args): pass
    seen = []
    learn = learner(Watch(), Hooked(), EMA(.95), At('after_batch', lambda l: seen.append((l.ema.teacher, l.ema.teacher.training)), epoch=0), At('after_batch', lambda l: seen.append((l.ema.teacher, l.ema.teacher.training))))
    learn.fit(2, .1)
    (a,ta),(b,tb) = seen
    assert a is b and not ta and not tb and not any(p.requires_grad for p in a.parameters()) and not a.conv._forward_hooks and learn.model.conv._forward_hooks
    assert a.b.weight is a.a.weight and learn.ema.teacher is None
    close(tensors(a), learn.watch.avg)

events = {'in training':('after_batch',KeyboardInterrupt), 'in validation':('after_validate',KeyboardInterrupt), 'an exception':('after_pred',ZeroDivisionError),
          'between steps':('after_backward',RuntimeError)}
@pytest.mark.parametrize('own', [False,True], ids=['fit(cbs=EMA())','of the Learner'])
@pytest.mark.parametrize('how', events)
def test_interrupted(learner, how, own):
    "averages are in the model, at once or for what runs next; then all works as after any fit"
    event,e = events[how]
    learn = learner(Watch(), *([EMA(.95)] if own else [])); at = At(event, throw(e('stop')))
    with pytest.raises(e): learn.fit(3, .1, cbs=[at, *([] if own else [EMA(.95)])])
    if own: learn.validate()
    assert learn.watch.n>=N and (not own or learn.ema.teacher is None)
    got,want = tensors(learn.model),learn.watch.avg
    close(got, want)
    learn.get_preds(); assert same(got, tensors(learn.model))
    del learn.watch.avg; learn.fit(1, .1, cbs=None if own else EMA(.95))     # begins anew, from the averages
    close(tensors(learn.model), learn.watch.avg)

@pytest.mark.parametrize('opt', [torch.optim.SGD,torch.optim.AdamW])
def test_interrupted_in_the_step(learner, opt):
    "where the optimizer is torch's own and Ctrl-C comes before its step is over, the averages of the steps before are in the model"
    learn,ema,then = learner(),EMA(.95),{}
    learn.opt_func = partial(OptimWrapper, opt=opt); learn.create_opt()
    def stop(*args):
        if ema.n_updates==4: then.update(avg=tensors(ema.teacher), raw=tensors(learn.model)); raise KeyboardInterrupt
    learn.opt.opt.register_step_post_hook(stop)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, .1, cbs=ema)
    assert same(tensors(learn.model), then['avg']) and not same(then['avg'], then['raw'])

def test_weights_loaded_after_an_interrupt_stay(learner):
    "an interrupted fit's averages don't replace weights that were changed since"
    learn = learner(EMA(.95)); first = tensors(learn.model); learn.save('first')
    for event in ('after_batch','after_validate'):
        with pytest.raises(KeyboardInterrupt): learn.fit(2, .1, cbs=At(event, throw(KeyboardInterrupt()), epoch=0))
        learn.load('first'); learn.validate()
        assert holds(learn.model, first)

@pytest.mark.parametrize('e', [CancelFitException,CancelEpochException,CancelTrainException,CancelBatchException], ids=lambda e: e.__name__)
def test_cancelled(learner, e):
    "whatever is cancelled, the epoch's end and the fit's end have the averages"
    class Ends(Callback):
        order = 60; seen = []
        def after_epoch(self): self.seen.append((tensors(self.model), self.learn.watch.avg))
    Ends.seen = []
    learn = learner(Watch(), Ends()); learn.fit(3, .1, cbs=[At('after_loss' if e is CancelBatchException else 'after_batch', throw(e())), EMA(.95)])
    assert len(Ends.seen)==(1 if e is CancelFitException else 3)
    for seen,avg in Ends.seen: close(seen, avg)
    close(tensors(learn.model), learn.watch.avg)

def test_save_model(learner):
    "`SaveModelCallback` saves averages, which a plain Learner loads; at the end it loads the best, and EMA leaves that"
    learn = learner(Watch()); learn.fit(3, .1, cbs=[EMA(.95), SaveModelCallback(every_epoch=True, fname='m')])
    for i,(seen,_) in enumerate(learn.watch.valid):
        fresh = learner().load(f'm_{i}'); assert holds(fresh.model, seen)
    learn = learner(Watch(), EMA(.95)); learn.fit(3, .1, cbs=SaveModelCallback(monitor='train_loss', fname='best', comp=lambda a,b: len(learn.watch.valid)==2))
    assert holds(learn.model, learn.watch.valid[1][0])

def test_fit_twice(learner):
    "the second fit begins with the first's averages, and a count of its own"
    learn = learner(Watch(), EMA(.95)); learn.fit(1, .1); first = tensors(learn.model); del learn.watch.avg
    learn.fit(1, .1, cbs=At('before_batch', lambda l: setattr(l, 'start', tensors(l.model)), epoch=0, step=0))
    assert same(first, learn.start) and learn.ema.n_updates==N
    close(tensors(learn.model), learn.watch.avg)

def test_two(learner):
    "two on one Learner: one sentence before the first step, and the Learner's own goes on, whose name fastai takes away with the other"
    learn = learner(Watch(), EMA(.95))
    with pytest.raises(ValueError, match='two EMA'): learn.fit(1, .1, cbs=EMA())
    learn.fit(1, .1); close(tensors(learn.model), learn.watch.avg)

def test_lr_find(learner):
    "no trace: weights, optimizer and averages as before"
    for cbs in ((), (EMA(.95),)):
        learn = learner(*cbs); before = learn.model.state_dict(); before = {k:v.clone() for k,v in before.items()}
        learn.lr_find(num_it=8, show_plot=False) if cbs else learn.fit(0)
        assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())
    assert learn.ema.teacher is None and not any('grad_avg' in o for o in learn.opt.state.values())

class Looks(Callback):
    "At an event of each epoch or training step, `validate` and `get_preds`, which end as a fit does; then training goes on where it was"
    order,run_valid = 55,False
    def __init__(self, event): self.busy,self.seen = False,[]; setattr(self, event, self.look)
    def before_validate(self):
        if self.busy: self.seen.append((tensors(self.model), self.learn.watch.avg))
    def look(self):
        if self.busy or not hasattr(self.learn.watch,'avg'): return   # no step was taken yet
        learn,rng = self.learn,torch.get_rng_state()
        self.busy,was = True,{k:getattr(learn,k) for k in ('training','epoch','iter','n_iter','dl') if hasattr(learn,k)}
        learn.validate(); learn.get_preds()
        for k,v in was.items(): setattr(learn, k, v)
        self.model.train(learn.training); torch.set_rng_state(rng); self.busy = False

@pytest.mark.parametrize('event', ['before_epoch','after_batch','after_train','after_epoch'])
def test_validated_within_a_fit(learner, event):
    "`validate` and `get_preds` by a callback: they see the averages, and training and averages go on as without them, bitwise"
    learn,plain = learner(Watch(), EMA(.95), Looks(event)),learner(Watch(), EMA(.95))
    for o in (learn,plain): torch.manual_seed(1); o.fit(2, .1)
    assert all(map(same, learn.watch.weights, plain.watch.weights)) and same(tensors(learn.model), tensors(plain.model)) and learn.watch.n==2*N
    assert len(learn.looks.seen)==dict(before_epoch=2, after_batch=4*N).get(event, 4)
    for seen in learn.looks.seen: close(*seen)

def test_outside_a_fit(learner):
    "validate and get_preds leave all as it is"
    learn = learner(EMA()); before = tensors(learn.model); learn.validate(); learn.get_preds(); assert same(before, tensors(learn.model)) and learn.ema.teacher is None

def test_export_and_copies(learner):
    "pickled as fastai's plain `Callback`, as in an export; a copy of a Learner averages on its own"
    learn = learner(EMA(.95)); learn.fit(1, .1); copy = deepcopy(learn)
    assert copy.ema.learn is copy and copy.ema is not learn.ema and copy.ema.decay==.95
    before = tensors(learn.model); copy.fit(1, .1); assert same(before, tensors(learn.model)) and not same(before, tensors(copy.model)) and copy.ema.n_updates==N
    data = pickle.dumps(learn.cbs); assert b'sesemi_fastai' not in data and type(pickle.loads(data)[-1]) is Callback

@pytest.mark.parametrize('where', ['in training','in validation','at an epoch\'s end'])
def test_state(learner, where):
    "state_dict: a fresh Learner goes on bitwise, with the checkpoint's weights, from a step or from validation, where the model holds the averages"
    opt = partial(SGD, mom=0.)
    def run(cbs, **kw): learn = learner(*cbs, opt_func=opt, **kw); learn.model.drop.p = 0.; return learn
    kept = {}
    def keep(l): kept.update(model=deepcopy(l.model.state_dict()), scale=l.model.scale.clone(), ema=l.ema.state_dict())
    at = dict(zip(('in training','in validation','at an epoch\'s end'), (('after_batch',0,9),('before_validate',0,0),('after_epoch',0,0))))[where]
    whole = run([EMA(.95), At(at[0], keep, at[1], at[2])]); whole.fit(2 if where!='in training' else 1, .1)
    assert (kept['ema']['weights'] is None)==(where=='in training')
    again = run([EMA(.95)], skip=10 if where=='in training' else 0)
    again.model.load_state_dict(kept['model']); again.model.scale.copy_(kept['scale']); again.ema.load_state_dict(pickle.loads(pickle.dumps(kept['ema'])))
    again.fit(1, .1)
    assert same(tensors(whole.model), tensors(again.model)) and again.ema.n_updates==whole.ema.n_updates

def test_state_of_another_model(learner):
    learn = learner(EMA()); learn.ema.load_state_dict(dict(n_updates=3, averages={'weight':torch.ones(1)}, weights=None))
    with pytest.raises(ValueError, match='they are of another one'): learn.fit(1, .1)
    learn = learner(EMA(), At('before_batch', lambda l: l.model.add_module('more', nn.Linear(1,1).double()), epoch=0))
    with pytest.raises(ValueError, match='The model got or lost more.bias, more.weight while'): learn.fit(1, .1)

def test_wrappers():
    "the plain model below compilation, which keeps it as `_orig_mod`"
    class Compiled(nn.Module):
        def __init__(self, m): super().__init__(); self._orig_mod = m
    m = Net(); assert plain_model(Compiled(m)) is m and type(copy_model(Compiled(m))) is Net

def test_buffers_are_the_first_processes(learner, monkeypatch):
    "two processes have BatchNorm statistics of their own: averaged are those of the first, everywhere"
    sent = []
    def broadcast(x, src): sent.append(x.clone()); x.fill_(7.)
    monkeypatch.setattr(ema_module, 'process_count', lambda: 2); monkeypatch.setattr(torch.distributed, 'broadcast', broadcast)
    learn = learner(EMA(0., warmup=False)); learn.fit(1, .1)
    assert len(sent)==N and (learn.model.bn.running_mean==7).all() and (learn.model.scale==7).all() and learn.model.count==N and not (learn.model.conv.weight==7).any()
    assert all(o.numel()==9 for o in sent)

def test_tensors_are_looked_for_once(learner, monkeypatch):
    "a step of the fit doesn't go through all modules; one that was replaced, added to both or removed from both is found all the same: averages equal a loop's"
    looks,steps = [],[]
    for o in ('named_parameters','parameters','named_buffers'):
        monkeypatch.setattr(Net, o, lambda self, *args, f=getattr(nn.Module,o), **kw: looks.append(1) or f(self, *args, **kw))
    class Looked(Callback):
        run_valid = False
        def __init__(self, order): self.order = order
        def after_step(self): steps.append(len(looks))
    learn = learner(); learn.fit(1, .1, cbs=[Looked(4),EMA(.95),Looked(6)]); assert sum(b-a for a,b in zip(steps[2::2], steps[3::2]))==0 and len(steps)==2*N
    monkeypatch.undo()
    def replace(learn):
        m = learn.model; m.bn.running_mean,m.scale = m.bn.running_mean+1,m.scale.clone(); m.b.bias = nn.Parameter(m.b.bias+1, requires_grad=False)
    def both(f):
        def g(learn): f(learn.model); f(learn.ema.teacher)
        return g
    grow = both(lambda m: setattr(m, 'more', nn.Linear(2,2).double())); shrink = both(lambda m: delattr(m, 'more'))
    learn = learner(Watch()); torch.manual_seed(1); learn.fit(1, .1, cbs=[EMA(.95), At('before_batch', replace, epoch=0)])
    for seen,avg in learn.watch.valid: close(seen, avg)
    learn = learner(); teachers = []
    learn.fit(1, .1, cbs=[EMA(.95), At('before_batch', grow, epoch=0), At('after_step', lambda learn: teachers.append((learn.ema.teacher.more.weight.clone(), learn.model.more.weight.clone(), learn.ema.decay_at(3))), epoch=0, order=9, step=3),
        At('before_step', lambda learn: teachers.insert(0, learn.ema.teacher.more.weight.clone()), epoch=0, step=3), At('before_batch', shrink, epoch=0, step=5)])
    was,(now,new,d) = teachers; torch.testing.assert_close(now, d*was+(1-d)*new); assert not hasattr(learn.model,'more')
