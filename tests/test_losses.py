"""Losses and weightings against formulas that are written out here in Python loops, in double precision. Gradients of these are taken by complex steps,
f'(x) = Im f(x+ih)/h, which are exact to rounding; sizes and signs are compared by real parts."""
import cmath,itertools,math,threading
import numpy as np,pytest,torch
from torch import nn
from sesemi_fastai.losses import *
from sesemi_fastai.weighting import *

# Formulas

def log_probs(z, task):
    "Logarithms of each decision's outcomes: of one for 'single', of one a class, absent and present, for 'multi'"
    if task=='single':
        m = max(o.real for o in z); lse = m+cmath.log(sum(cmath.exp(o-m) for o in z))
        return [[o-lse for o in z]]
    f = lambda o: -cmath.log(1+cmath.exp(-o)) if o.real>=0 else o-cmath.log(1+cmath.exp(o))
    return [[f(-o),f(o)] for o in z]
def decisions(z, task): return [d for row in z for d in log_probs(row, task)]
def mean(xs): return sum(xs)/len(xs)
def first_largest(xs): return max(range(len(xs)), key=lambda i: (xs[i].real,-i))
def entropy(z, task): return mean([-sum(cmath.exp(l)*l for l in d) for d in decisions(z, task)])
def pseudo(z, target, w, task, hard):
    return mean([wi*(-d[first_largest(t)] if hard else -sum(a*b for a,b in zip(t,d))) for d,t,wi in zip(decisions(z, task), target, w)])
def squared(z, target, task):
    if task=='regression': a,b = sum(z,[]),sum(target,[])
    else: a,b = [[cmath.exp(l) for d in decisions(o, task) for l in (d if task=='single' else d[1:])] for o in (z,target)]
    return mean([(o-t.real)**2 for o,t in zip(a,b)])
def divergence(target, z, task):
    return mean([sum(math.exp(a.real)*(a.real-b) for a,b in zip(t,d)) for t,d in zip(decisions(target, task), decisions(z, task))])
def barlow(z1, z2, lam, eps):
    def standard(z):
        cols = []
        for c in zip(*z):
            m = mean(c); v = mean([(o-m)**2 for o in c])
            cols.append([(o-m)/cmath.sqrt(v+eps) for o in c])
        return cols
    a,b = standard(z1),standard(z2)
    C = [[mean([p*q for p,q in zip(x,y)]) for y in b] for x in a]
    return sum((1-C[i][i])**2 if i==j else lam*C[i][j]**2 for i in range(len(a)) for j in range(len(a)))
def fairness(z, kept, shares, counts, task):
    n = len(log_probs(z[0], task)); tot = 0
    for k in range(n):
        rows = [decisions([row], task)[k] for row,w in zip(z,kept) if w[k]>0]
        if not rows: continue
        ps = [[cmath.exp(l) for l in r] for r in rows]; h = [0]*len(ps[0])
        for p in ps: h[first_largest(p)] += 1
        a = [s/c if c>0 else 0 for s,c in zip(shares[k],counts[k])]
        b = [sum(p[j] for p in ps)/h[j] if h[j] else 0 for j in range(len(h))]
        tot = tot+sum(x/sum(a)*cmath.log(y/sum(b)+1e-12) for x,y in zip(a,b))
    return tot/n

def gradient(f, x, h=1e-30):
    g = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        z = x.astype(complex); z[i] += 1j*h
        g[i] = f(z.tolist()).imag/h
    return g

def compare(ours, formula, x):
    "Value and gradient at `x`"
    t = torch.tensor(x, requires_grad=True); loss = ours(t); loss.backward()
    assert loss.dtype==torch.float64 and loss.ndim==0
    np.testing.assert_allclose(loss.item(), complex(formula(x.astype(complex).tolist())).real, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(t.grad.numpy(), gradient(formula, x), rtol=1e-12, atol=1e-10)
    return loss.item(),t.grad

rng = np.random.default_rng(0)
inputs = {
    'random': rng.normal(0,3,(6,4)),
    'ties': np.array([[1.,1,1,1],[2,2,0,0],[0,0,0,0],[-1,3,3,-1]]),
    'extreme': np.array([[1e4,-1e4,0,1],[-1e4,-1e4,-1e4,-1e4],[1e4,1e4,-1e4,0],[1e4,9990,1,2]]),
    'one image': rng.normal(0,1,(1,4)),
}
both = pytest.mark.parametrize('task', ['single','multi'])
each = pytest.mark.parametrize('x', inputs.values(), ids=inputs)
other = lambda x: np.roll(x, 1, 1)*.7+rng.normal(0,.1,x.shape)
def probs(x, task): return [[math.exp(l.real) for l in d] for d in decisions(x.tolist(), task)]

# Losses

@both
@each
def test_probabilities(x, task):
    "softmax and sigmoids; no gradient in a target"
    t = torch.tensor(x, requires_grad=True); p = class_probs(t, task)
    np.testing.assert_allclose(p.reshape(-1, p.shape[-1]), probs(x, task), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(class_log_probs(t, task).detach().reshape(-1, p.shape[-1]), [[l.real for l in d] for d in decisions(x.tolist(), task)], rtol=1e-12, atol=1e-12)
    assert not p.requires_grad and p.shape==((len(x),4) if task=='single' else (len(x),4,2))

@both
@each
def test_entropy(x, task): compare(lambda t: entropy_loss(t, task), lambda z: entropy(z, task), x)

@pytest.mark.parametrize('hard', [True,False])
@pytest.mark.parametrize('kept', ['some','none','all','weighted'])
@both
@each
def test_pseudo_labels(x, task, kept, hard):
    "hard and soft targets; masks, an empty one among them: divided by all images"
    target = class_probs(torch.tensor(other(x)*(0 if kept=='all' else 1)), task)   # all: targets are ties as well
    w = dict(some=lambda s: rng.integers(0,2,s), none=np.zeros, all=np.ones, weighted=lambda s: rng.random(s))[kept](target.shape[:-1]).astype(float)
    loss,_ = compare(lambda t: pseudo_label_loss(t, target, torch.tensor(w), task, hard), lambda z: pseudo(z, target.reshape(-1,target.shape[-1]).tolist(), w.ravel(), task, hard), x)
    if kept=='none': assert loss==0

@pytest.mark.parametrize('task', ['single','multi','regression'])
@each
def test_consistency(x, task):
    target = other(x)
    compare(lambda t: consistency_loss(t, torch.tensor(target), task), lambda z: squared(z, target.astype(complex).tolist(), task), x)

@both
@each
def test_kl(x, task):
    target = other(x)
    compare(lambda t: kl_loss(torch.tensor(target), t, task), lambda z: divergence(target.tolist(), z, task), x)

def test_targets_have_no_gradient():
    "the second argument of a comparison never learns"
    for task in ('single','multi'):
        a,b = [torch.randn(3,4, requires_grad=True) for _ in range(2)]
        (consistency_loss(a, b, task)+kl_loss(b, a, task)+pseudo_label_loss(a, class_log_probs(b, task).exp(), b.exp().sum(1) if task=='single' else b.exp(), task, hard=False)).backward()
        assert b.grad is None and a.grad is not None

@pytest.mark.parametrize('x', [rng.normal(0,2,(5,3)), np.array([[1.,2,0],[1,2,0],[1,2,1]]), np.eye(3)*1e4], ids=['random','a constant component','extreme'])
def test_barlow_twins(x):
    y = other(x)
    compare(lambda t: barlow_twins_loss(t, torch.tensor(y), .02), lambda z: barlow(z, y.tolist(), .02, 1e-5), x)
    compare(lambda t: barlow_twins_loss(torch.tensor(y), t), lambda z: barlow(y.tolist(), z, .005, 1e-5), x)

@pytest.mark.parametrize('kept', ['some','none','all'])
@both
@each
def test_fairness(x, task, kept):
    w = FreeMatchThreshold(); w(class_probs(torch.tensor(other(x)), task)); w(class_probs(torch.tensor(other(x)), task))
    shape = (len(x),1) if task=='single' else x.shape
    mask = dict(some=lambda s: rng.integers(0,2,s), none=np.zeros, all=np.ones)[kept](shape).astype(float)
    shares,counts = [o.reshape(-1, o.shape[-1]).tolist() for o in (w.shares,w.counts)]
    m = torch.tensor(mask[:,0] if task=='single' else mask)
    compare(lambda t: fairness_loss(t, m, w, task), lambda z: fairness(z, mask.tolist(), shares, counts, task), x)

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32])
@both
def test_half_precision(task, dtype):
    "losses of float16 and bfloat16 are computed in float32; extreme logits give finite losses and gradients"
    x = torch.tensor(inputs['extreme']).to(dtype).requires_grad_(); y = x.detach().roll(1,0)
    p = class_probs(y, task); w = SoftMatchWeights()(p); free = FreeMatchThreshold()
    losses = [entropy_loss(x, task), pseudo_label_loss(x, p, w, task), consistency_loss(x, y, task), kl_loss(y, x, task), fairness_loss(x, free(p), free, task)]
    if task=='single': losses.append(barlow_twins_loss(x, y))
    for o in losses: assert o.dtype==torch.float32 and o.isfinite()
    sum(losses).backward(); assert x.grad.isfinite().all()

# Virtual adversarial directions

def unit(a): return a/np.sqrt((a.reshape(len(a),-1)**2).sum(1)).reshape(-1,*[1]*(a.ndim-1))
@pytest.mark.parametrize('n_power', [1,2])
@both
def test_vat_direction(task, n_power):
    "a power iteration on a linear model, by hand: the gradient is (q-p)·A"
    A,x = rng.normal(0,1,(4,12)),rng.normal(0,1,(3,3,2,2))
    f = lambda t: t.flatten(1)@torch.tensor(A).T
    torch.manual_seed(1); got = vat_perturbation(f, torch.tensor(x), f(torch.tensor(x)), task, eps=3., xi=.1, n_power=n_power)
    torch.manual_seed(1); d = unit(torch.randn(3,3,2,2, dtype=torch.float64).numpy())
    p = lambda x: np.array(probs(x.reshape(3,-1)@A.T, task)).reshape((3,4) if task=='single' else (3,4,2))[...,1 if task=='multi' else slice(None)]
    for _ in range(n_power): d = unit(((p(x+.1*d)-p(x))@A).reshape(x.shape))
    np.testing.assert_allclose(got, 3*d, rtol=1e-9, atol=1e-9)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,16,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,5)).eval()
    return m,torch.randn(4,3,32,32)

def cosines(a, b): return (unit(a.double().numpy())*unit(b.numpy())).reshape(len(a),-1).sum(1)
def exact(m, x, seed):
    "The direction in double precision, by a step that is small there"
    torch.manual_seed(seed); d = torch.randn_like(x).double()
    d /= d.flatten(1).norm(dim=1).view(-1,1,1,1)
    m = nn.Sequential(*m).double(); r = (1e-5*d).requires_grad_()
    out = kl_loss(m(x.double()), m(x.double()+r)); g = torch.autograd.grad(out, r)[0]; m.float()
    return g

def test_vat_direction_in_float32(net):
    "the default step finds the exact direction in float32, and within autocast, where the images' logits are too coarse"
    m,x = net; want = exact(m, x, 3)
    torch.manual_seed(3); got = vat_perturbation(m, x, m(x).detach(), eps=1.)
    assert (cosines(got, want)>.98).all(), cosines(got, want)
    with torch.autocast('cpu', torch.bfloat16): torch.manual_seed(3); half = vat_perturbation(m, x, m(x).detach(), eps=1.)
    assert half.dtype==torch.float32 and (cosines(half, want)>.98).all()

def test_vat_leaves_no_trace(net):
    "no gradient in parameters; a model that doesn't depend on its input gives a random direction of the full length"
    m,x = net; before = x.clone()
    with torch.no_grad(): r = vat_perturbation(m, x, m(x), eps=2.)
    assert all(p.grad is None for p in m.parameters()) and torch.equal(x, before) and not r.requires_grad
    assert r.flatten(1).norm(dim=1).numpy()==pytest.approx(2, rel=1e-5)
    r = vat_perturbation(lambda x: 1e4*torch.eye(4,5)+0*x.sum(), x, 1e4*torch.eye(4,5), eps=2.)
    assert r.flatten(1).norm(dim=1).numpy()==pytest.approx(2, rel=1e-5)

# Weightings: plain loops over fifty steps

def batches(task, n=50):
    "Targets of a model that becomes more confident, with ties, extreme logits, and batches of one image"
    for i in range(n):
        x = rng.normal(0,.5+i/10,(1 if i%10==4 else 5,3))+[1.,0,-.5]
        if i%7==3: x[0] = 0
        if i%9==2: x[0] = 1e4,-1e4,0
        yield probs(x, task),class_probs(torch.tensor(x), task)
def by_decision(target, task):
    "Lists of images' probabilities, one for each decision"
    n = 1 if task=='single' else 3
    return [target[k::n] for k in range(n)]

def run(weighting, task, step, state):
    "Each batch's weights and statistics, against those of `step`, a loop over images and classes"
    ds = [dict(state) for _ in range(1 if task=='single' else 3)]; seen = []
    for target,p in batches(task):
        want = np.array([step(d, ps) for d,ps in zip(ds, by_decision(target, task))]).T
        got = weighting(p); got = got[:,None] if task=='single' else got
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
        seen += want.ravel().tolist()
        for k in weighting.stats:
            stat = getattr(weighting, k); stat = stat[None] if task=='single' else stat
            np.testing.assert_allclose(stat, [d[k] for d in ds], rtol=1e-10, atol=1e-12)
    return seen

@both
def test_fixed(task):
    seen = run(FixedThreshold(.8), task, lambda d,ps: [float(max(p)>=.8) for p in ps], {})
    assert 0<mean(seen)<1

@both
def test_free(task):
    n = 3 if task=='single' else 2; m = .9
    def step(d, ps):
        conf,pred = [max(p) for p in ps],[first_largest(p) for p in ps]
        d['confidence'] = m*d['confidence']+(1-m)*mean(conf)
        d['shares'] = [m*s+(1-m)*mean([p[c] for p in ps]) for c,s in enumerate(d['shares'])]
        d['counts'] = [m*s+(1-m)*mean([float(c==o) for o in pred]) for c,s in enumerate(d['counts'])]
        return [float(a>=d['confidence']*d['shares'][c]/max(d['shares'])) for a,c in zip(conf,pred)]
    seen = run(FreeMatchThreshold(m), task, step, dict(confidence=1/n, shares=[1/n]*n, counts=[1/n]*n))
    assert .1<mean(seen)<.95

@both
def test_soft(task):
    n = 3 if task=='single' else 2; m = .9
    def step(d, ps):
        conf = [max(p) for p in ps]; μ = mean(conf)
        d['mean'] = m*d['mean']+(1-m)*μ
        if len(ps)>1: d['var'] = m*d['var']+(1-m)*sum((o-μ)**2 for o in conf)/(len(ps)-1)
        return [math.exp(-min(o-d['mean'],0)**2/(2*d['var']/3**2)) for o in conf]
    seen = run(SoftMatchWeights(m, n_sigma=3), task, step, dict(mean=1/n, var=1.))
    assert .1<mean(seen)<.95

@pytest.mark.parametrize('target', ['uniform',[5.,2.,1.]])
@both
def test_alignment(task, target):
    if task=='multi':
        if target=='uniform': return
        target = [.5,.2,.1]
    m,ours = .9,DistributionAlignment(target, momentum=.9, task=task)
    goals = [[1/3]*3 if target=='uniform' else [o/8 for o in target]] if task=='single' else [[1-o,o] for o in target]
    avg = [None]*len(goals)
    for probs_,p in batches(task):
        got = ours(p).reshape(-1, p.shape[-1])
        for k,ps in enumerate(by_decision(probs_, task)):
            new = [mean([p[c] for p in ps]) for c in range(len(ps[0]))]
            avg[k] = new if avg[k] is None else [m*a+(1-m)*b for a,b in zip(avg[k],new)]
            for i,p_ in enumerate(ps):
                q = [o*t/a for o,t,a in zip(p_, goals[k], avg[k])]
                np.testing.assert_allclose(got[i*len(goals)+k], [o/sum(q) for o in q], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.shares.reshape(len(goals),-1), avg, rtol=1e-10)

@pytest.mark.parametrize('make', [FixedThreshold,FreeMatchThreshold,SoftMatchWeights,DistributionAlignment])
def test_statistics_come_back(make):
    "state_dict: another object goes on as the first does, from before its first batch and from the middle; later steps leave the copy alone"
    bs,a,b,c = [p.float() for _,p in batches('single',20)],make(),make(),make()
    b.load_state_dict(a.state_dict())
    for p in bs[:10]: assert torch.equal(a(p), b(p))
    state = a.state_dict(); c.load_state_dict(state); kept = {k:v.clone() for k,v in state.items()}
    for p in bs[10:]:
        want = a(p); assert torch.equal(want, b(p)) and torch.equal(want, c(p))
    assert all(torch.equal(state[k], kept[k]) for k in kept) and len(state)==len(make.stats)

def test_classes_that_are_never_predicted():
    "no NaN where a class has share 0, where all are sure of one class, or where no target share fits"
    p = torch.tensor([[1.,0.,0.]]*4)
    for make in (FreeMatchThreshold,SoftMatchWeights,DistributionAlignment,lambda **kw: DistributionAlignment([1,2,3],**kw)):
        w = make(momentum=0.)
        for _ in range(3): assert w(p).isfinite().all()
    assert torch.equal(SoftMatchWeights(momentum=0.)(p), torch.ones(4))

# Several processes, as threads that wait for each other

@pytest.fixture
def ranks(monkeypatch):
    "Run `f(rank)` in two threads which `torch.distributed.all_reduce` joins"
    local,barrier,slots = threading.local(),threading.Barrier(2, timeout=60),[None,None]
    def all_reduce(x):
        slots[local.rank] = x.clone(); barrier.wait(); x.copy_(slots[0]+slots[1]); barrier.wait()
    dist = torch.distributed
    for k,v in dict(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce).items(): monkeypatch.setattr(dist, k, v)
    def both(f):
        res,errors = [None]*2,[]
        def one(r):
            local.rank = r
            try: res[r] = f(r)
            except BaseException as e: errors.append(e); barrier.abort()
        ts = [threading.Thread(target=one, args=(r,)) for r in range(2)]
        for t in ts: t.start()
        for t in ts: t.join()
        if errors: raise errors[0]
        monkeypatch.undo()
        return res
    return both

@both
def test_two_processes_have_one_batchs_statistics(ranks, task):
    "thresholds, shares, means and variances of halves of a batch equal the whole's, and each other bitwise"
    ps = [class_probs(torch.randn(6,3, dtype=torch.float64), task) for _ in range(5)]
    make = lambda: [FreeMatchThreshold(.5), SoftMatchWeights(.5), DistributionAlignment([.2,.3,.5], .5, task)]
    def f(r):
        ws = make(); out = [[w(p[3*r:3*r+3]) for w in ws] for p in ps]
        return [w.state_dict() for w in ws],out
    (a,wa),(b,wb) = ranks(f)
    whole = make(); want = [[w(p) for w in whole] for p in ps]
    for i,w in enumerate(whole):
        for k,v in w.state_dict().items(): assert torch.equal(a[i][k], b[i][k]); torch.testing.assert_close(a[i][k], v, rtol=1e-12, atol=1e-12)
        for step in range(5): torch.testing.assert_close(torch.cat([wa[step][i],wb[step][i]]), want[step][i], rtol=1e-10, atol=1e-12)

def test_two_processes_have_one_batchs_gradient(ranks):
    "fairness and Barlow Twins, which aren't sums over images: mean of the processes' gradients is the whole batch's"
    x,y,w = torch.randn(6,3, dtype=torch.float64),torch.randn(6,3, dtype=torch.float64),torch.tensor([1.,0,1,1,1,0])
    free = FreeMatchThreshold(); free.confidence,free.shares,free.counts = torch.tensor(.5),torch.tensor([.5,.3,.2]),torch.tensor([.6,.2,.2])
    losses = lambda x,y,w: fairness_loss(x, w, free)+barlow_twins_loss(x, y)
    def f(r):
        s = slice(3*r,3*r+3); xs = x[s].clone().requires_grad_(); loss = losses(xs, y[s], w[s]); loss.backward()
        return loss.item(),xs.grad
    (la,ga),(lb,gb) = ranks(f)
    xs = x.clone().requires_grad_(); loss = losses(xs, y, w); loss.backward()
    assert la==lb==pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([ga,gb])/2, xs.grad, rtol=1e-10, atol=1e-12)

# Jigsaw

@pytest.mark.parametrize('n,grid,least', [(6,3,9),(9,3,8),(30,3,7),(4,2,4)])
def test_orders_are_far_apart(n, grid, least):
    "permutations, none twice, at least `least` tiles apart, the identity first"
    orders = jigsaw_orders(n, grid).tolist()
    assert orders[0]==list(range(grid**2)) and all(sorted(o)==orders[0] for o in orders) and len(orders)==n
    assert min(sum(p!=q for p,q in zip(a,b)) for a,b in itertools.combinations(orders, 2))>=least

@pytest.mark.parametrize('shape', [(40,3,9,9),(40,1,11,13),(40,4,9,10)])
def test_tiles(shape):
    "each place shows the order's tile, by loops over pixels; rows and columns too many are cut around the centre; every order occurs"
    x = torch.randn(*shape); orders = jigsaw_orders(4); B,C,H,W = shape; h,w = H//3,W//3; top,left = (H-3*h)//2,(W-3*w)//2
    torch.manual_seed(0); out,targ = jigsaw(x, orders, grey=0); torch.manual_seed(0); again,_ = jigsaw(x, orders, grey=0)
    assert torch.equal(out, again) and set(targ.tolist())==set(range(4)) and out.shape==(B,C,3*h,3*w)
    for b in range(0,B,7):
        for r,c in itertools.product(range(3*h), range(3*w)):
            k = orders[targ[b]][r//h*3+c//w].item()
            assert torch.equal(out[b,:,r,c], x[b,:,top+k//3*h+r%h,left+k%3*w+c%w])

def test_grey_tiles():
    "about a tenth of the tiles have equal channels, the mean's; others keep their colours; one channel stays as it is"
    x = torch.randn(200,3,9,9); torch.manual_seed(0); out,targ = jigsaw(x, jigsaw_orders(2))
    torch.manual_seed(0); plain,_ = jigsaw(x, jigsaw_orders(2), grey=0)
    tiles = lambda o: o.reshape(200,3,3,3,3,3).permute(0,2,4,1,3,5).reshape(-1,3,9)
    a,b = tiles(out),tiles(plain); grey = (a==a[:,:1]).all((1,2))
    assert .07<grey.float().mean()<.13 and torch.equal(a[~grey], b[~grey])
    torch.testing.assert_close(a[grey], b[grey].mean(1,keepdim=True).expand(-1,3,-1))
    one,_ = jigsaw(x[:,:1], jigsaw_orders(2), grey=1.); assert set(one.flatten().tolist())<=set(x[:,0].flatten().tolist())

def test_memory_format():
    "channels last stays"
    x = torch.randn(2,3,9,9)
    assert jigsaw(x, jigsaw_orders(2))[0].is_contiguous() and jigsaw(x.to(memory_format=torch.channels_last), jigsaw_orders(2))[0].is_contiguous(memory_format=torch.channels_last)
