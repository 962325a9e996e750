"Draw what the front page shows, from the results of runs: `python tools/figures.py`"
import csv,json
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt

root = Path(__file__).parent.parent

def effect(folder=root/'tests/benchmarks/results/imagewang-80', to=root/'nbs/images/effect.png'):
    "Validation accuracy of runs and their supervised baselines, by step"
    fig,ax = plt.subplots(figsize=(7,3.2), layout='constrained')
    for kind,label,color in (('run','SESEMI: rotation on unlabelled images','tab:blue'),('baseline','supervised baseline, equal steps','tab:gray')):
        for k,o in enumerate(sorted(folder.glob(f'{kind}-*'))):
            res,rows = json.loads((o/'results.json').read_text()),[*csv.DictReader((o/'history.csv').open())]
            xs,ys = [(i+1)*res['steps_per_epoch'] for i in range(len(rows))],[100*float(r['accuracy']) for r in rows]
            ax.plot(xs, ys, marker='o', color=color, alpha=1-.45*k, label=label if not k else None)
            last = [*last,ys[-1]] if k else [ys[-1]]
        ax.annotate(f"{sum(last)/len(last):.1f} %", (xs[-1],sum(last)/len(last)), xytext=(8,-4), textcoords='offset points', color=color)
    ax.axhline(10, color='gray', lw=.8, ls=':'); ax.text(xs[0], 10.6, 'chance', color='gray', fontsize=8)
    ax.set(xlabel='training steps', ylabel='validation accuracy, %', title='Imagewang at 64 px, 1,275 labelled images: two seeds, their mean', xlim=(None,xs[-1]*1.08), ylim=(8,50))
    ax.title.set_size(11); ax.legend(loc='lower right', frameon=False, fontsize=9); ax.spines[['top','right']].set_visible(False)
    fig.savefig(to, dpi=110); plt.close(fig)

if __name__=='__main__': effect()
