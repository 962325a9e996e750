"Write README.md from nbs/index.ipynb; `--check` only compares"
import re,sys
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

if __name__=='__main__':
    path,text = root/'README.md',render()
    if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8')!=text: sys.exit('README.md differs from nbs/index.ipynb: run `make prepare`.')
