"How long it takes to find, list, order and look up files, up to a million: names that are made up, so that no image is read"
import json,os,tempfile,time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch
import numpy as np,PIL
from PIL import Image
from fastai.vision.all import Datasets,noop
from sesemi_fastai.all import *
from sesemi_fastai.cache import ImageCache
from sesemi_fastai.folders import split_folder
from sesemi_fastai.images import check_images
from sesemi_fastai.streams import StreamDL
from sesemi_fastai import cache as cache_module
from common import ratio

def seconds(f):
    "Of this process's computing, which other processes of the machine don't lengthen"
    start = time.process_time()
    f()
    return time.process_time()-start

def length(o): return len(str(o))

def names(n, root='/data'): return [Path(f'{root}/c{i%400:03d}/{i:07d}.jpg') for i in range(n)]

def find(n):
    "A walk through 400 folders"
    tree = [('/data',[f'c{i:03d}' for i in range(400)],[])]+[(f'/data/c{i:03d}',[],[f'{j:07d}.jpg' for j in range(i,n,400)]) for i in range(400)]
    def walk(*args, **kwargs): yield from tree
    with patch('os.walk', walk): return seconds(lambda: find_images(Path('/data')))

def split(n):
    "Real empty files, 10 classes of interest among 400"
    with tempfile.TemporaryDirectory() as d:
        root = Path(d); most = min(n, 10_000)
        for i in range(400): (root/f'train/c{i:03d}').mkdir(parents=True)
        for i in range(most): os.close(os.open(root/f'train/c{i%400:03d}/{i:07d}.jpg', os.O_CREAT|os.O_WRONLY))
        for i in range(10): (root/f'val/c{i:03d}').mkdir(parents=True); (root/f'val/c{i:03d}/0.jpg').touch()
        return seconds(lambda: split_folder(root, unlabeled=('train','val')))*n/most

def heads(n):
    "One image as often as there are files, in one process"
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'x.jpg'; Image.new('RGB', (80,107)).save(f); most = min(n, 2_000)
        return seconds(lambda: check_images([f]*most))*n/most

def begin_labelled(n):
    "The first batch of a labelled epoch, where an epoch is a pass over `n` unlabelled images in batches of 2: up to 500,000 steps"
    dl = StreamDL(Datasets(range(1000), [[noop],[noop]]), bs=100, seed=0, num_workers=0, pass_of=(n,2))
    return seconds(lambda: next(iter(dl)))

def begin_unlabelled(n):
    "The first batch of an epoch of `n` images"
    dl = StreamDL(Datasets(range(n), [[noop]]), bs=32, seed=0, num_workers=0, stream='unlabeled')
    return seconds(lambda: next(iter(dl)))

def pair(n):
    "`from_dls` with `n` unlabelled files"
    dsets = Datasets(names(400), [[length],[length]], splits=[range(300),range(300,400)])
    dls,items = dsets.dataloaders(bs=32, num_workers=0),names(n)
    return seconds(lambda: PairedDataLoaders.from_dls(dls, items, seed=0))

def open_a_cache(n):
    "The cache of `n` images, and a comparison with the sizes and times of their files"
    with tempfile.TemporaryDirectory() as d:
        files = names(n, d); (folder := Path(d)/'cache').mkdir()
        index = np.zeros(n, cache_module._row)
        meta = dict(version=cache_module._version, pillow=PIL.__version__, side=64, bytes=1, names=[str(o)[len(d)+1:] for o in files])
        np.save(folder/'index.npy', index); (folder/'pixels.bin').write_bytes(b'0')
        (folder/'cache.json').write_text(json.dumps(meta|dict(key=cache_module._key(meta, index))))
        stats = [(0,0)]*n
        def f(): assert not ImageCache(folder, d, 64).lacks(files, stats)
        return seconds(f)

parts = {'find files':find, 'find classes and streams':split, 'look at heads':heads, 'begin a labelled epoch':begin_labelled, 'begin an unlabelled epoch':begin_unlabelled, 'pair with DataLoaders':pair, 'open a cache':open_a_cache}

def with_names(quick=False):
    "Seconds of each part at each number of files, the better of two; heads and real files by a part of them"
    return [dict(files=n, **{k:min(f(n) for _ in range(2)) for k,f in parts.items()}) for n in ((2_000,20_000) if quick else (10_000,100_000,1_000_000))]

def run(s):
    "How the last tenfold of files compares with ten times the seconds"
    names = with_names(s.quick); a,b = names[-2:]
    return [ratio(f"with {b['files']//a['files']}× the files, {b['files']:,}: {k}, over linear", [b[k]/(b['files']/a['files'])], [a[k]], None, 's') for k in parts],names
