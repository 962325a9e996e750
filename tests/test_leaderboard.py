"A row of fastai's leaderboard: from the command to the text of a pull request, and what the rules forbid"
import io,json,re,sys
from contextlib import redirect_stdout
from dataclasses import replace
import numpy as np,pytest
from PIL import Image
import sesemi_fastai
from sesemi_fastai.all import *
from sesemi_fastai.command import start_imagewang
from sesemi_fastai.augment import get_recipe,recipes
from sesemi_fastai.entry import code_link,repository_address
from sesemi_fastai.imagewang import imagewang_command,train_all
from sesemi_fastai.report import imagewang_classes,imagewang_rows,row_crop

@pytest.fixture(scope='module')
def wang(tmp_path_factory):
    "A few small images in the ten classes of Imagewang, and in one that is left out"
    root,rng = tmp_path_factory.mktemp('wang')/'wang',np.random.default_rng(0)
    for nm,n in {**{f'train/{c}':1 for c in imagewang_classes}, 'train/n01440764':2, **{f'val/{c}':1 for c in imagewang_classes}, 'unsup':4}.items():
        (root/nm).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0,256,(40,48,3),dtype=np.uint8)).save(root/nm/f'{i}.png')
    return root

small = ['--size','128','--epochs','5','--arch','resnet10_4','--runs','2','--unlabeled_bs','12','--num_workers','0']

@pytest.fixture(scope='module')
def trained(wang, tmp_path_factory):
    "Folder of a row's runs, and what the command printed"
    out = tmp_path_factory.mktemp('row')/'out'
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as said:
        m.setattr(sys, 'argv', ['sesemi_imagewang','leaderboard',str(wang),*small,'--out',str(out)])
        start_imagewang()
    return out,said.getvalue()

def refused(capsys, *args):
    "What `sesemi_imagewang leaderboard` says on a mistake: one sentence"
    with pytest.raises(SystemExit) as e: imagewang_command(['leaderboard',*map(str, args)])
    err = capsys.readouterr().err
    assert e.value.code==2 and err.startswith('sesemi_imagewang leaderboard: ') and err.count('\n')==1, err
    return err.strip().removeprefix('sesemi_imagewang leaderboard: ')

def test_from_the_command_to_the_pull_request(wang, trained):
    "Settings are those of the rules, the row is the mean of the last epochs, the log is the runs' histories, and it is said that these images are no row"
    out,said = trained
    text = (out/'pull_request.md').read_text(encoding='utf-8')
    assert text in said and said.strip().splitlines()[-1].startswith(f'For the pull request: {out}/pull_request.md')
    rs = [json.loads((out/f'run-{i}/results.json').read_text()) for i in (0,1)]
    for i,r in enumerate(rs):
        assert (r['seed'],r['size'],r['epochs'],r['steps_per_epoch'],r['steps'],r['objective'],r['val_in_pool'],r['labels_per_class'])==(i,128,5,2,10,'rotation',True,None)
        assert set(r['classes'])==set(imagewang_classes) and r['counts']==dict(labeled=10, unlabeled=24, valid=10)   # without the class that val hasn't
        rows = [o.split(',') for o in (out/f'run-{i}/history.csv').read_text().splitlines()]
        assert float(rows[-1][3])*100==pytest.approx(r['accuracy'], abs=1e-4)
        log = text.partition(f'**run-{i}**')[2].partition('**run-')[0]
        for o in rows[1:]: assert f"| {o[0]} | {float(o[1]):.4f} | {float(o[2]):.4f} | {float(o[3]):.4f} |" in log
    a,b = (r['accuracy'] for r in rs); mean,sd = (a+b)/2,abs(a-b)/2**.5
    link = code_link(rs, repository_address()); name = f'[SESEMI]({link})' if link else 'SESEMI'
    assert f'\n|128|5|{name}|{mean:.2f}% &pm; {sd:.2f}|2,mean&pm;std|\n' in text
    assert f'`sesemi_imagewang leaderboard {wang} --arch resnet10_4 --unlabeled_bs 12 --num_workers 0 --size 128 --epochs 5 --runs 2 --out {out}`' in text
    todo = text.partition('## Before it is sent')[2].partition('## Log')[0]
    for o in ("10 labelled images, not 1,275, 24 unlabelled images, not 12,954, 10 validation images, not 3,929", *([] if link else ['set git_url in settings.ini, or pass --link']), '2 runs: the rules ask', f'of 2 runs are above {imagewang_rows[128,5]:.2f} %'): assert o in todo, o
    assert (out/'report.html').exists() and '24 unlabelled (val among them), 10 for validation' in said and 'Left out   1 folders of train (2 images)' in said

def test_same_command_goes_on(wang, trained, capsys):
    "Nothing is trained twice, another address makes another row, and other settings or data are refused before anything is trained"
    out,_ = trained; before = (out/'pull_request.md').read_text(encoding='utf-8')
    imagewang_command(['leaderboard',str(wang),*small,'--out',str(out),'--link','https://example.org/code/abc'])
    said,text = capsys.readouterr().out,(out/'pull_request.md').read_text(encoding='utf-8')
    assert said.count('finished already')==2 and 'measured' not in said
    assert '|128|5|[SESEMI](https://example.org/code/abc)|' in text and 'Code: https://example.org/code/abc' in text and '--link' not in text.partition('## Before')[2]
    (out/'pull_request.md').write_text(before, encoding='utf-8')
    assert 'lr was 0.1, now 0.2' in refused(capsys, wang, *small, '--out', out, '--lr', '.2')
    other = wang.parent/'other'; other.exists() or other.symlink_to(wang)
    assert 'holds a finished run on wang, and this one is on other' in refused(capsys, other, *small, '--out', out)
    assert sorted(o.name for o in out.iterdir())==['leaderboard.md','pull_request.md','report.html','run-0','run-1'] and (out/'pull_request.md').read_text(encoding='utf-8')==before

def test_interrupt_once_runs_are_finished(wang, trained, capsys, monkeypatch):
    "While the report is written: the same command goes on, and is printed"
    out,_ = trained
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr('sesemi_fastai.entry.write_report', interrupted)
    with pytest.raises(SystemExit) as e: imagewang_command(['leaderboard',str(wang),*small,'--out',str(out)])
    said,_,command = capsys.readouterr().err.strip().partition(' To go on: ')
    assert e.value.code==130 and said=='sesemi_imagewang leaderboard: Interrupted.' and f'`{command}`' in (out/'pull_request.md').read_text(encoding='utf-8')

forbidden = [('--size','64'), ('--size','224'), ('--size',None), ('--epochs','40'), ('--epochs',None), ('--labels_per_class','2'), ('--steps','3'), ('--exclude','list.json'), ('--on_bad_image','skip'), ('--class_names','names.json'), ('--resume',''), ('--report','')]

@pytest.mark.parametrize('option,value', forbidden)
def test_what_the_rules_forbid(capsys, tmp_path, monkeypatch, option, value):
    "One sentence that names the option, before anything is read or made"
    def never(*args, **kw): raise AssertionError('too late')
    monkeypatch.setattr('sesemi_fastai.imagewang.get_data', never); monkeypatch.chdir(tmp_path)
    args = {'--size':'128', '--epochs':'5'}|{option:value}
    err = refused(capsys, 'imagewang', *(x for k,v in args.items() if v is not None for x in (k,v) if x))
    assert option in err and err.endswith('.') and len(re.findall(r'\.(\s|$)', err))==1 and not list(tmp_path.iterdir()), err

def test_data_that_is_no_imagewang(folder, wang, capsys, tmp_path):
    out = ['--size','128','--epochs','5','--arch','resnet10_8','--num_workers','0','--out',tmp_path/'out']
    assert 'The sample is no data' in refused(capsys, 'sample', *out)
    assert "has the classes a, b, and a row is validated on Imagewang's ten" in refused(capsys, folder, *out, '--unlabeled_bs', 4)
    assert 'An epoch would be 60 unlabelled images of 24' in refused(capsys, wang, *out, '--unlabeled_bs', 6, '--bs', 1)
    assert not (tmp_path/'out').exists()

def test_forbidden_from_python():
    with pytest.raises(ValueError, match='--steps is not for a row'): sesemi_leaderboard(size=128, epochs=5, steps=1)
    with pytest.raises(TypeError, match='what'): sesemi_leaderboard(size=128, epochs=5, what=1)

@pytest.mark.parametrize('recipe', recipes)
def test_validation_images_are_no_larger(recipe):
    "In each recipe, at each size of the leaderboard"
    im = Image.fromarray(np.zeros((400,300,3), np.uint8))
    for size in row_crop.values():
        rec = get_recipe(recipe, size); train,valid = (f(np.asarray(im) if rec.side else im) for f in (rec.train, rec.valid))
        x = [rec.after_batch[0].size, valid.pixels.shape[0], valid.pixels.shape[1]]
        assert x==[size]*3

def test_address_of_the_settings(tmp_path, monkeypatch):
    "The one of settings.ini beside the package; none where it is empty"
    monkeypatch.setattr(sesemi_fastai, '__file__', str(tmp_path/'sesemi_fastai/__init__.py'))
    for url in ('https://example.org/it',''):
        (tmp_path/'settings.ini').write_text(f'[DEFAULT]\nlib_name = sesemi_fastai\ngit_url = {url}\n')
        assert repository_address()==(url or None)

def test_time_of_a_run_is_told_once(folder, tmp_path, capsys):
    "After its first steps, and not in a run of few"
    cfg = RunConfig(str(folder), 'noise', size=32, epochs=2, arch='resnet10_8', unlabeled_bs=2, bs=8, num_workers=0, steps=14)
    train_run(cfg, tmp_path/'run', plain=True, later=(1,2)); said = capsys.readouterr().out
    assert said.count('measured')==1 and re.search(r'^10 steps measured: .* this run ends at about \d\d:\d\d, in 00:\d\d, all of them at about \d\d:\d\d$', said, re.M), said
    images,passes = (float(o.replace(',','')) for o in re.search(r'([\d,.]+) images a second \(([\d,.]+) image passes', said).groups())
    assert passes/images==pytest.approx(16/10, rel=.02)   # 8 labelled and 2 unlabelled, which are passed four times
    train_run(replace(cfg, steps=5), tmp_path/'few', baseline=True, plain=True); assert 'measured' not in capsys.readouterr().out

def test_runs_that_follow_are_counted(folder, tmp_path, monkeypatch):
    "Runs and baselines after each one, for the time at which all have ended"
    seen = []
    def train(cfg, out, baseline, later): seen.append((cfg.seed,baseline,later)); return dict(accuracy=0, seconds=0, bad_images=[])
    monkeypatch.setattr('sesemi_fastai.imagewang.train_run', train)
    cfg = RunConfig(str(folder), 'noise', size=32, arch='resnet10_8')
    train_all(cfg, tmp_path, 2, True); assert seen==[(0,False,(1,2)),(0,True,(1,1)),(1,False,(0,1)),(1,True,(0,0))]
    seen.clear(); train_all(cfg, tmp_path, 3); assert [o[2] for o in seen]==[(2,0),(1,0),(0,0)]
