"What a user can get wrong: one sentence that names it and the way out, before training where it can be known then"
import tarfile
import pytest
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

def test_model_without_a_place_for_the_head(folder):
    with pytest.raises(ValueError, match='SqueezeNet.*features='): Learner(paired(folder, size=64), squeezenet1_0(num_classes=2), cbs=RotationPretext())
    learn = Learner(paired(folder, size=64), squeezenet1_0(num_classes=2), cbs=RotationPretext(features='features'))
    quiet(learn, 1, 1e-3)

def test_image_cut_short_is_named(folder):
    bad = folder/'unsup/3.png'; bad.write_bytes(bad.read_bytes()[:900])
    learn = Learner(paired(folder), resnet10(num_classes=2), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(BadImageError, match=r"unsup/3.png can't be read.*exclude="): quiet(learn, 1, cbs=RotationPretext())

def test_file_that_is_no_image_is_named_before_training(folder, capsys, tmp_path):
    (folder/'val/a/0.png').write_text('no image')
    assert 'val/a/0.png' in command(capsys, folder, '--out', tmp_path/'out')
    assert not list((tmp_path/'out').glob('run-*'))

def test_command_mistakes(folder, capsys, tmp_path):
    out = ['--out', tmp_path/'out', '--size', 32, '--arch', 'resnet10']
    assert 'nowhere' in command(capsys, tmp_path/'nowhere', *out)
    assert "'magic'" in command(capsys, folder, *out, '--recipe', 'magic')
    assert '16 labelled images for batches of 128' in command(capsys, folder, *out)
    assert '--runs 0' in command(capsys, folder, *out, '--runs', 0)
    (tmp_path/'empty').mkdir(); assert "'train'" in command(capsys, tmp_path/'empty', *out)
    (tmp_path/'file').touch(); assert 'is a file' in command(capsys, folder, '--out', tmp_path/'file', '--unlabeled_bs', 2)
    (tmp_path/'used/run-0').mkdir(parents=True); assert 'never overwritten' in command(capsys, folder, '--out', tmp_path/'used', '--unlabeled_bs', 2)
    assert "can't be written" in command(capsys, folder, '--out', '/proc/none', '--unlabeled_bs', 2)
    assert 'no finished run' in command(capsys, '--report', '--out', tmp_path/'used')

def test_bad_archives(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    (tmp_path/'text.tgz').write_text('no archive')
    assert "isn't a whole tar archive" in command(capsys, tmp_path/'text.tgz', '--out', tmp_path/'out')
    (tmp_path/'x').write_text('x')
    with tarfile.open(tmp_path/'up.tgz', 'w:gz') as t: t.add(tmp_path/'x', '../../x')
    assert 'nothing was written' in command(capsys, tmp_path/'up.tgz', '--out', tmp_path/'out')

@pytest.mark.parametrize('kw,says', [(dict(backward='both'),'joint'), (dict(weight=-1),'weight=-1'), (dict(ramp_pct=2),'ramp_pct=2')])
def test_callback_arguments(kw, says):
    with pytest.raises(ValueError, match=says): RotationPretext(**kw)
