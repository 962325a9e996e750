"""What `test_distributed.py` asserts, recorded by each of two processes: `accelerate launch --cpu --num_processes 2 tests/two_processes.py FOLDER`.
An image's first pixel is a hundredth of its number, and nothing is augmented, so that a batch tells which images are in it."""
import collections,sys
from functools import partial
import torch
from torch import nn
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.vision.all import Callback,Datasets,Learner,Normalize,SGD,Transform,accuracy,noop,rank_distrib
from sesemi_fastai.all import PairedDataLoaders,ResumeTraining,RotationPretext,StepSeed,local_first,max_over_processes
from sesemi_fastai.run import StopDiverged

class Paint(Transform):
    def encodes(self, i:int):
        x = torch.randn(3,8,8, generator=torch.Generator().manual_seed(i)); x[0,0,0] = i/100
        return x
class Label(Transform):
    def encodes(self, i:int): return i%2

def data(bs, unlabeled_bs, seed=0, n_valid=8, device='cpu', **kw):
    "30 labelled images and 26 unlabelled, which begin at 100"
    dsets = Datasets([*range(30), *range(50,50+n_valid)], [[Paint()],[Label()]], splits=[range(30), range(30,30+n_valid)])
    dls = dsets.dataloaders(bs=bs, val_bs=3, num_workers=0, device=device)
    return PairedDataLoaders.from_dls(dls, range(100,126), unlabeled_bs=unlabeled_bs, seed=seed, **kw)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,2), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,2))

class Watch(Callback):
    "What goes in and comes out of each training step"
    order = 100
    def before_fit(self): self.steps = []
    def _heads(self, f=lambda p: p): return {f'rotation.{n}':f(p).detach().clone() for n,p in self.rotation.fit_heads.named_parameters() if f(p) is not None}
    def _state(self): return {k.removeprefix('module.'):v.clone() for k,v in self.model.state_dict().items()}|self._heads()
    def before_batch(self):
        if self.training: self.steps.append(dict(x=self.x.clone(), y=self.y.clone(), before=self._state(), noise=torch.rand(1).item(), n_iter=self.n_iter))
    def before_step(self): self.steps[-1]['grads'] = {n.removeprefix('module.'):p.grad.clone() for n,p in self.model.named_parameters()}|self._heads(lambda p: p.grad)
    def after_loss(self):
        if self.training: self.steps[-1]['u'] = self.unlabeled_step._batch.x.clone()
    def after_batch(self):
        if self.training: self.steps[-1].update(after=self._state(), pretext=self.unlabeled_step._last.get('rotation',torch.zeros(())).item())

class Nan(Callback):
    "A pretext loss that isn't finite, in the second process alone"
    order = 4.5
    def after_batch(self):
        if self.training and self.iter==1 and rank_distrib(): self.unlabeled_step._last['rotation'].fill_(float('nan'))

def learner(dls, *cbs, **kw):
    learn = Learner(dls, net(), loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), metrics=accuracy, cbs=[RotationPretext(**kw), Watch(), StepSeed(), *cbs])
    learn.logger = noop
    return learn

def fit(learn, epochs=1, **kw):
    with learn.distrib_ctx(sync_bn=False, cpu=True, **kw), learn.no_bar(): learn.fit(epochs, .1)
    names,values = learn.recorder.metric_names,learn.recorder.values
    return dict(steps=learn.watch.steps, columns=[dict(zip(names[1:], o)) for o in values], steps_done=len(learn.recorder.losses))

class Messages(Callback):
    "Counts what Python asks of `torch.distributed` from the second training step on; what the wrapper of the model sends isn't among it"
    order = 2_000_000
    def before_fit(self):
        self.counts,self.was = collections.Counter(),{k:getattr(torch.distributed,k) for k in ('all_reduce','all_gather_object','broadcast','broadcast_object_list')}
        for k,f in self.was.items(): setattr(torch.distributed, k, partial(self.counted, k, f))
    def counted(self, k, f, *args, **kwargs):
        self.counts[k] += 1
        return f(*args, **kwargs)
    def before_batch(self):
        if self.training and self.iter==1: self.counts.clear()
    def after_train(self): self.per_step = {k:n/(self.n_iter-1) for k,n in self.counts.items()}
    def after_fit(self):
        for k,f in self.was.items(): setattr(torch.distributed, k, f)

def error(f):
    try: f()
    except ValueError as e: return str(e)

if __name__=='__main__':
    from accelerate import DistributedDataParallelKwargs
    from fastai.distributed import *
    from fastai.vision.all import TerminateOnNaNCallback
    rank,facts = rank_distrib(),{}
    local_first(noop)
    facts['largest'] = max_over_processes(rank, 1-rank, False)
    for backward in ('joint','sequential'):
        learn = learner(data(4,2), Messages(), StopDiverged(), ResumeTraining(f'{sys.argv[1]}/resume-{backward}'), backward=backward); fit(learn); facts['messages '+backward] = learn.messages.per_step
    for backward in ('joint','sequential'):
        facts[backward] = fit(learner(data(4,2), backward=backward), 2)
        facts[backward+' accumulated'] = fit(learner(data(4,2), GradientAccumulation(8), GradientClip(.05), backward=backward))
    for backward in ('joint','sequential'): facts['late '+backward] = fit(learner(data(4,2), backward=backward, start_pct=.5), 2)
    dls = data(4,2); learn = learner(dls); facts['loaders left'] = fit(learn) and [o is p for o,p in zip(dls.loaders, learn.dls.loaders)]
    facts['loaders left'].append(type(learn.model) is nn.Sequential)
    torch.manual_seed(rank)                                            # of what is drawn with seed=None
    learn = learner(data(4,2,seed=None,n_valid=7)); own = learn.dls.train.seed
    facts['no seed'] = fit(learn)|dict(own=own, seeds=[o.seed for o in learn.dls.loaders[::2]])
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar():
        facts['preds'] = [learn.get_preds(ds_idx=i) for i in range(2)]
    facts['model'] = learn.model.state_dict()
    facts['nan'] = fit(learner(data(4,2), Nan(), TerminateOnNaNCallback()))['steps_done']
    for backward in ('joint','sequential'): facts['unused '+backward] = fit(learner(data(4,2), backward=backward), 2, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    dls = data(4,2); dls.train.bs = 16
    facts['too few'] = error(lambda: fit(learner(dls)))
    torch.save(facts, f'{sys.argv[1]}/rank-{rank}.pt')
    torch.distributed.destroy_process_group()
