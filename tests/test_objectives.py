"Several objectives together: what one adds to a step doesn't depend on the others"
import itertools,math,warnings
from functools import partial
import numpy as np,pytest,torch
from PIL import Image
from torch import nn
from fastai.vision.all import BCEWithLogitsLossFlat,Callback,ConvLayer,Datasets,Learner,MSELossFlat,SGD,TensorMultiCategory,accuracy,tensor
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

def fitted(dls, *cbs, n=1, lr=1e-2, model=None, metrics=accuracy, **kw):
    learn = Learner(dls, model or net(), opt_func=partial(SGD, mom=.9), metrics=metrics, cbs=FirstGradients(), **kw)
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
    for make,text in ((lambda: VAT(eps=0),'eps=0'), (lambda: VAT(n_power=1.5),'n_power=1.5'), (lambda: BarlowTwins(n_proj=0),'n_proj=0'), (lambda: BarlowTwins(n_proj=2.5),'n_proj=2.5'), (lambda: BarlowTwins(lam=-1),'lam=-1'), (lambda: FixMatch(fairness=-1),'fairness=-1'), (lambda: FixMatch(start_pct=1),'start_pct=1')):
        with pytest.raises(ValueError, match=text): make()

def test_the_loss_is_named(dls):
    "a loss for numbers is called what the user knows it by"
    for loss,name in ((MSELossFlat(),'MSELoss'), (nn.L1Loss(),'L1Loss')):
        with pytest.raises(ValueError, match=f'this Learner, {name}, is for numbers'): fitted(dls, EntropyMin(), loss_func=loss)

class Aux(nn.Sequential):
    "With a second output in training alone, as Inception has it"
    def forward(self, x): out = super().forward(x); return (out,out) if self.training else out
def first_of(p, t): return nn.functional.cross_entropy(p[0] if isinstance(p, tuple) else p, t)

@pytest.mark.parametrize('name', family)
def test_a_second_output_in_training_alone(dls, name):
    "what reads classes says so; what reads features trains"
    go = lambda: fitted(dls, *family[name](), model=Aux(*net()), loss_func=first_of)
    if name in ('rotation','rotation_one','jigsaw','barlow_twins'): assert go().recorder.values[0][2]<math.inf
    else:
        with pytest.raises(ValueError, match='and Aux gives a tuple, not one tensor: leave'): go()

def paired_items(n_inp, tfms):
    "Images of one size behind several pipelines, in pairs of loaders"
    rng = np.random.default_rng(0); pics = [torch.tensor(rng.random((3,32,32)), dtype=torch.float32) for _ in range(12)]
    dsets = Datasets(range(12), [[lambda i: pics[i]]]*n_inp+tfms, n_inp=n_inp, splits=(range(8),range(8,12)))
    return PairedDataLoaders.from_dls(dsets.dataloaders(bs=4, num_workers=0, device='cpu'), range(12), unlabeled_bs=4, seed=0)

def test_two_targets():
    "one output of several meanings: what reads it as one kind is refused, what reads features trains"
    data = paired_items(1, [[lambda o: tensor(o%2)],[lambda o: tensor(float(o))]])
    loss = lambda p,c,v: nn.functional.cross_entropy(p, c)+(p[:,1]-v).square().mean()
    for cb in (FixMatch(),PiModel()):
        with pytest.raises(ValueError, match='what one target asks, and labelled images have 2'): Learner(data, net(), loss_func=loss).fit(1, cbs=cb)
    learn = Learner(data, net(), loss_func=loss)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=RotationPretext())

def test_two_inputs():
    "no objective trains on half of an image"
    class Both(nn.Sequential):
        def forward(self, a, b=None): return super().forward(a)
    for cb in (FixMatch(),RotationPretext()):
        with pytest.raises(ValueError, match='of one input, and those of this Learner have 2: leave '+cb.name): Learner(paired_items(2, [[lambda o: tensor(o%2)]]), Both(*net()), loss_func=nn.functional.cross_entropy).fit(1, cbs=cb)

def test_several_classes_by_the_labels():
    "labels tell that an image may have several classes where the loss is one's own function; its bits are those of fastai's loss"
    def losses(loss):
        data = paired_items(1, [[lambda o: TensorMultiCategory([float(o%2),1.])]])
        return fitted(data, PiModel(ramp_pct=0), FixMatch(threshold=.5), loss_func=loss, metrics=[]).recorder.values[0][3:]
    def own(p, t): return nn.functional.binary_cross_entropy_with_logits(p, t)
    assert losses(own)==losses(BCEWithLogitsLossFlat())

def test_search_that_broke_off(dls):
    "after Ctrl-C in `lr_find` a fit with a further objective runs, and heads begin where they were before the search"
    cb = RotationPretext(); learn = Learner(dls, net(), cbs=cb); seen = {}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    before = {k:v.clone() for k,v in cb.fit_heads.state_dict().items()}
    class Break(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter==2: raise KeyboardInterrupt
    class Look(Callback):
        order,run_valid = 100,False
        def before_batch(self): seen.setdefault('head', {k:v.clone() for k,v in cb.fit_heads.state_dict().items()})
    with learn.no_bar(), learn.no_logging():
        learn.add_cb(b := Break())
        with pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False, start_lr=1.)
        assert not equal(before, cb.fit_heads.state_dict())
        learn.remove_cb(b); learn.fit(1, .01, cbs=[FixMatch(),Look()])
    assert equal(before, seen['head'])

def test_an_objective_that_never_begins(dls):
    "a warning, in a fit whose last step comes too early; none where one step is left"
    for start,some in ((.7,True), (.6,False)):   # three steps, at 0, 1/3 and 2/3
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always'); learn = fitted(dls, FixMatch(start_pct=start))
        assert any('fixmatch does nothing in this fit of 3 steps' in str(o.message) for o in said)==some==math.isnan(learn.recorder.values[0][3])

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
