"Write what is generated: README.md from nbs/index.ipynb, and the table of Learner features from the tests; `--check` only compares"
import ast,re,sys
from pathlib import Path
import nbformat

root = Path(__file__).parent.parent

def render():
    "Markdown of the index: its prose, and its code cells as Python"
    parts = []
    for c in nbformat.read(root/'nbs/index.ipynb', 4).cells:
        src = c.source.strip()
        if re.search(r'^#\|\s*(hide|include:\s*false|echo:\s*false)', src, re.M): continue
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if not src: continue
        parts.append(src if c.cell_type=='markdown' else f'```python\n{src}\n```')
    text = '\n\n'.join(parts)+'\n'
    return re.sub(r'\]\(images/', '](nbs/images/', text)

def table():
    "A row for each test of the matrix, and of several processes: its docstring up to the colon, the rest, its name"
    rows = ['| with | what is checked | test |','| --- | --- | --- |']
    for o in sum((ast.parse((root/f'tests/test_{nm}.py').read_text(encoding='utf-8')).body for nm in ('matrix','distributed')), []):
        if not (isinstance(o, ast.FunctionDef) and o.name.startswith('test_')): continue
        what,_,checked = ast.get_docstring(o).partition(': ')
        rows.append(f'| {what} | {checked} | `{o.name}` |')
    return '\n'.join(rows)

def with_table(text):
    "The notebook's source with the table between its two marks"
    nb = nbformat.reads(text, 4)
    for c in nb.cells:
        if '<!-- matrix -->' in c.source: c.source = '<!-- matrix -->\n'+table()+'\n<!-- end -->'
    return nbformat.writes(nb, 4)+'\n'

if __name__=='__main__':
    index,page = root/'README.md',root/'nbs/learner_features.ipynb'
    for path,text in ((index, render()), (page, with_table(page.read_text(encoding='utf-8')))):
        if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
        elif not path.exists() or path.read_text(encoding='utf-8')!=text: sys.exit(f'{path.name} differs from what it is made from: run `make prepare`.')
