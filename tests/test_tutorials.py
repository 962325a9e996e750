"Pages that show outputs were executed, and can be"
import re,sys
from pathlib import Path
import nbformat,pytest
root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'tools'))
import tutorials

@pytest.mark.parametrize('path', tutorials.pages, ids=lambda o: o.stem)
def test_outputs_are_kept(path):
    cells = [c for c in nbformat.read(path,4).cells if c.cell_type=='code']
    outs = [o for c in cells for o in c.outputs]
    assert outs and not [o for o in outs if o.output_type=='error'], f'{path.name}: run `make tutorials PAGES={path.stem}`'
    for c in cells:
        fits = sum(line.split('#')[0].count('.fit') for line in c.source.split('\n') if '.fit_flat' not in line and 'fit_transform' not in line)
        tables = sum('train_loss' in o.get('data',{}).get('text/html','') for o in c.outputs)
        assert fits<=tables or 'hide' in c.source, f'{path.name}: no table below {c.source!r}'
    assert path.stat().st_size<400_000, f'{path.name} is {path.stat().st_size/1e3:.0f} kB large'

@pytest.mark.parametrize('page', ['README.md','nbs/use.md'])
def test_lines_to_paste_run(folder, tmp_path, monkeypatch, page):
    "in the order in which they stand, on a small folder; with fewer epochs, smaller images and networks"
    monkeypatch.chdir(tmp_path)
    (folder/'labels.csv').write_text('file,label\n'+''.join(f'{o.relative_to(folder).as_posix()},{o.parent.name}\n' for o in sorted((folder/'train').rglob('*.*'))))
    small = {'untar_data(URLs.IMAGEWANG_160)':'path', '=128':'=32', 'Resize(128)':'Resize(32)', '_warmup(80':'_warmup(1', '_cycle(20':'_cycle(1', 'fine_tune(5':'fine_tune(1', 'vision_learner(dls, resnet34':'vision_learner(dls, resnet18, pretrained=False', 'resnet50':'"resnet10_16"'}
    blocks,ns = re.findall(r'```python\n(.*?)```', (root/page).read_text(encoding='utf-8'), re.S),dict(path=folder)
    for code in blocks:
        for k,v in small.items(): code = code.replace(k,v)
        exec(code, ns)
    assert len(blocks)>1 and 'resnet50' in ''.join(blocks) and ns['learn'].recorder.values

@pytest.mark.slow
@pytest.mark.parametrize('path', tutorials.pages, ids=lambda o: o.stem)
def test_runs_in_under_five_minutes(path):
    nb,seconds = tutorials.execute(path)
    assert seconds<300 and not [o for c in nb.cells if c.cell_type=='code' for o in c.outputs if o.output_type=='error']

@pytest.mark.parametrize('path', tutorials.plots, ids=lambda o: o.stem)
def test_plots_are_kept(path):
    outs = [o for c in nbformat.read(path,4).cells if c.cell_type=='code' for o in c.outputs]
    assert any('image/png' in o.get('data',{}) for o in outs), f"{path.name}: run `make tutorials PAGES={path.stem.split('_',1)[1]}`"
    assert all('image/png' in o.get('data',{}) for o in outs) and path.stat().st_size<300_000

@pytest.mark.slow
def test_few_labels_shows_a_gain():
    nb,_ = tutorials.execute(root/'nbs/tutorials/few_labels.ipynb')
    table = next(o.data['text/html'] for c in nb.cells if c.cell_type=='code' for o in c.outputs if 'baseline</th>' in o.get('data',{}).get('text/html',''))
    base,*others = [float(o) for o in re.findall(r'([\d.]+) %', table)]
    assert max(others)>base
