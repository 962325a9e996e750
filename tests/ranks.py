"""What `test_cuda.py` compares, recorded by each process of `torch.distributed.run --nproc_per_node N tests/ranks.py FOLDER`:
on GPUs with BatchNorm over the batches of all, on the CPU with BatchNorm over each process's own."""
import sys
import torch
from fastai.distributed import *
from fastai.vision.all import default_device,rank_distrib
from sesemi_fastai.all import EMA,EntropyMin
from sesemi_fastai.distributed import local_first
from two_processes import data,learner

def record(out):
    local_first(lambda: None)   # each process takes up its device
    gpu,facts = torch.cuda.is_available(),{}
    for backward in ('joint','sequential'):
        learn = learner(data(4, 2, device=default_device()), EntropyMin(.3, backward=backward), EMA(.9), backward=backward)
        with learn.distrib_ctx(sync_bn=gpu, cpu=not gpu), learn.no_bar(): learn.fit(2, .1)
        facts[backward] = dict(model={k:v.cpu() for k,v in learn.model.state_dict().items()}, heads={k:v.cpu() for k,v in learn.rotation.fit_heads.state_dict().items()},
                               columns=[[float(v) for v in o] for o in learn.recorder.values], device=str(next(learn.model.parameters()).device))
    torch.save(facts, f'{out}/rank-{rank_distrib()}.pt')
    torch.distributed.destroy_process_group()

if __name__=='__main__': record(sys.argv[1])
