"Ten steps of the Learner against ten steps of a plain PyTorch loop, written from the protocol alone"
import copy
import pytest,torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18,resnet50
from fastai.vision.all import Callback,DataLoaders,Learner
from sesemi_fastai.all import *

B,SIZE,CLASSES,STEPS,EPOCHS = 2,32,5,5,2
T = STEPS*EPOCHS

def reference_lr(t, b=.1, w=1e-3, W=T/8):
    return w+(b-w)*t/W if t<W else b*(1-(t-W)/(T-W))**.5

def batches(seed=0, device='cpu', b=B, size=SIZE):
    g = torch.Generator().manual_seed(seed)
    made = [(torch.randn(4*b,3,size,size,generator=g), torch.randint(CLASSES,(4*b,),generator=g), torch.randn(b,3,size,size,generator=g)) for _ in range(T)]
    return [tuple(o.to(device) for o in b) for b in made]

def named(net, head): return dict(net.named_parameters())|{f'head.{k}':p for k,p in head.named_parameters()}

def copied(net, head, *opts):
    "Weights and buffers of the network, those of the head, and the momentum of each parameter"
    momenta = {k:o.state[p]['momentum_buffer'].clone() for k,p in named(net, head).items() for o in opts if o.state.get(p, {}).get('momentum_buffer') is not None}
    return *({k:v.clone() for k,v in o.state_dict().items()} for o in (net, head)), momenta

def reference_loop(arch, state, head_state, data, half=None, overflow=(None,''), fused=True, lr=.1, starts=None, **scaler):
    """The protocol: two forwards, labelled first, sum of the mean losses, torch's own Nesterov SGD on every parameter; in autocast where `half` is a type, where gradients of `overflow`, a step and a parameter, become infinite.
    A step begins with what the one before it left, or, with `starts`, with its own, and what each of them leaves is noted"""
    net,head,device = arch(num_classes=CLASSES),None,data[0][0].device
    net.load_state_dict(state)
    head = nn.Linear(net.fc.in_features, 4); head.load_state_dict(head_state)
    net,head = net.to(device),head.to(device)
    body = nn.Sequential(*[*net.children()][:-1], nn.Flatten())
    opt = torch.optim.SGD(named(net, head).values(), lr=1., momentum=.9, nesterov=True, weight_decay=5e-4, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16, **scaler)
    net.train(); lrs,scales,ends = [],[],[]
    for t,(x,y,u) in enumerate(data):
        if starts is not None:
            net.load_state_dict(starts[t][0]); head.load_state_dict(starts[t][1])
            for k,p in named(net, head).items() if t else []: opt.state[p]['momentum_buffer'] = starts[t][2][k].clone()
        views,targets = [],[]
        for image in u:
            for k in range(4):
                views.append(torch.rot90(image, k, dims=(1,2))); targets.append(k)
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = F.cross_entropy(net.fc(body(x)), y)
            loss = loss+F.cross_entropy(head(body(torch.stack(views))), torch.tensor(targets, device=device))
        opt.param_groups[0]['lr'] = reference_lr(t, lr); lrs.append(reference_lr(t, lr))
        opt.zero_grad(); scaler.scale(loss).backward()
        if t==overflow[0]: dict(body=net.conv1, head=head)[overflow[1]].weight.grad.fill_(torch.inf)
        scaler.step(opt); scaler.update(); scales.append(scaler.get_scale())
        if starts is not None: ends.append(copied(net, head))
    return net.state_dict(),head.state_dict(),lrs,scales,ends

class FixedBatches:
    "A loader that gives the batches it was given, `STEPS` an epoch"
    def __init__(self, batches): self.batches,self.epoch,self.device = batches,0,batches[0][0].device if batches else torch.device('cpu')
    def __len__(self): return STEPS
    def __iter__(self):
        yield from self.batches[self.epoch*STEPS:(self.epoch+1)*STEPS]
    def to(self, device): pass

class SetEpoch(Callback):
    "Tells the loaders which epoch it is"
    order = -20
    def before_train(self):
        for o in self.dls.loaders: o.epoch = self.epoch

class Scales(Callback):
    "What the gradient scaler multiplies by after each step, and an overflow in one of them, between the backward pass and whoever looks at gradients first"
    order = 9
    def __init__(self, overflow=(None,'')): self.overflow,self.seen = overflow,[]
    def before_step(self):
        if self.train_iter==self.overflow[0]: dict(body=self.model.conv1, head=self.rotation.fit_heads['head'])[self.overflow[1]].weight.grad.fill_(torch.inf)
    def after_batch(self):
        if self.training and getattr(self.learn,'scaler',None): self.seen.append(self.learn.scaler.get_scale())

class EachStep(Callback):
    "What each step begins with, and what it leaves"
    order = 1000
    def before_fit(self): self.starts,self.ends = [],[]
    def now(self): return copied(self.model, self.rotation.fit_heads['head'], self.opt.opt, self.rotation.fit_opt.opt)
    def before_batch(self): self.training and self.starts.append(self.now())
    def after_batch(self): self.training and self.ends.append(self.now())

def both_loops(arch, backward, data, cbs=(), overflow=(None,''), lr=.1, each=False, **kw):
    "Weights, heads, rates and gradient scales of the plain loop, and of a Learner with `cbs` from the same ones, and the callback that noted each step, from whose beginning the plain loop goes if `each`"
    torch.manual_seed(0)
    model = arch(num_classes=CLASSES); state = copy.deepcopy(model.state_dict())
    head = nn.Linear(model.fc.in_features, 4)
    class Rotations(RotationPretext):
        def make_heads(self, n_features, n_out): return dict(head=copy.deepcopy(head))
    cb,scales,steps = Rotations(backward=backward),Scales(overflow),EachStep()
    dls = DataLoaders(FixedBatches([o[:2] for o in data]), FixedBatches([]), FixedBatches([o[2:] for o in data]), device=data[0][0].device)
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, wd_bn_bias=True)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly_warmup(EPOCHS, lr, cbs=[SetEpoch(), cb, scales, *([steps] if each else []), *cbs])
    return reference_loop(arch, state, head.state_dict(), data, overflow=overflow, lr=lr, starts=steps.starts if each else None, **kw), (learn.model.state_dict(), cb.fit_heads['head'].state_dict(), learn.recorder.hps['lr'], scales.seen), steps

@pytest.fixture(scope='module', params=[(resnet18,'joint'), (resnet18,'sequential'), (resnet50,'joint')], ids=['resnet18-joint','resnet18-sequential','resnet50-joint'])
def both(request): return both_loops(*request.param, batches())[:2]

def worst(a, b): return max((x.double()-y.double()).abs().max().item() for x,y in zip(a.values(), b.values()))

def test_weights_and_batchnorm_buffers(both):
    (net,head,*_),(got,got_head,*_) = both
    assert list(net)==list(got)
    print(worst(net, got), worst(head, got_head)); assert worst(net, got)==0. and worst(head, got_head)==0.

def test_learning_rates(both):
    (_,_,want,*_),(_,_,got,*_) = both
    assert len(want)==len(got)==T and max(abs(a-b) for a,b in zip(want, got))<1e-12
