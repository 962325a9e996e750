"A training process that is killed or stopped at a given moment, and what it leaves; started by `test_resume.py` from a fork server that has everything imported"
import multiprocessing,os,random,signal,sys,time
from datetime import timedelta
from pathlib import Path
import torch
from torch import nn
from fastai.vision.all import Callback,DataLoaders,Datasets,ProgressCallback,TfmdDL,noop,params
import sesemi_fastai.checkpoint as checkpoint
from sesemi_fastai.all import EMA,ResumeTraining,RunConfig,TrainingStopped,deterministic_algorithms
from sesemi_fastai.distributed import from_rank0,local_first,on_processes

EPOCHS,STEPS = 2,5
PLACES = ['after_loss','before_step','after_batch','before_validate','validation','after_epoch','writing']

def die(): os.kill(os.getpid(), signal.SIGKILL)

class Kill(Callback):
    "SIGKILL at `place`, at the `n`-th time that it is passed; with `pause`, to wait there for a signal from outside"
    order = ProgressCallback.order   # where callbacks stand that change no result
    def __init__(self, place, n, pause=None): self.place,self.left,self.pause = place,n,pause
    def passed(self, place):
        if place!=self.place: return
        self.left -= 1
        if self.left!=0: return
        if self.pause is None: die()
        Path(self.pause).touch(); end = time.time()+30
        stop = self.learn.resume_training._fit.stop
        while not stop.got and time.time()<end: time.sleep(.01)
        time.sleep(.3)   # for signals to other processes of the group to take effect
    def after_loss(self): self.passed('after_loss' if self.training else 'validation')
    def before_step(self): self.passed('before_step')
    def after_batch(self): self.passed('after_batch' if self.training else None)
    def before_validate(self): self.passed('before_validate')
    def after_epoch(self): self.passed('after_epoch')

def kill_while_writing(n):
    "The `n`-th checkpoint is cut in its middle"
    left = [n]
    class Half:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *args): self.f.close()
        def write(self, data):
            if left[0]==0: self.f.write(data[:len(data)//2]); self.f.flush(); die()
            self.f.write(data)
        def flush(self): self.f.flush()
        def fileno(self): return self.f.fileno()
    def half_open(path, mode='r'):
        if 'w' not in mode: return open(path, mode)
        left[0] -= 1
        return Half(open(path, mode))
    checkpoint.open = half_open

def random_moment(rng):
    "A place, and how many times it is passed before; soon, so that many fit into a run"
    return rng.choice(PLACES),rng.randint(1,3)

def train(folder, out, kw, moment=None, every=1, backward='joint', log=os.devnull, rank=0, port=None, pause=None, tune=False):
    "Train, or go on, and leave in `out` all that a run ends with; the first process dies, or is stopped, at `moment`"
    sys.stdout = sys.stderr = open(log, 'a')
    if pause: os.setpgid(0, 0)   # a group of its own, with its workers
    if port: one_of_two(rank, port)
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)   # for the loaders' workers: a fork server of their own would import everything again
    cfg = RunConfig(str(folder), 'noise', **(dict(size=32, epochs=EPOCHS, arch='resnet10_16', unlabeled_bs=4, steps=STEPS, lr=.05, backward=backward)|kw))
    with deterministic_algorithms(cfg.deterministic): fit(cfg, out, moment, every, rank, pause, tune)

def fit(cfg, out, moment, every, rank, pause, tune):
    "The fit of `train`"
    dls = local_first(cfg.dls); learn = cfg.learner(dls)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    objectives = cfg.objectives()
    learn.add_cbs(objectives+([EMA(cfg.ema)] if cfg.ema else []))
    kill = []
    if rank: moment = None
    if moment and moment[0]=='writing': kill_while_writing(moment[1])
    elif moment: kill = [Kill(*moment, pause)]
    cbs = [ResumeTraining(Path(out).with_suffix('')/'ckpt', every), *kill]
    try:
        with on_processes(learn):
            if tune:
                learn.splitter = lambda m: [params(nn.Sequential(*list(m.children())[:-1])), params(m.fc)]
                learn.fine_tune(cfg.epochs, freeze_epochs=1, cbs=cbs)
            else: cfg.fit(learn, cbs)
    except TrainingStopped as e: print(e, flush=True); sys.exit(128+e.signal)
    opt = learn.opt.opt.state_dict()
    with learn.no_bar(): preds = learn.get_preds()
    rec = learn.recorder
    if rank: return
    part = Path(f'{out}.part')
    kept = {o.name:o.state_dict() for o in objectives}|({'ema':learn.ema.n_updates} if cfg.ema else {})
    torch.save(checkpoint.pack_state(dict(kept=kept, model=dict(learn.model.state_dict()), opt=opt, preds=preds, values=[list(o) for o in rec.values], losses=rec.losses, hps=dict(rec.hps), lrs=rec.lrs, iters=rec.iters)), part)
    os.replace(part, out)

def one_of_two(rank, port): os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU='true')

def fetch(folder, rank, port):
    "What the first process fetches takes longer than processes otherwise wait for each other"
    from accelerate import PartialState
    one_of_two(rank, port)
    PartialState(cpu=True, timeout=timedelta(seconds=2))
    def get():
        if rank==0: time.sleep(5); (folder/'fetched').touch()
        elif (folder/'fetched').exists(): (folder/f'seen-{rank}').touch()
    local_first(get)
    os._exit(0)   # gloo's own end may wait for the other

class TwoArguments(Exception):
    "One that can't be sent: it isn't made again from its message alone"
    def __init__(self, a, b): super().__init__(f'{a} and {b}')

def tell(folder, rank, port):
    "What errors of one process become in both: each call's result or error, as it comes"
    from accelerate import PartialState
    import json,two_processes
    one_of_two(rank, port)
    PartialState(cpu=True, timeout=timedelta(seconds=20))
    got,asked = [],[]
    def note(f, *args):
        try: got.append(f(*args))
        except Exception as e: got.append(f'{type(e).__name__}: {e}')
    def fail(where, error):
        asked.append(where)
        if rank==where: raise error
        return 'done'
    for o in (FileExistsError('run-0 exists'),TwoArguments(1, 2)): note(from_rank0, lambda: fail(0, o))
    note(from_rank0, lambda: 'new')
    for where in range(2): note(local_first, fail, where, OSError('no network'))
    note(local_first, lambda: 'fetched')
    def resumed(stop, n=0):
        "A fit whose second process has other settings when it goes on"
        class Stop(Callback):
            order = 2_000_000
            def after_batch(self):
                if stop and self.training and self.iter==2: raise RuntimeError('cut')
        learn = two_processes.learner(two_processes.data(4, 2), ResumeTraining(folder/'ckpt', every=1, settings=dict(n=n)), Stop())
        try: two_processes.fit(learn)
        except ValueError as e: raise type(e)(str(e).partition(')')[0][-20:])   # without the path
    note(resumed, True); note(resumed, False, rank)
    def unseeded():
        "The head of a fit whose unlabelled loader has no seed, after the processes drew different numbers"
        dls = two_processes.data(4, 2)
        learn = two_processes.learner(DataLoaders(dls.train, dls.valid, TfmdDL(Datasets(range(100,126), [[two_processes.Paint()]]), bs=2, shuffle=True, drop_last=True, num_workers=0, device='cpu')))
        torch.manual_seed(rank); two_processes.fit(learn)
        return learn.rotation.fit_heads['head'].weight.flatten().tolist()
    note(unseeded)
    (folder/f'told-{rank}.json').write_text(json.dumps([got,len(asked)]))
    os._exit(0)

def leave_open(folder):
    "A pass of a loader with workers that is given up, and another that is open when the process ends"
    multiprocessing.set_start_method('fork', force=True)
    dls = RunConfig(str(folder), 'noise', size=32, arch='resnet10_16', unlabeled_bs=4, num_workers=2).dls()
    for _ in range(2): passes.append(iter(dls.train)); next(passes[-1]); del passes[:-1]
passes = []
