"A training step in whole, data included: the plain loop, the reference recipe, the fast recipe"
import functools,time
import torch
from torchvision.models import resnet18,resnet50
from fastai.vision.all import Callback,CancelValidException
from sesemi_fastai.all import *
from common import *
from plain import Loop

def wait():
    "Until a GPU has done what it was given"
    if torch.cuda.is_initialized(): torch.cuda.synchronize()

class Timed(Callback):
    "Seconds of the training part of each epoch; validation is left out"
    order = -100
    def before_train(self): wait(); self.start = time.perf_counter()
    def after_train(self): wait(); self.learn.train_seconds = time.perf_counter()-self.start
    def before_validate(self): raise CancelValidException

def learner(arch, root, size, ubs, steps, recipe, cache, num_workers=None, device=None):
    dls = PairedDataLoaders.from_folder(root, unlabeled='train', size=size, unlabeled_bs=ubs, seed=0, n_steps=steps, recipe=recipe, cache=cache, num_workers=num_workers, device=device, verbose=False)
    return sesemi_learner(dls, arch, cbs=[RotationPretext(),Timed()])

def train(learn, lr=.01):
    "One epoch of `n_steps` steps"
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr)
    return learn.train_seconds

def arms(arch, root, size, ubs, steps, s, plain=(('plain',2),('alone',0)), num_workers=None, device=None):
    "The plain loop, by name and its workers, and both recipes, as they are by default: functions that make `steps` steps from freshly started loaders and say how long they took"
    learns = {k:learner(arch, root, size, ubs, steps, k, s.work/'cache', num_workers, device) for k in ('reference','fast')}
    loops = {k:Loop(arch, root, learns['fast'].dls.unlabeled.dataset.items, size, ubs, n, device or 'cpu') for k,n in plain}
    return {k:functools.partial(o.run, steps) for k,o in loops.items()}|{k:functools.partial(train, o) for k,o in learns.items()}

def run(s):
    cases = [(resnet10, small_images(s), 32, 4, 2)] if s.quick else [(resnet18, small_images(s), 64, 32, 6), (resnet50, large_images(s), 128, 16, 2)]
    targets,rows,raw = dict(resnet18=.50, resnet50=.45),[],[]
    for arch,root,size,ubs,steps in cases:
        torch.manual_seed(0)
        t = rounds(arms(arch, root, size, ubs, steps, s), s.rounds)
        what = f'{arch.__name__}, {size} px, {4*ubs}+4×{ubs} images'
        for k,target in (('reference',1.),('fast',targets.get(arch.__name__))):
            rows.append(ratio(f'whole step, {k} recipe: {what}', t[k], t['plain'], target, 's', 1/steps))
            rows.append(ratio(f'whole step, {k} recipe, the baseline loop without workers: {what}', t[k], t['alone'], None, 's', 1/steps))
        raw.append(dict(what=what, steps=steps, seconds=t))
    return rows,raw
