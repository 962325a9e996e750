"""Each feature of a fastai Learner with `RotationPretext` attached; a test's docstring says which, and what is asserted.
Each would fail if the feature or the callback were ignored."""
import inspect,math,warnings,zipfile
from copy import deepcopy
from functools import partial
import matplotlib.pyplot as plt,numpy as np,pytest,torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet18
from fastcore.all import L,noop
from fastai.callback.schedule import LRFinder
from fastai.vision.all import (AdaptiveAvgPool,Callback,CancelBackwardException,CancelBatchException,CancelEpochException,CancelStepException,ConvLayer,Flatten,OptimWrapper,CancelFitException,CancelTrainException,ClassificationInterpretation,
    CrossEntropyLossFlat,EarlyStoppingCallback,LabelSmoothingCrossEntropyFlat,Learner,ParamScheduler,ProgressCallback,ReduceLROnPlateau,
    SaveModelCallback,SchedLin,SGD,ranger,ShowGraphCallback,TerminateOnNaNCallback,accuracy,accuracy_multi,get_image_files,load_learner,mae,tensor,vision_learner,
    set_seed,DataBlock,FuncSplitter,ImageBlock,MultiCategoryBlock,RegressionBlock,Resize,BCEWithLogitsLossFlat,MSELossFlat)
from fastai.callback.all import ChannelsLast,CSVLogger,CutMix,GradientAccumulation,GradientClip,MixedPrecision,MixUp
from sesemi_fastai.all import BatchNormGroups,BFloat16,EntropyMin,JigsawPretext,NesterovSGD,PairedDataLoaders,PlainProgress,RotationPretext,StepSeed
from sesemi_fastai.passes import feature_pass
from sesemi_fastai.features import find_feature_layer
from sesemi_fastai.generators import get_generators

class Net(nn.Module):
    "A small network with names as torchvision gives them"
    def __init__(self, n_out=2, drop=0.):
        super().__init__()
        self.conv1,self.bn1,self.layer1 = nn.Conv2d(3,8,3,2,bias=False),nn.BatchNorm2d(8),ConvLayer(8,16,stride=2)
        self.pool,self.drop,self.fc = nn.Sequential(AdaptiveAvgPool(1), Flatten()),nn.Dropout(drop),nn.Linear(16,n_out)
    def body(self, x): return self.pool(self.layer1(self.bn1(self.conv1(x)).relu()))
    def forward(self, x): return self.fc(self.drop(self.body(x)))

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path,rng = tmp_path_factory.mktemp('data'),np.random.default_rng(0)
    y,x = np.mgrid[:36,:36]
    for nm,n in {'train/a':8,'train/b':8,'val/a':4,'val/b':4,'unsup':8}.items():
        (path/nm).mkdir(parents=True)
        for i in range(n):
            a = np.stack([x*6,y*6,0*x+200*('b' in nm)],-1)+rng.integers(0,40,(36,36,3))
            Image.fromarray(a.clip(0,255).astype(np.uint8)).save(path/nm/f'{i}.png')
    return PairedDataLoaders.from_folder(path, size=32, unlabeled_bs=4, bs=8, num_workers=0, seed=0, n_steps=4, verbose=False)

@pytest.fixture
def make(dls, tmp_path):
    "A Learner from the same weights, with the data at its first epoch"
    def f(*cbs, pretext=True, model=None, **kw):
        for dl in (dls.train, dls.unlabeled): dl.epoch = 0
        torch.manual_seed(0)
        learn = Learner(dls, Net() if model is None else model, path=tmp_path, cbs=[*cbs, *([RotationPretext()] if pretext else [])],
                        **(dict(metrics=accuracy, opt_func=partial(SGD, mom=0.), wd=0.)|kw))
        learn.remove_cb(ProgressCallback); learn.logger = noop
        return learn
    return f

def halves(model): return L(model.conv1, model.bn1), L(model.layer1, model.fc)
def two_groups(model): return L([sum([list(m.parameters()) for m in h], []) for h in halves(model)])
def fit_each(*learners, lr=.01):
    "An epoch for each, on the same batches"
    for o in learners:
        for dl in (o.dls.train, o.dls.unlabeled): dl.epoch = 0
        o.fit(1, lr)
def prepared(learn):
    "Heads are there, as from the first training step on"
    if learn.opt is None: learn.create_opt()
    learn.unlabeled_step.prepare()
    return learn
def heads(learn): return {f'{o.name}.{n}':p for o in learn.unlabeled_step.objectives for n,p in o.fit_heads.named_parameters()}
def head(learn): return learn.rotation.fit_heads['head'].weight
def equal(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)
def weights(learn): return {k:v.clone() for k,v in (learn.model.state_dict()|heads(learn)).items()}
def same_generators(a, b): return a['python']==b['python'] and (a['numpy'][1]==b['numpy'][1]).all() and torch.equal(a['torch'], b['torch'])
def no_trace(path):
    "Whether nothing that was pickled in the file names this package"
    with zipfile.ZipFile(path) as z: return not any(b'sesemi' in z.read(o) for o in z.namelist())
def column(learn, name, i=-1): return learn.recorder.values[i][learn.recorder.metric_names.index(name)-1]

class Grads(Callback):
    "The head's gradient at each step, before anyone changes it"
    order = 100
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append(head(self.learn).grad.clone())

class AllGrads(Callback):
    "Gradients of model and heads at each step, after all that changes them"
    order = 100
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append({k:v.grad.clone() if v.grad is not None else None for k,v in [*self.model.named_parameters(), *heads(self.learn).items()]})

def test_fit(make):
    "`fit`: the head learns, two columns follow the metrics"
    learn = prepared(make()); before = head(learn).clone(); learn.fit(2, .01)
    assert (head(learn)!=before).any() and learn.recorder.metric_names[-3:]==['rotation_loss','rotation_acc','time']
    assert all(len(o)==5 for o in learn.recorder.values) and 0<column(learn,'rotation_loss')<5

def test_columns(make):
    "`rotation_loss`, `rotation_acc`: the means over all views of the epoch"
    logits = []
    learn = prepared(make()); learn.rotation.fit_heads['head'].register_forward_hook(lambda m,i,o: logits.append(o.detach())); learn.fit(1, .01)
    x = torch.cat(logits); y = torch.arange(4).repeat(len(x)//4)
    assert len(x)==4*4*4 and column(learn,'rotation_loss')==pytest.approx(nn.functional.cross_entropy(x, y).item(), rel=1e-5)
    assert column(learn,'rotation_acc')==pytest.approx((x.argmax(1)==y).float().mean().item())

def test_weight(make):
    "weight: with `weight=0` weights and BatchNorm buffers are those of a Learner without the callback, bitwise; with another they aren't"
    a,b,c = make(pretext=False),make(),make(); b.rotation.weight = 0
    fit_each(a, b, c)
    assert equal(a.model.state_dict(), b.model.state_dict()) and not torch.equal(a.model.conv1.weight, c.model.conv1.weight) and column(b,'rotation_loss')>0

def test_classifier_is_left_alone(make):
    "the classifier: what the unlabelled pass makes of it is not trained on; its gradient is that of a Learner without the callback"
    class Fc(Callback):
        order = 100
        def before_step(self):
            if self.iter==0: self.learn.fc_grad = self.model.fc.weight.grad.clone()
    a,b = make(Fc(), pretext=False),make(Fc()); fit_each(a, b, lr=0.)
    assert torch.equal(a.fc_grad, b.fc_grad)

def test_fit_one_cycle_with_groups(make):
    "`fit_one_cycle` with a rate a group: the head has the last group's, at each step, and is in no group"
    class Rates(Callback):
        order = 100
        def after_step(self): self.learn.rates.append(tuple(self.rotation.fit_opt.hypers[0][k]==self.opt.hypers[-1][k]!=self.opt.hypers[0][k] for k in ('lr',))+(self.rotation.fit_opt.hypers[0]['mom']==self.opt.hypers[-1]['mom'],))
    learn = make(Rates(), splitter=two_groups); learn.rates = []; learn.fit_one_cycle(1, slice(1e-4,1e-2))
    assert learn.rates==[(True,True)]*4 and not any(p is o for p,*_ in learn.opt.all_params() for o in heads(learn).values())

def test_fit_flat_cos(make):
    "`fit_flat_cos`: the rate ends at zero, the head learns"
    learn = prepared(make()); before = head(learn).clone(); learn.fit_flat_cos(2, .01)
    assert learn.recorder.lrs[0]==.01 and learn.recorder.lrs[-1]<.0051 and (head(learn)!=before).any()

def test_fit_poly_warmup_on_existing_optimizer(make):
    "`fit_poly_warmup(cbs=…)` with an optimizer that exists: rates as published; the optimizer keeps its parameters"
    learn = make(pretext=False); learn.create_opt(); opt,params = learn.opt,[p for p,*_ in learn.opt.all_params()]
    cb = RotationPretext(); learn.fit_poly_warmup(1, .01, cbs=cb)
    assert learn.opt is opt and [id(p) for p,*_ in opt.all_params()]==[*map(id, params)] and len(cb.fit_heads)==1
    assert not hasattr(learn,'rotation') and 'rotation_loss' in learn.recorder.metric_names
    assert learn.recorder.hps['lr']==pytest.approx([1e-3]+[.01*(1-(t-.5)/3.5)**.5 for t in (1,2,3)])   # 4 steps, half of one warms up

def test_fine_tune(make):
    "`fine_tune`, `freeze`, `unfreeze`: frozen layers stay while the head learns"
    learn = prepared(make(splitter=two_groups)); learn.freeze()
    body,h = learn.model.conv1.weight.clone(),head(learn).clone()
    learn.fit(1, .01)
    assert torch.equal(learn.model.conv1.weight, body) and (head(learn)!=h).any()
    learn.fine_tune(1, .01, freeze_epochs=1)
    assert (learn.model.conv1.weight!=body).any()

class HeadAt(Callback):
    "The head after each step, before anyone puts it back"
    order = 100
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(head(self.learn).clone())

@pytest.mark.parametrize('attached', [True,False])
def test_lr_find(make, attached):
    "`lr_find`: trains the head with the rest, then weights, head, its optimizer and the streams are as they were: the fit that follows is the one without it, bitwise"
    def fitted(find):
        learn = make(HeadAt(), pretext=attached, opt_func=partial(SGD, mom=.9)); cbs = [] if attached else [RotationPretext()]
        if attached: learn.fit(1, .01)
        before,state = (weights(learn),deepcopy(learn.rotation.state_dict())) if attached else (None,None)
        if find:
            if attached:
                learn.lr_find(num_it=6, show_plot=False, suggest_funcs=())
                assert len(learn.head_at.seen)>=3 and not torch.equal(learn.head_at.seen[-1], before['rotation.head.weight'])
                after = learn.rotation.state_dict()
                assert equal(before, weights(learn)) and all(torch.equal(a['grad_avg'], b['grad_avg']) for a,b in zip(state['opt']['state'], after['opt']['state'], strict=True))
            else: learn.fit(1, cbs=[LRFinder(num_it=6), *cbs])
        learn.fit(1, .01, cbs=cbs)
        return learn.model.state_dict()
    a,b = fitted(True),fitted(False)
    assert equal(a, b)

def test_param_scheduler(make):
    "`ParamScheduler`: any hyper-parameter"
    learn = make(); learn.fit(1, .01, cbs=ParamScheduler({'mom':SchedLin(.1,.9)}))
    assert learn.recorder.hps['mom'][0]==pytest.approx(.1) and learn.recorder.hps['mom'][-1]>.5

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_gradient_accumulation(make, backward):
    "`GradientAccumulation`: the head's gradient is the mean over the accumulated batches"
    one,two = make(Grads()),make(Grads(), GradientAccumulation(16))
    one.rotation.backward = two.rotation.backward = backward
    fit_each(one, two, lr=0.)
    g = one.grads.seen
    assert torch.allclose(two.grads.seen[-1], (g[2]+g[3])/2, atol=1e-6)

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_gradient_clip(make, backward):
    "`GradientClip`: every gradient, the head's among them, times `max_norm` by the norm of all of them, as by hand"
    def grads(*cbs):
        learn = make(*cbs, AllGrads()); learn.rotation.backward = backward; learn.fit(1, 0.)
        return learn.all_grads.seen[0]
    g,clipped = grads(),grads(GradientClip(.1))
    norm = sum(v.double().square().sum() for v in g.values()).sqrt()
    assert norm>.2 and any('rotation' in k and v.norm()>.01 for k,v in g.items())
    for k,v in g.items(): assert torch.allclose(clipped[k], (v*.1/norm).float(), rtol=1e-4, atol=1e-7), k

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixup(make, cb):
    "`MixUp`, `CutMix`: mix labelled images only"
    plain,mixed = make(),make(cb())
    fit_each(plain, mixed, lr=0.)
    assert column(plain,'rotation_loss')==pytest.approx(column(mixed,'rotation_loss'), abs=1e-6)
    assert column(plain,'train_loss')!=pytest.approx(column(mixed,'train_loss'), abs=1e-4)

@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropyFlat(), CrossEntropyLossFlat(weight=tensor([1.,5.]))], ids=['smoothing','weighted'])
def test_losses(make, loss):
    "label smoothing, weighted losses: change the supervised loss only"
    plain,other = make(),make(loss_func=loss)
    fit_each(plain, other, lr=0.)
    assert column(plain,'rotation_loss')==pytest.approx(column(other,'rotation_loss'), abs=1e-6)
    assert column(plain,'train_loss')!=pytest.approx(column(other,'train_loss'), abs=1e-4)

def test_bfloat16(make):
    "`BFloat16` (autocast on any device): both forward passes are in low precision; predictions, the head, weights and gradients are float32"
    seen,body,preds = [],[],set()
    class Preds(Callback):
        order = 100
        def after_pred(self): preds.add(self.pred.dtype)
    learn = prepared(make(BFloat16(), Grads(), Preds()))
    learn.rotation.fit_heads['head'].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    learn.model.layer1.register_forward_hook(lambda m,i,o: body.append((m.training,o.dtype)))
    learn.fit(1, .01)
    assert seen==[torch.float32]*4 and [o for o in body if o[0]]==[(True,torch.bfloat16)]*8 and body[-1]==(False,torch.bfloat16)
    assert preds=={torch.float32} and {p.dtype for p in learn.model.parameters()}=={torch.float32} and {g.dtype for g in learn.grads.seen}=={torch.float32}

def test_save_model(make):
    "`SaveModelCallback(monitor='rotation_loss')`: the best model, not the last, is reloaded; its file loads strictly into this Learner, into one that never had the callback, and into the plain network"
    class Spoil(Callback):
        order = 100
        def before_epoch(self):
            if self.epoch==1: self.learn.best = deepcopy(self.model.state_dict()); head(self.learn).data.mul_(100)
    learn = make(Spoil(), pretext=False); cbs = [RotationPretext(), SaveModelCallback(monitor='rotation_loss')]; learn.fit(2, 1e-4, cbs=cbs)
    assert column(learn,'rotation_loss',1)>column(learn,'rotation_loss',0) and equal(learn.best, learn.model.state_dict())
    other = make(pretext=False)
    for o in (learn, other, make()):
        o.model.conv1.weight.data.zero_(); o.load('model'); assert equal(learn.best, o.model.state_dict())
    net = Net(); net.load_state_dict(torch.load(learn.path/'models/model.pth', weights_only=True))   # strictly

def test_early_stopping(make):
    "`EarlyStoppingCallback(monitor='rotation_loss')`: stops the fit"
    learn = make(EarlyStoppingCallback(monitor='rotation_loss', min_delta=100, patience=1)); learn.fit(5, 0.)
    assert len(learn.recorder.values)==2

def test_reduce_lr_on_plateau(make):
    "`ReduceLROnPlateau(monitor='rotation_loss')`: lowers the rate"
    learn = make(ReduceLROnPlateau(monitor='rotation_loss', min_delta=100, patience=1)); learn.fit(2, .01)
    assert learn.opt.hypers[-1]['lr']==pytest.approx(.001)

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), NesterovSGD], ids=['SGD','NesterovSGD'])
def test_save_and_load(make, opt_func):
    "`learn.save`, `learn.load` with the optimizer: what is saved while attached is the plain model and its optimizer, for this Learner and for one that never had the callback, and the other way round"
    kw = dict(opt_func=opt_func, wd=None); learn,plain = make(**kw),make(pretext=False, **kw); learn.fit(1, .01); learn.save('all')
    want,state,was = deepcopy(learn.model.state_dict()),deepcopy(learn.opt.state_dict()),weights(learn)
    assert list(want)==list(plain.model.state_dict())
    learn.fit(1, .01); plain.fit(1, .01); plain.save('plain')
    for o in (learn, plain):
        o.load('all'); assert equal(want, o.model.state_dict())
        assert str(o.opt.state_dict())==str(state)
    assert not equal(was, weights(learn)) and not torch.equal(was['rotation.head.weight'], head(learn))   # the head isn't in the file
    learn.load('plain'); learn.fit(1, .01)

def test_averages_of_others(make):
    "weight averages of others (`torch.optim.swa_utils.AveragedModel`, a moving average by name), begun and updated in a fit: they fit the plain network"
    class Averages(Callback):
        def before_train(self): self.swa,self.ema = torch.optim.swa_utils.AveragedModel(self.model),{k:v.clone() for k,v in self.model.state_dict().items()}
        def after_step(self):
            self.swa.update_parameters(self.model); self.seen = [*getattr(self,'seen',[]), self.model.fc.weight.detach().clone()]
            for k,v in self.model.state_dict().items(): self.ema[k] = self.ema[k]*.9+v*.1 if v.is_floating_point() else v
    for kw,cbs in ((dict(), []), (dict(pretext=False), [RotationPretext(), BFloat16(), BatchNormGroups(2)])):
        learn,cb = make(**kw),Averages(); learn.fit(1, .01, cbs=[cb, *cbs])
        assert torch.allclose(cb.swa.module.fc.weight, torch.stack(cb.seen).mean(0), atol=1e-6)
        for sd in (cb.swa.module.state_dict(), cb.ema): Net().load_state_dict(sd)

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), partial(OptimWrapper, opt=torch.optim.AdamW), NesterovSGD], ids=['SGD','AdamW','NesterovSGD'])
def test_deepcopy(make, opt_func):
    "`deepcopy(learn)`: the copy trains on exactly as the original does, heads, their optimizers and columns included, and shares nothing with it"
    learn = make(JigsawPretext(backward='sequential'), model=Net(drop=.3), opt_func=opt_func, wd=None); learn.fit(1, .01)
    copy = deepcopy(learn); was = weights(learn); assert equal(was, weights(copy))
    copy.fit(1, .01); assert equal(was, weights(learn)) and not equal(was, weights(copy))
    learn.fit(1, .01)
    assert equal(weights(learn), weights(copy)) and column(learn,'rotation_loss')==column(copy,'rotation_loss')!=column(copy,'jigsaw_loss')
    assert [type(o) for o in copy.cbs]==[type(o) for o in learn.cbs] and all(o.learn is copy for o in copy.cbs) and copy.rotation.trained is copy.model
    copy.remove_cbs([copy.rotation, copy.jigsaw]); assert len(copy.cbs)==3 and hasattr(learn,'unlabeled_step')
    learn.fit(1, .01)

def test_deepcopy_of_a_fit(make):
    "`deepcopy(learn)` in the middle of a fit: it trains as one that was never begun"
    class Copy(Callback):
        order = 200
        def before_train(self): self.copies.append(deepcopy(self.learn))
        def after_epoch(self): self.copies.append(deepcopy(self.learn))
    cb = Copy(); cb.copies = []; make().fit(1, .01, cbs=cb)
    assert len(cb.copies)==2
    for o in cb.copies: o.remove_cbs(o.cbs.filter(lambda c: type(c) is Copy)); o.fit(1, .01); assert len(o.recorder.losses)==4 and 'rotation_loss' in o.recorder.metric_names
    fresh = make(); fresh.fit(1, .01); assert equal(weights(fresh), weights(cb.copies[0]))

def test_csv_logger(make):
    "`CSVLogger`: a value under each name"
    learn = make(CSVLogger()); learn.fit(2, .01)
    log = learn.csv_logger.read_log()
    assert list(log.columns[-3:])==['rotation_loss','rotation_acc','time'] and log.shape==(2,7) and log.rotation_acc.between(0,1).all()

def test_recorder_plots(make):
    "`Recorder.plot_loss`, `plot_sched`: the supervised losses and the schedule, as without the callback"
    learn = make(); learn.rotation.weight = 0.; learn.fit_one_cycle(2, .01)
    plain = make(pretext=False); plain.fit_one_cycle(2, .01)
    def lines(o): plt.close('all'); return [[float(y) for y in l.get_ydata()] for l in o.recorder.plot_loss(skip_start=0).lines]
    (train,valid),(want,_) = lines(learn),lines(plain)
    assert len(train)==8 and train==want and valid==[column(learn,'valid_loss',i) for i in (0,1)]
    plt.close('all'); learn.recorder.plot_sched()
    assert [len(o.lines[0].get_ydata()) for o in plt.gcf().axes]==[8]*len(learn.recorder.hps) and list(plt.gcf().axes[0].lines[0].get_ydata())==learn.recorder.hps['lr']
    plt.close('all')

def test_progress(make):
    "`ProgressCallback`, `ShowGraphCallback`: both columns in the table, as many batches in the graph as were trained"
    lines = []
    learn = make(); learn.add_cbs([ProgressCallback(), ShowGraphCallback()])
    learn.progress.after_fit = noop
    old = learn.progress._write_stats; learn.progress._write_stats = lambda log: (lines.append([str(o) for o in log]), old(log))
    learn.fit(1, .01)
    assert learn.show_graph.nb_batches==[4] and lines[0][-3:]==['rotation_loss','rotation_acc','time'] and len(lines)==2
    assert float(lines[1][-3])==pytest.approx(column(learn,'rotation_loss'), abs=1e-5)

def test_validate_predict(make, dls):
    "`validate`, `get_preds` on both sets, `predict`, `tta`, `show_results`: as a plain Learner, and without a step"
    learn = make(); learn.fit(1, .01); trained = deepcopy(learn.model.state_dict())
    plain = make(pretext=False); plain.model.load_state_dict(trained)
    assert len(learn.validate())==2 and list(learn.validate())==pytest.approx(list(plain.validate()))
    def both(f):
        "What `f` gives of each Learner, from the same state of the global generators, on which training images that aren't trained on depend"
        set_seed(1); a = f(learn); set_seed(1); return a,f(plain)
    for i in (0,1):
        (p,t),(q,u) = both(lambda o: o.get_preds(ds_idx=i))
        assert len(p)==len(dls[i].dataset) and torch.allclose(p, q, atol=1e-6)
        assert torch.equal(t,u) and t.tolist()==[int(dls[i].dataset[j][1]) for j in range(len(t))]   # each once, in order
    a,b = both(lambda o: o.predict(dls.valid.items[0])); assert a[0]==b[0] and torch.allclose(a[2], b[2], atol=1e-6)
    (p,t),(q,_) = both(lambda o: o.tta(n=2)); assert p.shape==(8,2) and torch.allclose(p, q, atol=1e-6) and not torch.allclose(p, learn.get_preds()[0], atol=1e-6)
    def titles(o): plt.close('all'); o.show_results(max_n=2); return [ax.get_title() for ax in plt.gcf().axes if ax.images]
    a,b = both(titles); assert a==b and len(a)==2 and all(len(o.split())==2 for o in a)
    plt.close('all')
    assert equal(trained, learn.model.state_dict())

def test_interpretation(make):
    "`ClassificationInterpretation`: each validation image counted once"
    learn = make(); learn.fit(1, .01)
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==8

def test_summary(make):
    "`learn.summary`: layers and parameters of the plain model; trains on nothing"
    model = lambda o: o.summary().split('Optimizer used')[0]
    learn = prepared(make()); before = head(learn).clone(); got = model(learn)
    assert got==model(make(pretext=False)) and '8 x 2' in got and torch.equal(head(learn), before) and learn.dls.unlabeled.epoch==0

def test_cancelled(make):
    "cancelled batches, epochs and fits: the next fit is whole"
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.epoch==0 and self.iter==1: raise self.kind()
    for kind in (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException):
        learn = make(); cb = Cancel(); cb.kind = kind
        learn.fit(1, .01, cbs=cb)
        learn.fit(1, .01)
        assert len(learn.recorder.losses)==4 and len(learn.recorder.values[-1])==5, kind

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('kind', [CancelBackwardException,CancelStepException])
@pytest.mark.parametrize('order', [0,100])
def test_cancelled_step(make, backward, kind, order):
    "a cancelled backward pass or step: model and head stay as they are, and nothing of it goes into the next step"
    class Cancel(Callback):
        def before_backward(self): self.cancel(CancelBackwardException)
        def before_step(self): self.cancel(CancelStepException)
        def cancel(self, k):
            if self.iter==0 and k is kind: raise kind()
    Cancel.order = order
    def fitted(lr, *cbs):
        learn = prepared(make(HeadAt(), AllGrads())); learn.rotation.backward,h = backward,head(learn).clone()
        learn.fit(1, lr, cbs=L(cbs)); return learn.all_grads.seen,[(o!=h).any().item() for o in learn.head_at.seen]
    _,moved = fitted(.01, Cancel()); assert moved==[False,True,True,True]
    (got,_),(want,_) = fitted(0., Cancel()),fitted(0.)
    assert equal(got[-3], want[1])

def test_two_fits(make):
    "two `fit`s in a row: each begins with the streams' first epoch, whatever was looked at before, so that a cell that is run again gives the same; the head goes on, and columns are there once"
    class Seen(Callback):
        def before_fit(self): self.xs = []
        def before_batch(self):
            if self.training: self.xs.append(self.x)
        def after_loss(self):
            if self.training: self.xs.append(self.unlabeled_step._batch.x)
    Seen.order = 6
    learn = make(Seen()); learn.fit(2, .01); first,h = learn.seen.xs,head(learn)
    learn.dls.train.one_batch(); next(iter(learn.dls.unlabeled)); learn.fit(1, .01)
    assert len(first)==2*len(learn.seen.xs)==16 and all(torch.equal(a, b) for a,b in zip(first, learn.seen.xs)) and not torch.equal(first[0], first[8])
    assert head(learn) is h and learn.recorder.metric_names.count('rotation_loss')==1 and len(learn.recorder.values)==1

def test_fit_cbs_and_learner_cbs(make):
    "`fit(cbs=…)`, `Learner(cbs=…)`, `add_cb`: the same weights; after `fit(cbs=…)` it is gone, else it stays"
    a,b,c = make(),make(pretext=False),make(pretext=False)
    c.add_cb(RotationPretext())
    fit_each(a, c)
    for dl in b.dls.loaders[::2]: dl.epoch = 0
    b.fit(1, .01, cbs=RotationPretext())
    assert equal(a.model.state_dict(), b.model.state_dict()) and equal(b.model.state_dict(), c.model.state_dict())
    assert hasattr(a,'rotation') and hasattr(c,'rotation') and not hasattr(b,'rotation') and list(a.model.state_dict())==list(Net().state_dict())

def test_add_and_remove(make):
    "`add_cb`, `remove_cb`: model, optimizer and its state, loaders, callbacks, loss and splitter are those of a Learner that never had it; a further epoch gives the same weights"
    kw = dict(pretext=False, splitter=two_groups, opt_func=partial(SGD, mom=.9))
    plain,learn = make(**kw),make(**kw)
    dls,loaders,loss,splitter,attrs = learn.dls,[*learn.dls.loaders],learn.loss_func,learn.splitter,set(vars(learn))
    cb = RotationPretext(weight=0.); learn.add_cb(cb); fit_each(learn); learn.remove_cb(cb); fit_each(plain)
    assert [n for n,_ in learn.model.named_modules()]==[n for n,_ in plain.model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert learn.dls is dls and all(a is b for a,b in zip(dls.loaders, loaders)) and learn.loss_func is loss and learn.splitter is splitter
    assert [type(o) for o in learn.cbs]==[type(o) for o in plain.cbs] and set(vars(learn))-attrs==set(vars(plain))-attrs
    names = {p:n for n,p in learn.model.named_parameters()}
    assert [[names[p] for p in g] for g in learn.opt.param_lists]==[[{p:n for n,p in plain.model.named_parameters()}[p] for p in g] for g in plain.opt.param_lists]
    assert set(learn.opt.state)==set(names) and learn.opt.hypers==plain.opt.hypers
    for a,b in zip(learn.opt.state_dict()['state'], plain.opt.state_dict()['state'], strict=True): assert list(a)==list(b)
    for (p,_,s,_),(q,_,t,_) in zip(learn.opt.all_params(), plain.opt.all_params()): assert torch.equal(s['grad_avg'], t['grad_avg'])
    fit_each(learn, plain)
    assert equal(plain.model.state_dict(), learn.model.state_dict())

class Keep(Callback):
    "State before the first step, its batches and its gradients; then the fit ends"
    order = 101
    def before_batch(self): self.learn.state,self.learn.head_state,self.learn.batch = deepcopy(self.model.state_dict()),deepcopy(self.rotation.fit_heads['head'].state_dict()),(self.x.clone(),self.y.clone())
    def after_loss(self): self.learn.u = self.unlabeled_step._batch.x
    def before_step(self): self.learn.grads_at = {n:p.grad.clone() for n,p in [*self.model.named_parameters(), *heads(self.learn).items()]}; self.learn.after = deepcopy(self.model.state_dict()); raise CancelFitException

def turned(u): return torch.stack([torch.rot90(o, k, (1,2)) for o in u for k in range(4)]), torch.arange(4).repeat(len(u))

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_batchnorm_groups(make, backward):
    "`BatchNormGroups(2)`: both forward passes are normalised in halves, gradients and the first half's running averages as by hand"
    learn = make(BatchNormGroups(2)); learn.rotation.backward = backward; learn.fit(1, .01, cbs=Keep())
    views,targs = turned(learn.u); groups = []
    for i in range(2):
        model,h = Net().train(),nn.Linear(16,4)
        model.load_state_dict(learn.state); h.load_state_dict(learn.head_state)
        half = lambda o: o.chunk(2)[i]
        loss = nn.functional.cross_entropy(model(half(learn.batch[0])), half(learn.batch[1]))
        (loss+nn.functional.cross_entropy(h(model.body(half(views))), half(targs))).backward()
        groups.append((model, {n:p.grad for n,p in model.named_parameters()}|{f'rotation.head.{n}':p.grad for n,p in h.named_parameters()}))
    for n,g in learn.grads_at.items(): assert torch.allclose(g, (groups[0][1][n]+groups[1][1][n])/2, rtol=1e-3, atol=1e-5), n
    for n,b in groups[0][0].named_buffers(): assert torch.allclose(learn.after[n], b, atol=1e-6), n

def test_vision_learner(dls):
    "`vision_learner`: its head's BatchNorm isn't moved by rotated images, features are the body's, and its freeze keeps the body while both heads learn"
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=RotationPretext())
    with learn.no_bar(), learn.no_logging():
        prepared(learn); learn.freeze(); body,h,fc = (o.clone() for o in (learn.model[0][0].weight, head(learn), learn.model[1][-1].weight))
        bn = next(o for o in learn.model[1].modules() if isinstance(o, nn.BatchNorm1d)); learn.fit(1, .01)
        assert torch.equal(learn.model[0][0].weight, body) and (head(learn)!=h).any() and (learn.model[1][-1].weight!=fc).any()
        assert bn.num_batches_tracked==4 and learn.model[0][1].num_batches_tracked==8 and head(learn).shape==(4,512)
        learn.unfreeze(); learn.fit(1, slice(1e-3,1e-2)); assert (learn.model[0][0].weight!=body).any()

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_terminate_on_nan(make, backward, capsys):
    "`TerminateOnNaNCallback`: a loss of an objective that isn't finite stops the fit, without it nothing does"
    class NaN(RotationPretext):
        def loss(self, batch):
            loss,figure = super().loss(batch)
            return loss*float('nan' if self.learn.iter==1 else 1), figure
    def run(*cbs):
        learn = make(*cbs, NaN(backward=backward), pretext=False); learn.fit(1, 0.); return len(learn.recorder.losses)
    assert run()==4 and run(TerminateOnNaNCallback())==1   # the Recorder comes after both
    assert 'rotation_loss is nan at epoch 0, step 1' in capsys.readouterr().out

def test_tensorboard(make, tmp_path):
    "`TensorBoardCallback`: the model is traced, both columns and the rates are logged"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make(opt_func=NesterovSGD, wd=None); learn.fit(2, .01, cbs=TensorBoardCallback(tmp_path/'tb', log_preds=False))
    ea = EventAccumulator(str(tmp_path/'tb')); ea.Reload()
    got = [o.value for o in ea.Scalars('rotation_loss')]
    assert got==pytest.approx([column(learn,'rotation_loss',i) for i in (0,1)]) and 'rotation_acc' in ea.Tags()['scalars'] and 'lr_0' in ea.Tags()['scalars'] and ea.Tags()['graph']

def test_wandb(make, tmp_path, monkeypatch):
    "`WandbCallback`, offline: both columns are in the summary (fastai 2.8.12's own listing of settings, which fails on any Learner that reads files, is left out)"
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as fw
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setattr(fw, '_format_config', noop)
    run = wandb.init(mode='offline', dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        learn = make(); learn.fit(1, .01, cbs=WandbCallback(log=None, log_preds=False, log_model=False))
        assert run.summary['rotation_loss']==pytest.approx(column(learn,'rotation_loss')) and 'rotation_acc' in dict(run.summary)
    finally: wandb.finish()

def test_channels_last(make):
    "`ChannelsLast`: both forward passes run in channels-last memory"
    class Formats(Callback):
        def before_fit(self):
            self.seen = []
            self.h = self.model.layer1.register_forward_hook(lambda m,i,o: self.seen.append((m.training, o.is_contiguous(memory_format=torch.channels_last))))
        def after_fit(self): self.h.remove()
    learn = make(ChannelsLast(), Formats()); learn.fit(1, .01)
    assert [o for o in learn.formats.seen if o[0]]==[(True,True)]*8 and learn.formats.seen[-1]==(False,True)   # labelled and rotated, validation

@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
def test_mixed_precision(make, to):
    "`to_fp16`, `to_bf16`: low precision where there is a GPU, head and all; on a CPU, where fastai's do nothing, nothing changes"
    plain,low = make(),getattr(make(), to)()
    seen = []; prepared(low).rotation.fit_heads['head'].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    fit_each(plain, low)
    if torch.cuda.is_available(): assert set(seen)=={torch.float16 if to=='to_fp16' else torch.bfloat16} and head(low).dtype==torch.float32
    else: assert torch.equal(head(plain), head(low)) and torch.equal(plain.model.conv1.weight, low.model.conv1.weight)

def test_sequential_under_autocast(make):
    "`backward='sequential'` under `BFloat16`: a step's gradients are the sum of two passes made by hand"
    learn = make(BFloat16()); learn.rotation.backward = 'sequential'; learn.fit(1, .01, cbs=Keep())
    model,h = Net(),nn.Linear(16,4); model.load_state_dict(learn.state); h.load_state_dict(learn.head_state); model.train()
    with torch.autocast('cpu', torch.bfloat16): out = model(learn.batch[0])
    nn.functional.cross_entropy(out.float(), learn.batch[1]).backward()
    views,targs = turned(learn.u)
    with torch.autocast('cpu', torch.bfloat16): f = model.body(views)
    nn.functional.cross_entropy(h(f.float()), targs).backward()
    for n,p in [*model.named_parameters(), *((f'rotation.head.{n}',p) for n,p in h.named_parameters())]: assert torch.allclose(p.grad, learn.grads_at[n], rtol=1e-3, atol=1e-6), n

def from_block(path, block, get_y, n_out, loss, metric):
    "A Learner on a DataBlock of the user's own, and its unlabelled items"
    db = DataBlock((ImageBlock, block), get_items=lambda p: get_image_files(p, folders=['train','val']), get_y=get_y,
                   splitter=FuncSplitter(lambda o: o.parent.parent.name=='val'), item_tfms=Resize(32))
    own = PairedDataLoaders.from_dls(db.dataloaders(path, bs=8, num_workers=0), get_image_files(path/'unsup'), unlabeled_bs=4, seed=0, n_steps=2)
    torch.manual_seed(0)
    learn = Learner(own, Net(n_out), loss_func=loss, metrics=metric, cbs=RotationPretext(), path=path)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn

class FirstLoss(Callback):
    "The supervised loss of the first step, and what it was made of"
    def after_loss(self):
        if self.training and not hasattr(self.learn,'kept'): self.learn.kept = (self.pred.detach().clone(), self.y.clone(), self.loss.item())

def test_multi_label(dls):
    "multi-label Learner: the supervised loss is the binary cross-entropy of several labels, beside it rotations are predicted"
    learn = from_block(dls.path, MultiCategoryBlock(), lambda o: [o.parent.name,'all'], 3, BCEWithLogitsLossFlat(), accuracy_multi)
    learn.fit(1, .01, cbs=FirstLoss()); p,y,loss = learn.kept
    assert y.shape==(8,3) and loss==pytest.approx(-(y*p.sigmoid().log()+(1-y)*(1-p.sigmoid()).log()).mean().item(), rel=1e-4)
    assert 0<column(learn,'rotation_loss')<10

def test_regression(dls):
    "regression Learner: the supervised loss is the squared error, beside it rotations are predicted"
    learn = from_block(dls.path, RegressionBlock(n_out=1), lambda o: float(o.parent.name=='b'), 1, MSELossFlat(), mae)
    learn.fit(1, .001, cbs=FirstLoss()); p,y,loss = learn.kept
    assert loss==pytest.approx(((p.flatten()-y.flatten())**2).mean().item(), rel=1e-4) and 0<column(learn,'rotation_loss')<10

EVENTS = 'before_fit before_epoch before_train before_batch forward unlabelled after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_validate after_epoch'.split()

class Interrupted(nn.Module):
    "Ctrl-C in the middle of a forward pass: of the labelled images, or of their rotations"
    def __init__(self): super().__init__(); self.at = None
    def forward(self, x):
        if self.training and self.at==len(x): raise KeyboardInterrupt
        return x

class Interrupt(Callback):
    "Ctrl-C in an event, after all other callbacks, at the second step"
    order = math.inf
    def __init__(self, at): self.at = at
    def __call__(self, event):
        if event=='before_batch' and self.model.pool[2].at is None and self.iter==1: self.model.pool[2].at = dict(forward=8, unlabelled=16).get(self.at)
        if event==self.at and (getattr(self,'iter',1)==1 or 'batch' not in event and '_' in event and event.split('_')[1] in ('fit','epoch','train','validate')): raise KeyboardInterrupt
        return super().__call__(event)

def stoppable():
    net = Net(); net.pool.append(Interrupted()); return net
def attributes(model): return [(n, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m,'track_running_stats',True)) for n,m in model.named_modules()]
def ours(): return [RotationPretext(), JigsawPretext(backward='sequential', bn='batch'), EntropyMin(.1, bn='running'), BFloat16(), BatchNormGroups(2)]

@pytest.mark.parametrize('at', EVENTS)
def test_interrupt(make, dls, at, tmp_path):
    "Ctrl-C in any event and in the middle of either forward pass: nothing of `fit(cbs=…)` is left on model, Learner, callbacks, autocast and generators; then predictions, export and another fit are whole"
    def interrupted(learn, cbs):
        set_seed(1)
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(): learn.fit(1, .01, cbs=[*cbs, Interrupt(at)])
        learn.model.pool[2].at = None
    learn,plain = (make(pretext=False, model=stoppable()) for _ in range(2)); attrs,cbs = attributes(learn.model),[*learn.cbs]
    interrupted(learn, ours()); now = get_generators()
    assert not torch.is_autocast_enabled('cpu') and attributes(learn.model)==attrs and all(a is b for a,b in zip(learn.cbs, cbs, strict=True))
    if at!='unlabelled': interrupted(plain, []); assert set(vars(learn))==set(vars(plain)) and same_generators(now, get_generators())
    plain.model.load_state_dict(learn.model.state_dict()); assert torch.equal(learn.get_preds()[0], plain.get_preds()[0]) and len(learn.validate())==2
    learn.model.pool.pop(2); learn.export(); assert no_trace(tmp_path/'export.pkl')
    learn.model.pool.append(Interrupted()); learn.fit(1, .01, cbs=ours()); assert len(learn.recorder.losses)==4 and len(learn.recorder.values[-1])==9

def test_interrupt_while_attached(make, dls, tmp_path, predict_alone):
    "the same with callbacks that stay: what was interrupted in any event validates, exports as a plain model that loads and predicts without this package, copies, and trains"
    files = []
    for i,at in enumerate(EVENTS):
        learn = make(*ours()[1:], model=stoppable())
        with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=Interrupt(at))
        learn.model.pool.pop(2); assert not torch.is_autocast_enabled('cpu'), at
        learn.export(f'{i}.pkl'); files.append(tmp_path/f'{i}.pkl'); assert no_trace(files[-1]), at
        assert len(learn.validate())==2 and not torch.is_autocast_enabled('cpu'), at
        learn.fit(1, .01); assert len(learn.recorder.losses)==4 and len(learn.recorder.values[-1])==9, at
        learn.remove_cbs(learn.cbs.filter(lambda o: 'sesemi' in type(o).__module__)); assert attributes(learn.model)==attributes(Net()) and len(learn.cbs)==3, at
    (tmp_path/'test_matrix.py').write_text('from torch import nn\nfrom fastai.vision.all import ConvLayer,AdaptiveAvgPool,Flatten\n'+inspect.getsource(Net))
    check = f"sys.path.insert(0, {str(tmp_path)!r})\nfor f in {[*map(str, files)]}: load_learner(f).predict({str(dls.valid.items[0])!r})\n"
    predict_alone(files[4], dls.valid.items[0], check, before=True)

class Scaled(MixedPrecision):
    "fastai's, with a gradient scaler that works on the CPU"
    enabled,scale = True,2.**10
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16),torch.amp.GradScaler('cpu', init_scale=self.scale, enabled=self.enabled),[]
class Unscaled(Scaled): enabled = False

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('cbs', [[], [lambda: GradientClip(.1)], [lambda: GradientAccumulation(16)]], ids=['','clip','accumulation'])
def test_gradient_scaler(make, backward, cbs):
    "`GradScaler`, alone, with `GradientClip` and with `GradientAccumulation`: model and head are trained as without it, bitwise, since scales are powers of two"
    def trained(cb):
        learn = make(cb(), *(o() for o in cbs)); learn.rotation.backward = backward; learn.fit(1, .01); return weights(learn)
    a,b = trained(Scaled),trained(Unscaled)
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a) and (bool(cbs) or equal(a, b))

@pytest.mark.parametrize('opt_func', [SGD,ranger])
@pytest.mark.parametrize('late', [dict(), dict(start_pct=.6), dict(weight=0.)], ids=['','start_pct','weight=0'])
def test_gradient_scaler_and_optimizers(make, opt_func, late):
    "`GradScaler` with SGD and Ranger, whose Lookahead is the head's too; before an objective begins, and with one of weight 0, heads have no gradient: trained as without it, bitwise"
    def trained(cb): learn = make(cb(), RotationPretext(**late), pretext=False, opt_func=opt_func); learn.fit(2, .01); return weights(learn)
    assert equal(trained(Scaled), trained(Unscaled))

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('where', ['model','head','loss'])
def test_overflow(make, backward, where):
    "`GradScaler` and an overflow, in the model's gradients, in the head's alone, in the loss: the step is left out for both, and the scale halved"
    class Overflow(Callback):
        order = -1
        def before_backward(self):
            if where=='loss' and self.iter==1: self.learn.loss_grad = self.loss_grad*float('inf')
        def before_step(self):
            self.was = weights(self.learn)
            if self.iter==1 and where!='loss': (head(self.learn) if where=='head' else self.model.fc.weight).grad.view(-1)[0] = float('inf')
    class After(Callback):
        order = 100
        def after_step(self): self.learn.moved.append({k for k,p in [*self.model.named_parameters(), *heads(self.learn).items()] if not torch.equal(self.overflow.was[k], p)})
        def after_batch(self): self.learn.scale = self.scaler.get_scale() if self.training else self.learn.scale
    learn = make(Scaled(), Overflow(), After()); learn.rotation.backward,learn.moved = backward,[]; learn.fit(1, .01)
    assert learn.moved[1]==set() and all({'fc.weight','rotation.head.weight'}<=o for i,o in enumerate(learn.moved) if i!=1) and len(learn.moved)==4
    assert learn.scale==2.**9 and all(v.isfinite().all() for v in weights(learn).values())

def test_one_look_at_heads(make):
    "a gradient scaler and heads: a step asks the device once whether their gradients are finite, however many parameters they have"
    class Looks(TorchFunctionMode):
        n = 0
        def __torch_function__(self, f, types, args=(), kwargs=None):
            self.n += f is torch.Tensor.__bool__
            return f(*args, **(kwargs or {}))
    class Count(Callback):
        order = 100
        def before_fit(self):
            was = self.learn.clip_heads.before_step
            def looked():
                with Looks() as looks: was()
                self.learn.looks.append(looks.n)
            self.learn.clip_heads.before_step = looked
    learn = make(Scaled(), Count()); learn.looks = []; learn.fit(1, .01)
    assert len(heads(learn))>1 and learn.looks==[1]*4

def test_scaler_left_behind(make):
    "a `GradScaler` that an interrupted fit left on the Learner: without `MixedPrecision` the head is trained as if it weren't there"
    class Stop(Callback):
        def before_train(self): raise KeyboardInterrupt
    learn,fresh = make(),make()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=[Scaled(), Stop()])
    assert learn.scaler is not None; fit_each(learn, fresh); assert equal(weights(learn), weights(fresh))

def test_two_precisions(make):
    "`BFloat16`, as the fast recipe adds it, together with fastai's `MixedPrecision`: the latter decides, and no autocast is left, also after an interrupted forward pass"
    class Off(Unscaled):
        def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', enabled=False)
    for first in (True,False):
        seen = []; learn = make(*([BFloat16(),Off()] if first else [Off(),BFloat16()])); learn.model.layer1.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
        learn.fit(1, .01); assert set(seen)=={torch.float32} and not torch.is_autocast_enabled('cpu')
    seen = []; learn = make(BFloat16()).to_fp16(); learn.fit(1, .01); assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_data_parallel(make, backward):
    "`nn.DataParallel` around the model before attaching (on the CPU it passes through): the same training, bitwise"
    a,b = make(),make(model=nn.DataParallel(Net())); b.model.module.load_state_dict(a.model.state_dict())
    for o in (a,b): o.rotation.backward = backward
    fit_each(a, b)
    assert equal(a.model.state_dict(), b.model.module.state_dict()) and torch.equal(head(a), head(b))

def test_compiled(make):
    "`torch.compile`: no graph break in the unlabelled pass, whose gradients are those of the plain model; and a whole fit"
    torch._dynamo.reset(); net = Net(); x = torch.randn(4,3,32,32); layer = find_feature_layer(net, x)
    def grads(model):
        net.zero_grad(); f,out = feature_pass(model, layer)(x); (f.square().sum()+out.square().sum()).backward(); return {n:p.grad.clone() for n,p in net.named_parameters()}
    torch._dynamo.utils.counters.clear(); got = grads(torch.compile(net, backend='aot_eager')); assert not torch._dynamo.utils.counters['graph_break'] and torch._dynamo.utils.counters['stats']['unique_graphs']==1
    for k,v in grads(net).items(): assert torch.allclose(v, got[k], rtol=1e-4, atol=1e-5), k
    net = Net(); a,b = make(BFloat16()),make(BFloat16(), model=torch.compile(net, backend='eager')); net.load_state_dict(a.model.state_dict()); fit_each(a, b)
    assert all(torch.allclose(v, net.state_dict()[k], atol=1e-5) for k,v in a.model.state_dict().items()) and torch.allclose(head(a), head(b), atol=1e-5)
    torch._dynamo.reset()

def test_several_outputs(make):
    "a model with several outputs, `features=` given: trained beside a loss of the user's own; an objective that reads classes is refused with words"
    class Two(Net):
        def forward(self, x): f = self.body(x); return self.fc(f),f
    learn = make(pretext=False, model=Two(), loss_func=lambda p,y: nn.functional.cross_entropy(p[0], y), metrics=None)
    with pytest.raises(ValueError, match='EntropyMin reads the output.*Two gives a tuple'): learn.fit(1, cbs=EntropyMin())
    for kw in (dict(), dict(backward='sequential')): learn.fit(1, .01, cbs=RotationPretext(features='pool', **kw)); assert column(learn,'rotation_loss')>0

def test_other_optimizer(make):
    "`learn.opt_func` that is changed between fits: the head's optimizer follows"
    learn = make(); learn.fit(1, .01); learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW); h = head(learn).clone()
    learn.fit(1, .01, reset_opt=True); assert isinstance(learn.rotation.fit_opt.opt, torch.optim.AdamW) and (head(learn)!=h).any()

def test_generators(make):
    "global generators: a fit with objectives that draw leaves them where one without does; ones that were seeded after a fit that broke off aren't put back"
    class Stop(Callback):
        order = 100
        def after_loss(self): torch.rand(3); raise KeyboardInterrupt
    learn,plain = make(*ours()[1:]),make(pretext=False); set_seed(5); plain.fit(1, .01); before = get_generators(); set_seed(5); learn.fit(1, .01); assert same_generators(before, get_generators())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=Stop())
    set_seed(7); plain.get_preds(); plain.fit(1, .01); want = get_generators(); set_seed(7); learn.get_preds(); learn.fit(1, .01); assert same_generators(want, get_generators())

def test_several_of_ours(make, capsys):
    "several callbacks of ours at once: `StepSeed`, `BFloat16`, `PlainProgress`; a second `RotationPretext` is refused before the first step"
    learn = make(StepSeed(), BFloat16()); learn.logger = print; learn.fit(1, .01, cbs=PlainProgress())
    assert 'rotation_acc' in capsys.readouterr().out and len(learn.recorder.losses)==4
    with pytest.raises(ValueError, match="two objectives called 'rotation'"): learn.fit(1, cbs=RotationPretext())
    learn.fit(1, .01); assert len(learn.recorder.losses)==4

def test_export_while_attached(make, dls, tmp_path):
    "`learn.export` while attached: the plain model, by `load_learner`"
    learn = make(BFloat16(), BatchNormGroups(2)); learn.fit(1, .01); learn.export(); f = dls.valid.items[0]
    assert no_trace(tmp_path/'export.pkl'); got = load_learner(tmp_path/'export.pkl')
    assert list(got.model.state_dict())==list(Net().state_dict()) and [type(o) for o in got.cbs if type(o) is Callback]==[Callback]*8
    learn.remove_cb(BFloat16)
    with got.no_bar(): assert torch.allclose(got.predict(f)[2], learn.predict(f)[2], atol=1e-6)

def test_export_in_a_fit(make, tmp_path):
    "`learn.export` in the middle of a fit: the same file, and the fit goes on as without it, bitwise"
    class Exports(Callback):
        order = 200
        def after_epoch(self): self.learn.export(f'{self.epoch}.pkl')
    kw = dict(opt_func=partial(SGD, mom=.9)); a,b = make(**kw),make(**kw)
    a.fit(2, .01); b.fit(2, .01, cbs=Exports())
    assert equal(weights(a), weights(b)) and all(no_trace(tmp_path/f'{i}.pkl') for i in range(2)) and equal(load_learner(tmp_path/'1.pkl').model.state_dict(), b.model.state_dict())

