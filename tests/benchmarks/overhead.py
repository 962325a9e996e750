"What Learner and objectives add to forward, backward and step on tensors that are there already; strong views; and the optimizer's step alone"
import copy,functools,time
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18,resnet50
from fastai.vision.all import DataLoaders,Learner,OptimWrapper
from sesemi_fastai.all import *
from sesemi_fastai.losses import class_probs,entropy_loss,pseudo_label_loss
from common import *
from step import Timed,train,wait

class Ready:
    "Gives the same batch `n` times"
    def __init__(self, n, *batch): self.n,self.batch,self.device = n,batch,batch[0].device
    def __len__(self): return self.n
    def __iter__(self): return iter([self.batch]*self.n)
    def to(self, device): pass

def ready_batch(size, ubs, device='cpu'):
    "Labelled images and their classes, and a quarter as many unlabelled ones"
    torch.manual_seed(0)
    return [o.to(device) for o in (torch.randn(4*ubs,3,size,size), torch.randint(10,(4*ubs,)), torch.randn(ubs,3,size,size))]

def bare(net, fc, head, opt, x, y, u, n):
    "The same step, by hand"
    start = time.perf_counter()
    for _ in range(n):
        loss = F.cross_entropy(fc(net(x)), y)
        views = torch.stack([torch.rot90(u, k, (2,3)) for k in range(4)], 1).flatten(0,1)
        loss = loss+F.cross_entropy(head(net(views)), torch.arange(4, device=u.device).repeat(len(u)))
        opt.zero_grad(); loss.backward(); opt.step()
    wait()
    return time.perf_counter()-start

def step_overhead(arch, size, ubs, n, pairs, device='cpu'):
    "`n` steps of each, in turn; few, so that both meet the same moods of the machine"
    x,y,u = ready_batch(size, ubs, device)
    model = arch(num_classes=10).to(device)
    model.fc = nn.Sequential(nn.Dropout(.5), model.fc)
    net = copy.deepcopy(model); fc,net.fc = net.fc,nn.Identity()
    head = nn.Linear(fc[1].in_features, 4).to(device)
    opt = torch.optim.SGD([*net.parameters(), *fc.parameters(), *head.parameters()], lr=.001, momentum=.9, nesterov=True, weight_decay=5e-4, foreach=True)
    learn = Learner(DataLoaders(Ready(n, x, y), Ready(1, x, y), Ready(n, u), device=device), model, loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, wd_bn_bias=True, cbs=[StepSeed(),RotationPretext(),Timed()])
    net.train()
    t = rounds(dict(bare=functools.partial(bare, net, fc, head, opt, x, y, u, n), ours=functools.partial(train, learn, .001)), pairs)
    what = f'{arch.__name__}, {size} px, {4*ubs}+4×{ubs} images'
    return ratio(f'our overhead over the bare step: {what}', t['ours'], t['bare'], 1.03 if arch is not resnet10 else None, 's', 1/n),dict(what=what, steps=n, seconds=t)

def bare_three(net, fc, head, opt, strong, x, y, u, n):
    "Rotation, entropy and FixMatch by hand, in the same passes"
    start = time.perf_counter()
    for _ in range(n):
        loss = F.cross_entropy(fc(net(x)), y)
        out = fc(net(u))
        loss = loss+.1*entropy_loss(out)
        p = class_probs(out)
        loss = loss+pseudo_label_loss(fc(net(strong(u))), p, (p.amax(1)>=.95).float())
        views = torch.stack([torch.rot90(u, k, (2,3)) for k in range(4)], 1).flatten(0,1)
        loss = loss+F.cross_entropy(head(net(views)), torch.arange(4).repeat(len(u)))
        opt.zero_grad(); loss.backward(); opt.step()
    return time.perf_counter()-start

def objectives_overhead(arch, size, ubs, n, pairs):
    "The same for three objectives, and the time of a strong view as a share of a step of as many labelled and unlabelled images"
    torch.manual_seed(0)
    x,y,u = torch.randn(4*ubs,3,size,size),torch.randint(10,(4*ubs,)),torch.randn(ubs,3,size,size)
    model,strong = arch(num_classes=10),StrongAugment()
    net = copy.deepcopy(model); fc,net.fc = net.fc,nn.Identity()
    head = nn.Linear(fc.in_features, 4)
    opt = torch.optim.SGD([*net.parameters(), *fc.parameters(), *head.parameters()], lr=.001, momentum=.9, nesterov=True, weight_decay=5e-4, fused=True)
    cbs = [StepSeed(),RotationPretext(),EntropyMin(.1),FixMatch(strong=strong),Timed()]
    learn = Learner(DataLoaders(Ready(n, x, y), Ready(1, x, y), Ready(n, u), device='cpu'), model, loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, wd_bn_bias=True, cbs=cbs)
    net.train(); big = x if len(x)<=64 else x[:64]
    def step(): F.cross_entropy(fc(net(big)), y[:len(big)]).backward(); fc(net(big)).square().mean().backward()
    t = rounds(dict(bare=functools.partial(bare_three, net, fc, head, opt, strong, x, y, u, n), ours=functools.partial(train, learn, .001)), pairs)
    def view(): strong(big)
    s = rounds(dict(step=step, strong=view), pairs)
    what = f'{arch.__name__}, {size} px'
    rows = [ratio(f'overhead of three objectives over the bare passes: {what}, {4*ubs}+{ubs}+{ubs}+4×{ubs} images', t['ours'], t['bare'], 1.03, 's', 1/n),
            ratio(f'a strong view of {len(big)} images, of a step of {len(big)}+{len(big)}: {what}', s['strong'], s['step'], .1, 's')]
    return rows,dict(what=what, steps=n, seconds=t|s)

def optimizer_step(arch, n, s):
    "`torch.optim.SGD` in its three forms, and what becomes of the same weights"
    torch.manual_seed(0)
    model = arch(); grads = [torch.randn_like(p) for p in model.parameters()]
    def optimizer(**kw):
        m = copy.deepcopy(model); ps = list(m.parameters())
        for p,g in zip(ps, grads): p.grad = g.clone()
        return ps,torch.optim.SGD(ps, lr=1e-3, momentum=.9, nesterov=True, weight_decay=5e-4, **kw)
    forms = dict(loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
    opts = {k:optimizer(**kw) for k,kw in forms.items()}
    mine = NesterovSGD(optimizer()[0], lr=1e-3)
    def several(opt): [opt.step() for _ in range(n)]
    t = rounds({k:functools.partial(several, o[1]) for k,o in opts.items()}, s.rounds*2)
    worst = {k:max((a-b).abs().max().item() for a,b in zip(opts['loop'][0], opts[k][0])) for k in ('foreach','fused')}
    what = f'{arch.__name__}, {len(grads)} tensors'
    used = mine.opt.param_groups[0]
    rows = [ratio(f'optimizer step, {k} against for-loop: {what}', t[k], t['loop'], None, 'ms', 1000/n) for k in ('foreach','fused')]
    return rows,dict(what=what, steps=n, seconds=t, largest_difference=worst, used={k:used.get(k) for k in ('foreach','fused')})

def run(s):
    rows,raw = [],[]
    for case in ([(resnet10,32,2,2)] if s.quick else [(resnet18,64,32,1),(resnet10,32,8,10)]):
        row,r = step_overhead(*case, 1 if s.quick else 10*s.rounds); rows.append(row); raw.append(r)
    for case in ([(resnet10,32,2,2)] if s.quick else [(resnet18,64,16,3)]):
        more,r = objectives_overhead(*case, 1 if s.quick else 10*s.rounds); rows += more; raw.append(r)
    row,r = optimizer_step(*((resnet10,1) if s.quick else (resnet50,5)), s)
    return rows+row,raw+[r]
