"The repository's parts agree: notebooks and modules, README and index, settings and package"
import configparser,json,re,shutil,subprocess,sys,zipfile
from pathlib import Path
import pytest
try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10, where pytest brings it
import sesemi_fastai

root = Path(__file__).parent.parent
cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini'); cfg = cfg['DEFAULT']

def run(*args, cwd=root):
    return subprocess.run([str(o) for o in args], cwd=cwd, capture_output=True, text=True)

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "What a build and an export need, so that nothing here touches the checkout; without git, which a download may lack"
    dst = tmp_path_factory.mktemp('repo')
    for o in ('nbs','sesemi_fastai','tools'): shutil.copytree(root/o, dst/o, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    for o in ('settings.ini','setup.py','pyproject.toml','MANIFEST.in','LICENSE','README.md'): shutil.copy(root/o, dst/o)
    return dst

def test_settings_are_the_one_place():
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    assert (project['name'], project['description'], project['requires-python']) == (cfg['lib_name'], cfg['description'], f">={cfg['min_python']}")
    assert sesemi_fastai.__version__==cfg['version']

def test_modules_are_the_notebooks(copy):
    before = {o.name:o.read_text() for o in (root/'sesemi_fastai').glob('*.py')}
    # A module that no notebook exports must not survive, so export starts from none
    for o in (copy/'sesemi_fastai').glob('*.py'):
        if o.name!='__init__.py': o.unlink()
    r = run(Path(sys.executable).parent/'nbdev-export', cwd=copy); assert r.returncode==0, r.stderr
    assert {o.name:o.read_text() for o in (copy/'sesemi_fastai').glob('*.py')}==before, 'run `make prepare`'

def test_notebooks_are_clean(copy):
    before = {o.name:o.read_text() for o in (root/'nbs').glob('*.ipynb')}
    r = run(Path(sys.executable).parent/'nbdev-clean', cwd=copy); assert r.returncode==0, r.stderr
    assert {o.name:o.read_text() for o in (copy/'nbs').glob('*.ipynb')}==before, 'run `make prepare`'

def test_notebooks_have_ids_and_small_outputs():
    for o in (root/'nbs').glob('*.ipynb'):
        nb = json.loads(o.read_text())
        assert (nb['nbformat'], nb['nbformat_minor'])==(4,5) and o.stat().st_size<300_000, o
        ids = [c['id'] for c in nb['cells']]; assert len(set(ids))==len(ids), o

def test_readme_is_the_index():
    r = run(sys.executable, 'tools/readme.py', '--check'); assert r.returncode==0, r.stdout+r.stderr

def test_weights_and_ramps_on_the_page_are_the_defaults():
    import inspect
    from sesemi_fastai.objective_text import named_objectives
    rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \| ([\d.]+) \| ([\d.]+) \|$', (root/'nbs/howto/settings.md').read_text(encoding='utf-8'), re.M)
    said = [(n,float(w),float(r)) for names,w,r in rows for n in re.findall(r'\w+', names)]
    has = lambda o,k: inspect.signature(o).parameters[k].default
    assert sorted(said)==sorted((o.__name__,has(o,'weight'),has(o,'ramp_pct')) for o in named_objectives.values())

def test_no_name_in_two_rooms():
    seen = {}
    for o in sorted((root/'sesemi_fastai').glob('*.py')):
        if o.stem in ('all','_modidx'): continue
        for n in re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', o.read_text(), re.S)[1] if '__all__' in o.read_text() else ''):
            assert n not in seen, f'{n} is in {seen[n]} and in {o.name}: the later one hides the other in sesemi_fastai.all'
            seen[n] = o.name

def test_mutants_apply():
    import mutants
    for o in mutants.mutants: mutants.broken(o); mutants.selection(o)

def test_no_errors_by_ruff():
    r = run(sys.executable,'-m','ruff','check','--no-cache','--select','E9,F63,F7,F82','--ignore','F821','sesemi_fastai','tests','tools','setup.py')
    assert r.returncode==0, r.stdout

def test_modules_stay_small():
    for o in (root/'sesemi_fastai').glob('*.py'):
        if o.name!='_modidx.py': assert len(o.read_text().splitlines())<=300, o

def test_wheel_holds_the_sample(copy, tmp_path):
    # Without --wheel the wheel is built from the source archive, so that also what MANIFEST.in forgets is noticed
    r = run(sys.executable,'-m','build','--no-isolation','-o',tmp_path, cwd=copy); assert r.returncode==0, r.stdout+r.stderr
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert {'sesemi_fastai/data/fashionwang.tgz','sesemi_fastai/data/LICENSE-fashionwang','sesemi_fastai/imagewang.py'}<=set(names)
    entry = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).read(next(o for o in names if o.endswith('entry_points.txt'))).decode()
    for o in cfg['console_scripts'].split(): assert o.replace('=', ' = ') in entry
    meta = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).read(next(o for o in names if o.endswith('METADATA'))).decode()
    for o in cfg['distributed_requirements'].split(): assert f'Requires-Dist: {o}; extra == "distributed"' in meta and o in cfg['dev_requirements'].split()
