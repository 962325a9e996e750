"Several objectives together: what one adds to a step doesn't depend on the others"
import itertools,math
from functools import partial
import numpy as np,pytest,torch
from PIL import Image
from torch import nn
from fastai.vision.all import Callback,ConvLayer,Learner,SGD,accuracy
from sesemi_fastai.all import (BarlowTwins,EMA,EntropyMin,FixMatch,JigsawPretext,MeanTeacher,PairedDataLoaders,PiModel,PretextObjective,PseudoLabel,
                               RotationPretext,StepSeed,UnlabeledObjective,VAT)

def net(drop=.3):
    torch.manual_seed(0)
    return nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(16,2))

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path,rng = tmp_path_factory.mktemp('objectives'),np.random.default_rng(0)
    for nm,n in {'train/a':8,'train/b':8,'val/a':2,'val/b':2,'unsup':12}.items():
        (path/nm).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0,256,(36,36,3),dtype=np.uint8)).save(path/nm/f'{i}.png')
    return PairedDataLoaders.from_folder(path, size=32, unlabeled_bs=6, bs=8, num_workers=0, seed=0, n_steps=3)

class FirstGradients(Callback):
    "Gradients of the first step, before anything is stepped"
    order = 100
    def before_step(self):
        if self.iter==0 and self.epoch==0:
            self.learn.grads = {n:p.grad.clone() for n,p in self.model.named_parameters()}
            self.learn.head_grads = {f'{o.name}.{n}':p.grad.clone() for o in self.learn.cbs if isinstance(o, UnlabeledObjective) for n,p in o.fit_heads.named_parameters() if p.grad is not None}

def fitted(dls, *cbs, n=1, lr=1e-2, model=None, **kw):
    learn = Learner(dls, model or net(), opt_func=partial(SGD, mom=.9), metrics=accuracy, cbs=FirstGradients(), **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=list(cbs))
    return learn

# each with what it needs beside it
family = dict(rotation=lambda **kw: [RotationPretext(.5, **kw)], rotation_one=lambda **kw: [RotationPretext(.5, views='one', **kw)], jigsaw=lambda **kw: [JigsawPretext(.7, **kw)],
    entropy=lambda **kw: [EntropyMin(.3, **kw)], pseudo_label=lambda **kw: [PseudoLabel(.9, threshold=.5, ramp_pct=0, **kw)], pi_model=lambda **kw: [PiModel(3., ramp_pct=0, **kw)],
    mean_teacher=lambda **kw: [MeanTeacher(2., ramp_pct=0, **kw), EMA(.9)], vat=lambda **kw: [VAT(.4, eps=2., **kw)], fixmatch=lambda **kw: [FixMatch(.8, threshold=.5, **kw)],
    fixmatch_free=lambda **kw: [FixMatch(.8, weighting='free', align='labels', momentum=.9, **kw)], fixmatch_soft=lambda **kw: [FixMatch(.8, weighting='soft', align='uniform', teacher='ema', **kw), EMA(.9)],
    barlow_twins=lambda **kw: [BarlowTwins(.05, n_proj=8, **kw)])

def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a) and set(a)==set(b)
def apart(a, b): return max((a[k].float()-b[k].float()).abs().max().item() for k in a)

@pytest.mark.parametrize('names', [('rotation','entropy','fixmatch'), ('jigsaw','mean_teacher','vat'), ('rotation','pi_model','pseudo_label'), ('barlow_twins','rotation_one','fixmatch_free')], ids='+'.join)
@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_gradients_are_the_sum(dls, names, backward):
    "gradients of several objectives are the supervised one plus what each alone adds, joint or sequential"
    plain = fitted(dls, n=1, lr=0.).grads
    alone = [fitted(dls, StepSeed(), *family[o](backward=backward), lr=0.) for o in names]
    both = fitted(dls, *sum((family[o](backward=backward) for o in names), []), lr=0.)
    plain = fitted(dls, StepSeed(), lr=0.).grads
    for k,g in both.grads.items(): assert torch.allclose(g, plain[k]+sum(o.grads[k]-plain[k] for o in alone), atol=1e-6), k
    for o in alone:
        for k,g in o.head_grads.items(): assert torch.allclose(g, both.head_grads[k], atol=1e-6), k

@pytest.mark.parametrize('name', family)
def test_joint_equals_sequential(dls, name):
    "for each objective, gradients of one backward pass and of two are the same, and it changes the body"
    a,b,plain = fitted(dls, *family[name](backward='joint')),fitted(dls, *family[name](backward='sequential')),fitted(dls, StepSeed())
    assert apart(a.grads, b.grads)<1e-6 and apart(a.model.state_dict(), b.model.state_dict())<1e-5
    assert apart(a.grads, plain.grads)>1e-7
    assert list(a.recorder.values[0])==pytest.approx(list(b.recorder.values[0]), abs=1e-4) and all(v is not None for v in a.recorder.values[0])

@pytest.mark.parametrize('name', family)
def test_weight_zero_is_absence(dls, name):
    "an objective of weight 0 changes no bit of the model, of the others' columns or of a head, and has its columns"
    extra = [o for o in family[name]() if not isinstance(o, UnlabeledObjective)]
    a = fitted(dls, RotationPretext() if 'rotation' not in name else EntropyMin(.1), *extra)
    cbs = family[name]()
    for o in cbs:
        if isinstance(o, UnlabeledObjective): o.weight = 0.
    b = fitted(dls, RotationPretext() if 'rotation' not in name else EntropyMin(.1), *cbs)
    assert equal(a.model.state_dict(), b.model.state_dict()) and equal(a.head_grads, {k:v for k,v in b.head_grads.items() if k in a.head_grads})
    assert b.recorder.values[0][:5]==a.recorder.values[0] and len(b.recorder.values[0])==7 and None not in b.recorder.values[0]

class Weights(Callback):
    "The model's weights after each epoch's training"
    def before_fit(self): self.learn.after_epochs = []
    def after_train(self): self.learn.after_epochs.append({k:v.clone() for k,v in self.model.state_dict().items()})

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('name', family)
def test_late_start(dls, name, backward):
    "`start_pct`: until then an objective is absent, bitwise, makes no pass and has nan in its columns, which TensorBoard takes; from then on it is there"
    cbs = partial(family[name], backward=backward)
    late = cbs(start_pct=.5)
    extra,passes = [o for o in cbs() if not isinstance(o, UnlabeledObjective)],[]
    class Count(nn.Sequential):
        def forward(self, x):
            if self.training: passes.append(len(x))
            return super().forward(x)
    a = fitted(dls, Weights(), StepSeed(), *extra, n=2).after_epochs
    learn = fitted(dls, Weights(), *late, n=2, model=Count(*net())); b = learn.after_epochs
    assert all(torch.equal(b[0][k], v) for k,v in a[0].items()) and apart(a[1], b[1])>1e-7
    assert passes[:3]==[8]*3 and len(passes)>6
    i = learn.recorder.metric_names.index(f'{late[0].name}_loss')-1
    assert all(isinstance(o, float) for v in learn.recorder.values for o in v) and [*map(math.isnan, learn.recorder.values[0])].count(True)==2 and all(map(math.isnan, learn.recorder.values[0][i:i+2])) and all(map(math.isfinite, learn.recorder.values[1]))

def test_order_of_callbacks(dls):
    "the order of the callbacks changes that of the columns and nothing else"
    make = lambda: [RotationPretext(.5), FixMatch(.8, weighting='free'), EntropyMin(.1, backward='sequential')]
    res = [fitted(dls, *[make()[i] for i in o]) for o in itertools.permutations(range(3))]
    for r in res[1:]: assert equal(r.model.state_dict(), res[0].model.state_dict())
    names = [r.recorder.metric_names[4:-1] for r in res]
    assert len({tuple(o) for o in names})==6 and len({frozenset(o) for o in names})==1
    for r,n in zip(res, names): assert dict(zip(n, r.recorder.values[0][3:]))==dict(zip(names[0], res[0].recorder.values[0][3:]))

def test_one_batch_for_all(dls):
    "objectives share the step's one unlabelled batch, its views and its passes"
    made,passes,inputs = [],[],[]
    def strong(x): made.append(len(x)); return x.flip(3)
    class Count(nn.Sequential):
        def forward(self, x):
            if self.training: passes.append((len(x), torch.is_grad_enabled()))
            return super().forward(x)
    model = Count(*net())
    class Images(Callback):
        order = 0
        def after_loss(self): inputs.append(self.unlabeled_step.n_taken)
    fitted(dls, Images(), RotationPretext(), EntropyMin(.1), FixMatch(strong=strong), PiModel(strong=strong), model=model)
    assert made==[6]*3 and len(inputs)==3+1   # one validation batch
    assert passes==[(8,True), (6,True), (6,True), (24,True)]*3   # labelled; weak for entropy, whose values are the targets; strong for both; rotations

@pytest.mark.parametrize('name', ['rotation','fixmatch'])
@pytest.mark.parametrize('bn', ['update','batch','running'])
def test_batchnorm_policy(dls, name, bn):
    "`bn=`: running averages are moved by unlabelled passes with 'update' alone, and by passes that only make targets never"
    class Moves(Callback):
        "BatchNorm's count of batches at the end of training"
        def after_train(self): self.learn.n_moved = self.model[0][1].num_batches_tracked.item()
    learn = fitted(dls, Moves(), *family[name](bn=bn))
    assert learn.n_moved==(6 if bn=='update' else 3)
    plain = fitted(dls, StepSeed(), Moves(), lr=0.)
    if bn!='update':
        learn = fitted(dls, *family[name](bn=bn), lr=0.)
        assert all(torch.equal(v, plain.model.state_dict()[k]) for k,v in learn.model.state_dict().items() if 'running' in k)

def test_own_objective(dls):
    "one that a reader writes: whether an image was mirrored"
    class MirrorPretext(PretextObjective):
        name,n_targets,target_names,chance = 'mirror',2,('as it was','mirrored'),.5
        def make_view(self, x): return torch.cat([x, x.flip(3)]), torch.arange(2).repeat_interleave(len(x)).to(x.device)
    learn = fitted(dls, MirrorPretext(weight=.5), RotationPretext())
    assert learn.recorder.metric_names[4:6]==['mirror_loss','mirror_acc'] and 0<learn.recorder.values[0][3]<3

def test_errors(dls):
    "what can't work is one sentence before the first step, and leaves nothing on the Learner"
    class NoStep(Callback):
        def before_batch(self): raise AssertionError('a step was begun')
    def says(text, *cbs, dls=dls, **kw):
        learn = Learner(dls, net(), cbs=NoStep(), **kw); n = len(learn.cbs)
        with pytest.raises(ValueError, match=text), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=list(cbs))
        assert len(learn.cbs)==n and not any(o._forward_hooks for o in learn.model.modules())
    says('MeanTeacher.*EMA', MeanTeacher())
    says('FixMatch.*EMA', FixMatch(teacher='ema'))
    says("two objectives called 'fixmatch'", FixMatch(), FixMatch(threshold=.5))
    says('EntropyMin needs classes.*leave entropy out', EntropyMin(), loss_func=nn.MSELoss())
    for kw,text in ((dict(threshold=1.5),'threshold=1.5'), (dict(threshold=-.1),'threshold=-0.1'), (dict(weighting='flex'),"weighting='flex'"), (dict(align='x'),"align='x'"), (dict(teacher='x'),"teacher='x'")):
        with pytest.raises(ValueError, match=text): FixMatch(**kw)
    with pytest.raises(ValueError, match='threshold=2'): PseudoLabel(threshold=2)
    with pytest.raises(ValueError, match='eps=0'): VAT(eps=0)

def test_teacher_without_its_name(dls):
    "the Learner's `EMA` is the teacher also where fastai took away its name, with another that was refused"
    learn = Learner(dls, net(), cbs=[MeanTeacher(ramp_pct=0), FixMatch(teacher='ema'), EMA(.9)]); teachers = []
    class Look(Callback):
        order,run_valid = 6,False
        def after_loss(self): teachers.append(self.unlabeled_step._batch.teacher)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='two EMA'): learn.fit(1, cbs=EMA())
        assert not hasattr(learn, 'ema')
        learn.fit(1, cbs=Look())
    assert all(isinstance(o, nn.Module) for o in teachers) and len(teachers)==3

@pytest.mark.parametrize('cb', [PseudoLabel(threshold=.5, ramp_pct=0), FixMatch(threshold=.5), PiModel(), EntropyMin(.1)], ids=lambda o: o.name)
def test_figures_of_several_labels(dls, cb):
    "with several labels an image, an objective's figure is the mean over images and classes: a share stays one"
    class Bits(nn.BCEWithLogitsLoss):
        def forward(self, out, y): return super().forward(out, nn.functional.one_hot(y, 2).float())
    learn = Learner(dls, net(), loss_func=Bits(), metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=cb)
    assert 0<=learn.recorder.values[0][-1]<=1
