"""Each feature of a fastai Learner with `RotationPretext` attached; a test's docstring says which, and what is asserted.
Each would fail if the feature or the callback were ignored."""
from copy import deepcopy
from functools import partial
import numpy as np,pytest,torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from fastcore.all import L,noop
from fastai.vision.all import (Callback,CancelBatchException,CancelEpochException,CancelFitException,CancelTrainException,ClassificationInterpretation,
    CrossEntropyLossFlat,EarlyStoppingCallback,LabelSmoothingCrossEntropyFlat,Learner,ParamScheduler,ProgressCallback,ReduceLROnPlateau,
    SaveModelCallback,SchedLin,SGD,ShowGraphCallback,accuracy,tensor,vision_learner)
from fastai.callback.all import CSVLogger,CutMix,GradientAccumulation,GradientClip,MixUp
from sesemi_fastai.all import BFloat16,PairedDataLoaders,RotationPretext,resnet10

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
    "`fit_poly_warmup(cbs=…)` with an optimizer that exists: the head joins its last group and leaves again"
    learn = make(pretext=False); learn.create_opt(); n = len(learn.opt.all_params())
    cb = RotationPretext(); learn.fit_poly_warmup(1, .01, cbs=cb)
    assert len(learn.opt.all_params())==n and not any(p is cb.pretext_head.weight for p,*_ in learn.opt.all_params())
    assert not hasattr(learn,'pretext') and 'pretext_loss' in learn.recorder.metric_names

def test_fine_tune(make):
    "`fine_tune`, `freeze`, `unfreeze`: frozen layers stay while the head learns"
    learn = make(splitter=two_groups); learn.create_opt(); learn.freeze()
    body,h = learn.model.conv1.weight.clone(),head(learn).clone()
    learn.fit(1, .01)
    assert torch.equal(learn.model.conv1.weight, body) and (head(learn)!=h).any()
    learn.fine_tune(1, .01, freeze_epochs=1)
    assert (learn.model.conv1.weight!=body).any()

def test_lr_find(make):
    "`lr_find`: weights and head are put back as they were"
    learn = make(); before = deepcopy(learn.model.state_dict())|{'head':head(learn).clone()}
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=())
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
    "label smoothing, weighted losses: change the ordinary loss only"
    plain,other = make(),make(loss_func=loss)
    fit_each(plain, other, lr=0.)
    assert column(plain,'pretext_loss')==pytest.approx(column(other,'pretext_loss'), abs=1e-6)
    assert column(plain,'train_loss')!=pytest.approx(column(other,'train_loss'), abs=1e-4)

def test_bfloat16(make):
    "`BFloat16` (autocast on any device): both forward passes are in low precision, weights stay float32"
    seen = []
    learn = make(BFloat16()); learn.pretext.pretext_head.register_forward_hook(lambda m,i,o: seen.append(o.dtype)); learn.fit(1, .01)
    assert set(seen)=={torch.bfloat16} and head(learn).dtype==torch.float32 and head(learn).grad is None or head(learn).grad.dtype==torch.float32

def test_save_model(make):
    "`SaveModelCallback(monitor='pretext_acc')`: the best model is reloaded, head and all"
    learn = make(SaveModelCallback(monitor='pretext_acc')); learn.fit(2, .01)
    saved = torch.load(learn.path/'models/model.pth', weights_only=True)
    assert any('pretext_head' in k for k in saved) and all(torch.equal(v, learn.model.state_dict()[k]) for k,v in saved.items())

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
    "`Recorder.plot_loss`, `plot_sched`: as without the callback"
    learn = make(); learn.fit_one_cycle(2, .01)
    ax = learn.recorder.plot_loss(skip_start=0); assert len(ax.lines)==2 and len(ax.lines[0].get_ydata())==8
    learn.recorder.plot_sched()

def test_progress(make):
    "`ProgressCallback`, `ShowGraphCallback`: bars and graph"
    learn = make(); learn.add_cbs([ProgressCallback(), ShowGraphCallback()]); learn.fit(1, .01)
    assert learn.show_graph.nb_batches==[4]

def test_validate_predict(make, dls):
    "`validate`, `get_preds` on both sets, `predict`, `tta`, `show_results`: as a plain Learner, and without a step"
    learn = make(); learn.fit(1, .01); weights = deepcopy(learn.model.state_dict())
    plain = make(pretext=False); plain.model.load_state_dict({k:v for k,v in weights.items() if 'pretext' not in k})
    assert len(learn.validate())==2 and list(learn.validate())==pytest.approx(list(plain.validate()))
    for i in (0,1):
        (p,t),(q,u) = learn.get_preds(ds_idx=i),plain.get_preds(ds_idx=i)
        assert len(p)==len(dls[i].dataset) and torch.equal(t,u) and torch.allclose(p,q) if i==1 else len(p)==len(dls[i].dataset)
    assert torch.allclose(learn.predict(dls.valid.items[0])[2], plain.predict(dls.valid.items[0])[2])
    assert learn.tta(n=1)[0].shape==(8,2)
    learn.show_results(max_n=2)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in weights.items())

def test_interpretation(make):
    "`ClassificationInterpretation`: each validation image counted once"
    learn = make(); learn.fit(1, .01)
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==8

def test_summary(make):
    "`learn.summary`: the model's layers"
    assert 'Total params' in make().summary()

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
    "two `fit`s in a row: the streams go on"
    learn = make(); learn.fit(1, .01); learn.fit(1, .01)
    assert learn.dls.train.epoch==learn.dls.unlabeled.epoch==2 and len(learn.recorder.values)==1

def test_add_and_remove(make):
    "`add_cb`, `remove_cb`: the model, its optimizer and the callbacks are those of a plain Learner"
    plain,learn = make(pretext=False),make(pretext=False)
    cb = RotationPretext(); learn.add_cb(cb); learn.fit(1, .01); learn.remove_cb(cb); plain.fit(1, .01)
    assert list(learn.model.state_dict())==list(plain.model.state_dict())
    assert [type(o) for o in learn.cbs]==[type(o) for o in plain.cbs]
    assert [len(o) for o in learn.opt.param_lists]==[len(o) for o in plain.opt.param_lists] and len(learn.opt.state)==len(plain.opt.state)

def test_vision_learner(dls):
    "`vision_learner`: its head's BatchNorm and Dropout don't see rotated images, its freeze and splitter work"
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=RotationPretext())
    with learn.no_bar(), learn.no_logging():
        dls.train.epoch = dls.unlabeled.epoch = 0
        bn = next(o for o in learn.model[1].modules() if isinstance(o, nn.BatchNorm1d)); learn.fit(1, .01)
    assert bn.num_batches_tracked==4 and learn.model[0][1].num_batches_tracked==8
    assert learn.pretext.tap.width==512
