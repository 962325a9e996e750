"The results as an image"
import json
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

arms = ('plain','reference','fast')
colours = dict(zip(arms, ('tab:gray','tab:blue','tab:orange')))

def bars(ax, rows):
    "Ratios as points with their range, targets as lines"
    for i,r in enumerate(reversed(rows)):
        good = r['target'] is None or (r['ratio']>=r['target'] if r['target']>2 else r['ratio']<=r['target'])
        ax.plot([r['low'],r['high']], [i,i], color='black', lw=1); ax.plot(r['ratio'], i, 'o', color='tab:green' if good else 'tab:red')
        if r['target']: ax.plot([r['target']]*2, [i-.35,i+.35], color='tab:gray', ls='--')
    ax.set_yticks(range(len(rows)), [r['name'].replace(': ',':\n',1) for r in reversed(rows)], fontsize=8); ax.set_ylim(-.6, len(rows)-.4)
    ax.set_xscale('log'); ax.set_xlabel('ours over the other\ndot: median, line: range, dashes: target')
    ticks = [.25,.5,1,2,4,8]; ax.set_xticks(ticks, map(str, ticks)); ax.minorticks_off(); ax.grid(axis='x', alpha=.3)

def lines(ax, data, x, keys, title, ylabel, log='xy', scale=1., suffix=''):
    for k in keys: ax.plot([o[x] for o in data], [o[k+suffix]*scale for o in data], marker='.', label=k.replace('_',' '), color=colours.get(k))
    if 'x' in log: ax.set_xscale('log')
    if 'y' in log: ax.set_yscale('log')
    else: ax.set_ylim(0, 1.1*ax.get_ylim()[1])
    if 'y' in log: ax.yaxis.set_major_locator(LogLocator(subs=(1,2,5) if np.divide(*ax.get_ylim()[::-1])<200 else (1,)))
    ax.set_xticks([o[x] for o in data], [f'{o[x]:,}' for o in data]); ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda v,_: f'{v:g}')
    ax.set_title(title, fontsize=10); ax.set_xlabel(x, fontsize=9); ax.set_ylabel(ylabel, fontsize=9); ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, loc='upper center', bbox_to_anchor=(.5,-.2), ncols=3 if len(keys)<4 else 2, frameon=False)   # below, where no line is

def draw(out):
    "Write `bench.png` from the JSON files of `out`"
    res = {o.stem:json.loads(o.read_text()) for o in Path(out).glob('*.json')}
    rows = [r for k in ('step','pipeline','overhead','memory') if k in res for r in res[k]['rows']]
    if rows:
        fig,ax = plt.subplots(figsize=(8,.42*len(rows)+1), layout='constrained')
        bars(ax, rows); fig.savefig(Path(out)/'bench.png', dpi=110); plt.close(fig)
    if 'growth' in res:
        g = res['growth']['raw']
        fig,axs = plt.subplots(4, 2, figsize=(8.5,14), layout='constrained')
        axs = axs.flatten()
        if 'names' not in res: axs[-1].axis('off')
        lines(axs[0], g['images'], 'images', ('build_seconds','open_seconds','pass_seconds'), 'To make the cache, to open it, a pass', 's')
        lines(axs[1], g['images'], 'images', ('cache_bytes','pass_memory'), 'Size of the cache, memory after a pass', 'MB', scale=1e-6)
        lines(axs[2], g['batch'], 'images', arms, 'Time of a step, by images in it', 's')
        lines(axs[3], g['batch'], 'images', ('joint','sequential'), 'Memory for activations, by images in a step', 'MB', scale=1e-6)
        lines(axs[4], g['batch'], 'images', ('overhead',), 'Our overhead over the bare step', 'ratio', log='x')
        lines(axs[5], g['workers'], 'workers', arms, 'Data alone, by workers', 'images/s', log='')
        lines(axs[6], g['workers'], 'workers', arms, 'A step, by workers a stream', 's', log='', suffix=' step')
        if 'names' in res: lines(axs[7], res['names']['raw'], 'files', [k for k in res['names']['raw'][0] if k!='files'], 'Listing and ordering, by number of files', 's')
        fig.savefig(Path(out)/'growth.png', dpi=110); plt.close(fig)
