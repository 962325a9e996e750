"""Build the site: `stage` writes the pages to `_proc`, with an entry for every public name; smalldocs renders them into `_docs`; `mend` repairs what it leaves out; `check_site.py` looks for faults.

`_proc` is an ordinary Quarto project, so that `quarto render _proc` builds the same pages. No cell is executed: entries are made from the imported package, outputs are those that the notebooks hold."""
import ast,html,importlib,inspect,json,os,posixpath,re,shutil,sys,warnings
from pathlib import Path
import nbformat,yaml
warnings.filterwarnings('ignore')
from fastcore.docments import docments
from readme import root,cfg,with_settings
from fastai.callback.core import event
from check_site import check,params_of,doc_of

nbs,proc,docs = root/'nbs',root/'_proc',root/'_docs'
also = {'CHANGELOG.md':'about/changelog.md', 'CONTRIBUTING.md':'about/contributing.md'}  # pages whose source lies beside nbs
_numbered = re.compile(r'^\d+[a-z]*_(\w+)\.ipynb$')

def staged(
    src:str # Path below nbs
)->str: # Path below `_proc`
    "Notebooks of modules go to `api/` under the module's name, so that their addresses don't change with their numbers"
    m = _numbered.match(src)
    return f'api/{m[1]}.ipynb' if m else src

def sources():
    "Text of each page by its path below nbs; files of the repository's root that are pages are among them"
    files = sorted(o for o in nbs.rglob('*') if o.suffix in ('.ipynb','.md') and not any(p[0] in '._' for p in o.relative_to(nbs).parts))
    return {**{o.relative_to(nbs).as_posix():o.read_text(encoding='utf-8') for o in files}, **{v:(root/k).read_text(encoding='utf-8') for k,v in also.items() if (root/k).exists()}}

# ---- entries of the API

def directives(src):
    "The `#|` directives of a cell, as name to value"
    return dict((a,b.strip()) for a,b in re.findall(r'^#\|\s*([\w-]+):?(.*)$', src, re.M))

_events,_comments = {k for k in vars(event) if k[0]!='_'},{}

def _function(o):
    "What a static or class method is made of, a patched one too"
    return getattr(o,'__func__',None) or (o.f if type(o).__name__=='_clsmethod' else o)

def public(module, src):
    "Names that a cell exports, as (name to show, object): functions, classes, patched methods, and constants"
    for o in ast.parse(src).body:
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)) and o.name[0]!='_':
            if o.name in _events: continue   # fastai calls those, no reader does
            patched = isinstance(o, ast.FunctionDef) and any(getattr(getattr(d,'func',d),'id','')=='patch' for d in o.decorator_list)
            if not patched:
                yield o.name,getattr(module,o.name)
                if isinstance(o, ast.ClassDef): yield from methods(getattr(module,o.name), {f.name for f in o.body if isinstance(f, ast.FunctionDef)})
                continue
            anno = o.args.args[0].annotation
            for cls in anno.elts if isinstance(anno,ast.Tuple) else [anno]:
                nm = ast.unparse(cls); yield f'{nm}.{o.name}',_function(inspect.getattr_static(eval(nm, vars(module)), o.name))
        elif isinstance(o, ast.Assign) and isinstance(o.targets[0], ast.Name) and (nm := o.targets[0].id) in getattr(module,'__all__',[]):
            if m := re.search(rf'^{nm} = [^\n#]*# (.*)$', src, re.M): _comments[nm] = m[1]
            yield nm,getattr(module,nm)

def methods(cls, names):
    "Of these methods of a class those that a reader calls: public, and with documented parameters or made by the class"
    for k,o in vars(cls).items():
        f = _function(o)
        if k[0]=='_' or k in _events or k not in names or not inspect.isfunction(f): continue
        if isinstance(o,classmethod) or any(p.docment for n,p in docments(f, full=True).items() if n not in ('self','cls')): yield f'{cls.__name__}.{k}',f

def _value(o):
    s = getattr(o,'__name__',None) or repr(o)
    return s if len(s)<60 else s[:57]+'…'

def _anno(o):
    if o is inspect.Parameter.empty: return ''
    return o if isinstance(o,str) else o.__name__ if isinstance(o,type) and not getattr(o,'__args__',None) else str(o).replace('typing.','')

def signature(name, o):
    "How it is called, over several lines where one is too short"
    def one(p): return {p.VAR_POSITIONAL:'*',p.VAR_KEYWORD:'**'}.get(p.kind,'')+p.name+('' if p.default is p.empty else f'={_value(p.default)}')
    ps = [one(p) for p in params_of(o)]; line = f"{name}({', '.join(ps)})"
    return line if len(line)<74 else f'{name}(\n    '+',\n    '.join(ps)+')'

def _text(s): return ''.join(o if i%2 else o.replace('<','&lt;') for i,o in enumerate(re.split(r'(`[^`]*`)', s)))   # what looks like a tag is none
def _cell(s): return re.sub(r'(?<!\\)\|', r'\\|', ' '.join(str(s).split()))
def _type(s): return f'`{_cell(s)}`' if s else ''

def param_table(o):
    "Its parameters and what it returns, with type, default and meaning"
    try: docs = docments(o, full=True)
    except Exception as e: raise RuntimeError(f'{o}: its parameters can\'t be read ({e}).') from e
    ps = [p for p in params_of(o) if p.kind not in (p.VAR_POSITIONAL,p.VAR_KEYWORD) or (docs.get(p.name) and docs[p.name].docment)]
    rows = [f"| `{p.name}` | {_type(_anno(p.annotation))} | {'' if p.default is p.empty else _type(_value(p.default))} | {_text(_cell((docs[p.name].docment if p.name in docs else '') or ''))} |" for p in ps]
    ret = docs.get('return')
    if ret and (ret.docment or (ret.anno is not inspect.Parameter.empty and ret.anno is not None)): rows.append(f"| **returns** | {_type(_anno(ret.anno))} | | {_text(_cell(ret.docment or ''))} |")
    return '\n'.join(['| parameter | type | default | meaning |','| --- | --- | --- | --- |',*rows]) if rows else ''

def source_link(o):
    "Where its source is, if settings.ini names a repository"
    if not cfg.get('git_url'): return ''
    try: o = inspect.unwrap(o); file,line = Path(inspect.getsourcefile(o)).resolve(),inspect.getsourcelines(o)[1]
    except (TypeError,OSError): return ''
    if root.resolve() not in file.parents: return ''
    return f"[source]({cfg['git_url']}/blob/{cfg.get('branch','main')}/{file.relative_to(root.resolve()).as_posix()}#L{line})"

def said_of(name, o):
    "What it is: its docstring, or the comment behind its definition"
    return _text(doc_of(o) if callable(o) and doc_of(o) else _comments.get(name) or constant(o)+'.')

def constant(o):
    "What a name that isn't called stands for"
    names = [k for k in o if isinstance(k,(str,int))] if isinstance(o,(dict,tuple,list,set)) else []
    return f'A {type(o).__name__}' + (': '+', '.join(f'`{k}`' for k in names) if names else '')

def entry(name, o, level=3):
    "Heading, signature, what it does, and its parameters, as Markdown"
    head = f"{'#'*level} `{name}` {{#{name}}}"
    if not callable(o): return '\n\n'.join((head, *dict.fromkeys((said_of(name,o), constant(o)+'.'))))
    return '\n\n'.join(s for s in (head, f'```python\n{signature(name,o)}\n```', said_of(name,o), param_table(o), source_link(o)) if s)

def api(texts):
    "For each module's notebook its entries by cell number, and for each name the page and the object"
    entries,index = {},{}
    for src,text in texts.items():
        cells = nbformat.reads(text,4).cells if src.endswith('.ipynb') else []
        exp = next((d['default_exp'] for c in cells if c.cell_type=='code' and 'default_exp' in (d := directives(c.source))), None)
        if not exp: continue
        module = importlib.import_module(f"{cfg['lib_name']}.{exp}")
        for i,c in enumerate(cells):
            if c.cell_type!='code' or not {'export','exports'} & directives(c.source).keys(): continue
            for nm,o in public(module, c.source):
                own = '.' in nm and nm.split('.')[0] in index   # a method goes below its class
                entries.setdefault(src,{}).setdefault(i,[]).append(entry(nm,o,3+own)); index[nm] = staged(src),o
    return entries,index

def overview(index):
    "Tables of all names: those that `import *` gives, methods that are patched into fastai, and those of the modules"
    said = lambda k,o: _cell(said_of(k,o).split('\n')[0])
    given = {*importlib.import_module(f"{cfg['lib_name']}.all").__all__}
    kind = lambda k: 1 if '.' in k and k.split('.')[0] not in index else 0 if k.split('.')[0] in given else 2
    titles = ['What `import *` gives','Methods of fastai\'s classes','In the modules']
    parts = []
    for n,title in enumerate(titles):
        rows = [f"| [`{k}`](../{page}#{k}) | {said(k,o)} |" for k,(page,o) in sorted(index.items(), key=lambda o: o[0].lower()) if kind(k)==n]
        if rows: parts += [f'## {title}','','| name | what it is |','| --- | --- |',*rows,'']
    return '\n'.join(parts)

# ---- text

def _rel(page, to):
    path,_,anchor = to.partition('#')
    return posixpath.relpath(path, posixpath.dirname(page) or '.')+(f'#{anchor}' if anchor else '')

def linked(text, src, index, texts):
    "Links to notebooks lead to their pages, names in backticks to their entries; code, headings and links stay as they are"
    page,short = staged(src),{k.split('.')[-1]:k for k in index if k.startswith('Learner.')}
    def name(m):
        k = m[1].split('(')[0]; k = k if k in index else short.get(k.removeprefix('learn.'))
        if k and k.endswith('_loss') and not page.startswith('api/'): k = None   # elsewhere it is a column
        return f'[{m[0]}]({_rel(page, index[k][0])}#{k})' if k else m[0]
    pages = {staged(k).rsplit('.',1)[0]:k for k in texts}
    def target(m):
        if re.match(r'[a-z]+:|#|/', m[1]): return m[0]
        path,_,anchor = m[1].partition('#'); full = posixpath.normpath(posixpath.join(posixpath.dirname(src), path))
        full = also.get(posixpath.basename(full), full) if src in also.values() else full
        if full.endswith('.html'): full = next((k for k in (full[:-5]+'.ipynb', full[:-5]+'.md', pages.get('api/'+full[:-5]), pages.get(full[:-5])) if k in texts), full)
        return f"]({_rel(page, staged(full))}{'#' if anchor else ''}{anchor})" if full in texts else m[0]
    out,fence = [],False
    for line in text.split('\n'):
        if re.match(r'\s*(```|~~~)', line): fence = not fence
        if not fence and not line.startswith('#'):
            line = re.sub(r'\]\(([^)\s]+)\)', target, line)
            line = re.sub(r'(?<![\[`\\\w])`([A-Za-z_][\w.]*(?:\([^`]*\))?)`(?!\]|`)', name, line)
        out.append(line)
    return '\n'.join(out)

def front(text):
    "Title and description from the first heading and the quotation below it; the rest of the cell stays text"
    m = re.match(r'\s*#\s+(.+?)\n+(?:>\s*(.+?)(?:\n|$))?(.*)', text+'\n', re.S)
    if not m: return None,text
    return {k:v.replace('`','').strip() for k,v in (('title',m[1]),('description',m[2])) if v},m[3].strip()

def _output_alt(nb, c):
    "Alternative text for a plot: the cell's own, or the sentence before it"
    before = [o.source for o in nb.cells[:nb.cells.index(c)] if o.cell_type=='markdown' and o.source.strip()]
    text = re.sub(r'[`*#>\[\]]|\(http\S+\)', '', before[-1].strip().split('\n')[-1]).strip() if before else ''
    return f"Plot: {text or c.source.strip().splitlines()[-1]}"[:200]

def code_cell(nb, c):
    "A code cell as readers see it, or None"
    d = directives(c.source)
    if {'hide','export','exporti','default_exp'} & d.keys() or d.get('include')=='false': return None
    keep = [l for l in c.source.split('\n') if not re.match(r'#\|\s*(?!\s|fig-|echo|code-fold|code-summary|label|output)', l) and not re.search(r'#\|\s*hide_line\s*$', l)]
    c.source = '\n'.join(keep)
    if any('image/png' in o.get('data',{}) or 'image/svg+xml' in o.get('data',{}) for o in c.outputs) and 'fig-alt' not in d:
        c.source = f'#| fig-alt: {json.dumps(_output_alt(nb, c), ensure_ascii=False)}\n{c.source}'
    c.metadata = nbformat.NotebookNode()
    return c

def stage_notebook(src, text, entries, index, texts):
    nb = nbformat.reads(text,4); cells,meta = [],None
    md = lambda s: nbformat.v4.new_markdown_cell(linked(s, src, index, texts))
    for i,c in enumerate(nb.cells):
        if c.cell_type=='markdown':
            s = with_settings(c.source)
            if s is None: continue
            if meta is None: meta,s = front(s)
            if s.strip(): cells.append(md(s))
        elif c.cell_type=='code':
            cells += [md(e) for e in entries.get(src,{}).get(i,[])]
            exported = 'exports' in directives(c.source)
            if exported: c.source = re.sub(r'^#\|\s*exports\n','',c.source)
            if (o := code_cell(nb, c)) is not None: cells.append(o)
    slugs = {k.lower():k for k,(page,_) in index.items() if page==staged(src)}
    for c in cells:   # a heading's anchor would be that of the name it is about
        if c.cell_type=='markdown': c.source = re.sub(r'^(#+ )(\w+)$', lambda m: f"{m[0]} {{#about-{m[2].lower()}}}" if m[2].lower() in slugs else m[0], c.source, flags=re.M)
    if src.endswith('_all.ipynb'): cells.append(md(overview(index)))
    nb.cells = [nbformat.v4.new_raw_cell('---\n'+yaml.safe_dump(meta or {'title':Path(src).stem}, allow_unicode=True)+'---'), *cells]
    for k,c in enumerate(nb.cells): c.id = f'c{k}'
    return nbformat.writes(nb)

def config(texts):
    "_quarto.yml with the pattern for modules replaced by their pages, and the repository's address where there is one"
    conf = yaml.safe_load((nbs/'_quarto.yml').read_text(encoding='utf-8'))
    def expand(o):
        if isinstance(o, dict): return {k:expand(v) for k,v in o.items()}
        if isinstance(o, str) and o in texts: return staged(o)
        if not isinstance(o, list): return o
        mods = [{'text':_numbered.match(k)[1],'href':staged(k)} for k in texts if _numbered.match(k)]
        return sum(([*mods] if c=='[0-9]*.ipynb' else [expand(c)] for c in o), [])
    conf = expand(conf)
    if cfg.get('git_url'): conf['website']['repo-url'] = cfg['git_url']
    if cfg.get('doc_url'): conf['website']['site-url'] = cfg['doc_url']
    return yaml.safe_dump(conf, sort_keys=False, allow_unicode=True)

def stage(dst=proc):
    "Write the pages; the names that have entries, with page and object, are returned"
    shutil.rmtree(dst, ignore_errors=True); texts = sources(); entries,index = api(texts)
    for src,text in texts.items():
        out = dst/staged(src); out.parent.mkdir(parents=True, exist_ok=True)
        if src.endswith('.ipynb'): out.write_text(stage_notebook(src, text, entries, index, texts), encoding='utf-8'); continue
        meta,body = front(with_settings(text, True))
        out.write_text('---\n'+yaml.safe_dump(meta or {'title':Path(src).stem}, allow_unicode=True)+'---\n\n'+linked(body, src, index, texts)+'\n', encoding='utf-8')
    (dst/'_quarto.yml').write_text(config(texts), encoding='utf-8')
    for o in (*nbs.rglob('images/*'), nbs/'site.css'):
        to = dst/o.relative_to(nbs); to.parent.mkdir(parents=True, exist_ok=True); shutil.copy(o, to)
    return index

# ---- what the renderer leaves out

def _breakable(cell): return re.sub(r'<code>([^<]*)</code>', lambda m: m[0] if len(m[1])<23 else f"<code>{re.sub(r'(?<=[_./=(,])(?=[^ &;])', '<wbr>', m[1])}</code>", cell)

def widths(table):
    "A table whose columns are at least as wide as their texts read well, and whose long code can be broken: on a narrow screen it scrolls, where a word a line would be read otherwise"
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', o, re.S) for o in re.findall(r'<tr>(.*?)</tr>', table[0], re.S)]
    longest = lambda col: max(len(html.unescape(re.sub('<[^>]+>', '', o))) for o in col)
    mins = iter([min(.47*longest(col)+1, 8.5) for col in zip(*rows)])
    text = re.sub(r'<th>', lambda m: f'<th style="min-width:{next(mins):.1f}rem">', table[0])
    return re.sub(r'<td>.*?</td>', lambda m: _breakable(m[0]), text, flags=re.S)

def mend(page):
    "One rendered page: progress bars that were saved in the middle go, columns have a width, reports in outputs no title, images in outputs an alternative text"
    page = re.sub(r'<div class="sd-table">\n<table.*?</table>', widths, page, flags=re.S)
    page = re.sub(r'<style>\s*/\* Turns off some styling \*/.*?</style>', '', page, flags=re.S)
    page = re.sub(r'<div>\s*<progress.*?</div>', '', page, flags=re.S)
    page = re.sub(r'<h1>(.*?)</h1>', r'<h3>\1</h3>', page)   # of reports in outputs: the page has its title
    return re.sub(r'<img(?![^>]*\balt=)', '<img alt="Image in the output of the code above"', page)

def build(dst=docs, stage_to=proc):
    "The whole site; returns the names that have entries, and the renderer's warnings"
    try: from smalldocs.site import build as render
    except ImportError: sys.exit('smalldocs, which renders the pages, is not installed: it needs Python 3.11 or newer; then `make site` installs it.')
    index = stage(stage_to); site = render(stage_to, quiet=True)
    shutil.rmtree(dst, ignore_errors=True); shutil.move(site.out, dst)
    for o in dst.rglob('*.html'): o.write_text(mend(o.read_text(encoding='utf-8')), encoding='utf-8')
    return index,site.warnings

if __name__=='__main__':
    index,warned = build(); faults = [*warned, *check(docs, proc, index)]
    print('\n'.join([*faults, f"{sum(1 for _ in docs.rglob('*.html'))} pages with {len(index)} entries in {docs.name}, {len(faults)} faults"]))
    sys.exit(bool(faults))
