"""On a GPU what tests on the CPU can't tell, each against something independent; what is measured goes to `tests/results/gpu.json` when `make gpu` runs them.
The same functions run on the CPU, see `devices.py`, but for those that ask CUDA itself."""
import gc,os,subprocess,sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
import numpy as np,pytest,torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18,resnet50
from fastai.callback.all import ChannelsLast,MixedPrecision
from fastai.callback.fp16 import AMPMode
from fastai.vision.all import (Callback,CancelFitException,CrossEntropyLossFlat,DisplayedTransform,ImageDataLoaders,Learner,ProgressCallback,Recorder,Resize,SGD,
    TensorImage,accuracy,aug_transforms,get_image_files,noop)
from sesemi_fastai import transfer
from sesemi_fastai.all import *
from sesemi_fastai.augment import DevelopCrops
from sesemi_fastai.run import train_run
from sesemi_fastai.samples import sample_batch
from devices import *
from test_distributed import TORCHRUN
from test_objectives import FirstGradients,family
from test_objectives_matrix import net,pairs
from test_parity import both_loops,batches
from test_resume import survive
from two_processes import data,learner
sys.path.insert(0, str(Path(__file__).parent/'benchmarks'))
import memory

here = Path(__file__).parent
tiny = partial(resnet10, width=16)

@pytest.fixture(autouse=True)
def full_float32():
    "No TF32 in what is compared with float32 elsewhere, and nothing left in the GPU's memory by the test before"
    flags = (torch.backends.cuda.matmul,'allow_tf32'),(torch.backends.cudnn,'allow_tf32')
    was = [getattr(*o) for o in flags]
    for o in flags: setattr(*o, False)
    if torch.cuda.is_available(): torch.cuda.empty_cache()
    yield
    for o,v in zip(flags, was): setattr(*o, v)

def flat(tensors): return torch.cat([v.detach().cpu().double().flatten() for v in tensors.values() if v.is_floating_point()])
def off(got, want, start):
    "How far two results are apart, in shares of how far the second one moved"
    return ((flat(got)-flat(want)).norm()/(flat(want)-flat(start)).norm()).item()
def quiet(learn):
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn
def paired(folder, device, recipe='reference', **kw):
    return PairedDataLoaders.from_folder(folder, device=device, recipe=recipe, cache=False, verbose=False, **(dict(size=32, unlabeled_bs=4, bs=8, num_workers=0, seed=0)|kw))

# what the numbers are

def some_batches(device): return batches(device=device, b=8 if device=='cuda' else 4, size=64 if device=='cuda' else 32)

def worst_step(want, steps):
    "How far the steps of both loops, each from the same beginning, are apart at most, in shares of the way of the step: the network, and the head"
    ends = want[-1]; assert len(ends)==len(steps.ends)==10
    return [max(off(got[i], end[i], start[i]) for got,end,start in zip(steps.ends, ends, steps.starts) if not same(end[i], start[i])) for i in (0,1)]
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('device,arch,backward', [pytest.param('cpu', resnet18, 'sequential', marks=pytest.mark.slow), *(pytest.param('cuda', *o, marks=pytest.mark.cuda) for o in ((resnet18,'joint'), (resnet18,'sequential'), (resnet50,'joint')))], ids=lambda o: getattr(o,'__name__',o))
def test_ten_steps_equal_a_plain_loop(device, arch, backward, record_property):
    "ten steps in float32 with deterministic algorithms: weights, BatchNorm buffers, head and rates are those of a plain PyTorch loop on the same device, from the same beginning in each step: over ten, rounding becomes as large as what is learned"
    with deterministic_algorithms(): want,got,steps = both_loops(arch, backward, some_batches(device), each=True)
    worst = worst_step(want, steps)
    record_property('weights and head of a step, off by a share of their way', worst)
    assert max(worst)<2e-3 and got[2]==pytest.approx(want[2], abs=1e-12)

class OnDevice(MixedPrecision):
    "fastai's names 'cuda'; this is the same for the CPU, where there is no GPU"
    order = MixedPrecision.order
    def before_fit(self):
        super().before_fit()
        half = dict(fp16=torch.float16, bf16=torch.bfloat16)[self.amp_mode.value]
        self.autocast,self.learn.scaler = torch.autocast('cpu', half),torch.amp.GradScaler('cpu', **self.kwargs)

halves = [('bf16','joint','body'), ('bf16','sequential','body'), ('fp16','joint','body'), ('fp16','sequential','body'), ('fp16','joint','head'), ('fp16','sequential','head')]
@pytest.mark.parametrize('device,half,backward,where', [*(pytest.param('cuda', *o, marks=pytest.mark.cuda) for o in halves), *(pytest.param('cpu', *o, marks=pytest.mark.slow) for o in halves[:-1]), ('cpu',*halves[-1])])
def test_half_precision_with_an_overflow(device, half, backward, where, record_property):
    "`to_fp16`, `to_bf16` with the fused optimizer: ten steps are those of a plain loop with torch's own autocast, scaler and for-loop optimizer; in float16 one step's gradients overflow, in the body or in the head alone, and it is skipped as a whole"
    scaler = dict(init_scale=2.**10, growth_interval=3)
    cb = (MixedPrecision if device=='cuda' else OnDevice)(amp_mode=AMPMode(half), **scaler)
    step = 4 if half=='fp16' else None
    want,got,steps = both_loops(tiny, backward, some_batches(device), cbs=[cb], overflow=(step,where), half=dict(fp16=torch.float16, bf16=torch.bfloat16)[half], fused=False, each=True, **scaler)
    worst = worst_step(want, steps)
    record_property('weights and head of a step, off by a share of their way', worst); print(worst)
    assert max(worst)<1e-2   # sequential gradients are rounded apart before they are added
    if half=='bf16': return
    assert got[3]==want[3] and got[3][step]==got[3][step-1]/2 and max(got[3])>scaler['init_scale']
    weights,head,momenta = zip(steps.starts[step], steps.ends[step])
    params = [k for k,_ in tiny().named_parameters()]
    assert same(*head) and same(*momenta) and same(*({k:v[k] for k in params} for v in weights))

class DrawsOfTheCPU(TorchDispatchMode):
    "What is drawn on a GPU is drawn by the CPU's generator instead, so that it is what is drawn on the CPU"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs,name = dict(kwargs or {}),func.overloadpacket.__name__
        if name in ('rand','randn','randint','randperm') and kwargs.get('device') is not None:
            device = kwargs['device']
            return func(*args, **(kwargs|dict(device='cpu', pin_memory=False))).to(device)
        if name in ('rand_like','randn_like','randint_like','bernoulli') and args[0].device.type!='cpu': return func(args[0].cpu(), *args[1:], **(kwargs|({'device':'cpu'} if 'device' in kwargs else {}))).to(args[0].device)
        if name in ('uniform_','normal_','bernoulli_','random_','exponential_') and args[0].device.type!='cpu': return args[0].copy_(func(args[0].cpu(), *args[1:], **kwargs))
        return func(*args, **kwargs)

def short_fit(device, name, objectives=True, draws=True):
    "Three steps of one objective with what it needs beside it, from the same weights and images everywhere"
    cbs = family[name]() if objectives else [StepSeed()]
    learn = quiet(Learner(data(4, 4, n_steps=3, device=device), net(True), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), cbs=[FirstGradients(), *cbs]))
    learn.model[4].p = 0.   # a dropout draws in its own way on each kind of device
    start = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with DrawsOfTheCPU() if draws else nullcontext(): learn.fit(1, .05)
    return start,learn.model.state_dict(),learn.grads|learn.head_grads,list(map(float, learn.recorder.values[0]))

@pytest.mark.parametrize('name', family)
@slow_on_cpu
def test_every_objective_is_the_cpus(device, name, record_property):
    "each objective, `EMA` where it needs one: gradients of the first step, weights after three, and columns are those of the CPU, of which the objective has its part"
    start,weights,grads,columns = short_fit(device, name)
    _,want,want_grads,want_columns = short_fit('cpu', name, draws=False)
    _,_,plain,_ = short_fit('cpu', name, objectives=False)
    zero = {k:torch.zeros_like(v) for k,v in want_grads.items()}
    figures = dict(gradients=off(grads, want_grads, zero), weights=off(weights, want, start))
    record_property('off by a share of their size, of their way', figures)
    assert ((flat({k:want_grads[k] for k in plain})-flat(plain)).norm()/flat(plain).norm())>.02
    assert figures['gradients']<1e-3 and figures['weights']<5e-3 and columns==pytest.approx(want_columns, rel=5e-3, abs=5e-3)

@pytest.mark.parametrize('recipe', ['reference','fast'])
@quick_on_cpu
def test_recipes_are_the_cpus(device, folder, recipe, monkeypatch, record_property):
    "both recipes: batches of all three loaders are those of the CPU, validation images within a grey value; on the CPU by the operations that a GPU is given"
    want = paired(folder, 'cpu', recipe); want = [[*dl] for dl in want.loaders]
    if device=='cpu':
        monkeypatch.setattr(DevelopCrops, 'images', lambda self, x: (self, x))
        monkeypatch.setattr('sesemi_fastai.augment._look_up_planes', lambda pics, tables: pics[0].at_once(pics[1].as_subclass(torch.Tensor), pics[1].table))
    got = paired(folder, device, recipe); norm = next(f for f in got.valid.after_batch.fs if isinstance(f, DevelopCrops))
    got = [[*dl] for dl in got.loaders]
    grey = lambda x: (x.cpu()*norm.std.cpu()+norm.mean.cpu())*255
    apart = {}
    for name,a,b in zip(('labelled','validation','unlabelled'), got, want):
        assert len(a)==len(b)>0 and a[0][0].device.type==device
        assert all(torch.equal(x[1].cpu(), y[1]) for x,y in zip(a, b)) if len(b[0])>1 else True
        apart[name] = torch.cat([(x[0].cpu().as_subclass(torch.Tensor)-y[0].as_subclass(torch.Tensor)).flatten().abs() for x,y in zip(a, b)])
        apart[name+', grey'] = max((grey(x[0]).as_subclass(torch.Tensor)-grey(y[0]).as_subclass(torch.Tensor)).abs().max().item() for x,y in zip(a, b))
    record_property('apart on average', {k:v.mean().item() for k,v in apart.items() if 'grey' not in k})
    assert apart['validation, grey']<1.01
    for k in ('labelled','unlabelled'): assert apart[k].mean()<.02 and apart[k].max()<.4   # a grey value, which a gamma below 1 widens in the dark

@pytest.mark.parametrize('backward', ['joint','sequential'])
@quick_on_cpu
def test_channels_last(device, folder, backward):
    "`ChannelsLast` with the fast recipe: rotated images keep the memory format of the unlabelled ones, and each layer of both passes computes in channels last"
    seen,views = [],[]
    class Formats(Callback):
        order = 100
        def before_fit(self): self.hooks = [m.register_forward_hook(lambda m,i,o: seen.append(o.is_contiguous(memory_format=torch.channels_last))) for m in self.model.modules() if isinstance(m, (nn.Conv2d,nn.BatchNorm2d))]
        def after_fit(self): [o.remove() for o in self.hooks]
        def before_step(self): views.append(self.unlabeled_step._batch.images(self.rotation.make_view))
    learn = quiet(sesemi_learner(paired(folder, device, 'fast'), tiny, metrics=accuracy, cbs=[ChannelsLast(), Formats()]))
    learn.fit(1, .01, cbs=RotationPretext(backward=backward))
    assert seen and all(seen) and all(len(v)==16 and v.device.type==device for v in views)
    x = torch.randn(2,3,8,8, device=device).to(memory_format=torch.channels_last)
    assert rotations(x)[0].is_contiguous(memory_format=torch.channels_last) and torch.equal(rotations(x)[0], rotations(x.contiguous())[0])

@quick_on_cpu
def test_images_are_transformed_in_full_precision(device, folder):
    "`to_bf16` and transforms of batches: neither stream's images are made in low precision, though the unlabelled ones come when autocast has begun"
    seen = []
    class Noted(DisplayedTransform):
        order = 200
        def encodes(self, x:TensorImage): seen.append((torch.is_autocast_enabled(device), x.dtype)); return x
    dls = paired(folder, device, n_steps=2)
    for dl in (dls.train, dls.unlabeled): dl.after_batch.add(Noted())
    class In(Callback):
        def after_pred(self): self.learn.low = torch.is_autocast_enabled(device)
    learn = quiet(sesemi_learner(dls, tiny, cbs=[(MixedPrecision if device=='cuda' else OnDevice)(amp_mode=AMPMode.BF16), In()])); del seen[:]
    class Stop(Callback):
        def after_train(self): raise CancelFitException
    learn.fit(1, .01, cbs=[RotationPretext(), Stop()])
    assert learn.low and len(seen)>=4 and set(seen)=={(False,torch.float32)}

# that it can be repeated

@quick_on_cpu
def test_generators_stay(device, folder):
    "batch transforms and objectives that draw on the device: pairing, the looks before the first step, a fit and a look afterwards leave torch's generators, the device's too, where they were"
    own = ImageDataLoaders.from_folder(folder, train='train', valid='val', item_tfms=Resize(32), batch_tfms=aug_transforms(), bs=8, num_workers=0, device=torch.device(device))
    learn = quiet(Learner(own, tiny(num_classes=3), loss_func=CrossEntropyLossFlat(), opt_func=SGD)); learn.create_opt()
    state = lambda: [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device=='cuda' else [])]
    before = state()
    learn.dls = PairedDataLoaders.from_dls(own, get_image_files(folder/'unsup'), unlabeled_bs=4, seed=0, n_steps=2)
    assert all(map(torch.equal, before, state()))
    class Stop(Callback):
        def after_train(self): raise CancelFitException   # validation isn't ours
    learn.fit(1, .01, cbs=[JigsawPretext(grid=2), FixMatch(threshold=.3), Stop()])
    sample_batch(learn.dls.unlabeled)
    assert all(map(torch.equal, before, state()))

@slow_on_cpu
def test_a_killed_run_ends_as_if_it_had_not_been(device, processes, folder, tmp_path):
    "exact resume with `deterministic`: killed in a step and while a checkpoint is written, in bfloat16 with averages, two objectives, the fast recipe and workers: the end is bitwise that of a run that was never stopped"
    kw = dict(num_workers=2, recipe='fast', cache='none', bf16=True, deterministic=True, objective='rotation+fixmatch(threshold=.4)', ema=.9)
    survive(processes, folder, tmp_path, [('after_loss',7),('writing',4)], kw, every=1, backward='sequential')

@quick_on_cpu
def test_doctor_asks_on_the_device(device, folder, tmp_path):
    "`sesemi_doctor --run`: the network of the run is where its images are"
    train_run(RunConfig(str(folder), 'noise', size=32, epochs=1, arch='resnet10_16', unlabeled_bs=4, steps=1, num_workers=0), tmp_path/'run', plain=True)
    learn = trained_learner(tmp_path/'run', folder)
    assert {p.device.type for p in learn.model.parameters()}=={device}=={torch.device(learn.dls.device).type}

@slow_on_cpu
def test_twice_the_same(device, folder, tmp_path):
    "`--deterministic`: two runs from one seed have the same weights, bitwise"
    cfg = RunConfig(str(folder), 'noise', size=32, epochs=2, arch='resnet10_16', unlabeled_bs=4, steps=4, num_workers=0, deterministic=True, objective='rotation+fixmatch(threshold=.4)')
    res = [train_run(cfg, tmp_path/f'run-{i}', plain=True) for i in range(2)]
    assert res[0]['settings']['deterministic'] and (tmp_path/'run-0/model.pth').read_bytes()==(tmp_path/'run-1/model.pth').read_bytes()

@quick_on_cpu
def test_resume_knows_the_algorithms(device, folder, tmp_path):
    "deterministic algorithms: a fit that was begun with them isn't continued without, and the difference is named"
    class Late(Callback):
        order = ProgressCallback.order   # where callbacks stand that change no result
        def before_batch(self):
            if self.training and self.train_iter==1 and self.stops: raise KeyboardInterrupt
        stops = True
    def fit(context, *cbs):
        learn = quiet(sesemi_learner(paired(folder, device), tiny))
        with context: learn.fit(1, .01, cbs=[RotationPretext(), ResumeTraining(tmp_path, every=1), *cbs])
    with pytest.raises(KeyboardInterrupt): fit(deterministic_algorithms(), Late())
    with pytest.raises(CheckpointError, match='deterministic algorithms was True, now absent'): fit(nullcontext())
    fit(deterministic_algorithms())

@gpu_alone
def test_asked_too_late(device):
    "deterministic algorithms, asked for in a process that computed on the GPU without `CUBLAS_WORKSPACE_CONFIG`: older versions of torch refuse, and we say how to start; later ones give the same bits each time"
    code = """
import torch
from sesemi_fastai.all import deterministic_algorithms
x = torch.randn(512,512, device='cuda'); x@x
with deterministic_algorithms(): assert all(torch.equal(x@x, x@x) for _ in range(20))"""
    env = {k:v for k,v in os.environ.items() if k!='CUBLAS_WORKSPACE_CONFIG'}
    r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, cwd=here.parent, env=env)
    assert r.returncode==0 or 'ValueError' in r.stderr and 'start Python with the environment variable CUBLAS_WORKSPACE_CONFIG' in r.stderr, r.stderr

# what it costs

class NoWaiting(Callback):
    "Waiting for the device is an error from the second step on: in our part of a step, and where the next labelled batch is fetched; fastai's Recorder waits for the loss in between"
    order,run_valid = -100,False
    def before_batch(self): self.train_iter>0 and torch.cuda.set_sync_debug_mode('error')
class Until(Callback):
    order,run_valid = Recorder.order-1,False
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')
class Again(Callback):
    order,run_valid = 1000,False
    def after_batch(self): torch.cuda.set_sync_debug_mode('error' if self.iter+1<self.n_iter else 'default')
    def after_train(self): raise CancelFitException

@pairs()
@gpu_alone
def test_nobody_waits(device, folder, name, backward):
    "each objective, `EMA`, the fused optimizer and the fast recipe's augmentation of both streams: no step waits for the GPU, by CUDA's own account"
    learn = quiet(sesemi_learner(paired(folder, device, 'fast', n_steps=4), tiny, cbs=[NoWaiting(), Until(), Again(), *family[name](backward=backward)]))
    try: learn.fit(1, .01)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert learn.train_iter==4

@pytest.mark.parametrize('num_workers', [0,2])
@quick_on_cpu
def test_batches_are_sent_without_waiting(device, folder, num_workers, monkeypatch):
    "both streams: all that goes to a GPU comes from pinned memory and is not waited for; to the CPU nothing is pinned"
    sent = []
    def note(b, to, non_blocking=False):
        sent.extend((o.is_pinned(), non_blocking) for o in b); return was(b, to, non_blocking=non_blocking)
    was = transfer.to_device; monkeypatch.setattr(transfer, 'to_device', note)
    dls = paired(folder, device, 'fast', num_workers=num_workers); got = [[*dl] for dl in (dls.train, dls.unlabeled)]
    assert len(sent)==sum(map(len, sum(got, [])))>5 and set(sent)=={(device=='cuda',)*2}
    assert all(o.device.type==device for b in sum(got, []) for o in b)

@slow_on_cpu
def test_memory_of_sequential(device, record_property):
    "`backward='sequential'`, ResNet-50, by the allocator's own peak: at most .60 of what a joint step takes"
    size,ubs = (64,8) if device=='cpu' else (224, min(32, max(2, int(torch.cuda.mem_get_info()[0]*.6/1e9))))   # about .8 GB for each unlabelled image
    peak = {k:memory.allocated(memory.learner('resnet50', size, ubs, k, device=device)) for k in ('joint','sequential')}
    record_property('peak, MB', {k:v/1e6 for k,v in peak.items()}); record_property('images', f'{4*ubs}+4×{ubs} of {size} px')
    record_property('ratio', peak['sequential']/peak['joint'])
    assert peak['sequential']<=(.6 if device=='cuda' else .75)*peak['joint']   # beside images this small the weights count

def launches(f):
    "Kernels that `f` launches, by the profiler"
    f(); torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as prof: f(); torch.cuda.synchronize()
    n = sum(e.count for e in prof.key_averages() if 'LaunchKernel' in e.key)
    if not n: pytest.skip('the profiler sees no kernels on this machine')
    return n

def crops(n, device, size=64):
    "A batch of crops of all sizes, as the loader hands it to the batch transform"
    rng = np.random.default_rng(0)
    flat_,table = [],[]
    for i in range(n):
        h,w = rng.integers(size//2, 2*size, 2); flat_.append(torch.from_numpy(rng.integers(0,256,3*h*w,dtype=np.uint8))); table.append((int(h),int(w),float(rng.uniform(.5,1.5)),bool(i%2)))
    return torch.cat(flat_).to(device),table

@gpu_alone
def test_launches_do_not_grow_with_the_batch(device, record_property):
    "the batch augmentation: as many kernels for 128 crops as for 8"
    dev = DevelopCrops.to_size(64)
    n = {k:launches(partial(dev.at_once, *crops(k, device))) for k in (8,128)}
    record_property('kernels', n)
    assert n[128]<=n[8]+4 and n[128]<100

# where it ends

def test_memory_that_ran_out_is_torchs_own(folder):
    "out of memory in an objective, raised by hand: one sentence that says what to do, in an exception that is a `MemoryError` and still `torch.cuda.OutOfMemoryError`, after which another fit is whole"
    class Full(RotationPretext):
        def loss(self, batch): raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')
    for backward in ('joint','sequential'):
        learn = quiet(sesemi_learner(paired(folder, 'cpu', n_steps=2), tiny))
        with pytest.raises(torch.cuda.OutOfMemoryError, match="smaller unlabeled_bs.*backward='sequential'") as e: learn.fit(1, .01, cbs=Full(backward=backward))
        assert isinstance(e.value, MemoryError) and 'on the GPU' in str(e.value)
        learn.fit(1, .01, cbs=RotationPretext())

@gpu_alone
def test_out_of_memory(device, record_property):
    "a step that doesn't fit into what this process may take of the GPU: the same, and what was taken is free again"
    size,ubs = 128,16   # activations many times the weights
    def step(backward): memory.fit(memory.learner('resnet18', size, ubs, backward, device=device))
    step('joint'); gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); step('joint'); gc.collect()
    most,before = torch.cuda.max_memory_allocated(),torch.cuda.memory_allocated()   # by three quarters of which the unlabelled pass ends, beside the labelled one's graph
    record_property('a step, MB', most/1e6)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(.75*most/torch.cuda.get_device_properties(0).total_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError, match='unlabeled_bs') as e: step('joint')
        assert isinstance(e.value, MemoryError)
        del e; gc.collect(); torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated()<=before+2**25
        step('sequential')   # which is the advice
    finally: torch.cuda.set_per_process_memory_fraction(1.)

@slow_on_cpu
def test_export_loads_without_a_gpu(device, folder, tmp_path, predict_alone):
    "`learn.export()` after a fit on the GPU: loads in a process that sees no GPU and hasn't this package, and predicts the same"
    learn = quiet(sesemi_learner(paired(folder, device, 'fast'), tiny, metrics=accuracy, path=tmp_path))
    learn.fit(1, .01, cbs=[RotationPretext(), FixMatch(threshold=.4), EMA(.9)]); learn.export()
    file = learn.dls.valid.items[0]
    with learn.no_bar(): want = learn.predict(file)[2]
    assert predict_alone(tmp_path/'export.pkl', file, CUDA_VISIBLE_DEVICES='')==pytest.approx(want.tolist(), abs=.05)   # in float32, where the GPU computed in bfloat16

@pytest.mark.parametrize('n', [1,2])
@slow_on_cpu
def test_processes(device, n, tmp_path, record_property):
    "one process of nccl, and two where there are two GPUs, with BatchNorm over all: weights, buffers, head and columns are those of one process without, with the batch of both; on the CPU gloo, each with its own BatchNorm, against groups"
    pytest.importorskip('accelerate')
    if device=='cuda' and torch.cuda.device_count()<n: pytest.skip(f'there is one GPU, not {n}')
    env = os.environ|dict(PYTHONPATH=os.pathsep.join(map(str, (here.parent, here))), PYTHONWARNINGS='ignore')|({} if device=='cuda' else dict(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES=''))
    r = subprocess.run([*TORCHRUN[:-1],str(n),str(here/'ranks.py'),str(tmp_path)], capture_output=True, text=True, cwd=here.parent, env=env)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
    ranks = [torch.load(tmp_path/f'rank-{i}.pt', weights_only=True) for i in range(n)]
    for backward in ('joint','sequential'):
        learn = learner(data(4*n, 2*n, device=device), EntropyMin(.3, backward=backward), EMA(.9), *([BatchNormGroups(n)] if device=='cpu' and n>1 else []), backward=backward)
        start = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with learn.no_bar(): learn.fit(2, .1)
        for i,o in enumerate(ranks):
            o = o[backward]; assert o['device']==(f'cuda:{i}' if device=='cuda' else 'cpu')
            worst = off(o['model'], learn.model.state_dict(), start); record_property(f'{backward}, weights off by a share of their way', worst)
            assert worst<5e-3 and o['columns'][-1]==pytest.approx(list(map(float, learn.recorder.values[-1])), rel=5e-3, abs=5e-3)
            assert all(torch.allclose(v, o['heads'][k], atol=1e-4) for k,v in {k:v.cpu() for k,v in learn.rotation.fit_heads.state_dict().items()}.items())
