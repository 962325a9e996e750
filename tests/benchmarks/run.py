"""All benchmarks: `make bench`, or `python tests/benchmarks/run.py [--quick] [--only step,memory] [--rounds 5] [--out FOLDER]`.
A file for each goes to `results/bench`, with the machine it was measured on, then `summary.csv` and `bench.png`."""
import argparse,csv,importlib,json,shutil,sys,tempfile,time,warnings
from pathlib import Path
here = Path(__file__).parent
sys.path[:0] = [str(here),str(here.parent.parent)]
warnings.simplefilter('ignore')
from common import Settings,machine
from draw import draw

parts = ('pipeline','overhead','memory','step','growth','names')

def show(r):
    "A row of the report in one line"
    spread = f" ({r['low']:.2f} to {r['high']:.2f} in {r['pairs']} pairs)" if r['pairs']>1 else ''
    target = f", target {r['target']:.2f}" if r['target'] else ''
    return f"{r['name']}: {r['ratio']:.3f}×{spread}; {r['mine']:.4g} and {r['other']:.4g} {r['unit']}{target}"

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='tiny images and networks: shows that it runs, measures nothing')
    p.add_argument('--only', default=','.join(parts)); p.add_argument('--rounds', type=int); p.add_argument('--out', type=Path, default=here/'results/bench')
    a = p.parse_args(args)
    a.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    try:
        for name in a.only.split(','):
            start,where = time.time(),machine()
            rows,raw = importlib.import_module(name).run(Settings(a.quick, a.rounds or (1 if a.quick else 5), work))
            if a.quick: rows = [r|dict(target=None) for r in rows]
            (a.out/f'{name}.json').write_text(json.dumps(dict(rows=rows, machine=where, quick=a.quick, seconds=round(time.time()-start), raw=raw), indent=1))
            print(*map(show, rows), sep='\n', flush=True)
    finally: shutil.rmtree(work, ignore_errors=True)
    rows = [r for o in parts if (a.out/f'{o}.json').exists() for r in json.loads((a.out/f'{o}.json').read_text())['rows']]
    with open(a.out/'summary.csv','w',newline='',encoding='utf-8') as f:
        w = csv.DictWriter(f, list(rows[0])); w.writeheader(); w.writerows(rows)
    draw(a.out)
    if a.out==here/'results/bench':
        for o in a.out.glob('*.png'): shutil.copy(o, here.parent.parent/'nbs/images')   # for the page about them

if __name__=='__main__': main()
