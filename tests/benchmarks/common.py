"Shared by the benchmarks: rounds of arms that take turns, ratios with their spread, the machine, the images"
import os,platform,statistics,subprocess,sys,tarfile,tempfile,time
from collections import namedtuple
from pathlib import Path
import numpy as np,torch
from PIL import Image

Settings = namedtuple('Settings', 'quick rounds work')   # `work`: a folder that is deleted afterwards

def rounds(arms, n, clock=time.perf_counter, warm=1):
    "Seconds of each arm, a dict of functions, in `n` rounds in which they take turns; every round begins with another one"
    names,res = list(arms),{k:[] for k in arms}
    for i in range(-warm, n):
        for k in names[i%len(names):]+names[:i%len(names)]:
            start = clock()
            own = arms[k]()                   # an arm may time itself, without what isn't its work
            if i>=0: res[k].append(clock()-start if own is None else own)
    return res

def ratio(name, mine, other, target=None, unit='', scale=1.):
    "A row of the report: `mine` over `other` by pairs, as median and range, with both medians in `unit`"
    rs = [a/b for a,b in zip(mine, other)]
    return dict(name=name, ratio=statistics.median(rs), low=min(rs), high=max(rs), pairs=len(rs), target=target,
                mine=statistics.median(mine)*scale, other=statistics.median(other)*scale, unit=unit)

def machine():
    "What the numbers were measured on"
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    import torchvision,fastai,PIL
    git = subprocess.run(['git','-C',str(Path(__file__).parent),'rev-parse','--short','HEAD'], capture_output=True, text=True).stdout.strip()
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)) if hasattr(os,'sched_getaffinity') else os.cpu_count(), threads=torch.get_num_threads(),
                memory_gb=round(os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30), load=round(os.getloadavg()[0],2), cpu_capability=torch.backends.cpu.get_cpu_capability(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, system=platform.platform(), python=platform.python_version(),
                torch=torch.__version__, torchvision=torchvision.__version__, fastai=fastai.__version__, pillow=PIL.__version__, commit=git or None, time=time.strftime('%Y-%m-%d %H:%M'))

def last_columns(learn):
    "What the Recorder has of the last epoch, by name"
    return dict(zip(list(learn.recorder.metric_names)[1:-1], map(float, learn.recorder.values[-1])))

def make_images(folder, n, size=(80,107)):
    "`n` images in one folder: smooth noise, which JPEG takes as it takes photographs"
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0,256,(size[0]//6,size[1]//6,3),dtype=np.uint8))
        small.resize(size[::-1], Image.BICUBIC).save(folder/f'{i:05d}.jpg', quality=90)

def made(work, name, n, size, classes=10):
    "A folder in Imagewang's shape with images of our own: `n` labelled, as many unlabelled, some for validation"
    root = Path(work)/name
    if not root.exists():
        for c in range(classes):
            make_images(root/f'train/c{c}', n//classes, size); make_images(root/f'val/c{c}', 2, size)
        make_images(root/'unsup', n, size)
    return root

def unpacked(work, archive):
    "Content of an archive of real images; None where there is none"
    path = Path(os.environ.get('SESEMI_TEST_DATA','none'))/archive
    if not path.exists(): return None
    out = Path(work)/archive.split('.')[0]
    if not out.exists():
        with tarfile.open(path) as t: t.extractall(out, **(dict(filter='data') if hasattr(tarfile,'data_filter') else {}))
    inner = list(out.iterdir())
    return inner[0] if len(inner)==1 and inner[0].name!='train' else out

def small_images(s):
    "Imagewang with a short side of 80 px, or images of its size"
    return (None if s.quick else unpacked(s.work, 'imagewang-80.tgz')) or made(s.work, 'made-80', 40 if s.quick else 1000, (80,107))

def large_images(s):
    "Real images with a short side of 320 px, two of each class for validation; or images of that size"
    root = None if s.quick else unpacked(s.work, 'imagewoof-320-sample.tgz')
    if root is None: return made(s.work, 'made-320', 40 if s.quick else 400, (80,107) if s.quick else (320,427))
    for c in sorted((root/'train').iterdir()):
        files = sorted(c.iterdir())
        if len(files)>4 and not (root/'val'/c.name).exists():
            (root/'val'/c.name).mkdir(parents=True)
            for f in files[:2]: f.rename(root/'val'/c.name/f.name)
    return root
