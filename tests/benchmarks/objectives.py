"""What each objective gives, alone and beside rotation: equal steps and image passes, over seeds, beside the supervised baseline

    python tests/benchmarks/objectives.py fashionwang [--seeds 3] [--only rotation fixmatch]

Every run is a line in results/objectives/NAME.jsonl as soon as it ends; a run that is there isn't repeated, so a broken-off command goes on."""
import argparse,os,sys,time
from functools import partial
from pathlib import Path
sys.path.insert(1, str(Path(__file__).parent.parent))
from fastai.vision.all import accuracy,torch
from sesemi_fastai.all import (BarlowTwins,EMA,EntropyMin,FixMatch,JigsawPretext,MeanTeacher,PairedDataLoaders,PiModel,PseudoLabel,RotationPretext,VAT,resnet10,sesemi_learner)
from sesemi_fastai.imagewang import get_data
from sesemi_fastai.streams import random_key,seeded
from sesemi_fastai.images import unpack
from common import last_columns,machine
from gpu import Log

results = Path(__file__).parent/'results'/'objectives'
# steps of `bs` labelled images, and unlabelled ones of as many passes; VAT's length goes with the side of the images
data = dict(fashionwang=dict(size=28, steps=300, bs=32, lr=.05), imagewang=dict(size=32, steps=600, bs=32, lr=.05))
arch = partial(resnet10, width=32)
# averages over 1,000 steps, as published, would still be what they began with at the end of these runs
adaptive = dict(align='uniform', momentum=.99, ramp_pct=.4)

def objectives(eps):
    "Each alone, as a function, so that every run has its own"
    return dict(rotation=lambda: [RotationPretext()], rotation_one=lambda: [RotationPretext(views='one')], jigsaw=lambda: [JigsawPretext()], entropy=lambda: [EntropyMin(ramp_pct=.4)],
        pseudo_label=lambda: [PseudoLabel(threshold=.8)], pi_model=lambda: [PiModel()], mean_teacher=lambda: [MeanTeacher(), EMA()], vat=lambda: [VAT(eps=eps)],
        fixmatch=lambda: [FixMatch(threshold=.8)], fixmatch_free=lambda: [FixMatch(weighting='free', **adaptive)], fixmatch_soft=lambda: [FixMatch(weighting='soft', **adaptive)],
        barlow_twins=lambda: [BarlowTwins()])

def configs(eps):
    "Name to a function that makes the callbacks"
    alone = objectives(eps)
    both = {f'rotation_one+{k}':(lambda v=v: alone['rotation_one']()+v())   # four turns of each leave six unlabelled images a step
            for k,v in alone.items() if not k.startswith('rotation')}
    return dict(baseline=list, baseline_ema=lambda: [EMA()])|alone|both

def run(path, name, make, seed, size, steps, bs, lr):
    "Train once; the line to be written"
    cbs = make()
    per_image = sum(getattr(o,'passes_per_image',0.) for o in cbs)
    ubs = max(2, round(bs/per_image)) if per_image else bs//4
    dls = PairedDataLoaders.from_folder(path, size=size, bs=bs, unlabeled_bs=ubs, n_steps=steps, recipe='fast', seed=seed, num_workers=0, verbose=False)
    start = time.time()
    with seeded(random_key(seed, 'weights')): learn = sesemi_learner(dls, arch, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly_warmup(1, lr, cbs=cbs)
    cols = last_columns(learn)
    return dict(name=name, seed=seed, accuracy=100*cols['accuracy'], steps=steps, bs=bs, unlabeled_bs=ubs, passes=round(steps*(bs+ubs*per_image)), seconds=round(time.time()-start,1), columns=cols, commit=machine()['commit'])

def main(args):
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('data', choices=data); p.add_argument('--seeds', type=int, default=3); p.add_argument('--only', nargs='*')
    a = p.parse_args(args); kw = data[a.data]
    path = get_data('sample') if a.data=='fashionwang' else unpack(Path(os.environ['SESEMI_TEST_DATA'])/'imagewang-80.tgz')
    results.mkdir(parents=True, exist_ok=True); log = Log(results/f'{a.data}.jsonl')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    for seed in range(a.seeds):
        for name,make in configs(40*kw['size']/224).items():
            if (name,seed) in {(r['name'],r['seed']) for r in log.read()} or (a.only and name not in a.only): continue
            r = run(path, name, make, seed, **kw)
            log.add(**r)
            print(f"{name} {seed}: {r['accuracy']:.2f} % in {r['seconds']:.0f} s", flush=True)

if __name__=='__main__': main(sys.argv[1:])
