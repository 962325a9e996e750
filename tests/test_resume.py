"A run that is killed, at any moment, ends as the run that was never stopped: bitwise"
import errno,itertools,json,multiprocessing.connection,os,random,shlex,shutil,signal,socket,subprocess,sys,time,warnings
from pathlib import Path
from types import SimpleNamespace
import pytest,torch
from IPython import display
from torch import nn
import fastprogress.fastprogress as fastprogress
from fastai.callback import progress
from fastai.vision.all import (Callback,CSVLogger,GradientAccumulation,ImageDataLoaders,Learner,ProgressCallback,Resize,ShowGraphCallback,accuracy,aug_transforms,
    get_image_files,noop,set_seed)
from sesemi_fastai.all import *
from sesemi_fastai import resume
from sesemi_fastai.checkpoint import unpack_state,write_checkpoint
from sesemi_fastai.imagewang import imagewang_command
sys.path.insert(0, str(Path(__file__).parent))
import killed

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def run(processes, *args, ranks=1, **kw):
    "How the process ended, or the first of two, of which both are killed when one is"
    port = free_port() if ranks>1 else None
    ps = [processes.Process(target=killed.train, args=args, kwargs=kw|dict(rank=r, port=port)) for r in range(ranks)]
    for p in ps: p.start()
    multiprocessing.connection.wait([p.sentinel for p in ps], 300)
    ps[0].join(20)
    if ps[0].exitcode:
        for p in ps: p.kill()
    for p in ps: p.join(60)
    assert ps[0].exitcode is not None, 'the process hangs'
    return ps[0].exitcode

def same(a, b, at=''):
    "Whether all of `a` and `b` is equal, bitwise"
    assert type(a)==type(b), at
    if isinstance(a, dict):
        assert a.keys()==b.keys(), at
        for k in a: same(a[k], b[k], f'{at}.{k}')
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b), at
        for i,(x,y) in enumerate(zip(a,b)): same(x, y, f'{at}[{i}]')
    elif isinstance(a, torch.Tensor): assert a.dtype==b.dtype and torch.equal(a,b), at
    else: assert a==b, at

def load(path): return unpack_state(torch.load(path, weights_only=True))

def survive(processes, folder, tmp, moments, kw, **more):
    "Kill a run at each of `moments`, one after the other, let it end, and compare with one that was left alone"
    log = tmp/'log'
    if not (tmp/'whole.pt').exists(): assert run(processes, folder, tmp/'whole.pt', kw, log=log, **more)==0, log.read_text()
    for i,m in enumerate(moments):
        out = tmp/f'cut{i}.pt'
        code = run(processes, folder, out, kw, moment=m, log=log, **more)
        assert code==-signal.SIGKILL, (m,code,log.read_text()[-2000:])
        assert run(processes, folder, out, kw, log=log, **more)==0, (m,log.read_text()[-2000:])
        same(load(tmp/'whole.pt'), load(out), str(m))

def test_killed_anywhere(processes, folder, tmp_path):
    "each place once, in float32 and jointly, with a checkpoint at each step or at every third"
    moments = [('after_loss',7),('before_step',2),('validation',2),('writing',6)]
    survive(processes, folder, tmp_path, moments, dict(num_workers=0), every=1)

def test_killed_with_workers_and_sequential(processes, folder, tmp_path):
    survive(processes, folder, tmp_path, [('after_batch',8)], dict(num_workers=2), every=3, backward='sequential')

def test_killed_with_two_ranks_and_the_fast_recipe(processes, folder, tmp_path):
    pytest.importorskip('accelerate')
    survive(processes, folder, tmp_path, [('before_step',7)], dict(num_workers=0, recipe='fast', cache='none'), every=2, ranks=2)

@pytest.mark.parametrize('moment,ranks', [(('before_step',4),1), (('after_loss',7),2)], ids=['alone','two'])
def test_killed_with_the_best_recipe_and_its_options(processes, folder, tmp_path, moment, ranks):
    "Further classes, MixUp, label smoothing, images that grow, averaged weights, Ranger and its schedule"
    if ranks>1: pytest.importorskip('accelerate')
    kw = dict(num_workers=0, recipe='best', cache='none', size=64, arch='resnet10_8', extra='both', mixup=.4, progressive=.6, ema=.9, lr=.008, objective='rotation(views=one)+fixmatch(start_pct=.5, threshold=.2)')
    survive(processes, folder, tmp_path, [moment], kw, every=2, ranks=ranks)

def wait_for(pause, p):
    "Until `p` is at its moment, or has ended"
    end = time.time()+120
    while not pause.exists() and p.is_alive(): assert time.time()<end; time.sleep(.02)

def ended(ps):
    "How processes ended, None where one hangs; none is left behind"
    for p in ps: p.join(120)
    codes = [p.exitcode for p in ps]
    for p in ps: p.kill()
    return codes

def stopped(processes, folder, out, kw, moment, signals, to_group=True, **more):
    "How a run ended that waited at `moment`, where `signals` were sent to it and its workers, as a scheduler or a terminal does"
    pause = out.with_suffix('.pause'); pause.unlink(missing_ok=True)
    p = processes.Process(target=killed.train, args=(folder, out, kw), kwargs=dict(moment=moment, pause=pause)|more); p.start()
    wait_for(pause, p)
    for s in signals if pause.exists() else []: (os.killpg if to_group else os.kill)(p.pid, s)
    p.join(120); assert p.exitcode is not None, 'the process hangs'
    return p.exitcode

@pytest.mark.parametrize('moment,sig,saved', [(('after_loss',4),signal.SIGTERM,'after step 4 of 5; saved'), (('validation',1),signal.SIGINT,'after step 5 of 5; saved')])
def test_signal_to_the_process_group(processes, folder, tmp_path, moment, sig, saved):
    "Workers outlast it, also those of validation; the step is finished, the state saved, and nothing else is in the folder"
    log,kw,out = tmp_path/'log',dict(num_workers=2),tmp_path/'cut.pt'
    assert run(processes, folder, tmp_path/'whole.pt', kw, log=log)==0, log.read_text()
    assert stopped(processes, folder, out, kw, moment, [sig], log=log, every=100)==128+sig, log.read_text()[-2000:]
    assert saved in log.read_text() and 'killed by signal' not in log.read_text() and 'Traceback' not in log.read_text(), log.read_text()
    ckpt = tmp_path/'cut/ckpt'; assert [o.name for o in ckpt.glob('*.ckpt')] and not list(ckpt.glob('.*part'))
    assert run(processes, folder, out, kw, log=log, every=100)==0, log.read_text()[-2000:]
    same(load(tmp_path/'whole.pt'), load(out))

def test_signal_to_one_of_two(processes, folder, tmp_path):
    "Two processes, of which one has the signal: both stop at the same step, and name it"
    pytest.importorskip('accelerate')
    pause,port,logs = tmp_path/'pause',free_port(),[tmp_path/f'log-{r}' for r in range(2)]
    ps = [processes.Process(target=killed.train, args=(folder, tmp_path/'cut.pt', dict(num_workers=0)), kwargs=dict(moment=('after_loss',3), every=100, log=logs[r], rank=r, port=port, pause=None if r else pause)) for r in range(2)]
    for p in ps: p.start()
    wait_for(pause, ps[0]); os.kill(ps[0].pid, signal.SIGTERM)
    assert ended(ps)==[128+signal.SIGTERM]*2, [o.read_text()[-2000:] for o in logs]
    assert all('Stopped by SIGTERM at epoch 0, after step 3 of 5; saved' in o.read_text() for o in logs)

def test_killed_in_the_second_fit_of_fine_tune(processes, folder, tmp_path):
    survive(processes, folder, tmp_path, [('after_batch',8),('after_loss',3)], dict(num_workers=0), every=2, tune=True)

class Signals(Callback):
    "In a step, what `f` does"
    order = ProgressCallback.order
    def __init__(self, f): self.f = f
    def after_loss(self):
        if self.training and self.learn.train_iter==1: self.f()

def small_fit(folder, *cbs):
    cfg = RunConfig(str(folder), 'noise', size=32, epochs=1, arch='resnet10_16', unlabeled_bs=4, steps=3, num_workers=0)
    learn = cfg.learner(cfg.dls()); learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.fit_poly_warmup(1, .05, cbs=list(cbs))
    return learn

def test_signal_while_processes_agree(folder, tmp_path, monkeypatch):
    "A signal that comes while they ask each other for one isn't lost: the next step notices it"
    was,sent = resume.max_over_processes,[]
    def agree(*xs, **kwargs):
        res = was(*xs, **kwargs)
        if len(xs)>1 and not sent: sent.append(signal.raise_signal(signal.SIGTERM))
        return res
    monkeypatch.setattr(resume, 'max_over_processes', agree)
    with pytest.raises(TrainingStopped, match='SIGTERM at epoch 0, after step 2 of 3; saved'): small_fit(folder, ResumeTraining(tmp_path/'ckpt', 100))

def test_forked_process_writes_no_checkpoint(folder, tmp_path):
    "A signal to a process that was forked within a fit goes to the handler that was there before"
    codes = []
    def fork():
        pid = os.fork()
        if pid==0:
            try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
            finally: os._exit(7)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    small_fit(folder, ResumeTraining(tmp_path/'ckpt', 100), Signals(fork))
    assert codes==[-signal.SIGTERM] and [o.name for o in (tmp_path/'ckpt').glob('*.ckpt')]==['fit-0-step-000000003-end.ckpt']

def test_saved_is_said_where_it_is_true(folder, tmp_path, monkeypatch):
    def no_space(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('sesemi_fastai.resume.write_checkpoint', no_space)
    with pytest.raises(TrainingStopped, match='could not be saved') as e, pytest.warns(match='No space left'):
        small_fit(folder, ResumeTraining(tmp_path/'ckpt', 100), Signals(lambda: signal.raise_signal(signal.SIGTERM)))
    assert 'saved in' not in str(e.value).replace('could not be saved in','') and e.value.signal==signal.SIGTERM

def test_second_signal_stops_at_once(folder, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT)
    with pytest.raises(TrainingStopped, match='second SIGINT.*is of step 1'): small_fit(folder, ResumeTraining(tmp_path/'ckpt', 1), Signals(twice))

def test_one_job_a_folder(processes, folder, tmp_path):
    "A second job is refused in one sentence; a killed one, whose workers live on for a while, frees the folder at once"
    log,kw,out = tmp_path/'log',dict(num_workers=2),tmp_path/'cut.pt'
    pause = tmp_path/'pause'
    p = processes.Process(target=killed.train, args=(folder, out, kw), kwargs=dict(moment=('after_loss',3), pause=pause, log=log, every=1)); p.start()
    while not pause.exists(): assert p.is_alive(); time.sleep(.02)
    with pytest.raises(CheckpointError, match='Another job is training with the checkpoints in .*cut/ckpt'): small_fit(folder, ResumeTraining(tmp_path/'cut/ckpt', 1))
    (tmp_path/'cut/ckpt/.fit-0-step-000000009.ckpt.99999.part').touch()
    p.kill(); p.join()
    assert run(processes, folder, out, kw, log=log, every=1)==0, log.read_text()[-2000:]
    assert not list((tmp_path/'cut/ckpt').glob('.*part'))

def test_folder_is_forced_to_disk(tmp_path, monkeypatch):
    "after the renaming, whose trace could otherwise be lost"
    real,synced = os.fsync,[]
    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.append((os.path.isdir(f'/proc/self/fd/{fd}'), (tmp_path/'a.ckpt').exists())), real(fd)))
    write_checkpoint(tmp_path/'a.ckpt', dict(a=1))
    assert synced==[(False,False),(True,True)]

@pytest.mark.parametrize('call', ['fsync','open'])
def test_folder_that_cant_be_forced_to_disk(folder, tmp_path, monkeypatch, call):
    "As on some network filesystems: a checkpoint that was written counts, without a warning, and old ones are removed"
    real,refused = getattr(os, call),[]
    def refuse(o, *args, **kw):
        if not os.path.isdir(o if call=='open' else f'/proc/self/fd/{o}'): return real(o, *args, **kw)
        refused.append(o); raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    monkeypatch.setattr(os, call, refuse)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='The checkpoint of step'); small_fit(folder, ResumeTraining(tmp_path/'ckpt', 1))
    assert len(refused)>3 and len([*(tmp_path/'ckpt').glob('*.ckpt')])==2

def test_workers_end_with_their_process(processes, folder):
    "Though they outlast signals: a pass that is given up, and one that is still open when the process ends"
    p = processes.Process(target=killed.leave_open, args=(folder,)); p.start(); p.join(60)
    assert p.exitcode==0

def test_killed_twice(processes, folder, tmp_path):
    "A run that is killed again while it goes on"
    out,log = tmp_path/'cut.pt',tmp_path/'log'
    assert run(processes, folder, tmp_path/'whole.pt', dict(num_workers=0), log=log)==0
    for m in [('after_loss',4),('after_loss',3),('before_step',2)]: assert run(processes, folder, out, dict(num_workers=0), moment=m, log=log, every=2)==-signal.SIGKILL
    assert run(processes, folder, out, dict(num_workers=0), log=log, every=2)==0
    same(load(tmp_path/'whole.pt'), load(out))

def note(name, result):
    "Keep the result of a long run"
    results = Path(__file__).parent/'results/kills.json'
    done = json.loads(results.read_text()) if results.exists() else {}
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(done|{name:result}, indent=1)+'\n')

class Interrupt(Callback):
    "Ctrl-C in the middle of a step, or in validation, or (step 0) before all steps"
    order = ProgressCallback.order
    def __init__(self, step, training): self.step,self.while_training = step,training
    def before_epoch(self):
        if self.step==0: signal.raise_signal(signal.SIGINT)
    def after_loss(self):
        if self.learn.train_iter==self.step and self.training==self.while_training: signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize('step,training,saved', [(3,True,4), (4,False,4), (0,False,None)])
def test_interrupt_in_a_notebook(folder, tmp_path, step, training, saved):
    "Ctrl-C saves after the step, or at once in validation, and stops at once where there is nothing yet; the handlers are put back, and the same fit goes on"
    def fit(*cbs):
        cfg = RunConfig(str(folder), 'noise', size=32, epochs=2, arch='resnet10_16', unlabeled_bs=4, steps=4, num_workers=0)
        learn = cfg.learner(cfg.dls()); learn.remove_cb(ProgressCallback); learn.logger = noop
        learn.fit_poly_warmup(2, .05, cbs=[RotationPretext(), *cbs])
        return learn
    saver = lambda: ResumeTraining(tmp_path/'ckpt', every=100)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingStopped, match='run the same fit again'): fit(saver(), Interrupt(step, training))
    assert [o.name for o in (tmp_path/'ckpt').glob('*.ckpt')]==([f'fit-0-step-{saved:09d}.ckpt'] if saved else []) and signal.getsignal(signal.SIGINT)==handler
    a,b = fit(),fit(saver())
    same(dict(a.model.state_dict()), dict(b.model.state_dict())); assert a.recorder.values==b.recorder.values

def test_lines_of_finished_epochs_are_logged_again(folder, tmp_path):
    "A run cut in its third epoch: what goes on logs the lines of the first two as well, as its CSV file begins anew"
    def fit(*cbs):
        cfg,lines = RunConfig(str(folder), 'noise', size=32, epochs=3, arch='resnet10_16', unlabeled_bs=4, steps=2, num_workers=0),[]
        learn = cfg.learner(cfg.dls()); learn.remove_cb(ProgressCallback); learn.logger = lambda o: lines.append(list(o)[:-1])   # all but the time
        try: learn.fit_poly_warmup(3, .05, cbs=[RotationPretext(), *cbs])
        except TrainingStopped: pass
        return lines
    saver = lambda: ResumeTraining(tmp_path/'ckpt', every=100)
    whole,cut,rest = fit(),fit(saver(), Interrupt(4, True)),fit(saver())
    assert len(cut)==2 and rest==whole

class Cut(Callback):
    "Breaks off after a step"
    order = ProgressCallback.order
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.learn.train_iter==self.at: raise RuntimeError('cut')

@pytest.mark.parametrize('cbs', [[RotationPretext],[]], ids=['rotation','none'])   # without an objective, dropout draws from the global generator
def test_generators_and_accumulation_come_back(folder, tmp_path, cbs):
    "a Learner whose dropout and batch transforms draw from the global generators, and that accumulates gradients over steps"
    def fit(seed, *more):
        set_seed(0)
        own = ImageDataLoaders.from_folder(folder, train='train', valid='val', item_tfms=Resize(32), batch_tfms=aug_transforms(size=32), bs=8, num_workers=0)
        dls = PairedDataLoaders.from_dls(own, get_image_files(folder/'unsup'), unlabeled_bs=4, seed=0)
        model = replace_classifier(resnet10(width=16), torch.randn(2,3,32,32), 3, .5)
        learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), path=tmp_path, cbs=GradientAccumulation(16), metrics=accuracy)
        learn.remove_cb(ProgressCallback); learn.logger = noop
        learn.add_cbs([o() for o in cbs])
        set_seed(seed)
        learn.fit_one_cycle(3, .01, cbs=more)
        return learn
    with pytest.raises(RuntimeError, match='cut'): fit(1, ResumeTraining(tmp_path/'ckpt', 1), Cut(6))
    a,b = fit(1),fit(2, ResumeTraining(tmp_path/'ckpt', 1))   # the seed of the second is not what decides
    same(dict(a.model.state_dict()), dict(b.model.state_dict())); assert a.recorder.values==b.recorder.values
    assert len(a.recorder.losses)==9 and torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))

@pytest.mark.parametrize('notebook', [False,True], ids=['terminal','notebook'])
def test_goes_on_with_progress_bars(folder, tmp_path, monkeypatch, notebook):
    "fastai's bars, its graph and its CSV file, as they are by default, in a fit that goes on in its third epoch"
    bars = (fastprogress.NBMasterBar,fastprogress.NBProgressBar) if notebook else (fastprogress.ConsoleMasterBar,fastprogress.ConsoleProgressBar)
    for n,o in zip(('master_bar','progress_bar'), bars): monkeypatch.setattr(progress, n, o)
    monkeypatch.setattr(display, 'display', lambda *args,**kw: SimpleNamespace(update=noop))   # outside of a notebook there is nothing to update
    graphs = []
    monkeypatch.setattr(bars[0], 'update_graph', lambda o,graphs_,*args,**kw: graphs.append(graphs_))
    def fit(*cbs):
        cfg = RunConfig(str(folder), 'noise', size=32, epochs=4, arch='resnet10_16', unlabeled_bs=4, steps=2, num_workers=0)
        learn = cfg.learner(cfg.dls()); learn.path = tmp_path
        learn.fit_poly_warmup(4, .05, cbs=[RotationPretext(), ShowGraphCallback(), CSVLogger(), *cbs])
        return learn
    with pytest.raises(RuntimeError, match='cut'): fit(ResumeTraining(tmp_path/'ckpt', 1), Cut(6))
    b = fit(ResumeTraining(tmp_path/'ckpt', 1)); drawn,lines = graphs[-1],(tmp_path/'history.csv').read_text().splitlines()
    finished,a = fit(ResumeTraining(tmp_path/'ckpt', 1)),fit()
    for o in (b,finished): same(dict(a.model.state_dict()), dict(o.model.state_dict())); assert a.recorder.values==o.recorder.values
    assert len(lines)==5 and [o.rsplit(',',1)[0] for o in lines]==[o.rsplit(',',1)[0] for o in (tmp_path/'history.csv').read_text().splitlines()]   # all but the time
    assert [[len(o) for o in g] for g in drawn]==[[len(o) for o in g] for g in graphs[-1]] and all(len(x)==len(y) for x,y in drawn) and list(drawn[1][0])==[2,4,6,8]

def command(folder, out, *more):
    return [sys.executable,'-W','ignore','-m','sesemi_fastai.imagewang',str(folder),'--size','32','--arch','resnet10_16','--epochs','2','--unlabeled_bs','4','--num_workers','0','--runs','2','--steps','30','--out',str(out),*more]

def test_command_stops_on_a_signal_and_goes_on(folder, tmp_path, capsys):
    "SIGTERM saves, exits with 143 and says the command that goes on, which skips what is finished; SIGKILL loses no more than since the last save"
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    subprocess.run(command(folder, whole), check=True, capture_output=True)
    p = subprocess.Popen(command(folder, cut, '--save_every', '5'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (cut/'run-1/resume').exists() or not any((cut/'run-1/resume').glob('*.ckpt')): assert p.poll() is None; time.sleep(.02)
    p.send_signal(signal.SIGTERM)
    out,err = p.communicate(timeout=120)
    assert p.returncode==143 and 'Stopped by SIGTERM at epoch' in err and '--resume' in err, err
    again = shlex.split(err.split('To go on: ')[1])
    assert again[0]=='sesemi_imagewang'
    imagewang_command(again[1:])
    said = capsys.readouterr().out
    assert 'Resuming at epoch' in said and 'run-0: finished already' in said
    for r in ('run-0','run-1'):
        assert (whole/r/'model.pth').read_bytes()==(cut/r/'model.pth').read_bytes() and (whole/r/'steps.csv').read_bytes()==(cut/r/'steps.csv').read_bytes()
        strip = lambda o: [l.rsplit(',',1)[0] for l in (o/r/'history.csv').read_text().splitlines()]   # all but the time
        assert strip(whole)==strip(cut) and len(strip(cut))==3
        assert not (cut/r/'resume').exists()
    imagewang_command(again[1:]); assert 'run-1: finished already' in capsys.readouterr().out
    with pytest.raises(SystemExit): imagewang_command([*again[1:], '--lr', '.3'])
    assert 'lr was 0.1, now 0.3' in capsys.readouterr().err

@pytest.mark.slow
@pytest.mark.parametrize('workers,tune', list(itertools.product((0,2), (False,True))))
def test_many_random_signals(processes, folder, tmp_path, workers, tune):
    "SIGTERM and SIGINT to the process group, mixed with SIGKILL, at random moments, until 12 were survived"
    name = f"signals to the process group, {workers} workers{', fine_tune'*tune}"
    rng,log,n,kw = random.Random(name),tmp_path/'log',0,dict(num_workers=workers, epochs=2, steps=6)
    assert run(processes, folder, tmp_path/'whole.pt', kw, log=log, tune=tune)==0, log.read_text()
    out,code,kills = tmp_path/'cut.pt',None,[]
    while n<12:
        place,sig = rng.choice(killed.PLACES[:-1]),rng.choice([signal.SIGTERM,signal.SIGINT,signal.SIGKILL])
        if sig==signal.SIGKILL: code = run(processes, folder, out, kw, moment=(place,rng.randint(1,3)), log=log, every=rng.choice([1,100]), tune=tune)
        else: code = stopped(processes, folder, out, kw, (place,1), [sig], log=log, every=rng.choice([1,100]), tune=tune)
        assert code in (0,-signal.SIGKILL,128+sig), (place,sig,code,log.read_text()[-3000:])
        if code==0:
            same(load(tmp_path/'whole.pt'), load(out), f'{name} {kills}')
            shutil.rmtree(tmp_path/'cut'); out.unlink()
        else: n += 1; kills.append(f'{signal.Signals(sig).name} {place}')
    assert run(processes, folder, out, kw, log=log, tune=tune)==0, log.read_text()[-2000:]
    same(load(tmp_path/'whole.pt'), load(out), f'{name} {kills}')
    note(name, dict(runs=1, kills={p:sum(o.endswith(p) for o in kills) for p in killed.PLACES}))

CONFIGS = list(itertools.product(('reference','fast'), ('joint','sequential'), (0,2), (1,2)))
@pytest.mark.slow
@pytest.mark.parametrize('recipe,backward,workers,ranks', CONFIGS)
def test_many_random_kills(processes, folder, tmp_path, recipe, backward, workers, ranks):
    "One run after the other, each killed again and again while it goes on, until 20 kills were survived"
    name = f'{recipe} recipe, {backward} backward, {workers} workers, {ranks} process'+'es'*(ranks>1)
    rng,log,kills,n = random.Random(name),tmp_path/'log',[],0
    kw = dict(num_workers=workers, recipe=recipe, cache=str(tmp_path/'cache'), epochs=3, steps=8)
    more = dict(backward=backward, ranks=ranks, log=log)
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
