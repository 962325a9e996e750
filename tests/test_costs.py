"What a leaderboard row takes: counts by hand, published measurements, and the page that shows the tables"
import json
from collections import Counter
from pathlib import Path
import nbformat,pytest,torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet50
from sesemi_fastai.costs import *
from sesemi_fastai.report import row_crop

root = Path(__file__).parent.parent

@pytest.mark.parametrize('size', row_crop.values())
def test_operations_by_hand(size):
    "Two for each weight and place of each convolution and linear layer, and as many for the gradients of its weights and of its inputs, but those of the images"
    counted = []
    with torch.device('meta'): model,x = resnet50(num_classes=10),torch.empty(2,3,size,size)
    def count(m, args, out): counted.append(2*m.weight.numel()//m.weight.shape[0]*out[0].numel())
    for m in model.modules():
        if isinstance(m, (nn.Conv2d,nn.Linear)): m.register_forward_hook(count)
    model(x)
    assert len(counted)==54 and training_counts('resnet50', size)['flops']==3*sum(counted)-counted[0]

class Traffic(TorchDispatchMode):
    "Bytes that operations read and write, one after the other; those that only look at memory in another way move none"
    bytes = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(o.alias_info is not None and not o.alias_info.is_write for o in func._schema.arguments): return out
        self.bytes += sum(t.numel()*t.element_size() for t in torch.utils._pytree.tree_leaves((args,kwargs,out)) if isinstance(t, torch.Tensor))
        return out

def test_activations_are_moved_nine_times():
    "Of two batches, so that what weights take is left out"
    def traffic(n):
        with torch.device('meta'): model,x = resnet50(num_classes=10),torch.empty(n,3,224,224)
        with Traffic() as t: model(x).sum().backward()
        return t.bytes
    assert moves==pytest.approx((traffic(4)-traffic(2))/2/training_counts()['activations'], rel=.01)

def test_measured_here():
    "Activations of the benchmark's step, 128 passes joint and 64 sequential; images that a core gives"
    results = root/'tests/benchmarks/results/bench'
    got = next(o['bytes'] for o in json.loads((results/'memory.json').read_text())['raw'] if o['what']=='resnet50, 128 px, 64+4×16 images')
    for k,n in (('joint',128),('sequential',64)): assert n*training_counts('resnet50', 128)['activations']==pytest.approx(got[k]['activation'], rel=.01)
    rates = {o['name']:o['mine'] for o in json.loads((results/'pipeline.json').read_text())['rows']}
    for k,name in dict(reference='reference recipe against plain', fast='fast against plain').items(): assert loader_speed[k]==pytest.approx(next(v for n,v in rates.items() if name in n), rel=.2)

def test_published_throughput():
    "Within 30 % of what others measured on single cards, at 224 px"
    for *_,own,theirs in published_rows(): assert own==pytest.approx(theirs, rel=.3)

def test_page_shows_the_tables():
    cells = nbformat.read(root/'nbs/row_costs.ipynb', 4).cells
    shown = Counter(o.data['text/markdown'] for c in cells if c.cell_type=='code' for o in c.outputs if 'text/markdown' in o.get('data',{}))
    for o in (work_table(), *map(speed_table, loader_speed), *map(money_table, loader_speed), published_table()): assert shown[o]==1, 'run `make tutorials PAGES=row_costs`'
