"Draw what pages show, from the results of runs: `python tools/figures.py`"
import csv,itertools,math,json,statistics
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt

from readme import differences,equal_share,data_words,objective_runs,objective_words,recipe_runs,root,usual_cpu

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
    ax.axhline(10, color='gray', lw=.8, ls=':'); ax.text(20, 10.6, 'chance', color='gray', fontsize=8)
    ax.set(xlabel='training steps', ylabel='validation accuracy, %', title='Imagewang at 64 px, 1,275 labelled images: two seeds, their mean', xlim=(0,xs[-1]*1.08), ylim=(8,53))
    ax.title.set_size(11); ax.legend(loc='upper left', frameon=False, fontsize=9); ax.spines[['top','right']].set_visible(False)
    fig.savefig(to, dpi=110); plt.close(fig)

def objectives(folder=root/'tests/benchmarks/results/objectives', to=root/'nbs/images/objectives.png'):
    "Points above the baseline of the same seed: a panel for each data set, a dot for each seed, the mean with its standard error"
    files = [o for o in sorted(folder.glob('*.jsonl')) if objective_runs(o)[0]]
    if not files: return
    names = [k for k in objective_words if k!='baseline_ema'][::-1]+['baseline_ema']; names = names[-1:]+names[:-1]
    fig,axs = plt.subplots(1, len(files), figsize=(7.4,5), layout='constrained', sharey=True, squeeze=False)
    for ax,file in zip(axs[0], files):
        base,by = objective_runs(file)
        for kind,dy,color in (('alone',.16,'tab:blue'),('beside rotation, one turn',-.16,'tab:orange')):
            label = kind
            for i,k in enumerate(names):
                full = k if kind=='alone' else next((o for o in by if '+' in o and o.split('+',1)[1]==k), None)
                ds = differences(by.get(full,{}), base)
                if not ds: continue
                ax.plot(ds, [i+dy]*len(ds), 'o', color=color, ms=4, alpha=.45 if len(ds)>1 else 1, label=label if len(ds)==1 else None)
                if len(ds)>1: ax.errorbar(statistics.mean(ds), i+dy, xerr=statistics.stdev(ds)/len(ds)**.5, fmt='D', color=color, ms=5, lw=1.5, label=label)
                label = None
        ax.axvline(0, color='gray', lw=1); ax.grid(axis='x', alpha=.3); ax.spines[['top','right']].set_visible(False)
        ax.set_title(data_words.get(file.stem,file.stem).replace(', ',',\n'), fontsize=10); ax.set_xlabel('points above the baseline')
        ax.set_yticks(range(len(names)), [objective_words[k] for k in names], fontsize=9)
    shown = dict(zip(*axs[0][0].get_legend_handles_labels()[::-1]))
    fig.legend([shown[k] for k in sorted(shown)], sorted(shown), loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    fig.savefig(to, dpi=110); plt.close(fig)

def curves(runs):
    "Thousand image passes, minutes (of the usual machine) and accuracy in % after each epoch, of each run"
    cpu = usual_cpu()
    for r in runs:
        acc = r['history']['accuracy']
        yield [o/1000 for o in r['history']['passes']],[o/60 if r['machine']['cpu']==cpu else math.nan for o in itertools.accumulate(r['history']['seconds'])],[100*o for o in acc]

def recipes(to=root/'nbs/images/recipes.png'):
    "Accuracy over image passes, and over the time that they took: a line for each run"
    of = lambda share,name: recipe_runs().get(share,{}).get(name,[])
    lines = [('best',of(1.,'best'),'tab:blue'), ('best, .3 of the passes',of(.3,'best'),'tab:green'), ('best, supervised baseline',of(1.,'best, supervised baseline'),'tab:cyan'), ('the same, as many passes',of(equal_share,'best, supervised baseline'),'tab:orange'), ('published training, fast recipe',of(1.,'protocol'),'tab:gray')]
    fig,axs = plt.subplots(1, 2, figsize=(7.4,3.4), layout='constrained', sharey=True)
    for label,runs,color in lines:
        for i,(passes,minutes,acc) in enumerate(curves(runs)):
            for ax,xs in zip(axs, (passes,minutes)): ax.plot(xs, acc, '.-', color=color, lw=1, alpha=.8, label=None if i else label)
    for ax,what in zip(axs, ('thousand image passes','minutes on one thread')):
        ax.set_xlabel(what); ax.grid(alpha=.3); ax.spines[['top','right']].set_visible(False); ax.set_ylim(8); ax.set_xlim(0)
    axs[0].set_ylabel('validation accuracy, %'); axs[0].legend(loc='lower right', frameon=False, fontsize=8)
    fig.savefig(to, dpi=110); plt.close(fig)

if __name__=='__main__': effect(); objectives(); recipes()
