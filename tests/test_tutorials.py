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

@pytest.mark.slow
@pytest.mark.parametrize('path', tutorials.pages, ids=lambda o: o.stem)
def test_runs_in_under_five_minutes(path):
    nb,seconds = tutorials.execute(path)
    assert seconds<300 and not [o for c in nb.cells if c.cell_type=='code' for o in c.outputs if o.output_type=='error']

@pytest.mark.slow
def test_few_labels_shows_a_gain():
    nb,_ = tutorials.execute(root/'nbs/tutorials/few_labels.ipynb')
    table = next(o.data['text/html'] for c in nb.cells if c.cell_type=='code' for o in c.outputs if 'baseline</th>' in o.get('data',{}).get('text/html',''))
    base,*others = [float(o) for o in re.findall(r'([\d.]+) %', table)]
    assert max(others)>base
