"Strong views: a draw an image, by torch's generators alone; devices, types and formats stay; what they cost"
import random,time
import numpy as np,pytest,torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import v2
from fastai.vision.all import Normalize,RandomErasing,Rotate,TfmdDL,TensorImage,Transform,imagenet_stats
from sesemi_fastai.strong import *

mean,std = imagenet_stats
only = dict(max_rotate=0., max_shear=0., max_shift=0., max_lighting=0., max_hue=0., p_solarize=0., max_cover=0., p=1.)
def images(n=6, c=3, h=24, w=24): return torch.rand(n,c,h,w)

@pytest.mark.parametrize('c', [1,2,3,5])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16])
@pytest.mark.parametrize('last', [False,True])
def test_keeps_what_a_batch_is(c, dtype, last):
    "shape, type and memory format; the input itself is left alone; no NaN"
    x = torch.randn(4,c,16,20).to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format); before = x.clone()
    for f in (StrongAugment(), StrongAugment(mean=[.5]*c, std=[.2]*c)):
        with torch.autocast('cpu', torch.bfloat16): y = f(x)
        assert y.shape==x.shape and y.dtype==dtype and y.stride()==x.stride() and y.isfinite().all() and torch.equal(x, before) and type(y) is torch.Tensor

def test_one_draw_an_image():
    "equal images become different views; torch's seed gives them again; Python's and NumPy's generators have no part and aren't moved"
    x = images(1).repeat(16,1,1,1); f = StrongAugment(mean=mean, std=std)
    states = random.getstate(),np.random.get_state()[1].copy()
    torch.manual_seed(0); a = f(x)
    assert random.getstate()==states[0] and (np.random.get_state()[1]==states[1]).all()
    random.seed(5); torch.manual_seed(0); assert torch.equal(a, f(x)) and not torch.equal(a, f(x))
    assert len({o.numpy().tobytes() for o in a})==16

def test_nothing_by_nothing():
    "with no strength images stay as they are, in the normalised space"
    x = (images()-.45)/.22
    for f in (StrongAugment(**only), StrongAugment(**only, mean=[.45]*3, std=[.22]*3), StrongAugment(p=0., p_solarize=0.)): torch.testing.assert_close(f(x), x, rtol=0, atol=1e-4)

def test_shift():
    "a bright point moves by at most a share of the side, in both directions, differently in each image"
    x = torch.zeros(64,1,41,41); x[:,:,20,20] = 1.
    y = StrongAugment(**only|dict(max_shift=.25)).warp(x)[:,0]; at = torch.stack([y.sum((1,2)), (y.sum(2)*torch.arange(41)).sum(1)/y.sum((1,2))-20, (y.sum(1)*torch.arange(41)).sum(1)/y.sum((1,2))-20], 1)
    for d in (1,2): assert at[:,d].abs().max()<=.25*41+.6 and at[:,d].min()<-5 and at[:,d].max()>5

@pytest.mark.parametrize('h,w', [(41,41),(21,61)])
def test_rotation_is_one_of_pixels(h, w):
    "distances between points stay also in images that aren't square"
    x = torch.zeros(32,1,h,w); x[:,:,h//2,w//2-8] = 1.; x[:,:,h//2,w//2+8] = 1.
    y = StrongAugment(**only|dict(max_rotate=30.)).warp(x)[:,0]; seen = []
    for o in y:
        left,right = o.clone(),o.clone(); left[:,w//2:] = 0; right[:,:w//2+1] = 0
        c = lambda q: torch.stack([(q.sum(1)*torch.arange(h)).sum(), (q.sum(0)*torch.arange(w)).sum()])/q.sum()
        d = c(right)-c(left); assert d.norm()==pytest.approx(16, abs=.7); seen.append(torch.atan2(*d).item()*57.3)
    assert max(map(abs, seen))<=31 and max(seen)>12 and min(seen)<-12

def test_colours():
    "lighting, hue and solarisation change each image its own way, within black and white; a grey image gets no colours"
    x = images(12)
    for name,v in dict(max_lighting=.6, max_hue=.2, p_solarize=1.).items():
        y = StrongAugment(**only|{name:v}).recolour(x); change = (y-x).flatten(1).abs().mean(1)
        assert 0<=y.min() and y.max()<=1 and (change>1e-3).sum()>=9 and change.unique().numel()>=9, name
    grey = images(12,1).repeat(1,3,1,1); y = StrongAugment(mean=mean, std=std).recolour(grey)
    torch.testing.assert_close(y[:,0], y[:,1], rtol=0, atol=2e-5)

def test_cover():
    "a square of the mean colour, up to half the side, about anywhere; its share has the mean of the distribution"
    x = torch.ones(400,3,32,32); gone = StrongAugment(**only|dict(max_cover=.5)).cover(x)[:,0]==0
    for o in gone:
        r,c = o.any(1).sum(),o.any(0).sum(); assert o.sum()==r*c and r<=17 and c<=17
    assert .03<gone.float().mean()<.1 and gone.any(0).all()
    assert (StrongAugment(**only|dict(max_cover=.5, p=.5)).cover(x)[:,0]==0).flatten(1).any(1).float().mean()==pytest.approx(.5, abs=.1)

def test_equal_views():
    "equal settings: equal, one hash, one entry of a dictionary; a readable form"
    a,b,c = StrongAugment(mean=mean, std=std),StrongAugment(mean=torch.tensor(mean).double().round(decimals=3), std=std),StrongAugment(mean=mean, std=std, p=.4)
    assert a==b and hash(a)==hash(b) and len({a:1,b:2,c:3})==2 and 'max_rotate=30.0' in repr(a)
    t = v2.RandomHorizontalFlip(); assert as_strong([t])==as_strong(t)!=as_strong([v2.RandomHorizontalFlip()])
    with pytest.raises(ValueError, match='both mean and std'): StrongAugment(mean=mean)

def test_users_own():
    "torchvision's transforms and fastai's item by item, fastai's batch transforms as they are; in 0..1; erased after normalising; functions untouched"
    x = (images(8)-.45)/.22; dl = TfmdDL([TensorImage(x[0])], bs=1, after_batch=Normalize.from_stats([.45]*3, [.22]*3, cuda=False)); seen = []
    def look(o): seen.append((o.shape, o.min().item(), o.max().item())); return o
    y = as_strong([look, v2.RandomErasing(1., value=0), Rotate(20, p=1.)], [dl])(x)
    assert len(seen)==8 and all(s==(3,24,24) and -1e-6<=lo and hi<=1+1e-6 for s,lo,hi in seen) and (y!=x).flatten(1).any(1).all()
    f = as_strong(RandomErasing(p=1., sl=.1), [dl]); torch.manual_seed(0); a = f(x); random.seed(3); np.random.seed(3); state = random.getstate()
    torch.manual_seed(0); assert torch.equal(a, f(x)) and random.getstate()==state
    boxes = {tuple((o!=p).any(0).nonzero()[0].tolist()) for o,p in zip(a,x)}; assert len(boxes)>4
    assert (a-x)[a!=x].std()<1.8     # noise of deviation 1 in the normalised space
    dims = []
    class Dims(Transform):
        def encodes(self, o:TensorImage): dims.append(o.shape); return o
    as_strong(Dims(), [dl])(x); assert dims==[(1,3,24,24)]*8
    del seen[:]; as_strong([look], [dl])(9*x); assert all(-1e-6<=lo and hi<=1+1e-6 for _,lo,hi in seen)
    g = lambda o: o.flip(-1); assert as_strong(g) is g
    with pytest.raises(ValueError, match='must keep the size'): as_strong(v2.CenterCrop(8))(x)
    with pytest.raises(ValueError, match='no transform'): as_strong([3])

def test_cost():
    "a strong view of 32 images takes at most a tenth of a step of ResNet-18 on them and 32 labelled ones, at 64 pixels"
    m,x,f = resnet18(num_classes=10),torch.randn(32,3,64,64),StrongAugment(mean=mean, std=std)
    def seconds(g, n):
        ts = []
        for _ in range(n): t = time.perf_counter(); g(); ts.append(time.perf_counter()-t)
        return min(ts)
    f(x); step,strong = seconds(lambda: m(torch.cat([x,x])).sum().backward(), 1),seconds(lambda: f(x), 4)
    assert strong<.1*step, (strong,step)
