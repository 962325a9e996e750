"The data alone, on one core: from files, or from the cache, to normalised batches at the 256 category (224 px)"
import functools,time
import torch
from torch.utils.data import DataLoader
from sesemi_fastai.all import *
from common import *
from plain import Labelled

def loaders(root, size, bs, s, num_workers=0, n_pass=4, device='cpu'):
    "Labelled loaders of the plain loop and of both recipes, and how many images `n_pass` passes of each have, which are one epoch of ours"
    ours = {k:PairedDataLoaders.from_folder(root, unlabeled='train', size=size, bs=bs, unlabeled_bs=max(1,bs//4), seed=0, recipe=k, num_workers=num_workers, cache=s.work/'cache', verbose=False, device=device).train for k in ('reference','fast')}
    for o in ours.values(): o.n_steps = n_pass*(o.n//bs)
    plain = DataLoader(Labelled(root, size), batch_size=bs, shuffle=True, drop_last=True, num_workers=ours['fast'].fake_l.num_workers)
    return dict(plain=[plain]*n_pass, **{k:[o] for k,o in ours.items()}),n_pass*len(plain)*bs

def passes(dls):
    for dl in dls:
        for _ in dl: pass

def run(s):
    size,bs = (32,8) if s.quick else (224,128)
    dls,n = loaders(large_images(s), size, bs, s)
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try: t = rounds({k:functools.partial(passes, o) for k,o in dls.items()}, s.rounds+2, clock=time.process_time)
    finally: torch.set_num_threads(threads)
    rate = {k:[n/o for o in v] for k,v in t.items()}
    what = f'images a second and core, {size} px'
    return [ratio(f'data pipeline, fast against plain: {what}', rate['fast'], rate['plain'], 6., '/s'),
            ratio(f'data pipeline, fast against reference recipe: {what}', rate['fast'], rate['reference'], None, '/s'),
            ratio(f'data pipeline, reference recipe against plain: {what}', rate['reference'], rate['plain'], None, '/s')],[dict(what=what, images=n, cpu_seconds=t)]
