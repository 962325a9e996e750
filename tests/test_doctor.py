"The doctor as a command, with processes that start afresh, and on real images with known duplicates among them"
import io,json,shutil,subprocess,sys
import numpy as np,pytest
from PIL import Image,ImageEnhance
from sesemi_fastai.all import *
from sesemi_fastai.data import split_folder
from sesemi_fastai.images import unpack
from sesemi_fastai.doctor_report import doctor_command

def command(*args): return subprocess.run([sys.executable,'-W','ignore','-m','sesemi_fastai.doctor_report',*map(str, args)], capture_output=True, text=True)

def test_command(folder, tmp_path):
    shutil.copy(folder/'val/a/0.png', folder/'unsup/copy.png'); (folder/'unsup/bad.png').touch()
    before = {o:o.stat().st_mtime_ns for o in folder.rglob('*')}
    r = command(folder, '--out', tmp_path/'out', '--write_exclude', tmp_path/'list.json', '--num_workers', 2)
    assert r.returncode==0, r.stderr
    for o in ("Can't be read                  1 of 38 files",'Duplicates of validation images  1 group, 1 file to leave out','2 files are better left out','3 more in folders of train'): assert ' '.join(o.split()) in ' '.join(r.stdout.split()), r.stdout
    res = json.loads((tmp_path/'out/doctor.json').read_text()); leaks = next(o for o in res['findings'] if o['name']=='leaks')
    assert leaks['rows'][0]['files']==['val/a/0.png','unsup/copy.png'] and leaks['exclude']==['unsup/copy.png']
    assert {o:o.stat().st_mtime_ns for o in folder.rglob('*')}==before
    r = subprocess.run([sys.executable,'-W','ignore','-m','sesemi_fastai.imagewang',str(folder),'--exclude',str(tmp_path/'list.json'),'--size','32','--arch','resnet10_16','--epochs','1','--steps','1',
                        '--unlabeled_bs','4','--num_workers','0','--out',str(tmp_path/'run')], capture_output=True, text=True)
    assert r.returncode==0 and '36 unlabelled' in r.stdout, r.stderr

def test_from_inside_the_folder(folder, tmp_path, monkeypatch):
    "`sesemi_doctor .`: the page bears the folder's name"
    monkeypatch.chdir(folder); (folder/'unsup/bad.png').touch()
    doctor_command(['.', '--num_workers', '0', '--out', str(tmp_path/'out')])
    page = (tmp_path/'out/doctor.html').read_text(encoding='utf-8'); assert '<title>Doctor: data</title>' in page and '<h1>data</h1>' in page
    assert json.loads((tmp_path/'out/doctor.json').read_text())['findings'][0]['exclude']==['unsup/bad.png']

@pytest.mark.parametrize('args,says', [(['nowhere'],'nowhere'), (['{f}','--train','none'],"'none'"), (['{f}','--exclude','{f}/val/a/0.png'],'no JSON list'), (['{f}','--run','{f}'],'no results.json'), (['{f}','--write_exclude','{f}/val/a/0.png'],'not written over')])
def test_mistakes(folder, capsys, args, says):
    with pytest.raises(SystemExit) as e: doctor_command([o.format(f=folder) for o in args])
    err = capsys.readouterr().err.strip(); assert e.value.code==2 and says in err and len(err.splitlines())==1 and err.startswith('sesemi_doctor: ')

@pytest.mark.slow
@pytest.mark.parametrize('method', ['spawn','forkserver'])
def test_processes_that_start_afresh(folder, tmp_path, method):
    "As on macOS, and from Python 3.14 on"
    code = f"import multiprocessing as mp\nif __name__=='__main__':\n    mp.set_start_method({method!r})\n    from sesemi_fastai.all import *\n    print(report_table(doctor({str(folder)!r}, num_workers=2)))"
    (tmp_path/'s.py').write_text(code)
    r = subprocess.run([sys.executable,'-W','ignore',str(tmp_path/'s.py')], capture_output=True, text=True)
    assert r.returncode==0 and '36 files: 16 labelled' in r.stdout, r.stderr

def jpeg(im, q):
    buf = io.BytesIO(); im.save(buf, 'JPEG', quality=q); return Image.open(buf)

def edge(im, p): w,h = im.size; return im.crop((int(w*p),int(h*p),w-int(w*p),h-int(h*p)))

near = dict(quality=lambda im: jpeg(im, 40), half=lambda im: im.resize((im.width//2,im.height//2)), double=lambda im: im.resize((im.width*2,im.height*2)), cut=lambda im: edge(im, .015),
            bright=lambda im: ImageEnhance.Brightness(im).enhance(1.2), grey=lambda im: im.convert('L'))

@pytest.mark.slow
def test_duplicates_among_real_images(real_data, tmp_path):
    "Of 30 duplicates of each kind of real validation images, put into unsup and train, 95 in 100 are found, and hardly anything else"
    src,rng = unpack(real_data/'imagewang-80.tgz'),np.random.default_rng(0)
    files,data = split_folder(src),tmp_path/'data'
    for o in files.all(): (data/o.relative_to(src)).parent.mkdir(parents=True, exist_ok=True); (data/o.relative_to(src)).symlink_to(o)
    known = {p for p,_ in [(p,n) for k in ('leaks','duplicates','near_duplicates') for ps,n in doctor(data)[k].rows for p in ps]}
    pick = iter(rng.permutation([data/o.relative_to(src) for o in files.valid if data/o.relative_to(src) not in known])); put = {}
    for k,f in dict(near, png=lambda im: im).items():
        for i in range(30):
            o = next(pick); to = (data/'unsup' if i%2 else data/'train'/o.parent.name)/f'{k}-{i}.png'
            f(read_rgb(o)).save(to); put[to] = o
    for i in range(20):
        o = next(pick); b = o.read_bytes(); (data/f'unsup/cut-{i}.jpg').write_bytes(b[:len(b)*(i+1)//22])
    r = doctor(data)
    found = {p for ps,_ in r['leaks'].rows if any(o in put for o in ps) for p in ps if p in put and put[p] in ps}
    print({k:sum(p.name.startswith(k) for p in found) for k in [*near,'png']}, r.seconds)
    assert len(found)>=.95*len(put) and all(p in r['leaks'].exclude for p in found)
    assert {p.name for ps,_ in r['broken'].rows for p in ps}=={f'cut-{i}.jpg' for i in range(20)}
    assert len(r['leaks'].rows)<=len(found)+10
