"""Each feature of a fastai Learner with each objective, and what goes wrong with objectives: bad batches, losses and labels.
A test's docstring says what is asserted; one tiny network and its data serve all."""
from copy import deepcopy
from functools import partial
import pytest,torch,warnings
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CategoryBlock,CrossEntropyLossFlat,DataBlock,FuncSplitter,ImageBlock,LabelSmoothingCrossEntropyFlat,Learner,MSELossFlat,
    MultiCategoryBlock,ProgressCallback,RegressionBlock,Resize,SaveModelCallback,SGD,TerminateOnNaNCallback,get_image_files,noop,vision_learner)
from torchvision.models import resnet18
from fastai.callback.all import GradientAccumulation,GradientClip,MixUp
from sesemi_fastai.all import BFloat16,EMA,EntropyMin,FixMatch,PairedDataLoaders,RotationPretext,StepSeed,UnlabeledObjective,VAT
from test_objectives import apart,dls,equal,family

def net(norm=False, n_out=2):
    "With BatchNorm or, where steps are to be compared that leave other running averages to a teacher, without"
    torch.manual_seed(0)
    layer = lambda i,o: nn.Sequential(nn.Conv2d(i,o,3,2,1), *[nn.BatchNorm2d(o)]*norm, nn.ReLU())
    return nn.Sequential(layer(3,8), layer(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2), nn.Linear(16,n_out))

# each objective with one way to go backward, the other where the first argument is 1: that both are the same is asserted in test_objectives.py
def pairs(first=0): return pytest.mark.parametrize('name,backward', [(n,('joint','sequential')[(i+first)%2]) for i,n in enumerate(family)])

def make(dls, cbs=(), norm=False, n_out=2, **kw):
    learn = Learner(dls, net(norm, n_out), cbs=[StepSeed(), *cbs], **(dict(opt_func=partial(SGD, mom=.9), loss_func=CrossEntropyLossFlat())|kw))
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn

def objective(learn): return next(o for o in learn.cbs if isinstance(o, UnlabeledObjective))
def column(learn, name, i=-1): return learn.recorder.values[i][learn.recorder.metric_names.index(name)-1]
def heads(o): return {k:v.clone() for k,v in o.fit_heads.state_dict().items()}
def flat(o):
    "All tensors and numbers of a state"
    if isinstance(o, dict): return [x for k in sorted(o, key=str) for x in flat(o[k])]
    return [x for v in o for x in flat(v)] if isinstance(o, (list,tuple)) else [torch.as_tensor(o if isinstance(o, (int,float,torch.Tensor)) else 0)]
def same_state(a, b): return len(flat(a))==len(flat(b)) and all(torch.equal(x, y) for x,y in zip(flat(a), flat(b)))
def is_plain(model): return not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in model.modules()) and all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))

class Grads(Callback):
    "Gradients of the model and of heads at each step, last of all"
    order = 100
    def before_fit(self): self.seen = []
    def before_step(self):
        o = objective(self.learn)
        self.seen.append(torch.cat([p.grad.flatten() for m in (self.model, o.fit_heads) for p in m.parameters() if p.grad is not None]).clone())

@pytest.mark.parametrize('name', family)
def test_one_cycle(dls, name):
    "`fit_one_cycle`: finite columns, the head learns with the hyperparameters of the last group, the model stays as it was built"
    learn = make(dls, family[name](), norm=True); before = list(learn.model.state_dict())
    learn.fit_one_cycle(2, 1e-2); o = objective(learn)
    assert list(learn.model.state_dict())==before and all(torch.tensor(v[:-1]).isfinite().all() for v in learn.recorder.values) and is_plain(learn.model)
    assert learn.recorder.metric_names[-3:]==[f'{o.name}_loss',f'{o.name}_{o.figure}','time']
    if o.fit_opt is not None: assert {k:v for k,v in o.fit_opt.hypers[0].items()}==dict(learn.opt.hypers[-1]) and all(s['grad_avg'].abs().sum()>0 for s in o.fit_opt.state.values() if 'grad_avg' in s)

@pairs()
def test_accumulation_and_clip(dls, name, backward):
    "`GradientAccumulation`: gradients are the mean over the accumulated batches, heads' as well; `GradientClip`: the norm of all of them together is that asked for"
    kw = dict(backward=backward)
    one,two,clip = make(dls, [*family[name](**kw), Grads()]),make(dls, [*family[name](**kw), Grads(), GradientAccumulation(16)]),make(dls, [*family[name](**kw), Grads(), GradientClip(.01)])
    for o in (one,two,clip): o.fit(1, 0.)
    g,(h,*_),c = one.grads.seen,two.grads.seen,clip.grads.seen
    assert len(g)==3 and torch.allclose(h, (g[0]+g[1])/2, atol=1e-6)
    for a,b in zip(g, c): assert a.norm()>.01 and torch.allclose(a*.01/a.norm(), b, atol=1e-5) and b.norm()==pytest.approx(.01, rel=1e-3)

@pytest.mark.parametrize('name', family)
def test_labelled_batch_alone_is_changed(dls, name):
    "`MixUp`, label smoothing: change the supervised loss, and nothing of the objective"
    plain,mixed,smooth = (make(dls, [*family[name](), *more], **kw) for more,kw in (((),{}), ([MixUp()],{}), ((),dict(loss_func=LabelSmoothingCrossEntropyFlat(eps=.3)))))
    for o in (plain,mixed,smooth): o.fit(1, 0.)
    nm = objective(plain).name
    for o in (mixed,smooth):
        assert column(o, f'{nm}_loss')==pytest.approx(column(plain, f'{nm}_loss'), abs=1e-6)
        assert column(o, 'train_loss')!=pytest.approx(column(plain, 'train_loss'), abs=1e-4)

@pairs(1)
def test_bfloat16(dls, name, backward):
    "`BFloat16`: all training passes compute in bfloat16, losses and gradients in float32, near those of full precision"
    seen = set()
    class Types(Callback):
        def before_fit(self): self.h = self.model[0][0].register_forward_hook(lambda m,i,o: seen.add((o.dtype, m.training)))
        def after_fit(self): self.h.remove()
    full,low = make(dls, [*family[name](backward=backward), Grads()], norm=True),make(dls, [*family[name](backward=backward), BFloat16(), Grads(), Types()], norm=True)
    for o in (full,low): o.fit(1, 0.)
    nm = objective(full).name
    assert {d for d,training in seen if training}-({torch.float32} if name=='vat' else set())=={torch.bfloat16}   # VAT looks for its direction in full precision
    assert {g.dtype for g in low.grads.seen}=={torch.float32} and not torch.is_autocast_enabled('cpu')
    if name not in ('pseudo_label','fixmatch','fixmatch_free'): assert column(low, f'{nm}_loss')==pytest.approx(column(full, f'{nm}_loss'), rel=.1, abs=.02)   # those have thresholds, over which rounding can carry
    cos = torch.cosine_similarity(low.grads.seen[0], full.grads.seen[0], dim=0); assert cos>.9, cos

def from_block(dls, block, get_y, **kw):
    "The same images by a DataBlock of the user's own"
    db = DataBlock((ImageBlock, block), get_items=lambda p: get_image_files(p, folders=['train','val']), get_y=get_y, splitter=FuncSplitter(lambda o: o.parent.parent.name=='val'), item_tfms=Resize(32))
    return PairedDataLoaders.from_dls(db.dataloaders(dls.path, bs=8, num_workers=0), get_image_files(dls.path/'unsup'), **(dict(unlabeled_bs=4, seed=0, n_steps=2)|kw))

@pytest.fixture(scope='module')
def tasks(dls):
    "Data of several labels an image, and of numbers, with what a Learner needs for it"
    return dict(multi=(from_block(dls, MultiCategoryBlock(), lambda o: [o.parent.name,'all']), dict(n_out=3, loss_func=BCEWithLogitsLossFlat())),
                regression=(from_block(dls, RegressionBlock(n_out=2), lambda o: [float(o.parent.name=='b'),1.]), dict(n_out=2, loss_func=MSELossFlat())))

@pytest.mark.parametrize('task', ['multi','regression'])
@pytest.mark.parametrize('name', family)
def test_other_tasks(tasks, name, task):
    "several labels an image, and regression: trained where the objective is for it, else refused in one sentence before the first step"
    data,kw = tasks[task]
    if name in ('fixmatch_free','fixmatch_soft') and task=='multi':   # 'all' is in every image, and there are no uniform shares
        with pytest.raises(ValueError, match="class all .* no label or in all|align='labels'"): make(data, family[name](), **kw).fit(1, 1e-2)
        cbs = [FixMatch(weighting='free' if 'free' in name else 'soft', momentum=.9)]
    else: cbs = family[name]()
    learn = make(data, cbs, **kw); o = objective(learn); before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    if task not in o.tasks:
        with pytest.raises(ValueError, match=f'{type(o).__name__} needs.*leave {o.name} out'): learn.fit(1, 1e-2)
        assert equal(before, learn.model.state_dict())
        return
    plain = make(data, **kw); plain.fit(1, 1e-2); learn.fit(1, 1e-2)
    assert torch.tensor(learn.recorder.values[0][:-1]).isfinite().all() and apart(plain.model.state_dict(), learn.model.state_dict())>0

@pytest.mark.parametrize('name', family)
def test_save_model(dls, tmp_path, name):
    "`SaveModelCallback(monitor='<name>_loss')`, `learn.save`, `load`: the best model comes back, and loads into a Learner without objectives; optimizer included"
    nm = objective(make(dls, family[name]())).name
    learn = make(dls, [*family[name](), SaveModelCallback(monitor=f'{nm}_loss', fname='best', with_opt=True)], norm=True, path=tmp_path)
    learn.fit(2, 1e-2)
    fresh = make(dls, norm=True, path=tmp_path); fresh.load('best', with_opt=True)
    assert equal(learn.model.state_dict(), fresh.model.state_dict()) and not any('head' in k or 'projector' in k for k in fresh.model.state_dict())
    again = make(dls, family[name](), norm=True, path=tmp_path); again.load('best'); again.fit(1, 1e-2)
    assert torch.tensor(again.recorder.values[-1][:-1]).isfinite().all()

def test_exports(dls, tmp_path, predict_alone):
    "`learn.export` of a Learner with each objective: loads in a process without this package, and predicts the same"
    image,want = dls.valid.items[0],{}
    for name in family:
        learn = make(dls, family[name](), norm=True, path=tmp_path); learn.fit(1, 1e-2); n = len(learn.cbs)
        learn.export(f'{name}.pkl')
        assert b'sesemi' not in (tmp_path/f'{name}.pkl').read_bytes() and len(learn.cbs)==n
        with learn.no_bar(): want[str(tmp_path/f'{name}.pkl')] = learn.predict(image)[2].tolist()
    check = f"for f,want in {want!r}.items():\n    got = load_learner(f).predict({str(image)!r})[2]\n    assert torch.allclose(got, tensor(want), atol=1e-5), f"
    assert predict_alone(next(iter(want)), image, check)==pytest.approx(next(iter(want.values())), abs=1e-5)

@pytest.mark.parametrize('name', family)
def test_lr_find(dls, name):
    "`lr_find`: no trace in model, head, its optimizer, thresholds and averages; the fit after it is that without it"
    a,b = make(dls, family[name](), norm=True),make(dls, family[name](), norm=True)
    before = deepcopy(b.model.state_dict())
    b.lr_find(num_it=4, show_plot=False, suggest_funcs=())
    assert equal(before, b.model.state_dict()) and is_plain(b.model)
    for o in (a,b): o.fit(1, 1e-2)
    assert equal(a.model.state_dict(), b.model.state_dict()) and same_state(objective(a).state_dict(), objective(b).state_dict()) and a.recorder.values[0][:-1]==b.recorder.values[0][:-1]
    state = deepcopy(objective(b).state_dict())
    b.lr_find(num_it=4, show_plot=False, suggest_funcs=()); assert same_state(state, objective(b).state_dict())

@pytest.mark.parametrize('name', family)
def test_deepcopy(dls, name):
    "`deepcopy(learn)`, before and after a fit: the copy trains as the original would, on its own"
    learn = make(dls, family[name](), norm=True)
    for _ in range(2):
        copy = deepcopy(learn); before = heads(objective(learn)),deepcopy(learn.model.state_dict()),deepcopy(objective(learn).state_dict())
        assert objective(copy).learn is copy and objective(copy) is not objective(learn) and sum(type(o).__name__=='UnlabeledStep' for o in copy.cbs)==1
        copy.fit(1, 1e-2)
        assert equal(before[0], heads(objective(learn))) and equal(before[1], learn.model.state_dict()) and same_state(before[2], objective(learn).state_dict())
        learn.fit(1, 1e-2)
        assert equal(copy.model.state_dict(), learn.model.state_dict()) and equal(heads(objective(copy)), heads(objective(learn))) and copy.recorder.values[0][:-1]==learn.recorder.values[0][:-1]

def test_kept_over_fits(dls):
    "thresholds and alignment go on in the next fit, and begin anew where the given threshold, the labels' shares or the classes are others"
    cb = FixMatch(threshold=.5, align='labels', momentum=.9); learn = make(dls, [cb]); learn.fit(1, 1e-2); first = dict(cb.kept)
    learn.fit(1, 1e-2); assert all(cb.kept[k] is v for k,v in first.items())
    cb.threshold = .7; learn.fit(1, 1e-2); assert cb.kept['weighting'].threshold==.7 and cb.kept['align'] is first['align']
    learn.dls = PairedDataLoaders.from_folder(dls.path, size=32, unlabeled_bs=6, bs=8, num_workers=0, seed=0, n_steps=3, exclude=get_image_files(dls.path/'train/a')[:4])
    learn.fit(1, 1e-2); assert cb.kept['align'].target.tolist()==pytest.approx([1/3,2/3])
    cb = FixMatch(weighting='free'); learn = make(dls, [cb, VAT(eps=2.)]); learn.fit(1, 1e-2); was = cb.kept['weighting']; learn.fit(1, 1e-2); assert cb.kept['weighting'] is was
    learn.model[-1] = nn.Linear(16,3); learn.fit(1, 1e-2, reset_opt=True); assert cb.kept['weighting'].shares.shape==(3,)
    class Bits(nn.BCEWithLogitsLoss):
        def forward(self, out, y): return super().forward(out, nn.functional.one_hot(y, 3).float())
    learn.loss_func = Bits(); learn.fit(1, 1e-2); assert cb.kept['weighting'].shares.shape==(3,2) and learn.vat.task=='multi'

class Interrupt(Callback):
    "Ctrl-C at an event of the second step"
    order = 60
    def __init__(self, event): setattr(self, event, self._stop)
    def _stop(self):
        if self.training and self.learn.train_iter==1: raise KeyboardInterrupt

@pairs()
def test_interrupts(dls, name, backward):
    "Ctrl-C before, within and behind a step, with `fit(cbs=…)`: callbacks, hooks and BatchNorm are those from before, and the next fit is whole"
    learn = make(dls, norm=True); before = [type(o) for o in learn.cbs]
    for event in (('before_batch','before_step') if backward=='joint' else ('after_loss','after_step')):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=[*family[name](backward=backward), Interrupt(event)])
        assert [type(o) for o in learn.cbs]==before and is_plain(learn.model) and torch.is_grad_enabled()
    learn.fit(1, 1e-3, cbs=family[name](backward=backward))
    assert len(learn.recorder.losses)==3 and torch.tensor(learn.recorder.values[-1][:-1]).isfinite().all() and [type(o) for o in learn.cbs]==before

def three(bad, at):
    "Three objectives, of which one's loss is NaN from a step on"
    cbs = [RotationPretext(.1), EntropyMin(.1), FixMatch(.1, threshold=.5)]
    o = next(o for o in cbs if o.name==bad); loss = o.loss
    def f(batch):
        l,figure = loss(batch)
        return l*(float('nan') if o.learn.train_iter>=at else 1), figure
    o.loss = f
    return cbs

@pytest.mark.parametrize('bad', ['rotation','entropy','fixmatch'])
def test_nan_in_one_of_three(dls, capsys, bad):
    "`TerminateOnNaNCallback`: the fit ends with one sentence that names the objective; without it, training goes on and a warning names it"
    learn = make(dls, [*three(bad, 1), TerminateOnNaNCallback()]); learn.fit(2, 1e-3)
    assert capsys.readouterr().out.strip()==f'{bad}_loss is nan at epoch 0, step 1: stopped.' and len(learn.recorder.losses)==1
    if bad!='entropy': return   # the slow part once
    data = PairedDataLoaders.from_folder(dls.path, size=32, unlabeled_bs=2, bs=2, num_workers=0, seed=0, n_steps=51, verbose=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = make(data, three(bad, 50)); learn.fit(1, 1e-4)
    said = [str(o.message) for o in said if '_loss was not finite' in str(o.message)]
    assert len(learn.recorder.losses)==51 and len(said)==1 and said[0].startswith('entropy_loss was not finite in 1 of the last 51 steps') and '. ' not in said[0], said

@pairs(1)
def test_batch_of_one(dls, name, backward):
    "`unlabeled_bs=1`: trains; Barlow Twins, which compares images, says in one sentence before the first step why not"
    data = PairedDataLoaders.from_folder(dls.path, size=32, unlabeled_bs=1, bs=4, num_workers=0, seed=0, n_steps=2, verbose=False)
    learn = make(data, family[name](backward=backward), norm=True)
    if name=='barlow_twins':
        with pytest.raises(ValueError, match='BarlowTwins compares the images of a batch, and unlabeled_bs is 1: use 2 or more.'): learn.fit(1, 1e-3)
        assert not hasattr(learn,'loss') or not len(learn.recorder.losses)
    else:
        learn.fit(1, 1e-3); assert torch.tensor(learn.recorder.values[-1][:-1]).isfinite().all() and all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_batch_of_one_and_batchnorm_of_vectors(dls):
    "`vision_learner`, whose head has BatchNorm over the batch alone: an unlabelled batch of one is refused in one sentence"
    data = PairedDataLoaders.from_folder(dls.path, size=32, unlabeled_bs=1, bs=4, num_workers=0, seed=0, n_steps=1, verbose=False)
    learn = vision_learner(data, resnet18, pretrained=False); learn.remove_cb(ProgressCallback); learn.logger = noop
    with pytest.raises(ValueError, match="one unlabelled image.*use an unlabeled_bs of 2 or more for each BatchNorm group, or bn='running'"): learn.fit(1, 1e-3, cbs=EntropyMin(.1))
    learn.fit(1, 1e-3, cbs=EntropyMin(.1, bn='running')); assert len(learn.recorder.losses)==1

@pytest.mark.parametrize('labels,words', [(dict(a='a', b='b'),'class c has no label'), (dict(a='a', b='a'),'classes b, c has no label')])
def test_classes_without_labels(dls, labels, words):
    "`FixMatch(align='labels')` and a class that no labelled image has: one sentence names it, before the first step; the other alignments train"
    data = from_block(dls, CategoryBlock(vocab=['a','b','c']), lambda o: labels[o.parent.name])
    with pytest.raises(ValueError, match=words+".*add labels, or use align='uniform' or None"): make(data, [FixMatch(align='labels')], n_out=3).fit(1, 1e-3)
    learn = make(data, [FixMatch(align='uniform')], n_out=3); learn.fit(1, 1e-3); assert len(learn.recorder.losses)==2
