"What a resumed fit compares, and what it keeps of callbacks: by what it leaves out, not by what it knows"
import copy,os,pickle,platform,random,signal,subprocess,sys,time,warnings
from collections import Counter,defaultdict,deque
from datetime import datetime
from pathlib import Path
import pytest,torch
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CancelFitException,CategoryBlock,CrossEntropyLossFlat,CSVLogger,DataBlock,EarlyStoppingCallback,ImageBlock,
    L,LabelSmoothingCrossEntropy,Learner,MixUp,ProgressCallback,Resize,SaveModelCallback,SGD,accuracy,aug_transforms,default_device,get_image_files,noop,params,set_seed)
from fastai.callback.training import GradientClip
from sesemi_fastai.all import *
from sesemi_fastai.learner import LabeledMixUp
from sesemi_fastai.checkpoint import unpack_state
from sesemi_fastai.settings import describe,describe_items,differences,run_settings

def by_index(o): return 'ab'[int(Path(o).stem)%2]
def swapped(o): return 'ba'[int(Path(o).stem)%2] if Path(o).stem=='3' else by_index(o)
def net(p): return nn.Sequential(nn.Conv2d(3,4,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(4,2))

def tiny(folder, *cbs, size=32, p=.5, label=by_index, batch=None, loss=None, frozen=False, wd_bn_bias=False, device=None, seed=0, opt_func=SGD, pretext=None, nw=0):
    "A small Learner by fastai's own data block"
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda p: get_image_files(p/'train', folders=['a','b']), get_y=label, splitter=lambda o: (list(range(8)), list(range(8,16))),
                      item_tfms=Resize(size), batch_tfms=aug_transforms(size=size) if batch is None else batch)
    set_seed(1)
    dls = PairedDataLoaders.from_dls(block.dataloaders(folder, bs=4, num_workers=nw, device=device), get_image_files(folder/'unsup'), unlabeled_bs=2, seed=seed, n_steps=3)
    learn = Learner(dls, net(p), loss_func=loss or CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, wd_bn_bias=wd_bn_bias, path=folder, cbs=list(cbs), splitter=lambda m: [params(m[:4]), params(m[4:])])
    learn.remove_cb(ProgressCallback); learn.logger = noop
    if pretext: learn.add_cb(RotationPretext(**pretext))
    learn.create_opt()
    if frozen: learn.freeze()
    learn.n_epoch = 2
    return learn

CHANGES = dict(
    size=(dict(size=32), dict(size=40), 'Resize|size'), labels=(dict(), dict(label=swapped), 'labels was'), batch_transforms=(dict(), dict(batch=aug_transforms(size=32, max_rotate=30)), 'after_batch'),
    dropout=(dict(), dict(p=.1), 'Dropout'), label_smoothing=(dict(), dict(loss=CrossEntropyLossFlat(label_smoothing=.1)), 'label_smoothing was 0.0, now 0.1'),
    class_weights=(dict(loss=CrossEntropyLossFlat(weight=torch.tensor([1.,2.]))), dict(loss=CrossEntropyLossFlat(weight=torch.tensor([1.,3.]))), 'weight was'),
    smoothing_class=(dict(loss=LabelSmoothingCrossEntropy(.1)), dict(loss=LabelSmoothingCrossEntropy(.2)), 'eps was 0.1, now 0.2'), loss=(dict(), dict(loss=BCEWithLogitsLossFlat()), 'BCE'),
    mixup=(dict(cbs=[lambda: MixUp(.4)]), dict(cbs=[lambda: MixUp(.8)]), 'MixUp'), clip=(dict(cbs=[lambda: GradientClip(.1)]), dict(cbs=[lambda: GradientClip(.2)]), 'GradientClip.max_norm was 0.1, now 0.2'),
    frozen=(dict(), dict(frozen=True), 'frozen: now also 0.weight'), wd=(dict(), dict(wd_bn_bias=True), 'wd_bn_bias was False, now True'), seed=(dict(), dict(seed=3), 'seed was 0, now 3'),
    features=(dict(pretext=dict(features='3')), dict(pretext=dict(features='4')), 'features was'), weight=(dict(pretext=dict(weight=1.)), dict(pretext=dict(weight=.5)), 'weight was 1.0, now 0.5'))

@pytest.mark.parametrize('what', CHANGES)
def test_changed_setting_is_named(folder, what):
    then,now,words = CHANGES[what]
    def settings(cbs=(), **kw): return run_settings(tiny(folder, *(o() for o in cbs), **kw))
    diff = '; '.join(differences(settings(**then), settings(**now)))
    assert any(o in diff for o in words.split('|')), diff
    assert not differences(settings(**then), settings(**then))

def test_set_in_a_function():
    "A label function with sets in its code: the same function in another process, where sets have another order"
    code = "def label(x, *, near=frozenset('pqrstuvw')): return x in {'a','b','c','d','e','f','g','h'} or (x,1) in {(o,1) for o in near} or x in ((1,), {'k','l','m','n','o'}, ())\n"
    names = {}; exec(code, names); here = describe(names['label'])
    seed = '1' if os.environ.get('PYTHONHASHSEED')!='1' else '2'
    r = subprocess.run([sys.executable,'-W','ignore','-c',code+"from sesemi_fastai.settings import describe; print(describe(label))"], capture_output=True, text=True, env=os.environ|dict(PYTHONHASHSEED=seed))
    assert r.stdout.strip()==str(here), r.stderr
    exec(code.replace("'h'}", "'i'}"), names); assert describe(names['label'])['code']!=here['code']

def test_recipe_and_size_of_folders(folder):
    def settings(**kw):
        learn = sesemi_learner(PairedDataLoaders.from_folder(folder, unlabeled_bs=2, num_workers=0, seed=0, verbose=False, **(dict(size=32, cache=False)|kw)), resnet10)
        learn.create_opt(); learn.n_epoch = 1
        return run_settings(learn)
    a = settings()
    assert not differences(a, settings())
    assert 'size' in '; '.join(differences(a, settings(size=48))) and 'SampleCrop' in '; '.join(differences(a, settings(recipe='fast')))
    assert not differences(settings(recipe='fast'), settings(recipe='fast', cache=folder/'cache'))   # which changes no result

@pytest.mark.parametrize('cb', [BFloat16, lambda: BatchNormGroups(2), ProgressiveResize, lambda: LabeledMixUp(.2), lambda: EMA(.9), lambda: GradientClip(1.), PlainProgress, lambda: JigsawPretext(grid=2), EntropyMin, PseudoLabel, PiModel, lambda: [MeanTeacher(), EMA(.9)], VAT, BarlowTwins])
def test_nothing_of_ours_is_lost(folder, tmp_path, cb):
    "Each callback of the package, and those that it adds itself, can be kept as a whole: no warning"
    learn = tiny(folder, *L(cb()))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, .01, cbs=[RotationPretext(), FixMatch(threshold=.3), ResumeTraining(tmp_path/'saved', every=1)])

def test_what_was_done_before_is_no_setting(folder):
    "A look at the data, a search for a learning rate, a validation, a fit: none is a difference"
    new,used = (tiny(folder, LabeledMixUp(), EarlyStoppingCallback(), GradientClip(), pretext=dict(features='3')) for _ in range(2))
    used.dls.train.one_batch(); used.dls.valid.one_batch(); used.validate(); used.fit(1, .01); used.get_preds(); used.create_opt(); used.n_epoch = 2
    assert not differences(run_settings(new), run_settings(used))

def test_settings_of_a_million_files(folder):
    names = [f'/data/train/{i%1000:03d}/{i}.jpg' for i in range(1_000_000)]
    start = time.process_time(); d = describe_items(names); took = time.process_time()-start
    assert d.startswith('1000000 files') and took<10, took
    names[1] = names[1].replace('001','002'); assert describe_items(names)!=d

class Nasty(Callback):
    "State of every kind, all of which the next step depends on"
    order = 30
    def __init__(self, by=1.):
        self.by,self._n,self.seen,self.names,self.last = by,0,defaultdict(lambda: [0.]),Counter(),deque(maxlen=3)
        self.layer,self.avg,self.sets,self.rng,self.when = nn.Linear(2,2),torch.zeros(2),set(),random.Random(3),[]
        self.path,self.day = Path('a'),datetime(2020,1,1)
    def before_fit(self):
        self._n,self.when = 0,[]
        nn.init.constant_(self.layer.weight, .1)
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.learn.loss_grad*(1+self.figure())
    def figure(self):
        return .1*sum([self._n, len(self.seen['x']), self.names['y'], sum(self.last), self.layer.weight.sum().item(), self.avg.sum().item(), len(self.sets), self.rng.random(), len(self.when)])*self.by/100
    def after_batch(self):
        if not self.training: return
        self._n += 1; self.seen['x'].append(1.); self.names['y'] += 1; self.last.append(self._n); self.avg += .1; self.sets.add(self._n); self.when.append(self._n)
        with torch.no_grad(): self.layer.weight += .1

class Cut(Callback):
    "Breaks off after a step"
    order = ProgressCallback.order
    def __init__(self, at, ex=RuntimeError): self.at,self.ex = at,ex
    def after_batch(self):
        if self.training and self.learn.train_iter==self.at: raise self.ex('cut')

def same(a, b):
    for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(x,y)
    assert a.recorder.values==b.recorder.values and torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))

def cut_and_whole(folder, tmp_path, cbs, at=5, every=1):
    "A Learner that was left alone, one that was cut, and one that went on"
    whole = tiny(folder); set_seed(2); whole.fit(3, .1, cbs=cbs())
    cut = tiny(folder); set_seed(2)
    with pytest.raises(RuntimeError, match='cut'): cut.fit(3, .1, cbs=[ResumeTraining(tmp_path/'ckpt', every), *cbs(), Cut(at)])
    again = tiny(folder); set_seed(3); again.fit(3, .1, cbs=[ResumeTraining(tmp_path/'ckpt', every), *cbs()])
    same(whole, again)
    return whole,cut,again

@pytest.mark.parametrize('at,every', [(5,1),(8,3)])
def test_state_of_callbacks_comes_back(folder, tmp_path, at, every):
    "Tensors in modules, a defaultdict with a factory of its own, private counters, lists that grow, two of one class"
    cut_and_whole(folder, tmp_path, lambda: [Nasty(1.), Nasty(2.)], at, every)

def test_two_of_one_class_in_another_order(folder, tmp_path):
    a,b,c,d = Nasty(1.),Nasty(2.),Nasty(2.),Nasty(1.)
    with pytest.raises(RuntimeError, match='cut'): tiny(folder).fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), a, b, Cut(5)])
    b._n,a._n = 20,10   # after the last save: not in it
    class Look(Callback):
        order = ProgressCallback.order
        def before_batch(self):
            if self.training and not hasattr(self,'found'): self.found = c._n,d._n,len(c.when),c.by,d.by
    look = Look(); tiny(folder).fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), c, d, look])
    assert look.found==(4,4,4,2.,1.)

class TimeLimit(Callback):
    "Written in the ordinary way"
    def __init__(self, seconds): self.seconds = seconds
    def before_fit(self): self.start = time.time()
    def after_batch(self):
        if time.time()-self.start>self.seconds: raise CancelFitException

def test_time_limit_counts_training_only(folder, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match='cut'): tiny(folder).fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), TimeLimit(1000), Cut(5)])
    real = time.time
    monkeypatch.setattr(time, 'time', lambda: real()+3600)   # an hour later
    again = tiny(folder); limit = TimeLimit(1000); again.fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), limit])
    assert len(again.recorder.losses)==9 and 0<=time.time()-limit.start<1000

class Keeps(Callback):
    "Knows its state, and holds what can't be kept"
    def __init__(self): self.count,self.f = 0,open(os.devnull)
    def after_batch(self): self.count += self.training
    def state_dict(self): return dict(n=self.count)
    def load_state_dict(self, state): self.count = state['n']+100
class Holds(Callback):
    def __init__(self): self.log = open(os.devnull)

def test_own_state_dict_and_what_cant_be_kept(folder, tmp_path):
    with warnings.catch_warnings(record=True) as said, pytest.raises(RuntimeError, match='cut'):
        warnings.simplefilter('always'); tiny(folder).fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), Keeps(), Holds(), CSVLogger(), Cut(5)])
    said = [str(o.message) for o in said if "can't keep" in str(o.message)]
    assert len(said)==1 and 'Holds.log (a TextIOWrapper)' in said[0] and 'Keeps' not in said[0] and 'CSVLogger' not in said[0], said
    keeps = Keeps(); tiny(folder).fit(3, .1, cbs=[ResumeTraining(tmp_path, 1), keeps, Holds(), CSVLogger()])
    assert keeps.count==109

def test_device_as_a_string(folder, tmp_path):
    learn = tiny(folder, device='cpu'); learn.dls.device = 'cpu'
    learn.fit(1, .1, cbs=ResumeTraining(tmp_path, 1))
    learn = tiny(folder, device=torch.device('cpu')); learn.fit(1, .1, cbs=ResumeTraining(tmp_path, 1)); assert len(learn.recorder.losses)==3

def test_second_equal_fit_trains_on(folder, tmp_path):
    "and is numbered; again in a new Learner, both are taken from their ends"
    a,b = tiny(folder),tiny(folder)
    for learn,cbs in ((a, []), (b, [ResumeTraining(tmp_path, 2)])):
        set_seed(2); learn.fit(1, .1, cbs=cbs); learn.fit(1, .1, cbs=cbs)
    same(a, b); assert {o.name[:5] for o in tmp_path.glob('*.ckpt')}=={'fit-0','fit-1'}
    c = tiny(folder)
    for _ in range(2): c.fit(1, .1, cbs=ResumeTraining(tmp_path, 2))
    same(a, c)

def test_versions(folder, tmp_path, monkeypatch):
    "A patch version of Python is told; another torch is refused, but for one who allows it"
    fit = lambda *cbs, **kw: tiny(folder).fit(2, .1, cbs=[ResumeTraining(tmp_path, 1, **kw), *cbs])
    with pytest.raises(RuntimeError, match='cut'): fit(Cut(4))
    v = platform.python_version()
    monkeypatch.setattr(platform, 'python_version', lambda: v.rpartition('.')[0]+'.99')
    with pytest.warns(match='was written by Python'), pytest.raises(RuntimeError, match='cut'): fit(Cut(5))
    monkeypatch.setattr(platform, 'python_version', lambda: '3.99.1')
    with pytest.raises(CheckpointError, match=r'version of python was 3\.\d+, now 3\.99.*allow'): fit()
    monkeypatch.setattr(torch, '__version__', '9.9')
    with pytest.raises(CheckpointError, match='version of torch was'): fit(allow='version of python')
    fit(allow=['version of torch','version of python'])

def test_fewer_gpus_than_before(monkeypatch):
    "Saved with four GPUs visible, resumed with one: tensors of the others come to the one there is; generators are tested where they are put back"
    moved = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1); monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    class OnGPU:
        def to(self, device): moved.append(str(device)); return self
    for o in ('cuda:3','cuda:0'): unpack_state(('on',(o,OnGPU())))
    assert moved==['cuda','cuda:0']

@pytest.mark.parametrize('compiled_first', [True,False])
def test_compiled_and_not(folder, tmp_path, compiled_first):
    "A run goes on with `torch.compile` or without it where that difference is allowed, bitwise as it began where the backend computes the same; it is one difference, by its name"
    def learner(compiled):
        res = tiny(folder)
        if compiled: res.model = torch.compile(res.model, backend='eager')
        return res
    a,b = (run_settings(learner(o)) for o in (compiled_first,not compiled_first))
    assert differences(a, b)==[f'torch.compile was {"True" if compiled_first else "absent"}, now {"absent" if compiled_first else "True"}']
    whole = learner(False); set_seed(2); whole.fit(2, .1)
    cut = learner(compiled_first); set_seed(2)
    with pytest.raises(RuntimeError, match='cut'): cut.fit(2, .1, cbs=[ResumeTraining(tmp_path, 1), Cut(2)])
    with pytest.raises(CheckpointError, match='torch.compile was'): learner(not compiled_first).fit(2, .1, cbs=ResumeTraining(tmp_path, 1))
    again = learner(not compiled_first); again.fit(2, .1, cbs=ResumeTraining(tmp_path, 1, allow='torch.compile'))
    again.model = getattr(again.model,'_orig_mod',again.model); same(whole, again)

def test_frozen_layers_are_named(folder, tmp_path):
    with pytest.raises(RuntimeError, match='cut'): tiny(folder).fit(2, .1, cbs=[ResumeTraining(tmp_path, 1), Cut(4)])
    with pytest.raises(CheckpointError, match='frozen: now also 0.weight'): tiny(folder, frozen=True).fit(2, .1, cbs=ResumeTraining(tmp_path, 1))

def test_best_model_and_early_stop(folder, tmp_path):
    "Trackers go on with the best value that they have seen"
    cut_and_whole(folder, tmp_path, lambda: [SaveModelCallback(fname=str(tmp_path/'best')), EarlyStoppingCallback(patience=2)], at=7)
    again = tiny(folder); again.fit(3, .1, cbs=[ResumeTraining(tmp_path/'ckpt', 1), SaveModelCallback(fname=str(tmp_path/'best')), EarlyStoppingCallback(patience=2)])

class Fails(Callback):
    order = 300
    def before_fit(self): raise RuntimeError('cut')

@pytest.mark.parametrize('permanent', [True,False])
def test_nothing_is_left_of_a_fit_that_breaks_off(folder, tmp_path, permanent):
    "a later callback that fails in `before_fit`, an error in the middle, an interrupt while finished epochs are passed over"
    before,learn = [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM)],tiny(folder)
    saver = ResumeTraining(tmp_path/'ckpt', 1)
    if permanent: learn.add_cb(saver)
    fit = lambda *cbs: learn.fit(2, .1, cbs=[*cbs]+([] if permanent else [saver]))
    runs = [cb.run for cb in learn.cbs]
    for cbs,ex in (([Fails()],RuntimeError),([Cut(5)],RuntimeError),([Cut(5, KeyboardInterrupt)],KeyboardInterrupt)):
        with pytest.raises(ex): fit(*cbs)
        learn.get_preds()
        assert [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM)]==before and [cb.run for cb in learn.cbs]==runs
        assert not any(n in vars(learn) for n in ('_with_events','_do_one_batch','all_batches'))
    def interrupt(row): raise KeyboardInterrupt
    learn.logger = interrupt
    with pytest.raises(KeyboardInterrupt): fit()
    learn.logger = noop
    if not permanent: assert saver.learn is None and not any(type(o).__name__.startswith(('Resume','_Resume')) for o in learn.cbs)
    with pytest.raises(RuntimeError): fit(Cut(5))
    assert (saver._fit is not None)==permanent   # it still holds the folder
    other = tiny(folder); other.fit(2, .1, cbs=ResumeTraining(tmp_path/'ckpt', 1))   # the folder is free, though the traceback lives
    assert len(other.recorder.losses)==6
    learn.export(folder/'export.pkl')

def test_copies_and_exports(folder, tmp_path):
    "A copied Learner has its own callback, in no fit; an export loads where this package isn't installed"
    learn = tiny(folder); learn.add_cb(ResumeTraining(tmp_path/'ckpt', 1)); learn.fit(1, .1)
    twin = copy.deepcopy(learn)
    assert twin.resume_training is not learn.resume_training and twin.resume_training.learn is twin and sum(type(o).__name__=='_ResumeFirst' for o in twin.cbs)==1
    twin.fit(1, .1); assert (tmp_path/'ckpt').is_dir()
    learn.dls = learn.dls.new_empty(); learn.loss_func = CrossEntropyLossFlat()
    assert 'sesemi_fastai' not in repr([pickle.dumps(o) for o in learn.cbs if 'Resume' in type(o).__name__])
