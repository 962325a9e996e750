"""Each feature of a fastai Learner with `RotationPretext` attached; a test's docstring says which, and what is asserted.
Each would fail if the feature or the callback were ignored."""
from copy import deepcopy
from functools import partial
import matplotlib.pyplot as plt,numpy as np,pytest,torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from fastcore.all import L,noop
from fastai.vision.all import (Callback,CancelBatchException,CancelEpochException,CancelFitException,CancelTrainException,ClassificationInterpretation,
    CrossEntropyLossFlat,EarlyStoppingCallback,LabelSmoothingCrossEntropyFlat,Learner,ParamScheduler,ProgressCallback,ReduceLROnPlateau,
    SaveModelCallback,SchedLin,SGD,ShowGraphCallback,TerminateOnNaNCallback,accuracy,accuracy_multi,get_image_files,load_learner,mae,tensor,vision_learner,
    set_seed,DataBlock,FuncSplitter,ImageBlock,MultiCategoryBlock,RegressionBlock,Resize,BCEWithLogitsLossFlat,MSELossFlat)
from fastai.callback.all import ChannelsLast,CSVLogger,CutMix,GradientAccumulation,GradientClip,MixUp
from sesemi_fastai.all import BatchNormGroups,BFloat16,PairedDataLoaders,PlainProgress,RotationPretext,StepSeed,resnet10

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
    def f(*cbs, pretext=True, **kw):
        for dl in (dls.train, dls.unlabeled): dl.epoch = 0
        torch.manual_seed(0)
        learn = Learner(dls, resnet10(num_classes=2), path=tmp_path, cbs=[*cbs, *([RotationPretext()] if pretext else [])],
                        **(dict(metrics=accuracy, opt_func=partial(SGD, mom=0.), wd=0.)|kw))
        learn.remove_cb(ProgressCallback); learn.logger = noop
        return learn
    return f

def halves(model): return L(model.conv1, model.bn1, model.layer1, model.layer2), L(model.layer3, model.layer4, model.fc)
def two_groups(model): return L([sum([list(m.parameters()) for m in h], []) for h in halves(model)])
def fit_each(*learners, lr=.01):
    "An epoch for each, on the same batches"
    for o in learners:
        for dl in (o.dls.train, o.dls.unlabeled): dl.epoch = 0
        o.fit(1, lr)
def head(learn): return learn.pretext.pretext_head.weight
def column(learn, name, i=-1): return learn.recorder.values[i][learn.recorder.metric_names.index(name)-1]

class Grads(Callback):
    "The head's gradient at each step, before anyone changes it"
    order = 100
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append(head(self.learn).grad.clone())

def test_fit(make):
    "`fit`: the head learns, two columns follow the metrics"
    learn = make(); before = head(learn).clone(); learn.fit(2, .01)
    assert (head(learn)!=before).any() and learn.recorder.metric_names[-3:]==['pretext_loss','pretext_acc','time']
    assert all(len(o)==5 for o in learn.recorder.values) and 0<column(learn,'pretext_loss')<5

def test_columns(make):
    "`pretext_loss`, `pretext_acc`: the means over all views of the epoch"
    logits = []
    learn = make(); learn.pretext.pretext_head.register_forward_hook(lambda m,i,o: logits.append(o.detach())); learn.fit(1, .01)
    x = torch.cat(logits); y = torch.arange(4).repeat(len(x)//4)
    assert len(x)==4*4*4 and column(learn,'pretext_loss')==pytest.approx(nn.functional.cross_entropy(x, y).item(), rel=1e-5)
    assert column(learn,'pretext_acc')==pytest.approx((x.argmax(1)==y).float().mean().item())

def test_pretext_loss_changes_the_body(make):
    "weight: with `weight=0` the weights are those of a Learner without the callback"
    a,b,c = make(pretext=False),make(),make(); b.pretext.weight = 0
    fit_each(a, b, c)
    assert torch.equal(a.model.conv1.weight, b.model.conv1.weight) and not torch.equal(a.model.conv1.weight, c.model.conv1.weight)

def test_fit_one_cycle_with_groups(make):
    "`fit_one_cycle` with a rate a group: the head is in the last group, once"
    learn = make(splitter=two_groups); learn.fit_one_cycle(1, slice(1e-4,1e-2))
    groups = [[p is head(learn) for p in g] for g in learn.opt.param_lists]
    assert sum(groups[0])==0 and sum(groups[1])==1
    assert learn.opt.hypers[0]['lr']<learn.opt.hypers[1]['lr']

def test_fit_flat_cos(make):
    "`fit_flat_cos`: the rate ends at zero, the head learns"
    learn = make(); before = head(learn).clone(); learn.fit_flat_cos(2, .01)
    assert learn.recorder.lrs[0]==.01 and learn.recorder.lrs[-1]<.0051 and (head(learn)!=before).any()

def test_fit_poly_warmup_on_existing_optimizer(make):
    "`fit_poly_warmup(cbs=…)` with an optimizer that exists: rates as published; the head joins its last group and leaves again"
    learn = make(pretext=False); learn.create_opt(); n = len(learn.opt.all_params())
    cb = RotationPretext(); learn.fit_poly_warmup(1, .01, cbs=cb)
    assert len(learn.opt.all_params())==n and not any(p is cb.pretext_head.weight for p,*_ in learn.opt.all_params())
    assert not hasattr(learn,'pretext') and 'pretext_loss' in learn.recorder.metric_names
    assert learn.recorder.hps['lr']==pytest.approx([1e-3]+[.01*(1-(t-.5)/3.5)**.5 for t in (1,2,3)])   # 4 steps, half of one warms up

def test_fine_tune(make):
    "`fine_tune`, `freeze`, `unfreeze`: frozen layers stay while the head learns"
    learn = make(splitter=two_groups); learn.create_opt(); learn.freeze()
    body,h = learn.model.conv1.weight.clone(),head(learn).clone()
    learn.fit(1, .01)
    assert torch.equal(learn.model.conv1.weight, body) and (head(learn)!=h).any()
    learn.fine_tune(1, .01, freeze_epochs=1)
    assert (learn.model.conv1.weight!=body).any()

class HeadAt(Callback):
    "The head after each step, before anyone puts it back"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(head(self.learn).clone())

def test_lr_find(make):
    "`lr_find`: trains the head with the rest, then weights and head are put back as they were"
    learn = make(HeadAt()); before = deepcopy(learn.model.state_dict())|{'head':head(learn).clone()}
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=())
    assert len(learn.head_at.seen)>=3 and not torch.equal(learn.head_at.seen[-1], before['head'])
    after = learn.model.state_dict()|{'head':head(learn)}
    assert all(torch.equal(before[k], after[k]) for k in before)
    learn.fit(1, .01)

def test_param_scheduler(make):
    "`ParamScheduler`: any hyper-parameter"
    learn = make(); learn.fit(1, .01, cbs=ParamScheduler({'mom':SchedLin(.1,.9)}))
    assert learn.recorder.hps['mom'][0]==pytest.approx(.1) and learn.recorder.hps['mom'][-1]>.5

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_gradient_accumulation(make, backward):
    "`GradientAccumulation`: the head's gradient is the mean over the accumulated batches"
    one,two = make(Grads()),make(Grads(), GradientAccumulation(16))
    one.pretext.backward = two.pretext.backward = backward
    fit_each(one, two, lr=0.)
    g = one.grads.seen
    assert torch.allclose(two.grads.seen[-1], (g[2]+g[3])/2, atol=1e-6)

def test_gradient_clip(make):
    "`GradientClip`: the norm over all parameters, the head's among them, is the one asked for"
    class Norm(Callback):
        order = 100
        def before_step(self): self.learn.norm = torch.stack([p.grad.norm() for p,*_ in self.opt.all_params(with_grad=True)]).norm().item()
    learn = make(GradientClip(.1), Norm()); learn.fit(1, .01)
    assert learn.norm==pytest.approx(.1, rel=1e-3) and any(p is head(learn) for p,*_ in learn.opt.all_params(with_grad=True))

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixup(make, cb):
    "`MixUp`, `CutMix`: mix labelled images only"
    plain,mixed = make(),make(cb())
    fit_each(plain, mixed, lr=0.)
    assert column(plain,'pretext_loss')==pytest.approx(column(mixed,'pretext_loss'), abs=1e-6)
    assert column(plain,'train_loss')!=pytest.approx(column(mixed,'train_loss'), abs=1e-4)

@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropyFlat(), CrossEntropyLossFlat(weight=tensor([1.,5.]))], ids=['smoothing','weighted'])
def test_losses(make, loss):
    "label smoothing, weighted losses: change the supervised loss only"
    plain,other = make(),make(loss_func=loss)
    fit_each(plain, other, lr=0.)
    assert column(plain,'pretext_loss')==pytest.approx(column(other,'pretext_loss'), abs=1e-6)
    assert column(plain,'train_loss')!=pytest.approx(column(other,'train_loss'), abs=1e-4)

def test_bfloat16(make):
    "`BFloat16` (autocast on any device): both forward passes and the head are in low precision, weights and gradients stay float32"
    seen,body,preds = [],[],set()
    class Preds(Callback):
        order = 100
        def after_pred(self): preds.add(self.pred.dtype)
    learn = make(BFloat16(), Grads(), Preds())
    learn.pretext.pretext_head.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    learn.model.layer1.register_forward_hook(lambda m,i,o: body.append((m.training,o.dtype)))
    learn.fit(1, .01)
    assert seen==[torch.bfloat16]*4 and body==[(True,torch.bfloat16)]*8+[(False,torch.bfloat16)]
    assert preds=={torch.float32} and {p.dtype for p in learn.model.parameters()}=={torch.float32} and {g.dtype for g in learn.grads.seen}=={torch.float32}

def test_bfloat16_of_a_broken_batch(make):
    "`BFloat16` and a step that breaks off: autocast is left, and nothing stays on the Learner once it trains again"
    class Break(Callback):
        order = 9
        def after_pred(self): raise MemoryError('none left')
    learn = make(BFloat16())
    with pytest.raises(MemoryError): learn.fit(1, .01, cbs=Break())
    assert not torch.is_autocast_enabled('cpu')
    learn.fit(1, .01); assert not torch.is_autocast_enabled('cpu') and '_do_one_batch' not in learn.__dict__

def test_save_model(make):
    "`SaveModelCallback(monitor='pretext_loss')`: the best model, not the last, is reloaded, head and all"
    class Spoil(Callback):
        order = 100
        def before_epoch(self):
            if self.epoch==1: self.learn.best = deepcopy(self.model.state_dict()); head(self.learn).data.mul_(100)
    learn = make(SaveModelCallback(monitor='pretext_loss'), Spoil()); learn.fit(2, 1e-4)
    assert column(learn,'pretext_loss',1)>column(learn,'pretext_loss',0)
    now = learn.model.state_dict()
    assert 'fc.pretext_head.weight' in learn.best and all(torch.equal(v, now[k]) for k,v in learn.best.items())

def test_early_stopping(make):
    "`EarlyStoppingCallback(monitor='pretext_loss')`: stops the fit"
    learn = make(EarlyStoppingCallback(monitor='pretext_loss', min_delta=100, patience=1)); learn.fit(5, 0.)
    assert len(learn.recorder.values)==2

def test_reduce_lr_on_plateau(make):
    "`ReduceLROnPlateau(monitor='pretext_loss')`: lowers the rate"
    learn = make(ReduceLROnPlateau(monitor='pretext_loss', min_delta=100, patience=1)); learn.fit(2, .01)
    assert learn.opt.hypers[-1]['lr']==pytest.approx(.001)

def test_save_and_load(make):
    "`learn.save`, `learn.load` with the optimizer: head and its state come back; a plain checkpoint loads too"
    learn = make(opt_func=partial(SGD, mom=.9)); learn.fit(1, .01); f = learn.save('all')
    want,state = deepcopy(learn.model.state_dict()),deepcopy(learn.opt.state[head(learn)])
    learn.fit(1, .01); learn.load('all')
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in want.items())
    assert torch.equal(learn.opt.state[head(learn)]['grad_avg'], state['grad_avg'])
    plain = make(pretext=False); plain.save('plain'); learn.load('plain', with_opt=False)
    assert torch.equal(learn.model.conv1.weight, plain.model.conv1.weight)

def test_csv_logger(make):
    "`CSVLogger`: a value under each name"
    learn = make(CSVLogger()); learn.fit(2, .01)
    log = learn.csv_logger.read_log()
    assert list(log.columns[-3:])==['pretext_loss','pretext_acc','time'] and log.shape==(2,7) and log.pretext_acc.between(0,1).all()

def test_recorder_plots(make):
    "`Recorder.plot_loss`, `plot_sched`: the supervised losses and the schedule, as without the callback"
    learn = make(); learn.pretext.weight = 0.; learn.fit_one_cycle(2, .01)
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
    assert learn.show_graph.nb_batches==[4] and lines[0][-3:]==['pretext_loss','pretext_acc','time'] and len(lines)==2
    assert float(lines[1][-3])==pytest.approx(column(learn,'pretext_loss'), abs=1e-5)

def test_validate_predict(make, dls):
    "`validate`, `get_preds` on both sets, `predict`, `tta`, `show_results`: as a plain Learner, and without a step"
    learn = make(); learn.fit(1, .01); weights = deepcopy(learn.model.state_dict())
    plain = make(pretext=False); plain.model.load_state_dict({k:v for k,v in weights.items() if 'pretext' not in k})
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
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in weights.items())

def test_interpretation(make):
    "`ClassificationInterpretation`: each validation image counted once"
    learn = make(); learn.fit(1, .01)
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==8

def test_summary(make):
    "`learn.summary`: layers and parameters of the plain model; trains on nothing"
    model = lambda o: o.summary().split('Optimizer used')[0]
    learn = make(); before = head(learn).clone(); got = model(learn)
    assert got==model(make(pretext=False)) and '8 x 2' in got and torch.equal(head(learn), before) and learn.dls.unlabeled.epoch==0

def test_cancelled(make):
    "cancelled batches, epochs and fits, and an interrupt: the next fit is whole"
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.epoch==0 and self.iter==1: raise self.kind()
    for kind in (CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt):
        learn = make(); cb = Cancel(); cb.kind = kind
        try: learn.fit(1, .01, cbs=cb)
        except KeyboardInterrupt: pass
        learn.fit(1, .01)
        assert len(learn.recorder.losses)==4 and len(learn.recorder.values[-1])==5, kind

def test_two_fits(make):
    "two `fit`s in a row: the streams go on, where one fit of two epochs would; the head stays in the optimizer, once"
    class Seen(Callback):
        def before_fit(self):
            self.xs = []; old = self.pretext.objective.__class__.batch
            self.pretext.objective.batch = lambda x: (self.xs.append(x), old(self.pretext.objective, x))[1]
        def before_batch(self):
            if self.training: self.xs.append(self.x)
    once = make(Seen()); once.fit(2, .01)
    learn = make(Seen()); learn.fit(1, .01); xs = learn.seen.xs[1:]; learn.fit(1, .01); xs += learn.seen.xs[1:]
    want = [o for i,o in enumerate(once.seen.xs[1:])]
    assert len(xs)==len(want)==16 and all(torch.equal(a, b) for a,b in zip(xs, want))
    assert sum(p is head(learn) for g in learn.opt.param_lists for p in g)==1 and learn.recorder.metric_names.count('pretext_loss')==1 and len(learn.recorder.values)==1

def test_fit_cbs_and_learner_cbs(make):
    "`fit(cbs=…)`, `Learner(cbs=…)`, `add_cb`: the same weights; after `fit(cbs=…)` it is gone, else it stays"
    a,b,c = make(),make(pretext=False),make(pretext=False)
    c.add_cb(RotationPretext())
    fit_each(a, c)
    for dl in b.dls.loaders[::2]: dl.epoch = 0
    b.fit(1, .01, cbs=RotationPretext())
    for k,v in b.model.state_dict().items(): assert torch.equal(v, a.model.state_dict()[k]) and torch.equal(v, c.model.state_dict()[k])
    assert hasattr(a,'pretext') and hasattr(c,'pretext') and not hasattr(b,'pretext') and not any('pretext' in k for k in b.model.state_dict())

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
    other = deepcopy(plain.model.state_dict()); learn.model.load_state_dict(other)    # strictly; BatchNorm had seen the unlabelled images as well
    for (p,_,s,_),(q,_,t,_) in zip(learn.opt.all_params(), plain.opt.all_params()): assert torch.equal(s['grad_avg'], t['grad_avg'])
    fit_each(learn, plain)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in plain.model.state_dict().items())

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_batchnorm_groups(make, backward):
    "`BatchNormGroups(2)`: both forward passes are normalised in halves, gradients and the first half's running averages as by hand; then the model is plain"
    class Keep(Callback):
        order = 101
        def before_batch(self): self.learn.state = deepcopy(self.model.state_dict()); self.learn.batch = (self.x.clone(), self.y.clone())
        def before_step(self): self.learn.grads_at = {n:p.grad.clone() for n,p in self.model.named_parameters()}; self.learn.after = deepcopy(self.model.state_dict()); raise CancelFitException
    learn = make(BatchNormGroups(2)); learn.pretext.backward = backward
    old,views = learn.pretext.objective.batch,[]
    learn.pretext.objective.batch = lambda x: views.append(old(x)) or views[-1]
    learn.fit(1, .01, cbs=Keep())
    groups = []
    for i in range(2):
        model,h = resnet10(num_classes=2).train(),nn.Linear(512,4)
        model.load_state_dict({k:v for k,v in learn.state.items() if 'pretext' not in k})
        h.load_state_dict({k.rsplit('.',1)[1]:v for k,v in learn.state.items() if 'pretext' in k})
        half = lambda o: o.chunk(2)[i]
        body = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
        loss = nn.functional.cross_entropy(model(half(learn.batch[0])), half(learn.batch[1]))
        (loss+nn.functional.cross_entropy(h(body(half(views[-1][0]))), half(views[-1][1]))).backward()
        groups.append((model, {n:p.grad for n,p in model.named_parameters()}|{f'fc.pretext_head.{n}':p.grad for n,p in h.named_parameters()}))
    for n,g in learn.grads_at.items(): assert torch.allclose(g, (groups[0][1][n]+groups[1][1][n])/2, rtol=1e-3, atol=1e-5), n
    for n,b in groups[0][0].named_buffers(): assert torch.allclose(learn.after[n], b, atol=1e-6), n
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules()) and all(o.track_running_stats for o in learn.model.modules() if isinstance(o, nn.BatchNorm2d))
    learn.export(); assert b'sesemi' not in (learn.path/'export.pkl').read_bytes()
    class Interrupt(Callback):
        def before_batch(self): raise KeyboardInterrupt
    plain = make(pretext=False)
    with pytest.raises(KeyboardInterrupt): plain.fit(1, .01, cbs=[BatchNormGroups(2), Interrupt()])
    assert not any(m._forward_hooks for m in plain.model.modules())

def test_vision_learner(dls):
    "`vision_learner`: its head's BatchNorm and Dropout don't see rotated images, its splitter puts the pretext head into the last group, and its freeze keeps the body while both heads learn"
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=RotationPretext())
    sizes = []; drop = next(o for o in learn.model[1].modules() if isinstance(o, nn.Dropout)); drop.register_forward_hook(lambda m,i,o: sizes.append(len(o)) if m.training else None)
    with learn.no_bar(), learn.no_logging():
        dls.train.epoch = dls.unlabeled.epoch = 0
        learn.freeze(); body,h,fc = (o.clone() for o in (learn.model[0][0].weight, head(learn), learn.model[1][-1].weight))
        bn = next(o for o in learn.model[1].modules() if isinstance(o, nn.BatchNorm1d)); learn.fit(1, .01)
        assert torch.equal(learn.model[0][0].weight, body) and (head(learn)!=h).any() and (learn.model[1][-1].weight!=fc).any()
        assert bn.num_batches_tracked==4 and learn.model[0][1].num_batches_tracked==8 and sizes==[8]*4
        assert learn.pretext.feature_layer.width==512 and [sum(p is head(learn) for p in g) for g in learn.opt.param_lists]==[0,0,1]
        learn.unfreeze(); learn.fit(1, slice(1e-3,1e-2)); assert (learn.model[0][0].weight!=body).any()

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_terminate_on_nan(make, backward, capsys):
    "`TerminateOnNaNCallback`: a pretext loss that isn't finite stops the fit, without it nothing does"
    def run(*cbs):
        learn = make(*cbs); learn.pretext.backward = backward
        learn.pretext.objective = deepcopy(learn.pretext.objective)
        learn.pretext.objective.loss = lambda logits, targ: logits.sum()*float('nan' if learn.iter==1 else 1e-3)
        learn.fit(1, 0.); return len(learn.recorder.losses)
    assert run()==4 and run(TerminateOnNaNCallback())==1   # the Recorder comes after both
    assert 'pretext loss is nan at epoch 0, step 1' in capsys.readouterr().out

def test_tensorboard(make, tmp_path):
    "`TensorBoardCallback`: the model is traced, both columns and the rates are logged"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from sesemi_fastai.all import NesterovSGD
    learn = make(opt_func=NesterovSGD, wd=None); learn.fit(2, .01, cbs=TensorBoardCallback(tmp_path/'tb', log_preds=False))
    ea = EventAccumulator(str(tmp_path/'tb')); ea.Reload()
    got = [o.value for o in ea.Scalars('pretext_loss')]
    assert got==pytest.approx([column(learn,'pretext_loss',i) for i in (0,1)]) and 'pretext_acc' in ea.Tags()['scalars'] and 'lr_0' in ea.Tags()['scalars'] and ea.Tags()['graph']

def test_wandb(make, tmp_path, monkeypatch):
    "`WandbCallback`, offline: both columns are in the summary (fastai 2.8.12's own listing of settings, which fails on any Learner that reads files, is left out)"
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as fw
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setattr(fw, '_format_config', noop)
    run = wandb.init(mode='offline', dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        learn = make(); learn.fit(1, .01, cbs=WandbCallback(log=None, log_preds=False, log_model=False))
        assert run.summary['pretext_loss']==pytest.approx(column(learn,'pretext_loss')) and 'pretext_acc' in dict(run.summary)
    finally: wandb.finish()

def test_channels_last(make):
    "`ChannelsLast`: both forward passes run in channels-last memory"
    class Formats(Callback):
        def before_fit(self):
            self.seen = []
            self.h = self.model.layer1.register_forward_hook(lambda m,i,o: self.seen.append(o.is_contiguous(memory_format=torch.channels_last)))
        def after_fit(self): self.h.remove()
    learn = make(ChannelsLast(), Formats()); learn.fit(1, .01)
    assert len(learn.formats.seen)==4+4+1 and all(learn.formats.seen)   # labelled, rotated, validation

@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
def test_mixed_precision(make, to):
    "`to_fp16`, `to_bf16`: low precision where there is a GPU, head and all; on a CPU, where fastai's do nothing, nothing changes"
    plain,low = make(),getattr(make(), to)()
    seen = []; low.pretext.pretext_head.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    fit_each(plain, low)
    if torch.cuda.is_available(): assert set(seen)=={torch.float16 if to=='to_fp16' else torch.bfloat16} and head(low).dtype==torch.float32
    else: assert torch.equal(head(plain), head(low)) and torch.equal(plain.model.conv1.weight, low.model.conv1.weight)

def test_sequential_under_autocast(make, dls):
    "`backward='sequential'` under `BFloat16`: a step's gradients are the sum of two passes made by hand"
    learn = make(BFloat16(), Grads()); learn.pretext.backward = 'sequential'
    class Keep(Callback):
        order = 101
        def before_batch(self): self.learn.state = deepcopy(self.model.state_dict()); self.learn.batch = (self.x.clone(), self.y.clone())
        def before_step(self): self.learn.grads_at = {n:p.grad.clone() for n,p in self.model.named_parameters()}; raise CancelFitException
    want = []
    old = learn.pretext.objective.batch
    learn.pretext.objective.batch = lambda x: want.append(old(x)) or want[-1]
    learn.fit(1, .01, cbs=Keep())
    model = resnet10(num_classes=2); h = nn.Linear(512,4)
    model.load_state_dict({k:v for k,v in learn.state.items() if 'pretext' not in k})
    h.load_state_dict({k.rsplit('.',1)[1]:v for k,v in learn.state.items() if 'pretext' in k}); model.train()
    with torch.autocast('cpu', torch.bfloat16): loss = nn.functional.cross_entropy(model(learn.batch[0]).float(), learn.batch[1])
    loss.backward()
    body = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    with torch.autocast('cpu', torch.bfloat16): loss = nn.functional.cross_entropy(h(body(want[-1][0])).float(), want[-1][1])
    loss.backward()
    for n,p in model.named_parameters(): assert torch.allclose(p.grad, learn.grads_at[n], rtol=1e-3, atol=1e-6), n
    assert torch.allclose(h.weight.grad, learn.grads_at['fc.pretext_head.weight'], rtol=1e-3, atol=1e-6)

def from_block(path, block, get_y, n_out, loss, metric):
    "A Learner on a DataBlock of the user's own, and its unlabelled items"
    db = DataBlock((ImageBlock, block), get_items=lambda p: get_image_files(p, folders=['train','val']), get_y=get_y,
                   splitter=FuncSplitter(lambda o: o.parent.parent.name=='val'), item_tfms=Resize(32))
    own = PairedDataLoaders.from_dls(db.dataloaders(path, bs=8, num_workers=0), get_image_files(path/'unsup'), unlabeled_bs=4, seed=0, n_steps=2)
    torch.manual_seed(0)
    learn = Learner(own, resnet10(num_classes=n_out), loss_func=loss, metrics=metric, cbs=RotationPretext(), path=path)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn

class FirstLoss(Callback):
    "The supervised loss of the first step, and what it was made of"
    def after_loss(self):
        if self.training and not hasattr(self.learn,'kept'): self.learn.kept = (self.pred.detach().clone(), self.y.clone(), self.loss.item())

def test_multi_label(dls):
    "multi-label Learner: the supervised loss is the binary cross-entropy of several labels, beside it rotations are told"
    learn = from_block(dls.path, MultiCategoryBlock(), lambda o: [o.parent.name,'all'], 3, BCEWithLogitsLossFlat(), accuracy_multi)
    learn.fit(1, .01, cbs=FirstLoss()); p,y,loss = learn.kept
    assert y.shape==(8,3) and loss==pytest.approx(-(y*p.sigmoid().log()+(1-y)*(1-p.sigmoid()).log()).mean().item(), rel=1e-4)
    assert 0<column(learn,'pretext_loss')<10

def test_regression(dls):
    "regression Learner: the supervised loss is the squared error, beside it rotations are told"
    learn = from_block(dls.path, RegressionBlock(n_out=1), lambda o: float(o.parent.name=='b'), 1, MSELossFlat(), mae)
    learn.fit(1, .001, cbs=FirstLoss()); p,y,loss = learn.kept
    assert loss==pytest.approx(((p.flatten()-y.flatten())**2).mean().item(), rel=1e-4) and 0<column(learn,'pretext_loss')<10

def test_several_of_ours(make, capsys):
    "several callbacks of ours at once: `StepSeed`, `BFloat16`, `PlainProgress`; a second `RotationPretext` is refused"
    learn = make(StepSeed(), BFloat16()); learn.logger = print; learn.fit(1, .01, cbs=PlainProgress())
    assert 'pretext_acc' in capsys.readouterr().out and len(learn.recorder.losses)==4
    with pytest.raises(ValueError, match='already'): learn.add_cb(RotationPretext())

def test_export_while_attached(make, dls, tmp_path):
    "`learn.export` while attached: the plain model, by `load_learner`"
    learn = make(); learn.fit(1, .01); learn.export(); f = dls.valid.items[0]
    got = load_learner(tmp_path/'export.pkl')
    assert list(got.model.state_dict())==list(resnet10(num_classes=2).state_dict()) and b'sesemi' not in (tmp_path/'export.pkl').read_bytes()
    with got.no_bar(): assert torch.allclose(got.predict(f)[2], learn.predict(f)[2], atol=1e-6)
