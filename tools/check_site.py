"Faults of a built site: links and anchors, entries and parameters, lost text, raw directives, images without alternative text, words that the field doesn't use"
import ast,html,inspect,posixpath,re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit
import nbformat
from fastcore.docments import docments

# Words that were found in this project, which a reader of the field would not expect
words = {r'pictures?':'image', r'(?<!Barlow )twins?':'supervised baseline', r'near[- ]copies':'near-duplicates', r'store=':'cache=', r'taps?':'feature layer', r'rooms?':'module', r'to the bit':'bitwise identical',
    r'ordinary loss':'supervised loss', r'by how many quarter turns':'rotation (0°, 90°, 180°, 270°)', r'made again':'rebuilt', r'gives its place':'is replaced by', r'the rival':'the baseline loop', r'% sure':'pred …, true … (…%)', r'tell by how many':'predict the rotation'}
_words = re.compile('|'.join(rf'(?<![\w-])({k})(?![\w-])' for k in words), re.I)

def wrong_words(text):
    "Words of the table's left column in `text`, each with its surroundings"
    columns = ["has a column 'wanted'"] if re.search(r'^\s*wanted\s*$', text, re.M) else []
    return columns+[f"says '{m[0]}' in '…{' '.join(text[max(0,m.start()-30):m.end()+30].split())}…'" for m in _words.finditer(text)]

class Page(HTMLParser):
    "Links, anchors, images, and the text of the content"
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids,self.hrefs,self.no_alt,self.texts,self.code,self.stack = [],[],[],[],[],[]
        self.feed(text); self.text = ''.join(self.texts)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.append(a['id'])
        for k in ('href','src'):
            if a.get(k): self.hrefs.append(a[k])
        if tag=='img' and not (a.get('alt') or '').strip(): self.no_alt.append(a.get('src','')[:60])
        if tag not in ('img','br','hr','input','meta','link','wbr','col','source'): self.stack.append(tag)
        if tag in ('p','div','td','th','li','tr','pre','h1','h2','h3','h4','br'): self.texts.append('\n')
    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop()!=tag: pass
    def handle_data(self, data):
        if 'script' in self.stack or 'style' in self.stack: return
        self.texts.append(data)
        if 'pre' in self.stack: self.code.append(data)

def tokens(text):
    "Letters and digits only, so that markup doesn't matter"
    return ' '.join(re.findall(r'[^\W_]+', text.replace('`','')))

def plain(md):
    "What of a Markdown text is read"
    md = re.sub(r'<!--.*?-->', ' ', md, flags=re.S)
    md = re.sub(r'^(```+|~~~+).*$', ' ', md, flags=re.M)
    md = re.sub(r'!\[([^\]]*)\]\([^)]*\)(\{[^}]*\})?', ' ', md)
    md = ''.join(o if i%2 else re.sub(r'\]\([^)\s]*\)(\{[^}]*\})?', '', o) for i,o in enumerate(re.split(r'(``[^\n]*?``|`[^`\n]*`)', md)))   # in code it is none
    md = re.sub(r'^(#+.*?)\{#[^}]*\}', r'\1', md, flags=re.M)
    md = re.sub(r'^[\s|:-]+$', ' ', md, flags=re.M)
    md = re.sub(r'<(https?:[^>]+)>', r'\1', md)
    return html.unescape(re.sub(r'^\d+\. ', ' ', md, flags=re.M))

def paragraphs(staged):
    "The texts of a staged page that a reader must find: paragraphs, and cells of code"
    if staged.suffix=='.md': return [plain(o) for o in re.split(r'\n\s*\n', staged.read_text(encoding='utf-8').split('---\n',2)[2])]
    cells = nbformat.read(staged,4).cells
    return [plain(o) for c in cells if c.cell_type=='markdown' for o in re.split(r'\n\s*\n', c.source)] + [re.sub(r'^#\|.*\n?','',c.source,flags=re.M) for c in cells if c.cell_type=='code' and not re.search(r'^#\|\s*echo:\s*false', c.source, re.M)]

def params_of(o):
    "Parameters of a function, or of a class that has an `__init__` of its own; those of a base class of others are theirs to explain"
    if isinstance(o,type) and not (getattr(o.__init__,'__module__',None) or '').startswith('sesemi_fastai'): return []
    return [p for k,p in inspect.signature(o).parameters.items() if k not in ('self','cls')]

def own_params(o):
    "Names of those that its own source has, and not `@delegates`; `*args` and `**kwargs` are left out"
    f = inspect.unwrap(o.__init__ if isinstance(o,type) else o)
    f = getattr(f,'__func__',f); code = getattr(f,'__code__',None)
    own = code.co_varnames[:code.co_argcount+code.co_kwonlyargcount] if code else ()
    return [p.name for p in params_of(o) if p.name in own and p.kind not in (p.VAR_POSITIONAL,p.VAR_KEYWORD)]

def doc_of(o):
    "Its docstring; of an object that is called, that of the call"
    return inspect.getdoc(o if inspect.isroutine(o) or isinstance(o,type) else type(o).__call__) or ''

def check_links(pages):
    for name,p in pages.items():
        for h in dict.fromkeys(p.hrefs):
            u = urlsplit(h)
            if u.scheme or h.startswith('//') or not (u.path or u.fragment): continue
            to = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(u.path))) if u.path else name
            if to in pages:
                if u.fragment and unquote(u.fragment) not in pages[to].ids: yield f'{name}: no anchor {h}'
            elif not (pages.root/to).exists(): yield f'{name}: broken link {h}'
        twice = {o for o in p.ids if p.ids.count(o)>1}
        if twice: yield f"{name}: anchor twice: {', '.join(sorted(twice))}"

def check_entries(pages, index):
    for nm,(page,o) in index.items():
        p = pages.get(page.rsplit('.',1)[0]+'.html')
        if p is None or nm not in p.ids: yield f'{nm}: no entry'; continue
        if '.' in nm and not callable(o): yield f'{nm}: its entry has no signature'
        elif (inspect.isroutine(o) or isinstance(o,type)) and not doc_of(o): yield f'{nm}: its entry says nothing: write a docstring'
        said = docments(o, full=True) if callable(o) else {}
        for k in own_params(o) if callable(o) else []:
            if not getattr(said.get(k),'docment',None): yield f'{nm}: nothing is said of its parameter {k}'
        text = p.entries.get(nm,'')
        for k in (v.name for v in (params_of(o) if callable(o) else []) if v.kind not in (v.VAR_POSITIONAL,v.VAR_KEYWORD)):
            if not re.search(rf'^\s*{re.escape(k)}\s*$', text, re.M): yield f'{nm}: no row for its parameter {k}'

def _near(text, found):
    "The last words of `text` that are found, and those that follow them and aren't"
    ws = text.split(); n = next((i for i in range(len(ws),0,-1) if ' '.join(ws[:i]) in found), 0)
    return ' '.join([*ws[max(0,n-3):n],'¦',*ws[n:n+3]])

def check_texts(pages, staged):
    for src in sorted(staged.rglob('*')):
        if src.suffix not in ('.md','.ipynb'): continue
        name = src.relative_to(staged).with_suffix('.html').as_posix()
        if name not in pages: yield f'{name}: not rendered'; continue
        found = tokens(pages[name].text)
        for o in paragraphs(src):
            t = tokens(o)
            if t and t not in found: yield f"{name}: lost text '{' '.join(o.split())[:80]}' near '{_near(t, found)}'"

def calls(code):
    "Calls in Python code, as (name, call), `learn` being a `Learner`; none where it doesn't parse"
    try: tree = ast.parse(code)
    except SyntaxError: return
    for o in ast.walk(tree):
        if isinstance(o, ast.Call) and isinstance(o.func,(ast.Name,ast.Attribute)): yield ast.unparse(o.func).replace('learn.','Learner.',1),o

def check_calls(staged, index):
    "Calls of public names, in code that isn't executed and in text, with arguments that those don't take"
    objs = {k:o for k,(_,o) in index.items() if callable(o)}
    for src in sorted(staged.rglob('*')):
        if src.suffix not in ('.md','.ipynb'): continue
        cells = [(c.cell_type,c.source) for c in nbformat.read(src,4).cells] if src.suffix=='.ipynb' else [('markdown',src.read_text(encoding='utf-8'))]
        for kind,text in cells:
            codes = [text] if kind=='code' else re.findall(r'```python\n(.*?)```', text, re.S)+[o.replace('…','...') for o in re.findall(r'(?<!`)`([^`\n]+)`(?!`)', re.sub(r'```.*?```','',text,flags=re.S))]
            for nm,call in (o for code in codes for o in calls(code)):
                if nm not in objs or any(k.arg is None for k in call.keywords): continue
                ps = params_of(objs[nm])
                if not ps or any(v.kind==v.VAR_KEYWORD for v in ps): continue
                for k in call.keywords:
                    if k.arg not in {v.name for v in ps}: yield f'{src.relative_to(staged)}: {nm} takes no {k.arg}: {ast.unparse(call)[:80]}'

class _Pages(dict):
    def __init__(self, docs):
        self.root = docs
        for o in sorted(docs.rglob('*.html')):
            text = o.read_text(encoding='utf-8'); p = self[o.relative_to(docs).as_posix()] = Page(text)
            parts = re.split(r'<h[2-4][^>]*\bid="([^"]+)"|<section id="([^"]+)"', text)
            p.entries = {a or b:Page(t).text for a,b,t in zip(parts[1::3],parts[2::3],parts[3::3])}

def check(docs, staged, index):
    "All faults, a line each"
    pages = _Pages(Path(docs)); staged = Path(staged)
    faults = [*check_links(pages), *check_entries(pages, index), *check_texts(pages, staged), *check_calls(staged, index)]
    for name,p in pages.items():
        faults += [f'{name}: image without alternative text: {o}' for o in p.no_alt]
        faults += [f'{name}: raw markup {m!r}' for m in re.findall(r'^\s*#\|.*$|^:::.*$|\{\{.*?\}\}|\{#\w+\}|<!-- \w+ -->', p.text, re.M)]
        faults += [f'{name}: {o}' for o in wrong_words(p.text)]
    return faults
