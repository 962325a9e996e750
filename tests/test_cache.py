"The cache of decoded images, in bad company: two builders at once, a kill, a full disk, files that vanish"
import errno,json,multiprocessing,os,pickle,shutil,tarfile,tempfile,time
from pathlib import Path
from contextlib import redirect_stdout
import numpy as np,pytest
from PIL import Image
from sesemi_fastai.all import *
from sesemi_fastai.cache import DecodeImage,ImageCache,not_cached,open_cache
from sesemi_fastai import images,cache as module

def build(root, home, seconds, log):
    "In another process: a cache of `root`, each image taking `seconds` longer; what is said goes to `log`"
    def work():
        decode = module.DecodeImage.__call__
        def slow(self, path): time.sleep(seconds); return decode(self, path)
        module.DecodeImage.__call__ = slow
        with open(log, 'w') as f, redirect_stdout(f): open_cache(find_images(root), root, 32, home, n_threads=2).verify()
    p = multiprocessing.get_context('fork').Process(target=work)
    p.start()
    return p

def same_images(read, root):
    for f in find_images(root): assert np.array_equal(read(f), DecodeImage(32)(f))

def leftovers(home): return [o.name for o in home.iterdir() if o.suffix=='.part']

def test_two_at_once(folder, tmp_path):
    home = tmp_path/'home'
    logs = [tmp_path/f'{i}.txt' for i in range(2)]
    both = [build(folder, home, .05, o) for o in logs]
    for p in both: p.join()
    said = ''.join(o.read_text() for o in logs)
    assert [p.exitcode for p in both]==[0,0] and said.count('Caching 39')==1 and 'Waiting for another process' in said and leftovers(home)==[]
    same_images(open_cache(find_images(folder), folder, 32, home), folder)

def test_killed_half_way(folder, tmp_path, capsys):
    home = tmp_path/'home'
    p = build(folder, home, .2, tmp_path/'log.txt')
    while p.is_alive() and not (home.exists() and leftovers(home)): time.sleep(.01)
    time.sleep(.3); p.kill(); p.join()
    assert leftovers(home) and list_caches(home)==[]
    other = home/'.other-32-0-x.part'; other.mkdir()                          # another cache is none of its business
    same_images(open_cache(find_images(folder), folder, 32, home), folder)
    assert 'Caching 39' in capsys.readouterr().out and leftovers(home)==[other.name] and len(list_caches(home))==1

def no_cache(folder, home, says):
    "Images are decoded each time, and a warning says why and what to do"
    with pytest.warns(UserWarning, match=says+r'.*cache=.*cache=False'): read = open_cache(find_images(folder), folder, 32, home)
    assert isinstance(read, DecodeImage)
    same_images(read, folder)
    assert leftovers(home)==[] and list_caches(home)==[]

def test_full_disk_before(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9,10**9,1000))
    no_cache(folder, tmp_path/'home', r"can't be cached in .*home \(0.0 GB are needed and 0.0 GB are free\)")

def test_full_disk_while_writing(folder, tmp_path, monkeypatch):
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(module.os, 'fsync', full)
    no_cache(folder, tmp_path/'home', 'No space left on device')

def test_read_only_folder(folder, tmp_path, monkeypatch):
    home = tmp_path/'home'; home.mkdir()
    def refuse(self): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.lock_file)
    monkeypatch.setattr(module.FileLock, '_acquire', refuse)                  # as root may write anywhere
    no_cache(folder, home, 'Permission denied')

def test_others_may_read(folder, tmp_path):
    "Caches and unpacked archives have the mode of any new folder, so that a second user can read them"
    with tarfile.open(tmp_path/'x.tgz', 'w:gz') as t: t.add(folder/'unsup', 'unsup')
    for mask,mode in ((0o022,0o755), (0o027,0o750)):
        was,home = os.umask(mask),tmp_path/f'{mode:o}'
        try: open_cache(find_images(folder), folder, 32, home); images.unpack(tmp_path/'x.tgz', home/'unpacked')
        finally: os.umask(was)
        made = [list_caches(home)[0]['folder'], *(home/'unpacked').iterdir()]
        assert len(made)==2 and [o.stat().st_mode&0o777 for o in made]==[mode]*2

@pytest.mark.parametrize('what', ['cache.json','pixels.bin','the cache','home'])
def test_unreadable_cache(folder, nobody, what):
    "A cache of someone else that may not be read: a warning, and images are decoded"
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755); data,home = shutil.copytree(folder, f'{top}/data'),Path(top)/'home'; files = find_images(data)
        open_cache(files, data, 32, home); mine = list_caches(home)[0]['folder']
        assert not_cached(files, data, 32, home)==[]
        {'the cache':mine, 'home':home}.get(what, mine/what).chmod(0)
        with nobody():
            with pytest.warns(UserWarning, match=r"can't be cached in .*Permission denied.*cache=False"): read = open_cache(files, data, 32, home)
            assert isinstance(read, DecodeImage) and not_cached(files, data, 32, home)==files
            assert len(list_caches(home))==(what=='pixels.bin')
            same_images(read, data)

def test_what_cant_be_replaced_is_known_before_images_are_decoded(folder, tmp_path, monkeypatch):
    "Another's cache in a folder that all may write, and one with files of others in it"
    home = tmp_path/'home'; open_cache(find_images(folder), folder, 32, home)
    mine = list_caches(home)[0]['folder']; (mine/'cache.json').write_text('{}'); decoded = decoding(monkeypatch)
    (mine/'thesis.txt').touch()
    with pytest.warns(UserWarning, match='holds other files'): open_cache(find_images(folder), folder, 32, home)
    def refuse(o): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(o))
    monkeypatch.setattr(os, 'listdir', refuse)
    with pytest.warns(UserWarning, match='Permission denied'): open_cache(find_images(folder), folder, 32, home)
    assert decoded==[]

def test_a_store_that_is_there_needs_no_writing(folder, tmp_path, monkeypatch):
    home = tmp_path/'home'
    open_cache(find_images(folder), folder, 32, home)
    def refuse(self): raise PermissionError(errno.EACCES, 'must not write')
    monkeypatch.setattr(module.FileLock, '_acquire', refuse)
    assert len(open_cache(find_images(folder), folder, 32, home))==39

def test_files_of_others_stay(folder, tmp_path):
    home = tmp_path/'home'
    open_cache(find_images(folder), folder, 32, home)
    mine = list_caches(home)[0]['folder']; (mine/'thesis.txt').write_text('mine'); (mine/'cache.json').write_text('{}')
    with pytest.warns(UserWarning, match='holds other files'): same_images(open_cache(find_images(folder), folder, 32, home), folder)
    assert (mine/'thesis.txt').read_text()=='mine'

def paired(folder, home, num_workers=0, **kw): return PairedDataLoaders.from_folder(folder, size=28, unlabeled_bs=4, bs=8, num_workers=num_workers, seed=0, recipe='fast', cache=home, verbose=False, **kw)

def reader(dls): return dls.train.dataset.tls[0].tfms.fs[0].tfm

def test_vanished_and_broken_files_are_named(folder, tmp_path):
    home,bad = tmp_path/'home',folder/'unsup/3.png'
    files = find_images(folder)
    bad.rename(tmp_path/'away.png')
    with pytest.raises(BadImageError, match='unsup/3.png'): open_cache(files, folder, 32, home)
    bad.write_bytes((tmp_path/'away.png').read_bytes()[:900])
    with pytest.raises(BadImageError, match='unsup/3.png'): paired(folder, home)
    assert leftovers(home)==[] and list_caches(home)==[]                      # neither half a cache nor a wrong image in one

def test_skip_decodes_only_what_is_not_cached(folder, tmp_path, monkeypatch):
    decoded,load = [],images.read_rgb
    monkeypatch.setattr(images, 'read_rgb', lambda o: decoded.append(o) or load(o))   # as bad_images does
    bad = folder/'unsup/3.png'; bad.write_bytes(bad.read_bytes()[:900])
    for n in (36,1):
        dls = paired(folder, tmp_path/'home', on_bad_image='skip')
        assert len(dls.unlabeled.dataset)==35 and [p for p,_ in dls.bad_images]==[bad] and len(decoded)==n and bad in decoded
        decoded.clear()

def test_changed_file_between_runs(folder, tmp_path, capsys):
    home,f = tmp_path/'home',folder/'train/a/0.png'
    paired(folder, home)
    Image.new('RGB', (40,48), (9,99,200)).save(f)
    dls = paired(folder, home)
    assert 'lacks 1 files as they are now' in capsys.readouterr().out
    read = reader(dls)
    assert isinstance(read, ImageCache) and (read(f)==[9,99,200]).all()

def decoding(monkeypatch):
    "A list of the files that are decoded from now on"
    res,decode = [],module.DecodeImage.__call__
    monkeypatch.setattr(module.DecodeImage, '__call__', lambda self, path: res.append(path) or decode(self, path))
    return res

def test_pools_that_take_turns(folder, tmp_path, monkeypatch, capsys):
    "Each pool is decoded once; the cache holds what all of them need, and serves a part of it"
    home,files,decoded = tmp_path/'home',find_images(folder),decoding(monkeypatch)
    a,b = files[:25],files[15:]
    for fs,n in ((a,25),(b,14),(a,0),(b,0),(files[3:9],0)):
        decoded.clear(); read = open_cache(fs, folder, 32, home); assert len(decoded)==n, len(fs)
    read.verify(); assert len(read)==39 and len(list_caches(home))==1 and 'Caching 14 decoded images beside 25' in capsys.readouterr().out
    monkeypatch.undo(); same_images(read, folder)

def test_what_changed_or_went_is_not_kept(folder, tmp_path, monkeypatch):
    "Images of other files are kept only while their files are as they were; a damaged one is decoded again"
    home,files = tmp_path/'home',find_images(folder)
    open_cache(files[:30], folder, 32, home)
    Image.new('RGB', (40,48), (9,99,200)).save(files[1]); files[2].unlink()
    mine = list_caches(home)[0]['folder']
    at = np.load(mine/'index.npy')[4]['offset']+99                              # one that opening doesn't look at
    with open(mine/'pixels.bin','r+b') as f: f.seek(at); b = f.read(1)[0]; f.seek(at); f.write(bytes([b^64]))
    decoded = decoding(monkeypatch)
    with pytest.warns(UserWarning, match='damaged image'): cache = open_cache(files[30:], folder, 32, home)
    assert sorted(decoded)==sorted([*files[30:], files[4]])
    cache.verify(); assert len(cache)==37 and {os.fspath(files[1]),os.fspath(files[2])}.isdisjoint(cache.rows)
    monkeypatch.undo(); same_images(open_cache(find_images(folder), folder, 32, home), folder)

def test_from_inside_the_folder(folder, tmp_path, monkeypatch, capsys):
    "`Path('.')`: a second opening decodes nothing and builds nothing, and from elsewhere it is the same cache"
    monkeypatch.chdir(folder); home,files = tmp_path/'home',find_images(Path('.'))
    open_cache(files, Path('.'), 32, home); capsys.readouterr(); decoded = decoding(monkeypatch)
    for fs,root in ((files,Path('.')), (files,'.'), (find_images(folder),folder)):
        read = open_cache(fs, root, 32, home); read.verify()
        assert not any(map(read.lacks, [fs], [[(o.stat().st_size,o.stat().st_mtime_ns) for o in fs]])) and all(len(read(o)) for o in fs)
    assert decoded==[] and capsys.readouterr().out=='' and len(list_caches(home))==1

def test_a_disk_too_small_for_both_pools(folder, tmp_path, monkeypatch):
    "Where the disk has space for one pool alone, that one is cached"
    home,files = tmp_path/'home',find_images(folder)
    open_cache(files[:25], folder, 32, home)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9,10**9,20*40*48*3))
    assert len(open_cache(files[25:], folder, 32, home))==14

def test_damaged_image(folder, tmp_path):
    "Bytes that changed on disk where opening doesn't look are never served: that image comes from its file, with a warning, and all others from the cache"
    home = tmp_path/'home'
    paired(folder, home)
    mine = list_caches(home)[0]['folder']
    bad = folder/json.loads((mine/'cache.json').read_text())['names'][1]
    row = np.load(mine/'index.npy')[1]; at = row['offset']+row['h']*row['w']*3//2
    with open(mine/'pixels.bin','r+b') as f: f.seek(at); b = f.read(1)[0]; f.seek(at); f.write(bytes([b^64]))
    read = reader(paired(folder, home))
    with pytest.warns(UserWarning, match='damaged image of .*delete that folder'): assert np.array_equal(read(bad), DecodeImage(32)(bad))
    same_images(read, folder)
    assert read.seen.sum()==35

def test_what_workers_checked_is_not_checked_again(folder, tmp_path):
    dls = paired(folder, tmp_path/'home', num_workers=1)
    for _ in dls.unlabeled: pass
    assert reader(dls).seen.sum()==36 and len(dls.unlabeled.dataset)==36

def test_a_worker_opens_a_store_that_was_made_again(folder, tmp_path):
    sent = pickle.dumps(open_cache(find_images(folder), folder, 32, tmp_path/'home'))
    shutil.copy(folder/'unsup/0.png', folder/'unsup/zz.png')
    open_cache(find_images(folder), folder, 32, tmp_path/'home')
    cache = pickle.loads(sent)
    same_images(cache, folder)
    assert len(cache)==cache.seen.sum()==40

def test_progress_is_shown_where_someone_sees_it(folder, tmp_path, monkeypatch, capsys):
    for seen in (False,True):
        monkeypatch.setattr(module.sys.stdout, 'isatty', lambda: seen)
        open_cache(find_images(folder), folder, 32, tmp_path/f'home-{seen}')
        assert ('100.00% [39/39' in capsys.readouterr().out)==seen

def test_names_that_are_not_text(folder, tmp_path):
    for n in (b'new\nline.png', b'\xff\xfe.png', 'ü ß.png'.encode()): shutil.copy(folder/'unsup/0.png', os.fsdecode(os.fsencode(folder/'unsup')+b'/'+n))
    cache = open_cache(find_images(folder), folder, 32, tmp_path/'home')
    assert len(cache)==42
    same_images(open_cache(find_images(folder), folder, 32, tmp_path/'home'), folder)

def test_memory_while_building_does_not_grow(folder, tmp_path, monkeypatch):
    "No more images are held than are in flight"
    alive,most = [0],[0]
    class Counted(np.ndarray):
        def __del__(self): alive[0] -= 1
    def decode(self, path):
        alive[0] += 1; most[0] = max(most[0], alive[0])
        return np.zeros((32,32,3), np.uint8).view(Counted)
    monkeypatch.setattr(module.DecodeImage, '__call__', decode)
    open_cache(find_images(folder), folder, 32, tmp_path/'home', n_threads=1)
    assert most[0]<=8
