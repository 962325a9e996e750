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
    SaveModelCallback,SchedLin,SGD,ShowGraphCallback,TerminateOnNaNCallback,accuracy,accuracy_multi,get_image_files,load_learner,mae,tensor,vision_learner,
    DataBlock,FuncSplitter,ImageBlock,MultiCategoryBlock,RegressionBlock,Resize,BCEWithLogitsLossFlat,MSELossFlat)
from fastai.callback.all import ChannelsLast,CSVLogger,CutMix,GradientAccumulation,GradientClip,MixUp
from sesemi_fastai.all import BFloat16,PairedDataLoaders,PlainProgress,RotationPretext,StepSeed,resnet10

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
    "The ordinary loss of the first step, and what it was made of"
    def after_loss(self):
        if self.training and not hasattr(self.learn,'kept'): self.learn.kept = (self.pred.detach().clone(), self.y.clone(), self.loss.item())

def test_multi_label(dls):
    "multi-label Learner: the ordinary loss is the binary cross-entropy of several labels, beside it rotations are told"
    learn = from_block(dls.path, MultiCategoryBlock(), lambda o: [o.parent.name,'all'], 3, BCEWithLogitsLossFlat(), accuracy_multi)
    learn.fit(1, .01, cbs=FirstLoss()); p,y,loss = learn.kept
    assert y.shape==(8,3) and loss==pytest.approx(-(y*p.sigmoid().log()+(1-y)*(1-p.sigmoid()).log()).mean().item(), rel=1e-4)
    assert 0<column(learn,'pretext_loss')<10

def test_regression(dls):
    "regression Learner: the ordinary loss is the squared error, beside it rotations are told"
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
