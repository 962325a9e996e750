"How start, cache, memory and speed grow with the number of images, the batch and the number of workers"
import functools,multiprocessing,os,time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from torchvision.models import resnet18
from sesemi_fastai.all import *
from common import *
from memory import activations,learner
from overhead import step_overhead
from pipeline import loaders,passes
from step import arms

def duplicates(s, n):
    "A folder of `n` labelled images and 2 a class for validation, by links to the images of `small_images`"
    src,root = small_images(s),s.work/f'growth-{n}'
    files = sorted(o for o in src.rglob('*') if o.suffix.lower() in ('.jpg','.jpeg'))
    for i in range(n):
        d = root/f'train/c{i%10}'; d.mkdir(parents=True, exist_ok=True)
        os.link(files[i%len(files)], d/f'{i}.jpg')
    for i in range(20):
        d = root/f'val/c{i%10}'; d.mkdir(parents=True, exist_ok=True)
        os.link(files[i], d/f'{i}.jpg')
    return root

def anonymous():
    "Bytes of resident memory of this process that no file stands behind"
    return 1024*next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('RssAnon'))

def start(root, cache, size):
    "In a process of its own: seconds to make the cache, to open it and for a pass over it, its size, anonymous memory after that"
    def open_image():
        t = time.perf_counter()
        dls = PairedDataLoaders.from_folder(root, unlabeled='train', size=size, unlabeled_bs=4, seed=0, recipe='fast', num_workers=0, cache=cache, device='cpu', verbose=False)
        return dls,time.perf_counter()-t
    torch.set_num_threads(1)
    dls,first = open_image()
    dls,second = open_image()
    passes([dls.unlabeled]); t = time.perf_counter()
    passes([dls.unlabeled])
    return dict(images=len(dls.unlabeled.dataset), build_seconds=first, open_seconds=second, pass_seconds=time.perf_counter()-t,
                cache_bytes=list_caches(cache)[0]['bytes'], pass_memory=anonymous())

def with_images(s):
    res,size = [],32 if s.quick else 64
    for n in ((40,160) if s.quick else (800,3200,12800)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as ex: res.append(ex.submit(start, duplicates(s, n), s.work/f'cache-{n}', size).result())
    return res

def with_batch(s):
    "Seconds of a step, bytes of activations, and what our code adds to the bare step"
    res = []
    for ubs in ((2,4) if s.quick else (4,16,64)):
        arch,size,steps = (resnet10,32,2) if s.quick else (resnet18,64,max(3,64//ubs))
        t = rounds(arms(arch, small_images(s), size, ubs, steps, s), 1 if s.quick else 2)
        kept = {k:activations(learner(arch.__name__, size, ubs, k)) for k in ('joint','sequential')}
        over,_ = step_overhead(arch, size, ubs, max(1, 8//ubs), 1 if s.quick else 16)
        res.append(dict(images=8*ubs, overhead=over['ratio'], **{k:min(v)/steps for k,v in t.items()}, **kept))
    return res

def with_workers(s):
    "Images a second of the data alone, and seconds of a step, workers started anew for both"
    res = []
    for nw in ((0,) if s.quick else (0,1,2,4)):
        size,bs,n_pass = (32,8,2) if s.quick else (224,32,8)
        dls,n = loaders(large_images(s), size, bs, s, nw, n_pass)
        t = rounds({k:functools.partial(passes, o) for k,o in dls.items()}, 1 if s.quick else 2)
        arch,size,ubs,steps = (resnet10,32,2,2) if s.quick else (resnet18,64,16,16)
        step = rounds(arms(arch, small_images(s), size, ubs, steps, s, [('plain',nw)], nw), 1)
        res.append(dict(workers=nw, **{k:n/min(v) for k,v in t.items()}, **{f'{k} step':min(v)/steps for k,v in step.items()}))
    return res

def worker_start(s):
    "Seconds from an epoch's start to its first batch, with two workers"
    dls,_ = loaders(small_images(s), 32, 8, s, 2)
    dl, = dls['fast']; dl.n_steps = 1
    t = time.perf_counter()
    n = 1 if s.quick else 5
    for _ in range(n): passes([dl])
    return (time.perf_counter()-t)/n

def run(s):
    images,batch,workers = with_images(s),with_batch(s),with_workers(s)
    a,b = images[0],images[-1]
    more = b['images']/a['images']
    rows = [ratio(f"with {more:.0f}× the images, {what}, over {'' if k!='pass_memory' else 'what '}{'linear' if k!='pass_memory' else 'it was'}", [b[k]/(more if k!='pass_memory' else 1)], [a[k]], None, unit, scale)
            for k,what,unit,scale in (('build_seconds','time to make the cache','s',1),('open_seconds','time to open it','s',1),('pass_seconds','time of a pass','s',1),('cache_bytes','cache','MB',1e-6),('pass_memory','memory of the process after a pass','MB',1e-6))]
    return rows,dict(images=images, batch=batch, workers=workers, worker_start_seconds=worker_start(s))
