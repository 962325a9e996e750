"What a user can get wrong: one sentence that names it and the way out, before training where it can be known then"
import json,os,shutil,signal,subprocess,sys,tarfile,time
import numpy as np,pytest,torch
from torch import nn
from torchvision.models import resnet18,squeezenet1_0
from fastai.vision.all import Callback,DataLoaders,ImageDataLoaders,Learner,get_image_files
from sesemi_fastai.all import *
from sesemi_fastai.imagewang import imagewang_command

class NoStep(Callback):
    "Fails when training begins"
    def before_batch(self): raise AssertionError('a step was begun')

def paired(folder, **kw):
    return PairedDataLoaders.from_folder(folder, **(dict(size=32, unlabeled_bs=2, bs=8, num_workers=0, seed=0)|kw))

def quiet(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)

def command(capsys, *args):
    "What the command says on a mistake"
    with pytest.raises(SystemExit) as e: imagewang_command([str(o) for o in args])
    err = capsys.readouterr().err.strip()
    assert e.value.code==2 and len(err.splitlines())==1 and err.startswith('sesemi_imagewang: '), err
    return err

def test_left_out_classes_are_said_and_stay(folder, capsys):
    dls = paired(folder)
    assert "Left out of 'train': 1 folders (3 images)" in capsys.readouterr().out
    assert len(list((folder/'train/left').iterdir()))==3 and list(dls.vocab)==['a','b']

def test_pictures_that_are_not_square(folder):
    own = ImageDataLoaders.from_folder(folder, valid='val', train='train', bs=4, num_workers=0)
    learn = Learner(PairedDataLoaders.from_dls(own, get_image_files(folder/'unsup')), resnet18(num_classes=3))
    with pytest.raises(ValueError, match=r'40×48 pixels.*Resize\(40\)'): quiet(learn, 1, cbs=[RotationPretext(), NoStep()])

def test_fit_without_unlabelled_images(folder):
    dls = paired(folder)
    learn = Learner(DataLoaders(dls.train, dls.valid), resnet18(num_classes=2))
    with pytest.raises(ValueError, match='PairedDataLoaders.from_dls'): quiet(learn, 1, cbs=[RotationPretext(), NoStep()])

def test_folder_without_unlabelled_images(folder, capsys, tmp_path):
    "It is named, with what to do on the command line as in Python; an empty one will do, as is said"
    shutil.rmtree(folder/'unsup')
    args = [str(o) for o in (folder,'--size',32,'--arch','resnet10_8','--epochs',1,'--steps',1,'--unlabeled_bs',2,'--num_workers',0,'--out',tmp_path/'out')]
    said = f"{folder/'unsup'} is no folder: put the unlabelled images there (an empty folder will do), or in Python name others with unlabeled=(...)."
    assert command(capsys, *args)==f'sesemi_imagewang: {said}'
    with pytest.raises(FileNotFoundError) as e: paired(folder)
    assert str(e.value)==said
    assert len(paired(folder, unlabeled=('train','val')).unlabeled.dataset)==24
    (folder/'unsup').mkdir(); imagewang_command(args); assert '16 labelled, 24 unlabelled' in capsys.readouterr().out

def test_model_without_a_place_for_the_head(folder):
    learn = Learner(paired(folder, size=64), squeezenet1_0(num_classes=2))
    with pytest.raises(ValueError, match='SqueezeNet.*features='): quiet(learn, 1, cbs=[RotationPretext(), NoStep()])
    learn = Learner(paired(folder, size=64), squeezenet1_0(num_classes=2), cbs=RotationPretext(features='features'))
    quiet(learn, 1, 1e-3)

def test_image_cut_short_is_named(folder):
    bad = folder/'unsup/3.png'; bad.write_bytes(bad.read_bytes()[:900])
    learn = Learner(paired(folder), resnet10(width=16, num_classes=2), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(BadImageError, match=r"unsup/3.png can't be read.*exclude="): quiet(learn, 1, cbs=RotationPretext())

def test_file_that_is_no_image_is_named_before_training(folder, capsys, tmp_path):
    (folder/'val/a/0.png').write_text('no image')
    assert 'val/a/0.png' in command(capsys, folder, '--out', tmp_path/'out')
    assert not list((tmp_path/'out').glob('run-*'))

def tree(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob('*'))

def test_command_mistakes(folder, capsys, tmp_path):
    out = ['--out', tmp_path/'out', '--size', 32, '--arch', 'resnet10_16']
    assert 'nowhere' in command(capsys, tmp_path/'nowhere', *out)
    (tmp_path/'empty').mkdir(); assert "'train'" in command(capsys, tmp_path/'empty', *out)
    (tmp_path/'file').touch(); assert 'is a file' in command(capsys, folder, '--out', tmp_path/'file', '--unlabeled_bs', 2)
    (tmp_path/'used/run-0').mkdir(parents=True); assert 'never overwritten' in command(capsys, folder, '--out', tmp_path/'used', '--unlabeled_bs', 2)
    assert "can't be written" in command(capsys, folder, '--out', '/proc/none', '--unlabeled_bs', 2)
    assert 'no finished run' in command(capsys, '--report', '--out', tmp_path/'used')
    assert '32×32 pixels' in command(capsys, folder, '--out', tmp_path/'out', '--size', 32, '--unlabeled_bs', 2, '--arch', 'vit_b_16')
    (tmp_path/'names.json').write_text('{"dog": "Dog"}')
    assert 'none of the classes a, b' in command(capsys, folder, *out, '--unlabeled_bs', 2, '--class_names', tmp_path/'names.json')
    assert 'a (8), b (8): use 8 or fewer' in command(capsys, folder, *out, '--unlabeled_bs', 2, '--labels_per_class', 9)
    assert not (tmp_path/'out').exists()

early = [(['--save_every','nonsense'],'nonsense'), (['--backward','both'],"'both'"), (['--warmup_epochs','9','--epochs','2'],'epochs=2'), (['--warmup_epochs','nan'],'warmup_epochs=nan'), (['--num_workers','-1'],'num_workers=-1'),
         (['--unlabeled_bs','0'],'unlabeled_bs=0'), (['--lr','nan'],'lr=nan'), (['--lr','inf'],'lr=inf'), (['--lr','0'],'lr=0'), (['--lr','-1'],'lr=-1'), (['--lr','much'],"'much'"), (['--recipe','magic'],"'magic'"), (['--runs','0'],'--runs 0'),
         (['--size','0'],'size=0'), (['--epochs','0'],'epochs=0'), (['--steps','0'],'steps=0'), (['--seed','-1'],'seed=-1'), (['--on_bad_image','ignore'],"'ignore'"), (['--resume'],'--resume needs --out'), (['--what'],'--what'),
         (['--objective','rotaton'],"'rotaton'"), (['--objective','rotation+rotation'],'twice'), (['--objective','rotation('],"isn't understood"), (['--objective','fixmatch(threshold=1.5)'],'threshold=1.5'), (['--objective','rotation(weight=-1)'],'weight=-1'),
         (['--objective','rotation(wait=1)'],"'wait'"), (['--ema','1'],'ema=1'), (['--ema','nan'],'ema=nan'), (['--arch','resnet19'],'did you mean'), (['--arch','fasterrcnn_resnet50_fpn'],'classifier'), (['--arch','deeplabv3_resnet50'],'classifier'),
         (['--arch','timm:nothing'],'nothing'), (['--class_names','nowhere.json'],'nowhere.json'),
         (['--opt','lion'],"'lion'"), (['--schedule','step'],"'step'"), (['--schedule','flat_cos','--warmup_epochs','1'],'no warm-up'), (['--dropout','1'],'dropout=1'), (['--dropout','nan'],'dropout=nan'), (['--bs','0'],'bs=0'), (['--labels_per_class','0'],'labels_per_class=0')]

def test_mistakes_that_are_known_before_anything_is_read(capsys, tmp_path, monkeypatch):
    "In one sentence, without a look at the data, a network or a download, and nothing is left behind"
    def never(*args, **kw): raise AssertionError('too late')
    for o in ('get_data','run_plan','train_all'): monkeypatch.setattr(f'sesemi_fastai.imagewang.{o}', never)
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', never); monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', never)
    monkeypatch.chdir(tmp_path)
    for args,says in early:
        err = command(capsys, 'images', *args); assert says in err, (args,err)
        assert tree(tmp_path)==[], args

def test_the_mended_command_works(folder, capsys, tmp_path, monkeypatch):
    "A fit that fails at its first step, or is interrupted there, leaves no folder that the next one would be refused for"
    args = [str(o) for o in (folder,'--size',32,'--arch','resnet10_16','--epochs',1,'--steps',1,'--unlabeled_bs',2,'--num_workers',0,'--out',tmp_path/'a/out')]
    for error,status in ((RuntimeError('no'),None), (KeyboardInterrupt(),130)):
        def broken(*_, **__): raise error
        with monkeypatch.context() as m:
            m.setattr(RotationPretext, 'loss', broken)
            with pytest.raises((SystemExit,RuntimeError)) as e: imagewang_command(args)
        assert getattr(e.value,'code',None)==status and not (tmp_path/'a').exists(), error
    err = capsys.readouterr().err.strip(); assert err.startswith('sesemi_imagewang: interrupted') and len(err.splitlines())==1
    imagewang_command(args); assert (tmp_path/'a/out/report.html').exists()

one_image = [(['--bs',1],2,'plan'), (['--recipe','best','--unlabeled_bs',1],2,'plan'), (['--recipe','best','--bs',1,'--size',40],2,'training'), (['--bs',2,'--bn_groups',2],4,'training')]   # images grow to 40, or halves are normalised apart

@pytest.mark.parametrize('args,least,when', one_image)
def test_labelled_batch_of_one(folder, capsys, tmp_path, args, least, when):
    "Which BatchNorm can't normalise where a channel has one value: one sentence in the plan's timing and in training, and nothing is left behind; with the batch that it asks for the command works"
    usual = [folder,'--size',32,'--arch','resnet10_8','--epochs',1,'--steps',1,'--unlabeled_bs',2,'--num_workers',0,'--cache','none','--out',tmp_path/'out']
    with pytest.raises(SystemExit) as e: imagewang_command([str(o) for o in [*usual,*args]])
    said = capsys.readouterr()
    assert e.value.code==2 and said.err.strip()==f"sesemi_imagewang: BatchNorm can't normalise one labelled image by its own statistics: use a bs of {least} or more."
    assert ('run-0' in said.out)==(when=='training') and not (tmp_path/'out').exists()
    imagewang_command([str(o) for o in [*usual,*args,'--bs',least,'--unlabeled_bs',2]])

def test_home_that_cannot_be_written(folder, capsys, tmp_path, monkeypatch):
    from fastai.data.external import fastai_cfg
    monkeypatch.setenv('FASTAI_HOME', '/proc/none'); fastai_cfg.cache_clear()
    try: assert 'FASTAI_HOME' in command(capsys, 'sample', '--out', tmp_path/'out')
    finally: fastai_cfg.cache_clear()
    assert not (tmp_path/'out').exists()

def test_download_that_fails(capsys, tmp_path, monkeypatch):
    from urllib.error import URLError
    def fail(url): raise URLError('no route')
    monkeypatch.setattr('sesemi_fastai.imagewang.untar_data', fail)
    assert "can't be fetched" in command(capsys, 'imagewang_160', '--out', tmp_path/'out') and not (tmp_path/'out').exists()

def test_download_that_breaks_off(capsys, tmp_path, monkeypatch):
    def fail(url): raise ConnectionResetError('reset by peer')
    monkeypatch.setattr('sesemi_fastai.imagewang.untar_data', fail)
    assert "can't be fetched" in command(capsys, 'imagewang_160', '--out', tmp_path/'out')

def test_archive_that_cannot_be_read(capsys, tmp_path, monkeypatch):
    (tmp_path/'a.tgz').touch()
    def fail(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr('sesemi_fastai.imagewang.unpack', fail)
    assert f"{tmp_path}/a.tgz can't be read (Permission denied): check its permissions." in command(capsys, tmp_path/'a.tgz', '--out', tmp_path/'out')

def test_interrupt_outside_training(folder, capsys, tmp_path, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr('sesemi_fastai.imagewang.seconds_per_step', interrupt)
    with pytest.raises(SystemExit) as e: imagewang_command([str(folder),'--out',str(tmp_path/'out'),'--size','32','--arch','resnet10_16','--unlabeled_bs','2','--num_workers','0'])
    err = capsys.readouterr().err.strip(); assert e.value.code==130 and err=='sesemi_imagewang: interrupted; the same command starts again.' and not (tmp_path/'out').exists()

@pytest.mark.parametrize('where', ['train_run','write_report'])
def test_interrupt_once_something_is_finished(folder, capsys, tmp_path, monkeypatch, where):
    "Between two runs, or while the report is written: the command that is printed goes on, and trains nothing twice"
    import shlex,sesemi_fastai.imagewang as module
    real,calls = getattr(module, where),[]
    def interrupted(*args, **kw):
        calls.append(args)
        if where=='train_run' and len(calls)==1: return real(*args, **kw)
        raise KeyboardInterrupt
    args = [str(o) for o in (folder,'--size',32,'--arch','resnet10_8','--epochs',1,'--steps',1,'--unlabeled_bs',2,'--num_workers',0,'--runs',2,'--out',tmp_path/'my out')]
    with monkeypatch.context() as m:
        m.setattr(module, where, interrupted)
        with pytest.raises(SystemExit) as e: imagewang_command(args)
    err = capsys.readouterr().err.strip(); said,_,command = err.partition(' To go on: ')
    assert e.value.code==130 and said=='sesemi_imagewang: Interrupted.' and '\n' not in err, err
    before = {o:o.stat().st_mtime_ns for o in (tmp_path/'my out').rglob('results.json')}; assert len(before)==(1 if where=='train_run' else 2)
    imagewang_command(shlex.split(command)[1:])
    assert (tmp_path/'my out/report.html').exists() and capsys.readouterr().out.count('finished already')==len(before) and {o:o.stat().st_mtime_ns for o in before}==before

@pytest.mark.skipif(os.name=='nt', reason='signals')
def test_interrupt_while_importing(tmp_path):
    "Ctrl-C to the process group, while torch or fastai is being imported"
    r = subprocess.Popen([sys.executable,'-W','ignore','-c','import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sesemi_fastai.command import start_imagewang; print("go", flush=True); start_imagewang()','sample','--out',str(tmp_path/'out')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    r.stdout.readline(); time.sleep(.7); os.killpg(r.pid, signal.SIGINT)
    _,err = r.communicate(timeout=100)
    assert r.returncode==130 and len(err.strip().splitlines())==1 and 'interrupted' in err, err
    assert not (tmp_path/'out').exists()

def test_interrupt_of_all_processes_of_a_pool(tmp_path):
    "Ctrl-C reaches the workers that look at files too, also one that waits for files: the only traceback is the caller's"
    code = """
import signal,time; signal.signal(signal.SIGINT, signal.default_int_handler)
from sesemi_fastai.images import map_files
if __name__=='__main__': print('go', flush=True); map_files(time.sleep, [.8]*5+[0.]*35, 2, 5)"""
    (tmp_path/'look.py').write_text(code)
    r = subprocess.Popen([sys.executable,'-W','ignore',str(tmp_path/'look.py')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    r.stdout.readline(); time.sleep(1.5); os.killpg(r.pid, signal.SIGINT)
    err = r.communicate(timeout=60)[1]
    assert err.count('Traceback')==1 and err.rstrip().endswith('KeyboardInterrupt'), err

def test_diverged_run_is_no_result(folder, capsys, tmp_path):
    "It fails in one sentence, is kept as failed, is named in the report, and doesn't count there"
    args = [folder,'--size',32,'--arch','resnet10_16','--epochs',1,'--steps',4,'--unlabeled_bs',2,'--num_workers',0,'--out',tmp_path/'out']
    err = command(capsys, *args, '--lr', '1e25', '--warmup_epochs', 0)
    assert 'run-0 failed' in err and 'the loss is' in err and 'step' in err and 'lower' in err
    assert not (tmp_path/'out/run-0/results.json').exists() and json.loads((tmp_path/'out/run-0/failed.json').read_text())['settings']['lr']==1e25
    assert 'no finished run' in command(capsys, '--report', '--out', tmp_path/'out')
    imagewang_command([str(o) for o in [*args,'--seed',1,'--resume']]); imagewang_command([str(o) for o in [*args,'--runs',2,'--resume']])
    said = capsys.readouterr().out
    assert 'run-0: failed earlier' in said and 'run-1: finished already' in said
    text = (tmp_path/'out/leaderboard.md').read_text(); assert 'Not counted: run-0: Training diverged' in text and '|1|' in text.splitlines()[2]

def test_weights_that_are_not_finite_in_the_end(folder, tmp_path, monkeypatch):
    "The last step's gradient is seen by no later loss"
    from sesemi_fastai.optimizer import AlignedSGD
    def step(self, closure=None): self.param_groups[0]['params'][-1].data.fill_(torch.nan)
    monkeypatch.setattr(AlignedSGD, 'step', step)
    cfg = RunConfig(str(folder), 'noise', size=32, epochs=1, arch='resnet10_16', unlabeled_bs=2, num_workers=0, steps=1)
    with pytest.raises(DivergedError, match='not finite|aren\'t finite'): train_run(cfg, tmp_path/'run', plain=True)
    assert (tmp_path/'run/failed.json').exists() and not (tmp_path/'run/results.json').exists()

def test_report_of_damaged_runs(folder, capsys, tmp_path):
    for i in (0,1,2): train_run(RunConfig(str(folder), 'noise', size=32, epochs=1, arch='resnet10_16', unlabeled_bs=2, num_workers=0, steps=1, seed=i), tmp_path/f'out/run-{i}', plain=True)
    shutil.copytree(tmp_path/'out', tmp_path/'good')
    (tmp_path/'out/run-0/results.json').write_text('{'); (tmp_path/'out/run-2/history.csv').unlink()
    err = command(capsys, '--report', '--out', tmp_path/'out'); assert 'run-0 (results.json is no JSON), run-2 (history.csv is missing)' in err and 'run-1' not in err
    assert not (tmp_path/'out/leaderboard.md').exists()
    res = json.loads((tmp_path/'good/run-1/results.json').read_text()); (tmp_path/'good/run-1/results.json').write_text(json.dumps(res|dict(lr=.7)))
    assert 'different settings (lr)' in command(capsys, '--report', '--out', tmp_path/'good')

def test_bad_archives(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    (tmp_path/'text.tgz').write_text('no archive')
    assert "isn't a whole tar archive" in command(capsys, tmp_path/'text.tgz', '--out', tmp_path/'out')
    (tmp_path/'x').write_text('x')
    with tarfile.open(tmp_path/'up.tgz', 'w:gz') as t: t.add(tmp_path/'x', '../../x')
    assert 'nothing was written' in command(capsys, tmp_path/'up.tgz', '--out', tmp_path/'out')

@pytest.mark.parametrize('kw,says', [(dict(backward='both'),'joint'), (dict(weight=-1),'weight=-1'), (dict(weight=float('nan')),'weight=nan'), (dict(ramp_pct=2),'ramp_pct=2'), (dict(start_pct=-.1),'start_pct=-0.1'), (dict(start_pct=1),'start_pct=1'), (dict(start_pct=.7, ramp_pct=.4),'start_pct=0.7 must be at most 0.6')])
def test_callback_arguments(kw, says):
    with pytest.raises(ValueError, match=says): RotationPretext(**kw)

def test_architectures_by_name(folder):
    learn = sesemi_learner(paired(folder), 'resnet18'); assert type(learn.model).__name__=='ResNet' and learn.model.fc[-1].out_features==2
    for name,says in (('resnet19','did you mean'), ('maskrcnn_resnet50_fpn','classifier')):
        with pytest.raises(ValueError, match=says): sesemi_learner(paired(folder), name)
    with pytest.raises(ValueError, match='32×32 pixels'): sesemi_learner(paired(folder), 'vit_b_16')

@pytest.mark.parametrize('args,says', [(['--num_workers','-1'],'--num_workers -1'), (['--out','/proc/none'],"can't be written"), (['--write_exclude','/proc/none/x.json'],"can't be written"), (['--class_names','nowhere.json'],'nowhere.json'), (['--train','none'],"'none'")])
def test_doctor_mistakes(folder, capsys, tmp_path, monkeypatch, args, says):
    "Known before the images are read; no folder is left"
    from sesemi_fastai.doctor_report import doctor_command
    monkeypatch.chdir(tmp_path); before = tree(tmp_path)
    with pytest.raises(SystemExit) as e: doctor_command([str(folder), *(['--out','new'] if '--out' not in args else []), *args])
    err = capsys.readouterr().err.strip(); assert e.value.code==2 and says in err and len(err.splitlines())==1
    assert tree(tmp_path)==before

def test_doctor_with_names_of_other_classes(folder, capsys, tmp_path, monkeypatch):
    "Known before the images are read; and where the page fails all the same, the lists are there"
    from sesemi_fastai import doctor_report
    def run(*args):
        with pytest.raises(SystemExit) as e: doctor_report.doctor_command([str(o) for o in (folder,'--num_workers',0,'--out',tmp_path/'out','--write_exclude',tmp_path/'list/x.json',*args)])
        err = capsys.readouterr().err.strip(); assert e.value.code==2 and len(err.splitlines())==1
        return err
    (tmp_path/'names.json').write_text('{"dog": "Dog"}')
    with monkeypatch.context() as m:
        m.setattr(doctor_report, 'doctor', lambda *a, **kw: 1/0)
        assert 'names none of the classes a, b' in run('--class_names', tmp_path/'names.json') and not (tmp_path/'out').exists()
    def fail(*args, **kw): raise OSError('no page')
    monkeypatch.setattr(doctor_report, 'write_doctor_html', fail)
    assert 'no page' in run() and json.loads((tmp_path/'out/doctor.json').read_text())['streams']['files']==36 and json.loads((tmp_path/'list/x.json').read_text())==[]

@pytest.mark.parametrize('error', [MemoryError(), torch.cuda.OutOfMemoryError('CUDA out of memory.')], ids=['memory','gpu'])
def test_doctor_without_memory(folder, capsys, monkeypatch, error):
    "Advice for reading images, not for training; for any command without a word of its own, none"
    from sesemi_fastai import doctor_report
    def fail(*args, **kw): raise error
    monkeypatch.setattr(doctor_report, 'doctor', fail)
    for advice in (True,False):
        if not advice: monkeypatch.delattr(doctor_report.sesemi_doctor, 'memory')
        with pytest.raises(SystemExit) as e: doctor_report.doctor_command([str(folder)])
        err = capsys.readouterr().err.strip(); assert e.value.code==2 and len(err.splitlines())==1 and 'not enough memory' in err
        assert ('--num_workers' in err)==advice and 'unlabeled_bs' not in err and 'a step' not in err
