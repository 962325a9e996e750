"""Figures of one GPU, each part by itself and as soon as it is known: `tests/gpu.py` runs this, `--device cpu` only shows that it runs.
A row has a median and a unit; where two things took turns also the ratio of the first to the second, and the range is that of the ratio."""
import argparse,functools,shutil,statistics,sys,tempfile,time,traceback,warnings
from pathlib import Path
here = Path(__file__).parent
sys.path[:0] = [str(here),str(here.parent),str(here.parent.parent)]
warnings.simplefilter('ignore')
import torch
from torch import nn
from torchvision.models import resnet50
from fastai.callback.all import ChannelsLast
from fastai.vision.all import DataLoaders,Learner
from sesemi_fastai.all import *
from sesemi_fastai.augment import DevelopCrops
from sesemi_fastai.step import native_formats
from common import *
from gpu import Log
import memory,overhead,pipeline,step

def row(name, values, unit, over=None, target=None):
    "One figure; `over` has as many values of what it took turns with"
    rs = values if over is None else [a/b for a,b in zip(values, over)]
    return dict(name=name, value=statistics.median(values), unit=unit, ratio=None if over is None else statistics.median(rs), low=min(rs), high=max(rs), n=len(values), target=target)

class Case:
    "What fits on the device"
    def __init__(self, device):
        self.device,self.gpu = torch.device(device),device=='cuda'
        free = torch.cuda.mem_get_info()[0] if self.gpu else 0
        self.arch,self.size,self.ubs = (resnet50,224,max(2, min(32, int(free*.6/1e9)))) if self.gpu else (functools.partial(resnet10, width=16),32,2)
        self.name = 'resnet50' if self.gpu else 'resnet10'
        self.what = f'{self.name}, {self.size} px, {4*self.ubs}+4×{self.ubs} images'
        self.rounds = 3 if self.gpu else 1
    def steps(self, one, seconds=2.):
        "As many as take about `seconds`, by a first one and a second"
        one(); start = time.perf_counter(); one()
        return max(1, min(50, round(seconds/max(1e-3, time.perf_counter()-start)))) if self.gpu else 1

def on_ready(c, native, *cbs):
    "A function that makes `n` steps on a batch that is on the device, and says how long they took"
    x,y,u = overhead.ready_batch(c.size, c.ubs, c.device)
    loaders = [overhead.Ready(1, x, y), overhead.Ready(1, x, y), overhead.Ready(1, u)]
    formats = [cb() for cb,ok in zip((BFloat16,ChannelsLast), native_formats(c.device)) if ok] if native else []
    learn = Learner(DataLoaders(*loaders, device=c.device), c.arch(num_classes=10), loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, wd_bn_bias=True, cbs=[StepSeed(0),*formats,*cbs,step.Timed()])
    def run(n):
        for o in loaders: o.n = n
        return step.train(learn, .001)
    return run

def network(c, work):
    "Seconds of a step with and without an objective, and images a second"
    rows = []
    for native in (False,True):
        arms = dict(without=on_ready(c, native), rotation=on_ready(c, native, RotationPretext()), sequential=on_ready(c, native, RotationPretext(backward='sequential')), fixmatch=on_ready(c, native, FixMatch(threshold=.1), EMA()))
        n = c.steps(functools.partial(arms['rotation'], 1))
        t = {k:[s/n for s in v] for k,v in rounds({k:functools.partial(f, n) for k,f in arms.items()}, c.rounds).items()}
        kind = f"{'bfloat16, channels last' if native else 'float32'}: {c.what}"
        rows.append(row(f'images a second of the network, {kind}', [8*c.ubs/s for s in t['rotation']], '/s'))
        rows.append(row(f'a step without an objective, {kind}', t['without'], 's'))
        rows += [row(f'a step with {w}, over one without, {kind}', t[k], 's', t['without']) for k,w in (('rotation','RotationPretext'),('sequential',"RotationPretext(backward='sequential')"),('fixmatch','FixMatch and EMA'))]
    return rows

def loop(c, work):
    "Our overhead over the same step by hand"
    arch = c.arch if c.gpu else resnet10
    r,raw = overhead.step_overhead(arch, c.size, c.ubs, n := 4 if c.gpu else 1, 3*c.rounds, c.device)
    return [row(r['name'], [s/n for s in raw['seconds']['ours']], 's', [s/n for s in raw['seconds']['bare']], 1.03)]

def data(c, work):
    "Images a second of decoding, of the cache, and of a plain loader, to the device"
    s = Settings(not c.gpu, c.rounds, work); root = large_images(s)
    workers = None if c.gpu else 0
    size,bs = (224,64) if c.gpu else (32,8)
    dls,n = pipeline.loaders(root, size, bs, s, workers, 4 if c.gpu else 1, c.device)
    def passes(o):
        for dl in o:
            for b in dl: pass
        step.wait()
    t = rounds({k:functools.partial(passes, o) for k,o in dls.items()}, c.rounds)
    rate = {k:[n/s for s in v] for k,v in t.items()}
    what = f"images a second to the device, {dls['fast'][0].fake_l.num_workers} workers, {size} px"
    return [row(f'{w}: {what}', rate[k], '/s') for k,w in (('reference','decode, reference recipe'),('fast','cache, fast recipe'),('plain','decode and augment by Pillow, plain loop'))]

def whole_step(c, work):
    "A step with its data: the plain loop and both recipes, all with as many workers as a run has"
    s = Settings(not c.gpu, c.rounds, work); root = large_images(s)
    ubs,steps = (min(16, c.ubs),8) if c.gpu else (2,1)
    workers = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os,'sched_getaffinity') else os.cpu_count()))
    t = rounds(step.arms(c.arch, root, c.size, ubs, steps, s, [('plain',workers if c.gpu else 0)], None if c.gpu else 0, c.device), c.rounds)
    what = f'{c.name}, {c.size} px, {4*ubs}+4×{ubs} images'
    per = {k:[s/steps for s in v] for k,v in t.items()}
    return [row(f'whole step with its data, {k} recipe, over the plain loop: {what}', per[k], 's', per['plain']) for k in ('reference','fast')]

def peak(c, work):
    "Peak memory of a step by the allocator"
    name,size = ('resnet50',224) if c.gpu else ('resnet10',32)
    p = {k:memory.allocated(memory.learner(name, size, c.ubs, k, device=c.device))/1e6 for k in ('joint','sequential')}
    return [row(f'peak memory of a step, sequential over joint: {c.what}', [p['sequential']], 'MB', [p['joint']], .6)]

def augmentation(c, work):
    "Milliseconds of the batch augmentation of 128 crops on the device"
    from test_cuda import crops
    n,size = (128,224) if c.gpu else (4,32)
    dev,batch = DevelopCrops.to_size(size),crops(n, c.device, size)
    dev.mean,dev.std = dev.mean.to(c.device),dev.std.to(c.device)
    def f(): dev.at_once(*batch); step.wait()
    t = rounds(dict(f=f), 10*c.rounds, warm=3)['f']
    return [row(f'batch augmentation of {n} crops, {size} px', [1000*o for o in t], 'ms')]

parts = (network,data,whole_step,peak,augmentation,loop)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('out', type=Path); p.add_argument('--device', default='cuda'); p.add_argument('--until', type=float, default=float('inf'))
    a = p.parse_args()
    add,work = Log(a.out).add,Path(tempfile.mkdtemp())
    try:
        for part in parts:
            start = time.time()
            if start>a.until-30 and a.device=='cuda': add(part=part.__name__, message='not run: time was up'); continue
            try: rows = part(Case(a.device), work); add(part=part.__name__, rows=rows, seconds=round(time.time()-start, 1)); print(*(f"{r['name']}: {r['value']:.4g} {r['unit']}"+(f", ratio {r['ratio']:.3f}" if r['ratio'] else '') for r in rows), sep='\n', flush=True)
            except Exception as e: traceback.print_exc(); add(part=part.__name__, message=f'{type(e).__name__}: {e}'[:2000], trace=traceback.format_exc()[-4000:])
            if a.device=='cuda': torch.cuda.empty_cache()
    finally: shutil.rmtree(work, ignore_errors=True)

if __name__=='__main__': main()
