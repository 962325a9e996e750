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

def batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4*B,3,SIZE,SIZE,generator=g), torch.randint(CLASSES,(4*B,),generator=g), torch.randn(B,3,SIZE,SIZE,generator=g)) for _ in range(T)]

def reference_loop(arch, state, head_state, data):
    "The protocol: two forwards, labelled first, sum of the mean losses, torch's own Nesterov SGD on every parameter"
    net,head = arch(num_classes=CLASSES),None
    net.load_state_dict(state)
    head = nn.Linear(net.fc.in_features, 4); head.load_state_dict(head_state)
    fc,net.fc = net.fc,nn.Identity()
    params = [*net.parameters(), *fc.parameters(), *head.parameters()]
    opt = torch.optim.SGD(params, lr=1., momentum=.9, nesterov=True, weight_decay=5e-4, fused=True)
    net.train(); lrs = []
    for t,(x,y,u) in enumerate(data):
        views,targets = [],[]
        for image in u:
            for k in range(4):
                views.append(torch.rot90(image, k, dims=(1,2))); targets.append(k)
        loss = F.cross_entropy(fc(net(x)), y)
        loss = loss+F.cross_entropy(head(net(torch.stack(views))), torch.tensor(targets))
        opt.param_groups[0]['lr'] = reference_lr(t); lrs.append(reference_lr(t))
        opt.zero_grad(); loss.backward(); opt.step()
    net.fc = fc
    return net.state_dict(),head.state_dict(),lrs

class FixedBatches:
    "A loader that gives the batches it was given, `STEPS` an epoch"
    def __init__(self, batches, device='cpu'): self.batches,self.epoch,self.device = batches,0,torch.device(device)
    def __len__(self): return STEPS
    def __iter__(self):
        yield from self.batches[self.epoch*STEPS:(self.epoch+1)*STEPS]
    def to(self, device): pass

class SetEpoch(Callback):
    "Tells the loaders which epoch it is"
    order = -20
    def before_train(self):
        for o in self.dls.loaders: o.epoch = self.epoch

@pytest.fixture(scope='module', params=[(resnet18,'joint'), (resnet18,'sequential'), (resnet50,'joint')], ids=['resnet18-joint','resnet18-sequential','resnet50-joint'])
def both(request):
    torch.manual_seed(0)
    (arch,backward),data = request.param,batches()
    model = arch(num_classes=CLASSES); state = copy.deepcopy(model.state_dict())
    head = nn.Linear(model.fc.in_features, 4)
    class Rotations(RotationPretext):
        def make_heads(self, n_features, n_out): return dict(head=copy.deepcopy(head))
    cb = Rotations(backward=backward)
    dls = DataLoaders(FixedBatches([o[:2] for o in data]), FixedBatches([]), FixedBatches([o[2:] for o in data]))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, wd_bn_bias=True)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly_warmup(EPOCHS, .1, cbs=[SetEpoch(), cb])
    return reference_loop(arch, state, head.state_dict(), data), (learn.model.state_dict(), cb.fit_heads['head'].state_dict(), learn.recorder.hps['lr'])

def worst(a, b): return max((x.double()-y.double()).abs().max().item() for x,y in zip(a.values(), b.values()))

def test_weights_and_batchnorm_buffers(both):
    (net,head,_),(got,got_head,_) = both
    assert list(net)==list(got)
    print(worst(net, got), worst(head, got_head)); assert worst(net, got)==0. and worst(head, got_head)==0.

def test_learning_rates(both):
    (_,_,want),(_,_,got) = both
    assert len(want)==len(got)==T and max(abs(a-b) for a,b in zip(want, got))<1e-12
