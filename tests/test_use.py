"How people come with their data: tables, weights, test sets, few labels, other kinds of images, several inputs; and what they get when they run a cell again"
import random,shutil,time
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np,pandas as pd,pytest,torch
from PIL import Image
import fastai.callback.data # `weighted_dataloaders` and `partial_dataloaders`
from fastai.vision.all import (CategoryBlock,DataBlock,GrandparentSplitter,ImageBlock,ImageDataLoaders,Learner,PILImage,
                               Resize,TensorImage,TfmdDL,Transform,aug_transforms,get_image_files,parent_label)
from sesemi_fastai.all import *
from sesemi_fastai.streams import EpochSamples
from sesemi_fastai import images
from sesemi_fastai.folders import split_folder
from sesemi_fastai.images import check_images
from sesemi_fastai.probe import check_views

def own(folder, **kw):
    "A user's DataLoaders, with fastai's augmentation"
    return ImageDataLoaders.from_folder(folder, train='train', valid='val', **(dict(item_tfms=Resize(32), batch_tfms=aug_transforms(), bs=4, num_workers=0)|kw))

def paired(dls, items, **kw): return PairedDataLoaders.from_dls(dls, items, **(dict(unlabeled_bs=2, seed=0, verbose=False)|kw))
def from_folder(folder, **kw): return PairedDataLoaders.from_folder(folder, **(dict(size=32, unlabeled_bs=2, bs=4, num_workers=0, seed=0, verbose=False)|kw))
def batches(dl, n=3): return [b[0] for b,_ in zip(dl, range(n))]
def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for x,y in zip(a, b))
def generators(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()

# Seeds

def test_batch_transforms_draw_from_the_seed(folder):
    "fastai's batch transforms: a function of the seed, whatever the global generators are at, which stay there"
    res = []
    for i in range(2):
        dls = paired(own(folder), folder/'unsup')
        random.seed(i); np.random.seed(i); torch.manual_seed(i); was = generators()
        res.append([*batches(dls.train), *batches(dls.unlabeled)]); assert generators()==was
    assert same(*res)

def test_batch_transforms_with_workers(folder):
    "the same with worker processes"
    dls = [paired(own(folder), folder/'unsup', num_workers=n) for n in (0,2)]
    for dl in ('train','unlabeled'): assert same(*(batches(getattr(o, dl)) for o in dls))

def test_making_the_pair_moves_no_generator(folder):
    "with a seed, from_dls and from_folder leave the generators where they were"
    dls = own(folder)
    was = generators(); paired(dls, folder/'unsup'); assert generators()==was
    from_folder(folder); assert generators()==was

def test_the_same_cell_twice(folder):
    "looks at the data and a fit before change nothing of what a fit sees: weights are the same"
    dls,res = paired(own(folder), folder/'unsup', n_steps=2),[]
    for i in range(2):
        torch.manual_seed(0)
        learn = sesemi_learner(dls, 'resnet10_16')
        if i: dls.show_batch(); dls.unlabeled.one_batch(); list(dls.train); list(dls.unlabeled)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=RotationPretext())
        res.append([o.clone() for o in learn.model.state_dict().values()]); plt.close('all')
    assert same(*res)

# Unlabelled items in any form of test_dl

def frame(folder, label=True):
    "A table such as Kaggle's: names without folder, and labels"
    flat = folder.parent/'flat'; flat.mkdir(exist_ok=True); rows = []
    for p in sorted((folder/'train').glob('[ab]/*'))+sorted((folder/'unsup').glob('*')):
        name = f'{p.parent.name}_{p.name}'; shutil.copy(p, flat/name); rows.append((name, p.parent.name))
    df = pd.DataFrame(rows, columns=['image_id','label'])
    return flat,df[df.label!='unsup'].reset_index(drop=True),df[df.label=='unsup'][['image_id']+['label']*label]

@pytest.mark.parametrize('label', [True,False])
def test_items_as_a_data_frame(folder, label):
    "a DataFrame as the labelled one, with the label column or without: its images, each once an epoch"
    path,lab,unl = frame(folder, label)
    dls = ImageDataLoaders.from_df(lab, path, item_tfms=Resize(32), bs=4, num_workers=0, valid_pct=.25, seed=0)
    p = paired(dls, unl, unlabeled_bs=3)
    assert len(p.unlabeled.dataset)==12 and [len(b) for b in p.unlabeled]==[1]*4
    want = {TensorImage(np.asarray(PILImage.create(path/o).resize((32,32)))).float().mean().round().item() for o in unl.image_id}
    assert len(want)>1 and len(torch.cat(batches(p.unlabeled, 4)).flatten(1).unique(dim=0))==12

def forms(folder):
    files = get_image_files(folder/'unsup')
    return dict(L=files, list=list(files), strings=[str(o) for o in files], array=np.array([str(o) for o in files]), objects=np.array(files, dtype=object), series=pd.Series([str(o) for o in files]),
                tuple=tuple(files), iterator=iter(files), set=set(files), folder=folder/'unsup', folder_name=str(folder/'unsup'))

def test_items_in_other_forms(folder):
    "lists, tuples, sets, iterators, arrays and series of files or names, a folder: the same images"
    dls = own(folder)
    for k,o in forms(folder).items(): assert {str(f) for f in paired(dls, o).unlabeled.dataset.items}=={str(f) for f in get_image_files(folder/'unsup')}, k

def test_a_single_item(folder):
    "one file, one image, nothing, a folder that isn't there: a sentence that says what to pass"
    dls,f = own(folder),folder/'unsup/0.png'
    for o,says in ((f,'a single file'),(str(f),'a single file'),(folder/'none','no folder'),(PILImage.create(f),'a single PILImage'),(f.read_bytes(),'a single bytes'),([],'no unlabelled items'),(pd.DataFrame(dict(a=[])),'no unlabelled items')):
        with pytest.raises(ValueError, match=says) as e: paired(dls, o)
        assert len(str(e.value).splitlines())==1

# Order

def test_weighted_loaders(folder):
    "weighted_dataloaders: labels come by their weights, as a function of the seed and epoch, each time augmented differently"
    db = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter('train','val'), get_y=parent_label, item_tfms=Resize(32), batch_tfms=aug_transforms())
    ds = db.datasets(folder)
    w = np.array([8. if o.parent.name=='a' else 1. for o in ds.items])
    def loaders(): return db.weighted_dataloaders(folder, w, bs=4, num_workers=0)
    runs = []
    for i in range(2):
        np.random.seed(i); p = paired(loaders(), folder/'unsup', n_steps=40)
        runs.append([torch.cat([b[1] for b in p.train]) for _ in range(2)])
    assert same(*runs) and not torch.equal(*runs[0]) and (p.train.order.dl.vocab[0],len(runs[0][0]))==('a',160)
    assert .75<(runs[0][0]==0).float().mean()<.98
    p.train.epoch,p.train.n_skip = 1,30; assert torch.equal(torch.cat([b[1] for b in p.train]), runs[0][1][120:])

def test_partial_loaders(folder):
    "partial_dataloaders, a loader of another length: its order, and its number of batches an epoch where that is the larger stream"
    db = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter('train','val'), get_y=parent_label, item_tfms=Resize(32))
    dls = db.datasets(folder).partial_dataloaders(8, bs=4, num_workers=0, after_item=db.item_tfms, after_batch=db.batch_tfms)
    p = paired(dls, [folder/'unsup/0.png']*2)
    assert len(p.train)==2 and [len(b[1]) for b in p.train]==[4,4]

class OwnBatches(TfmdDL):
    def create_batch(self, b): return super().create_batch(b[::-1])

def test_a_loader_that_makes_its_own_batches(folder):
    "a loader whose class changes more than the order: refused, with what it changes"
    dls = own(folder); dls.train = dls.train.new(cls=OwnBatches)
    with pytest.raises(ValueError, match='an? OwnBatches, which has its own create_batch'): paired(dls, folder/'unsup')

# Epochs and few images

def test_more_labels_than_unlabelled_images(folder):
    "fewer unlabelled images than labels: an epoch shows each label once, and n_steps makes it longer as well"
    p = paired(own(folder), get_image_files(folder/'unsup')[:3])
    n = len(p.train.dataset)//4
    assert (len(p.train),len(p.unlabeled))==(n,n) and n>3//2 and sum(len(b[1]) for b in p.train)==4*n and len(batches(p.unlabeled, 99))==n
    p = paired(own(folder), folder/'unsup', n_steps=50); assert len(batches(p.train, 99))==len(batches(p.unlabeled, 99))==50

def test_fewer_labels_than_a_batch(folder, capsys):
    "fewer labels than a batch: a smaller batch, said in one line; more than asked for by `bs` is refused"
    dls = PairedDataLoaders.from_folder(folder, size=32, num_workers=0)
    said = capsys.readouterr().out.splitlines()
    assert dls.train.bs==16 and dls.unlabeled.bs==32 and said[-1]=='There are 16 labelled images: they come in batches of 16, not 128.'
    dls = PairedDataLoaders.from_folder(folder, size=32, num_workers=0, unlabeled='unsup')
    assert (dls.train.bs,dls.unlabeled.bs)==(16,12) and '12 unlabelled images: they come in batches of 12, not 32.' in capsys.readouterr().out
    few = PairedDataLoaders.from_dls(own(folder, bs=64), folder/'unsup', seed=0)
    assert few.train.bs==len(few.train.dataset) and few.unlabeled.bs==12 and 'not 64' in capsys.readouterr().out

# A test set

def three_way(folder):
    "DataLoaders with a test set, by fastai's own splits"
    db = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(32), splitter=lambda o: [range(0,12), range(12,16), range(16,24)])
    return db.dataloaders(folder, bs=4, num_workers=0)

def test_a_test_set_is_not_trained_on(folder, capsys):
    "a third loader with labels: refused as the unlabelled one; beside unlabelled items it is kept as dls[3]"
    dls = three_way(folder); learn = Learner(dls, resnet10(width=16, num_classes=5), loss_func=torch.nn.functional.cross_entropy)
    with pytest.raises(ValueError, match='third loader of learn.dls gives labels'):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=RotationPretext())
    p = paired(dls, folder/'unsup', verbose=True)
    assert p[3] is dls[2] and 'dls[3]' in capsys.readouterr().out and len(p.unlabeled.dataset)==12
    again = paired(p, [folder/'unsup/0.png']*4); assert again[3] is dls[2] and len(again.loaders)==4

# Images that can't be read

def test_truncated_image_in_a_pipeline_of_the_user(folder):
    "an unlabelled image cut short, read by fastai's own transforms: named; with 'skip' another takes its place"
    f = folder/'unsup/3.png'; f.write_bytes(f.read_bytes()[:-900])
    for n in (0,2):
        with pytest.raises(BadImageError) as e: list(paired(own(folder), folder/'unsup', num_workers=n).unlabeled)
        assert e.value.path==f
    with pytest.raises(BadImageError): list(paired(own(folder), [str(o) for o in get_image_files(folder/'unsup')]).unlabeled)
    p = paired(own(folder), folder/'unsup', on_bad_image='skip')
    assert sum(len(b[0]) for b in p.unlabeled)==2*len(p.unlabeled) and [o for o,_ in p.bad_images]==[f]
    with pytest.raises(ValueError, match="'error' or 'skip'"): paired(own(folder), folder/'unsup', on_bad_image='grey')

def test_truncated_image_of_a_data_frame(folder):
    "the same where the file's name comes out of a table"
    path,lab,unl = frame(folder); f = path/unl.image_id.iloc[3]; f.write_bytes(f.read_bytes()[:-900])
    dls = ImageDataLoaders.from_df(lab, path, item_tfms=Resize(32), bs=4, num_workers=0)
    with pytest.raises(BadImageError) as e: list(paired(dls, unl, unlabeled_bs=1).unlabeled)
    assert e.value.path==f

class Broken(Transform):
    def encodes(self, x:PILImage): raise ZeroDivisionError('mine')

def test_an_error_in_a_users_transform_is_their_own(folder):
    "an error that isn't the file's: unchanged, and never skipped"
    p = paired(own(folder), folder/'unsup', on_bad_image='skip')
    p.unlabeled.dataset.tls[0].tfms.fs.append(Broken())
    with pytest.raises(ZeroDivisionError, match='mine'): list(p.unlabeled)

# Classes with awkward names

@pytest.mark.parametrize('name', ['train','val','unsup'])
def test_a_class_called_as_a_folder(folder, name):
    "a class folder named train, val or unsup: labelled, excluded, skipped and examined as any"
    for o in ('train','val'): (folder/o/'a').rename(folder/o/name)
    dls = from_folder(folder); assert list(dls.vocab)==sorted([name,'b'])
    labels = {(p.parent.name,dls.vocab[y]) for p,y in zip(dls.valid.items, torch.cat([b[1] for b in dls.valid]).tolist())}
    assert labels=={(name,name),('b','b')}
    f = folder/f'train/{name}/0.png'; assert len(from_folder(folder, exclude=[f]).train.dataset)==15
    f.write_text('x'); assert [p for p,_ in from_folder(folder, on_bad_image='skip').bad_images]==[f]
    for o in (folder/f'train/{name}').iterdir(): o.write_text('x')
    with pytest.raises(ValueError, match=f'No labelled image of {name} is left'): from_folder(folder, on_bad_image='skip')
    assert doctor(folder, num_workers=0)['classes'].bars=={name:8,'b':8}

# Several inputs, other kinds of images

def two_inputs(folder):
    turn = lambda o: PILImage.create(o).transpose(Image.Transpose.ROTATE_90)
    db = DataBlock((ImageBlock,ImageBlock(PILImage),CategoryBlock), n_inp=2, get_items=get_image_files, splitter=GrandparentSplitter('train','val'), get_y=parent_label, getters=None,
                   get_x=[lambda o: o, lambda o: o], item_tfms=Resize(32))
    return db.dataloaders(folder, bs=4, num_workers=0)

def test_models_with_two_inputs(folder):
    "a model with two inputs: the unlabelled batch has both, and no label"
    p = paired(two_inputs(folder), folder/'unsup')
    b = p.unlabeled.one_batch()
    assert len(b)==2 and b[0].shape==b[1].shape==(2,3,32,32) and torch.equal(b[0], b[1]) and len(p.train.one_batch())==3

@pytest.fixture
def pixels(): return np.random.default_rng(1).integers(0,256,(40,48,3), dtype=np.uint8)

def kinds(pixels, folder):
    im = Image.fromarray(pixels); im.save(folder/'new.png')
    return dict(file=folder/'new.png', name=str(folder/'new.png'), array=pixels, bytes=(folder/'new.png').read_bytes(), image=im, fastai=PILImage.create(folder/'new.png'),
                tensor=torch.tensor(pixels).permute(2,0,1), tensor_image=TensorImage(torch.tensor(pixels).permute(2,0,1)), lazy=Image.open(folder/'new.png'))

@pytest.mark.parametrize('recipe', ['reference','fast'])
def test_predict_takes_what_fastai_takes(folder, pixels, recipe, tmp_path):
    "arrays, bytes, tensors, images of Pillow and fastai in predict: the same as from the file; in the export too"
    dls = from_folder(folder, recipe=recipe, cache=tmp_path)
    learn = Learner(dls, resnet10(width=16, num_classes=2)); learn.export(tmp_path/'x.pkl')
    plain = torch.load(tmp_path/'x.pkl', weights_only=False)
    for l in (learn, plain):
        with l.no_bar(): res = {k:l.predict(o)[2] for k,o in kinds(pixels, folder).items()}
        for k,o in res.items(): assert torch.equal(o, res['file']), k

def test_show_batch(folder):
    "show_batch of each loader, after from_dls and from_folder, with unique=True: images that aren't flat, as many as asked for, and of one item different ones"
    def drawn(dl, **kw):
        plt.close('all'); dl.show_batch(**kw); return [np.asarray(o.images[0].get_array(), float) for o in plt.gcf().axes if o.images]
    for dls in (paired(own(folder), folder/'unsup', unlabeled_bs=4), from_folder(folder, unlabeled_bs=4)):
        epochs = [o.epoch for o in (dls[0],dls[2])]
        for i in range(3):
            ims = drawn(dls[i]); assert len(ims)>=4 and all(o.std()/(o.max()-o.min())>.1 for o in ims), i
        ims = drawn(dls.train, unique=True, max_n=6); assert len(ims)==6 and len({o.tobytes() for o in ims})==6
        assert [o.epoch for o in (dls[0],dls[2])]==epochs
    plt.close('all')

def test_a_copy_with_another_batch_size(folder):
    "dls.unlabeled.new(bs=…): one pass over the items in batches of that size; too large a one is said"
    dls = from_folder(folder)
    for bs in (3,12,36):
        dl = dls.unlabeled.new(bs=bs); got = [len(b[0]) for b in dl]; assert got==[bs]*(36//bs)==[bs]*len(dl)
    with pytest.raises(ValueError, match='36 unlabeled images for batches of 37'): list(dls.unlabeled.new(bs=37))
    assert len(dls.unlabeled.new())==len(dls.unlabeled) and len(dls.unlabeled.new(n_steps=5))==5

# Exports

def odd_images(folder):
    "A file of each mode and turn"
    rng,res = np.random.default_rng(2),{}
    base = Image.fromarray(rng.integers(0,256,(6,8,3),dtype=np.uint8)).resize((48,40), Image.Resampling.BICUBIC)
    exif = Image.Exif(); exif[0x0112] = 6
    deep = (np.asarray(base.convert('L')).astype(np.uint16)*257)
    for name,im,kw in [('deep.png',Image.fromarray(deep),{}),('deep.tif',Image.fromarray(deep),{}),('int.tif',Image.fromarray(deep.astype(np.int32)),{}),('pgm.pgm',Image.fromarray(deep),{}),
                       ('float1.tif',Image.fromarray((deep/65535).astype(np.float32)),{}),('float255.tif',Image.fromarray((deep/257).astype(np.float32)),{}),('float.tif',Image.fromarray(deep.astype(np.float32)),{}),
                       ('palette.png',base.quantize(16),dict(transparency=3)),('la.png',base.convert('LA'),{}),('rgba.png',base.convert('RGBA'),{}),('cmyk.jpg',base.convert('CMYK'),{}),('bw.png',base.convert('1'),{}),
                       ('turned.jpg',base,dict(exif=exif)),('turned.tif',base,dict(exif=exif)),('film.gif',base.quantize(64),dict(save_all=True, append_images=[base.quantize(8)])),('grey.png',base.convert('L'),{})]:
        im.save(folder/name, **kw); res[name] = folder/name
    return res

def test_exports_read_as_training_does(folder, predict_alone, tmp_path):
    "every mode that Pillow reads, turned images, 16 bits, floats: the export, where this package can't be imported, prepares them as validation does"
    learn = Learner(from_folder(folder), resnet10(width=16, num_classes=2)); learn.export(tmp_path/'x.pkl')
    want = {str(f):learn.dls.test_dl([f]).one_batch()[0].cpu() for f in odd_images(folder).values()}
    assert len(want[str(folder/'deep.png')].unique())>96
    torch.save({k:v.as_subclass(torch.Tensor) for k,v in want.items()}, tmp_path/'want.pt')
    predict_alone(tmp_path/'x.pkl', folder/'unsup/0.png', f"""
for k,v in torch.load({str(tmp_path/'want.pt')!r}).items(): assert torch.allclose(learn.dls.test_dl([k], num_workers=0).one_batch()[0].as_subclass(torch.Tensor), v, atol=1e-6), k
""")

# Many files

def test_time_grows_with_the_files_alone(monkeypatch):
    "finding, ordering, pairing and looking up: ten times the files take about ten times as long, and an epoch of many steps begins at once"
    monkeypatch.syspath_prepend(str(Path(__file__).parent/'benchmarks'))
    from names import with_names
    a,b = with_names(quick=True)
    assert all(b[k]<=25*a[k]+.2 for k in a), (a,b)
    assert b['begin a labelled epoch']<.5 and b['begin an unlabelled epoch']<.5
    start = time.process_time(); next(iter(EpochSamples(64, 64, 500_000, 3, 0, 'labeled'))); assert time.process_time()-start<.5

def test_left_out_classes_are_not_walked(folder, monkeypatch):
    "400 left-out classes: their folders are read once for the labels and not again for the pool"
    for i in range(40): (folder/f'train/x{i}').mkdir(); shutil.copy(folder/'train/left/0.png', folder/f'train/x{i}')
    walked,walk = [],images.os.walk
    monkeypatch.setattr(images.os, 'walk', lambda *a, **k: ((walked.append(str(o[0])) or o) for o in walk(*a, **k)))
    files = split_folder(folder)
    assert sum('/x' in o.removeprefix(str(folder)) for o in walked)==40 and len(files.left_out)==41 and len(files.unlabeled)==36

def test_many_heads_are_looked_at_by_several_processes(folder):
    "more files than 20,000: heads are looked at by worker processes; the first bad one is named"
    bad = folder/'unsup/bad.png'; bad.touch()
    with pytest.raises(BadImageError, match='bad.png'): check_images([folder/'unsup/0.png']*20_001+[bad], 2)

# Transforms that hide the answer

@pytest.mark.parametrize('recipe', ['reference','fast'])
def test_our_recipes_hide_nothing(folder, recipe, tmp_path):
    "the pipelines of from_folder pass the probe, and fastai's with vertical flips don't"
    assert check_views(from_folder(folder, recipe=recipe, cache=tmp_path))==[]
    res = check_views(paired(own(folder, batch_tfms=aug_transforms(flip_vert=True)), folder/'unsup')); assert len(res)==1 and 'Dihedral' in res[0]
