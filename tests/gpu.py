"""What a GPU alone can tell, in under ten minutes on one card: `make gpu`, or `PYTHONPATH=. python tests/gpu.py`.
The tests marked `cuda`, then `benchmarks/card.py`, each in processes of their own, so that one that crashes or hangs takes nothing else with it.
Writes `tests/results/gpu.json`; without a GPU it says so and writes nothing. `--device cpu` runs the same on the CPU, to see that it runs."""
import argparse,collections,importlib.util,json,os,re,signal,subprocess,sys,tempfile,threading,time
from pathlib import Path

here = Path(__file__).resolve().parent
needed = 'torch torchvision fastai fastcore filelock fastprogress PIL matplotlib imagehash scipy pytest'.split()

class Log:
    "Lines of JSON that another process reads as they come"
    def __init__(self, path): self.path = Path(path)
    def add(self, **line):
        with open(self.path, 'a') as f: f.write(json.dumps(line, default=str)+'\n')
    def read(self): return [json.loads(o) for o in self.path.read_text().splitlines()] if self.path.exists() else []

class Record:
    "A plugin of pytest that writes what becomes of each test as soon as it is known"
    def __init__(self, log, device): self.log,self.device,self.now = log,device,None
    def pytest_collection_modifyitems(self, items):
        "Those that were run by a process before this one are left out"
        done = {o['test'] for o in self.log.read() if 'test' in o}
        if self.device=='cpu': items[:] = [o for o in items if getattr(o,'callspec',None) and o.callspec.params.get('device')=='cpu' and 'slow' not in o.keywords]
        self.log.add(collected=[o.nodeid for o in items])
        items[:] = [o for o in items if o.nodeid not in done]
    def pytest_runtest_logstart(self, nodeid): self.now = dict(test=nodeid, outcome='passed', seconds=0., figures={}); self.log.add(start=nodeid)
    def pytest_runtest_logreport(self, report):
        self.now['seconds'] = round(self.now['seconds']+report.duration, 2); self.now['figures'].update(report.user_properties)
        if report.failed: self.now.update(outcome='failed', message=str(report.longrepr)[-4000:])
        elif report.skipped: self.now.update(outcome='skipped', message=report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr))
        if report.when!='teardown': return
        self.log.add(**self.now)
        if self.device!='cuda': return
        import torch
        try: torch.cuda.synchronize()
        except RuntimeError as e: self.log.add(broken=self.now['test'], message=str(e)[:500]); os._exit(3)   # after an error on the device every test would fail

def run_tests(log, device):
    "In a process of its own: files that have tests for this"
    import pytest
    files = sorted(str(o) for o in here.glob('test_*.py') if o.name=='test_cuda.py' or 'mark.cuda' in o.read_text(encoding='utf-8'))
    return pytest.main([*files, '-q', '--disable-warnings', '-p', 'no:cacheprovider', f'--rootdir={here.parent}', *(['-m','cuda'] if device=='cuda' else [])], plugins=[Record(log, device)])

printed = collections.deque(maxlen=300)   # lines of the processes, the last ones

def show(lines):
    for o in lines: print(o, end='', flush=True); printed.append(o)

def watch(args, log, until, silence):
    "A process in a group of its own, until it ends, or writes nothing to `log` for `silence` seconds, or time is up; why it was ended, else None"
    p = subprocess.Popen([sys.executable,'-W','ignore',*map(str, args)], cwd=here.parent, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    threading.Thread(target=show, args=(p.stdout,), daemon=True).start()
    try:
        last,n = time.time(),0
        while p.poll() is None:
            time.sleep(.5)
            if (size := log.path.stat().st_size if log.path.exists() else 0)!=n: last,n = time.time(),size
            if time.time()>until: return 'not run: time was up'
            if time.time()-last>silence: return 'hangs'
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL); p.wait()

def all_tests(log, device, seconds, silence=150):
    "Outcomes of all tests; a process that breaks is followed by another for the rest"
    until,todo = time.time()+seconds,None
    for _ in range(8):
        why = watch([__file__,'--worker',log.path,'--device',device], log, until, silence)
        lines = log.read()
        found,done = next((o['collected'] for o in reversed(lines) if 'collected' in o), []),{o['test'] for o in lines if 'test' in o}
        todo = [o for o in found if o not in done]
        if not todo or not found: break
        started = next((o['start'] for o in reversed(lines) if 'start' in o), None)
        if started in todo: log.add(test=started, outcome='hangs' if why=='hangs' else 'crashed' if why is None else 'not run', seconds=None, figures={}, message=why or 'the process ended'); todo.remove(started)
        if why and why!='hangs': break
    return [o for o in log.read() if 'test' in o]+[dict(test=o, outcome='not run', seconds=None, figures={}, message='time was up') for o in todo or []]

def card():
    "What it ran on"
    import torch
    smi = subprocess.run(['nvidia-smi','--query-gpu=driver_version,power.limit','--format=csv,noheader'], capture_output=True, text=True).stdout.strip().splitlines() if _found('nvidia-smi') else []
    p = torch.cuda.get_device_properties(0)
    return dict(name=p.name, capability=f'{p.major}.{p.minor}', memory_gb=round(p.total_memory/2**30,1), multiprocessors=p.multi_processor_count, count=torch.cuda.device_count(),
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), nccl='.'.join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None, driver=smi[0] if smi else None)

def _found(program): return any(os.access(os.path.join(o, program), os.X_OK) for o in os.environ.get('PATH','').split(os.pathsep))

def summary(res):
    "In words"
    n = {}
    for o in res['tests']: n[o['outcome']] = n.get(o['outcome'], 0)+1
    lines = [f"{res['card']['name']}: "+', '.join(f'{v} {k}' for k,v in n.items())+f", {len(res['rows'])} figures, in {res['seconds']} s"]
    lines += [f"{o['outcome']}: {o['test']}\n    "+re.sub(r'\n', '\n    ', (o.get('message') or '').strip()[-600:]) for o in res['tests'] if o['outcome'] not in ('passed','skipped')]
    return '\n'.join(lines+[f"error: {o['part']}: {o['message']}" for o in res['errors']])

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=here/'results/gpu.json'); p.add_argument('--device', choices=('cuda','cpu'), default='cuda')
    p.add_argument('--minutes', type=float, default=9.5, help='for all of it'); p.add_argument('--worker', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args(args)
    if a.worker: return run_tests(Log(a.worker), a.device)
    lacks = [o for o in needed if importlib.util.find_spec(o) is None]
    if lacks: print(f"make gpu needs {', '.join(lacks)}, which {sys.executable} lacks: install {'it' if len(lacks)==1 else 'them'} there, or run make gpu without PYTHON_GPU.", file=sys.stderr); return 2
    import torch
    if a.device=='cuda' and not torch.cuda.is_available(): print(f"There is no GPU here that torch {torch.__version__} can use: nothing was run, and nothing is written. Run make gpu on a machine that has one."); return 0
    start = time.time(); end = start+60*a.minutes
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(here.parent), os.environ.get('PYTHONPATH'))))
    os.environ |= dict(MPLBACKEND='Agg', CUBLAS_WORKSPACE_CONFIG=os.environ.get('CUBLAS_WORKSPACE_CONFIG', ':4096:8'))
    with tempfile.TemporaryDirectory() as d:
        tests = all_tests(Log(f'{d}/tests'), a.device, (end-start)*.62)
        bench = Log(f'{d}/bench'); why = watch([here/'benchmarks/card.py',bench.path,'--device',a.device,'--until',end-5], bench, end, 150)
        lines = bench.read()
    sys.path.insert(0, str(here/'benchmarks'))
    from common import machine
    bad = [o for o in tests if o['outcome'] not in ('passed','skipped')]
    res = dict(card=card() if a.device=='cuda' else dict(name='CPU'), machine=machine(), seconds=round(time.time()-start), tests=tests, rows=[r for o in lines for r in o.get('rows',[])],
               errors=[o for o in lines if 'message' in o]+([dict(part='benchmark', message=why)] if why else []), parts={o['part']:o['seconds'] for o in lines if 'seconds' in o},
               output=list(printed) if bad or not tests else [])
    a.out.parent.mkdir(parents=True, exist_ok=True); a.out.write_text(json.dumps(res, indent=1))
    print(summary(res), f'Written to {a.out}', sep='\n')
    if a.out==here/'results/gpu.json' and importlib.util.find_spec('nbformat'): subprocess.run([sys.executable, here.parent/'tools/readme.py'], check=True)   # the table for the docs
    return int(bool(bad) or not tests)

if __name__=='__main__': sys.exit(main())
