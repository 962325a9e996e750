"""What `test_objectives_distributed.py` asserts, recorded by each of two processes, that are started from a fork server.
The network has BatchNorm, so that each process has statistics of its own; it has no dropout."""
import os,sys,traceback
from functools import partial
import torch
from torch import nn
from fastai.vision.all import Callback,ConvLayer,Learner,SGD,noop
from sesemi_fastai.all import StepSeed
from sesemi_fastai.distributed import on_processes
from test_objectives import family
from two_processes import data

STEPS = 3
def net():
    torch.manual_seed(0)
    return nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,2))

def copied(x):
    "A copy, detached"
    if isinstance(x, torch.Tensor): return x.detach().clone()
    return {k.removeprefix('module.'):copied(v) for k,v in x.items()} if isinstance(x, dict) else type(x)(map(copied, x)) if isinstance(x, (list,tuple)) else x

class Watch(Callback):
    "What goes into each training step, its gradients, and what is kept after it"
    order,run_valid = 100,False
    def before_fit(self): self.steps = []
    def before_batch(self): self.steps.append(dict(x=self.x.clone(), y=self.y.clone(), model=copied(self.model.state_dict())))
    def before_step(self):
        step,(o,) = self.learn.unlabeled_step,self.learn.unlabeled_step.objectives
        view = step._batch.views.get(o.views()[-1])
        ema = getattr(self.learn, 'ema', None)
        self.steps[-1].update(u=step._batch.x.clone(), view=copied(view), heads=copied(o.state_dict()['heads']), grads={n.removeprefix('module.'):p.grad.clone() for n,p in self.model.named_parameters()},
            head_grads={n:p.grad.clone() for n,p in o.fit_heads.named_parameters()}, teacher=ema and copied(dict(ema.teacher.state_dict())))
    def after_batch(self):
        o,ema = self.learn.unlabeled_step.objectives[0],getattr(self.learn, 'ema', None)
        self.steps[-1].update(loss=self.learn.unlabeled_step._last[o.name].item(), after=copied(self.model.state_dict()), state=copied(o.state_dict()), ema=ema and copied(ema.state_dict()))

def fit(name, backward):
    dls = data(4, 4, n_steps=STEPS)
    learn = Learner(dls, net(), loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), cbs=[*family[name](backward=backward), Watch(), StepSeed()])
    learn.logger = noop
    with on_processes(learn), learn.no_bar(): learn.fit(2, .1)
    return dict(steps=learn.watch.steps, columns=[list(o) for o in learn.recorder.values], end=copied(learn.model.state_dict()))

def record(out, rank, port):
    "All objectives, one after the other"
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f'{out}/log-{rank}', 'w')
    try: res = {(n,b):fit(n, b) for n in family for b in ('joint','sequential')}
    except BaseException: traceback.print_exc(); raise
    torch.save(res, f'{out}/rank-{rank}.pt')
    torch.distributed.destroy_process_group()
