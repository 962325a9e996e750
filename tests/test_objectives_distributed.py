"""Objectives in two processes against one, by hand: formulas on both processes' images together, each part with its own BatchNorm statistics.
`two_objectives.py` records, the tests compare. A test's docstring says what is asserted."""
import math
import pytest,torch
import torch.nn.functional as F
from torch import nn
from test_objectives import family
from test_resume import free_port
import two_objectives
from two_objectives import net

BACKWARD = ['joint','sequential']

@pytest.fixture(scope='module')
def ranks(tmp_path_factory, processes):
    "What each of the two processes recorded"
    pytest.importorskip('accelerate')
    out,port = tmp_path_factory.mktemp('facts'),free_port()
    ps = [processes.Process(target=two_objectives.record, args=(str(out),r,port)) for r in range(2)]
    for p in ps: p.start()
    ps[0].join(300)
    if ps[0].exitcode: ps[1].kill()
    ps[1].join(60)
    logs = ''.join(o.read_text()[-3000:] for o in sorted(out.glob('log-*')))
    for p in ps:
        if p.exitcode is None: p.kill()
        assert p.exitcode==0, logs
    return [torch.load(out/f'rank-{i}.pt', weights_only=False) for i in range(2)]

def steps(ranks, name, backward): return list(zip(*(o[name,backward]['steps'] for o in ranks), strict=True))
def weights(state): return {k:v for k,v in state.items() if not k.split('.')[-1] in ('running_mean','running_var','num_batches_tracked')}
def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)

class Hand:
    "A step of one process on the images of both, with what is kept over steps in plain numbers"
    def __init__(self, name): self.name,self.kept = name,{}

    def average(self, k, new, start, m=.9):
        "The mean of `k`, that of all steps"
        self.kept[k] = m*self.kept.get(k, start)+(1-m)*new
        return self.kept[k]

    def step(self, ranks):
        "Gradients of the model and the heads, and the loss of the objective"
        model,(head,) = net().train(),[self.head(ranks[0]['heads'])]
        self.parts,self.model,self.head_module = ranks,model,head
        model.load_state_dict(ranks[0]['model'])
        supervised = F.cross_entropy(self.each(model, 'x'), torch.cat([o['y'] for o in ranks]))
        weight,loss = getattr(self, self.name.split('_one')[0].split('_soft')[0].split('_free')[0])()
        (supervised+weight*loss).backward()
        return {n:p.grad for n,p in model.named_parameters()},{n:p.grad for n,p in head.named_parameters()} if head else {},loss.item()

    def each(self, f, k):
        "`f` of each process's images, which have their own statistics, together"
        return torch.cat([f(o[k][0] if isinstance(o[k], tuple) else o[k]) for o in self.parts])
    def head(self, state):
        if not state: return
        state = {k.split('.',1)[1]:v for k,v in state.items()}
        if len(state)==2: head = nn.Linear(*state['weight'].T.shape)
        else: head = nn.Sequential(nn.Linear(16,8,bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,8,bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,8,bias=False))
        head.load_state_dict(state)
        return head.train()
    def teacher(self):
        model = net().eval(); model.load_state_dict(self.parts[0]['teacher'])
        with torch.no_grad(): return self.each(model, 'u')
    def student(self):
        with torch.no_grad(): return self.each(self.model, 'u')

    def rotation(self):
        targs = torch.cat([o['view'][1] for o in self.parts])
        return dict(rotation=.5, rotation_one=.5, jigsaw=.7)[self.name], F.cross_entropy(self.head_module(self.each(self.model[:-1], 'view')), targs)
    jigsaw = rotation
    def entropy(self):
        p = self.each(self.model, 'u').softmax(1)
        return .3, -(p*p.log()).sum(1).mean()
    def pseudo_label(self):
        logits = self.each(self.model, 'u'); conf,i = logits.detach().softmax(1).max(1)
        return .9, ((conf>=.5)*F.cross_entropy(logits, i, reduction='none')).sum()/len(i)
    def pi_model(self): return 3., (self.each(self.model, 'view').softmax(1)-self.student().softmax(1)).square().mean()
    def mean_teacher(self): return 2., (self.each(self.model, 'view').softmax(1)-self.teacher().softmax(1)).square().mean()
    def vat(self):
        p = self.student().softmax(1)
        return .4, (p*(p.log()-self.each(self.model, 'view').log_softmax(1))).sum(1).mean()
    def fixmatch(self):
        logits,p = self.each(self.model, 'view'),(self.teacher() if 'soft' in self.name else self.student()).softmax(1)
        if self.name!='fixmatch':
            target = torch.tensor([.5,.5])
            shares = self.average('align', p.mean(0), p.mean(0), self.momentum())
            p = p*target/shares; p = p/p.sum(1, keepdim=True)
        conf,i = p.max(1)
        ce = F.cross_entropy(logits, i, reduction='none')
        if self.name=='fixmatch': return .8, ((conf>=.5)*ce).mean()
        if self.name=='fixmatch_soft':
            m = self.momentum(); mu,var = self.average('mean', conf.mean(), .5, m),self.average('var', conf.var(), 1., m)
            return .8, (torch.exp(-(conf-mu).clamp(max=0)**2/(2*var/4))*ce).mean()
        t,share,count = self.average('confidence', conf.mean(), .5),self.average('shares', p.mean(0), torch.tensor([.5,.5])),self.average('counts', F.one_hot(i, 2).float().mean(0), torch.tensor([.5,.5]))
        kept = conf>=(t*share/share.max())[i]
        loss = (kept*ce).mean()
        if kept.any():
            q = logits.softmax(1)[kept]
            h,ratio = F.one_hot(q.argmax(1), 2).float().mean(0),lambda a,b: torch.where(b>0, a/b.clamp_min(1e-30), 0.)
            a,b = ratio(share, count),ratio(q.mean(0), h)
            loss = loss+.001*(a/a.sum()*(b/b.sum()+1e-12).log()).sum()
        return .8, loss
    def momentum(self): return .999 if 'soft' in self.name else .9
    def barlow_twins(self):
        z = [self.each(lambda x: self.head_module(self.model[:-1](x)), k) for k in ('u','view')]
        z = [(o-o.mean(0))/(o.var(0, unbiased=False)+1e-5).sqrt() for o in z]
        c = z[0].T@z[1]/len(z[0]); off = c-torch.diag(c.diag())
        return .05, ((1-c.diag())**2).sum()+.005*(off**2).sum()

@pytest.mark.parametrize('backward', BACKWARD)
@pytest.mark.parametrize('name', family)
def test_gradients_are_those_of_one_process(ranks, name, backward):
    "two processes, each step: gradients of model and heads are equal in both, and are those of one process on all images; so are thresholds, weights' statistics and alignment"
    hand = Hand(name)
    for a,b in steps(ranks, name, backward):
        assert same(weights(a['model']), weights(b['model'])) and same(a['grads'], b['grads']) and same(a['head_grads'], b['head_grads'])
        assert not torch.equal(a['u'], b['u']) and not torch.equal(a['x'], b['x'])
        grads,head_grads,loss = hand.step((a,b))
        for k,g in grads.items(): assert torch.allclose(g, a['grads'][k], atol=1e-5, rtol=1e-4), (k,(g-a['grads'][k]).abs().max())
        assert set(head_grads)=={k.split('.',1)[1] for k in a['head_grads']}
        for k,g in a['head_grads'].items(): assert torch.allclose(g, head_grads[k.split('.',1)[1]], atol=1e-5, rtol=1e-4), k
        kept = {k if part!='align' else 'align':v for part,s in a['state']['kept'].items() for k,v in s.items()}
        assert set(kept)==set(hand.kept)
        for k,v in kept.items(): assert torch.allclose(torch.as_tensor(hand.kept[k]), v, atol=1e-6), k

@pytest.mark.parametrize('backward', BACKWARD)
@pytest.mark.parametrize('name', family)
def test_kept_state_is_equal(ranks, name, backward):
    "two processes, after each of six steps: weights, heads, momenta of heads, thresholds and shares are bitwise equal in both; and they have changed"
    all_steps = steps(ranks, name, backward)
    for a,b in all_steps:
        assert same(weights(a['after']), weights(b['after'])) and same(weights(a['state']['heads']), weights(b['state']['heads']))
        for part in a['state']['kept']:
            s,t = a['state']['kept'][part],b['state']['kept'][part]
            assert s.keys()==t.keys() and all(torch.equal(s[k], t[k]) for k in s)
        if a['state']['opt']:
            for s,t in zip(a['state']['opt']['state'], b['state']['opt']['state'], strict=True): assert all(torch.equal(s[k], t[k]) for k in s if isinstance(s[k], torch.Tensor))
    first,last = all_steps[0][0],all_steps[-1][0]
    assert len(all_steps)==6 and not any(torch.equal(v, last['after'][k]) for k,v in weights(first['model']).items() if k.endswith('0.weight'))
    assert all(not torch.equal(v, last['state']['heads'][k]) for k,v in first['heads'].items() if k.endswith('weight') and 'batches' not in k)
    if name.startswith('fixmatch_'): assert any(not torch.equal(v, last['state']['kept'][p][k]) for p,s in first['state']['kept'].items() for k,v in s.items())

@pytest.mark.parametrize('backward', BACKWARD)
@pytest.mark.parametrize('name', [n for n in family if n in ('mean_teacher','fixmatch_soft')])
def test_averages(ranks, name, backward):
    "two processes, EMA: equal in both after each step, buffers included, and those of a loop over the first process's weights and buffers; the end of the fit has them in both"
    all_steps = steps(ranks, name, backward)
    avg = dict(all_steps[0][0]['model'])
    for n,(a,b) in enumerate(all_steps):
        d = min(.9, (1+n)/(10+n))
        avg = {k:d*v+(1-d)*a['after'][k] if v.is_floating_point() else a['after'][k] for k,v in avg.items()}
        for o in (a,b):
            assert o['ema']['n_updates']==n+1 and set(o['ema']['averages'])==set(avg)
            for k,v in avg.items(): assert torch.allclose(v.float(), o['ema']['averages'][k].float(), atol=1e-6), k
        assert same(a['ema']['averages'], b['ema']['averages'])
    for r in ranks: assert all(torch.allclose(v.float(), r[name,backward]['end'][k].float(), atol=1e-6) for k,v in avg.items())

@pytest.mark.parametrize('name', family)
def test_columns(ranks, name):
    "two processes, Recorder: the objective's loss is the mean over both processes and all steps, the same in both, joint and sequential"
    for backward in BACKWARD:
        a,b = (o[name,backward]['columns'] for o in ranks)
        assert [o[:-1] for o in a]==[o[:-1] for o in b]
        if name!='barlow_twins' and 'fixmatch_free' not in name:
            all_steps = steps(ranks, name, backward)
            for e in range(2):
                want = sum(o['loss'] for pair in all_steps[3*e:3*e+3] for o in pair)/6
                assert a[e][2]==pytest.approx(want, rel=1e-5)
    j,s = (ranks[0][name,b]['columns'] for b in BACKWARD)
    for x,y in zip(j, s): assert x[:-1]==pytest.approx(y[:-1], rel=1e-3, abs=1e-4)
