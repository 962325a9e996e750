"The site builds, and nothing is broken or lost in it"
import ast,re,shutil,subprocess,sys
from pathlib import Path
import pytest
pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')
root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'tools'))
import build_site,check_site

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Rendered pages, staged pages, names that have entries, the renderer's warnings"
    tmp = tmp_path_factory.mktemp('site'); index,warned = build_site.build(tmp/'docs', tmp/'proc')
    return tmp/'docs',tmp/'proc',index,warned

def test_site_has_no_faults(site):
    docs,proc,index,warned = site
    faults = [*warned, *check_site.check(docs, proc, index)]
    assert not faults, '\n'.join(faults)

def test_every_public_name_has_an_entry(site):
    import sesemi_fastai.all as everything
    ours = {k for k in everything.__all__ if getattr(getattr(everything,k),'__module__','').startswith('sesemi_fastai')}
    assert ours and ours<=site[2].keys(), f'no entry: {ours-site[2].keys()}'
    for o in ('PairedDataLoaders.from_folder','PairedDataLoaders.from_dls','Learner.fit_poly_warmup','NesterovSGD'): assert o in site[2] and callable(site[2][o][1]) and check_site.doc_of(site[2][o][1]), o

def test_every_page_is_in_the_sidebar(site):
    home = (site[0]/'index.html').read_text(encoding='utf-8')
    side = home[home.index('id="quarto-sidebar"'):home.index('<main')]
    for o in site[0].rglob('*.html'): assert f'href="{o.relative_to(site[0]).as_posix()}"' in side or o.name=='index.html', f'{o.name} is in no section of nbs/_quarto.yml'

def test_faults_are_found(site, tmp_path):
    docs = shutil.copytree(site[0], tmp_path/'docs')
    for page,old,new in [('api/data.html', 'href="../use.html"', 'href="../no-use.html"'), ('api/data.html', 'id="PairedDataLoaders"', 'id="other"'), ('api/data.html', '<code>unlabeled_bs</code>', ''),
            ('index.html', '<main', '<main><img src="site_libs/smalldocs.css"><i '), ('api/optimizer.html', '<p>', '<p>\n#| export\n'), ('api/schedule.html', '<p>', '<p>A picture '), ('learner_features.html', '<p>', '<p><script>')]:
        text = (docs/page).read_text(encoding='utf-8'); assert old in text, (page,old)
        (docs/page).write_text(text.replace(old, new), encoding='utf-8')
    def silent(name, **kwargs): "A function that says nothing of `name`"
    found = '\n'.join(check_site.check(docs, site[1], site[2]|dict(get_arch=(site[2]['get_arch'][0], silent))))
    for o in ('get_arch: nothing is said of its parameter name', 'data.html: broken link', 'no anchor', 'PairedDataLoaders: no entry', 'no row for its parameter unlabeled_bs', 'index.html: image without alternative text', 'optimizer.html: raw markup', "schedule.html: says 'picture'", 'learner_features.html: lost text'):
        assert o in found, f'{o}: not noticed'

def test_calls_in_text_are_checked(site, tmp_path):
    (tmp_path/'a.md').write_text('---\n---\nUse `RotationPretext(wait=2)`.\n\n```python\nlearn.fit_poly_warmup(3, lr_top=1)\n```\n')
    assert len([*check_site.check_calls(tmp_path, site[2])])==2

@pytest.mark.parametrize('url', ['', 'https://example.org/me/it'])
def test_description_renders_on_a_package_index(tmp_path, url):
    from readme_renderer import markdown
    for o in ('setup.py','README.md','pyproject.toml','settings.ini'): shutil.copy(root/o, tmp_path/o)
    text = (tmp_path/'settings.ini').read_text(); (tmp_path/'settings.ini').write_text(re.sub(r'^git_url =.*', f'git_url = {url}', text, flags=re.M))
    r = subprocess.run([sys.executable,'-W','ignore','setup.py','--long-description'], cwd=tmp_path, capture_output=True, text=True, encoding='utf-8')
    page = markdown.render(r.stdout[r.stdout.index('# sesemi_fastai'):])
    assert page and '<table>' in page and '<code' in page, r.stderr
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(o.startswith(('https://','#user-content-')) for o in links), links
    assert ('<img' in page)==bool(url)

def test_addresses_come_from_the_settings(monkeypatch):
    import readme
    index = (root/'nbs/index.ipynb').read_text(encoding='utf-8')
    assert 'pip install git+' not in readme.render(index)
    monkeypatch.setitem(readme.cfg, 'git_url', 'https://example.org/me/it')
    assert 'pip install git+https://example.org/me/it' in readme.render(index)
    assert 'https://example.org/me/it/blob/main/sesemi_fastai/' in build_site.source_link(build_site.importlib.import_module('sesemi_fastai.schedule').PolyWarmup)

def test_messages_use_the_fields_words():
    # What the package prints, warns and raises; the pages have its docstrings
    faults = []
    for o in sorted((root/'sesemi_fastai').glob('*.py')):
        for c in ast.walk(ast.parse(o.read_text(encoding='utf-8'))):
            if isinstance(c, ast.Constant) and isinstance(c.value, str): faults += [f'{o.name}, line {c.lineno}: {w}' for w in check_site.wrong_words(c.value)]
    assert not faults, '\n'.join(faults)
