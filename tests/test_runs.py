"The command from images to a leaderboard row, and that a result depends on its seed alone"
import json,math,shutil,subprocess,sys
import pytest,torch
from torchvision.models import resnet18
from sesemi_fastai.all import *
from fastai.callback.core import Callback
from sesemi_fastai.checkpoint import lock_folder
from sesemi_fastai.report import read_csv
from sesemi_fastai.imagewang import imagewang_command

def config(folder, **kw):
    return RunConfig(str(folder), 'noise', **(dict(size=32, epochs=1, arch='resnet10_16', unlabeled_bs=4, num_workers=0, steps=4)|kw))

@pytest.fixture
def weights(folder, tmp_path):
    "Bytes of `model.pth` of a run, for settings that differ"
    def f(name, data=folder, **kw):
        train_run(config(data, **kw), tmp_path/name, plain=True)
        return (tmp_path/name/'model.pth').read_bytes()
    return f

def test_number_of_workers_changes_nothing(weights):
    first = weights('0')
    assert weights('1', num_workers=1)==first and weights('2', num_workers=2)==first
    assert weights('other', seed=1)!=first

def test_batchnorm_groups(weights):
    first = weights('0')
    assert weights('1', bn_groups=1)==first and weights('2', bn_groups=2)!=first

def test_global_generators_change_nothing(weights):
    first = weights('0'); torch.rand(7)
    assert weights('1')==first

def test_refused_resume_leaves_the_history(folder, tmp_path, monkeypatch):
    "The run that was cut may still be going on, or be resumed with its own settings"
    class Cut(Callback):
        def before_epoch(self):
            if self.epoch in cuts: raise KeyboardInterrupt
    cfg,out,cuts,real = config(folder, epochs=3),tmp_path/'run-0',[2],RunConfig.learner
    monkeypatch.setattr(RunConfig, 'learner', lambda self, dls: real(self, dls).add_cb(Cut()))
    with pytest.raises(KeyboardInterrupt): train_run(cfg, out, plain=True, save_every='1 epoch')
    was = (out/'history.csv').read_text(); assert len(was.splitlines())==3; cuts.clear()
    with pytest.raises(CheckpointError, match='another run'): train_run(config(folder, epochs=3, lr=.2), out, plain=True, resume=True)
    lock = lock_folder(out/'resume')
    with pytest.raises(CheckpointError, match='Another job'): train_run(cfg, out, plain=True, resume=True)
    lock.release(); assert (out/'history.csv').read_text()==was
    train_run(cfg, out, plain=True, resume=True); assert (out/'history.csv').read_text().startswith(was) and len((out/'history.csv').read_text().splitlines())==4

def test_commit_is_that_of_the_start(folder, tmp_path, monkeypatch):
    "And not that of the end, when files may be others"
    said = iter('ab'); monkeypatch.setattr('sesemi_fastai.run.source_commit', lambda: next(said))
    assert train_run(config(folder), tmp_path/'run-0', plain=True)['commit']=='a'

def test_finished_runs_of_other_data(folder, tmp_path, capsys):
    "Nothing is trained beside them: there would be no common mean"
    other = tmp_path/'other'; shutil.copytree(folder, other)
    args = ['--size','32','--epochs','1','--steps','2','--arch','resnet10_8','--unlabeled_bs','4','--num_workers','0','--out',str(tmp_path/'out')]
    imagewang_command([str(folder),*args])
    with pytest.raises(SystemExit): imagewang_command([str(other),*args,'--runs','2','--resume'])
    assert f'finished run on {folder.name}, and this one is on other' in capsys.readouterr().err and not (tmp_path/'out/run-1').exists()

def test_labels_of_the_unlabelled_pool_are_not_read(folder, weights, tmp_path):
    "The same images in the same order, with a class's name on their folder, give the same weights"
    poisoned = tmp_path/'poisoned'; shutil.copytree(folder, poisoned)
    (poisoned/'unsup').rename(poisoned/'b'); (poisoned/'unsup').mkdir(); (poisoned/'b').rename(poisoned/'unsup/b')
    assert weights('0')==weights('1', data=poisoned)

def test_val_can_be_kept_out(folder):
    assert len(config(folder).dls().unlabeled.dataset)==16+8+12
    items = config(folder, val_in_pool=False).dls().unlabeled.dataset.items
    assert len(items)==16+12 and not any(folder/'val' in o.parents for o in items)

def test_baseline_sees_the_same_labelled_images(folder):
    a,b = (list(config(folder).dls().train.get_idxs()) for _ in range(2))
    assert a==b

def test_command_with_baseline(folder, tmp_path):
    out = tmp_path/'out'
    r = subprocess.run([sys.executable,'-m','sesemi_fastai.imagewang',str(folder),'--size','32','--arch','resnet10_16','--epochs','2','--unlabeled_bs','4',
                        '--runs','2','--baseline','--num_workers','0','--steps','3','--out',str(out)], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    for o in ('Classes    2: a, b','Left out   1 folders of train (3 images)','16 labelled, 36 unlabelled (val among them)','2 epochs of 3 steps = 6 steps, 192 image passes (96 of a baseline)','objective rotation, 4 passes for each unlabelled image','Time       about'): assert o in r.stdout
    for seed in (0,1):
        for kind in ('run','baseline'):
            assert {o.name for o in (out/f'{kind}-{seed}').iterdir()}=={'results.json','model.pth','history.csv','steps.csv','curves.png'}
    res = json.loads((out/'run-1/results.json').read_text())
    assert {'accuracy','seed','epochs','steps','size','arch','recipe','val_in_pool','image_passes','seconds','versions','commit'}<=set(res)
    assert res['seed']==1 and res['steps']==6 and res['image_passes']==192 and 0<=res['accuracy']<=100
    assert json.loads((out/'baseline-1/results.json').read_text())['image_passes']==96
    page = (out/'report.html').read_text(encoding='utf-8'); assert page.count('src="data:image/png')==2 and 'src="http' not in page and '192 (96 of a baseline)' not in page and 'Difference: ' in page
    acc = {k:[json.loads((out/f'{k}-{s}/results.json').read_text())['accuracy'] for s in (0,1)] for k in ('run','baseline')}
    assert ('Student' in page)==(abs(acc['run'][0]-acc['baseline'][0]-acc['run'][1]+acc['baseline'][1])>1e-3)   # none of pairs alike by chance, of eight images
    assert '|32|2|SESEMI|' in (out/'leaderboard.md').read_text() and '2,mean&pm;std' in (out/'leaderboard.md').read_text()
    acc = (out/'run-1/history.csv').read_text().splitlines()[-1].split(',')[3]
    assert abs(float(acc)*100-res['accuracy'])<1e-4

def test_accuracy_is_that_of_the_last_epoch(folder, tmp_path, monkeypatch):
    given = iter([.2,.6,.4])
    def accuracy(preds, targs): return next(given)
    monkeypatch.setattr('sesemi_fastai.run.accuracy_among', lambda classes: accuracy)
    res = train_run(config(folder, epochs=3), tmp_path/'run', plain=True)
    assert abs(res['accuracy']-40)<1e-4 and read_csv(tmp_path/'run/history.csv')['accuracy']==[.2,.6,.4]

def test_baseline_has_no_second_task(folder, tmp_path):
    columns = {kind:list(read_csv((train_run(config(folder), tmp_path/kind, baseline=kind=='baseline', plain=True), tmp_path/kind)[1]/'history.csv')) for kind in ('run','baseline')}
    assert set(columns['run'])-set(columns['baseline'])=={'rotation_loss','rotation_acc'}

def test_no_val_of_the_command(folder, tmp_path, capsys):
    imagewang_command([str(folder),'--no_val','--size','32','--arch','resnet10_16','--epochs','1','--steps','1','--unlabeled_bs','4','--num_workers','0','--out',str(tmp_path/'out')])
    res = json.loads((tmp_path/'out/run-0/results.json').read_text())
    assert 'val kept out' in capsys.readouterr().out and not res['val_in_pool'] and res['counts']['unlabeled']==16+12

def test_export_loads_without_this_package(folder, tmp_path, predict_alone):
    dls = PairedDataLoaders.from_folder(folder, size=32, unlabeled_bs=4, bs=8, num_workers=0, seed=0)
    learn = sesemi_learner(dls, resnet18)
    with learn.no_bar(), learn.no_logging(): learn.fit_poly_warmup(1, .01, cbs=RotationPretext())
    learn.path = tmp_path; learn.export()
    image = folder/'val/a/0.png'
    with learn.no_bar(): want = learn.predict(image)[2]
    assert torch.allclose(torch.tensor(predict_alone(tmp_path/'export.pkl', image)), want, atol=1e-6)

def test_objectives_of_the_command(folder, tmp_path, capsys):
    "Named in the plan, the results, the columns and the leaderboard; image passes count a pass that is only forward as a third"
    imagewang_command([str(folder),'--objective','rotation(weight=.5)+fixmatch(threshold=.7, weighting=free)','--size','32','--arch','resnet10_16','--epochs','1','--steps','2','--unlabeled_bs','3','--num_workers','0','--baseline','--out',str(tmp_path/'out')])
    said,name = capsys.readouterr().out,'rotation(weight=0.5)+fixmatch(threshold=0.7, weighting=free)'
    res = {k:json.loads((tmp_path/f'out/{k}-0/results.json').read_text()) for k in ('run','baseline')}
    assert res['run']['objective']==name and res['run']['image_passes']==2*(12+3*4+3+1)==56 and res['baseline']['image_passes']==24
    assert f'objective {name}, 5.33 passes' in said and f'run-0: {name}, seed 0' in said and '56 image passes (24 of a baseline)' in said
    text = (tmp_path/'out/leaderboard.md').read_text(); assert f'|32|1|{name}|' in text and '56 image passes (24 of the baseline)' in text
    assert {'rotation_loss','rotation_acc','fixmatch_loss','fixmatch_used'}<=set(read_csv(tmp_path/'out/run-0/history.csv'))
    assert res['run']['chance']['rotation_acc']==.25 and 'one run and one baseline' in text

def test_passes_of_a_late_objective(folder, tmp_path, monkeypatch):
    "Those that the results name are what went through the network, in a run so short that the share of its steps isn't that of the training"
    counted,was = [],RunConfig.learner
    def learner(self, dls):
        learn = was(self, dls)
        learn.model.register_forward_hook(lambda m,inp,out: counted.append(len(inp[0])*(1 if torch.is_grad_enabled() else 1/3)) if m.training else None)
        return learn
    monkeypatch.setattr(RunConfig, 'learner', learner)
    res = train_run(config(folder, steps=6, objective='rotation+fixmatch(start_pct=.7, threshold=.3)'), tmp_path/'run', plain=True)
    assert len(counted)==6*2+1*2 and res['image_passes']==round(sum(counted))

def test_averaged_weights_of_the_command(folder, tmp_path):
    "Of the run and of its baseline; another decay is another run"
    cfg = config(folder, ema=.5)
    for kind in ('run','baseline'): train_run(cfg, tmp_path/kind, baseline=kind=='baseline', plain=True)
    assert json.loads((tmp_path/'run/results.json').read_text())['ema']==.5
    plain = train_run(config(folder), tmp_path/'plain', baseline=True, plain=True)
    assert (tmp_path/'plain/model.pth').read_bytes()!=(tmp_path/'baseline/model.pth').read_bytes()
    with pytest.raises(CheckpointError, match='ema was 0.5, now 0.9'): train_run(config(folder, ema=.9), tmp_path/'run', plain=True, resume=True)

def test_settings_of_training_of_the_command(folder, tmp_path, capsys):
    "In the plan, the results and the report; of the baseline too"
    imagewang_command([str(folder),'--labels_per_class','3','--bs','5','--opt','adamw','--schedule','cosine','--dropout','0','--recipe','gentle','--cache','none','--objective','fixmatch(threshold=.8,bn=batch)','--arch','resnet10_8',
                       '--size','32','--epochs','2','--steps','4','--warmup_epochs','1','--unlabeled_bs','4','--num_workers','0','--baseline','--out',str(tmp_path/'out')])
    said,text = capsys.readouterr().out,(tmp_path/'out/leaderboard.md').read_text()
    for o in ("6 labelled (3 of each class; other labels aren't read), 36 unlabelled",'adamw, learning rate up to 0.003, schedule cosine','recipe gentle, float32','resnet10_8','5 labelled images and 4 unlabelled; objective fixmatch(bn=batch, threshold=0.8)'): assert o in said
    assert 'with the labels of 3 images of each class' in text and 'recipe gentle' in text
    for kind in ('run','baseline'):
        res = json.loads((tmp_path/f'out/{kind}-0/results.json').read_text())
        assert (res['opt'],res['schedule'],res['lr'],res['dropout'],res['bs'],res['counts']['labeled'],res['labels_per_class'])==('adamw','cosine',.003,0,5,6,3)
        weights = torch.load(tmp_path/f'out/{kind}-0/model.pth', weights_only=True)
        assert weights['conv1.weight'].shape==(8,3,7,7) and weights['fc.weight'].shape==(2,64)   # no dropout: the last layer itself
        want = [.003/25+.003*24/25*t/4 if t<4 else .0015*(1+math.cos(math.pi*(t-4)/4)) for t in range(8)]
        assert read_csv(tmp_path/f'out/{kind}-0/steps.csv')['lr']==pytest.approx(want, rel=1e-5)

def test_classes_that_val_has_not(folder, tmp_path, capsys, predict_alone):
    "`--extra`: in plan, results and report; the accuracy is among the classes of val, of weights that know all, and the export knows all"
    options = [str(folder),'--recipe','best','--arch','resnet10_8','--cache','none','--size','32','--epochs','1','--steps','4','--unlabeled_bs','4','--num_workers','0']
    for extra,n_out,counts,words in (('labels',3,(19,36),'labelled data too: 3 in all, of which the 2 of val are evaluated'), ('images',2,(16,39),'unlabelled images'), ('both',3,(19,39),'labelled data and unlabelled images too: 3 in all')):
        imagewang_command([*options,'--extra',extra,'--out',str(tmp_path/extra)])
        said,res,weights = capsys.readouterr().out,json.loads((tmp_path/extra/'run-0/results.json').read_text()),torch.load(tmp_path/extra/'run-0/model.pth', weights_only=True)
        assert f"Extra      classes of train that val doesn't have are {words}" in said and 'Left out' not in said and f"further classes of train for {'labels and images' if extra=='both' else extra}" in (tmp_path/extra/'leaderboard.md').read_text()
        assert (res['counts']['labeled'],res['counts']['unlabeled'],res['extra'],res['settings']['extra'],res['classes'],res['chance']['accuracy'])==(*counts,extra,extra,['a','b'],.5) and weights['fc.weight'].shape[0]==n_out
        cfg = config(folder, recipe='best', arch='resnet10_8', cache='none', extra=extra); dls = cfg.dls(); learn = cfg.learner(dls)
        learn.model.load_state_dict(weights)
        with learn.no_bar(): p,y = learn.get_preds()
        assert p.shape[1]==n_out and res['accuracy']==pytest.approx(100*(p[:,:2].argmax(1)==y).float().mean().item(), abs=1e-3)
    learn.export(tmp_path/'export.pkl')
    file = dls.valid.items[0]
    alone = predict_alone(tmp_path/'export.pkl', file, "assert learn.dls.vocab==['a','b','left']")
    assert alone==pytest.approx(p[0].tolist(), abs=.02)
    with pytest.raises(ValueError, match="extra='all'"): config(folder, extra='all')
    with pytest.raises(ValueError, match="extra='labels'.*align"): config(folder, extra='labels', objective='fixmatch(align=uniform)')
    config(folder, extra='both', objective='fixmatch(align=uniform)')

def test_flat_cos(folder, tmp_path):
    train_run(config(folder, opt='ranger', schedule='flat_cos', epochs=5), tmp_path/'run', baseline=True, plain=True)
    lrs = read_csv(tmp_path/'run/steps.csv')['lr']
    assert lrs[:15]==pytest.approx([.008]*15) and lrs[15]<.008 and lrs[-1]<.001

@pytest.mark.parametrize('kw', [dict(opt='adamw',schedule='cosine'), dict(opt='ranger',schedule='flat_cos')], ids=lambda o: o['opt'])
def test_other_optimizers_resume(folder, tmp_path, monkeypatch, kw):
    "Bitwise as the run that was never cut, with the state of the optimizer and its place in the schedule"
    cfg,n,loss = config(folder, epochs=2, labels_per_class=2, **kw),0,RotationPretext.loss
    def cut(*args):
        nonlocal n; n += 1
        if n==7: raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(RotationPretext, 'loss', cut)
    with pytest.raises(KeyboardInterrupt): train_run(cfg, tmp_path/'cut', plain=True, save_every=1)
    monkeypatch.undo()
    train_run(cfg, tmp_path/'cut', plain=True, resume=True, save_every=1); train_run(cfg, tmp_path/'whole', plain=True)
    assert (tmp_path/'cut/model.pth').read_bytes()==(tmp_path/'whole/model.pth').read_bytes()

def test_labels_that_are_not_used_are_not_read(folder, weights, tmp_path):
    "The images beyond `labels_per_class` are in the pool, and which class's folder they are in changes nothing but their place in its order"
    cfg = config(folder, labels_per_class=2); dls = cfg.dls()
    assert sorted(o.name for o in dls.train.dataset.items[:4])==['0.png','0.png','1.png','1.png'] and len(dls.unlabeled.dataset)==16+8+12
    without = tmp_path/'without'; shutil.copytree(folder, without)
    for c in 'ab':
        for i in range(2,8): (without/f'train/{c}/{i}.png').unlink()
    assert [o.relative_to(without) for o in config(without).dls().train.dataset.items[:4]]==[o.relative_to(folder) for o in dls.train.dataset.items[:4]]

def test_names_of_classes(folder, tmp_path, capsys):
    (tmp_path/'names.json').write_text('{"a": "Ant"}')
    imagewang_command([str(folder),'--class_names',str(tmp_path/'names.json'),'--size','32','--arch','resnet10_16','--epochs','1','--steps','1','--unlabeled_bs','4','--num_workers','0','--out',str(tmp_path/'out')])
    assert 'Classes    2: Ant, b' in capsys.readouterr().out and 'Ant, b' in (tmp_path/'out/report.html').read_text()
    imagewang_command(['--report','--out',str(tmp_path/'out')]); assert 'a, b' in (tmp_path/'out/report.html').read_text()

@pytest.mark.slow
def test_real_imagewang(real_data, tmp_path):
    "One epoch of the real split, at 64 px, with its baseline"
    main = [sys.executable,'-m','sesemi_fastai.imagewang',str(real_data/'imagewang-80.tgz'),'--size','64','--arch','resnet18','--epochs','1','--baseline','--out',str(tmp_path/'out')]
    r = subprocess.run(main, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert '1,275 labelled, 12,954 unlabelled (val among them), 3,929 for validation' in r.stdout and '10 folders of train (13,394 images)' in r.stdout
    assert '1 epochs of 404 steps' in r.stdout
