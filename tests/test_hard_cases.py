"""What data can be like at its worst, each with its outcome; a test's docstring says both, and the page of hard cases is made from them.
The files are made here. 'Named' means: one sentence with the file's path, the reason and the way out."""
import contextlib,io,json,os,shutil,signal,tarfile,tempfile
from pathlib import Path
import numpy as np,pytest,torch
from hypothesis import given,settings,strategies as st
from PIL import Image
from fastai.vision.all import Datasets,Learner,Transform,accuracy
from sesemi_fastai.all import *
from sesemi_fastai.images import printable,unpack
from sesemi_fastai.imagewang import run_plan
from sesemi_fastai.imagewang import imagewang_command
from sesemi_fastai.doctor_report import sesemi_doctor

def image(seed=0, size=(48,40), mode='RGB'):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0,256,(6,8,3),dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).convert(mode)

def paired(folder, **kw): return PairedDataLoaders.from_folder(folder, **(dict(size=32, unlabeled_bs=2, bs=4, num_workers=0, seed=0, n_steps=4, verbose=False)|kw))

def train(dls, *cbs, n=1):
    learn = Learner(dls, resnet10(width=16, num_classes=len(dls.vocab)), metrics=accuracy, cbs=[RotationPretext(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn

def unlabelled(dls): return torch.cat([b[0] for b in dls.unlabeled])

def named(folder, file, why):
    "`file` is named before training, and left out with 'skip'"
    with pytest.raises(BadImageError) as e: paired(folder)
    assert e.value.path==file and why in str(e.value) and printable(file) in str(e.value) and len(str(e.value).splitlines())==1
    dls = paired(folder, on_bad_image='skip')
    assert [p for p,_ in dls.bad_images]==[file] and file not in dls.unlabeled.dataset.items

def reads(folder, file, **kw):
    "`file` is read, and trained on with the others"
    im = read_rgb(file); assert im.mode=='RGB'
    dls = paired(folder, unlabeled='unsup', unlabeled_bs=13, bs=4, n_steps=1, **kw)    # one batch with all of the unlabelled
    assert file in dls.unlabeled.dataset.items and unlabelled(dls).isfinite().all()
    return im

# Files that are no images

def test_zero_bytes(folder):
    "zero bytes: named before training"
    (folder/'unsup/x.png').touch(); named(folder, folder/'unsup/x.png', 'the file is empty')

@pytest.mark.parametrize('content', [b'some text', b'<html></html>', bytes(range(256))*9, b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'])
def test_no_image_under_an_images_name(folder, content):
    "no image under an image's name (text, HTML, noise, the first bytes of a JPEG and of a PNG): named before training"
    (folder/'unsup/x.jpg').write_bytes(content); named(folder, folder/'unsup/x.jpg', "can't be read as an image")

def test_image_under_another_formats_name(folder):
    "a PNG called .jpg: read as what it is"
    image().save(folder/'unsup/x.jpg', 'PNG'); assert np.array_equal(reads(folder, folder/'unsup/x.jpg'), image())

def test_pipe_under_an_images_name(folder):
    "a named pipe called .png: named before training, and not waited for"
    os.mkfifo(folder/'unsup/x.png')
    def late(*args): raise TimeoutError('it was waited for')
    signal.signal(signal.SIGALRM, late); signal.alarm(60); named(folder, folder/'unsup/x.png', 'neither a file'); signal.alarm(0)

def test_folder_under_an_images_name(folder):
    "a folder called .png: a folder"
    (folder/'unsup/x.png').mkdir(); image().save(folder/'unsup/x.png/y.png'); reads(folder, folder/'unsup/x.png/y.png')

# Damaged images

formats = dict(jpg={}, png={}, gif={}, bmp={}, webp={}, tif={}, ppm={}, **{'jpeg':dict(progressive=True)})

@pytest.mark.parametrize('ext', formats)
def test_cut_short(tmp_path, ext):
    "cut short at 20 places, in 8 formats: either the whole image or an error that names it, never a grey rest"
    full = tmp_path/f'full.{ext}'; image(mode='L').convert('RGB').save(full, **formats[ext]); want,data = np.asarray(read_rgb(full)),full.read_bytes()
    bad = 0
    for i in [*np.linspace(0, len(data), 17, endpoint=False).astype(int), *(len(data)-o for o in (1,2,9))]:
        f = tmp_path/f'cut.{ext}'; f.write_bytes(data[:i])
        try: assert np.array_equal(read_rgb(f), want), i
        except BadImageError as e: bad += 1; assert str(f) in str(e)
    assert bad>=15

@pytest.mark.parametrize('ext', formats)
def test_damaged_bytes(tmp_path, ext):
    "60 times some bytes overwritten, in 8 formats: an image or an error that names it, and no other"
    full = tmp_path/f'full.{ext}'; image().save(full, **formats[ext]); data,rng = np.frombuffer(full.read_bytes(), np.uint8),np.random.default_rng(0)
    for i in range(60):
        a = data.copy(); a[rng.integers(0, len(a) if i%2 else min(60,len(a)), rng.integers(1,9))] = rng.integers(0,256)
        f = tmp_path/f'x.{ext}'; f.write_bytes(a.tobytes())
        with contextlib.suppress(BadImageError): assert read_rgb(f).mode=='RGB'

def test_cut_short_while_training(folder):
    "an image cut short, whose head is whole: named when it is decoded; with 'skip' found and left out before training"
    f = folder/'unsup/3.png'; f.write_bytes(f.read_bytes()[:-900])
    for n in (0,2):
        with pytest.raises(BadImageError) as e: train(paired(folder, n_steps=None, num_workers=n))
        assert e.value.path==f and 'truncated' in e.value.why
    dls = paired(folder, on_bad_image='skip'); assert [p for p,_ in dls.bad_images]==[f]
    train(dls)

# Odd images

@pytest.mark.parametrize('mode,ext', [('CMYK','jpg'), ('CMYK','tif'), ('L','png'), ('1','png'), ('LA','png'), ('RGBA','webp'), ('YCbCr','jpg'), ('LAB','tif')])
def test_modes(folder, mode, ext):
    "CMYK, grey, black and white, transparency, YCbCr, LAB: read as RGB"
    (Image.new(mode, (48,40)) if mode=='LAB' else image(mode=mode)).save(folder/f'unsup/x.{ext}'); reads(folder, folder/f'unsup/x.{ext}')
def test_16_bit(folder):
    "16 bits a channel: scaled to 8, not clipped"
    a = np.linspace(0,65535,40*48).astype(np.uint16).reshape(40,48); Image.fromarray(a).save(folder/'unsup/x.png')
    assert abs(np.asarray(reads(folder, folder/'unsup/x.png'))[...,0].astype(int)-a//257).max()<=1

def test_palette_with_transparency(folder):
    "a palette with a transparent colour: the colours, transparency dropped"
    im = image().quantize(16); im.save(folder/'unsup/x.png', transparency=3)
    assert np.array_equal(reads(folder, folder/'unsup/x.png'), im.convert('RGB'))

def test_animated(folder):
    "an animated GIF: its first frame"
    a = image(1).quantize(64); a.save(folder/'unsup/x.gif', save_all=True, append_images=[image(2).quantize(64)])
    assert np.array_equal(reads(folder, folder/'unsup/x.gif'), a.convert('RGB'))

def test_one_pixel(folder):
    "1 × 1: one colour, as large as asked for"
    Image.new('RGB',(1,1),(9,99,200)).save(folder/'unsup/x.png'); reads(folder, folder/'unsup/x.png')
    shutil.copy(folder/'unsup/x.png', folder/'val/a'); assert sum(len(b[0]) for b in paired(folder).valid)==9

@pytest.mark.parametrize('size', [(20000,2),(2,20000)])
def test_strip(folder, size):
    "20,000 × 2: its middle, 64 × 2; for validation too, where resizing the short side would take 2 GB"
    image(size=size).save(folder/'unsup/x.png'); assert sorted(reads(folder, folder/'unsup/x.png').size)==[2,64]
    shutil.copy(folder/'unsup/x.png', folder/'val/a'); assert all(o.isfinite().all() for o,_ in paired(folder, size=224).valid)

def test_decompression_bomb(folder):
    "400 million pixels in 50 kB: named before it is decoded"
    Image.new('1',(20000,20000)).save(folder/'unsup/x.png'); assert (folder/'unsup/x.png').stat().st_size<100_000
    named(folder, folder/'unsup/x.png', 'more than 178,956,970 pixels')

@pytest.mark.parametrize('tag', range(10))
def test_exif(folder, tag):
    "EXIF of all eight orientations: upright; tags that don't exist (0, 9): as stored"
    cached,exif = image(),Image.Exif(); exif[0x0112] = tag; cached.save(folder/'unsup/x.png', exif=exif)
    T = Image.Transpose     # what undoes each tag, by the EXIF standard's own table
    turn = {2:T.FLIP_LEFT_RIGHT, 3:T.ROTATE_180, 4:T.FLIP_TOP_BOTTOM, 5:T.TRANSPOSE, 6:T.ROTATE_270, 7:T.TRANSVERSE, 8:T.ROTATE_90}.get(tag)
    assert np.array_equal(reads(folder, folder/'unsup/x.png'), cached if turn is None else cached.transpose(turn))

@pytest.mark.parametrize('exif', [b'II*\0\xff\xff\xff\xff'+bytes(range(99)), b'no header of TIFF', b'II'])
def test_damaged_exif(folder, exif):
    "EXIF that is noise: the image as stored"
    image().save(folder/'unsup/x.jpg', exif=b'Exif\0\0'+exif, quality=95, dpi=(72,72))
    image().save(folder/'plain.jpg', quality=95); assert np.array_equal(reads(folder, folder/'unsup/x.jpg'), read_rgb(folder/'plain.jpg'))

# Names

names = [b'two words.png', b' .png', b'line\nbreak.png', b'tab\tquote"\'.png', b'caf\xe9.png', 'ü漢😀.png'.encode(), b'n'*251+b'.png', b'-rf.png', b'%s{0}.PNG', b'a\\b.png']

@pytest.mark.parametrize('name', names, ids=lambda o: ascii(o[:12]))
def test_names(folder, name):
    "names with spaces, line breaks, quotes, bytes that are no UTF-8, 255 bytes: read; in messages and lists they are escaped and come back"
    f = folder/'unsup'/os.fsdecode(name); image().save(f); reads(folder, f)
    assert f not in paired(folder, exclude=[f]).unlabeled.dataset.items
    f.write_text('x'); named(folder, f, 'not an image')

@pytest.mark.parametrize('name', names[:6], ids=lambda o: ascii(o[:12]))
def test_names_of_classes(folder, name, capsys):
    "the same as names of classes: trained, planned, reported"
    for o in ('train','val'): (folder/o/'a').rename(folder/o/os.fsdecode(name))
    dls = paired(folder, bs=8); train(dls); assert os.fsdecode(name) in dls.vocab
    cfg = RunConfig(str(folder), 'noise', size=32, epochs=1, arch='resnet10_16', unlabeled_bs=2, num_workers=0)
    run_plan(cfg, cfg.dls()).encode('utf-8'); sesemi_doctor(str(folder), num_workers=0); assert 'Images of each class' in capsys.readouterr().out

# Links, permissions, hidden files

def test_loop_of_links(folder):
    "links in a loop: walked once"
    n = len(paired(folder).unlabeled.dataset); (folder/'unsup/loop').symlink_to(folder/'unsup'); (folder/'unsup/up').symlink_to(folder/'unsup/up')
    assert len(paired(folder).unlabeled.dataset)==n

def test_links_out_of_the_folder(folder, tmp_path):
    "links out of the folder, to a file and to a folder: followed, since folders of links are how many data sets are kept"
    (tmp_path/'cache').mkdir(); image().save(tmp_path/'cache/a.png'); image(1).save(tmp_path/'b.png')
    (folder/'unsup/cache').symlink_to(tmp_path/'cache'); (folder/'unsup/x.png').symlink_to(tmp_path/'b.png')
    items = paired(folder).unlabeled.dataset.items; assert folder/'unsup/cache/a.png' in items and folder/'unsup/x.png' in items

def test_link_to_nowhere(folder):
    "a link that leads nowhere: named before training"
    (folder/'unsup/x.png').symlink_to(folder/'none.png'); named(folder, folder/'unsup/x.png', 'the link leads nowhere')

@pytest.fixture
def open_folder(folder):
    "The folder where anyone can read it"
    top = Path(tempfile.mkdtemp()); os.chmod(top, 0o755); shutil.copytree(folder, top/'data'); yield top/'data'
    shutil.rmtree(top)

def test_unreadable_file(open_folder, nobody):
    "a file that may not be read: named before training"
    f = open_folder/'unsup/3.png'; f.chmod(0)
    with nobody(): named(open_folder, f, 'Permission denied')

def test_unreadable_folder(open_folder, nobody):
    "a folder that may not be read: an error that names it, not an empty folder"
    (open_folder/'unsup/deep').mkdir(mode=0)
    with nobody(), pytest.raises(PermissionError, match=r"unsup/deep can't be read \(Permission denied\)"): paired(open_folder)
    (open_folder/'unsup/deep').chmod(0o755)

def test_hidden_files(folder):
    "hidden files and folders, __MACOSX and what is no image by its extension: not looked at"
    for o in ('unsup/.x.png','unsup/._1.png','unsup/__MACOSX/x.png','unsup/.cache/x.png','train/.d/x.png','train/__MACOSX/x.png','unsup/x.txt','unsup/Thumbs.db','val/.DS_Store'):
        (folder/o).parent.mkdir(exist_ok=True); (folder/o).write_text('no image')
    dls = paired(folder); assert len(dls.unlabeled.dataset)==16+8+12 and list(dls.vocab)==['a','b']

# Files that change while training

def test_file_removed_while_training(folder):
    "a file removed during training: named, whatever the number of workers"
    for n in (0,2):
        dls = paired(folder, n_steps=None, num_workers=n); f = folder/'unsup/5.png'; data = f.read_bytes(); f.unlink()
        with pytest.raises(BadImageError, match=r'unsup/5\.png .*the file is gone') as e: train(dls)
        assert e.value.path==f; f.write_bytes(data)

def test_file_removed_while_training_with_skip(folder, capfd):
    "the same with 'skip': another image, drawn by the seed, takes its place; the same for every number of workers, listed in dls.bad_images and reported after the fit"
    seen = []
    for n in (0,1,2):
        dls = paired(folder, n_steps=None, num_workers=n, on_bad_image='skip'); gone = [folder/'unsup/5.png', folder/'train/a/2.png']; data = [f.read_bytes() for f in gone]
        whole = unlabelled(dls); dls.unlabeled.epoch = 0
        for f in gone: f.unlink()
        seen.append((unlabelled(dls), torch.cat([b[1] for b in dls.train]))); u = seen[-1][0]
        changed = [not torch.equal(a, b) for a,b in zip(whole, u)]
        assert u.shape==whole.shape and sum(changed)==2
        assert {p for p,_ in dls.bad_images}==set(gone) and all(w=='the file is gone' for _,w in dls.bad_images)
        train(dls); assert "2 images couldn't be read while training" in capfd.readouterr().out
        for f,d in zip(gone, data): f.write_bytes(d)
    for o in seen[1:]: assert all(torch.equal(a, b) for a,b in zip(o, seen[0]))

def test_disk_gone_while_training(folder):
    "all files removed during training: an error with 'skip' too, after 20 attempts for one place"
    dls = paired(folder, on_bad_image='skip'); shutil.rmtree(folder)
    with pytest.raises(BadImageError, match='the file is gone'): train(dls)

def test_validation_image_removed_while_training(folder):
    "a validation image removed during training: an error with 'skip' too, since an accuracy over fewer images is another number"
    dls = paired(folder, on_bad_image='skip', unlabeled='unsup'); (folder/'val/a/1.png').unlink()
    with pytest.raises(BadImageError, match='val/a/1.png'): train(dls)

def test_command_with_skip(folder, tmp_path, capsys):
    "`sesemi_imagewang --on_bad_image skip`: says at the start what is left out, and lists it in results.json"
    (folder/'unsup/x.png').write_text('x'); f = folder/'train/a/0.png'; f.write_bytes(f.read_bytes()[:-50])
    imagewang_command([str(folder),'--on_bad_image','skip','--size','32','--arch','resnet10_16','--epochs','1','--unlabeled_bs','2','--steps','2','--num_workers','0','--out',str(tmp_path/'out')])
    out = capsys.readouterr().out; assert "2 images can't be read and are left out: " in out and '15 labelled, 35 unlabelled' in out
    bad = json.loads((tmp_path/'out/run-0/results.json').read_text())['bad_images']; assert [p for p,_ in bad]==[str(f), str(folder/'unsup/x.png')]

def test_class_without_a_readable_image(folder):
    "a class none of whose images can be read: an error that names the class, with 'skip' too"
    for f in (folder/'train/b').iterdir(): f.write_text('x')
    with pytest.raises(ValueError, match='No labelled image of b is left'): paired(folder, on_bad_image='skip')

# Few

def test_one_image_of_each_class(folder):
    "one image of each class: trains, in batches of that many; larger ones that are asked for are refused"
    for o in ('train/a','train/b','val/a','val/b'):
        for f in list((folder/o).iterdir())[1:]: f.unlink()
    train(paired(folder, bs=None))
    with pytest.raises(ValueError, match='2 labelled images for batches of 4'): paired(folder)

def test_one_class(folder):
    "one class: trains, and is right by definition; the doctor says that there is nothing to tell apart"
    for o in ('train/b','val/b'): shutil.rmtree(folder/o)
    assert train(paired(folder)).recorder.values[-1][2]==1 and 'nothing to tell apart' in doctor(folder, num_workers=0)['classes'].says

# Archives

def archive(path, *members):
    with tarfile.open(path, 'w:gz') as t:
        for name,kind,link,data in members:
            m = tarfile.TarInfo(name); m.type,m.linkname,m.size = kind,link,len(data); t.addfile(m, io.BytesIO(data))
    return path

fine = ('d/a.png', tarfile.REGTYPE, '', b'x')
bad_members = dict(absolute=('/etc/x', tarfile.REGTYPE, '', b'x'), up=('d/../../x', tarfile.REGTYPE, '', b'x'), link=('d/l', tarfile.SYMTYPE, '../../x', b''), absolute_link=('d/l', tarfile.SYMTYPE, '/etc', b''),
    inner_link=('d/l', tarfile.SYMTYPE, 'a.png', b''), hard_link=('d/l', tarfile.LNKTYPE, '/etc/passwd', b''), device=('d/null', tarfile.CHRTYPE, '', b''), block=('d/sda', tarfile.BLKTYPE, '', b''), pipe=('d/p.png', tarfile.FIFOTYPE, '', b''), long_name=('d/'+'n'*256, tarfile.REGTYPE, '', b'x'))

@pytest.mark.parametrize('kind', bad_members)
def test_archive_that_leaves_its_folder(tmp_path, kind):
    "an archive with an absolute path, `..`, a link, a device, a pipe or a name of 256 bytes: refused, nothing is written"
    with pytest.raises(BadArchiveError, match='nothing was written'): unpack(archive(tmp_path/'x.tgz', fine, bad_members[kind]), tmp_path/'home')
    assert not (tmp_path/'home').exists()

def test_archive_of_many_members(tmp_path):
    "an archive of more members than 500,000 (here, than 99): refused once the limit is passed, nothing is written"
    a = archive(tmp_path/'x.tgz', *[(f'd/{i}', tarfile.REGTYPE, '', b'') for i in range(100)])
    with pytest.raises(BadArchiveError, match='more than 99 members'): unpack(a, tmp_path/'home', max_members=99)
    assert not (tmp_path/'home').exists(); assert len(list(unpack(a, tmp_path/'home', max_members=100).iterdir()))==100

@pytest.mark.slow
def test_archive_of_a_million_members(tmp_path):
    "an archive of a million empty files: refused, nothing is written"
    with tarfile.open(tmp_path/'x.tgz', 'w:gz', compresslevel=1) as t:
        head = tarfile.TarInfo('d/a.png').tobuf(); t.fileobj.write(head*1_000_000)
    with pytest.raises(BadArchiveError, match='more than 500,000 members'): unpack(tmp_path/'x.tgz', tmp_path/'home')
    assert not (tmp_path/'home').exists()

def test_archive_larger_than_the_disk(tmp_path):
    "an archive that unpacked is larger than what the disk has free: refused before it is read that far, nothing is written"
    m = tarfile.TarInfo('d/huge.png'); m.size = 2**60
    with tarfile.open(tmp_path/'x.tar', 'w') as t: t.fileobj.write(m.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(BadArchiveError, match='GiB that are free'): unpack(tmp_path/'x.tar', tmp_path/'home')
    assert not (tmp_path/'home').exists()

@pytest.mark.parametrize('ext', ['tgz','tar','tar.bz2','tar.xz'])
def test_archive_cut_short(tmp_path, ext):
    "an archive cut short, in four forms: refused, nothing is written"
    a = tmp_path/f'x.{ext}'
    with tarfile.open(a, 'w:'+dict(tgz='gz').get(ext, ext[4:])) as t:
        m = tarfile.TarInfo('d/a.png'); m.size = 99_999; t.addfile(m, io.BytesIO(np.random.default_rng(0).bytes(99_999)))
    data = a.read_bytes(); a.write_bytes(data[:len(data)//2])
    with pytest.raises(BadArchiveError, match="isn't a whole tar archive"): unpack(a, tmp_path/'home')
    assert not list((tmp_path/'home').glob('*'))

# Pairing

class Item(Transform):
    "A number with what the generators give for it"
    def encodes(self, x:int): return torch.tensor([x, torch.rand(1).item(), np.random.rand()])

def pair(n, bs, m, ubs, seed, workers=0):
    dsets = Datasets(range(n+3), [[Item()],[Item()]], splits=[range(n), range(n, n+3)])
    return PairedDataLoaders.from_dls(dsets.dataloaders(bs=bs, num_workers=0), range(1000, 1000+m), unlabeled_bs=ubs, seed=seed, num_workers=workers)

shapes = st.tuples(st.integers(1,40), st.integers(1,40), st.integers(1,120), st.integers(1,40), st.integers(0,2**31), st.integers(1,4)).filter(lambda o: o[1]<=o[0] and o[3]<=o[2])

@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes)
def test_pairing(shape):
    "any numbers of images, batch sizes and epochs: as many batches of both, as one pass over the larger stream has, no image of that one twice in an epoch, images of both equally often to within one in each epoch and in all so far"
    n,bs,m,ubs,seed,epochs = shape
    dls,lab,unl = pair(n, bs, m, ubs, seed),np.zeros(n,int),np.zeros(m,int)
    steps = max(m//ubs, n//bs)
    for _ in range(epochs):
        l,u = [b[0] for b in dls.train],[b[0] for b in dls.unlabeled]
        assert len(l)==len(u)==len(dls.train)==len(dls.unlabeled)==steps and {len(o) for o in l}=={bs} and {len(o) for o in u}=={ubs}
        c,d = (np.bincount(torch.cat(o)[:,0].long()-k, minlength=z) for o,k,z in ((l,0,n),(u,1000,m)))
        lab += c; unl += d
        assert (d if m//ubs==steps else c).max()==1 and np.ptp(c)<=1 and np.ptp(d)<=1 and np.ptp(lab)<=1 and np.ptp(unl)<=1

@settings(max_examples=3, deadline=None, derandomize=True)
@given(shapes)
def test_pairing_with_workers(shape):
    "images, their order and random numbers with 0, 1 and 2 workers: the same"
    n,bs,m,ubs,seed,_ = shape
    runs = [[torch.cat([b[0] for b in dl]) for dl in (dls.train, dls.unlabeled, dls.train)] for dls in (pair(n, bs, m, ubs, seed, w) for w in (0,1,2))]
    for o in runs[1:]: assert all(torch.equal(a, b) for a,b in zip(o, runs[0]))
