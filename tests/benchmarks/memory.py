"Peak memory of a training step, joint and sequential backward: by torch's own allocator, and of a process of its own"
import gc,json,subprocess,sys,tempfile
from pathlib import Path
import torch
from torch import nn
from torch.profiler import ProfilerActivity,profile
from torchvision.models import resnet18,resnet50
from fastai.vision.all import DataLoaders,Learner
from sesemi_fastai.all import *
from common import *
from overhead import Ready,ready_batch

archs = {o.__name__:o for o in (resnet10,resnet18,resnet50)}

def learner(arch, size, ubs, backward, n=1, objectives=(RotationPretext,), device='cpu'):
    x,y,u = ready_batch(size, ubs, device)
    dls = DataLoaders(Ready(n, x, y), Ready(0, x, y), Ready(n, u), device=device)
    return Learner(dls, archs[arch](num_classes=10), loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, cbs=[o(backward=backward) for o in objectives])

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .001)

def allocated(learn):
    "Most bytes that the allocator had given out during a step, over those before it"
    fit(learn); learn.opt.zero_grad(); gc.collect()                     # momentum exists, gradients don't
    if torch.device(learn.dls.device).type=='cuda':
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        fit(learn); return torch.cuda.max_memory_allocated()-before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: fit(learn)
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [e for e in json.loads(Path(f'{d}/trace.json').read_text())['traceEvents'] if e.get('name')=='[memory]' and e['args']['Device Type']==0]
    events.sort(key=lambda e: e['ts'])
    first = events[0]['args']
    return max(e['args']['Total Allocated'] for e in events)-(first['Total Allocated']-first['Bytes'])

class Saved:
    "What autograd keeps for the backward pass: counted by storage, as long as it is kept"
    bytes,peak,uses,params = 0,0,{},set()
    def __init__(self, t):
        self.t,self.key,n = t,t.untyped_storage().data_ptr(),t.untyped_storage().nbytes()
        if self.key in Saved.params: return
        if not Saved.uses.get(self.key): Saved.bytes += n; Saved.peak = max(Saved.peak, Saved.bytes)
        Saved.uses[self.key] = Saved.uses.get(self.key, 0)+1
    def __del__(self):
        if self.key in Saved.params: return
        Saved.uses[self.key] -= 1
        if not Saved.uses[self.key]: Saved.bytes -= self.t.untyped_storage().nbytes()

def activations(learn):
    "Most bytes of activations that were kept at once"
    Saved.bytes,Saved.peak,Saved.uses,Saved.params = 0,0,{},{p.untyped_storage().data_ptr() for p in learn.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda o: o.t): fit(learn)
    return Saved.peak

def resident(*args):
    "Peak resident memory of a process that makes two steps, over that of one that makes none"
    peak = lambda n: int(subprocess.run([sys.executable,'-W','ignore',__file__,*map(str, args),str(n)], capture_output=True, text=True, check=True).stdout.split()[-1])
    return peak(2)-peak(0)

def run(s):
    rows,raw = [],[]
    for arch,size,ubs in ([('resnet10',32,8)] if s.quick else [('resnet18',64,32),('resnet50',128,16)]):
        what = f'{arch}, {size} px, {4*ubs}+4×{ubs} images'
        got = {k:dict(activation=activations(learner(arch, size, ubs, k)), allocated=allocated(learner(arch, size, ubs, k))) for k in ('joint','sequential')}
        if not s.quick:                                     # a small network doesn't show beside what a process takes
            for k,o in got.items(): o['resident'] = resident(arch, size, ubs, k)
        for k,target in [('activation',.60 if not s.quick else None),('allocated',None),('resident',None)][:len(got['joint'])]:
            rows.append(ratio(f'peak {k} memory of a step, sequential against joint: {what}', [got['sequential'][k]], [got['joint'][k]], target, 'MB', 1e-6))
        raw.append(dict(what=what, bytes=got))
        three = (RotationPretext,FixMatch,JigsawPretext)
        alone,all_three = ([activations(learner(arch, size, ubs, 'sequential', objectives=o)) for o in several] for several in ([(o,) for o in three],[three]))
        rows.append(ratio(f'peak activation memory of a step, three sequential objectives against the largest alone: {what}', all_three, [max(alone)], 1.1 if not s.quick else None, 'MB', 1e-6))
        raw[-1] |= dict(objectives={o.name:b for o,b in zip(three, alone)}|{'all three':all_three[0]})
    return rows,raw

if __name__=='__main__':
    arch,size,ubs,backward,n = sys.argv[1:]
    learn = learner(arch, int(size), int(ubs), backward, 2)
    if int(n): fit(learn)
    print(1024*next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')))   # ru_maxrss would begin with that of the parent
