"The fast recipe: the same images from a cache, in every feature of a Learner"
import json,math,os,shutil,subprocess,sys
from pathlib import Path
import numpy as np,pytest,torch
from PIL import Image
from fastai.vision.all import PILImage,accuracy
from sesemi_fastai import imagewang
from sesemi_fastai.all import *
from sesemi_fastai.augment import get_recipe
from sesemi_fastai.step import native_formats
from sesemi_fastai.imagewang import imagewang_command

def paired(folder, recipe='fast', **kw):
    kw.setdefault('cache', folder.parent/'cache')
    return PairedDataLoaders.from_folder(folder, recipe=recipe, **(dict(size=32, unlabeled_bs=4, bs=8, num_workers=0, seed=0)|kw))

def quiet(learn, f, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, f)(*args, **kw)

@pytest.fixture
def learn(folder):
    torch.manual_seed(0)
    res = sesemi_learner(paired(folder), 'resnet10_16', metrics=accuracy)
    quiet(res, 'fit_poly_warmup', 1, .01, cbs=RotationPretext())
    return res

def command(capsys, *args):
    "What the command prints, and its exit status"
    try: imagewang_command([str(o) for o in args]); status = 0
    except SystemExit as e: status = e.code
    return status,capsys.readouterr()

def test_validation_pictures_are_the_references(folder):
    "bitwise, whatever the shape of the image and the way it lies"
    rng = np.random.default_rng(1)
    for i,(h,w) in enumerate(((33,200),(120,41),(20,20),(37,37))): Image.fromarray(rng.integers(0,256,(h,w,3),dtype=np.uint8)).save(folder/f'val/a/{i}.png')
    im = Image.open(folder/'val/b/0.png'); exif = im.getexif(); exif[0x0112] = 6; im.convert('RGB').save(folder/'val/b/turned.jpg', exif=exif)
    Image.fromarray(rng.integers(0,65536,(50,40),dtype=np.uint16)).save(folder/'val/b/deep.png')
    fast,ref = (next(iter(paired(folder, o, val_bs=10).valid)) for o in ('fast','reference'))
    assert torch.equal(fast[0], ref[0]) and torch.equal(fast[1], ref[1])

def test_training_pictures_are_the_references(folder):
    "On average over many draws of one image, as the two recipes draw different numbers"
    for o in (folder/'train/a').iterdir(): o.unlink()
    y,x = np.mgrid[:73,:73]; Image.fromarray(np.stack([x*3,y*3,(x+y)*1.5],-1).astype(np.uint8)).save(folder/'train/a/0.png')
    def stats(recipe):
        dl = paired(folder, recipe, size=64, bs=1, unlabeled_bs=1, n_steps=1).train
        pics = torch.stack([dl.after_batch(dl.do_batch([dl.do_item(9*d)]))[0][0] for d in range(500)])   # item 0 of 9, pass d
        return pics.mean((2,3)).mean(0),pics.mean((2,3)).std(0),pics.std((2,3)).mean(0)
    for a,b in zip(stats('fast'), stats('reference')): assert (a-b).abs().max()<.1, (a,b)

def test_gentle_is_fast_with_larger_crops(folder):
    "The same validation images from the same cache; crops of 60 % of the area or more"
    a,b = (next(iter(paired(folder, o, val_bs=8).valid)) for o in ('fast','gentle'))
    assert torch.equal(a[0], b[0]) and len(list_caches(folder.parent/'cache'))==1
    for recipe,least in (('fast',.2),('gentle',.6)):
        sample,pixels = get_recipe(recipe, 224).train,np.zeros((256,256,3),np.uint8)
        area = [math.prod(sample(pixels).pixels.shape[:2])/256**2 for _ in range(300)]
        assert least-.01<min(area)<least+.1 and max(area)>.9, recipe
    assert not get_recipe('gentle', 224).native

def test_bits_do_not_depend_on_workers_or_cache(folder):
    def epoch(**kw):
        dls = paired(folder, **kw)
        return [b for dl in (dls.train,dls.unlabeled) for _ in range(2) for b in dl]
    first = epoch()
    for kw in (dict(num_workers=1),dict(num_workers=2),dict(cache=False)):
        for a,b in zip(first, epoch(**kw), strict=True): assert all(map(torch.equal, a, b))
    assert not torch.equal(first[0][0], epoch(seed=1)[0][0])

def test_second_epoch_can_be_reached_without_the_first(folder):
    a,b = paired(folder).train,paired(folder).train
    list(a); b.epoch = 1
    for x,y in zip(a, b, strict=True): assert all(map(torch.equal, x, y))

def test_looking_at_it(learn, folder):
    learn.dls.show_batch(); learn.dls.unlabeled.show_batch(); learn.show_results()
    shown = learn.dls.valid.decode(learn.dls.valid.one_batch())[0][0]
    want = get_recipe('reference', 32).plain(read_rgb(learn.dls.valid.items[0]))
    assert (shown-want).abs().max()<1e-5

def test_predictions(learn, folder):
    files = [learn.dls.valid.items[i] for i in range(8)]
    preds,targs = quiet(learn, 'get_preds')
    assert [learn.dls.vocab[t] for t in targs]==[f.parent.name for f in files]
    assert len(quiet(learn, 'get_preds', ds_idx=0)[0])==16
    one = torch.stack([quiet(learn, 'predict', f)[2] for f in files])
    assert torch.allclose(one, preds, atol=.02)
    assert torch.equal(quiet(learn, 'predict', PILImage.create(files[0]))[2], one[0])
    assert torch.equal(quiet(learn, 'predict', str(files[0]))[2], one[0])
    new = folder.parent/'new.png'; shutil.copy(files[0], new)
    assert torch.equal(quiet(learn, 'predict', new)[2], one[0])
    assert torch.allclose(quiet(learn, 'get_preds', dl=learn.dls.test_dl(files))[0], preds, atol=.02)

def test_export_loads_without_this_package(learn, folder, tmp_path, predict_alone):
    learn.path = tmp_path; learn.export()
    image = folder/'val/a/0.png'
    want = quiet(learn, 'predict', image)[2]
    assert torch.allclose(torch.tensor(predict_alone(tmp_path/'export.pkl', image, 'assert [type(o) for o in learn.dls.valid.after_batch.fs]==[Normalize]')), want, atol=.02)

def test_command(folder, tmp_path, capsys):
    "`--recipe fast`: the plan says in which formats and why; the cache is made once, and is no part of a result"
    args = [folder,'--recipe','fast','--size',32,'--arch','resnet10_16','--epochs',1,'--unlabeled_bs',4,'--steps',2]
    status,said = command(capsys, *args, '--out', tmp_path/'a', '--cache', tmp_path/'cache')
    assert status==0, said.err
    assert 'recipe fast, '+('bfloat16, channels last' if native_formats('cpu')[0] else 'float32, contiguous')+' on cpu (this CPU has ' in said.out
    assert 'Caching 36 decoded images' in said.out and len(list_caches(tmp_path/'cache'))==1
    status,said = command(capsys, *args, '--out', tmp_path/'b', '--cache', 'none')
    assert status==0 and 'Caching' not in said.out
    assert (tmp_path/'a/run-0/model.pth').read_bytes()==(tmp_path/'b/run-0/model.pth').read_bytes()
    status,said = command(capsys, *args, '--out', tmp_path/'c', '--cache', tmp_path/'cache', '--backward', 'sequential')
    assert status==0 and json.loads((tmp_path/'c/run-0/results.json').read_text())['backward']=='sequential'

def test_not_enough_memory(folder, tmp_path, capsys, monkeypatch):
    "A sentence with the way out, from the callback and from the command"
    learn = sesemi_learner(paired(folder), 'resnet10_16', cbs=RotationPretext())
    monkeypatch.setattr(RotationPretext, 'loss', lambda *a: torch.empty(2**60))
    with pytest.raises(MemoryError, match='smaller unlabeled_bs.*sequential'): quiet(learn, 'fit', 1)
    monkeypatch.setattr(imagewang, 'seconds_per_step', lambda *a: torch.empty(2**60))
    status,said = command(capsys, folder, '--recipe','fast','--size',32,'--arch','resnet10_16','--unlabeled_bs',4, '--out', tmp_path/'out', '--cache', tmp_path/'cache')
    assert status==2 and len(said.err.strip().splitlines())==1 and 'not enough memory' in said.err

def test_trials_of_recipes_have_equal_passes(monkeypatch):
    "Each within a hundredth of the reference's, in as many steps as that takes; the page has words for each"
    for o in ('tests/benchmarks','tools'): monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/o))
    import readme,recipes
    assert {*recipes.trials}=={*readme.trial_words} and {k.strip('+') for o in readme.recipe_parts.values() for k in o if k}<={*recipes.trials}
    for name in recipes.trials:
        for share in (1,.25):
            cfg = recipes.config('images', name, share, 0)
            assert cfg.epochs*cfg.steps*cfg.passes_per_step()==pytest.approx(share*recipes.passes, rel=.01), name

@pytest.mark.slow
def test_benchmarks_run(tmp_path):
    "In their quick mode, on images they make: each writes its file, with the machine, and the images are drawn"
    script = Path(__file__).parent/'benchmarks/run.py'
    r = subprocess.run([sys.executable,'-W','ignore',str(script),'--quick','--out',str(tmp_path)], capture_output=True, text=True, env={k:v for k,v in os.environ.items() if k!='SESEMI_TEST_DATA'})
    assert r.returncode==0, r.stderr[-3000:]
    assert {o.name for o in tmp_path.iterdir()}=={f'{o}.json' for o in ('pipeline','overhead','memory','step','growth','names')}|{'summary.csv','bench.png','growth.png'}
    rows = [r for o in tmp_path.glob('*.json') for r in json.loads(o.read_text())['rows']]
    assert len(rows)>=13 and all(r['ratio']>=0 and r['low']<=r['ratio']<=r['high'] for r in rows)
    assert json.loads((tmp_path/'step.json').read_text())['machine']['torch']==torch.__version__
