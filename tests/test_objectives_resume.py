"Objectives, their heads and thresholds, and averages of weights: a fit that was cut ends as the one that wasn't, bitwise"
import random,signal
from functools import partial
import numpy as np,pytest,torch
from PIL import Image
from fastai.vision.all import Adam,Callback,Learner,ProgressCallback,SaveModelCallback,accuracy,noop
from sesemi_fastai.all import (BarlowTwins,EMA,FixMatch,JigsawPretext,MeanTeacher,PairedDataLoaders,ResumeTraining,RotationPretext,TrainingStopped,VAT)
from test_objectives import net
from test_resume import load,note,run,same,survive
import killed

CASES = dict(fixmatch=lambda **kw: [RotationPretext(.5, **kw), FixMatch(weighting='free', align='labels', momentum=.9, **kw), EMA(.9)],
             late=lambda **kw: [JigsawPretext(.5, **kw), RotationPretext(.5, start_pct=.5, **kw), FixMatch(threshold=.5, start_pct=.3, **kw), EMA(.9)],
             teacher=lambda **kw: [MeanTeacher(2., ramp_pct=.6, **kw), JigsawPretext(.5, **kw), EMA(.9)],
             soft=lambda **kw: [BarlowTwins(n_proj=8, **kw), VAT(eps=2., **kw), FixMatch(weighting='soft', align='uniform', teacher='ema', momentum=.9, **kw), EMA(.9)])

class Trace(Callback):
    "Copies of all that there is after each step; not a part of what is resumed"
    order = ProgressCallback.order
    def __init__(self, seen): self.seen = seen
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def after_batch(self):
        if not self.training: return
        l = self.learn
        parts = {o.name:o.state_dict() for o in [*l.unlabeled_step.objectives, l.ema]}|dict(model=l.model.state_dict(), opt=l.opt.state_dict(), sums=l.unlabeled_step.state_dict()['sums'], pct=l.pct_train)
        self.seen[l.epoch,l.iter] = killed.checkpoint.unpack_state(killed.checkpoint.pack_state(parts))

class At(Callback):
    "Breaks off by `f` at an event of the epoch `epoch`, and there at the step `step`"
    order = ProgressCallback.order
    def __init__(self, event, f, epoch=1, step=1): self.f,self.at = f,(epoch,step); setattr(self, event, partial(self._break, event))
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def _break(self, event):
        if self.learn.epoch==self.at[0] and ('valid' in event or 'epoch' in event or (self.training and self.learn.iter==self.at[1])): self.f()

def throw(e): raise e
def error(): throw(ZeroDivisionError('cut'))
def ctrl_c(): throw(KeyboardInterrupt())
def sigint(): signal.raise_signal(signal.SIGINT)
# in a step before and after its gradients are complete, behind it, in validation, right after it, at the start of an epoch
CUTS = [('after_loss',error,1,1), ('before_step',ctrl_c,1,2), ('after_batch',sigint,0,1), ('after_batch',error,2,0), ('before_validate',error,0,0), ('after_validate',ctrl_c,1,0), ('after_validate',sigint,0,0), ('before_epoch',error,2,0)]

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for nm,n in {'train/a':8,'train/b':5,'val/a':2,'val/b':2,'unsup':14}.items():
        (path/nm).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0,256,(36,36,3),dtype=np.uint8)).save(path/nm/f'{i}.png')
    return path

def fit(images, cbs, *more, n=3):
    "A Learner of its own, on loaders of its own, and what it saw"
    dls,seen = PairedDataLoaders.from_folder(images, size=32, unlabeled_bs=4, bs=8, num_workers=0, seed=0, n_steps=3, verbose=False),{}
    learn = Learner(dls, net(), opt_func=Adam, metrics=accuracy, path=images, cbs=[*cbs, Trace(seen)])
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.seen = seen
    learn.fit_one_cycle(n, 1e-2, cbs=list(more))
    return learn

def equal_ends(a, b):
    same(dict(a.model.state_dict()), dict(b.model.state_dict())); same(a.opt.state_dict(), b.opt.state_dict())
    same([list(o) for o in a.recorder.values], [list(o) for o in b.recorder.values]); assert torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses)); same(dict(a.recorder.hps), dict(b.recorder.hps))
    for o,p in zip(a.unlabeled_step.objectives, b.unlabeled_step.objectives): same(o.state_dict(), p.state_dict())
    assert a.ema.n_updates==b.ema.n_updates

@pytest.mark.parametrize('case,backward,cuts', [('fixmatch','joint',CUTS[::2]), ('fixmatch','sequential',CUTS[1::2]), ('teacher','joint',CUTS[1::2]), ('teacher','sequential',CUTS[::2]), ('soft','sequential',CUTS[::4])])
def test_cut_fit_goes_on(images, tmp_path, capsys, case, backward, cuts):
    "wherever it is cut: from there on weights, optimizers, heads, thresholds, alignment, averages and their count are those of the whole fit after each step, as are columns at the end; a finished fit is finished"
    make = partial(CASES[case], backward=backward)
    whole = fit(images, make())
    assert len(whole.seen)==9 and len({repr(v) for v in whole.seen.values()})==9
    for i,(event,f,epoch,step) in enumerate(cuts):
        saver = lambda: ResumeTraining(tmp_path/f'{i}', every=2 if i%2 else 1)
        with pytest.raises((ZeroDivisionError,KeyboardInterrupt,TrainingStopped)): fit(images, make(), saver(), At(event, f, epoch, step))
        torch.manual_seed(i)
        b = fit(images, make(), saver())
        assert ('Resuming at epoch' in capsys.readouterr().out) and 0<len(b.seen)<9+(event=='before_validate'), (event,epoch,step,len(b.seen))
        for k,v in b.seen.items(): same(whole.seen[k], v, f'{event} of {epoch},{step}: {k}')
        equal_ends(whole, b)
    c = fit(images, make(), saver()); assert 'is finished' in capsys.readouterr().out and not c.seen
    equal_ends(whole, c)

def test_best_averages_come_back(images, tmp_path):
    "`SaveModelCallback` in a fit that was cut: the best averages, which may be older than the cut, are in the model at the end"
    make = lambda nm: [*CASES['fixmatch'](), SaveModelCallback(monitor='rotation_loss', fname=str(tmp_path/nm))]
    whole = fit(images, make('whole'))
    with pytest.raises(ZeroDivisionError): fit(images, make('cut'), ResumeTraining(tmp_path/'ckpt', 1), At('after_loss', error, 1, 2))
    equal_ends(whole, fit(images, make('cut'), ResumeTraining(tmp_path/'ckpt', 1)))

def test_cut_twice(images, tmp_path):
    "and in its first epoch, before anything was validated"
    make = partial(CASES['teacher'])
    whole = fit(images, make())
    for cut in (('after_batch',error,0,1), ('after_loss',ctrl_c,0,2), ('after_validate',error,1,0)):
        with pytest.raises((ZeroDivisionError,KeyboardInterrupt)): fit(images, make(), ResumeTraining(tmp_path, 1), At(*cut))
    equal_ends(whole, fit(images, make(), ResumeTraining(tmp_path, 1)))

TEXTS = dict(fixmatch='rotation(weight=.5)+fixmatch(weighting=free, align=labels, momentum=.9)', teacher='mean_teacher(weight=2, ramp_pct=.5)+jigsaw(weight=.5)')

@pytest.mark.parametrize('case,backward,moment,every', [('fixmatch','joint',('after_loss',7),1), ('teacher','sequential',('before_step',8),3)])
def test_killed(processes, folder, tmp_path, case, backward, moment, every):
    "SIGKILL: a new process ends with the same model, optimizer, heads, thresholds, count of averages, predictions and columns"
    survive(processes, folder, tmp_path, [moment], dict(num_workers=0, objective=TEXTS[case], ema=.9), every=every, backward=backward)

@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1,2])
@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('case', TEXTS)
def test_many_random_kills(processes, folder, tmp_path, case, backward, ranks):
    "One run after the other, each killed again and again while it goes on, until 20 kills were survived"
    name = f"{TEXTS[case]}+EMA, {backward} backward, {ranks} process{'es'*(ranks>1)}"
    rng,log,kills,n = random.Random(name),tmp_path/'log',[],0
    kw,more = dict(num_workers=rng.choice([0,2]), epochs=3, steps=8, objective=TEXTS[case], ema=.9),dict(backward=backward, ranks=ranks, log=log)
    assert run(processes, folder, tmp_path/'whole.pt', kw, **more)==0, log.read_text()
    while len(kills)<20:
        out,every,code = tmp_path/f'cut{n}.pt',rng.choice([1,2]),None
        while code!=0:
            moment = killed.random_moment(rng) if len(kills)<20 else None
            code = run(processes, folder, out, kw, moment=moment, every=every, **more)
            assert code in (0,-signal.SIGKILL), (moment,code,log.read_text()[-2000:])
            if code: kills.append(moment[0])
        same(load(tmp_path/'whole.pt'), load(out), f'{name} {kills}'); n += 1
    note(name, dict(runs=n, kills={p:kills.count(p) for p in killed.PLACES}))
