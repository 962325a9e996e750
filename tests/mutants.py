"""Break the package in one place at a time and see whether a test notices: `make mutants`, or `python tests/mutants.py` with modules,
or with `missing` for those that have no result yet. Results are kept as they come.
A mutant is a line of `mutants`: module, a piece of its text that is there once, what takes its place, and the tests to run, by the name of a notebook
or as pytest has them. It is applied to a copy of the repository, to the module and to its notebook. `why` says why one is expected to survive."""
import json,multiprocessing,os,re,shutil,sys,tempfile,threading,time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent
results = root/'tests/results/mutants.json'
limit,wait = 150,1200 # Seconds of computing, and of waiting, after which a mutant hangs
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', PYTHONDONTWRITEBYTECODE='1')
processes = multiprocessing.get_context('forkserver')   # begin with everything imported but the package
processes.set_forkserver_preload(['pytest','nbdev.test','hypothesis','torchvision.models','fastai.vision.all','fastai.callback.all'])

def M(module, old, new, tests, why=None): return dict(module=module, old=old, new=new, tests=tests.split(), why=why)

mutants = [
    M('images', "        ImageOps.exif_transpose(im, in_place=True)\n", "", 'images'),
    M('images', "_scaled(65535)])\n", "_scaled(255)])\n", 'images'),
    M('images', "np.searchsorted, [1,255]", "np.searchsorted, [1,1]", 'images'),
    M('images', "P=v2.Compose([_do('__call__', 'RGBA')", "P=v2.Compose([_do('__call__', 'L')", 'images'),
    M('images', "sorted(res, key=lambda o: o.replace(os.sep, '/'))", "res[::-1]", 'images'),
    M('images', "and (i or o not in leave_out))", ")", 'images folders'),
    M('images', "to_rgb(ImageOps.exif_transpose(_opened(image)))", "to_rgb(_opened(image)).transpose(0)", 'images test_use.py::test_predict_takes_what_fastai_takes'),
    M('images', "if real in seen: dirs[:] = []; continue", "if real in seen and False: continue", 'images test_hard_cases.py::test_loop_of_links'),
    M('images', "not o.startswith('.') and os.path.splitext", "os.path.splitext", 'images'),
    M('images', "os.walk(folder, onerror=fail, followlinks=True)", "os.walk(folder, followlinks=True)", 'test_hard_cases.py::test_unreadable_folder'),
    M('images', "if not stat.S_ISREG(os.stat(path).st_mode): raise OSError('neither a file nor a link to one')", "pass", 'test_hard_cases.py::test_pipe_under_an_images_name'),
    M('images', "else \"leaves the folder with '..'\" if '..' in Path(m.name).parts", "", 'images'),
    M('images', "if i>=max_members", "if i>max_members", 'test_hard_cases.py::test_archive_of_many_members'),
    M('images', "need += -(-m.size//4096)*4096", "need = 0", 'test_hard_cases.py::test_archive_larger_than_the_disk'),
    M('images', "[(Path(p),w) for p,w in later]", "[]", 'images'),
    M('resize', '(n/size).clamp(min=1)', '(n/size)', 'resize'),
    M('resize', '*(j<n)', '', 'resize'),
    M('resize', 'resize_weights(w, size, largest[1], flip)', 'resize_weights(w, size, largest[1])', 'resize augment'),
    M('resize', 'long[:,k:k+1]-1', 'long[:,:1]-1', 'resize'),
    M('resize', 'long.prod(1).cumsum(0)-long.prod(1)', 'long.prod(1).cumsum(0)-long[:1].prod(1)', 'resize'),
    M('augment', "scale=(.2,1.)", "scale=(.08,1.)", 'augment'),
    M('augment', "RandomGamma(), v2.RandomHorizontalFlip()]", "RandomGamma()]", 'augment'),
    M('augment', "round(size*256/224)", "round(size*224/256)", 'augment'),
    M('augment', "gamma:tuple=(.5,1.5)): #", "gamma:tuple=(.5,1.)): #", 'augment'),
    M('augment', "if flip: pic = pic.flip(-1)", "if flip: pic = pic.flip(-2)", 'augment test_fast.py'),
    M('augment', "random.uniform(*self.gamma), random.random()<.5", "1., random.random()<.5", 'augment test_fast.py'),
    M('augment', "scale:tuple=(.2,1.), #", "scale:tuple=(.3,1.), #", 'augment test_fast.py'),
    M('augment', "SampleCrop(size, scale=(.6,1.)),False", "SampleCrop(size),False", 'test_fast.py::test_gentle_is_fast_with_larger_crops'),
    M('augment', "SampleCrop(size, scale=(.6,1.)),False", "SampleCrop(size, scale=(.6,1.)),True", 'test_fast.py::test_gentle_is_fast_with_larger_crops'),
    M('augment', "torch.arange(256., device=gammas.device)*(1/255)", "torch.arange(256., device=gammas.device)*(1/256)", 'augment'),
    M('augment', "weakref.finalize(res, _free, _spare, n, mem).atexit = False", "_free(_spare, n, mem)", 'augment'),
    M('augment', "if min(pixels.shape[:2])!=self.side: pixels", "if False: pixels", 'augment test_fast.py::test_validation_pictures_are_the_references'),
    M('augment', "for values,t,out in zip(planes, table, res[i])", "for values,t,out in zip(planes, table[[0,0,0]], res[i])", 'augment'),
    M('cache', "is None or have[i]!=o]", "is None]", 'cache'),
    M('cache', "if st==have[i]: res[Path(f)] = st", "res[Path(f)] = st", 'test_cache.py::test_what_changed_or_went_is_not_kept'),
    M('cache', "old.lacks(stats, stats.values()),old.others(stats)", "old.lacks(stats, stats.values()),{}", 'test_cache.py::test_pools_that_take_turns'),
    M('cache', "decode(f) if f in lack else old(f)", "old(f)", 'test_cache.py::test_changed_file_between_runs'),
    M('cache', "return 5*min(size)<6*self.side", "return 5*min(size)<=6*self.side", 'cache'),
    M('cache', "if decode.stays(im.size) else decode.side", "if not decode.stays(im.size) else decode.side", 'cache test_cache.py'),
    M('cache', "if not all(map(self._whole, rows)): raise", "if False: raise", 'cache'),
    M('cache', "if not self._whole(i):", "if False:", 'test_cache.py::test_damaged_image'),
    M('cache', ".share_memory_()", "", 'test_cache.py::test_what_workers_checked_is_not_checked_again'),
    M('cache', "else self.resize(im))", "else im.resize((self.side,self.side)))", 'cache test_fast.py'),
    M('cache', "            o += px.nbytes\n", "", 'cache'),
    M('streams', "hashlib.blake2b(repr(parts).encode()", "hashlib.blake2b(repr(parts[:2]).encode()", 'streams'),
    M('streams', "np.random.seed(key%2**32); ", "", 'streams'),
    M('streams', "; torch.set_rng_state(states[2])", "", 'streams'),
    M('streams', "start+p*spill+np", "start+np", 'streams'),
    M('streams', "left_out = spill if p<n_pass-1 else last", "left_out = spill if p<n_pass else last", 'streams'),
    M('streams', "[max(0, self.skip-p*full):]", "", 'streams'),
    M('streams', "self.epoch += 1", "self.epoch += 0", 'streams'),
    M('streams', "finally: self.epoch,self.n_skip = epoch,skip", "finally: pass", 'streams'),
    M('streams', "(key if i else s)%self.n if", "s%self.n if", 'streams'),
    M('streams', "self.bad.add(bad)", "pass", 'streams'),
    M('streams', "with seeded(key, device):\n            dl.batch_key", "with nullcontext():\n            dl.batch_key", 'streams test_use.py::test_batch_transforms_draw_from_the_seed'),
    M('streams', "if self.batch_key: reseed(self.batch_key)", "pass", 'streams'),
    M('streams', "'batch', epoch, i, *parts", "'batch', i, *parts", 'streams'),
    M('streams', "(place*self.n+items[:steps*self.bs])", "(self.epoch*self.n+items[:steps*self.bs])", 'streams'),
    M('streams', "try: read_rgb(file)", "try: pass", 'test_use.py::test_truncated_image_in_a_pipeline_of_the_user'),
    M('data', "_fit_bs(bs or rec.n_labeled*ubs,", "_fit_bs(bs or ubs,", 'data'),
    M('data', ".type=='cpu': return 0", ".type=='cpu': pass", 'data'),
    M('folders', "folder = os.path.dirname(o)", "folder = None", 'folders'),
    M('data', "tl.tfms = Pipeline(tl.tfms.fs, split_idx=0); tl.split_idx = 0", "pass", 'data'),
    M('folders', "left_out if Path(nm)==Path(train) else ()", "()", 'folders'),
    M('folders', "return self.label(p)", "return next(o for o in p.relative_to(self.path).parts if o in self.vocab)", 'folders'),
    M('data', "shuffle=True, drop_last=True", "shuffle=True, drop_last=False", 'data test_hard_cases.py::test_pairing', "a stream's epoch is whole batches already; it is said for readers and for duplicates of the loader"),
    M('data', "stream='unlabeled', num_workers=-(-nw*ubs//bs)", "stream='labeled', num_workers=-(-nw*ubs//bs)", 'data objective'),
    M('data', "pass_of=max((n,bs), (m,ubs), key=lambda o: o[0]//o[1])", "pass_of=(m,ubs)", 'data'),
    M('data', "return None if type(train) is TfmdDL else LoaderOrder(train)", "return None", 'test_use.py::test_weighted_loaders'),
    M('data', "    res.n_inp = len(res.tls)\n", "", 'test_use.py::test_models_with_two_inputs', 'a stream is told from a loader with labels by its class; fastai shows a batch by it'),
    M('data', "v2.Compose([ImageOps.exif_transpose, to_rgb, pic[0].plain])", "v2.Compose([ImageOps.exif_transpose, v2.RGB(), pic[0].plain])", 'test_use.py::test_exports_read_as_training_does'),
    M('data', "unlabeled, *rest, path=", "unlabeled, path=", 'test_use.py::test_a_test_set_is_not_trained_on'),
    M('folders', "if os.path.abspath(o) not in skip]", "if os.path.abspath(o) in skip]", 'folders'),
    M('data', "ImageTransform(rec.valid, 1, rec.plain)", "ImageTransform(rec.train, 1, rec.plain)", 'data learner'),
    M('samples', "isinstance(whole, StreamDL) or len(sample_batch(whole))==1", "True", 'samples'),
    M('probe', "clear & (down<0) & (across.abs()<-down) & (curve>0)", "clear & (down<0)", 'probe'),
    M('probe', "if degrees>=45", "if degrees>45", 'probe'),
    M('probe', "min(rows,cols)<.5*max(rows,cols)", "True", 'probe'),
    M('losses', 'torch.stack([-x, x], -1)', 'torch.stack([x, -x], -1)', 'losses test_losses.py'),
    M('losses', 'return class_log_probs(logits.detach(), task).exp()', 'return class_log_probs(logits, task).exp()', 'losses test_losses.py'),
    M('losses', 'return x if x.dtype==torch.float64 else x.float()', 'return x.float()', 'losses test_losses.py'),
    M('losses', 'return -(logp.exp()*logp).sum(-1).mean()', 'return -(logp.exp()*logp).mean()', 'losses test_losses.py'),
    M('losses', 'return (weights.detach()*ce).mean()', 'return (weights.detach()*ce).sum()/weights.sum().clamp_min(1)', 'losses test_losses.py'),
    M('losses', 'logp,target = class_log_probs(logits, task),target.detach()', 'logp = class_log_probs(logits, task)', 'losses test_losses.py'),
    M('losses', 'target.argmax(-1,keepdim=True)', 'logp.argmax(-1,keepdim=True)', 'losses test_losses.py'),
    M('losses', 'F.mse_loss(f(logits), f(target_logits.detach()))', 'F.mse_loss(f(logits), f(target_logits))', 'losses test_losses.py'),
    M('losses', 't = class_log_probs(target_logits.detach(), task)', 't = class_log_probs(target_logits, task)', 'losses test_losses.py'),
    M('losses', '(t.exp()*(t-class_log_probs(logits, task)))', '((t-class_log_probs(logits, task)))', 'losses test_losses.py'),
    M('losses', 'xi:float=.03, #', 'xi:float=1e-6, #', 'losses test_losses.py'),
    M('losses', '        if coarse:\n', '        if False:\n', 'losses test_losses.py'),
    M('losses', 'torch.where(g.flatten(1).any(1).view(-1, *[1]*(x.ndim-1)), g, d)', 'g', 'losses test_losses.py'),
    M('losses', 'return eps*d', 'return eps*d.sign()', 'losses test_losses.py'),
    M('losses', 'return res/process_count()', 'return res', 'losses test_losses.py'),
    M('losses', 'return _MeanOverProcesses.forward(ctx, grad)', 'return grad', 'losses test_losses.py'),
    M('losses', 'lam*(c.square().sum()-diag.square().sum())', 'lam*c.square().sum()', 'losses test_losses.py'),
    M('losses', '+eps).sqrt()', '+eps*2).sqrt()', 'losses test_losses.py'),
    M('losses', 'dist = np.minimum(dist, (perms', 'dist = np.maximum(0*dist, (perms', 'losses test_losses.py'),
    M('losses', 't.mean(2,keepdim=True), t)', 't.amax(2,keepdim=True), t)', 'losses test_losses.py'),
    M('losses', '<grey\n', '<grey**2\n', 'losses test_losses.py'),
    M('losses', 'orders.to(x.device, non_blocking=True)[targ]]', 'orders.to(x.device, non_blocking=True)[targ].argsort(1)]', 'losses test_losses.py'),
    M('losses', 't = x[:,:,(H-h*g)//2:(H-h*g)//2+h*g,', 't = x[:,:,:h*g,', 'losses test_losses.py'),
    M('weighting', 'self.momentum*old+(1-self.momentum)*new', 'self.momentum*new+(1-self.momentum)*old', 'weighting test_losses.py'),
    M('weighting', 'getattr(self,o).clone() for o in self.stats}', 'getattr(self,o).zero_() for o in self.stats}', 'weighting test_losses.py'),
    M('weighting', 'else v.clone())', 'else torch.zeros_like(v))', 'weighting test_losses.py'),
    M('weighting', 'return (conf>=t).to(p.dtype)', 'return (conf>t).to(p.dtype)', 'weighting test_losses.py'),
    M('weighting', 't = t[i[:,0]]', 't = t[0]', 'weighting test_losses.py'),
    M('weighting', 'one = torch.ones_like(p[0])/p.shape[-1]', 'one = torch.ones_like(p[0])', 'weighting test_losses.py'),
    M('weighting', 'self.confidence.unsqueeze(-1)*self.shares/self.shares.amax(-1, keepdim=True)', 'self.confidence.unsqueeze(-1).expand_as(self.shares)', 'weighting test_losses.py'),
    M('weighting', '(conf,p,onehot)', '(conf,onehot,p)', 'weighting test_losses.py'),
    M('weighting', 'torch.where(h>0, h, torch.inf)', 'h.clamp_min(1e-6)', 'weighting test_losses.py'),
    M('weighting', 's = r.sum(-1, keepdim=True)\n', 's = torch.ones_like(r[...,:1])\n', 'weighting test_losses.py'),
    M('weighting', 'kept = (weights>0).to(p.dtype).unsqueeze(-1)', 'kept = 1', 'weighting test_losses.py'),
    M('weighting', '_norm_ratio(mean, hist)', '_norm_ratio(mean, torch.ones_like(hist))', 'weighting test_losses.py'),
    M('weighting', 'var*n/(n-1)', 'var', 'weighting test_losses.py'),
    M('weighting', 'if n>1: self.average', 'if n>0: self.average', 'weighting test_losses.py'),
    M('weighting', 'n = mean_over_processes(conf.mean(0)),len(conf)*process_count()', 'n = conf.mean(0),len(conf)', 'weighting test_losses.py'),
    M('weighting', '.clamp(max=0).square()', '.square()', 'weighting test_losses.py'),
    M('weighting', 'one/p.shape[-1])\n        if n>1', 'one)\n        if n>1', 'weighting test_losses.py'),
    M('weighting', "self.average('shares', mean, mean)", "self.average('shares', mean, torch.ones_like(mean)/p.shape[-1])", 'weighting test_losses.py'),
    M('weighting', '/self.shares.clamp_min(1e-6)', '*self.shares', 'weighting test_losses.py'),
    M('weighting', 't = torch.stack([1-t, t], -1)', 't = torch.stack([t, 1-t], -1)', 'weighting test_losses.py'),
    M('strong', 'self.std = 1/(x.amax()-x.amin()).clamp_min(1e-6)', 'self.std = (x.amax()-x.amin()).clamp_min(1e-6)', 'strong test_strong.py'),
    M('strong', 'def redo(self, x): return (x-self.mean)/self.std', 'def redo(self, x): return x', 'strong test_strong.py'),
    M('strong', 'return (x*self.std+self.mean).clamp(0,1)', 'return x*self.std+self.mean', 'strong test_strong.py'),
    M('strong', 'memory_format=torch.channels_last if last else torch.contiguous_format)', 'memory_format=torch.contiguous_format)', 'strong test_strong.py'),
    M('strong', 'y.as_subclass(Tensor).to(x.dtype)', 'y.as_subclass(Tensor)', 'strong test_strong.py'),
    M('strong', 'x.new_empty(len(x)).uniform_(lo, hi)', 'x.new_empty(1).uniform_(lo, hi).expand(len(x))', 'strong test_strong.py'),
    M('strong', '(torch.rand(len(x), device=x.device)<p)', '(torch.rand(len(x), device=x.device)<1)', 'strong test_strong.py'),
    M('strong', '(self.max_shear,2*self.max_shift)', '(self.max_shear,4*self.max_shift)', 'strong test_strong.py'),
    M('strong', 'mat = mat*torch.tensor([[1,H/W,1],[W/H,1,1]], dtype=mat.dtype).to(mat.device, non_blocking=True)', 'mat = mat', 'strong test_strong.py'),
    M('strong', 'torch.where(share>0, 1-share, torch.inf)', '1-share+9', 'strong test_strong.py'),
    M('strong', 'self._colour if x.shape[1]==3 else self._grey', 'self._grey', 'strong test_strong.py'),
    M('strong', 'self.max_cover*min(H,W)/2', 'self.max_cover*min(H,W)', 'strong test_strong.py'),
    M('strong', 'def __hash__(self): return hash(repr(self))', 'def __hash__(self): return id(self)', 'strong test_strong.py'),
    M('strong', 'with seeded(torch.randint(2**62, ()).item()):', 'with seeded(random.getrandbits(60)):', 'strong test_strong.py'),
    M('strong', 't.order>Normalize.order', 'False', 'strong test_strong.py'),
    M('strong', 'if isinstance(t, Transform): return torch.cat', 'if False: return torch.cat', 'strong test_strong.py'),
    M('strong', '            y = r.undo(y)\n', '            pass\n', 'strong test_strong.py'),
    M('strong', 'all(a is b for a,b in zip(o.tfms, self.tfms))', 'True', 'strong test_strong.py'),
    M('ema', 'return min(self.decay, (1+n)/(10+n))', 'return min(self.decay, (2+n)/(10+n))', 'ema test_ema.py'),
    M('ema', 'if self.warmup else self.decay', 'if True else self.decay', 'ema test_ema.py'),
    M('ema', 'alpha=1-d)', 'alpha=d)', 'ema test_ema.py'),
    M('ema', 'if not f: a.copy_(o)', 'pass', 'ema test_ema.py'),
    M('ema', '    self.n_updates += 1\n', '    self.n_updates += 0\n', 'ema test_ema.py'),
    M('ema', '.eval().requires_grad_(False)', '.requires_grad_(False)', 'ema test_ema.py'),
    M('ema', 'if not _is_foreign(f))', 'if True)', 'ema test_ema.py'),
    M('ema', '        if self._learn is not None: self._finish()\n', '        pass\n', 'ema test_ema.py'),
    M('ema', '    if self._cancelled: return\n', '    pass\n', 'ema test_ema.py'),
    M('ema', '    self._cancelled,self._loaded = False,None\n', '    self._loaded = None\n', 'ema test_ema.py'),
    M('ema', '    self._raw = [o.clone() for o in new]\n', '    self._raw = new\n', 'ema test_ema.py'),
    M('ema', '    self._use_weights()\n\n@patch\ndef before_batch', '    self._raw = None\n\n@patch\ndef before_batch', 'ema test_ema.py'),
    M('ema', 'if self.teacher is not None and self._versions_then==_versions(self): self', 'if self.teacher is not None: self', 'ema test_ema.py'),
    M('ema', '    "A fit that was interrupted is over"\n    self._finish()', '    pass', 'ema test_ema.py'),
    M('ema', '    self._use_averages()\n\n@patch\ndef after_fit', '    pass\n\n@patch\ndef after_fit', 'ema test_ema.py'),
    M('ema', '    self._use_averages()\n\n@patch\ndef after_epoch', '    pass\n\n@patch\ndef after_epoch', 'ema test_ema.py'),
    M('ema', '    self._use_averages()\n    self.teacher = self._raw = self._versions_then = self._loaded = None', '    self.teacher = self._raw = self._versions_then = self._loaded = None', 'ema test_ema.py'),
    M('ema', 'weights=None if self._raw is None else', 'weights=None if True else', 'ema test_ema.py'),
    M('ema', 'if self._loaded is not None: self._load(self._loaded)', 'pass', 'ema test_ema.py'),
    M('ema', '    torch.distributed.broadcast(flat, 0)\n', '    pass\n', 'ema test_ema.py'),
    M('ema', "order,run_valid,name = 5,False,'ema'", "order,run_valid,name = 65,False,'ema'", 'ema test_ema.py'),
    M('features', "x.mean((2,3)) if", "x.amax((2,3)) if", 'features'),
    M('features', "isinstance(made[1], nn.Dropout)   #", "False   #", 'features'),
    M('features', "    model.eval()\n    try:\n        with torch.no_grad(): yield", "    try:\n        with torch.no_grad(): yield", 'features'),
    M('features', 'x.mean((2,3)) if', 'x.amax((2,3)) if', 'features'),
    M('features', 'isinstance(made[1], nn.Dropout)   #', 'False   #', 'features test_backbones.py'),
    M('features', '    model.eval()\n    try:\n        with torch.no_grad(): yield', '    try:\n        with torch.no_grad(): yield', 'features'),
    M('features', 'for m,o in was.items(): m.training = o', 'pass', 'features'),
    M('features', '        try: yield got\n        finally: h.remove()', '        yield got', 'features test_matrix.py::test_interrupt'),
    M('features', 'tuple(order[at:])', '()', 'features test_matrix.py::test_vision_learner'),
    M('batchnorm', "attr = 'training' if policy=='running' else 'track_running_stats'", "attr = 'track_running_stats'", 'batchnorm'),
    M('batchnorm', "if m.training and m.track_running_stats] if policy!='update'", "if m.track_running_stats] if policy!='update'", 'batchnorm features test_matrix.py::test_fine_tune'),
    M('batchnorm', "with bn_policy([m], 'batch'): return", 'if True: return', 'batchnorm'),
    M('batchnorm', '        self.remove()\n        with self.context', '        with self.context', 'batchnorm'),
    M('batchnorm', 'apply(_full, self.model.forward(*args, **kwargs))', 'self.model.forward(*args, **kwargs)', 'test_matrix.py::test_bfloat16'),
    M('batchnorm', 'if self._waits_on is not None: forget_next_pass(self._waits_on)', 'pass', 'test_matrix.py::test_interrupt'),
    M('batchnorm', 'contexts.enter_context(cb.pass_context())', 'pass', 'test_matrix.py::test_bfloat16'),
    M('transient', 'def __reduce_ex__(self, protocol): return Callback,()', 'def _unused(self): pass', 'test_matrix.py::test_export_while_attached'),
    M('transient', 'v, memo) for', 'v) for', 'test_matrix.py::test_deepcopy'),
    M('transfer', 'non_blocking=pinned', 'non_blocking=False', 'transfer'),
    M('transfer', 'if pinned and isinstance(b, list): b = tuple(b)', 'pass', 'transfer'),
    M('transfer', 'dl.fake_l.pin_memory = pinned', 'pass', 'transfer'),
    M('memory', 'isinstance(e, torch.cuda.OutOfMemoryError)', 'False', 'memory test_cuda.py::test_memory_that_ran_out_is_torchs_own'),
    M('memory', 'except StepMemoryError: raise', 'except ZeroDivisionError: raise', 'memory'),
    M('strong', '(.2989*r+.587*g+.114*b)', '(.587*r+.2989*g+.114*b)', 'strong'),
    M('randomness', '_set_determinism(*was)', 'pass', 'randomness'),
    M('randomness', "os.environ.setdefault(_cublas, ':4096:8')", 'pass', 'randomness'),
    M('settings', 'if torch.are_deterministic_algorithms_enabled(): res', 'if False: res', 'test_cuda.py::test_resume_knows_the_algorithms'),
    M('unlabeled', 'with torch.autocast(device.type, enabled=False):   # which', 'if True:   # which', 'test_cuda.py::test_images_are_transformed_in_full_precision'),
    M('randomness', 'set_generators(states)\n', 'pass\n', 'randomness'),
    M('randomness', 'torch.initial_seed()==self._key', 'True', 'randomness test_matrix.py::test_generators'),
    M('randomness', 'learn.epoch, learn.iter, *filter', 'learn.epoch, *filter', 'randomness'),
    M('randomness', '*filter(None, [rank_distrib()])', '*[]', 'test_distributed.py::test_dropout_differs'),
    M('randomness', '        start_epoch(self.dls, self.learn.epoch)', '        pass', 'test_matrix.py::test_two_fits'),
    M('passes', "with self.drawing('pass', view), self.context(),", 'with self.context(),', 'test_objectives.py::test_gradients_are_the_sum'),
    M('passes', 'self.context(), bn_policy(norms, bn)', 'bn_policy(norms, bn)', 'test_matrix.py::test_bfloat16'),
    M('passes', "if 'classes' not in reads else []", 'if False else []', 'test_matrix.py::test_vision_learner'),
    M('passes', "'batch' if bn=='update' else bn", 'bn', 'passes'),
    M('passes', 'if key not in self.passes:', 'if True:', 'passes'),
    M('passes', '        self.passes.clear()', '        pass', 'test_objectives.py', why='only memory is freed: peak memory is measured by the benchmark'),
    M('objective', 'exp(-5*(1-pct/self.ramp_pct)**2)', 'exp(-5*(1-pct/self.ramp_pct))', 'pretext'),
    M('objective', 'opt.hypers[0].update(learn.opt.hypers[-1])', 'pass', 'objective'),
    M('objective', "p['do_wd'] = False", 'pass', 'test_parity.py objective'),
    M('objective', 'any(isinstance(o, MixedPrecision) for o in learn.cbs)', 'True', 'test_matrix.py::test_scaler_left_behind'),
    M('objective', 'if scaler is not None: scaler.step(', 'if False: scaler.step(', 'test_matrix.py::test_gradient_scaler', why='`ClipHeads` has unscaled these gradients and looked for an overflow by then, so that a plain step is the same'),
    M('objective', '    opt.zero_grad()', '    pass', 'objective test_matrix.py::test_gradient_accumulation test_parity.py'),
    M('objective', 'and not same: self.fit_opt', 'and False: self.fit_opt', 'test_matrix.py::test_other_optimizer'),
    M('objective', "seeded(random_key(seed, 'head', self.name)) if seed is not None else nullcontext()", 'nullcontext()', 'test_matrix.py::test_fit_cbs_and_learner_cbs test_matrix.py::test_generators'),
    M('unlabeled', 'self.learn.loss_grad+o.weight_at(self.pct_train)*self.loss_of(o)', 'self.learn.loss_grad-o.weight_at(self.pct_train)*self.loss_of(o)', 'test_parity.py'),
    M('unlabeled', '(loss*self._zero.grad).backward()', 'loss.backward()', 'pretext test_matrix.py::test_gradient_accumulation'),
    M('unlabeled', "order,run_valid,name = MixedPrecision.order-5,False,'unlabeled_step'", "order,run_valid,name = MixedPrecision.order-2,False,'unlabeled_step'", 'test_matrix.py::test_gradient_accumulation'),
    M('unlabeled', 'if self._cancelled: o.fit_opt.zero_grad()', 'if False: pass', 'test_matrix.py::test_cancelled_step'),
    M('companions', 'if not all(p.grad.isfinite().all() for p in params if p.grad is not None): raise CancelStepException', 'pass', 'test_matrix.py::test_overflow'),
    M('companions', '[*self.learn.model.parameters(), *params], c.max_norm', '[*self.learn.model.parameters()], c.max_norm', 'test_matrix.py::test_gradient_clip'),
    M('unlabeled', 'if self._zero.grad is not None else []', '', 'test_matrix.py::test_cancelled_step'),
    M('unlabeled', '    for o in self.objectives if found else []: o.load_state_dict(found[o.name])', '    pass', 'test_matrix.py::test_lr_find'),
    M('unlabeled', 'with preserved(x.device):   # views may draw', 'if True:', 'test_matrix.py::test_generators'),
    M('unlabeled', '    if b is None: self._it,self.n_taken', '    if False: self._it,self.n_taken', 'test_backbones.py::test_unlabelled_loader_starts_over'),
    M('unlabeled', '    if grads: torch._foreach_div_(grads, num_distrib())', '    pass', 'test_distributed.py::test_gradients'),
    M('unlabeled', 'for step in [o for o in learn.cbs if isinstance(o, UnlabeledStep)]: learn.remove_cbs(step.companions)', 'pass', 'test_matrix.py::test_add_and_remove'),
    M('companions', "i = len(names)-(names[-1]=='time')", 'i = len(names)', 'test_matrix.py::test_fit'),
    M('unlabeled', '        self._ready,self._sums,self._it,self._batch = False,{},None,None', '        self._ready = False', 'test_matrix.py::test_interrupt_while_attached'),
    M('pretext', 'torch.rot90(x, k, (2,3))', 'torch.rot90(x, -k, (2,3))', 'pretext test_parity.py'),
    M('pretext', 'for k in range(4)], 1).flatten(0,1)', 'for k in range(4)], 0).flatten(0,1)', 'pretext'),
    M('pretext', 'torch.arange(4, device=x.device).repeat(len(x))', 'torch.arange(4, device=x.device).repeat_interleave(len(x))', 'pretext'),
    M('pretext', 'return F.cross_entropy(logits, targs), logits.argmax(1)==targs', "return F.cross_entropy(logits, targs, reduction='sum'), logits.argmax(1)==targs", 'test_parity.py test_matrix.py::test_columns'),
    M('pretext', 'F.cross_entropy(logits, targs), logits.argmax(1)', 'F.cross_entropy(logits, targs), logits.argmin(1)', 'test_matrix.py::test_columns'),
    M('pretext', 'torch.where(at(3), t.flip(3), x)', 'torch.where(at(3), t.flip(2), x)', 'pretext'),
    M('step', 'if any(isinstance(o, MixedPrecision) for o in self.learn.cbs): return nullcontext()', 'pass', 'step test_matrix.py::test_two_precisions'),
    M('distributed', "self.dl.samples(self.n_steps, self.rank, self.world_size)", "self.dl.samples(self.n_steps, 0, self.world_size)", 'test_distributed.py::test_each_reads_its_own_part'),
    M('show', "if epoch is not None: dl.epoch = epoch", "pass", 'show'),
    M('show', "(wrong.float()*(1+conf)+(~wrong).float()*(1-conf))", "(wrong.float()*(1-conf)+(~wrong).float()*(1-conf))", 'show'),
    M('optimizer', "nesterov=mom>0", "nesterov=False", 'optimizer'),
    M('optimizer', "weight_decay=wd", "weight_decay=0.", 'optimizer'),
    M('optimizer', "def __reduce__(self): return partial(", "def _unused(self): return partial(", 'optimizer test_runs.py::test_export_loads_without_this_package'),
    M('optimizer', "if not hasattr(self,'_aligning'): self._aligning =", "if False: self._aligning =", 'optimizer'),
    M('schedule', "(hi-self.lr_warmup)*(pct/w)", "hi*(pct/w)", 'schedule'),
    M('schedule', "**self.power", "**1", 'schedule'),
    M('schedule', "min(10, n_epoch/8)", "min(10, n_epoch/4)", 'schedule'),
    M('schedule', "if pct<w: return", "if pct<=w and w: return", 'schedule', why='the line and the curve meet at pct = w, where both are lr_max'),
    M('schedule', "math.isfinite(o) and o>=0", "o==o", 'schedule'),
    M('learner', "wd_bn_bias:bool=True", "wd_bn_bias:bool=False", 'learner test_parity.py'),
    M('learner', "new = nn.Sequential(nn.Dropout(dropout), new)", "pass", 'learner'),
    M('learner', "list_models(module=torchvision.models)", "list_models()", 'learner'),
    M('report', "statistics.stdev(xs)", "statistics.pstdev(xs)", 'report'),
    M('report', "256 if r['size']==224 else r['size']", "r['size']", 'report'),
    M('report', "format(o['accuracy']-t,'+.2f')", "format(t-o['accuracy'],'+.2f')", 'report'),
    M('report', "len(pairs)-1)*statistics.stdev(pairs)", "len(pairs))*statistics.stdev(pairs)", 'report'),
    M('report', "va,vb = statistics.variance(a)/len(a)", "va,vb = statistics.variance(a)", 'report'),
    M('report', "if len(pairs)>1:", "if False:", 'report'),
    M('report', "if low<=0<=high", "if low<=diff<=high", 'report'),
    M('report', "if damaged: raise", "if False: raise", 'report'),
    M('report', "if not np.isfinite(tables[1]['loss']).all(): raise", "if False: raise", 'report'),
    M('report', "if lack: lines +=", "if False: lines +=", 'report'),
    M('run_report', "if reach and ys[-1]>high+reach else ys[-1]", "if False else ys[-1]", 'run_report'),
    M('run_report', "[1-x for x in h.get('error_rate', [])]", "[x for x in h.get('error_rate', [])]", 'run_report'),
    M('run_report', "bbox_to_anchor=(.5,-.18)", "bbox_to_anchor=(.5,.9)", 'run_report'),
    M('html', "Html(escape(printable(o)))", "Html(printable(o))", 'html run_report doctor_report'),
    M('objective_text', "if names.count(n)>1: raise", "if False: raise", 'objective_text'),
    M('objective_text', "cls(**common|kw)", "cls(**kw|common)", 'objective_text'),
    M('objective_text', "sorted(kw.items())", "kw.items()", 'objective_text'),
    M('command', "128+getattr(e,'signal',2)", "130", 'command'),
    M('command', "if str(v).startswith('-') else", "if False else", 'command'),
    M('run', "learn.recorder.values[-1][2]", "learn.recorder.values[0][2]", 'test_runs.py::test_accuracy_is_that_of_the_last_epoch'),
    M('run', "*([] if baseline else cfg.objectives())", "*cfg.objectives()", 'test_runs.py::test_baseline_has_no_second_task'),
    M('run', "*([] if cfg.ema is None else [EMA(cfg.ema)])", "", 'test_runs.py::test_averaged_weights_of_the_command'),
    M('run', "self.unlabeled_bs*passes_per_image(self.objectives())", "self.unlabeled_bs*4", 'test_runs.py::test_objectives_of_the_command'),
    M('run', "            check_finite(learn.model)\n", "", 'test_errors.py::test_weights_that_are_not_finite_in_the_end'),
    M('run', "if made and not _worth_keeping(folder):", "if False:", 'run'),
    M('run', "if (why := failed_run(folder)): raise", "if False: raise", 'run'),
    M('imagewang', "if args['no_val']: given['val_in_pool'] = False", "pass", 'test_runs.py::test_no_val_of_the_command'),
    M('imagewang', "seed=cfg.seed+i", "seed=cfg.seed", 'test_runs.py::test_command_with_baseline'),
    M('folders', "of[k][:per_class]", "of[k][-per_class:]", 'folders test_runs.py::test_labels_that_are_not_used_are_not_read'),
    M('folders', "if len(v)<per_class}", "if len(v)<0}", 'folders'),
    M('data', "if labels_per_class is not None: files", "if False: files", 'test_runs.py::test_labels_that_are_not_used_are_not_read'),
    M('optimizer', "partial(Adam, sqr_mom=.999, eps=1e-8)", "Adam", 'optimizer'),
    M('schedule', "SchedCos(lr, 0*lr)", "SchedLin(lr, 0*lr)", 'schedule'),
    M('schedule', "SchedLin(lr/div, lr)", "SchedLin(0*lr, lr)", 'schedule'),
    M('learner', "nn.init.kaiming_normal_(new.weight, mode='fan_out', nonlinearity='relu')", "pass", 'learner'),
    M('learner', "c*width//64", "c//2", 'test_runs.py::test_settings_of_training_of_the_command'),
    M('run', "bs=self.bs and self.bs//self.processes, ", "", 'test_runs.py::test_settings_of_training_of_the_command'),
    M('run', "self.dropout, get_opt_func(self.opt)[0]", ".5, get_opt_func(self.opt)[0]", 'test_runs.py::test_settings_of_training_of_the_command'),
    M('run', "self.dropout, get_opt_func(self.opt)[0]", "self.dropout, get_opt_func('nesterov')[0]", 'run'),
    M('run', "self.lr = get_opt_func(self.opt)[1]", "self.lr = .1", 'test_runs.py::test_settings_of_training_of_the_command'),
    M('run', "pct_start=.72", "pct_start=.5", 'test_runs.py::test_flat_cos'),
    M('imagewang', "            if o.is_dir(): o.rmdir()\n", "            pass\n", 'imagewang'),
    M('imagewang', "    ResumeTraining(Path(args['out'] or '.')/'resume', args['save_every'])\n", "", 'test_errors.py::test_mistakes_that_are_known_before_anything_is_read'),
    M('imagewang', "if (why := failed_run(folder)): print", "if False: print", 'test_errors.py::test_diverged_run_is_no_result'),
    M('doctor_report', "open(file, 'x', encoding='utf-8')", "open(file, 'w', encoding='utf-8')", 'doctor_report'),
    M('doctor_report', "<figcaption>{to_html(name)}", "<figcaption>{name}", 'doctor_report'),
    M('doctor_report', "        if o: check_writable(o, option)\n", "        pass\n", 'test_errors.py::test_doctor_mistakes'),
    M('checkpoint', "if hashlib.sha256(data[n:]).hexdigest().encode()!=bytes(data[len(_magic):n-1]): raise", "if False: raise", 'checkpoint'),
    M('checkpoint', "os.replace(part, path)", "path.write_bytes(part.read_bytes()[:99])", 'checkpoint'),
    M('checkpoint', "        _sync_folder(path.parent)\n", "", 'test_resume.py::test_folder_is_forced_to_disk'),
    M('checkpoint', "return t.clone() if t.device.type=='cpu'", "return t if t.device.type=='cpu'", 'checkpoint'),
    M('checkpoint', "folder.mkdir(parents=True, exist_ok=True); lock.acquire()", "folder.mkdir(parents=True, exist_ok=True)", 'checkpoint'),
    M('settings', "if i.opname=='STORE_ATTR' and", "if False and", 'settings'),
    M('settings', "res['frozen'] = [n for n,p in model.named_parameters() if not p.requires_grad]", "res['frozen'] = []", 'test_resume_state.py::test_frozen_layers_are_named'),
    M('settings', "'labels':describe_labels(dset)", "'labels':None", 'test_resume_state.py'),
    M('settings', "if k in allow or a==b: continue", "continue", 'settings'),
    M('state', "set_rng_states(state['rng'])", "pass", 'test_resume.py::test_generators_and_accumulation_come_back'),
    M('state', "p.grad = state['grads'][n].to(p) if n in state['grads'] else None", "p.grad = None", 'test_resume.py::test_generators_and_accumulation_come_back'),
    M('state', "learn.pct_train,learn.train_iter,learn.loss = state['pct_train'],state['train_iter'],state['loss']", "learn.train_iter,learn.loss = state['train_iter'],state['loss']", 'resume'),
    M('state', "(epoch+(taken>0),0) if done else (epoch,taken)", "(epoch,taken)", 'resume test_resume.py::test_killed_twice'),
    M('state', "opt=learn.opt.state_dict()", "opt=dict(state=[], hypers=learn.opt.state_dict()['hypers'])", 'resume test_resume.py::test_killed_twice'),
    M('state', "if is_clock(state): return state+by", "if is_clock(state): return state", 'state test_resume_state.py::test_time_limit_counts_training_only'),
    M('state', "(lambda k,s: k==tuple(s[:2]), lambda k,s: k[0]==s[0])", "(lambda k,s: k[0]==s[0],)", 'test_resume_state.py::test_two_of_one_class_in_another_order'),
    M('state', "x.default_factory = o.default_factory", "pass", 'state'),
    M('signals', "if os.getpid()!=self.pid or not self._within(frame):", "if not self._within(frame):", 'test_resume.py::test_forked_process_writes_no_checkpoint'),
    M('streams', "def wif(self:StreamDL): steady_worker()", "def wif(self:StreamDL): pass", 'test_resume.py::test_signal_to_the_process_group'),
    M('streams', "si_pid==parent.pid else 1", "si_pid==None else 1", 'test_resume.py::test_workers_end_with_their_process'),
    M('resume', "if self.main._fit and self.training: self.learn.iter += self.main._fit.shift", "pass", 'resume test_resume.py::test_killed_twice'),
    M('resume', "fit.runs[cb] = vars(cb).get('run'); cb.run = False", "pass", 'resume'),
    M('resume', "if due or last or fit.stop.got", "if due or fit.stop.got", 'test_resume.py::test_interrupt_in_a_notebook'),
    M('resume', "if is_checkpoint(o)][:-2]", "if is_checkpoint(o)][:-1]", 'resume'),
    M('resume', "if hasattr(self.learn,'recorder'): self.rows.append(list(self.recorder.log))", "pass", 'test_resume.py::test_lines_of_finished_epochs_are_logged_again'),
    M('resume', "fits[str(self._folder.absolute())] = fit.number+1", "fits", 'resume test_resume_state.py::test_second_equal_fit_trains_on'),
    M('resume', "saved = at is not None and self._save()", "saved = at is not None and (self._save() or True)", 'test_resume.py::test_saved_is_said_where_it_is_true'),
    M('resume', "before is not self and before._fit and not on_stack(before._fit.frame): before._end()", "before is not self and before._fit and not on_stack(before._fit.frame): pass", 'test_resume_state.py::test_nothing_is_left_of_a_fit_that_breaks_off'),
    M('progressive', "self.start+(1-self.start)*pct/self.until", "self.start+pct/self.until", 'progressive'),
    M('progressive', "int(full*share/self.multiple+1e-6)*self.multiple", "int(full*share)", 'progressive'),
    M('progressive', "order,run_valid = -1,False", "order,run_valid = -1,True", 'progressive'),
    M('unlabeled', "return x if grow is None else grow.resized(x)", "return x", 'progressive'),
    M('learner', "act_cls=nn.ReLU if base==name else Mish", "act_cls=nn.ReLU", 'learner'),
    M('learner', "if smooth and kwargs.get('loss_func') is None:", "if smooth:", 'learner'),
    M('run', "if getattr(self, k) is None: setattr(self, k, v)", "setattr(self, k, v)", 'run'),
    M('run', "(k not in late or v)", "True", 'run'),
    M('prediction', 'class_probs(logits, batch.task).amax(-1)', 'class_probs(logits, batch.task).amin(-1)', 'prediction'),
    M('prediction', "if task=='multi': return ((logits>0)==(targets>0)).flatten()", "if task=='multi': return ((logits>0)==(targets>.5)).flatten()", 'prediction test_losses.py'),
    M('prediction', 'return kl_loss(target, logits, batch.task), ~', 'return kl_loss(logits, target, batch.task), ~', 'prediction test_losses.py'),
    M('prediction', 'return batch.x+r', 'return batch.x-r', 'prediction test_losses.py'),
    M('prediction', '        return batch.teacher(weak)', '        return batch.targets(weak)', 'prediction test_objectives.py'),
    M('prediction', 'return n/len(labels)', 'return n', 'prediction'),
    M('prediction', 'loss = loss+self.fairness*fairness_loss', 'loss = loss-self.fairness*fairness_loss', 'prediction test_losses.py'),
    M('prediction', "return self.kept['align'](p) if 'align' in self.kept else p", "return p", 'prediction test_losses.py'),
    M('embedding', 'return [weak, self.strong_view]', 'return [self.strong_view, self.strong_view]', 'embedding'),
    M('embedding', 'F.cosine_similarity(a, b, dim=0)', 'F.cosine_similarity(a, b, dim=1)', 'embedding'),
    M('embedding', 'barlow_twins_loss(*z, lam=self.lam)', 'barlow_twins_loss(*z)', 'embedding'),
    M('health', "device=i.device)).sum(0)", "device=i.device)).amax(0)", 'health'),
    M('health', "float(p[top])>.95 and float(t[top])<.8", "float(p[top])>.95", 'health'),
    M('health', "if self.steps<min_steps: return []", "if self.steps<1: return []", 'health'),
    M('health', "mean<o.chance+max", "mean<o.chance-max", 'health'),
    M('health', "self.bad+(~l.isfinite()).float()", "self.bad", 'health'),
    M('health', "found = [(k,s) for k,s in self._look() if k not in self.said]", "found = [*self._look()]", 'health'),
    M('progress', "if self._silenced and self._learn.logger is noop: self._learn.logger = print", "pass", 'progress'),
    M('duplicates', "max_bits:int=8,", "max_bits:int=2,", 'duplicates'),
    M('duplicates', "np.triu(bits<=max_bits+2.5, 1)", "np.triu(bits<=max_bits+2.5, 0)", 'duplicates'),
    M('duplicates', "o.std>=min_std and ", "", 'duplicates'),
    M('duplicates', "G -= G.mean(1, keepdims=True); ", "", 'duplicates doctor'),
    M('doctor', "0 if p in valid else 1 if p in labeled else 2", "0 if p in labeled else 1 if p in valid else 2", 'doctor'),
    M('doctor', "if r>0]", "if True]", 'doctor'),
    M('doctor', "[(r+k)%4 for r in range(4)]", "[(r-k)%4 for r in range(4)]", 'doctor'),
    M('doctor', ".quantile(.95)", ".quantile(.05)", 'doctor'),
]

def notebook(module):
    "The notebook that exports `module`"
    return next(o for o in sorted((root/'nbs').glob('*.ipynb')) if f'#| default_exp {module}"' in o.read_text(encoding='utf-8'))

def once(text, m, where):
    if text.count(m['old'])!=1: raise SystemExit(f"{m['module']}: {m['old']!r} is {text.count(m['old'])} times in {where}: name a piece that is there once.")
    return text.replace(m['old'], m['new'])

def broken(m, top=root):
    "Texts of the module and of its notebook with the mutant in them; raises where it doesn't apply"
    module,nb = top/f"sesemi_fastai/{m['module']}.py",notebook(m['module'])
    cells = json.loads(nb.read_text(encoding='utf-8'))
    src = '\0'.join(''.join(c['source']) for c in cells['cells'] if c['cell_type']=='code' and '#| export' in ''.join(c['source']))
    for c,s in zip((c for c in cells['cells'] if c['cell_type']=='code' and '#| export' in ''.join(c['source'])), once(src+'\n', m, nb.name)[:-1].split('\0')): c['source'] = s
    return {f'sesemi_fastai/{module.name}':once(module.read_text(encoding='utf-8'), m, module.name), f'nbs/{nb.name}':json.dumps(cells)}

def selection(m):
    return [f'tests/{o}' if o.endswith('.py') or '::' in o else f'tests/test_notebooks.py::test_notebook[{notebook(o).stem}]' for o in m['tests']]

def _pytest(d, tests, start_method):
    "Run `tests` of the copy in `d`, in a process of its own, whose exit status is pytest's"
    import pytest,resource
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    multiprocessing.set_start_method('fork', force=True)   # loaders' workers, which know what a notebook defines
    out = os.open(f'{d}/out.txt', os.O_WRONLY|os.O_CREAT)
    for o in (1,2): os.dup2(out, o)
    multiprocessing.set_start_method(start_method, force=True)   # as without this process above it
    os.chdir(d); sys.path.insert(0, d); os.environ['PYTHONPATH'] = d
    sys.exit(pytest.main(['-x','-q','--disable-warnings','-p','no:cacheprovider',*tests]))

def run(tests, changes={}):
    "Whether `tests` pass in a copy of the repository with `changes`, and the first that didn't"
    with tempfile.TemporaryDirectory() as d:
        for o in ('sesemi_fastai','nbs','tests'): shutil.copytree(root/o, Path(d)/o, ignore=shutil.ignore_patterns('__pycache__','results','.ipynb_checkpoints'))
        for k,v in changes.items(): (Path(d)/k).write_text(v, encoding='utf-8')
        p = processes.Process(target=_pytest, args=(d, tests, multiprocessing.get_start_method()))
        p.start(); p.join(wait)
        if p.exitcode is None: p.kill(); p.join(); return 'hangs',None
        if p.exitcode<0: return 'hangs',None
        out = (Path(d)/'out.txt').read_text(errors='replace'); failed = re.search(r'^(?:FAILED|ERROR) tests/(\S+)', out, re.M)
        return ('survived',None) if p.exitcode==0 else ('caught',failed[1]) if failed else ('error',out[-2000:])

def try_one(m):
    start = time.time(); outcome,by = run(selection(m), broken(m))
    print(f"{outcome:<10} {m['module']:<13} {m['old'][:50]!r}"+(f" by {by}" if by else ''), flush=True)
    return dict(m, outcome=outcome, by=by, seconds=round(time.time()-start, 1))

def main(args):
    key = lambda o: (o['module'],o['old'],o['new'])
    have = {key(o):o for o in (json.loads(results.read_text()) if results.exists() else [])}
    which = [m for m in mutants if not args or m['module'] in args or ('missing' in args and key(m) not in have)]
    for m in mutants: broken(m)     # all apply, before any is tried
    tests,n,lock = sorted({t for m in which for t in selection(m)}),os.cpu_count(),threading.Lock()
    def f(m):
        r = try_one(m)
        with lock:
            have[key(m)] = r; results.parent.mkdir(exist_ok=True)
            results.write_text(json.dumps([have[key(o)] for o in mutants if key(o) in have], indent=1)+'\n')
    with ThreadPoolExecutor(n) as ex:
        for outcome,by in ex.map(run, [[t] for t in tests]):
            if outcome!='survived': raise SystemExit(f'Without any mutant {by or outcome}: mend that first.')
        print(f'Without any mutant all pass; {len(which)} to try', flush=True)
        list(ex.map(f, which))
    res = [have[key(m)] for m in mutants if key(m) in have]
    print(f"{sum(o['outcome'] in ('caught','hangs') for o in res)} of {len(res)} noticed; {len(mutants)-len(res)} not tried")
    left = [o for o in res if o['outcome'] not in ('caught','hangs')]
    for o in left: print(f"{o['outcome']}: {o['module']}, {o['old']!r} -> {o['new']!r}: {o['why'] or o['by'] or 'no reason is known'}")
    return any(not o['why'] for o in left)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
