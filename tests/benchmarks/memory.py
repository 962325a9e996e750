"Peak memory of a training step, joint and sequential backward: by torch's own allocator, and of a process of its own"
import gc,json,logging,resource,subprocess,sys,tempfile
from pathlib import Path
import torch
from torch import nn
from torch.profiler import ProfilerActivity,profile
from torchvision.models import resnet18,resnet50
from fastai.vision.all import DataLoaders,Learner
from sesemi_fastai.all import *
from common import *
from overhead import Ready

archs = {o.__name__:o for o in (resnet10,resnet18,resnet50)}

def learner(arch, size, ubs, backward, n=1):
    torch.manual_seed(0)
    x,y,u = torch.randn(4*ubs,3,size,size),torch.randint(10,(4*ubs,)),torch.randn(ubs,3,size,size)
    dls = DataLoaders(Ready(n, x, y), Ready(0, x, y), Ready(n, u))
    return Learner(dls, archs[arch](num_classes=10), loss_func=nn.CrossEntropyLoss(), opt_func=NesterovSGD, cbs=RotationPretext(backward=backward))

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .001)

def allocated(learn):
    "Most bytes that the allocator had given out during a step, over those before it"
    fit(learn); learn.opt.zero_grad(); gc.collect()                     # momentum exists, gradients don't
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: fit(learn)
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [e for e in json.loads(Path(f'{d}/trace.json').read_text())['traceEvents'] if e.get('name')=='[memory]' and e['args']['Device Type']==0]
    events.sort(key=lambda e: e['ts'])
    first = events[0]['args']
    return max(e['args']['Total Allocated'] for e in events)-(first['Total Allocated']-first['Bytes'])

def resident(*args):
    "Peak resident memory of a process that makes two steps, over that of one that makes none"
    peak = lambda n: int(subprocess.run([sys.executable,'-W','ignore',__file__,*map(str, args),str(n)], capture_output=True, text=True, check=True).stdout.split()[-1])
    return peak(2)-peak(0)

def run(s):
    rows,raw = [],[]
    for arch,size,ubs in ([('resnet10',32,8)] if s.quick else [('resnet18',64,32),('resnet50',128,16)]):
        what = f'{arch}, {size} px, {4*ubs}+4×{ubs} images'
        got = {k:dict(allocated=allocated(learner(arch, size, ubs, k)), resident=resident(arch, size, ubs, k)) for k in ('joint','sequential')}
        for k,target in (('allocated',.60),('resident',None)):
            rows.append(ratio(f'peak {k} memory of a step, sequential against joint: {what}', [got['sequential'][k]], [got['joint'][k]], target, 'MB', 1e-6))
        raw.append(dict(what=what, bytes=got))
    return rows,raw

if __name__=='__main__':
    arch,size,ubs,backward,n = sys.argv[1:]
    learn = learner(arch, int(size), int(ubs), backward, 2)
    if int(n): fit(learn)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)
