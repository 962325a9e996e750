"""Two processes on the CPU, started once by `accelerate launch`; `two_processes.py` records, the tests compare.
A test's docstring says which feature, and what is asserted."""
import json,os,subprocess,sys
from pathlib import Path
import pytest,torch
import torch.nn.functional as F
from torch import nn
import killed
from test_resume import ended,free_port
from two_processes import data,learner,net
from sesemi_fastai.all import BatchNormGroups,RunConfig,get_arch,replace_classifier
from sesemi_fastai.streams import random_key

here = Path(__file__).parent
TORCHRUN = [sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node','2']
ACCELERATE = [sys.executable,'-m','accelerate.commands.launch','--multi_gpu','--num_processes','2','--num_machines','1','--mixed_precision','no',
              '--dynamo_backend','no','--main_process_port','0']

def launch(*args):
    "Output of a command that has to succeed, with a port of its own"
    r = subprocess.run([str(o) for o in args], capture_output=True, text=True, cwd=here.parent, env=os.environ|dict(PYTHONPATH=str(here.parent), PYTHONWARNINGS='ignore'))
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
    return r.stdout

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What each of the two processes recorded"
    pytest.importorskip('accelerate')
    out = tmp_path_factory.mktemp('facts')
    launch(*ACCELERATE, here/'two_processes.py', out)
    return [torch.load(out/f'rank-{i}.pt', weights_only=False) for i in range(2)]

def ids(x): return (100*x[:,0,0,0]).round().long().tolist()
def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)
def steps(ranks, case): return list(zip(*(o[case]['steps'] for o in ranks)))

@pytest.mark.parametrize('case', ['joint','sequential','no seed'])
def test_each_reads_its_own_part(ranks, case):
    "two processes: no image is in both parts of a step's batches, labelled or not"
    for a,b in steps(ranks, case):
        for k in 'xu': assert not set(ids(a[k]))&set(ids(b[k])) and len(ids(a[k]))==len(ids(b[k]))==dict(x=4,u=2)[k]

def test_parts_are_one_batch(ranks):
    "two processes, the streams: together they read what one process with twice the batch size reads, in as many steps"
    whole = data(8,4)
    want = [(ids(x),ids(u)) for _ in range(2) for (x,_),(u,) in zip(whole.train, whole.unlabeled)]
    assert [(ids(a['x'])+ids(b['x']), ids(a['u'])+ids(b['u'])) for a,b in steps(ranks,'joint')]==want
    assert len(want)==2*len(whole.train)==12 and {o['n_iter'] for r in ranks for o in r['joint']['steps']}=={6}

def test_pool_is_seen_once_an_epoch(ranks):
    "two processes, an epoch: one pass over the unlabelled pool by both together"
    seen = sum([ids(o['u']) for r in ranks for o in r['joint']['steps'][:6]], [])
    assert len(seen)==len(set(seen))==24 and set(seen)<=set(range(100,126))

@pytest.mark.parametrize('backward', ['joint','sequential'])
@pytest.mark.parametrize('case', ['',' accumulated'])
def test_parameters_are_equal(ranks, backward, case):
    "two processes, parameters: equal after each step, the head's too, from its start on"
    names = [n for n in ranks[0][backward+case]['steps'][0]['before'] if not n.split('.')[-1] in ('running_mean','running_var','num_batches_tracked')]
    assert 'rotation.head.weight' in names
    for a,b in steps(ranks, backward+case):
        for when in ('before','after'): assert all(torch.equal(a[when][n], b[when][n]) for n in names)
    first,last = steps(ranks, backward+case)[0][0],steps(ranks, backward+case)[-1][0]
    assert all((first['before'][n]!=last['after'][n]).any() for n in names if n.endswith('weight'))

def by_hand(step, before):
    "Gradients, BatchNorm buffers and pretext loss of one process's batches in a plain loop"
    model,head = net().train(),nn.Linear(16,4)
    model.load_state_dict({k:v for k,v in before.items() if 'rotation' not in k})
    head.load_state_dict({k.rsplit('.',1)[1]:v for k,v in before.items() if 'rotation' in k})
    loss = F.cross_entropy(model(step['x']), step['y'])
    views = torch.stack([torch.rot90(o,k,(1,2)) for o in step['u'] for k in range(4)])
    pretext = F.cross_entropy(head(model[:-1](views)), torch.arange(4).repeat(len(step['u'])))
    (loss+pretext).backward()
    grads = {n:p.grad for n,p in model.named_parameters()}|{f'rotation.head.{n}':p.grad for n,p in head.named_parameters()}
    return grads,{k:v for k,v in model.named_buffers()},pretext.item()

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_gradients(ranks, backward):
    "two processes, gradients: the mean of both parts' in one process, each part with its own BatchNorm statistics; running averages are the first's"
    for a,b in steps(ranks, backward):
        (g,buffers,_),(h,*_) = by_hand(a, a['before']),by_hand(b, b['before'])
        for n in g:
            assert torch.equal(a['grads'][n], b['grads'][n]) and torch.allclose(a['grads'][n], (g[n]+h[n])/2, atol=1e-6), n
        assert all(torch.allclose(v, a['after'][k], atol=1e-6) for k,v in buffers.items())

def test_sequential_is_joint(ranks):
    "two processes, `backward='sequential'`: every step's weights are those of 'joint', bitwise; within rounding where gradients are accumulated, whose sum is then of another order"
    for s,j in zip(ranks[0]['sequential']['steps'], ranks[0]['joint']['steps'], strict=True): assert same(s['after'], j['after'])
    for s,j in zip(ranks[0]['sequential accumulated']['steps'], ranks[0]['joint accumulated']['steps'], strict=True):
        assert all(torch.allclose(s['after'][k], j['after'][k], atol=1e-7) for k in j['after'])

def test_late_start(ranks):
    "two processes, `start_pct`: gradients are averaged before and after an objective begins, and `backward='sequential'` is 'joint', bitwise"
    for a,b in steps(ranks, 'late sequential'): assert all(torch.equal(a['after'][k], b['after'][k]) for k in a['grads'])
    for s,j in zip(ranks[0]['late sequential']['steps'], ranks[0]['late joint']['steps'], strict=True): assert same(s['after'], j['after'])
    seen = [any(k.startswith('rotation') for k in o['grads']) for o in ranks[0]['late joint']['steps']]
    assert seen==[False]*6+[True]*6

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_accumulation_and_clip(ranks, backward):
    "two processes, `GradientAccumulation`, `GradientClip`: the mean over both processes and both accumulated batches, then clipped to the norm"
    (a0,b0),(a1,b1),*_ = steps(ranks, backward+' accumulated')
    assert 'grads' not in a0 and all(torch.equal(a0['before'][n], a1['before'][n]) for n in a1['grads'])
    gs = [by_hand(o, o['before'])[0] for o in (a0,b0,a1,b1)]
    want = {n:sum(g[n] for g in gs)/4 for n in gs[0]}
    norm = torch.stack([v.norm() for v in want.values()]).norm()
    assert norm>.05 and all(torch.allclose(a1['grads'][n], v*.05/norm, atol=1e-5) for n,v in want.items())

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_groups_on_one_device(ranks, backward):
    "two processes, `BatchNormGroups(2)`: in one process it gives the same weights and buffers, step by step, from twice the batch size"
    learn = learner(data(8,4), BatchNormGroups(2), backward=backward)
    with learn.no_bar(): learn.fit(2, .1)
    for o,a in zip(learn.watch.steps, ranks[0]['joint']['steps'], strict=True):
        assert all(torch.allclose(o['after'][k], v, atol=1e-5) for k,v in a['after'].items())

def test_dropout_differs(ranks):
    "two processes, dropout: a function of seed, step and process; the first one's is that of a single process"
    for i,(a,b) in enumerate(steps(ranks,'joint')):
        for o,rank in ((a,[]),(b,[1])):
            torch.manual_seed(random_key(0,'step',i//6,i%6,*rank)); assert o['noise']==torch.rand(1).item()

def test_columns(ranks):
    "two processes, Recorder: `rotation_loss` is the mean over both, and all columns are the same in both"
    a,b = (o['joint']['columns'] for o in ranks); assert [{k:v for k,v in o.items() if k!='time'} for o in a]==[{k:v for k,v in o.items() if k!='time'} for o in b]
    for e in range(2):
        each = [o['joint']['steps'][e*6+i]['pretext'] for o in ranks for i in range(6)]
        assert a[e]['rotation_loss']==pytest.approx(sum(each)/len(each), abs=1e-6)

def test_metrics_over_both(ranks):
    "two processes, validation: the metric is that of all validation images"
    model = net().eval(); model.load_state_dict({k:v for k,v in ranks[0]['joint']['steps'][-1]['after'].items() if 'rotation' not in k})
    x,y = map(torch.cat, zip(*data(4,2).valid))
    with torch.no_grad(): want = (model(x).argmax(1)==y).float().mean()
    assert ranks[0]['joint']['columns'][-1]['accuracy']==pytest.approx(want.item())

def test_get_preds(ranks):
    "two processes, `get_preds` on both sets: each image once, though their number can't be divided by two (in fastai's order, which interleaves processes)"
    dls,model = data(4,2,n_valid=7),net().eval(); model.load_state_dict({k:v for k,v in ranks[0]['model'].items() if 'rotation' not in k})
    for i,n in enumerate((30,7)):
        x,y = map(torch.cat, zip(*dls[i].new(shuffle=False, drop_last=False)))
        with torch.no_grad(): want = model(x)
        for r in ranks:
            p,t = r['preds'][i]; rows = lambda p,t: torch.tensor(sorted([*q,int(u)] for q,u in zip(p.tolist(),t)))
            assert len(p)==n and torch.allclose(rows(p,t), rows(want,y), atol=1e-6)

def test_no_seed(ranks):
    "two processes, `seed=None`: the first one's seed and head hold for both"
    s,t = (r['no seed']['own'] for r in ranks); assert s!=t
    a,b = (r['no seed']['steps'][0]['before']['rotation.head.weight'] for r in ranks); assert torch.equal(a, b) and ranks[0]['no seed']['seeds'][0]==s
    assert ranks[0]['no seed']['seeds']==ranks[1]['no seed']['seeds'] and len(set(ranks[0]['no seed']['seeds']))==1

def test_loaders_are_given_back(ranks):
    "two processes, after the fit: loaders and model are the ones from before"
    assert ranks[0]['loaders left']==ranks[1]['loaders left']==[True]*4

def test_nan_in_one_process(ranks):
    "two processes, `TerminateOnNaNCallback`: a pretext loss that isn't finite in one stops both"
    assert ranks[0]['nan']==ranks[1]['nan']==1

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_unused_parameters(ranks, backward):
    "two processes, `find_unused_parameters=True`: the same weights, bitwise; heads are outside DDP's wrapper, so that it doesn't count them as unused"
    for s,j in zip(ranks[0]['unused '+backward]['steps'], ranks[0][backward]['steps'], strict=True): assert same(s['after'], j['after'])

@pytest.mark.parametrize('backward', ['joint','sequential'])
def test_messages(ranks, backward):
    "two processes, a step with `ResumeTraining` and the look for losses that aren't finite: one message each, and one for all gradients that the wrapper doesn't see, however many parameters there are"
    assert all(o['messages '+backward]==dict(all_reduce=3) for o in ranks)

def test_largest(ranks):
    "two processes, numbers: both get the maximum of each over the processes"
    assert all(o['largest']==[1,1,0] for o in ranks)

def test_patience(processes, tmp_path):
    "two processes, `local_first`: others wait longer for what the first one fetches than for anything else"
    pytest.importorskip('accelerate'); port = free_port()
    ps = [processes.Process(target=killed.fetch, args=(tmp_path, rank, port)) for rank in range(2)]
    for p in ps: p.start()
    assert ended(ps)==[0,0] and (tmp_path/'seen-1').exists()

@pytest.fixture(scope='module')
def told(processes, tmp_path_factory):
    "What each of two processes got of calls that fail in one of them, and how often it was asked"
    pytest.importorskip('accelerate'); port,out = free_port(),tmp_path_factory.mktemp('told')
    ps = [processes.Process(target=killed.tell, args=(out, rank, port)) for rank in range(2)]
    for p in ps: p.start()
    assert ended(ps)==[0,0]
    return [json.loads((out/f'told-{i}.json').read_text()) for i in range(2)]

def test_errors_are_told(told):
    "two processes, an error in one: the other raises it, too, and takes no later answer for its own; what isn't fetched by the first isn't asked for by others"
    (a,n),(b,m) = told
    assert a[:6]==['FileExistsError: run-0 exists','TwoArguments: 1 and 2','new','OSError: no network','OSError: no network','fetched']
    assert b[:6]==[a[0],'RuntimeError: TwoArguments: 1 and 2',*a[2:6]] and (n,m)==(4,1)

def test_checkpoint_of_another_run_in_one(told):
    "two processes, `ResumeTraining`: settings that differ in one process are refused in both"
    for got,_ in told: assert 'cut' in got[6] and got[7].startswith('CheckpointError') and got[7].endswith('n was 0, now 1'), got

def test_unseeded_heads(told):
    "two processes, an unlabelled loader without a seed: heads begin and stay equal"
    (*_,a),(*_,b) = (o[0] for o in told); assert len(a)==64 and a==b, (a, b)

def test_refusals(ranks):
    "two processes, refused with words: fewer images than a batch of all"
    for r in ranks:
        assert '30 labeled images for batches of 16 in 2 processes' in r['too few']

@pytest.mark.parametrize('launcher', [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=['torchrun','accelerate'])
def test_imagewang(folder, tmp_path, launcher):
    "two processes, `sesemi_imagewang`: one plan, one folder a run, the protocol's counts; the accuracy is that of the weights it wrote, each image once"
    (folder/'val/b/0.png').unlink()                                    # 7 images, which can't be halved
    pytest.importorskip('accelerate'); out = tmp_path/'out'
    text = launch(*launcher,'-m','sesemi_fastai.imagewang',folder,'--size','32','--arch','resnet10_16','--epochs','2','--unlabeled_bs','4','--baseline',
                  '--num_workers','0','--steps','3','--out',out)
    for o in ('A step     16 labelled images and 4 unlabelled, over 2 processes; objective rotation, 4 passes for each unlabelled image','2 epochs of 3 steps = 6 steps, 192 image passes (96 of a baseline)','run-0: accuracy','|32|2|SESEMI|'):
        assert text.count(o)==1, (o, text)
    for kind,passes in (('run',192),('baseline',96)):
        assert {o.name for o in (out/f'{kind}-0').iterdir()}=={'results.json','model.pth','history.csv','steps.csv','curves.png'}
        res = json.loads((out/f'{kind}-0/results.json').read_text())
        assert (res['steps'],res['bs'],res['image_passes'],res['processes'])==(6,16,passes,2)
        assert len((out/f'{kind}-0/steps.csv').read_text().splitlines())==7 and len((out/f'{kind}-0/history.csv').read_text().splitlines())==3
        model = replace_classifier(get_arch('resnet10_16')(), torch.randn(2,3,32,32), 2).eval()
        model.load_state_dict(torch.load(out/f'{kind}-0/model.pth', weights_only=True))
        x,y = map(torch.cat, zip(*RunConfig(str(folder), 'noise', size=32, unlabeled_bs=4, num_workers=0).dls().valid))
        with torch.no_grad(): assert res['accuracy']==pytest.approx(100*(model(x.as_subclass(torch.Tensor)).argmax(1)==y).float().mean().item(), abs=1e-3) and len(y)==7

def test_numbers_that_processes_cannot_share(folder, monkeypatch):
    "two processes, `sesemi_imagewang`: batches or groups that can't be shared are refused with words"
    monkeypatch.setenv('WORLD_SIZE','2')
    cfg = lambda **kw: RunConfig(str(folder), 'noise', **(dict(size=32, arch='resnet10_16', unlabeled_bs=4, num_workers=0)|kw))
    with pytest.raises(ValueError, match='unlabeled_bs=3.*2 processes'): cfg(unlabeled_bs=3).dls()
    dls = cfg().dls(); assert (dls.train.bs,dls.unlabeled.bs)==(8,2) and dls.steps_per_epoch(2)==36//4
    with pytest.raises(ValueError, match='bn_groups=3.*2 processes'): cfg(bn_groups=3).learner(dls)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='bn_groups=1.*GPU'): cfg(bn_groups=1).learner(dls)
    assert cfg(bn_groups=4).learner(dls).batch_norm_groups.n_groups==2 and not hasattr(cfg().learner(dls),'batch_norm_groups')

def test_without_accelerate(folder, tmp_path):
    "accelerate isn't installed: the package works in one process, and in two says how to get it"
    code = f"""
import sys; sys.modules['accelerate'] = None
from sesemi_fastai.all import *
from sesemi_fastai.streams import random_key
from sesemi_fastai.imagewang import imagewang_command
import os; os.environ.update(WORLD_SIZE='2', RANK='0')
imagewang_command([{str(folder)!r},'--out',{str(tmp_path/'out')!r}])
"""
    r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert r.returncode==2 and r.stderr.strip()=="sesemi_imagewang: Training in several processes needs accelerate: pip install 'sesemi_fastai[distributed]'.", r.stderr
