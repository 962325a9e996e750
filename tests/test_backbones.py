"Any classifier: the head finds its place, reads what the body gives, and leaves without a trace"
import copy
import pytest,torch
from torch import nn
from torchvision import models as tv
from fastai.vision.all import Callback,DataLoaders,Learner,SGD,create_vision_model,xresnet18
from sesemi_fastai.all import RotationPretext,find_feature_layer
from sesemi_fastai.batchnorm import bn_groups

def vit(num_classes): return tv.VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=num_classes)
def by_timm(name, **kw):
    def f(num_classes): return pytest.importorskip('timm').create_model(name, num_classes=num_classes, **kw)
    return f

MODELS = dict(resnet18=(tv.resnet18,512), resnext50_32x4d=(tv.resnext50_32x4d,2048), densenet121=(tv.densenet121,1024), mobilenet_v3_small=(tv.mobilenet_v3_small,1024),
    efficientnet_b0=(tv.efficientnet_b0,1280), convnext_tiny=(tv.convnext_tiny,768), vgg11_bn=(tv.vgg11_bn,4096), vit=(vit,32),
    xresnet18=(lambda num_classes: xresnet18(n_out=num_classes),512), vision_learner=(lambda num_classes: create_vision_model(tv.resnet18, num_classes, pretrained=False),512),
    timm_resnet=(by_timm('resnet10t', drop_rate=.5),512), timm_convnext=(by_timm('convnext_atto', drop_rate=.5),320),
    timm_efficientnet=(by_timm('efficientnet_lite0', drop_rate=.5),1280), timm_vit=(by_timm('vit_tiny_patch16_224', img_size=64, drop_rate=.5, depth=2),192))

class Loader:
    "One fixed batch"
    def __init__(self, *batch): self.batch,self.device,self.after_batch = batch,torch.device('cpu'),None
    def __len__(self): return 1
    def __iter__(self): yield self.batch
    def to(self, device): pass

@pytest.mark.parametrize('name', MODELS)
def test_backbone(name):
    arch,width = MODELS[name]
    torch.manual_seed(0)
    model = arch(num_classes=3); keys = list(model.state_dict())
    x,u = torch.randn(2,3,64,64),torch.randn(2,3,64,64)
    learn = Learner(DataLoaders(Loader(x, torch.tensor([0,1])), Loader(x, torch.tensor([0,1])), Loader(u)), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    cb,grads = RotationPretext(),{}; learn.add_cb(cb)
    layer = find_feature_layer(model, x); assert layer.width==width
    last = layer.linear if layer.linear is not None else model[-1][-1]   # vision_learner's
    class Last(Callback):
        order = 100
        def before_step(self): grads[cb.weight] = last.weight.grad.clone(); grads['head',cb.weight] = copy.deepcopy(cb.fit_heads['head'].weight.grad)
    state = copy.deepcopy(model.state_dict())
    with learn.no_bar(), learn.no_logging():
        for w in (0.,1.): model.load_state_dict(state); cb.weight = w; learn.fit(1, 0., cbs=Last())
    assert torch.allclose(grads[0.], grads[1.], rtol=1e-4, atol=1e-7), 'rotated views trained the classifier'
    assert cb.fit_heads['head'].weight.shape==(4,width) and grads['head',0.] is None and grads['head',1.].abs().sum()>0 and learn.recorder.values[0][-2]>0
    model.eval(); torch.manual_seed(1)                 # without batch statistics, a head's dropout would be all that differs between two passes
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.train()
    frozen = [layer(model, u) for _ in range(2)]
    if name not in ('vgg11_bn','vit'): assert torch.equal(*frozen)
    learn.remove_cb(cb)
    assert list(model.state_dict())==keys and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

@pytest.mark.parametrize('name', ['resnet18','xresnet18','timm_efficientnet'])   # the last one's BatchNorm has the activation within
def test_batchnorm_groups(name):
    "In groups the outputs are those of a forward pass for each, and the buffers those of the first"
    torch.manual_seed(0)
    model = MODELS[name][0](num_classes=3).train(); x = torch.randn(6,3,64,64)
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    if hasattr(model,'drop_rate'): model.drop_rate = 0.
    first,second = copy.deepcopy(model),copy.deepcopy(model)
    with bn_groups(model, 2): got = model(x)
    assert torch.allclose(got, torch.cat([first(x[:3]),second(x[3:])]), atol=1e-5)
    for (k,v),w in zip(model.state_dict().items(), first.state_dict().values()): assert torch.allclose(v, w, atol=1e-6), k

def test_unlabelled_loader_starts_over():
    "Loaders of other kinds: the unlabelled one begins again where it is shorter than the labelled"
    class Three(Loader):
        def __len__(self): return 3
        def __iter__(self): yield from [self.batch]*3
    x,y = torch.randn(2,3,64,64),torch.tensor([0,1])
    learn = Learner(DataLoaders(Three(x,y), Loader(x,y), Loader(x)), tv.resnet18(num_classes=3), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=RotationPretext())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert len(learn.recorder.losses)==3 and learn.unlabeled_step.n_taken==1

def test_an_epoch_asks_the_unlabelled_loader_for_its_batches_only():
    "Loaders of other kinds can be looked at only by beginning a pass: that is done before a fit, not at each epoch and restart"
    begun = []
    class Three(Loader):
        def __len__(self): return 3
        def __iter__(self): yield from [self.batch]*3
    class Counted(Loader):
        def __iter__(self): begun.append(1); yield self.batch
    x,y = torch.randn(2,3,64,64),torch.tensor([0,1])
    def fit(n):
        begun.clear(); learn = Learner(DataLoaders(Three(x,y), Loader(x,y), Counted(x)), tv.resnet18(num_classes=3), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=RotationPretext())
        with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
        return len(begun)
    assert fit(2)-fit(1)==3

def test_no_place_is_an_error_that_says_so():
    model,x = tv.squeezenet1_1(num_classes=3),torch.randn(2,3,64,64)
    learn = Learner(DataLoaders(Loader(x, torch.tensor([0,1])), Loader(x, torch.tensor([0,1])), Loader(x)), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='SqueezeNet.*features='): learn.fit(1, cbs=RotationPretext())
        cb = RotationPretext(features='features'); learn.fit(1, 1e-3, cbs=cb); assert cb.fit_heads['head'].in_features==512
