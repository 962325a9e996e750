"Write what is generated: README.md from nbs/index.ipynb, and tables of pages from the docstrings and results of tests; `--check` only compares"
import ast,csv,functools,json,re,shutil,statistics,sys
from configparser import ConfigParser
from pathlib import Path
import nbformat

root = Path(__file__).parent.parent
_parser = ConfigParser(delimiters=['=']); _parser.read(root/'settings.ini', encoding='utf-8')
cfg = _parser['DEFAULT']
results = root/'tests/benchmarks/results'

def with_settings(
    text:str, # Markdown
    parts:bool=False # Whether it is a whole page, of which each paragraph is looked at
)->str|None: # The text, or None where what it needs isn't set
    "Fills in `{{name}}` from settings.ini; a text that begins with `<!-- needs name -->` is left out where that is empty"
    if parts: return '\n\n'.join(o for p in text.split('\n\n') if (o := with_settings(p)) is not None)
    m = re.match(r'<!-- needs (\w+) -->\n?', text)
    if m and not cfg.get(m[1]): return None
    return re.sub(r'\{\{(\w+)\}\}', lambda o: cfg[o[1]], text[m.end():] if m else text)

def render(index):
    "Markdown of the index notebook's text: its prose, and its code cells as Python"
    parts = []
    for c in nbformat.reads(index, 4).cells:
        src = c.source.strip()
        if re.search(r'^#\|\s*(hide|include:\s*false|echo:\s*false)', src, re.M): continue
        src = with_settings(src) if c.cell_type=='markdown' else src
        src = re.sub(r'^(#\|.*|<!-- (table|end) -->)\n?', '', src or '', flags=re.M).strip()
        if not src: continue
        parts.append(src if c.cell_type=='markdown' else f'```python\n{src}\n```')
    text = '\n\n'.join(parts)+'\n'
    return re.sub(r'\]\((?![a-z]+:|#)', '](nbs/', text).replace('](nbs/about/contributing.md', '](CONTRIBUTING.md').replace('](nbs/about/changelog.md', '](CHANGELOG.md')

# Page: the tests it shows, and what its first two columns are called
pages = {'learner_features': (('matrix','distributed'), 'with', 'what is checked', True), 'hard_cases': (('hard_cases',), 'data', 'outcome')}

# Topics of the page about fastai's features, by what the name of a test says; the first that fits
topics = {'Several processes':r'^distributed', 'Losses, targets and data':r'losses|mixup|multi_label|regression|vision_learner|data_block|datablock|weight',
    'Precision, memory and gradients':r'bfloat|precision|channels_last|accumulation|clip|sequential|groups', 'Recording and showing':r'column|csv|plot|progress|tensorboard|wandb|summary|interpretation|validate_predict|show',
    'Saving, stopping and going on':r'save|load|stopping|plateau|nan|cancel|two_fits|add_|cbs|export|interrupt|resume', 'Fitting and schedules':r''}

def rows_of(tests):
    "What a test's docstring says up to its first colon, the rest, its name, and the file, for each test of some files"
    for nm in tests:
        for o in ast.parse((root/f'tests/test_{nm}.py').read_text(encoding='utf-8')).body:
            if isinstance(o, ast.FunctionDef) and o.name.startswith('test_') and ast.get_docstring(o): yield *ast.get_docstring(o).partition(': ')[::2],o.name,nm

def table(tests, what, checked, topics=None):
    "A row for each test of some files, in one table or, by topic, in several"
    head = [f'| {what} | {checked} | test |','| --- | --- | --- |']
    row = lambda o: f"| {o[0]} | {' '.join(o[1].split())} | `{o[2]}` |"
    if not topics: return '\n'.join([*head, *map(row, rows_of(tests))])
    by = {k:[] for k in topics}
    for o in rows_of(tests): by[next(k for k,v in topics.items() if re.search(v, f'{o[3]} {o[2]}'))].append(o)
    order = [*reversed(by)]
    return '\n\n'.join(f"## {k}\n\n"+'\n'.join([*head,*map(row,by[k])]) for k in order if by[k])

def mutants():
    "What became of each breakage in the last run of tests/mutants.py"
    if not (root/'tests/results/mutants.json').exists(): return 'Not run yet: `make mutants`.'
    res,code = json.loads((root/'tests/results/mutants.json').read_text(encoding='utf-8')),lambda s: '`` '+' '.join(s.replace('|','\\|').split())+' ``' if s.strip() else 'nothing'
    n = sum(o['outcome']!='survived' for o in res)
    return '\n'.join([f"Of {len(res)} breakages {n} were noticed.", '', '| module | instead of | stands | noticed by |', '| --- | --- | --- | --- |',
        *(f"| {o['module']} | {code(o['old'])} | {code(o['new'])} | "+(f"`{o['by'].split('::')[-1]}`" if o['by'] else f"it hangs" if o['outcome']=='hangs' else f"nothing: {o['why']}")+' |' for o in res)])

def kills():
    "What the runs of tests/test_resume.py survived"
    res = json.loads((root/'tests/results/kills.json').read_text(encoding='utf-8'))
    places = list(next(iter(res.values()))['kills'])
    n = sum(sum(o['kills'].values()) for o in res.values())
    return '\n'.join([f"{n} kills over {len(res)} settings, in {sum(o['runs'] for o in res.values())} runs: each ended as the run that was never stopped, bitwise.", '',
        '| settings | '+' | '.join(o.replace('_',' ') for o in places)+' |', '| --- |'+' --- |'*len(places),
        *(f"| {k} | "+' | '.join(str(o['kills'][p]) for p in places)+' |' for k,o in res.items())])

def bench(*parts):
    "Results by part, of those that were measured"
    return {o.stem:json.loads(o.read_text(encoding='utf-8')) for o in (results/f'bench/{k}.json' for k in parts) if o.exists()}

bench_titles = dict(step='Time', pipeline='Time', overhead='Time', memory='Memory', growth='Growth', names='Growth')

def num(v, unit): return f'{v:.3g}\u00a0{unit}' if v<1000 else f'{v:,.0f}\u00a0{unit}'

def benchmarks():
    "The ratios of the last `make bench`, and what they were measured on"
    res = bench('step','pipeline','overhead','memory','growth','names')
    if not res: return 'Not run yet: `make bench`.'
    head,rows,before = ['','| figure | ratio | pairs | ours | other | target |','| --- | --- | --- | --- | --- | --- |'],[],None
    for title,r in ((bench_titles[k],r) for k,o in res.items() for r in o['rows']):
        if title!=before: rows += ['',f'### {title}',*head]; before = title
        spread = f" ({r['low']:.2f} to {r['high']:.2f})" if r['pairs']>1 else ''
        rows.append(f"| {r['name']} | {r['ratio']:.2f}×{spread} | {r['pairs']} | {num(r['mine'],r['unit'])} | {num(r['other'],r['unit'])} | "+(f"{'≥' if r['target']>2 else '≤'} {r['target']:.2f}× |" if r['target'] else '|'))
    on = {}
    for k,m in ((k,o['machine']) for k,o in res.items()): on.setdefault(f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, torch {m['torch']}, {m['time'][:10]}, at {m['commit']}", []).append(k)
    start = f" To the first batch of an epoch with two workers it takes {res['growth']['raw']['worker_start_seconds']:.1f} s." if 'growth' in res else ''
    return '\n'.join([*rows[1:], '', 'Measured on '+'; '.join(f"{m} ({', '.join(v)})" for m,v in on.items())+'.'+start, '', '![Each ratio of the tables above as a dot with its range, and its target](images/bench.png)', '', '![How time and memory grow with the number of images, of files, of images in a batch, and of workers](images/growth.png)'])

def gpu():
    "What `make gpu` found: figures, and what became of each test; a sentence where it hasn't been run"
    file = root/'tests/results/gpu.json'
    if not file.exists(): return 'No line of this library has been run on a GPU yet: `make gpu` does that, is meant to take less than ten minutes, and writes these tables; see [several GPUs](howto/several_gpus.md#test-your-gpu).'
    res = json.loads(file.read_text(encoding='utf-8')); card,m = res['card'],res['machine']
    rows = ['| figure | median | ratio | target |','| --- | --- | --- | --- |']
    rows += [f"| {r['name']} | {num(r['value'], r['unit'])} | "+(f"{r['ratio']:.2f}×"+(f" ({r['low']:.2f} to {r['high']:.2f})" if r['n']>1 else '') if r['ratio'] else '')+' | '+(f"≤ {r['target']:.2f}× |" if r['target'] else '|') for r in res['rows']]
    by = {}
    for o in res['tests']: by.setdefault(re.search(r'::(\w+)', o['test'])[1], []).append(o)
    def became(tests):
        n = {}
        for o in tests: k = o['outcome']+(f" ({o['message'].removeprefix('Skipped: ')})" if o['outcome']=='skipped' else ''); n[k] = n.get(k, 0)+1
        return ', '.join(f'{v} {k}' for k,v in n.items())
    about = {name:(what,rest) for what,rest,name,_ in rows_of(('cuda',))}
    tests = ['| what | what is checked | cases | test |','| --- | --- | --- | --- |',*(f"| {' | '.join(' '.join(o.split()) for o in about.get(k, ('','')))} | {became(v)} | `{k}` |" for k,v in by.items())]
    where = f"{card['name']}, {card.get('memory_gb')} GB, compute capability {card.get('capability')}, driver {card.get('driver')}, CUDA {card.get('cuda')}; {m['cores']} cores of {m['cpu']}; torch {m['torch']}, fastai {m['fastai']}, {m['time'][:10]}, at {m['commit']}"
    wrong = ''.join(f"\n\n{o['part']}: {o['message']}" for o in res['errors'])
    return '\n'.join([*rows, '', *tests, '', f'Measured on {where}.'])+wrong

def runs(folder, what='run'):
    "Accuracy in % by seed of the runs in `folder` of the benchmarks' results"
    found = [json.loads(o.read_text(encoding='utf-8')) for o in sorted((results/folder).glob(f'{what}-*/results.json'))]
    return {o['seed']:o['accuracy'] for o in found}

def accuracies():
    "What both recipes reached with the same seeds, as a table and in a sentence, which is empty below two seeds"
    acc = {k:runs(f'recipes/{k}') for k in ('reference','fast')}
    seeds = sorted(acc['reference'].keys()&acc['fast'].keys())
    rows = ['| seed | reference | fast |','| --- | --- | --- |',*(f"| {o} | {acc['reference'][o]:.2f} % | {acc['fast'][o]:.2f} % |" for o in seeds)]
    if len(seeds)<2: return '\n'.join(rows),''
    (m,e),(m2,e2) = ((statistics.mean(v),statistics.stdev(v)/len(v)**.5) for v in ([o[k] for k in seeds] for o in acc.values()))
    rows.append(f"| mean ± standard error | {m:.2f} % ± {e:.2f} | {m2:.2f} % ± {e2:.2f} |")
    return '\n'.join(rows),f"Accuracy over {len(seeds)} seeds: {m2:.2f} % with the fast recipe, {m:.2f} % with the reference; {m2-m:+.2f} points, with a standard error of {(e*e+e2*e2)**.5:.2f}."

def baselines(folder='imagewang-80', name='SESEMI'):
    "Runs and their supervised baselines of as many steps"
    one,two = (runs(folder, o) for o in ('run','baseline'))
    a,b = [one[k] for k in two],[*two.values()]
    mean,sd = statistics.mean,statistics.stdev
    return '\n'.join([f'| seed | {name} | supervised baseline, equal steps | difference |', '| --- | --- | --- | --- |', *(f'| {k} | {one[k]:.2f} % | {v:.2f} % | {one[k]-v:+.2f} |' for k,v in two.items()),
        f'| mean ± sample standard deviation | {mean(a):.2f} % ± {sd(a):.2f} | {mean(b):.2f} % ± {sd(b):.2f} | {mean(a)-mean(b):+.2f} |'])

def sample():
    "The packaged sample's runs, their difference with its interval as the report words it, and what they cost"
    said = (results/'sample/leaderboard.md').read_text(encoding='utf-8')
    one,two = (json.loads((results/f'sample/{k}-0/results.json').read_text(encoding='utf-8'))['image_passes'] for k in ('run','baseline'))
    return f"{baselines('sample','FixMatch')}\n\n{re.search(r'^Difference: .*', said, re.M)[0]} Image passes of a run: {one:,}, of a baseline: {two:,}."

def history(folder='imagewang-80/run-1'):
    "The table that fastai printed in a run"
    rows = [*csv.DictReader((results/folder/'history.csv').open())]
    rows = [{k.replace('pretext_','rotation_'):v for k,v in r.items()} for r in rows]   # as the columns are called today
    return '\n'.join(['| '+' | '.join(rows[0])+' |', '| --- |'+' --- |'*(len(rows[0])-1), *('| '+' | '.join(f'{float(v):.4f}' if '.' in v else v for v in r.values())+' |' for r in rows)])

def gain():
    "What unlabelled images gained on Imagewang, and what they cost"
    both = [[json.loads(o.read_text(encoding='utf-8')) for o in sorted((results/'imagewang-80').glob(f'{k}-*/results.json'))] for k in ('run','baseline')]
    acc,sec,passes = ([[o[k] for o in rs] for rs in both] for k in ('accuracy','seconds','image_passes'))
    mean,sd = statistics.mean,statistics.stdev
    rows = [f"| {nm} | {mean(a):.2f} % ± {sd(a):.2f} | {mean(p):,.0f} | {mean(s)/60:.0f} min |" for nm,a,p,s in zip(('rotation on unlabelled images','supervised baseline, equal steps'),acc,passes,sec)]
    return '\n'.join([f'| Imagewang, 64 px, ResNet-18, {len(acc[0])} seeds | accuracy ± sample standard deviation | image passes | time on two cores |','| --- | --- | --- | --- |',*rows,'',
        f"{mean(acc[0])-mean(acc[1]):+.1f} points with 1,275 labelled images and 12,954 in the unlabelled pool, for {mean(sec[0])/mean(sec[1]):.1f} times the time of a supervised step.", *best_words()])

def best_words():
    "What `recipe='best'` reached at equal image passes, beside its baseline and the published training; nothing where it wasn't run"
    by = recipe_runs().get(1.,{}); best,base,published = (by.get(k,[]) for k in ('best','best, supervised baseline','protocol')); long = recipe_runs().get(equal_share,{}).get('best, supervised baseline')
    if not (best and base and published): return []
    mean = lambda rs,k: statistics.mean(r[k] for r in rs)
    diffs = differences({r['seed']:r for r in best}, {r['seed']:r for r in base})
    longer = f", and that of equal image passes {mean(long,'accuracy'):.1f} %" if long else ''
    return ['', f"The parts of [`recipe='best'`](which_recipe.ipynb), with 18 layers (xresnet with SiLU, Ranger, progressive resizing, pseudo-labels late in training), reached {with_error([r['accuracy'] for r in best],'.1f')} % for as many image passes; their supervised baseline of equal steps {with_error([r['accuracy'] for r in base],'.1f')} %, {with_error(diffs,'.1f')} points less (mean ± standard error, {len(best)} seeds){longer}. They took {statistics.median(r['seconds'] for r in best)/mean(published,'seconds'):.1f} times as long as the published training with the fast recipe, side by side. The 50 layers that the recipe has by default haven't been trained to the end."]

# What the runs of tests/benchmarks/objectives.py are called, and their data
objective_words = dict(rotation='rotation, four turns of each image', rotation_one='rotation, one turn of each image', jigsaw='jigsaw', entropy='entropy minimisation', pseudo_label='pseudo-label', pi_model='Pi model',
    mean_teacher='mean teacher', vat='VAT', fixmatch='FixMatch', fixmatch_free="FixMatch with FreeMatch's thresholds", fixmatch_soft="FixMatch with SoftMatch's weights", barlow_twins='Barlow Twins', baseline_ema='no objective, averaged weights')
data_words = dict(fashionwang='Fashion-MNIST, the packaged sample', imagewang='Imagewang')

def objective_runs(file):
    "Runs of a file by name, then by seed; the baseline's apart"
    by = {}
    for r in map(json.loads, file.read_text(encoding='utf-8').splitlines()): by.setdefault(r['name'],{})[r['seed']] = r
    return by.pop('baseline',{}),by

def differences(runs, base):
    "Points of accuracy above the baseline of the same seed, by seed"
    return [runs[o]['accuracy']-base[o]['accuracy'] for o in sorted(runs.keys()&base.keys())]

def with_error(xs, spec):
    "Mean, with its standard error where there are two or more"
    return format(statistics.mean(xs), spec)+(f" ± {statistics.stdev(xs)/len(xs)**.5:{spec[-3:]}}" if len(xs)>1 else '')

def measured_objectives():
    "What each objective gave in the runs of tests/benchmarks/objectives.py, beside the baseline with the same seeds"
    parts = []
    for file in sorted((results/'objectives').glob('*.jsonl')):
        base,by = objective_runs(file)
        if not base: continue
        r,n = next(iter(base.values())),len(base)
        def cell(name):
            diffs = differences(by.get(name,{}), base)
            few = f", {len(diffs)} of {n} seeds" if diffs and len(diffs)<n else ''
            return f"{statistics.mean(o['accuracy'] for k,o in by[name].items() if k in base):.1f}\u00a0% ({with_error(diffs,'+.1f')}{few})" if diffs else ''
        alone = sorted((k for k in by if '+' not in k), key=lambda k: -statistics.mean(differences(by[k],base) or [-100]))
        other = lambda k: cell(next((o for o in by if '+' in o and o.split('+',1)[1]==k), ''))
        parts += ['', f"### {data_words.get(file.stem,file.stem)}", '', f"{r['steps']} steps of {r['bs']} labelled images, {n} seed{'s' if n>1 else ''}. The supervised baseline reached {with_error([o['accuracy'] for o in base.values()],'.2f')} %.", '',
            '| objective | alone | beside rotation, one turn |', '| --- | --- | --- |', *(f"| {objective_words.get(k,k)} | {cell(k)} | {other(k)} |" for k in alone)]
    if not parts: return 'Not measured yet: `python tests/benchmarks/objectives.py fashionwang`.'
    return '\n'.join(['In brackets: points above the baseline of the same seed'+', ± the standard error over seeds' *any(' ± ' in o for o in parts)+'.', '', '![Points of accuracy above the baseline for each objective, alone and beside rotation, a dot for each seed](images/objectives.png)', *parts])

def pretrained():
    "What each objective gave to pretrained weights in the runs of tests/benchmarks/pretrained.py, beside the baseline with the same seeds"
    base,by = objective_runs(results/'pretrained.jsonl')
    words = objective_words|dict(fixmatch_bn="FixMatch, `bn='batch'`", fixmatch_ema='FixMatch, averaged weights as teacher', rotation_fixmatch='rotation, one turn, and FixMatch')
    rows = [f"| {words[k]} | {len(rs)} | {statistics.mean(o['accuracy'] for o in rs.values()):.1f} % | {with_error(differences(rs,base),'+.1f')} |" for k,rs in sorted(by.items(), key=lambda o: -statistics.mean(differences(o[1],base)))]
    return '\n'.join(['| on unlabelled images | seeds | accuracy | points above the baseline |','| --- | --- | --- | --- |',*rows,f"| nothing: the supervised baseline | {len(base)} | {with_error([o['accuracy'] for o in base.values()],'.1f')} % | |"])

equal_share = 2.4   # Of the steps of `best`: a supervised baseline of so many makes as many image passes as `best`

# What the runs of tests/benchmarks/recipes.py are called
trial_words = dict(protocol='the published training, fast recipe', best='`best`', protocol_one='published, one random rotation of each of four times as many images', protocol_xresnet='published, xresnet18 with SiLU', protocol_ranger='published, Ranger and its schedule', protocol_smoothing='published, label smoothing', protocol_mixup='published, MixUp',
    protocol_growing='published, progressive resizing', protocol_no_dropout='published, no dropout', protocol_fixmatch='published, pseudo-labels late', protocol_extra="published, Imagenette's classes as labels and images", best_mixup='`best` and MixUp .4', best_no_growing='`best` without progressive resizing', best_no_smoothing='`best` without label smoothing',
    best_no_fixmatch='`best` without pseudo-labels', best_no_rotation='`best` without rotation', best_four='`best`, all four rotations of a quarter of the images', best_mish='`best`, Mish', best_relu='`best`, ReLU', best_resnet="`best`, torchvision's ResNet-18", best_timm="`best`, timm's resnet18d", best_adamw='`best`, AdamW', best_nesterov="`best`, the published optimizer and schedule",
    best_bs64='`best`, 64 images of each kind a step', best_ema='`best`, averaged weights', best_bn='`best`, unlabelled passes move no running averages', best_no_val='`best`, `val` not in the pool', best_labels="`best`, Imagenette's classes as labels", best_images="`best`, Imagenette's images in the pool", best_extra="`best`, Imagenette's classes as labels and images",
    protocol_50='published, ResNet-50', best_50='`best`, xresnet50 with SiLU',
    turns_adamw='`best` without pseudo-labels, AdamW', turns16_48='`best` without pseudo-labels, MixUp .2, 16 labelled and 48 unlabelled images a step', mish='`best` without pseudo-labels, Mish, MixUp .4', mish_growing_half='`best` without pseudo-labels, Mish, MixUp .4, progressive resizing in the first half',
    plain='`best` without pseudo-labels and progressive resizing, Mish', plain_growing='`best` without pseudo-labels, Mish, progressive resizing in the first half', plain64='`best` without pseudo-labels and progressive resizing, Mish, 64 a step', relu64='`best` without pseudo-labels and progressive resizing, ReLU, 64 a step', relu64_images="`best` without pseudo-labels and progressive resizing, ReLU, 64 a step, Imagenette's images in the pool", relu64_extra="`best` without pseudo-labels and progressive resizing, ReLU, 64 a step, Imagenette's classes as labels and images", relu32_96='`best` without pseudo-labels and progressive resizing, ReLU, 32 labelled and 96 unlabelled')

@functools.cache
def recipe_runs():
    "Runs of tests/benchmarks/recipes.py: by share of the passes, the largest first, those of each name; baselines apart"
    by,file = {},results/'recipes/trials.jsonl'
    for r in map(json.loads, file.read_text(encoding='utf-8').splitlines() if file.exists() else []): by.setdefault(r['share'],{}).setdefault(r['name']+', supervised baseline'*r['baseline'],[]).append(r)
    return dict(sorted(by.items(), reverse=True))

def usual_cpu():
    "The processor that most of the runs had: times of others aren't comparable"
    cpus = [r['machine']['cpu'] for by in recipe_runs().values() for rs in by.values() for r in rs]
    return statistics.mode(cpus) if cpus else None

def tried_recipes(shares):
    "What recipes reached at equal image passes, the best first, a table for each of some shares of them; a supervised baseline beside each that has one"
    parts = []
    mean = lambda rs,k: statistics.mean(o[k] for o in rs)
    cpu = usual_cpu()
    def minutes(rs):
        "Of the runs on the machine that made most of them; nothing where there are none"
        usual = [r for r in rs if r['machine']['cpu']==cpu]
        return f"{mean(usual,'seconds')/60:.0f}" if usual else ''
    for by in filter(None, shares):
        parts += ['', f"### {next(v[0]['passes'] for v in by.values() if not v[0]['baseline']):,} image passes", '', '| recipe | seeds | accuracy | choosing, reporting | baseline | minutes |','| --- | --- | --- | --- | --- | --- |']
        for name,rs in sorted(((k,v) for k,v in by.items() if not v[0]['baseline']), key=lambda o: -mean(o[1],'accuracy')):
            base = by.get(f'{name}, supervised baseline',[])
            parts.append(f"| {trial_words[name]} | {len(rs)} | {with_error([r['accuracy'] for r in rs],'.1f')} % | {mean(rs,'choose'):.1f}, {mean(rs,'report'):.1f} % | {with_error([r['accuracy'] for r in base],'.1f')+' %' if base else ''} | {minutes(rs)} |")
    return '\n'.join(parts).strip()

# A part of a recipe, the trial where the published training has it, and the trial where `best` hasn't it, or, after a plus, has it beside its own
recipe_parts = {'xresnet with SiLU for torchvision\'s ResNet':('protocol_xresnet','best_resnet'), 'Ranger, flat, then a cosine':('protocol_ranger','best_nesterov'), 'one random rotation of each of four times as many images':('protocol_one','best_four'), 'progressive resizing':('protocol_growing','best_no_growing'),
    'pseudo-labels late in training':('protocol_fixmatch','best_no_fixmatch'), 'rotation':(None,'best_no_rotation'), 'label smoothing':('protocol_smoothing','best_no_smoothing'), 'no dropout':('protocol_no_dropout',None), 'MixUp .4':('protocol_mixup','+best_mixup'), "Imagenette's classes as labels and images":('protocol_extra','+best_extra'),
    "Imagenette's classes as labels":(None,'+best_labels'), "Imagenette's images in the pool":(None,'+best_images'), 'averaged weights':(None,'+best_ema'), '`val` in the pool':(None,'best_no_val'),
    'Ranger rather than AdamW, with the same schedule':(None,'best_adamw'), 'SiLU rather than ReLU':(None,'best_relu'), 'SiLU rather than Mish':(None,'best_mish'), "fastai's xresnet18 with SiLU rather than timm's resnet18d":(None,'best_timm'), '32 images of each kind a step rather than 64':(None,'best_bs64'), 'unlabelled passes move the running averages, too':(None,'best_bn')}

def part_by_part():
    "Points of accuracy that a part gives at a quarter of the image passes, in the published training and in `best`, and in `best` with all of them, over the seeds that both have"
    by = {share:{k:{r['seed']:r for r in rs} for k,rs in runs.items()} for share,runs in recipe_runs().items()}
    def cell(share, name, base):
        runs = by.get(share,{})
        if not name or name.strip('+') not in runs or base not in runs: return ''
        diffs = differences(runs[name.strip('+')], runs[base])
        return with_error(diffs if '+' in name or base=='protocol' else [-o for o in diffs], '+.1f') if diffs else ''
    rows = [(k,cell(.25,a,'protocol'),cell(.25,b,'best'),cell(1.,b,'best')) for k,(a,b) in recipe_parts.items()]
    return '\n'.join(['| part | in the published training, a quarter of the passes | in `best`, a quarter | in `best`, all passes |', '| --- | --- | --- | --- |', *(f"| {k} | {' | '.join(o)} |" for k,*o in rows if any(o))])

def equal_passes():
    "`best`, its baseline of as many steps, and that of as many image passes, which are more steps"
    by = recipe_runs(); base = 'best, supervised baseline'
    runs = {'`best`':by.get(1.,{}).get('best'), 'supervised baseline, as many steps':by.get(1.,{}).get(base), 'supervised baseline, as many image passes':by.get(equal_share,{}).get(base)}
    return '\n'.join(['| training | seeds | steps | image passes | accuracy |', '| --- | --- | --- | --- | --- |', *(f"| {k} | {len(rs)} | {rs[0]['steps']:,} | {rs[0]['passes']:,} | {with_error([r['accuracy'] for r in rs],'.1f')} % |" for k,rs in runs.items() if rs)])

def with_tables(text, tables):
    "The notebook's source with each table between its two marks, in order"
    nb,tables = nbformat.reads(text, 4),iter(tables)
    for c in nb.cells:
        if '<!-- table -->' in c.source: c.source = '<!-- table -->\n'+next(tables)+'\n<!-- end -->'
    return nbformat.writes(nb, 4)+'\n'

if __name__=='__main__':
    if '--check' not in sys.argv and (results/'objectives').exists():
        import figures
        figures.objectives(); figures.recipes()
    texts,(acc,said),by = {},accuracies(),recipe_runs()
    whole,short = by.get(1.,{}),[o for share,o in by.items() if share<1]
    made = {**{k:[table(*v[:3], topics=topics if v[3:] else None)] for k,v in pages.items()}, 'mutants':[mutants()], next(root.glob('nbs/*_resume.ipynb')).stem:[kills()], 'fast':[benchmarks(),gpu(),f'{acc}\n\n{said}'],
        'index':[history(),gain()], 'which_objective':[measured_objectives()], 'about/results':[baselines(),sample(),f'{acc}\n\n{said}'], 'tutorials/pretrained':[pretrained()], 'which_recipe':[tried_recipes([whole]),equal_passes(),part_by_part(),tried_recipes(short)]}
    for name,tables in made.items():
        page = root/f'nbs/{name}.ipynb'; texts[page] = with_tables(page.read_text(encoding='utf-8'), tables)
    texts[root/'README.md'] = render(texts[root/'nbs/index.ipynb'])
    for n in ('bench','growth'):   # drawn by the command that measured
        drawn,shown = results/f'bench/{n}.png',root/f'nbs/images/{n}.png'
        if '--check' not in sys.argv: shutil.copyfile(drawn, shown)
        elif drawn.read_bytes()!=shown.read_bytes(): sys.exit(f'{shown.name} differs from what `make bench` has drawn: run `make prepare`.')
    for path,text in texts.items():
        if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
        elif not path.exists() or path.read_text(encoding='utf-8')!=text: sys.exit(f'{path.name} differs from what it is made from: run `make prepare`.')
