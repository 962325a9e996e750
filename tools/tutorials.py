"Execute the pages that show outputs, and keep those; of modules' notebooks their plots: `python tools/tutorials.py [NAME …]`, all of them without names"
import os,re,sys,time
from pathlib import Path
import nbformat
from nbclient import NotebookClient

root = Path(__file__).parent.parent
pages = sorted((root/'nbs/tutorials').glob('*.ipynb'))+[root/f'nbs/{o}.ipynb' for o in ('commands','concepts','row_costs','which_objective','which_recipe','fast','howto/check_data')]
plots = [next(root.glob(f'nbs/[0-9]*_{o}.ipynb')) for o in ('augment','losses','strong','show','schedule','run_report')]   # modules whose examples are seen
os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'   # plots become outputs
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(root), os.environ.get('PYTHONPATH'))))
os.environ['PYTHONWARNINGS'] = 'ignore'

def tidy(nb, only_plots=False):
    "Outputs as a reader wants them: no warnings of other libraries, no progress bars, no addresses of temporary folders"
    for c in nb.cells:
        c.metadata = nbformat.NotebookNode()
        if c.cell_type!='code': continue
        c.execution_count,outs = None,[]
        for o in c.outputs:
            o.pop('execution_count', None)
            if o.output_type=='stream' and o.name=='stderr' or only_plots and 'image/png' not in o.get('data',{}): continue
            if o.output_type=='stream': o.text = re.sub(r'/tmp/[\w.-]+/', '', re.sub(r'\x1b\[[0-9;]*m|[^\n]*\r', '', o.text)).replace(str(Path.home()), '~')
            if 'metadata' in o: o.metadata = {}
            data = o.get('data',{})
            if 'class="sesemi"' in data.get('text/html',''): data.pop('text/plain', None)   # a report, which has its style with it
            elif 'text/html' in data:
                data['text/html'] = re.sub(r'\s*<style[^>]*>.*?</style>|\s*<div>\s*<progress.*?</div>', '', data['text/html'], flags=re.S).strip()
                if not data['text/html']: continue
                for k in ('text/plain','text/markdown'): data.pop(k, None)
            if 'image/png' in data: data.pop('text/plain', None)
            outs.append(o)
        c.outputs = outs
    nb.metadata = {'kernelspec':{'display_name':'python3','language':'python','name':'python3'}}
    return nb

def execute(path, timeout=900):
    "The notebook with outputs of a fresh kernel, and the seconds it took"
    nb = nbformat.read(path, 4); start = time.time()
    NotebookClient(nb, timeout=timeout, resources={'metadata':{'path':str(path.parent)}}).execute()
    return tidy(nb, path in plots),time.time()-start

if __name__=='__main__':
    for o in pages+plots:
        if len(sys.argv)>1 and not {o.stem,o.stem.split('_',1)[-1]}&{*sys.argv[1:]}: continue
        nb,sec = execute(o); nbformat.write(nb, o); print(f'{o.stem}: {sec:.0f} s, {o.stat().st_size/1e3:.0f} kB')
