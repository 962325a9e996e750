"""What the parts of a recipe give at equal image passes, on Imagewang at a short side of 80 px trained at 64: `make recipes`, or

    python tests/benchmarks/recipes.py [--share .25] [--seeds 0 1 2] [--only best protocol] [--baseline]

`--share` of the 310,656 image passes that the reference's 2,427 steps of 64 labelled images and 16 unlabelled ones in four turns are; `--baseline` trains supervised baselines of as many steps.
A run goes on where it was cut (in runs/recipes); each that ends is a line in results/recipes/trials.jsonl, and isn't repeated. Half of the validation images, by their names, is for choosing, the other for reporting."""
import argparse,csv,hashlib,os,sys
from pathlib import Path
sys.path.insert(1, str(Path(__file__).parent.parent))
from fastai.vision.all import torch
from sesemi_fastai.all import RunConfig,accuracy_among,train_run
from sesemi_fastai.images import unpack
from sesemi_fastai.report import read_csv
from common import machine
from gpu import Log

here = Path(__file__).parent
log,work = Log(here/'results'/'recipes'/'trials.jsonl'),here.parent.parent/'runs'/'recipes'
passes = 310_656
protocol = dict(recipe='fast', arch='resnet18', bs=64, unlabeled_bs=16)
# every part is said, so that a trial stays what it was where the recipe changes
pseudo_labels = 'fixmatch(threshold=.7,start_pct=.7)'
best = dict(recipe='best', arch='xresnet18_silu', bs=32, unlabeled_bs=32, mixup=0., progressive=.75, objective='rotation(views=one)+'+pseudo_labels)
turns = best|dict(objective='rotation(views=one)')
mish = turns|dict(arch='xresnet18_mish', mixup=.4)   # what was tried before
plain = mish|dict(mixup=0., progressive=0.)
plain64 = plain|dict(bs=64, unlabeled_bs=64)
relu64 = plain64|dict(arch='xresnet18')
trials = dict(protocol=protocol, best=best,
    protocol_one=protocol|dict(unlabeled_bs=64, objective='rotation(views=one)'), protocol_xresnet=protocol|dict(arch='xresnet18_silu'), protocol_ranger=protocol|dict(opt='ranger', schedule='flat_cos'), protocol_smoothing=protocol|dict(label_smoothing=.1),
    protocol_mixup=protocol|dict(mixup=.4), protocol_growing=protocol|dict(progressive=.75), protocol_no_dropout=protocol|dict(dropout=0.), protocol_fixmatch=protocol|dict(objective='rotation+'+pseudo_labels), protocol_extra=protocol|dict(extra='both'),
    best_mixup=best|dict(mixup=.4), best_no_growing=best|dict(progressive=0.), best_no_smoothing=best|dict(label_smoothing=0.), best_no_fixmatch=turns, best_no_rotation=best|dict(objective=pseudo_labels), best_four=best|dict(unlabeled_bs=8, objective='rotation+'+pseudo_labels),
    best_mish=best|dict(arch='xresnet18_mish'), best_relu=best|dict(arch='xresnet18'), best_resnet=best|dict(arch='resnet18'), best_timm=best|dict(arch='timm:resnet18d'), best_adamw=best|dict(opt='adamw'), best_nesterov=best|dict(opt='nesterov', schedule='poly'), best_bs64=best|dict(bs=64, unlabeled_bs=64), best_ema=best|dict(ema=.998),
    best_bn=best|dict(objective='rotation(views=one,bn=batch)+'+pseudo_labels.replace(')',',bn=batch)')), best_no_val=best|dict(val_in_pool=False), best_labels=best|dict(extra='labels'), best_images=best|dict(extra='images'), best_extra=best|dict(extra='both'),
    protocol_50=protocol|dict(arch='resnet50'), best_50=best|dict(arch='xresnet50_silu'),
    turns_adamw=turns|dict(opt='adamw'), turns16_48=turns|dict(bs=16, unlabeled_bs=48, mixup=.2), mish=mish, mish_growing_half=mish|dict(progressive=.5), plain=plain, plain_growing=plain|dict(progressive=.5), plain64=plain64, relu64=relu64, relu64_images=relu64|dict(extra='images'), relu64_extra=relu64|dict(extra='both'), relu32_96=relu64|dict(bs=32, unlabeled_bs=96))

def config(path, name, share, seed):
    epochs = max(4, round(12*share))   # looks at the accuracy
    cfg = dict(data=str(path), dataset='imagewang-80', size=64, epochs=epochs, seed=seed, num_workers=0)|trials[name]
    n = RunConfig(**cfg).passes_per_step()
    return RunConfig(**cfg, steps=round(passes*share/n/epochs))

def halves(cfg, folder):
    "Accuracy in percent of the weights in `folder` on the half of the validation images for choosing, and on the other"
    dls = cfg.dls(); learn = cfg.learner(dls)
    learn.model.load_state_dict(torch.load(folder/'model.pth', weights_only=True))
    with learn.no_bar(): p,y = learn.get_preds(dl=dls.valid)
    acc,report = accuracy_among(dls.valid_vocab),torch.tensor([hashlib.sha1(Path(o).name.encode()).digest()[0]%2==1 for o in dls.valid.items])
    return tuple(100*acc(p[o], y[o]).item() for o in (~report,report))

def seconds(file):
    "Of each epoch, from fastai's `history.csv`, where they are minutes or hours"
    with open(file, newline='') as f: return [sum(int(n)*60**i for i,n in enumerate(reversed(r['time'].split(':')))) for r in csv.DictReader(f)]

def passes_after(cfg, baseline, n=20):
    "Image passes after each epoch, of which there are more once an objective that begins late has begun"
    per_step = [cfg.passes_per_step(baseline, (i+.5)/n/cfg.epochs) for i in range(n*cfg.epochs)]
    return [round(cfg.steps/n*sum(per_step[:n*(e+1)])) for e in range(cfg.epochs)]

def run(path, name, share, seed, baseline):
    "Train once; the line to be written"
    cfg = config(path, name, share, seed)
    folder = work/f"{name}{'-baseline' if baseline else ''}-{share:g}-{seed}"
    r = train_run(cfg, folder, baseline=baseline, plain=True, resume=True, save_every='5 minutes')
    choose,report = halves(cfg, folder)
    return dict(name=name, share=share, seed=seed, baseline=baseline, accuracy=r['accuracy'], choose=choose, report=report, seconds=r['seconds'], steps=r['steps'], passes=r['image_passes'], history=read_csv(folder/'history.csv')|dict(seconds=seconds(folder/'history.csv'), passes=passes_after(cfg, baseline)), settings=trials[name], machine=machine())

def main(args):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--share', type=float, default=1.); p.add_argument('--seeds', type=int, nargs='*', default=[0]); p.add_argument('--only', nargs='*', choices=list(trials), default=list(trials)); p.add_argument('--baseline', action='store_true')
    a = p.parse_args(args)
    if 'SESEMI_TEST_DATA' not in os.environ: sys.exit("make recipes needs Imagewang: set SESEMI_TEST_DATA to a folder that has imagewang-80.tgz.")
    path = unpack(Path(os.environ['SESEMI_TEST_DATA'])/'imagewang-80.tgz')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    for seed in a.seeds:
        for name in a.only:
            if any((r['settings'],r['share'],r['seed'],r['baseline'])==(trials[name],a.share,seed,a.baseline) for r in log.read()): continue
            r = run(path, name, a.share, seed, a.baseline)
            log.add(**r)
            print(f"{name}{' baseline' if a.baseline else ''}, seed {seed}: {r['accuracy']:.2f} % ({r['choose']:.2f} and {r['report']:.2f} on the halves), {r['passes']:,} passes in {r['seconds']:.0f} s", flush=True)

if __name__=='__main__': main(sys.argv[1:])
